"""Parity of MGN with the released code: assignment, forward passes with what lies between, losses and gradients; and its limits."""
import math

import micro
import numpy as np
import pytest
import torch
from conftest import close
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_han import VARIANTS, fill
from torch.nn import functional as F

from avvp_nb.core import InputError, read_json, shared
from avvp_nb.data.clips import Batch
from avvp_nb.methods import mgn
from avvp_nb.methods.method import METHODS
from avvp_nb.methods.mgn import (
    LOSS,
    MGN,
    RECIPE,
    AssignAttention,
    Assignment,
    Block,
    Group,
    assign,
    band,
    factor_limits,
    group_keys,
    gumbel_noise,
    mgn_keys,
    shares,
    time_factor,
)
from avvp_nb.methods.official import from_official, to_official
from avvp_nb.metrics import check_parsing
from avvp_nb.records.spec import RunSpec
from avvp_nb.records.store import Store
from avvp_nb.records.weights import load_weights
from avvp_nb.runs.single import run
from avvp_nb.train.callbacks import CheckpointCB, ScoreCB
from avvp_nb.train.lanes import Lane, why_not
from avvp_nb.train.learner import Learner, predict
from avvp_nb.train.stack import StackedLearner

TINY = {**micro.SIZES, "heads": 4, "depths": (1, 1, 2), "seconds": 5}


@pytest.fixture(scope="module")
def official_keys(golden):
    keys = read_json(shared("golden", "state_dict_keys_baselines.json"))["mgn"]["keys"]
    return {k["key"]: k["shape"] for k in keys}


@pytest.fixture(scope="module")
def inputs(golden):
    return {k: torch.tensor(v) for k, v in golden("inputs_b3").items()}


def build(official_keys, variant, **kw):
    return from_official(fill(official_keys, "chirp" if variant else "sine"), "mgn", strict=True, **kw)


def forward(model, inputs, **kwargs):
    return model(*(inputs[k] for k in ("audio", "visual", "visual_st")), **kwargs)


def watched(model):
    "What flows between the parts of a network: outputs by name of module, filled by its next pass"
    seen = {}
    for name, m in model.named_modules():
        if name.endswith((".blocks", "audio.cross")): m.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, o))
    return seen


def tiny(seed=0, **kw):
    torch.manual_seed(seed)
    return MGN(**{**TINY, **kw})


# ---- parity

def test_every_official_tensor_has_its_place(official_keys):
    assert {o for o, _, _ in mgn_keys()} == set(official_keys) and len(official_keys) == 322
    assert sum(int(np.prod(s)) for s in official_keys.values()) == 4_366_065 == sum(p.numel() for p in MGN().parameters())


def test_the_rule_that_fills_the_weights_is_the_recorded_one(golden, official_keys):
    "Before any pass: first and last numbers and sums of every tensor"
    recorded = read_json(shared("golden", "state_dict_keys_baselines.json"))["mgn"]["keys"]
    for rule in ("sine", "chirp"):
        filled = fill(official_keys, rule)
        for k in recorded:
            x, want = filled[k["key"]].double().flatten(), k[rule]
            np.testing.assert_allclose([*x[:3].tolist(), x[-1].item()], [*want["first"], want["last"]], atol=1e-7)
            assert x.sum().item() == pytest.approx(want["sum_float64"], abs=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_forward(golden, official_keys, inputs, variant, mode):
    case = golden(f"mgn_forward{'_hard' if mode == 'hard' else ''}{variant}")
    assert (case.info["options"]["unimodal_assign"], case.info["options"]["crossmodal_assign"]) == (mode, "soft")
    model = build(official_keys, variant, unimodal=mode)
    seen = watched(model)
    with torch.no_grad(): out = forward(model, inputs)
    both, audio, visual = out.extra["grouped"]
    cross = seen["audio.cross"]
    got = {"global_prob": out.video, "a_prob": out.audio, "v_prob": out.visual, "a_frame_prob": out.segments[:, :, 0],
           "v_frame_prob": out.segments[:, :, 1], "proj_a": out.extra["projected"][0], "proj_v": out.extra["projected"][1],
           "tokens_a": seen["audio.blocks"], "tokens_v": seen["visual.blocks"], "tokens_av": seen["both.blocks"],
           "crossed_a": cross.embedding, "assign_cross": cross.used, "assign_logits_cross": cross.logits}
    got |= dict(zip(("aud_cls_logits", "vis_cls_logits"), out.extra["token_logits"]))
    for k, g in {"a": audio, "v": visual, "av": both}.items():
        got |= {f"query_{k}": g.queries, f"emb_{k}": g.embedding, f"assign_{k}": g.used, f"assign_logits_{k}": g.logits}
    assert set(got) == set(case)
    for key, value in got.items(): close(case, key, value.detach())


def step(golden, official_keys, inputs, variant, noise=None):
    "(case, loss terms, model with gradients) of one training step"
    case = golden(f"mgn_loss{variant}")
    model = build(official_keys, variant, drop_path=0.)
    if noise is not None: model.train()
    parsing = forward(model, inputs)
    terms = LOSS(parsing, Batch(None, None, None, torch.tensor(case["label"]), None, {}))
    sum(terms.values()).backward()
    return case, parsing, terms, model


@pytest.mark.parametrize("variant", ["", "_chirp", "_gumbel_chirp"])
def test_loss_and_gradients(golden, official_keys, inputs, variant, monkeypatch):
    noise = torch.tensor(golden("mgn_loss_gumbel_chirp")["gumbel_noise"])[:, 0] if "gumbel" in variant else None
    asked = []
    monkeypatch.setattr(mgn, "gumbel_noise", lambda z: asked.append(z.shape) or noise)
    case, parsing, terms, model = step(golden, official_keys, inputs, variant, noise)
    assert asked == ([] if noise is None else [noise.shape])          # the cross step alone draws, and only in training
    names = {"loss_audio": "audio", "loss_visual": "visual", "loss_global": "video", "loss_cls_audio": "tokens_audio",
             "loss_cls_visual": "tokens_visual"}
    for key, name in names.items(): close(case, key, terms[name].detach())
    close(case, "loss_total", sum(terms.values()).detach())
    for key, value in {"global_prob": parsing.video, "a_prob": parsing.audio, "v_prob": parsing.visual}.items():
        close(case, key, value.detach())
    grads = to_official(model, "mgn", of=lambda p: p.grad)
    for key in [k for k in case if k.startswith("grad.")]: close(case, key, grads[key[5:]])
    close(case, "grad_norms", np.array([grads[k].norm().item() for k in case.info["parameter_keys"]]))


def test_the_noise_changes_the_numbers(golden):
    "Both cases of the loss differ by more than their tolerance, so that the noise is really tested"
    a, b = golden("mgn_loss_chirp"), golden("mgn_loss_gumbel_chirp")
    assert np.abs(a["global_prob"] - b["global_prob"]).max() > 3e-5


@pytest.mark.parametrize("mode", ["soft", "hard", "gumbel_hard"])
def test_assign(golden, monkeypatch, mode):
    case = golden("mgn_assign")
    layer = AssignAttention(8, mode != "soft")
    own = dict(layer.named_parameters())
    for official, ours, rows in group_keys("", "", 8):
        if not official.startswith(".assign."): continue
        own[ours.removeprefix(".assign.")].data[rows] = torch.tensor(case[official.removeprefix(".assign.")])
    noise = torch.tensor(case["gumbel_noise"])[:, 0]
    monkeypatch.setattr(mgn, "gumbel_noise", lambda z: noise)
    layer.train(mode == "gumbel_hard")
    query, key = (torch.tensor(case[k], requires_grad=True) for k in ("query", "key"))
    out, _, a = layer(query, key)
    out.square().sum().backward()
    for k, value in {"out": out, "assign": a.used, "factor": time_factor(a), "grad_query": query.grad, "grad_key": key.grad}.items():
        close(case, f"{mode}_{k}", value.detach())


def test_to_official_and_back(official_keys):
    model = build(official_keys, "_chirp")
    file = to_official(model, "mgn")
    assert set(file) == set(official_keys)
    again = from_official({"state_dict": {f"module.{k}": v for k, v in file.items()}}, "mgn", strict=True)
    assert micro.same_weights(model, again) and not again.training
    del file["audio_cug.han_encoder.norm_x.bias"]
    with pytest.raises(InputError, match="1 tensors are missing, such as 'audio_cug.han_encoder.norm_x.bias'"): from_official(file, "mgn")


def test_parity_has_teeth(golden, official_keys, inputs):
    "Slightly wrong networks fail the same comparison"
    case = golden("mgn_forward_chirp")

    def differs(change, key="a_prob"):
        model = build(official_keys, "_chirp")
        change(model)
        with torch.no_grad(): out = forward(model, inputs)
        with pytest.raises(AssertionError): close(case, key, {"a_prob": out.audio, "global_prob": out.video}[key])

    def heads(model):
        for m in model.modules():
            if hasattr(m, "heads") and isinstance(m.heads, int): m.heads = 4
    differs(heads)
    differs(lambda m: setattr(m.audio, "cross", None))
    differs(lambda m: setattr(m.audio.cross.assign, "hard", False))
    differs(lambda m: setattr(m.both, "forward", lambda s, t, f=m.both.forward: f(t, s)), "global_prob")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda(golden, official_keys, inputs):
    case, model = golden("mgn_forward_chirp"), build(official_keys, "_chirp").cuda()
    with torch.no_grad(): out = forward(model, {k: v.cuda() for k, v in inputs.items()})
    close(case, "a_frame_prob", out.segments[:, :, 0].cpu())


# ---- assignment

@settings(max_examples=60, deadline=None)
@example(seed=0, q=3, s=1, scale=28.0)            # a share that is 0 in float32
@given(seed=st.integers(0, 10**6), q=st.integers(1, 6), s=st.integers(1, 7), scale=st.floats(.1, 30))
def test_an_assignment_is_a_share(seed, q, s, scale):
    z = scale * torch.randn(2, q, s, generator=torch.Generator().manual_seed(seed))
    soft, hard = assign(z), assign(z, True)
    torch.testing.assert_close(soft.used.sum(1), torch.ones(2, s))
    assert torch.equal(hard.used.sum(1), torch.ones(2, s)) and torch.equal(hard.used.argmax(1), z.argmax(1))
    assert torch.equal(hard.soft, soft.soft)
    w = shares(hard.used)
    n = hard.used.sum(-1)
    torch.testing.assert_close(w.sum(-1), n / (n + 1))           # never all of what a query could take
    low, high = factor_limits(s)
    f = time_factor(soft)
    assert (f >= low - 1e-6).all() and (f <= high + 1e-6).all()
    assert torch.equal(time_factor(soft, score="maxnorm").amax(-1), torch.ones(2, q))


def test_worked_example():
    z = torch.tensor([[[math.log(3), math.log(2), 0], [0, 0, math.log(3)]]])
    f = time_factor(assign(z))[0, 0]
    torch.testing.assert_close(f, torch.tensor([1.395793, 1.364147, 1.240060]), atol=1e-6, rtol=0)
    torch.testing.assert_close(shares(assign(z).used)[0, 1], torch.tensor([.107143, .142857, .321429]), atol=1e-6, rtol=0)


def test_limits_are_those_of_the_text():
    assert factor_limits() == pytest.approx((1.039270, 1.231969), abs=1e-6)
    assert band() == pytest.approx((.4059, .4811), abs=5e-5)
    assert .5 / time_factor(Assignment(None, torch.full((1, 2, 10), .5))).flatten()[0].item() == pytest.approx(.4545, abs=1e-4)


@pytest.mark.parametrize("seconds", [2, 5, 30])
def test_limits_are_reached(seconds):
    "By a class that has one second alone, and by one that has all the others"
    eye = torch.eye(seconds)[None]
    got = [time_factor(Assignment(None, x))[0, 0, 0].item() for x in (1 - eye, eye)]
    assert got == pytest.approx(factor_limits(seconds), abs=1e-6)
    low, high = band(seconds, .3)
    assert low * got[1] == pytest.approx(.3) and high * got[0] == pytest.approx(.3)


def test_gumbel_noise_is_gumbel():
    torch.manual_seed(0)
    g = gumbel_noise(torch.empty(300, 400)).double().flatten()
    assert g.mean().item() == pytest.approx(.57722, abs=.01) and g.var().item() == pytest.approx(math.pi**2 / 6, abs=.03)
    for q in (-1., 0., 1., 3.): assert (g <= q).double().mean().item() == pytest.approx(math.exp(-math.exp(-q)), abs=5e-3)
    torch.manual_seed(0)
    assert torch.equal(gumbel_noise(torch.empty(300, 400)).double().flatten(), g)


@pytest.mark.parametrize("coin, want", [(0., -math.log(24 * math.log(2))), (1., -math.log(-math.log1p(-2**-24)))])
def test_gumbel_noise_is_finite_at_both_ends(monkeypatch, coin, want):
    monkeypatch.setattr(F, "dropout", lambda x, p: 2 * coin * x)
    g = gumbel_noise(torch.empty(3, 2))
    assert g.shape == (3, 2) and g.isfinite().all() and g[0, 0].item() == pytest.approx(want, rel=1e-4)


def test_nothing_is_drawn_in_evaluation():
    net, x = tiny(unimodal="hard", crossmodal="hard").eval(), [torch.randn(2, 5, 8) for _ in range(3)]
    state = torch.get_rng_state()
    a, b = net(*x), net(*x)
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(a.segments, b.segments)
    net.train()
    assert not torch.equal(net(*x).segments, net(*x).segments)


@pytest.mark.parametrize("unimodal", ["soft", "hard"])
@pytest.mark.parametrize("crossmodal", ["soft", "hard"])
def test_the_flag_of_the_cross_step_is_inverted(unimodal, crossmodal):
    net = tiny(unimodal=unimodal, crossmodal=crossmodal)
    flags = {k: m.hard for k, m in net.named_modules() if isinstance(m, AssignAttention)}
    h, a = unimodal == "hard", crossmodal == "hard"
    assert flags == {"audio.cross.assign": not h, "audio.group.assign": h, "visual.group.assign": h, "both.group.assign": a}


def test_stochastic_depth_leaves_out_whole_branches_of_videos():
    torch.manual_seed(0)
    block, x = Block(8, 2, drop_path=.5).train(), torch.randn(4000, 3, 8)
    kept = block.kept(x) / x
    assert torch.equal(kept.flatten(1).amin(1), kept.flatten(1).amax(1)) and set(kept.flatten().tolist()) == {0., 2.}
    assert kept.mean().item() == pytest.approx(1, abs=.05)
    assert block.eval().kept(x) is x and Block(8, 2, drop_path=0.).train().kept(x) is x


def test_only_sound_looks_at_the_other_modality():
    net = tiny().eval()
    for p in net.parameters():
        if p.dim() == 2: torch.nn.init.normal_(p, std=.3)             # fresh weights are too small to show it
    x = [torch.randn(2, 5, 8) for _ in range(3)]
    base, silent, dark = net(*x), net(torch.zeros(2, 5, 8), *x[1:]), net(x[0], *(torch.zeros(2, 5, 8),) * 2)
    assert torch.equal(base.visual, silent.visual) and torch.equal(base.segments[:, :, 1], silent.segments[:, :, 1])
    assert (base.audio - dark.audio).abs().max() > 1e-5 and (base.video - silent.video).abs().max() > 1e-5


def test_start_of_the_weights():
    net = MGN()
    w = torch.cat([m.weight.flatten() for m in net.modules() if isinstance(m, torch.nn.Linear)])
    assert w.std().item() == pytest.approx(.02, rel=.01) and abs(w.mean().item()) < 1e-4
    assert all((m.bias == 0).all() for m in net.modules() if isinstance(m, torch.nn.Linear))
    assert not net.audio_tokens.any() and not net.visual_tokens.any()


@pytest.mark.parametrize("kw, message", [
    ({"heads": 3}, "heads: 3 heads for 16 dimensions"), ({"unimodal": "firm"}, "unimodal: 'firm'"), ({"crossmodal": ""}, "crossmodal: ''"),
    ({"segment_score": "mean"}, "segment_score: 'mean'"), ({"depths": (1, 2)}, r"depths: \(1, 2\)"), ({"depths": (1, 2, -1)}, "depths"),
    ({"drop_path": 1.}, "drop_path: 1.0"), ({"seconds": 0}, "seconds: 0"), ({"dim": 1, "heads": 1}, "dim: 1 is")])
def test_impossible_networks_are_refused(kw, message):
    with pytest.raises(InputError, match=message): tiny(**kw)


@pytest.mark.parametrize("options, message", [({"unimodal": "off"}, "unimodal: 'off'"), ({"segment_score": "max"}, "segment_score: 'max'"),
                                              ({"gumbel": True}, "gumbel: mgn has no such option"), ({"unimodal": 1}, "unimodal: 1 is a int")])
def test_impossible_options_are_refused(options, message):
    with pytest.raises(InputError, match=message): RunSpec("mgn", options)


@pytest.mark.parametrize("seconds, kw, message", [(4, {}, "MGN: videos of 4 s. expected all of 5 s"),
                                                  (5, {"mask": torch.ones(2, 5).bool()}, "MGN: videos of unequal length")])
def test_other_lengths_are_refused_in_words(seconds, kw, message):
    with pytest.raises(InputError, match=message): tiny()(*(torch.randn(2, seconds, 8) for _ in range(3)), **kw)


def test_videos_of_unequal_length_are_refused_before_the_first_step():
    clips = micro.toy_clips(12, lengths=np.arange(12) % 4 + 2)
    learner = Learner(tiny(), clips, LOSS, epochs=1, device="cpu")
    with pytest.raises(InputError, match="MGN: videos of"): learner.fit()
    assert not learner.history


# ---- training

TRAIN = micro.toy_clips(60)
FIT = dict(lr=5e-3, batch_size=16, epochs=4, step=3, device="cpu")


def make(seed, kind, *callbacks, **kw):
    return kind(tiny(seed, **kw), TRAIN, LOSS, seed=seed, callbacks=[ScoreCB(), *callbacks], **FIT)


@pytest.mark.parametrize("unimodal", ["soft", "hard"])
def test_it_learns(unimodal):
    learner = make(0, Learner, unimodal=unimodal).fit()
    terms = [h["loss"] for h in learner.history]
    assert list(terms[0]) == ["audio", "visual", "video", "tokens_audio", "tokens_visual"]
    assert sum(terms[-1].values()) < sum(terms[0].values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learner.model.parameters())


def test_full_frames_are_pooled():
    net, x = tiny().eval(), [torch.randn(2, n, 8) for n in (5, 40, 5)]
    torch.testing.assert_close(net(*x).video, net(x[0], x[1].unflatten(1, (5, 8)).mean(2), x[2]).video)
    projected = net.project(*x)
    torch.testing.assert_close(net(*x).video, net(*x, projected=projected).video)


@pytest.mark.parametrize("unimodal", ["soft", "hard"])
def test_runs_of_a_stack_are_the_runs_alone(unimodal):
    "Also the coins of Gumbel noise and of stochastic depth"
    assert why_not(tiny(unimodal=unimodal), [ScoreCB()]) is None
    alone = [make(r, Learner, unimodal=unimodal).fit() for r in range(3)]
    stack = StackedLearner([make(r, Lane, unimodal=unimodal) for r in range(3)]).fit()
    assert not stack.failed and not stack.apart
    for a, b in zip(alone, stack.lanes):
        for x, y in zip(a.history, b.history):
            assert x["loss"] == pytest.approx(y["loss"], abs=1e-4) and x["scores"] == pytest.approx(y["scores"], abs=1e-4)


def test_an_interrupted_run_continues_to_the_same_end(tmp_path):
    class Stop(ScoreCB):
        def after_epoch(self, learner):
            super().after_epoch(learner)
            if learner.epoch == 3: raise KeyboardInterrupt
    def start(*callbacks): return Learner(tiny(), TRAIN, LOSS, callbacks=callbacks, **FIT)
    with pytest.raises(KeyboardInterrupt): start(CheckpointCB(tmp_path / "c.pt", "x"), Stop()).fit()   # after two whole epochs
    again, whole = start(CheckpointCB(tmp_path / "c.pt", "x")).fit(), start().fit()
    assert micro.same_weights(again.model, whole.model)


def test_scores_of_a_network_that_is_sure_end_at_one_and_are_scored():
    "The released factor is above 1: a sure network was refused by the metrics, in the middle of its training"
    net = tiny().eval()
    for h in net.heads: torch.nn.init.constant_(h.bias, 4.)
    p = predict(net, micro.toy_clips(8))
    assert p.segments.max() == 1 and (p.audio <= 1).all() and p.segments.min() > .5
    assert check_parsing(p).segments.max() == 1
    assert (METHODS["mgn"].rule, METHODS["mgn"].faith, METHODS["mgn"].rows) == ("han", "code", {"mgn": {}})


def test_maxnorm_changes_single_seconds_only():
    a, b = tiny(3).eval(), tiny(3, segment_score="maxnorm").eval()
    x = [torch.randn(2, 5, 8) for _ in range(3)]
    pa, pb = a(*x), b(*x)
    for k in ("video", "audio", "visual"): assert torch.equal(getattr(pa, k), getattr(pb, k))
    torch.testing.assert_close(pb.segments.amax(1), torch.stack([pb.audio, pb.visual], 1))
    terms = [LOSS(p, Batch(None, None, None, torch.ones(2, 3), None, {})) for p in (pa, pb)]
    assert terms[0] == terms[1]                                            # no term looks at seconds


def test_defaults_are_the_papers():
    net = METHODS["mgn"].build(RunSpec("mgn").plain(), dict(classes=25, audio_dim=128, frame_dim=2048, motion_dim=512))[0]
    depths = [len(s.blocks) for s in (net.audio, net.visual, net.both)]
    block = net.both.blocks[0]
    assert depths == [3, 3, 6] and (block.attend.heads, block.drop_path, block.mlp.up.out_features) == (8, .1, 512)
    assert isinstance(net.audio.cross, Group) and net.audio.cross.mix.up.in_features == 10 and net.both.group.mix.up.out_features == 64
    assert RECIPE == dict(lr=3e-4, batch_size=16, epochs=40, step=10, factor=.1, select="segment/Type@AV")


def test_a_run_from_the_spec_to_the_record(tmp_path, monkeypatch):
    micro.install(monkeypatch.setitem)
    record = run(RunSpec("mgn", scale="micro"), tmp_path, "cpu", "off")
    assert math.isfinite(record["metrics"]["han"]["segment"]["Type@AV"]) and record["spec"]["protocol"] == "official"
    model, header = load_weights(Store(tmp_path).weight_path(record["key"]))
    assert type(model).__name__ == "MGN" and header["key"] == record["key"]
    assert run(RunSpec("mgn", scale="micro"), tmp_path, "cpu", "off")["finished"] == record["finished"]
