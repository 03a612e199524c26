"""The systems of one modality: Kong, TALNet, STPN and CMCS against recorded cases of their code, and as methods of this library."""
import copy
import zlib
from dataclasses import replace

import micro
import numpy as np
import pytest
import torch
from conftest import close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from avvp_nb.core import InputError, read_json, shared
from avvp_nb.data.clips import Batch
from avvp_nb.methods import picture_baselines as pic
from avvp_nb.methods import sound_baselines as snd
from avvp_nb.methods.losses import bce
from avvp_nb.methods.method import METHODS
from avvp_nb.methods.official import from_official, to_official
from avvp_nb.metrics import RULES, evaluate
from avvp_nb.records.spec import RunSpec
from avvp_nb.runs.single import run
from avvp_nb.train.callbacks import CheckpointCB, ScoreCB, ValidateCB
from avvp_nb.train.lanes import Lane, why_not
from avvp_nb.train.learner import Learner, predict
from avvp_nb.train.stack import StackedLearner

CLIPS = micro.toy_clips(40)   # lanes of a stack share them
NAMES = ("kong", "talnet", "stpn", "cmcs")
VARIANTS = tuple(snd.VARIANTS)


# --- recorded cases --------------------------------------------------------------------------------------------------

def filled(keys, rule, gain):
    "A state dict by the fill rule of set B: its size depends on the kind of a tensor; some are multiplied"
    out = {}
    for k in keys:
        key, shape, kind = k["key"], k["shape"], k["kind"]
        i = np.arange(int(np.prod(shape)), dtype=np.int64)
        phase = (zlib.crc32(key.encode()) % 1000) / 1000 * 2 * np.pi
        s = np.sin(.7 * i + phase + (.001 * ((i * i) % 6007) if rule == "chirp" else 0))
        x = {"weight": .05 * s, "norm_weight": 1 + .1 * s, "running_mean": .02 * s, "running_var": 1 + .1 * s, "counter": 0 * s,
             "vector": .02 * s}[kind]
        more = next((g for name, g in gain.items() if key == name or name.endswith("*") and key.startswith(name[:-1])), 1)
        x = torch.tensor(x.reshape(shape).astype(np.float32)) * more
        out[key] = x.long() if kind == "counter" else x
    return out


def state_of(network, case, keys=None):
    "The official state dict of a recorded case"
    keys = keys or read_json(shared("golden", "state_dict_keys_others.json"))[network]["keys"]
    return filled(keys, case.info["options"]["fill_rule"], case.info["options"]["gain"])


@pytest.fixture(scope="module")
def inputs(golden):
    return {k: torch.tensor(v) for k, v in golden("inputs_segment_b3").items()}


def same_gradients(case, grads):
    """Norms of all parameters in the recorded order, and the few gradients that are stored whole. What is recorded of a gradient
    that is zero in exact arithmetic is rounding noise of that machine; ours must be noise as well"""
    keys, zero = case.info["parameter_keys"], case.info.get("mathematically_zero_gradients") or []
    norms = np.array([grads[k].double().norm().item() for k in keys])
    noise = np.isin(keys, zero)
    assert (norms[noise] <= 1e-6 * norms.max()).all() and len(zero) == noise.sum()
    close(case, "grad_norms", np.where(noise, case["grad_norms"], norms))
    stored = [k for k in case if k.startswith("grad.")]
    assert stored
    for k in stored: close(case, k, grads[k[5:]])


def without_dropout(model):
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout): m.p = 0.
    return model


def official_kong(golden, variant, kind):
    case = golden(f"kong_{variant.replace('/', kind)}")
    name = variant.split("_/")[0]
    return case, from_official(state_of(f"kong_{name}", case), "kong", strict=True, variant=name)


KONG = [f"{v}_/_chirp" for v in VARIANTS] + ["single_attention_/"]


@pytest.mark.parametrize("name", KONG)
def test_kong_forward(golden, inputs, name):
    case, model = official_kong(golden, name, "forward")
    with torch.no_grad():
        got = model(inputs["audio"], None, None)
        third = model.embed(snd.rows_of(inputs["audio"]))[2].unflatten(0, (3, 10))
        close(case, "video_prob", got.audio)
        close(case, "embedding_mean", third.mean(-1))
        if "segment_prob" in case:
            close(case, "segment_prob", got.segments[:, :, 0])
            close(case, "segment_attention", model.head.attention(third)[2])
    assert torch.equal(got.extra["clip"], got.audio) and torch.equal(got.video, got.audio)
    assert got.visual.abs().sum() == 0 and got.segments[:, :, 1].abs().sum() == 0


@pytest.mark.parametrize("name", KONG)
def test_kong_loss_and_gradients(golden, inputs, name):
    case, model = official_kong(golden, name, "loss")
    without_dropout(model).train()
    got = model(inputs["audio"], None, None)
    terms = snd.ClipLoss()(got, Batch(inputs["audio"], None, None, inputs["label"], None, {}))
    close(case, "video_prob", got.audio.detach())
    close(case, "loss_total", sum(terms.values()).item())
    sum(terms.values()).backward()
    same_gradients(case, to_official(model, "kong", of=lambda p: p.grad))


def test_kongs_first_bias_has_no_gradient_and_statistics_move_once(golden, inputs):
    case, model = official_kong(golden, "feature_attention_/_chirp", "loss")
    before = {k: v.clone() for k, v in model.named_buffers()}
    without_dropout(model).train()
    h = model.embed.maps[0](F.batch_norm(inputs["audio"].flatten(0, 1), None, None, model.embed.first.weight, model.embed.first.bias,
                                         training=True))
    model(inputs["audio"], None, None)
    for k, v in model.named_buffers():
        if k.endswith("num_batches_tracked"): assert v - before[k] == 1, k     # also that of features, which seconds pass, too
    torch.testing.assert_close(model.embed.norms[0].running_mean, .9 * before["embed.norms.0.running_mean"] + .1 * h.mean(0).detach())


TALNET = [f"{p}_chirp" for p in snd.POOLINGS] + ["lin"]


@pytest.mark.parametrize("name", TALNET)
def test_talnet(golden, inputs, name):
    case, pooling = golden(f"talnet_{name}"), name.split("_")[0]
    state = state_of("talnet_att" if pooling == "att" else "talnet_lin", case)
    model = from_official(state, "talnet", strict=True, pooling=pooling)        # 527 classes and 128 units are read off the head
    target = F.pad(inputs["label"], (0, 502))
    got = model(inputs["audio"], None, None)
    q, logits = model.listen(inputs["audio"])
    for key, value in (("video_prob", got.extra["clip"]), ("segment_prob", q)): close(case, key, value.detach())
    close(case, "video_prob", got.audio.detach())                               # .5 stays .5
    if pooling == "att": close(case, "segment_attention", logits.softmax(1).detach())
    loss = snd.ClipLoss()(got, Batch(inputs["audio"], None, None, target, None, {}))["audio"]
    close(case, "loss_total", loss.item())
    loss.backward()
    same_gradients(case, to_official(model, "talnet", of=lambda p: p.grad))


def test_talnets_thresholds(golden):
    case = golden("talnet_thresholds")
    s, y = case["scores"], case["truth"]
    theta = snd.f1_thresholds(s, y)
    close(case, "thresholds", theta)
    on = s >= theta
    close(case, "micro_f1", 2 * (on & y).sum() / (on.sum() + y.sum()))
    alone = [snd.best_threshold(*x) for x in zip(s.T, y.T)]
    close(case, "single_class_threshold", alone)
    close(case, "single_class_f1", [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in zip((s >= alone).T, y.T)])


@pytest.mark.parametrize("variant", ["", "_chirp"])
def test_stpn(golden, inputs, variant):
    case = golden(f"stpn_loss{variant}")
    stream = from_official(state_of("stpn", case), "stpn", strict=True)
    got = stream(inputs["visual"])
    for key, value in {"attention": got.attention, "video_logits": got.logits, "video_prob": got.logits.sigmoid(), "tcam": got.activation,
                       "weighted_tcam": got.weighted, "score": got.attention[..., None] * got.activation}.items():
        close(case, key, value.detach())
    fine = pic.stretched(got.weighted.detach(), 24, beyond=True)
    fine = torch.where(fine < .05, 0., fine)[:, ::case.info["options"].get("sample_step", 15)]
    close(case, "interpolated_sampled", fine)
    said = type("Said", (), {"extra": {"clips": (got.logits.sigmoid(),), "attention": (got.attention,)}})
    terms = pic.SparseLoss(1e-4)(said, Batch(None, None, None, inputs["label"], None, {}))
    close(case, "loss_total", sum(terms.values()).item())
    for k, v in (("bce", terms["visual"]), ("l1_mean_over_batch", terms["sparse"] / 1e-4)):
        if k in case.info["values"]: np.testing.assert_allclose(v.item(), case.info["values"][k], rtol=1e-5)
    sum(terms.values()).backward()
    same_gradients(case, to_official(stream, "stpn", of=lambda p: p.grad))


def cmcs_keys(info):
    "Names and shapes of a CMCS of the widths of a case"
    o = info["options"]
    (base, _), (branch, _), (att, _) = (o[f"{k}_layer_params"][0] for k in ("base", "cls", "att"))
    D, C, K = o["in_features"], o["class_num"], o["branches"]
    shapes = {"base.base_conv_0": (base, D, 1), "att_bottom.att_conv_0": (att, base, 1), "att_head": (1, att)}
    shapes |= {f"cls_bottoms.{k}.cls_b{k}_conv_0": (branch, base, 3) for k in range(K)} | {f"cls_heads.{k}": (C, branch) for k in range(K)}
    rows = [(f"{n}.{p}", list(s if p == "weight" else s[:1])) for n, s in shapes.items() for p in ("weight", "bias")]
    keys = [{"key": k, "shape": s, "kind": "weight" if len(s) > 1 else "vector"} for k, s in rows]
    return keys, dict(dim=D, outputs=C, n=K, widths=(base, branch, att))


def test_cmcs_keys_are_those_of_the_code(golden):
    want = {k["key"]: (list(k["shape"]), k["kind"]) for k in read_json(shared("golden", "state_dict_keys_others.json"))["cmcs"]["keys"]}
    assert {k["key"]: (k["shape"], k["kind"]) for k in cmcs_keys(golden("cmcs_loss").info)[0]} == want


@pytest.mark.parametrize("name", ["cmcs_loss", "cmcs_loss_chirp", "cmcs_small_loss_chirp"])
def test_cmcs(golden, inputs, name):
    case = golden(name)
    keys, sizes = cmcs_keys(case.info)
    net = from_official(state_of("cmcs", case, keys), "cmcs", strict=True, **sizes)
    C, got = sizes["outputs"] - 1, net(inputs["visual"])
    for key, value in {"avg_score": got.scores, "attention": got.attention, "video_score": got.video, "branch_scores": got.branches}.items():
        close(case, key, value.detach())
    terms, plain = [], []
    for b, (label, weight) in enumerate(zip(case["label"], case["weight"])):
        said = type("Said", (), {"extra": {"video": got.video[b:b + 1], "branches": got.branches[:, b:b + 1], "mask": None}})
        y = F.one_hot(torch.tensor([label]), C + 1)[:, :C].float()
        one = pic.BranchLoss(single_label=True)(said, Batch(None, None, None, y, None, {}))
        terms.append([float(weight) * t for t in one.values()])
        plain.append([one[k].item() / .2 for k in ("diversity", "norm")])
    close(case, "loss_terms", [[t.item() for t in row] for row in terms])
    close(case, "diversity_norm_unweighted", plain)
    total = sum(map(sum, terms))
    close(case, "loss_total", total.item())
    total.backward()
    same_gradients(case, to_official(net, "cmcs", of=lambda p: p.grad))


def test_cmcs_terms_and_their_gradients(golden):
    case = golden("cmcs_terms")
    for f, name in ((pic.diversity, "diversity"), (pic.norm_spread, "norm")):
        x = torch.tensor(case["branch_scores"], requires_grad=True)
        value = f(x)
        close(case, name, value.item())
        close(case, f"grad_{name}", torch.autograd.grad(value, x)[0])


def test_cmcs_detection(golden):
    case = golden("cmcs_detect")
    x = torch.tensor(case["score"])[..., None]
    y, on = pic.min_max(x)[..., 0], pic.above_mean(x)[..., 0]
    for key, value in {"normalised": y, "mask": on, "mask_dilated3": pic.widened(on, 3)}.items(): close(case, key, value)
    close(case, "upsampled_every_7th", pic.stretched(pic.min_max(x), 16)[:, ::7, 0])
    close(case, "regions", [(i, *r) for i in range(12) for r in pic.stretches(y[i], on[i], case["video_prob"][i])])


# --- what the cases cannot say -----------------------------------------------------------------------------------------

def test_a_neighbourhood_that_would_begin_before_the_clip_is_the_right_side():
    x = np.arange(10.)
    def score(a, b): return pic.stretches(x, (np.arange(10) >= a) & (np.arange(10) < b), 0.)[0][2]
    assert score(1, 9) == pytest.approx(4.5 - 9)                 # 1 - 8/4 is negative: the second on the left is not looked at
    assert score(2, 9) == pytest.approx(5 - (0 + 1 + 9) / 3)     # 2 - 7/4 is a fraction, cut to 0
    assert score(0, 10) == pytest.approx(4.5)                    # no neighbourhood at all
    assert score(4, 8) == pytest.approx(5.5 - (3 + 8) / 2)


def test_cmcs_drops_whole_channels():
    torch.manual_seed(0)
    net, frames, motion = built("cmcs")[0].train(), torch.randn(4, 1, 8).expand(4, 7, 8), torch.randn(4, 1, 8).expand(4, 7, 8)
    with torch.no_grad(): one, two = (net.look(frames, motion).branches for _ in range(2))
    torch.testing.assert_close(one[:, :, 1:6], one[:, :, 1:2].expand(-1, -1, 5, -1), rtol=1e-5, atol=1e-6)
    assert (one - two).abs().amax((0, 2, 3)).min() > 1e-3        # another mask each time, for every video


def test_a_batch_of_cmcs_is_the_mean_of_its_videos(golden, inputs):
    "Several labels are copies with weight 1/n, and background stands where there is none"
    torch.manual_seed(0)
    net = pic.Branches(512, 6)
    got, y = net(inputs["visual"]), torch.tensor([[1., 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 0, 0]])
    def said(i): return type("Said", (), {"extra": {"video": got.video[i], "branches": got.branches[:, i], "mask": None}})
    terms = pic.BranchLoss(single_label=True)(said(slice(0, 3)), Batch(None, None, None, y, None, {}))
    want = torch.zeros(3)
    for b in range(3):
        copies = y[b].nonzero().flatten().tolist() or [5]
        for c in copies:
            rest = torch.stack([.2 * f(got.branches[:, b:b + 1]) for f in (pic.diversity, pic.norm_spread)])
            want += torch.cat([F.cross_entropy(got.video[b:b + 1], torch.tensor([c]))[None], rest]) / len(copies) / 3
    torch.testing.assert_close(torch.stack(tuple(terms.values())), want, rtol=1e-5, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(snd.POOLINGS), st.integers(1, 6))
def test_poolings_lie_between_the_smallest_and_the_largest(seed, pooling, T):
    g = torch.Generator().manual_seed(seed)
    q, a = torch.rand(2, T, 3, generator=g), 5 * torch.randn(2, T, 3, generator=g)
    p = snd.pool_seconds(q, pooling, a)
    assert (p >= q.amin(1) - 1e-6).all() and (p <= q.amax(1) + 1e-6).all()
    if T == 1: torch.testing.assert_close(p, q[:, 0])
    order = torch.randperm(T, generator=g)
    torch.testing.assert_close(snd.pool_seconds(q[:, order], pooling, a[:, order]), p)
    far = F.pad(q, (0, 0, 0, 2), value=7.), F.pad(a, (0, 0, 0, 2), value=70.)
    mask = (torch.arange(T + 2) < T).expand(2, -1)
    torch.testing.assert_close(snd.pool_seconds(far[0], pooling, far[1], mask), p)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.booleans())
def test_no_single_threshold_can_be_moved_to_gain(seed, n, ties):
    rng = np.random.default_rng(seed)
    s, y = rng.random((n, 3)), rng.random((n, 3)) < .4
    if ties: s = s.round(1)
    theta = snd.f1_thresholds(s, y)
    def f1(t):
        on = s >= t
        return 2 * (on & y).sum() / max(on.sum() + y.sum(), 1)
    for c in range(3):
        for t in (np.inf, -1., *np.unique(s[:, c])):
            moved = theta.copy()
            moved[c] = t
            assert f1(moved) <= f1(theta) + 1e-12


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_a_network_that_has_moved_decides_as_its_thresholds_do(seed):
    g = torch.Generator().manual_seed(seed)
    p, theta = torch.rand(40, generator=g), .05 + .9 * torch.rand(1, generator=g)
    clear = (p - theta).abs() > 1e-5
    assert torch.equal((snd.seen_from(p, theta) >= .5)[clear], (p >= theta)[clear])
    assert (snd.seen_from(p, theta).argsort() == p.argsort()).all()
    torch.testing.assert_close(snd.seen_from(p, torch.tensor(.5)), p, rtol=1e-5, atol=1e-6)


def slow_pair(parsing, clips):
    "The search, candidate by candidate from the definition of the metric"
    best = None
    for a in np.arange(1, 6) / 10:
        for b in np.arange(1, 11) / 20:
            seen = (parsing.segments[:, :, 1] >= np.float32(b)) & (parsing.visual >= np.float32(a))[:, None]
            silent = np.zeros_like(seen)
            v = round(evaluate(silent, seen, clips.dense_audio, clips.dense_visual).loc["segment", "V"], 9)
            if best is None or v >= best[0]: best = v, a, b
    return best[1:]


def test_the_pair_of_thresholds():
    clips = micro.toy_clips(30, T=6)
    rng = np.random.default_rng(0)
    parsing = snd.one_sided(torch.tensor(rng.random((30, 3)), dtype=torch.float32) * .8,
                            torch.tensor(.1 + .3 * clips.dense_visual + .2 * rng.random((30, 6, 3)), dtype=torch.float32), 1).numpy()
    assert pic.best_pair(parsing, clips) == pytest.approx(slow_pair(parsing, clips))
    assert pic.best_pair(parsing, replace(clips, dense_audio=None, dense_visual=None)) is None


def test_stpn_in_two_streams():
    "Two streams see frames and motion without any fusion, and are trained as if each were alone"
    torch.manual_seed(0)
    sizes = {k: v for k, v in micro.SIZES.items() if k != "audio_dim"}
    both, clips = pic.STPN(**sizes, streams="two"), micro.toy_clips(12)
    b = clips.batch(range(12))
    said = both.look(b.frames, b.motion)
    for s, x, stream in zip(said, (b.frames, b.motion), both.streams):
        for u, v in zip(s, stream(x)): torch.testing.assert_close(u, v)
    got = both(*b.features)
    torch.testing.assert_close(got.visual, (said[0].logits.sigmoid() + said[1].logits.sigmoid()) / 2, rtol=1e-5, atol=1e-6)
    united = pic.STPN(**sizes, streams="united", point=(.5, .5))
    united.load_state_dict(both.state_dict() | {"theta": united.theta})
    on = RULES["ma"].decide(united(*b.features))[1]
    assert np.array_equal(on, ((torch.maximum(said[0].weighted, said[1].weighted) >= .5)
                               & (torch.maximum(said[0].logits, said[1].logits) >= 0)[:, None]).numpy())
    sum(pic.SparseLoss()(got, b).values()).backward()
    grads = [p.grad.clone() for p in both.streams[0].parameters()]
    both.zero_grad()
    alone = both.streams[0](b.frames)
    (bce(alone.logits.sigmoid(), b.weak) + 1e-4 * alone.attention.sum(1).mean()).backward()
    for g, p in zip(grads, both.streams[0].parameters()): torch.testing.assert_close(g, p.grad)


def test_stpn_takes_all_frames_as_it_takes_their_means():
    torch.manual_seed(0)
    net, frames, motion = pic.STPN(classes=3, frame_dim=6, motion_dim=4, dim=8), torch.randn(2, 40, 6), torch.randn(2, 5, 4)
    with torch.no_grad():
        a, b = net(None, frames, motion), net(None, frames.unflatten(1, (5, 8)).mean(2), motion)
    torch.testing.assert_close(a.segments, b.segments, rtol=1e-5, atol=1e-6)


# --- as methods ------------------------------------------------------------------------------------------------------

def built(name, seed=0, **options):
    "(model, loss, callbacks) of a method at toy size"
    torch.manual_seed(seed)
    m = METHODS[name]
    return m.build({"options": {**m.options, **options}, "protocol": "own"}, micro.SIZES, None)


def every_option():
    "A method and one of its options, each changed by itself"
    other = {"kong": [{"variant": v} for v in VARIANTS],
             "talnet": [{"pooling": p} for p in snd.POOLINGS] + [{"project": False}, {"gate": False}, {"thresholds": "f1"}],
             "stpn": [{"streams": s} for s in pic.STREAMS] + [{"thresholds": t} for t in pic.THRESHOLDS] + [{"beta": .01}],
             "cmcs": [{"branches": 1}, {"single_label": True}, {"localise": "mean"}, {"weight": 0.},
                      {"single_label": True, "localise": "mean"}]}
    return [(k, o) for k, options in other.items() for o in options]


def trained(name, kind=Learner, clips=None, epochs=2, seed=1, callbacks=(), **options):
    model, loss, own = built(name, seed, **options)
    valid = micro.toy_clips(20, 1)
    select = METHODS[name].recipe["select"]
    return kind(model, clips or micro.toy_clips(40), loss, lr=1e-2, batch_size=16, epochs=epochs, seed=seed, device="cpu",
                callbacks=[*own, ScoreCB(), ValidateCB(valid, "ma", select), *callbacks])


@pytest.mark.parametrize("name, options", every_option())
def test_every_option_trains_and_hears_or_sees_only(name, options):
    learner = trained(name, epochs=3, **options).fit()
    m = "av".index(METHODS[name].modalities)
    losses = [sum(h["loss"].values()) for h in learner.history]
    assert losses[-1] < losses[0]
    p = predict(learner.model, micro.toy_clips(10, 2))
    assert np.abs(p.segments[:, :, 1 - m]).max() == 0 == np.abs((p.visual, p.audio)[m]).max()
    assert np.array_equal(p.video, (p.audio, p.visual)[m]) and p.segments[:, :, m].std() > 0
    nothing = evaluate(*np.zeros((2, 20, 5, 3), np.uint8), *(micro.toy_clips(20, 1).dense_audio,) * 2)
    other = "VA"[m]
    assert {h["val"][f"segment/{other}"] for h in learner.history} == {nothing.loc["segment", other]}


@pytest.mark.parametrize("name, options", every_option())
def test_padding_changes_nothing(name, options):
    model = built(name, **options)[0].eval()
    x = [torch.randn(3, 6, 8) for _ in range(3)]
    mask = torch.arange(6) < torch.tensor([[6], [2], [4]])
    with torch.no_grad():
        got = model(*(torch.where(mask[..., None], v, 9.) for v in x), mask=mask)
        for i, n in enumerate(mask.sum(1).tolist()):
            alone = model(*(v[i:i + 1, :n] for v in x))
            for k in ("audio", "visual", "video"): torch.testing.assert_close(getattr(got, k)[i], getattr(alone, k)[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(got.segments[i, :n], alone.segments[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_no_gradient(name):
    model, loss, _ = built(name)
    model = without_dropout(model).double().train()
    frozen = copy.deepcopy(model)
    clips = micro.toy_clips(4, T=6)
    b = clips.batch(range(4))
    b = b._replace(**{k: getattr(b, k).double() for k in ("audio", "frames", "motion")})
    mask = torch.arange(9) < torch.full((4, 1), 6)
    longer = b._replace(**{k: F.pad(getattr(b, k), (0, 0, 0, 3), value=5.) for k in ("audio", "frames", "motion")}, mask=mask)
    for net, batch in ((model, b), (frozen, longer)):
        sum(loss(net(*batch.features, mask=batch.mask), batch).values()).backward()
    for (k, p), q in zip(model.named_parameters(), frozen.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-8, msg=k)


@pytest.mark.parametrize("name", ["talnet", "stpn", "cmcs"])
def test_a_batch_is_the_mean_of_its_halves(name):
    "Only TALNet's entry says so to `--parallel`: STPN and CMCS have callbacks of their own, and Kong's batch norm looks across videos"
    assert (METHODS[name].separable == "always") == (name == "talnet") and not METHODS["kong"].separable
    model, loss, _ = built(name)
    without_dropout(model)
    clips, grads = micro.toy_clips(8), []
    for part in (range(8), range(4), range(4, 8)):
        model.zero_grad()
        b = clips.batch(part)
        sum(loss(model(*b.features), b).values()).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for whole, one, two in zip(*grads): torch.testing.assert_close(whole, (one + two) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name, options", [("stpn", {}), ("stpn", {"streams": "two", "thresholds": "origin"}), ("cmcs", {}),
                                           ("cmcs", {"single_label": True, "localise": "mean"})])
def test_runs_as_one_are_the_runs(name, options):
    alone = [trained(name, Lane, CLIPS, epochs=3, seed=s, **options).fit() for s in (1, 2, 3)]
    stack = StackedLearner([trained(name, Lane, CLIPS, epochs=3, seed=s, **options) for s in (1, 2, 3)]).fit()
    assert not stack.failed
    for a, b in zip(alone, sorted(stack.lanes, key=lambda lane: lane.seed)):
        for h, k in zip(a.history, b.history):
            assert list(h["loss"]) == list(k["loss"])
            np.testing.assert_allclose(list(h["loss"].values()), list(k["loss"].values()), rtol=2e-3)
        for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values()): torch.testing.assert_close(x, y, rtol=.02, atol=5e-3)
    assert not micro.same_weights(stack.lanes[0].model, stack.lanes[1].model)


def test_who_cannot_be_stacked_and_why():
    kong, _, own = built("kong")
    assert "batch norm" in why_not(kong, own) and not snd.AdamEpsCB.stackable
    assert "recurrent layers (GRU)" in why_not(built("talnet")[0])
    for name in ("stpn", "cmcs"):
        model, _, own = built(name)
        assert why_not(model, own) is None


def test_different_decays_are_added_lane_by_lane():
    lanes = [trained("cmcs", Lane, CLIPS, seed=s) for s in (1, 2)]
    next(cb for cb in lanes[1].callbacks if isinstance(cb, pic.WeightDecayCB)).decay = .5
    alone = trained("cmcs", Lane, CLIPS, seed=2)
    next(cb for cb in alone.callbacks if isinstance(cb, pic.WeightDecayCB)).decay = .5
    alone.fit()
    got = {lane.seed: lane.model for lane in StackedLearner(lanes).fit().lanes}
    for a, b in zip(alone.model.parameters(), got[2].parameters()): torch.testing.assert_close(a, b, rtol=.02, atol=5e-3)
    assert sum(p.norm() for p in got[2].parameters()) < .9 * sum(p.norm() for p in got[1].parameters())


def test_decay_is_that_of_adam():
    a, b = trained("cmcs", weight=0.), trained("cmcs", weight=0.)
    b.callbacks = [cb for cb in b.callbacks if not isinstance(cb, pic.WeightDecayCB)]
    b.opt = torch.optim.Adam(b.model.parameters(), 1e-2, weight_decay=pic.DECAY)
    for (k, x), y in zip(a.fit().model.named_parameters(), b.fit().model.parameters()):
        if k != "branches.att_head.bias": torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)      # its gradient is rounding noise
    assert a.opt.param_groups[0]["weight_decay"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_it_goes_on_from_a_checkpoint(name, tmp_path):
    "Running statistics, thresholds and Adam's eps included"
    options = {"talnet": {"thresholds": "f1"}}.get(name, {})
    whole = trained(name, epochs=4, **options).fit()
    path = tmp_path / "state.pt"
    first = trained(name, epochs=4, callbacks=[CheckpointCB(path)], **options)
    first.epochs = 2
    first.fit()
    rest = trained(name, epochs=4, seed=1, callbacks=[CheckpointCB(path)], **options).fit()
    assert micro.same_weights(rest.model, whole.model)
    strip = lambda x: [{k: v for k, v in h.items() if k != "seconds"} for h in x.history]
    assert strip(rest) == strip(whole)


@pytest.mark.parametrize("name, options", [("talnet", {"thresholds": "f1"}), ("stpn", {})])
def test_thresholds_belong_to_the_kept_state(name, options):
    learner = trained(name, epochs=4, **options).fit()
    valid, theta = micro.toy_clips(20, 1), learner.model.theta.clone()
    assert learner.history[-1]["operating_point"] == theta.tolist()
    assert all("operating_point" not in h for h in learner.history[:-1])
    learner.model.theta.fill_(.5)
    raw = predict(learner.model, valid)
    want = snd.choose_f1(raw, valid) if name == "talnet" else pic.best_pair(raw, valid)
    torch.testing.assert_close(theta, torch.as_tensor(want).clamp(1e-7, 1 - 1e-7).float())
    assert not torch.equal(theta, built(name, **options)[0].theta)


def test_without_validation_videos_the_network_stays_where_it_is():
    model, loss, own = built("stpn")
    before = model.theta.clone()
    for valid in (None, replace(micro.toy_clips(8, 1), dense_audio=None, dense_visual=None)):
        keep = [] if valid is None else [ValidateCB(None)]
        if valid is not None: keep[0].valid, keep[0].after_epoch = valid, lambda learner: None
        Learner(model, micro.toy_clips(16), loss, epochs=1, batch_size=8, device="cpu", callbacks=[*own, *keep]).fit()
        assert torch.equal(model.theta, before)


def test_kongs_adam():
    learner = trained("kong").fit()
    assert {g["eps"] for g in learner.opt.param_groups} == {1e-7}
    assert trained("talnet").fit().opt.param_groups[0]["eps"] == 1e-8


@pytest.mark.parametrize("name", NAMES)
def test_labels_of_the_modality_go_first(name):
    own = {"a": "audio", "v": "visual"}[METHODS[name].modalities]
    other = {"audio": "visual", "visual": "audio"}[own]
    model, loss, _ = built(name)
    b = micro.toy_clips(6).batch(range(6))
    parsing = model.eval()(*b.features)
    plain = loss(parsing, b)
    changed = loss(parsing, b._replace(labels={own: 1 - b.weak}))
    assert changed[own] != plain[own]
    assert loss(parsing, b._replace(labels={other: 1 - b.weak}))[own] == plain[own]
    assert own in plain and other not in plain


# --- the registry ----------------------------------------------------------------------------------------------------

def test_entries():
    for name, year, modality, row in zip(NAMES, (2018, 2019, 2018, 2019), "aavv", ("kong2018", "talnet", "stpn", "cmcs")):
        m = METHODS[name]
        assert (m.year, m.modalities, m.faith, m.rows, m.rule) == (year, modality, "reconstruction", {row: {}}, "ma")
        assert m.recipe["select"] == f"segment/{modality.upper()}" and m.idea.endswith(".") and name in m.official
        assert RULES[m.rule].gate == "modality"
        RunSpec(name)


@pytest.mark.parametrize("name, options, said", [
    ("kong", {"variant": "single"}, "variant: 'single' is not possible"), ("talnet", {"pooling": "mean"}, "pooling: 'mean'"),
    ("talnet", {"thresholds": "best"}, "thresholds: 'best'"), ("talnet", {"gates": False}, "did you mean 'gate'"),
    ("talnet", {"project": 1}, "project"), ("stpn", {"streams": "flow"}, "streams: 'flow'"), ("stpn", {"thresholds": "f1"}, "thresholds: 'f1'"),
    ("stpn", {"beta": -1.}, "beta: -1.0 is not possible"), ("stpn", {"beta": float("nan")}, "beta: nan"),
    ("cmcs", {"branches": 0}, "branches: 0 is not possible"), ("cmcs", {"localise": "max"}, "localise: 'max'"),
    ("cmcs", {"weight": -.2}, "weight: -0.2 is not possible"), ("cmcs", {"single_label": "yes"}, "single_label")])
def test_options_refused(name, options, said):
    with pytest.raises(InputError, match="(?s)" + said.replace("(", r"\(")): RunSpec(name, options)


@pytest.mark.parametrize("name", NAMES)
def test_labels_of_seconds_are_refused(name):
    with pytest.raises(InputError, match="labels: a system of one modality"): RunSpec(name, labels="clip+clap")


@pytest.mark.parametrize("name", NAMES)
def test_a_run_from_spec_to_record(name, tmp_path, monkeypatch):
    micro.install(monkeypatch.setitem)
    record = run(RunSpec(name, scale="micro"), tmp_path, device="cpu", progress="off")
    own, other = ("A", "V") if METHODS[name].modalities == "a" else ("V", "A")
    scores, nothing = record["metrics"]["ma"]["segment"], record["floors"]["nothing"]["segment"]
    assert scores[other] == nothing[other] and record["selection"]["metric"] == f"segment/{own}"
    kept = record["history"][record["selection"]["epoch"] - 1]["val"][f"segment/{own}"]
    assert kept == max(h["val"][f"segment/{own}"] for h in record["history"])
    assert run(RunSpec(name, scale="micro"), tmp_path, device="cpu", progress="off")["key"] == record["key"]


def test_there_and_back(golden):
    case = golden("kong_feature_attention_loss_chirp")
    state = state_of("kong_feature_attention", case)
    model = from_official(state, "kong", strict=True, variant="feature_attention")
    back = to_official(model, "kong")
    missing = {k for k in state if k not in back}
    assert all(torch.equal(v, state[k]) for k, v in back.items())
    assert {k.rsplit(".", 1)[1] for k in missing} <= {"running_mean", "running_var", "num_batches_tracked"}
    again = from_official({**back, **{k: state[k] for k in missing}}, "kong", strict=True, variant="feature_attention")
    assert micro.same_weights(again, model)


@pytest.mark.parametrize("name, ours", [("talnet", lambda: snd.TALNet(classes=7, dim=12, audio_dim=128, project=False)),
                                        ("stpn", lambda: pic.SparseStream(12, 7, 5)), ("cmcs", lambda: pic.Branches(12, 7, 3, (6, 5, 4)))])
def test_there_and_back_by_names(name, ours):
    torch.manual_seed(0)
    model = ours()
    sizes = {"talnet": {}, "stpn": dict(dim=12, classes=7, hidden=5), "cmcs": dict(dim=12, outputs=7, n=3, widths=(6, 5, 4))}[name]
    back = from_official(to_official(model, name), name, strict=True, **sizes)
    assert micro.same_weights(back, model) and not back.training


def test_checkpoints_of_others_are_refused(golden):
    kong = state_of("kong_max", golden("kong_max_forward_chirp"))
    with pytest.raises(InputError, match="tensors are missing"): from_official(kong, "kong")
    with pytest.raises(InputError, match="tensors are missing"): from_official(kong, "talnet")
    with pytest.raises(InputError, match="has shape"): from_official({k: v[:5] if k.startswith("fc_final") else v for k, v in kong.items()},
                                                                     "kong", variant="max")
    released = {**to_official(snd.TALNet(classes=5, dim=64, audio_dim=64, project=False), "talnet"), "conv1.bn.bias": torch.zeros(3)}
    with pytest.raises(InputError, match=r"gru.weight_ih_l0: has shape \(96, 64\). expected \(96, 128\)"): from_official(released, "talnet")
    assert from_official(released, "talnet", strict=True, audio_dim=64).prob.out_features == 5
