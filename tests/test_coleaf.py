"""Parity of CoLeaF with the released code, each loss against an independent one, padding, the order of an iteration, training."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import close
from hypothesis import given, settings
from hypothesis import strategies as st
from micro import SIZES, same_weights, toy_han
from test_han import VARIANTS, fill
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from avvp_nb.core import InputError, Parsing, read_json, shared
from avvp_nb.data.clips import Batch, Clips
from avvp_nb.data.simulate import simulate
from avvp_nb.methods.cmpae import CMPAE, CMPAELoss, StepCB
from avvp_nb.methods.coleaf import (
    ANCHOR_LOSSES,
    NCE,
    OFFICIAL,
    OPTIONS,
    PAPER,
    PROTOCOLS,
    READINGS,
    RECIPE,
    RECIPE_BY_PROTOCOL,
    REFERENCE_UNUSED,
    RULE,
    UNUSED,
    CoLeaFCB,
    CoLeaFLoss,
    Reference,
    ReferenceOutput,
    SelfAttention,
    anchor_base,
    asymmetric,
    build_coleaf,
    build_references,
    check_options,
    coleaf_keys,
    cooccurrence,
    cooccurrence_gap,
    event_contrast,
    event_shares,
    hand_over,
    mixed_teacher,
    nce_official,
    nce_paper,
    own_random,
    pseudo_labels,
    reference_keys,
    reference_loss,
)
from avvp_nb.methods.han import HAN, pooled_frames
from avvp_nb.methods.jomold import DenoiseCB, JoMoLD, JoMoLDLoss
from avvp_nb.methods.losses import GuidedLoss, bce
from avvp_nb.methods.ma import MALoss
from avvp_nb.methods.method import network_sizes
from avvp_nb.methods.official import from_official, to_official
from avvp_nb.methods.zoo import METHODS
from avvp_nb.metrics import RULES
from avvp_nb.records.spec import RunSpec
from avvp_nb.train.callbacks import CheckpointCB, ValidateCB
from avvp_nb.train.learner import Callback, Learner, NotFiniteError, predict

NETWORKS = {"coleaf": "coleaf_anchor", "coleaf_audio": "coleaf_self_audio", "coleaf_visual": "coleaf_self_video"}
MODALITY = {"audio": "audio", "visual": "video"}                  # our name: that of the cases


@pytest.fixture(scope="module")
def official_keys(golden):
    keys = read_json(shared("golden", "state_dict_keys.json"))
    return {ours: {k["key"]: k["shape"] for k in keys[theirs]["keys"]} for ours, theirs in NETWORKS.items()}


@pytest.fixture(scope="module")
def inputs(golden):
    return {k: torch.tensor(v) for k, v in golden("inputs_b3").items()}


def build(official_keys, method, variant):
    return from_official(fill(official_keys[method], "chirp" if variant else "sine"), method, strict=True)


def forward(model, inputs, **kwargs):
    with torch.no_grad(): return model(*(inputs[k] for k in ("audio", "visual", "visual_st")), **kwargs)


# ---- networks

@pytest.mark.parametrize("method, used, unused", [("coleaf", 38, 10), ("coleaf_audio", 19, 8), ("coleaf_visual", 23, 8)])
def test_every_official_tensor_is_used_or_known_to_be_unused(official_keys, method, used, unused):
    keys = coleaf_keys() if method == "coleaf" else reference_keys(method.removeprefix("coleaf_"))
    mine = {o for o, _, _ in keys}
    assert len(mine) == used and mine <= set(official_keys[method]) and len(official_keys[method]) == used + unused
    assert all(k.startswith(UNUSED if method == "coleaf" else REFERENCE_UNUSED) for k in set(official_keys[method]) - mine)


@pytest.mark.parametrize("method", NETWORKS)
def test_official_tensors_there_and_back(official_keys, method):
    state = fill(official_keys[method], "chirp")
    back = to_official(from_official({"model": state}, method, strict=True), method)
    for k, v in back.items(): assert torch.equal(v, state[k]), k


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ca", [True, False])
def test_anchor(golden, official_keys, inputs, variant, ca):
    case = golden(f"coleaf_forward_{'ca' if ca else 'noca'}{variant}")
    out = forward(build(official_keys, "coleaf", variant), inputs, cross_attention=ca)
    x = [F.normalize(v, dim=-1) for v in out.extra["attended"]]
    for key, value in {"global_prob": out.video, "a_prob": out.audio, "v_prob": out.visual, "frame_prob": out.segments, "xx1_before": x[0],
                       "xx2_before": x[1], "global_uct": out.extra["global_uncertainty"], "a_uct": out.extra["uncertainty"][0],
                       "v_uct": out.extra["uncertainty"][1], "frame_uct": out.extra["segment_uncertainty"]}.items():
        close(case, key, value)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("modality", MODALITY)
@pytest.mark.parametrize("pooled", [False, True])
def test_reference(golden, official_keys, inputs, variant, modality, pooled):
    case = golden(f"coleaf_self_{MODALITY[modality]}{variant}")
    if pooled: inputs = {**inputs, "visual": pooled_frames(inputs["visual"], 10)}
    out = forward(build(official_keys, f"coleaf_{modality}", variant), inputs)
    for key, value in {"prob": out.probs, "cls_prob": out.tokens, "frame_prob": out.segments, "x_before": F.normalize(out.features, dim=-1)}.items():
        close(case, key, value)


def test_class_tokens_matter(official_keys, inputs):
    "Without them the seconds look at each other only; the parity test has teeth"
    model = build(official_keys, "coleaf_audio", "_chirp")
    with_, model.tokens = forward(model, inputs), None
    assert (forward(model, inputs).probs - with_.probs).abs().max() > 1e-3


def naive_reference(net, x, mask=None):
    "A Reference of sound, head by head, seconds before class tokens, PyTorch's own attention"
    B, T = x.shape[:2]
    e = net.project(x)
    tokens = net.tokens.expand(B, -1, -1)
    both = torch.cat([e, tokens], 1)
    mha = nn.MultiheadAttention(net.dim, 1, batch_first=True)
    mha.in_proj_weight.data, mha.in_proj_bias.data = net.layer.qkv.weight.data, net.layer.qkv.bias.data
    mha.out_proj.load_state_dict(net.layer.out.state_dict())
    ignore = None if mask is None else torch.cat([~mask, torch.zeros(B, net.classes, dtype=torch.bool)], 1)
    y = net.layer.norm1(both + mha(both, both, both, key_padding_mask=ignore)[0])
    y = net.layer.norm2(y + net.layer.ffn2(F.relu(net.layer.ffn1(y))))
    out = []
    for b in range(B):
        n = T if mask is None else int(mask[b].sum())
        p, w = torch.sigmoid(net.classify(y[b, :n])), torch.softmax(net.temporal(y[b, :n]), 0)
        out.append((p * w).sum(0))
    return torch.stack(out), torch.sigmoid(y[:, T:].mean(-1)), y[:, :T]


@pytest.mark.parametrize("lengths", [None, [5, 2, 1]])
def test_reference_against_pytorchs_attention(lengths):
    torch.manual_seed(0)
    net, x = Reference("audio", **SIZES).eval(), torch.randn(3, 5, 8)
    net.tokens.data.normal_()
    net.layer.norm2.weight.data.normal_()
    mask = None if lengths is None else torch.arange(5) < torch.tensor(lengths)[:, None]
    with torch.no_grad(): out, (r, cls, features) = net(x, None, None, mask=mask), naive_reference(net, x, mask)
    torch.testing.assert_close(out.probs, r)
    torch.testing.assert_close(out.tokens, cls)
    exists = torch.ones(3, 5, dtype=torch.bool) if mask is None else mask
    torch.testing.assert_close(out.features[exists], features[exists])


@pytest.mark.parametrize("modality", MODALITY)
@pytest.mark.parametrize("tokens", [True, False])
def test_padding_changes_nothing(modality, tokens):
    torch.manual_seed(0)
    net = Reference(modality, **SIZES, tokens=tokens).eval()
    x = [torch.randn(3, 6, 8) for _ in range(3)]
    mask = torch.arange(6) < torch.tensor([6, 3, 1])[:, None]
    with torch.no_grad():
        out = net(*x, mask=mask)
        other = net(*(torch.where(mask[..., None], v, 1e3) for v in x), mask=mask)
        for b, n in enumerate((6, 3, 1)):
            alone = net(*(v[b:b + 1, :n] for v in x))
            for o in (out, other):
                torch.testing.assert_close(o.probs[b], alone.probs[0])
                torch.testing.assert_close(o.features[b, :n], alone.features[0])
                if tokens: torch.testing.assert_close(o.tokens[b], alone.tokens[0])


@pytest.mark.parametrize("lengths", [None, [5, 2, 1]])
def test_without_scores_everything_else_is_the_same(lengths):
    torch.manual_seed(0)
    net, x = Reference("visual", **SIZES).eval(), [torch.randn(3, 5, 8) for _ in range(3)]
    net.tokens.data.normal_()
    mask = None if lengths is None else torch.arange(5) < torch.tensor(lengths)[:, None]
    grads = []
    for scores in (True, False):
        net.zero_grad()
        out = net(*x, mask=mask, scores=scores)
        assert (out.tokens is not None) == scores
        (out.probs ** 2).sum().backward()
        grads.append([out.probs.detach(), out.segments.detach(), *(p.grad for p in net.parameters())])
    for a, b in zip(*grads, strict=True): torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    assert net.tokens.grad.abs().max() > 0                     # they are looked at


def test_asymmetric_dropout():
    torch.manual_seed(0)
    x, got = [torch.randn(4, 5, 8) for _ in range(3)], {}
    for modality in MODALITY:
        net = Reference(modality, **SIZES)
        for name in ("classify", "temporal"):
            getattr(net, name).register_forward_pre_hook(lambda _, i, k=name: got.update({k: i[0].detach()}))
        features = net(*x).features
        zeros = (got["classify"] == 0).float().mean()
        assert .35 < zeros < .65
        assert torch.equal(got["temporal"], features if modality == "audio" else got["classify"])


def test_reference_reads_its_own_modality_only():
    torch.manual_seed(0)
    x = [torch.randn(2, 4, 8, requires_grad=True) for _ in range(3)]
    for modality, read in (("audio", [0]), ("visual", [1, 2])):
        for v in x: v.grad = None
        Reference(modality, **SIZES)(*x).probs.sum().backward()
        assert [i for i, v in enumerate(x) if v.grad is not None] == read


def test_no_weight_without_a_reader():
    torch.manual_seed(0)
    net = Reference("visual", **SIZES)
    out = net(*[torch.randn(2, 4, 8) for _ in range(3)])
    (out.probs.sum() + out.tokens.sum()).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert sum(p.numel() for p in Reference("audio").parameters()) == 25 * 512 + 129 * 512 + 2 * 513 * 25 + 3 * 512 * 513 + 3 * 512 * 513 + 4 * 512


def test_class_tokens_are_degenerate_at_the_start():
    torch.manual_seed(0)
    net = Reference("visual", **SIZES).double()
    net.tokens.data.normal_()
    out = net(*[torch.randn(4, 5, 8).double() for _ in range(3)])
    torch.testing.assert_close(out.tokens, torch.full((4, 3), .5), atol=1e-7, rtol=0)
    asymmetric(out.tokens, torch.eye(4, 3)).backward()
    loud = {k for k, p in net.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-6}
    assert loud == {"layer.norm2.weight", "layer.norm2.bias"}


def test_frames_of_ten_seconds_and_one_of_sixty():
    "Any T and any C"
    net = Reference("visual", classes=100, frame_dim=1024, motion_dim=1024, dim=16).eval()
    out = net(torch.randn(2, 60, 128), torch.rand(2, 60, 1024), torch.rand(2, 60, 1024))
    assert out.probs.shape == (2, 100) and out.tokens.shape == (2, 100) and out.segments.shape == (2, 60, 100)


# ---- losses

@pytest.mark.parametrize("kind", ["hard", "smooth", "prob", "gamma4"])
def test_asymmetric(golden, kind):
    case = golden("coleaf_asl")
    x = torch.tensor(case["x"], requires_grad=True)
    loss = asymmetric(x, torch.tensor(case["target_hard" if kind == "gamma4" else f"target_{kind}"]), gamma_neg=4 if kind == "gamma4" else 1)
    loss.backward()
    close(case, f"loss_{kind}", loss.detach())
    close(case, f"grad_{kind}", x.grad)


@pytest.mark.parametrize("x, y, want", [(.8, 1., .044629), (.3, 0., .071921), (.04, 0., 0.), (.7, .95, .124248), (.7, .05, .642092)])
def test_asymmetric_by_hand(x, y, want):
    assert asymmetric(torch.tensor([[x]]), torch.tensor([[y]])).item() == pytest.approx(want, abs=1e-6)


def test_asymmetric_leaves_the_gradient_mode_alone():
    for on in (True, False):
        with torch.set_grad_enabled(on):
            loss = asymmetric(torch.rand(2, 3, requires_grad=True), torch.rand(2, 3))
            assert torch.is_grad_enabled() is on and loss.requires_grad is on


def test_cooccurrence(golden):
    case = golden("coleaf_cc")
    p = torch.tensor(case["student"], requires_grad=True)
    t = torch.tensor(case["teacher"], requires_grad=True)
    loss = cooccurrence(t, p)
    loss.backward()
    close(case, "loss_mode1", loss.detach())
    close(case, "grad_student", p.grad)
    assert t.grad is None


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 7), st.integers(0, 2**31), st.sampled_from([0., 1e-3, 1.]))
def test_cooccurrence_gap_is_that_of_the_matrices(B, C, seed, how_far):
    rng = np.random.default_rng(seed)
    t = rng.random((B, C))
    p = np.clip(t + how_far * (rng.random((B, C)) - .5), 0, 1)
    want = [np.sum((np.outer(a, a) - np.outer(b, b)) ** 2) for a, b in zip(t, p)]
    np.testing.assert_allclose(cooccurrence_gap(torch.tensor(t), torch.tensor(p)).numpy(), want, rtol=1e-9, atol=1e-18)
    single = cooccurrence_gap(*(torch.tensor(x).float() for x in (t, p)))
    assert (single >= 0).all()


def test_cooccurrence_scales_with_the_batch():
    t, p = torch.tensor([[.9, .2]]), torch.tensor([[.6, .2]])
    assert cooccurrence(t, p, "paper").item() == pytest.approx(.052425, abs=1e-6)
    for B in (1, 2, 16):
        assert cooccurrence(t.repeat(B, 1), p.repeat(B, 1)).item() == pytest.approx(.104850 * B**2, rel=1e-5)
        assert cooccurrence(t.repeat(B, 1), p.repeat(B, 1), "paper").item() == pytest.approx(.052425, rel=1e-5)


@pytest.mark.parametrize("kind", ["plain", "weighted"])
def test_contrast(golden, kind):
    case = golden("coleaf_nce")
    x1, x2 = (torch.tensor(case[k], requires_grad=True) for k in ("x1", "x2"))
    w = torch.ones(8) if kind == "plain" else torch.tensor(case["weights"])[:, 0]      # one weight for all seconds of a video
    loss = nce_official(x1 @ x2.mT / .2, w)
    loss.backward()
    close(case, f"loss_{kind}", loss.detach())
    close(case, f"grad_x1_{kind}", x1.grad)
    close(case, f"grad_x2_{kind}", x2.grad)


def test_contrast_by_hand():
    anchor, reference = torch.tensor([[[1, 0], [.6, .8]]]), torch.tensor([[[.8, .6], [0, 1.]]])
    half, logits = torch.tensor([.5]), anchor @ reference.mT / .2
    assert nce_paper(logits, half).item() == pytest.approx((-4. + .8) / 2 * .5, abs=1e-5)
    assert nce_official(logits.mT, half).item() == pytest.approx((1.055494 + .121477) / 2 * .5, abs=1e-5)
    assert nce_official(logits, torch.ones(1), 0.).item() == pytest.approx((.018150 + 1.171101) / 2, abs=1e-5)


def naive_nce(form, logits, weight, lengths, smoothing=.1):
    total = 0.
    for x, w, n in zip(logits.tolist(), weight.tolist(), lengths):
        for t in range(n):
            e = [math.exp(v) for v in x[t][:n]]
            others = sum(e) - e[t]
            if form == "paper": total -= w * (math.log(e[t] / others) if n > 1 else 0)
            else: total -= w * math.log(((1 - smoothing) * e[t] + (smoothing * others / (n - 1) if n > 1 else 0)) / sum(e))
    return total / sum(lengths)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(NCE)), st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 2**31))
def test_contrast_against_loops(form, lengths, seed):
    g = torch.Generator().manual_seed(seed)
    B, T = len(lengths), 5
    logits, weight = (3 * torch.randn(B, T, T, generator=g, dtype=torch.float64)).requires_grad_(), torch.rand(B, generator=g, dtype=torch.float64)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    loss = NCE[form](logits, weight, mask=mask) if form == "paper" else NCE[form](logits, weight, .1, mask)
    assert loss.item() == pytest.approx(naive_nce(form, logits, weight, lengths), rel=1e-5, abs=1e-6)
    loss.backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad.masked_fill(mask[:, :, None] & mask[:, None], 0) == 0).all()      # padded seconds: neither query nor candidate
    if min(lengths) == T: assert NCE[form](logits, weight).item() == pytest.approx(loss.item(), abs=1e-12)


@pytest.mark.parametrize("form", NCE)
def test_gradient_goes_to_the_anchor_only(form):
    torch.manual_seed(0)
    a, r = (torch.randn(3, 4, 8, requires_grad=True) for _ in range(2))
    event_contrast(a, r, torch.tensor([1., .5, 0.]), form, None).backward()
    assert r.grad is None and (a.grad[:2].abs().amax((1, 2)) > 0).all() and (a.grad[2] == 0).all()


def test_temperature_of_the_printed_form():
    torch.manual_seed(0)
    a, r, one = torch.randn(2, 4, 16), torch.randn(2, 4, 16), torch.ones(2)
    assert event_contrast(a, r, one, "paper", None) == event_contrast(a, r, one, "paper", 4.)
    assert event_contrast(3 * a, r, one) == pytest.approx(event_contrast(a, r, one).item(), abs=1e-6)         # cosines
    assert event_contrast(3 * a, r, one, "paper", None) != event_contrast(a, r, one, "paper", None)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**31), st.booleans())
def test_event_shares_against_loops(B, C, seed, inclusive):
    rng = np.random.default_rng(seed)
    r = rng.integers(0, 11, (2, B, C)) / 10                                # .5 is frequent
    a, v = event_shares(*(torch.tensor(x) for x in r), .5, inclusive)
    for b in range(B):
        g = [{c for c in range(C) if (x[b, c] >= .5 if inclusive else x[b, c] > .5)} for x in r]
        both = len(g[0] & g[1])
        for mine, own in ((a, len(g[0])), (v, len(g[1]))):
            assert mine[b].item() == pytest.approx((own - both) / own if own else 0.)


def test_mixed_teacher():
    r, p = torch.tensor([[.9, .05, .5]]), torch.tensor([[.6, .3, .4]], requires_grad=True)
    t = mixed_teacher(r, p, torch.ones(1, 3), .1, .8)
    torch.testing.assert_close(t, torch.tensor([[.9, .05, .4]]))
    assert not t.requires_grad
    assert torch.equal(mixed_teacher(r, p, torch.zeros(1, 3), .1, .8), p)


# ---- one step of training, on recorded outputs of the three networks

def said(case, grad=True):
    "Parsing, reference outputs and batch of a `coleaf_train_terms` case; leaves by their recorded names"
    leaf = {k: torch.tensor(case[k], requires_grad=grad) for k in
            ("output", "a_prob", "v_prob", "s_a_prob", "s_v_prob", "cls_a", "cls_v", "xx1_before", "xx2_before", "a_uct", "v_uct", "global_uct")}
    parsing = Parsing(leaf["output"], leaf["a_prob"], leaf["v_prob"], torch.zeros(12, 10, 2, 25),
                      extra={"attended": (leaf["xx1_before"], leaf["xx2_before"]), "uncertainty": (leaf["a_uct"], leaf["v_uct"]),
                             "global_uncertainty": leaf["global_uct"], "mask": None})
    refs = [ReferenceOutput(leaf[f"s_{m}_prob"], leaf[f"cls_{m}"], None, torch.tensor(case[f"s_x_{m}_before"])) for m in "av"]
    return leaf, parsing, refs, Batch(None, None, None, torch.tensor(case["label"]), None, {"step": 0})


@pytest.fixture(params=[1, 3, 5])
def step(golden, request):
    case = golden(f"coleaf_train_terms_epoch{request.param}")
    return case, request.param - 1, *said(case)


def anchor_loss(epoch): return CoLeaFLoss(anchor_base(CMPAELoss())), epoch >= OFFICIAL.start


def test_terms_of_the_references(step):
    case, epoch, leaf, parsing, refs, batch = step
    loss, weights = CoLeaFLoss(anchor_base(CMPAELoss())), OFFICIAL.weights(epoch)
    terms = []
    for m, (k, name) in enumerate(zip("av", ("audio", "visual"))):
        y, p = loss.targets(batch)[m], (parsing.audio, parsing.visual)[m]
        pseudo = pseudo_labels(p, y, OFFICIAL.pseudo[m]) if weights[m][2] else None
        assert not (pseudo is not None and pseudo.requires_grad)
        terms += [asymmetric(refs[m].probs, y), asymmetric(refs[m].tokens, y)]
        if epoch == 4:
            close(case, f"asl_targets_{name}_distill", pseudo)
            terms.append(asymmetric(refs[m].probs, pseudo))
        total = reference_loss(refs[m], y, pseudo, weights[m])
        total.backward()
        close(case, f"total_reference_{name}", total.detach())
        close(case, f"grad_s_{k}_prob", leaf[f"s_{k}_prob"].grad)
        grad = leaf[f"cls_{k}"].grad
        close(case, f"grad_cls_{k}", torch.zeros(12, 25) if grad is None else grad)
    close(case, "loss_asl", torch.stack(terms).detach())
    assert leaf["a_prob"].grad is None and leaf["v_prob"].grad is None


def test_terms_of_the_anchor(step):
    case, epoch, leaf, parsing, refs, batch = step
    loss, started = anchor_loss(epoch)
    w = event_shares(refs[0].probs, refs[1].probs)
    for name, x in zip(("audio_w", "video_w"), w): close(case, name, x[:, None].expand(-1, 10))
    for m, (name, limits) in enumerate(zip(("pseudo_audio", "pseudo_visual"), OFFICIAL.teacher)):
        close(case, name, mixed_teacher(refs[m].probs, (parsing.audio, parsing.visual)[m], loss.targets(batch)[m], *limits).detach())
    terms = loss(parsing, hand_over(batch, refs))
    weights = dict(audio=2, visual=1, video=2, contrast=1, mutual=1, event_audio=.009, event_visual=1, cooccurrence_audio=1e-4, cooccurrence_visual=1e-4)
    assert list(terms) == list(weights)
    plain = {k: (v / weights[k]).detach() for k, v in terms.items()}
    close(case, "loss_bce", [plain[k] for k in ("audio", "visual", "video")])
    close(case, "loss_nce", [plain[k] for k in ("contrast", "event_audio", "event_visual")])
    close(case, "loss_cc", [plain[k] for k in ("cooccurrence_audio", "cooccurrence_visual")])
    close(case, "loss_mutual", plain["mutual"])
    total = sum((terms if started else loss(parsing, batch)).values())
    total.backward()
    close(case, "total_anchor", total.detach())
    for k in ("output", "a_prob", "v_prob"): close(case, f"grad_{k}", leaf[k].grad)
    assert leaf["s_a_prob"].grad is None and leaf["s_v_prob"].grad is None
    for k in ("xx1_before", "xx2_before"):                      # recorded behind the normalisation, here before it
        x, g = torch.tensor(case[k]), torch.tensor(case[f"grad_{k}"])
        tangent = g - (g * x).sum(-1, keepdim=True) * x
        np.testing.assert_allclose(leaf[k].grad, tangent, rtol=1e-3, atol=1e-6)


def test_labels_that_were_struck_out_are_struck_out_everywhere():
    torch.manual_seed(0)
    weak = torch.tensor([[1., 1, 0]])
    batch = Batch(None, None, None, weak, None, {"removed_visual": torch.tensor([[0., 1, 0]])})
    y = CoLeaFLoss(GuidedLoss()).targets(batch)[1]
    assert y[0, 1] == 0 and torch.equal(pseudo_labels(torch.ones(1, 3), y, .6), y)
    assert torch.equal(mixed_teacher(torch.ones(1, 3), torch.full((1, 3), .3), y, .4, .6)[0, 1], torch.tensor(.3))


# ---- training

def clips(n=48, seed=0, T=5, C=3, D=8):
    "Clips in which an event is heard only, seen only, or both"
    rng = np.random.default_rng(seed)
    side = rng.integers(0, 3, (n, 1, C))
    when = rng.random((n, T, C)) < .4
    weak = rng.random((n, 1, C)) < .5
    dense = [(when & weak & (side != m)).astype(np.uint8) for m in (0, 1)]        # 0: seen only, 1: heard only
    code = np.random.default_rng(7).normal(size=(2, C, D))
    x = [(d @ c + .3 * rng.normal(size=(n, T, D))).astype(np.float32) for d, c in zip(dense, code)]
    label = (dense[0] | dense[1]).max(1).astype(np.float32)
    return Clips([f"toy{i:08d}_0_{T}" for i in range(n)], x[0], x[1], x[1], label, *dense, source={"simulated": True, "mark": "toy", "split": "toy"})


def fit(anchor=HAN, base=None, *callbacks, options=OPTIONS, protocol="official", epochs=5, data=None, seed=1, **kw):
    torch.manual_seed(0)
    base = base or (CMPAELoss() if anchor is CMPAE else GuidedLoss())
    model, loss, own = build_coleaf(anchor(**SIZES), base, SIZES, options, protocol, seed)
    first = [StepCB()] if anchor is CMPAE else []
    return Learner(model, data or clips(), loss, lr=5e-3, batch_size=16, epochs=epochs, step=4, seed=seed, device="cpu",
                   callbacks=[*first, *callbacks, *own], **kw).fit()


def references(learner): return next(cb for cb in learner.callbacks if isinstance(cb, CoLeaFCB)).references


def losses(learner): return [(h["loss"], h.get("reference")) for h in learner.history]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("anchor, base", [(HAN, GuidedLoss()), (CMPAE, CMPAELoss()), (JoMoLD, JoMoLDLoss()), (HAN, MALoss())])
def test_every_anchor_learns(anchor, base, protocol):
    learner = fit(anchor, base, protocol=protocol, epochs=6, data=clips(160))
    first, last = learner.history[0]["loss"], learner.history[-1]["loss"]
    assert last["audio"] + last["visual"] < .9 * (first["audio"] + first["visual"])
    assert list(first) == list(last) and all(last[f"cooccurrence_{m}"] > 0 for m in MODALITY)
    assert all(last[f"event_{m}"] != 0 for m in MODALITY)
    refs = [h["reference"] for h in learner.history]
    assert all(0 <= r["share_audio"] <= 1 for r in refs[1:])
    assert all(refs[2][m] < refs[0][m] for m in MODALITY)                    # the same terms in epochs 1 and 3
    assert ("share_audio" in refs[0]) == (protocol == "paper")


def test_references_learn():
    learner = fit(epochs=8, data=clips(200))
    refs, data = references(learner), clips(32, seed=1)
    batch = data.batch(np.arange(32))
    for net in refs:
        with torch.no_grad(): r = net.eval()(*batch.features).probs
        assert r[batch.weak > 0].mean() > r[batch.weak == 0].mean() + .2
        assert net.tokens.abs().max() > 0


def test_the_log_says_what_the_iterations_said():
    class Keep(Callback):
        order = 20
        seen = []
        def before_epoch(self, learner): self.seen = []
        def before_batch(self, learner):
            r = [learner.batch.labels[f"reference_{m}"] for m in MODALITY]
            self.seen.append([s.mean().item() for s in event_shares(*r)])
    keep = Keep()
    learner = fit(HAN, None, keep, protocol="paper", epochs=2)
    log = learner.history[-1]["reference"]
    np.testing.assert_allclose([log["share_audio"], log["share_visual"]], np.mean(keep.seen, 0), rtol=1e-5)


class Spy(nn.Module):
    "An Anchor that writes down who was called, with what"
    def __init__(self, net, calls):
        super().__init__()
        self.net, self.calls = net, calls
    def project(self, *features):
        self.calls.append("project")
        return self.net.project(*features)
    def forward(self, *features, cross_attention=True, mask=None, projected=None):
        self.calls.append(("anchor", cross_attention, torch.is_grad_enabled(), self.training, projected is not None))
        return self.net(*features, cross_attention=cross_attention, mask=mask, projected=projected)


@pytest.mark.parametrize("epoch, selfmo", [(0, True), (1, True), (3, True), (3, False)])
def test_order_of_an_iteration(epoch, selfmo):
    calls = []
    model, loss, own = build_coleaf(Spy(toy_han(), calls), GuidedLoss(), SIZES, dict(selfmo=selfmo))
    learner = Learner(model, clips(8), loss, batch_size=8, device="cpu", callbacks=[*own, DenoiseCB([.5] * 3, [.5] * 3)])
    for m, net in zip(MODALITY, own[0].references):
        net.register_forward_hook(lambda n, i, o, m=m: calls.append((m, torch.is_grad_enabled(), n.training, o.tokens is not None)))
    learner.epoch, learner.i, learner.n_batches = epoch, 0, 1
    learner("before_fit")
    learner("before_epoch")
    for m, opt in zip(MODALITY, own[0].opts):
        opt.register_step_post_hook(lambda *_, m=m: calls.append(f"step {m}"))
    learner.opt.register_step_post_hook(lambda *_: calls.append("step anchor"))
    learner.one_batch(np.arange(8))
    denoise = ["project", ("anchor", False, False, True, True)] if epoch else []
    pseudo = [("anchor", True, False, True, True)] if epoch >= 3 and selfmo else []
    train = [x for m in MODALITY for x in ((m, True, True, m == "audio" or epoch < 3), f"step {m}")]      # CLS where it has a weight
    teach = [(m, False, True, False) for m in MODALITY] if epoch else []
    assert calls == [*denoise, *pseudo, *train, *teach, ("anchor", True, True, True, bool(epoch)), "step anchor"]


def test_the_anchor_is_told_what_the_updated_references_say():
    model, loss, own = build_coleaf(toy_han(), GuidedLoss(), SIZES)
    for net in own[0].references:
        for part in net.modules():
            if isinstance(part, nn.Dropout): part.p = 0.
    learner = Learner(model, clips(8), loss, batch_size=8, device="cpu", callbacks=own)
    learner.epoch, learner.i, learner.n_batches = 1, 0, 1
    learner("before_fit")
    learner("before_epoch")
    before = [net(*learner.train.batch(np.arange(8)).features).probs.detach() for net in own[0].references]
    learner.one_batch(np.arange(8))
    for m, net, old in zip(MODALITY, own[0].references, before):
        now = net(*learner.batch.features)
        torch.testing.assert_close(learner.batch.labels[f"reference_{m}"], now.probs)
        torch.testing.assert_close(learner.batch.labels[f"reference_{m}_features"], now.features)
        assert not torch.allclose(now.probs, old)
        assert not learner.batch.labels[f"reference_{m}_features"].requires_grad


@pytest.mark.parametrize("anchor", [HAN, CMPAE])
def test_the_anchor_starts_as_the_bare_one_and_equals_it_after_an_epoch(anchor):
    def bare(epochs):
        torch.manual_seed(0)
        model, base = anchor(**SIZES), CMPAELoss() if anchor is CMPAE else GuidedLoss()
        return Learner(model, clips(), anchor_base(base), lr=5e-3, batch_size=16, epochs=epochs, step=4, device="cpu", callbacks=[StepCB()]).fit().model
    assert same_weights(fit(anchor, epochs=1).model, bare(1))
    assert not same_weights(fit(anchor, epochs=2).model, bare(2))
    assert same_weights(fit(anchor, options=dict(anchor_loss="none", cocls=False), epochs=3).model, bare(3))      # nothing is taught


def test_random_numbers_of_the_references_are_their_own():
    learner = Learner(toy_han(), clips(8), GuidedLoss(), device="cpu")
    learner.i = 0
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    with own_random(learner): a = torch.rand(4)
    assert torch.equal(torch.rand(4), want)
    with own_random(learner): assert torch.equal(torch.rand(4), a)
    learner.i = 1
    with own_random(learner): assert not torch.equal(torch.rand(4), a)


def test_references_are_a_function_of_the_seed():
    torch.manual_seed(0)
    a = build_references(SIZES)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    b, c = build_references(SIZES), build_references(SIZES, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert same_weights(a[0], b[0]) and same_weights(a[1], b[1]) and not same_weights(a[0], c[0])
    assert build_references(SIZES, tokens=False)[0].tokens is None


@pytest.mark.parametrize("anchor, options, protocol", [(CMPAE, {}, "official"), (HAN, {}, "paper"), (HAN, dict(tokens=False, anchor_loss="bce"), "official")])
def test_resumed_equals_uninterrupted(tmp_path, anchor, options, protocol):
    class StopAt(Callback):
        def after_backward(self, learner):
            if (learner.epoch, learner.i) == (4, 1): raise KeyboardInterrupt
    def run(*cbs): return fit(anchor, None, *cbs, options=options, protocol=protocol, epochs=7)
    file = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt): run(CheckpointCB(file, "x"), StopAt())
    assert CheckpointCB(file, "x").read()["epoch"] == 4
    resumed, straight = run(CheckpointCB(file, "x")), run()
    assert losses(resumed) == losses(straight) and same_weights(resumed.model, straight.model)
    for a, b in zip(references(resumed), references(straight)): assert same_weights(a, b)
    for a, b in zip(resumed.callbacks[-2 if isinstance(resumed.callbacks[-1], CheckpointCB) else -1].opts, straight.callbacks[-1].opts):
        for p, q in zip(a.state.values(), b.state.values()): assert torch.equal(p["exp_avg_sq"], q["exp_avg_sq"])


def test_a_checkpoint_without_references_is_not_taken_for_theirs(tmp_path):
    "Other networks in the file: PyTorch says which tensors differ"
    file = tmp_path / "checkpoint.pt"
    fit(HAN, None, CheckpointCB(file, "x"), epochs=1)
    with pytest.raises(InputError, match=r"checkpoint\.pt: is damaged.*tokens"): fit(HAN, None, CheckpointCB(file, "x"), options=dict(tokens=False), epochs=2)


def test_rates_of_the_references_follow_the_learner():
    class Rates(Callback):
        order, seen = 20, []
        def before_batch(self, learner): self.seen.append([o.param_groups[0]["lr"] for o in learner.callbacks[0].opts] + [learner.opt.param_groups[0]["lr"]])
    rates = Rates()
    fit(HAN, None, rates, epochs=6)
    assert all(a == b == c for a, b, c in rates.seen) and rates.seen[0][0] == 5e-3 and rates.seen[-1][0] == pytest.approx(5e-4)


@pytest.mark.parametrize("options", [dict(anchor_loss=a) for a in ANCHOR_LOSSES[1:]] + [dict(selfmo=False), dict(tokens=False), dict(cocls=False)])
def test_every_switch_does_something(options):
    learner, whole = fit(options=options), fit()
    assert not same_weights(learner.model, whole.model)
    named = {k.split("_")[0] for k in learner.history[0]["loss"]} & {"event", "cooccurrence"}
    assert ("event" in named) == (options.get("anchor_loss") != "none") and ("cooccurrence" in named) == options.get("cocls", True)
    if options.get("selfmo") is False: assert losses(learner)[:3] == losses(whole)[:3]        # pseudo-labels come in epoch 4


def test_constant_weights_are_the_plain_contrast():
    torch.manual_seed(0)
    parsing = toy_han()(*clips(6).batch(np.arange(6)).features)
    outs = [net(*clips(6).batch(np.arange(6)).features) for net in build_references(SIZES)]
    batch = hand_over(clips(6).batch(np.arange(6)), outs)
    nce, cross = (CoLeaFLoss(GuidedLoss(), OFFICIAL, a)(parsing, batch) for a in ("nce", "bce"))
    printed = CoLeaFLoss(GuidedLoss(), PAPER, "nce")(parsing, batch)
    for m, k in enumerate(MODALITY):
        logits = parsing.extra["attended"][m] @ outs[m].features.mT / 4                    # root of 16
        torch.testing.assert_close(printed[f"event_{k}"], nce_paper(logits, torch.ones(6)))
        want = event_contrast(parsing.extra["attended"][m], outs[m].features, torch.ones(6))
        torch.testing.assert_close(nce[f"event_{k}"], OFFICIAL.w_event[m] * want)
        want = OFFICIAL.w_event[m] * bce((parsing.audio, parsing.visual)[m], (outs[m].probs >= .5).float())
        torch.testing.assert_close(cross[f"event_{k}"], want)


def test_padding_has_no_influence_on_training():
    data = replace(clips(), lengths=np.arange(48) % 5 + 1)
    rubbish = {k: np.where(data.mask[..., None] > 0, getattr(data, k), 7.).astype(np.float32) for k in ("audio", "frames", "motion")}
    for protocol in PROTOCOLS:
        a, b = (fit(data=d, protocol=protocol, epochs=5) for d in (data, replace(data, **rubbish)))
        assert losses(a) == losses(b) and same_weights(a.model, b.model)


def test_full_frames_train_like_their_means():
    "HAN and the References are linear in the frames up to their mean"
    data = clips()
    full = replace(data, frames=np.repeat(data.frames, 8, axis=1) + np.tile(np.array([1, -1], dtype=np.float32), 20)[None, :, None])
    a, b = fit(data=data, epochs=4), fit(data=full, epochs=4)
    for x, y in zip(losses(a), losses(b)):
        for p, q in zip(x, y): np.testing.assert_allclose(list(p.values()), list(q.values()), rtol=2e-2, atol=1e-3)


def test_with_validation_and_its_own_rule():
    keep = ValidateCB(clips(16, seed=1), rule=RULE, select="avg10/only")
    learner = fit(CMPAE, None, keep, epochs=4)
    assert keep.best_epoch and RULES[RULE].fuse == .7
    assert all(k in learner.history[-1] for k in ("val", "reference", "loss"))


def test_inference_is_the_anchor_alone():
    learner, bare = fit(CMPAE, epochs=2), CMPAE(**SIZES)
    assert {k: v.shape for k, v in learner.model.state_dict().items()} == {k: v.shape for k, v in bare.state_dict().items()}
    counts = []
    for net in (learner.model, bare):
        with FlopCounterMode(display=False) as counter: predict(net, clips(8))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_a_reference_that_diverges_is_named():
    class Poison(Callback):
        order = 5
        def before_batch(self, learner):
            with torch.no_grad(): references(learner)[1].classify.bias.fill_(math.nan)
    with pytest.raises(NotFiniteError, match="'Reference visual' is nan in epoch 1, batch 1"): fit(HAN, None, Poison(), epochs=1)


def test_bf16():
    learner = fit(CMPAE, epochs=5, precision="bf16")
    whole = fit(CMPAE, epochs=5)
    for a, b in zip(learner.history, whole.history): assert sum(a["loss"].values()) == pytest.approx(sum(b["loss"].values()), rel=.05)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda():
    torch.manual_seed(0)
    model, loss, own = build_coleaf(CMPAE(**SIZES), CMPAELoss(), SIZES)
    learner = Learner(model, clips(), loss, lr=5e-3, batch_size=16, epochs=5, device="cuda", callbacks=[StepCB(), *own]).fit()
    assert next(references(learner)[0].parameters()).is_cuda and learner.history[-1]["reference"]["share_audio"] >= 0
    torch.cuda.manual_seed(3)
    want = torch.rand(4, device="cuda")
    torch.cuda.manual_seed(3)
    with own_random(learner): torch.rand(4, device="cuda")
    assert torch.equal(torch.rand(4, device="cuda"), want)


# ---- settings and refusals

def test_protocols():
    assert PROTOCOLS == tuple(READINGS) == ("official", "paper") and RECIPE["epochs"] == 10 and RECIPE["select"] == "avg10/only"
    assert RECIPE_BY_PROTOCOL["paper"]["epochs"] == PAPER.epochs == 15
    assert [OFFICIAL.weights(e)[0] for e in (0, 2, 3, 50)] == [(1., 1.2, 0.)] * 2 + [(.5, .001, .5)] * 2
    assert OFFICIAL.weights(3, selfmo=False) == ((.5, .001, 0.), (.5, 0., 0.)) and PAPER.weights(14) == ((1.,) * 3,) * 2


@pytest.mark.parametrize("epochs, met", [(1, [0]), (2, [0, 3]), (3, [0, 1, 3]), (4, [0, 1, 2, 3]), (10, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])])
def test_a_short_run_ends_in_the_last_stage(epochs, met):
    "`met`: of which epochs of the whole protocol the epochs of the run are"
    short = OFFICIAL.within(epochs)
    assert [short.weights(e) for e in range(epochs)] == [OFFICIAL.weights(e) for e in met]
    assert PAPER.within(epochs) == PAPER


def test_the_smallest_scale_is_shorter_for_three_networks():
    spec = RunSpec("coleaf", scale="tiny")
    assert {k: spec.recipe()[k] for k in ("epochs", "step", "batch_size")} == {"epochs": 3, "step": 2, "batch_size": 64}
    assert RunSpec("coleaf", scale="tiny", epochs=5).recipe()["epochs"] == 5 and RunSpec("coleaf", scale="small").recipe()["epochs"] == 8
    _, loss, _ = METHODS["coleaf"].build(spec.plain(), network_sizes(simulate(4, seed=0)), None)
    assert loss.protocol.weights(2) == OFFICIAL.weights(3)


def test_weights_of_the_anchors_own_loss():
    mine = anchor_base(CMPAELoss())
    assert (mine.w_audio, mine.w_visual, mine.w_video, mine.w_contrast, mine.w_mutual) == (2, 1, 2, 1, 1)
    printed = anchor_base(CMPAELoss(), "paper")
    assert printed == replace(CMPAELoss(), w_contrast=0.)
    for other in (GuidedLoss(), JoMoLDLoss(), MALoss()): assert anchor_base(other) is other and anchor_base(other, "paper") is other


def spoilt(**extra):
    net = toy_han()
    parsing = net(*clips(4).batch(np.arange(4)).features)
    outs = [r(*clips(4).batch(np.arange(4)).features) for r in build_references({**SIZES, "dim": 8})]
    return CoLeaFLoss(GuidedLoss())(replace(parsing, extra=extra or parsing.extra), hand_over(clips(4).batch(np.arange(4)), outs))


@pytest.mark.parametrize("make, said", [
    (lambda: Reference("video"), "modality: 'video' is not possible"),
    (lambda: reference_keys("av"), "modality: 'av' is not possible"),
    (lambda: check_options({**OPTIONS, "anchor_loss": "evnt"}), "did you mean 'evt'?"),
    (lambda: check_options({**OPTIONS, "cocls": "yes"}), "cocls"),
    (lambda: build_coleaf(HAN(**SIZES), GuidedLoss(), SIZES, protocol="printed"), "protocol: 'printed' is not possible"),
    (lambda: build_coleaf(HAN(**SIZES), GuidedLoss(), SIZES, dict(selfmo=1)), "selfmo"),
    (lambda: CoLeaFLoss(GuidedLoss(), anchor_loss="mse"), "anchor_loss: 'mse' is not possible"),
    (lambda: event_contrast(torch.ones(2, 3, 4), torch.ones(2, 3, 5), torch.ones(2)), "give both networks the same `dim`"),
    (lambda: event_contrast(torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.ones(2), "info"), "nce: 'info' is not possible"),
    (lambda: cooccurrence(torch.ones(2, 3), torch.ones(2, 3), "mean"), "cooccurrence: 'mean' is not possible"),
    (lambda: reference_loss(ReferenceOutput(torch.ones(1, 3), None, None, None), torch.ones(1, 3), None, (1, 1, 0), "ce"), "reference_loss: 'ce' is not possible"),
    (lambda: spoilt(), "give both networks the same `dim`"),
    (lambda: spoilt(projected=None), "the Anchor hands out no features"),
    (lambda: Reference("visual", **SIZES)(torch.ones(1, 5, 8), torch.ones(1, 7, 8), torch.ones(1, 5, 8)), "7 frames for 5 seconds"),
])
def test_refusals(make, said):
    with pytest.raises(InputError) as e: make()
    assert said in str(e.value)


def test_self_attention_is_half_of_the_han_layer():
    torch.manual_seed(0)
    layer, x = SelfAttention(8, 8), torch.randn(2, 3, 8)
    assert layer.qkv.weight.shape == (24, 8) and layer(x).shape == x.shape
    assert layer.qkv.bias.abs().max() == 0 and .9 * (6 / 32) ** .5 < layer.qkv.weight.abs().max() <= (6 / 32) ** .5     # Xavier over all three
