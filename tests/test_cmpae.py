"""Parity of CMPAE with the released code, each formula against an independent one, padding, training, thresholds."""
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import close
from hypothesis import given, settings
from hypothesis import strategies as st
from micro import SIZES, same_weights, toy_clips
from test_han import VARIANTS, fill
from torch import nn
from torch.nn import functional as F

from avvp_nb.core import CLASSES, InputError, read_json, shared, write_json
from avvp_nb.data.clips import Batch
from avvp_nb.methods import cmpae
from avvp_nb.methods.cmpae import (
    CMPAE,
    LOSS,
    RECIPE,
    RULE,
    UNUSED,
    CMPAELoss,
    ELUProjections,
    EvidenceHead,
    StepCB,
    belief,
    cmpae_keys,
    evidence,
    global_belief,
    hybrid_streams,
    mutual_loss,
    pool_logits,
)
from avvp_nb.methods.han import HybridAttention
from avvp_nb.methods.jomold import DenoiseCB, contrastive, similarities
from avvp_nb.methods.losses import bce
from avvp_nb.methods.official import from_official, to_official
from avvp_nb.metrics import CMPAE_SELECTED, RULES, evaluate, flat, select_thresholds
from avvp_nb.train.callbacks import CheckpointCB, ValidateCB
from avvp_nb.train.learner import Learner, predict, predict_both
from avvp_nb.train.thresholds import (
    ThresholdsCB,
    check_thresholds,
    load_thresholds,
    save_thresholds,
    search_thresholds,
)

STEP = {"step": 0}


@pytest.fixture(scope="module")
def official_keys(golden):
    keys = read_json(shared("golden", "state_dict_keys.json"))["cmpae"]["keys"]
    return {k["key"]: k["shape"] for k in keys}


@pytest.fixture(scope="module")
def inputs(golden):
    return {k: torch.tensor(v) for k, v in golden("inputs_b3").items()}


@pytest.fixture(scope="module")
def networks(official_keys):
    "Our network with the official tensors of each fill rule, in eval mode: every dropout off, as in the reference runs"
    return {v: from_official(fill(official_keys, "chirp" if v else "sine"), "cmpae", strict=True) for v in VARIANTS}


def features(inputs): return [inputs[k] for k in ("audio", "visual", "visual_st")]


def toy(seed=0, **kw):
    torch.manual_seed(seed)
    return CMPAE(**{**SIZES, **kw})


def drawn(B=4, T=5, per_second=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, t, 8, generator=g) for t in (T, per_second*T, T)]


# ---- parity

def test_every_official_tensor_is_used_or_known_to_be_unused(official_keys):
    used = {o for o, _, _ in cmpae_keys()}
    assert len(used) == 38 and len(official_keys) == 46 and used <= set(official_keys)
    assert all(k.startswith(UNUSED) for k in set(official_keys) - used)
    assert sum(int(np.prod(s)) for s in official_keys.values()) == 5_660_822


def test_there_and_back(official_keys, networks):
    given_, back = fill(official_keys, "chirp"), to_official(networks["_chirp"], "cmpae")
    assert all(torch.equal(back[o], given_[o]) for o, _, _ in cmpae_keys())
    model = from_official({"model": {f"module.{k}": v for k, v in given_.items()}, "epochs": 20}, "cmpae", strict=True)
    assert same_weights(model, networks["_chirp"]) and not model.training


def outputs(out):
    u = out.extra
    return {"global_prob": out.video, "a_prob": out.audio, "v_prob": out.visual, "frame_prob": out.segments,
            "sims": similarities(*u["attended"]).flatten(0, 1), "global_uct": u["global_uncertainty"],
            "a_uct": u["uncertainty"][0], "v_uct": u["uncertainty"][1], "frame_uct": u["segment_uncertainty"]}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ca", [True, False])
def test_forward(golden, networks, inputs, variant, ca):
    case = golden(f"cmpae_forward_{'ca' if ca else 'noca'}{variant}")
    with torch.no_grad(): out = networks[variant](*features(inputs), cross_attention=ca)
    for key, value in outputs(out).items(): close(case, key, value)
    close(case, "mask", torch.arange(10).repeat(3))


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_passes_at_once(golden, networks, inputs, variant):
    with torch.no_grad(): both = networks[variant].both_passes(*features(inputs))
    for name, out in zip(("ca", "noca"), both):
        case = golden(f"cmpae_forward_{name}{variant}")
        for key, value in outputs(out).items(): close(case, key, value)


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients(golden, networks, inputs, variant):
    case, model = golden(f"cmpae_train_loss{variant}"), networks[variant]
    model.zero_grad(set_to_none=True)
    terms = LOSS(model(*features(inputs)), Batch(None, None, None, torch.tensor(case["label"]), None, {"step": case.info["options"]["batch_idx"]}))
    total = sum(terms.values())
    total.backward()
    for key, name, weight in [("loss_audio", "audio", 2), ("loss_visual", "visual", .6), ("loss_global", "video", .6), ("loss_nce", "contrast", 1),
                              ("loss_mutual", "mutual", 1)]:
        close(case, key, terms[name].detach() / weight)
    close(case, "loss_total", total.detach())
    grads = to_official(model, "cmpae", of=lambda p: p.grad)
    for key in [k for k in case if k.startswith("grad.")]: close(case, key, grads[key[5:]])
    norms = np.array([grads[k].norm().item() if k in grads else np.nan for k in case.info["parameter_keys"]])
    untouched = np.isnan(case["grad_norms"])
    assert {k for k, u in zip(case.info["parameter_keys"], untouched) if u} == {k for k in case.info["parameter_keys"] if k.startswith(UNUSED)}
    close(case, "grad_norms", norms)


@pytest.mark.parametrize("step", [0, 1, 2, 7])
def test_mutual_loss(golden, step):
    case = golden("cmpae_mutual")
    given_ = {k: torch.tensor(case[k], requires_grad=True) for k in ("global_prob", "a_prob", "v_prob", "a_uct", "v_uct", "global_uct")}
    loss = mutual_loss(*given_.values(), torch.tensor(case["target"]), step)
    close(case, f"loss_batch{step}", loss.detach())
    assert case.info["values"][f"loss_batch{step}"] == pytest.approx(loss.item(), rel=1e-4)
    if step > 1: return
    loss.backward()
    for k, v in given_.items():
        close(case, f"grad_{k}_batch{step}", torch.zeros_like(v) if v.grad is None else v.grad)


@pytest.mark.parametrize("change", ["frames averaged first", "attention rows", "no mix", "other collectors"])
def test_parity_has_teeth(golden, official_keys, inputs, change):
    "Errors that one could make are larger than the tolerance"
    case, model, x = golden("cmpae_forward_ca_chirp"), from_official(fill(official_keys, "chirp"), "cmpae"), features(inputs)
    W = model.head.maps.weight.data
    if change == "frames averaged first": x[1] = x[1].unflatten(1, (10, 8)).mean(2)
    if change == "attention rows": W[25:] = W[25:].reshape(25, 2, -1).flip(1).flatten(0, 1)
    if change == "no mix": model.mix = 1.
    if change == "other collectors": model.head.collect.weight.data = model.head.collect.weight.data.roll(512, 0)
    with torch.no_grad(): out = model(*x)
    with pytest.raises(AssertionError): close(case, "v_prob", out.visual)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("ca", ["ca", "noca"])
def test_cuda(golden, official_keys, inputs, ca):
    case, model = golden(f"cmpae_forward_{ca}_chirp"), from_official(fill(official_keys, "chirp"), "cmpae").cuda()
    with torch.no_grad(): out = model.both_passes(*(x.cuda() for x in features(inputs)))[ca == "noca"]
    for key, value in outputs(out).items(): close(case, key, value.cpu())


# ---- formulas against naive ones

@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(-30, 30), st.floats(-30, 30)), min_size=1, max_size=8))
def test_belief(logits):
    p, u = belief(torch.tensor(logits, dtype=torch.float64))
    for i, z in enumerate(logits):
        a, b = (math.exp(max(-10, min(10, k)) / .8) + 1 for k in z)
        assert p[i].item() == pytest.approx(a / (a + b)) and u[i].item() == pytest.approx(2 / (a + b))
        for tau in (.25, .45, .7):
            if abs(p[i].item() - tau) > 1e-12: assert (p[i].item() >= tau) == ((1 - tau) * a >= tau * b)


def test_half_precision_is_not_exponentiated():
    z = torch.tensor([9.9, -9.9], dtype=torch.bfloat16)
    assert evidence(z).dtype == torch.float32 and belief(z)[0].dtype == torch.float32
    assert evidence(z.double()).dtype == torch.float64


def test_pooling_is_a_softmax_of_each_side():
    g = torch.Generator().manual_seed(0)
    z, a = torch.randn(2, 2, 4, 2, 3, 2, generator=g, dtype=torch.float64)
    got = pool_logits(z, a)
    for i in itertools.product(*map(range, got.shape)):
        b, m, c, k = i
        w = [math.exp(a[b, t, m, c, k].item()) for t in range(4)]
        assert got[i].item() == pytest.approx(sum(w[t] * z[b, t, m, c, k].item() for t in range(4)) / sum(w))


def test_bias_of_the_temporal_attention_has_no_effect_and_no_gradient():
    model, x = toy().eval().double(), [v.double() for v in drawn()]
    before = model(*x)
    (before.audio.sum() + before.visual.sum() + before.segments.sum()).backward()
    C = SIZES["classes"]
    assert model.head.maps.bias.grad[C:].abs().max() < 1e-14 < model.head.maps.bias.grad[:C].abs().min()
    with torch.no_grad(): model.head.maps.bias[C:] += torch.randn(2 * C)
    torch.testing.assert_close(model(*x).visual, before.visual)


@pytest.mark.parametrize("padded", [False, True])
def test_global_belief(padded):
    g = torch.Generator().manual_seed(0)
    l = 6 * torch.randn(3, 5, 4, generator=g, dtype=torch.float64)
    n = [5, 2, 1] if padded else [5, 5, 5]
    p, u = global_belief(l, torch.arange(5) < torch.tensor(n)[:, None] if padded else None)
    for b in range(3):
        s = 0
        for c in range(4):
            mine = [l[b, t, c].item() for t in range(n[b])]
            assert p[b, c].item() == pytest.approx(sum(1 / (1 + math.exp(-v)) for v in mine) / n[b])
            s += 1 + math.exp(max(-10, min(10, sum(mine) / n[b])) / .8)
        assert u[b].item() == pytest.approx(4 / s) and 0 < u[b] <= 1


def test_head_term_by_term():
    "Separate maps, as the released code has them"
    torch.manual_seed(0)
    head, (x_a, x_v) = EvidenceHead(6, 3).eval(), torch.randn(2, 2, 4, 6)
    C, W, b = 3, head.maps.weight, head.maps.bias
    prob, frame_att = (lambda x: F.linear(x, W[:C], b[:C])), (lambda x: F.linear(x, W[C:], b[C:]).reshape(2, 4, C, 2))
    v2a, a2v = (lambda x, s=s: F.leaky_relu(F.linear(x, head.collect.weight[s], head.collect.bias[s]), .2) for s in (slice(6), slice(6, 12)))
    p, u, P, U = head(x_a, x_v)
    for m, (x, collect) in enumerate([(x_a, v2a), (x_v, a2v)]):
        presence, absence, att = prob(x), head.absence(x + collect(x_a + x_v)), frame_att(x)
        e0, e1 = (torch.exp(z.clamp(-10, 10) / .8) + 1 for z in (presence, absence))
        torch.testing.assert_close(p[:, :, m], e0 / (e0 + e1))
        torch.testing.assert_close(u[:, :, m], 2 / (e0 + e1))
        Z = [(F.softmax(att[..., k], 1) * z).sum(1) for k, z in enumerate((presence, absence))]
        e0, e1 = (torch.exp(z.clamp(-10, 10) / .8) + 1 for z in Z)
        torch.testing.assert_close(P[:, m], e0 / (e0 + e1))
        torch.testing.assert_close(U[:, m], 2 / (e0 + e1))


def test_projections_frame_by_frame():
    torch.manual_seed(0)
    net, (audio, frames, motion) = ELUProjections(8, 8, 8, 6), drawn(2, 3, 8)
    e_a, e_v = net(audio, frames, motion)
    for b, t in itertools.product(range(2), range(3)):
        v = sum(F.elu(net.frames(frames[b, 8 * t + i])) for i in range(8)) / 8
        torch.testing.assert_close(e_v[b, t], F.elu(net.fusion(torch.cat([v, F.elu(net.motion(motion[b, t]))]))))
        torch.testing.assert_close(e_a[b, t], F.elu(net.audio(audio[b, t])))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mask", [None, torch.arange(5) < torch.tensor([[5], [3], [1], [2]])])
def test_streams_equal_two_runs_of_the_layer(training, mask):
    torch.manual_seed(0)
    layer = HybridAttention(8, 8, dropout=0. if training else .5).train(training)
    own, other = torch.randn(2, 4, 5, 8)
    for mine, on in zip(hybrid_streams(layer, own, other, mask), (True, False)):
        torch.testing.assert_close(mine, layer(own, other, on, mask))


def test_streams_have_dropout_of_their_own_in_training():
    "With one key the attention is exact up to its dropout: zero or doubled, drawn apart for the two streams"
    torch.manual_seed(0)
    layer = HybridAttention(8, 8, dropout=.5).train()
    layer.norm1 = layer.norm2 = nn.Identity()
    for p in (layer.out_cross, layer.ffn2): nn.init.zeros_(p.weight), nn.init.zeros_(p.bias)
    nn.init.zeros_(layer.out_self.bias)
    x = torch.randn(500, 1, 8)
    both, alone = (y - x for y in hybrid_streams(layer, x, x))
    dropped = torch.stack([both == 0, alone == 0]).float().flatten(1)
    together = (dropped[0] * dropped[1]).mean() - dropped[0].mean() * dropped[1].mean()
    assert .6 < dropped.mean() < .9 and abs(together) < .02            # 1 - .5*.5 of the entries, independently


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(0, 10**6))
def test_mutual_loss_entry_by_entry(B, C, step, seed):
    rng = np.random.default_rng(seed)
    g, a, v, ua, uv = rng.random((5, B, C))
    ug, y = rng.random(B), (rng.random((B, C)) > .5).astype(float)
    total = 0
    for b, c in itertools.product(range(B), range(C)):
        u = max(ug[b], .9)
        if y[b, c]: target, trust = (a[b, c], 1 - ua[b, c]) if a[b, c] >= v[b, c] else (v[b, c], 1 - uv[b, c])
        else: target, trust = (a[b, c] + v[b, c]) / 2, 1 - (ua[b, c] + uv[b, c]) / 2
        total += (u if step % 2 else 1 - u) * trust * (g[b, c] - target)**2
    got = mutual_loss(*map(torch.tensor, (g, a, v, ua, uv, ug, y)), step)
    assert got.shape == () and got.item() == pytest.approx(total / (B * C), rel=1e-9)


@pytest.mark.parametrize("B", [1, 3])
def test_mutual_loss_of_a_single_video(B):
    "A video in a batch of its own costs the same: means over equal videos are equal"
    model, x = toy().eval(), [v[:1].expand(B, -1, -1) for v in drawn()]
    out = model(*x)
    y = torch.tensor([[1., 0, 1]]).expand(B, -1)
    terms = LOSS(out, Batch(*x, y, None, {"step": 3}))
    one = LOSS(model(*(v[:1] for v in x)), Batch(*x, y[:1], None, {"step": 3}))
    for k in terms: torch.testing.assert_close(terms[k], one[k])


# ---- the network

def test_passes_of_a_batch_share_what_has_no_dropout():
    model, x = toy().train(), drawn(per_second=8)
    e = model.project(*x)
    assert [tuple(v.shape) for v in e] == [(4, 5, 16), (4, 5, 16), (4, 5, 3)]
    for on in (True, False):
        torch.manual_seed(1)
        a = model(*x, cross_attention=on)
        torch.manual_seed(1)
        b = model(*x, cross_attention=on, projected=e)
        for k, v in a.arrays().items(): assert torch.equal(v, getattr(b, k))
        for mine, shared_ in zip(a.extra["projected"], e): assert torch.equal(mine, shared_)


@pytest.mark.parametrize("masked", [False, True])
def test_both_passes_equal_two(masked):
    model, x = toy().eval(), drawn(per_second=8)
    mask = torch.arange(5) < torch.tensor([[5], [3], [1], [4]]) if masked else None
    for p, on in zip(model.both_passes(*x, mask=mask), (True, False)):
        want = model(*x, cross_attention=on, mask=mask)
        for k, v in p.arrays().items(): torch.testing.assert_close(v, getattr(want, k))
        for k in ("segment_uncertainty", "global_uncertainty"): torch.testing.assert_close(p.extra[k], want.extra[k])


def count_attention(f, monkeypatch):
    calls, real = [], F.scaled_dot_product_attention
    with monkeypatch.context() as m:
        m.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(a[0].shape) or real(*a, **k))
        f()
    return calls


def test_both_passes_cost_one_projection_one_self_and_one_cross_attention(monkeypatch):
    model, x, seen = toy().eval(), drawn(), []
    for k in ("audio", "frames", "motion", "fusion"): getattr(model.features, k).register_forward_hook(lambda *_, k=k: seen.append(k))
    assert count_attention(lambda: model.both_passes(*x), monkeypatch) == [(8, 5, 16)] * 2
    assert sorted(seen) == ["audio", "frames", "fusion", "motion"]
    assert len(count_attention(lambda: [model(*x, cross_attention=on) for on in (True, False)], monkeypatch)) == 3
    assert len(count_attention(lambda: model.train()(*x), monkeypatch)) == 3       # in training, dropout masks of their own


def test_both_passes_in_training_are_two_forwards():
    model, x = toy().train(), drawn()
    torch.manual_seed(3)
    both = model.both_passes(*x)
    torch.manual_seed(3)
    for p, on in zip(both, (True, False)):
        for k, v in model(*x, cross_attention=on).arrays().items(): assert torch.equal(v, getattr(p, k))


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("per_second", [1, 8])
def test_padding_changes_nothing(on, per_second):
    model, x = toy().eval(), drawn(1, 4, per_second)
    want = model(*x, cross_attention=on)
    pad = [F.pad(v, (0, 0, 0, 3 * (v.shape[1] // 4)), value=7.) for v in x]
    mask = torch.arange(7)[None] < 4
    got = model(*pad, cross_attention=on, mask=mask)
    for k in ("video", "audio", "visual"): torch.testing.assert_close(getattr(got, k), getattr(want, k))
    torch.testing.assert_close(got.segments[:, :4], want.segments)
    for a, b in zip(got.extra["uncertainty"], want.extra["uncertainty"]): torch.testing.assert_close(a, b)
    torch.testing.assert_close(got.extra["global_uncertainty"], want.extra["global_uncertainty"])
    y = torch.tensor([[1., 0, 1]])
    terms = LOSS(want, Batch(*x, y, None, STEP)), LOSS(got, Batch(*pad, y, None, STEP, mask))
    for k in terms[0]: torch.testing.assert_close(terms[1][k], terms[0][k])


def test_modalities_meet_where_they_should():
    "Without cross-attention: presence stays in its modality, absence does not; with mix=0 neither does attention"
    model, (a, f, m) = toy().eval(), drawn()
    x = model(a, f, m, cross_attention=False).extra["attended"]
    y = model(a, 2 * f, m, cross_attention=False).extra["attended"]
    assert torch.equal(x[0], y[0]) and not torch.equal(x[1], y[1])
    for z, w, k in zip(model.head.logits(*x)[0].unbind(-1), model.head.logits(*y)[0].unbind(-1), (0, 1)):
        assert torch.equal(z[:, :, 0], w[:, :, 0]) == (k == 0)
    assert torch.equal(model(a, 2 * f, m).video, model(a, 2 * f, m, cross_attention=False).video)
    model.mix = 0.
    torch.testing.assert_close(model(a, f, m).segments, model(a, f, m, cross_attention=False).segments)


def test_dropout_of_vision_comes_after_the_contrast():
    model, x = toy(dropout=0., absence_dropout=0.).train(), drawn()
    a, b = model(*x), model(*x)
    for p, q in zip(a.extra["attended"], b.extra["attended"]): assert torch.equal(p, q)
    assert not torch.equal(a.visual, b.visual) and not torch.equal(a.audio, b.audio)
    only = toy(dropout=0., visual_dropout=0.).train()                        # what absence collects is dropped, presence is not
    for k in (0, 1):
        p, q = (only.head.logits(*only(*x).extra["attended"])[0][..., k] for _ in range(2))
        assert torch.equal(p, q) == (k == 0)
    off = toy(dropout=0., visual_dropout=0., absence_dropout=0.).train()
    assert torch.equal(off(*x).segments, off(*x).segments)


def test_autocast_keeps_probabilities_in_single_precision():
    model, x = toy().eval(), drawn()
    with torch.autocast("cpu", torch.bfloat16): out = model(*x)
    for v in (*out.arrays().values(), *out.extra["uncertainty"], out.extra["global_uncertainty"], out.extra["segment_uncertainty"]):
        assert v.dtype == torch.float32
    torch.testing.assert_close(out.segments, model(*x).segments, atol=.03, rtol=0)


def test_uncertainties_are_those_of_the_probabilities():
    out = toy().eval()(*drawn())
    for p, u in [(out.segments, out.extra["segment_uncertainty"]), (out.audio, out.extra["uncertainty"][0]), (out.visual, out.extra["uncertainty"][1])]:
        e = torch.stack([2 * p / u - 1, 2 * (1 - p) / u - 1])
        assert (e > 0).all() and ((u > 0) & (u < 1)).all()


# ---- loss and training

def test_terms_and_weights():
    model, x = toy().eval(), drawn()
    batch, out = Batch(*x, (torch.rand(4, 3) > .5).float(), None, STEP), model(*x)
    terms = LOSS(out, batch)
    assert list(terms) == ["audio", "visual", "video", "contrast", "mutual"]
    for k, w, p, y in [("audio", 2, out.audio, batch.weak), ("visual", .6, out.visual, .9 * batch.weak + .05), ("video", .6, out.video, batch.weak)]:
        torch.testing.assert_close(terms[k], w * bce(p, y))
    torch.testing.assert_close(terms["contrast"], contrastive(*out.extra["attended"]))
    torch.testing.assert_close(CMPAELoss(w_mutual=3.)(out, batch)["mutual"], 3 * terms["mutual"])
    removed = {"removed_audio": batch.weak, "removed_visual": batch.weak}
    denoised = LOSS(out, batch._replace(labels=STEP | removed))
    assert denoised["mutual"] == terms["mutual"] and denoised["video"] == terms["video"]      # these keep the weak label
    assert denoised["audio"] != terms["audio"] and denoised["visual"] != terms["visual"]


def fit(*callbacks, model=None, epochs=4, loss=LOSS, n=70, **kw):
    torch.manual_seed(0)
    return Learner(model or toy(), toy_clips(n), loss, **{"lr": 5e-3, "batch_size": 32, "epochs": epochs, "device": "cpu", "callbacks": callbacks, **kw}).fit()


@pytest.mark.parametrize("callbacks", [(), (DenoiseCB([.1] * 3, [.2] * 3),)])
def test_training_reduces_every_supervised_term(callbacks):
    h = fit(StepCB(), *callbacks, epochs=12).history
    for k in ("audio", "visual", "video"): assert h[-1]["loss"][k] < .9 * h[0]["loss"][k], k
    assert sum(h[-1]["loss"].values()) < .9 * sum(h[0]["loss"].values())


def test_training_beats_the_untrained_network_on_validation():
    valid, start = toy_clips(60, seed=1), toy()
    score = lambda m: flat(evaluate(*RULES[RULE].decide(*predict_both(m, valid)), valid.dense_audio, valid.dense_visual))["segment/Type@AV"]
    before = score(start)
    keep = ValidateCB(valid, RULE, RECIPE["select"])
    after = fit(StepCB(), keep, epochs=15, n=200)
    assert score(after.model) > before + 10
    ten = [f"{level}/{m}" for level in ("segment", "event") for m in ("A", "V", "AV", "Type@AV", "Event@AV")]
    means = [np.mean([h["val"][k] for k in ten]) for h in after.history]
    assert keep.best == pytest.approx(max(means)) == pytest.approx(means[keep.best_epoch - 1])


class Turns(StepCB):
    def __init__(self): self.seen = []
    def after_loss(self, learner): self.seen.append((learner.epoch, learner.batch.labels["step"]))


def test_positions_start_anew_in_every_epoch():
    turns = Turns()
    fit(turns, epochs=3)
    assert turns.seen == [(e, i) for e in range(3) for i in range(3)]


def test_positions_survive_other_callbacks_that_write_labels():
    for order in ((StepCB(), DenoiseCB([.4] * 3, [.5] * 3, warmup=None)), (DenoiseCB([.4] * 3, [.5] * 3, warmup=None), StepCB())):
        learner = fit(*order, epochs=1)
        assert set(learner.batch.labels) == {"step", "removed_audio", "removed_visual"} and learner.batch.labels["step"] == 2


@pytest.mark.parametrize("at", [(1, 1), (2, 2)])
def test_resumed_equals_uninterrupted(tmp_path, at):
    "Parity of the batch, thresholds of an early epoch and all weights"
    valid = toy_clips(20, seed=1)
    class Stop(Turns):
        def after_backward(self, learner):
            if (learner.epoch, learner.i) == at: raise KeyboardInterrupt
    def go(turns, name):
        return fit(turns, DenoiseCB([.4] * 3, [.5] * 3), ThresholdsCB(valid, "cmpae", epoch=1), CheckpointCB(tmp_path / name, "x"))
    first, second, third = Stop(), Turns(), Turns()
    with pytest.raises(KeyboardInterrupt): go(first, "a.pt")
    resumed, whole = go(second, "a.pt"), go(third, "b.pt")
    assert same_weights(resumed.model, whole.model)
    strip = lambda h: {k: v for k, v in h.items() if k != "seconds"}
    assert [strip(h) for h in resumed.history] == [strip(h) for h in whole.history]
    assert "thresholds" in resumed.history[0] and len(resumed.history) == 4
    assert first.seen[:3 * at[0]] + second.seen == third.seen


def test_denoising_pass_shares_the_projections_and_sees_no_other_modality():
    class Count(StepCB):
        n = 0
        def before_fit(self, learner): learner.model.features.register_forward_hook(self.add)
        def add(self, *_): self.n += 1
    count = Count()
    fit(count, DenoiseCB([.4] * 3, [.5] * 3, warmup=None), epochs=2)
    assert count.n == 2 * 3


def test_published_setting_in_one_place():
    assert RECIPE == dict(lr=5e-4, batch_size=128, epochs=20, step=6, factor=.25, select="avg10")
    assert (RULE, cmpae.SELECT_EPOCH, cmpae.TEMPERATURE, cmpae.LIMIT) == ("cmpae", 8, .8, 10.)
    assert CMPAE(**SIZES).mix == .8 and CMPAE(**SIZES).visual_drop.p == .5 and CMPAE(**SIZES).head.drop.p == .2
    assert CMPAELoss(w_visual=1., w_video=2.).w_audio == 2                                     # CoLeaF's weights


# ---- thresholds

def test_search_uses_both_passes_of_the_model():
    valid, model = toy_clips(40, seed=1), fit(StepCB(), epochs=8).model
    with torch.no_grad(): model.layers[0].out_cross.weight.mul_(6)     # make the two passes disagree
    got = search_thresholds(model, valid, "cmpae")
    passes = [predict(model, valid, cross_attention=on) for on in (True, False)]
    want = select_thresholds(passes[0], valid.dense_audio, valid.dense_visual, without=passes[1])
    assert got.thresholds.tolist() == want.thresholds.tolist() and got.rule == want.rule
    np.testing.assert_allclose(got.curve, want.curve)
    alone = select_thresholds(passes[0], valid.dense_audio, valid.dense_visual)
    assert not np.allclose(got.curve, alone.curve)
    assert search_thresholds(model, valid, "cmpae", modality="audio").rule.visual_gate == .45
    one = search_thresholds(model, valid, rule="jomold")
    np.testing.assert_allclose(one.curve, select_thresholds(passes[0], valid.dense_audio, valid.dense_visual, rule=RULES["jomold"]).curve)


def test_padded_videos_are_searched_like_unpadded_ones():
    valid, model = toy_clips(30, seed=1), fit(StepCB(), epochs=3).model
    pad = lambda x: np.pad(x, ((0, 0), (0, 2), (0, 0)))
    longer = replace(valid, **{k: pad(getattr(valid, k)) for k in ("audio", "frames", "motion", "dense_audio", "dense_visual")}, lengths=np.full(30, 5))
    np.testing.assert_array_equal(search_thresholds(model, longer, "cmpae").thresholds, search_thresholds(model, valid, "cmpae").thresholds)
    mixed = replace(longer, lengths=np.where(np.arange(30) % 2, 7, 5))          # a batch with padding: the mask is used
    for p, on in zip(predict_both(model, mixed), (True, False)):
        np.testing.assert_allclose(p.audio[::2], predict(model, valid, cross_attention=on).audio[::2], rtol=1e-5)


@pytest.mark.parametrize("epochs, at, state", [(4, 2, "epoch 2"), (2, 8, "epoch 2"), (3, 3, "epoch 3")])
def test_thresholds_are_those_of_the_state_of_that_epoch(epochs, at, state):
    valid = toy_clips(30, seed=1)
    class Keep(StepCB):
        def after_epoch(self, learner):
            if learner.epoch == min(at, epochs): self.found = search_thresholds(learner.model, valid, "cmpae").thresholds.tolist()
    keep = Keep()
    history = fit(keep, ThresholdsCB(valid, "cmpae", epoch=at), epochs=epochs).history
    assert [i + 1 for i, h in enumerate(history) if "thresholds" in h] == [min(at, epochs)]
    log = history[min(at, epochs) - 1]["thresholds"]
    assert log == {"rule": "cmpae", "state": state, "modality": "visual", "thresholds": keep.found}
    assert all(type(t) is float for t in log["thresholds"])


def test_looking_for_thresholds_does_not_change_training():
    assert same_weights(fit(StepCB(), ThresholdsCB(toy_clips(20, seed=1), "cmpae", epoch=1)).model, fit(StepCB()).model)


def test_thresholds_keep_their_classes(tmp_path):
    rule = RULES["cmpae"].with_(visual_gate=CMPAE_SELECTED, name="selected")
    save_thresholds(tmp_path / "t.json", rule)
    assert load_thresholds(tmp_path / "t.json") == rule
    swapped = (*CLASSES[:7], CLASSES[8], CLASSES[7], *CLASSES[9:])
    with pytest.raises(InputError) as e: load_thresholds(tmp_path / "t.json", swapped)
    assert str(e.value).startswith(str(tmp_path / "t.json")) and "class 7 is 'Fire_alarm'" in str(e.value) and "expected 'Chainsaw'" in str(e.value)
    assert "put them in order" in str(e.value)
    save_thresholds(tmp_path / "one.json", RULES["cmpae"].with_(audio_gate=(.3, .4)), ["a", "b"])     # audio only
    assert load_thresholds(tmp_path / "one.json", ["a", "b"]).audio_gate == (.3, .4)


def test_a_rule_with_one_threshold_for_all_classes_fits_any_classes(tmp_path):
    save_thresholds(tmp_path / "t.json", RULES["coleaf"])
    assert load_thresholds(tmp_path / "t.json", ["a", "b"]) == RULES["coleaf"]


def damaged(tmp_path, **changes):
    "A file of thresholds with other contents"
    path = tmp_path / "t.json"
    save_thresholds(path, RULES["cmpae"].with_(visual_gate=(.3, .4)), ["a", "b"])
    saved = read_json(path)
    for k, v in changes.items():
        if k in saved["rule"]: saved["rule"][k] = v
        else: saved[k] = v
    write_json(saved, path)
    return path


@pytest.mark.parametrize("changes, said", [
    (dict(format=2), "holds no thresholds"),
    (dict(rule=[.3]), "holds no thresholds"),
    (dict(classes="ab"), "holds no thresholds"),
    (dict(visual_gate=[.3, 1.4]), "visual_gate: [0.3, 1.4] is not possible"),
    (dict(visual_gate=[.3, "x"]), "could not convert"),
    (dict(visual_gate=[.3]), "1 thresholds for 2 classes"),
    (dict(gate="vidoe"), "did you mean 'video'"),
    (dict(classes=["a"]), "2 thresholds for 1 classes"),
    (dict(rule={"name": "x"}), "expected audio_gate, fuse, gate, name, segment, visual_gate"),
])
def test_a_damaged_file_of_thresholds_is_refused_by_name(tmp_path, changes, said):
    path = damaged(tmp_path, **changes)
    with pytest.raises(InputError) as e: load_thresholds(path, ["a", "b"])
    assert str(e.value).startswith(str(path)) and said in str(e.value)


@pytest.mark.parametrize("content, said", [(None, "no such file"), ("{", "not valid JSON"), ("[1]", "holds no thresholds")])
def test_a_file_that_is_none(tmp_path, content, said):
    if content: (tmp_path / "t.json").write_text(content)
    with pytest.raises(InputError, match=said) as e: load_thresholds(tmp_path / "t.json")
    assert "t.json" in str(e.value)


@pytest.mark.parametrize("make, said", [
    (lambda: CMPAE(**SIZES, mix=-.1), "mix: -0.1 is not possible"),
    (lambda: CMPAELoss(w_mutual=-1.), "w_mutual: -1.0 is not possible"),
    (lambda: CMPAELoss(w_mutual=math.nan), "w_mutual: nan is not possible"),
    (lambda: CMPAELoss(temperature=0.), "temperature: 0.0 is not possible"),
    (lambda: fit(epochs=1), "train with the callback `StepCB()`"),
    (lambda: toy()(*(v[:, :n] for v, n in zip(drawn(T=5, per_second=2), (5, 9, 5)))), "frames: 9 frames for 5 seconds"),
    (lambda: ThresholdsCB(None, "cmpae"), "there are no dense validation labels"),
    (lambda: ThresholdsCB(toy_clips(4)[:0], "cmpae"), "there are no dense validation labels"),
    (lambda: ThresholdsCB(replace(toy_clips(4), dense_audio=None, dense_visual=None), "cmpae"), "there are no dense validation labels"),
    (lambda: ThresholdsCB(toy_clips(4), rule="hna"), "did you mean 'han'?"),
    (lambda: ThresholdsCB(toy_clips(4), "cmpae", modality="sound"), "modality: 'sound' is not possible"),
    (lambda: ThresholdsCB(toy_clips(4), "cmpae", epoch=0), "epoch: 0 is not possible"),
    (lambda: search_thresholds(toy(), toy_clips(4), rule="hna"), "did you mean 'han'?"),
    (lambda: check_thresholds(CMPAE_SELECTED, CLASSES, CLASSES[::-1]), "class 0 is 'Speech'. expected 'Clapping'"),
    (lambda: check_thresholds([.1, .2], ["a", "b"], ["a", "c"]), "class 1 is 'b'. expected 'c'. select them on the validation videos"),
    (lambda: check_thresholds([.1], ["a", "b"], ["a", "b"]), "1 thresholds for 2 classes"),
    (lambda: check_thresholds([.1], ["a"], ["a", "b"]), "class 1 is None. expected 'b'"),
    (lambda: save_thresholds("unused.json", RULES["cmpae"].with_(visual_gate=CMPAE_SELECTED), ["a"]), "25 thresholds for 1 classes"),
])
def test_refusals(make, said):
    with pytest.raises(InputError) as e: make()
    assert said in str(e.value)


