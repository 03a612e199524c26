"""Counted operations against formulas, class tokens, inference that CoLeaF leaves alone, and steps of training."""
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from avvp_nb.core import InputError
from avvp_nb.methods.cmpae import CMPAE, LOSS
from avvp_nb.methods.coleaf import Reference, build_coleaf
from avvp_nb.methods.han import HAN, TEMPORAL
from avvp_nb.methods.jomold import JoMoLD, NoiseEstimator
from avvp_nb.methods.losses import GuidedLoss
from avvp_nb.results.cost import (
    SIZES,
    attention_flops,
    blank,
    blank_clips,
    cost_table,
    counted,
    every_frame,
    flops,
    layer_flops,
    linear_flops,
    network_costs,
    parameters,
    plot_tokens,
    printed_gflops,
    reference_parts,
    step_flops,
    token_conventions,
    token_overhead,
    training_costs,
)
from avvp_nb.train.learner import Learner

TINY = dict(classes=25, **SIZES, dim=64)


@pytest.fixture(scope="module")
def grid(): return token_conventions()


def projections(T, D=512, frames=None):
    "Audio, frames, motion and fusion"
    return linear_flops(T, 128, D) + linear_flops(frames or T, 2048, D) + linear_flops(T, 512, D) + linear_flops(T, 2 * D, D)


# ---- counting

@pytest.mark.parametrize("shape", [(2, 7, 16), (2, 4, 7, 16)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dropout", [0., .1])
@pytest.mark.parametrize("grad", [False, True])
def test_no_form_of_attention_is_missed(shape, masked, dropout, grad):
    q = torch.zeros(shape, requires_grad=grad)
    mask = torch.ones(7, 7, dtype=torch.bool) if masked else None
    n = counted(lambda: F.scaled_dot_product_attention(q, q, q, attn_mask=mask, dropout_p=dropout))[""]
    assert n == int(np.prod(shape[:-2])) * attention_flops(7, 7, 16)


def test_backward_is_counted():
    x, w = torch.zeros(3, 5, requires_grad=True), torch.zeros(5, 4, requires_grad=True)
    assert counted(lambda: (x @ w).sum().backward())[""] == 3 * linear_flops(3, 5, 4)
    q = torch.zeros(1, 6, 8, requires_grad=True)
    assert counted(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward())[""] == 3 * attention_flops(6, 6, 8)


def test_nothing_counts_nothing():
    assert counted(lambda: None)[""] == 0
    assert counted(lambda: torch.zeros(3) + 1).tolist() == [0]


def test_the_kernel_is_restored():
    before = torch.backends.cuda.flash_sdp_enabled()
    counted(lambda: None)
    assert torch.backends.cuda.flash_sdp_enabled() == before
    with sdpa_kernel(SDPBackend.MATH): counted(lambda: None)


# ---- networks

@pytest.mark.parametrize("T", [1, 10, 17])
@pytest.mark.parametrize("C", [3, 25, 100])
def test_han_equals_its_formula(T, C):
    layer = 2 * (10 * linear_flops(T, 512, 512) + 2 * attention_flops(T, T, 512))
    assert flops(HAN(classes=C), seconds=T)[""] == projections(T) + layer + linear_flops(2 * T, 512, 3 * C)


@pytest.mark.parametrize("temporal, layer", [
    ("none", 0), ("gru", 2 * 6 * (linear_flops(10, 512, 256) + linear_flops(10, 256, 256))), ("transformer", 2 * layer_flops(10))])
def test_every_temporal_network_is_counted(temporal, layer):
    assert set(TEMPORAL) == {"han", "none", "gru", "transformer"}
    assert flops(HAN(temporal=temporal))[""] == projections(10) + layer + linear_flops(20, 512, 75)


def test_networks_of_jomold():
    half = 6 * linear_flops(20, 512, 512) + 2 * attention_flops(10, 10, 512)
    assert flops(JoMoLD())[""] == flops(HAN())[""]
    assert flops(NoiseEstimator())[""] == projections(10) + half + linear_flops(20, 512, 75)
    deep = flops(JoMoLD(n_layers=3))
    assert deep["layers.0"] == deep["layers.1"] == deep["layers.2"] and deep[""] == flops(JoMoLD())[""] + 2 * deep["layers.0"]


@pytest.mark.parametrize("frames", ["pooled", "full"])
def test_cmpae_equals_its_formula(frames):
    rows = 10 if frames == "pooled" else 80
    one_map, attend = linear_flops(10, 512, 512), attention_flops(10, 10, 512)
    layer = 2 * (10 * one_map + 2 * one_map + 2 * attend)       # the feed-forward half for both variants
    head = 2 * one_map + linear_flops(20, 512, 75) + linear_flops(20, 512, 25)
    early = 2 * one_map + linear_flops(10, 512, 25)
    n = flops(CMPAE(), frames=frames)[""]
    assert n == projections(10, frames=rows) + layer + head + early


@pytest.mark.parametrize("tokens", [True, False])
@pytest.mark.parametrize("modality", ["audio", "visual"])
def test_references_equal_their_formula(modality, tokens):
    project = linear_flops(10, 128, 512) if modality == "audio" else projections(10) - linear_flops(10, 128, 512)
    n = flops(Reference(modality, tokens=tokens))
    assert n[""] == project + layer_flops(35 if tokens else 10) + 2 * linear_flops(10, 512, 25)
    parts = reference_parts(modality, tokens)
    assert sum(parts.values()) == n[""] and parts["frames"] == (linear_flops(10, 2048, 512) if modality == "visual" else 0)
    assert parts["attention"] == 4 * linear_flops(35 if tokens else 10, 512, 512) + attention_flops(*[35 if tokens else 10] * 2, 512)


def test_cost_grows_with_the_batch_and_not_with_the_mode():
    net = HAN(dim=64)
    assert net.training and flops(net, batch=4)[""] == 4 * flops(net)[""] and net.training
    assert flops(net.eval())[""] == flops(net.train())[""]


@pytest.mark.parametrize("make", [lambda: HAN(dim=64), lambda: CMPAE(dim=64), lambda: Reference("visual", dim=64)])
def test_every_frame(make):
    counts = flops(make())
    assert every_frame(counts) - counts[""] == 7 * linear_flops(10, 2048, 64)
    assert every_frame(counts, 1) == counts[""]
    if isinstance(make(), CMPAE): assert every_frame(counts) == flops(make(), frames="full")[""]


def test_padded_videos_cost_as_much():
    mask = torch.arange(10) < 4
    assert flops(HAN(dim=64), mask=mask[None])[""] == flops(HAN(dim=64))[""]


def test_parameters():
    assert parameters(nn.Linear(3, 4)) == 16
    net = HAN(dim=64)
    net.head.requires_grad_(False)
    assert parameters(net) == parameters(HAN(dim=64))


@pytest.mark.parametrize("frames", ["half", None])
def test_bad_frames_are_refused(frames):
    with pytest.raises(InputError, match="frames"): flops(HAN(dim=64), frames=frames)


def test_blank_features_have_the_shapes_of_llp():
    assert [tuple(x.shape) for x in blank(2, 7, "full")] == [(2, 7, 128), (2, 56, 2048), (2, 7, 512)]
    clips = blank_clips(30, classes=25)
    assert clips.weak.sum() == 30 and not clips.pooled and len(clips) == 30


def test_table_of_networks():
    table = network_costs()
    assert (table["every frame"] >= table["pooled frames"]).all() and len(table) == 8
    one, both = table.loc["CMPAE, CoLeaF's Anchor"], table.loc["CMPAE, both passes of its inference"]
    assert one["pooled frames"] < both["pooled frames"] < 1.1 * one["pooled frames"] and one["parameters"] == both["parameters"]
    tokens = table["parameters"]["Reference, audio, with tokens"] - table["parameters"]["Reference, audio, without tokens"]
    assert tokens * 1e6 == pytest.approx(25 * 512)


# ---- class tokens

def test_printed_claim():
    assert printed_gflops() == (12.7, 18.0, 41.7)


def test_the_increase_needs_neither_batch_nor_convention(grid):
    assert grid["increase, %"].gt(0).all()
    np.testing.assert_allclose(grid["increase, %"], 100 * (grid["with tokens"] / grid["without tokens"] - 1))
    x = grid.loc["visual", "every frame", "counted"]
    assert x["without tokens"] * x["batch for 12.7 G"] == pytest.approx(12.7e3) and x["with tokens"] * x["batch for 18.0 G"] == pytest.approx(18e3)


def test_no_convention_gives_the_printed_increase(grid):
    low, high = 100 * (17.95 / 12.75 - 1), 100 * (18.05 / 12.65 - 1)
    assert not grid["increase, %"].between(low, high).any()
    assert (grid["increase, %"] - 41.7).abs().idxmin() == ("visual", "every frame", "counted")


def test_conventions_by_formula(grid):
    both = sum(every_frame(flops(Reference(m, tokens=False))) for m in ("audio", "visual"))
    assert grid.loc[("both", "every frame", "counted"), "without tokens"] * 1e6 == pytest.approx(both)
    hooks = 2 * linear_flops(35, 512, 512) + 2 * linear_flops(10, 512, 25)
    assert grid.loc[("audio", "none", "passed over"), "with tokens"] * 1e6 == pytest.approx(hooks)
    added = 25 * 12 * 512**2 + 4 * (35**2 - 10**2) * 512
    rows = grid.xs("counted", level="attention").loc["visual"]
    np.testing.assert_allclose(rows["with tokens"] - rows["without tokens"], added / 1e6)


def test_more_classes_more_tokens():
    few, many = (token_conventions(classes=c).loc[("both", "every frame", "counted"), "increase, %"] for c in (25, 100))
    assert many > 3 * few


def test_figure_says_it_in_words():
    assert "by 65 % when every frame is projected, and by 158 % when frames are averaged" in str(vars(plot_tokens()))


# ---- inference and training

@pytest.mark.parametrize("make", [CMPAE, HAN, JoMoLD])
def test_inference_is_the_bare_anchors(make):
    base = LOSS if make is CMPAE else GuidedLoss()
    anchor = make(**TINY)
    inside, *_ = build_coleaf(anchor, base, TINY)
    assert flops(inside, both=True).equals(flops(make(**TINY), both=True)) and parameters(inside) == parameters(make(**TINY))
    assert not any(isinstance(m, Reference) for m in inside.modules())


def test_a_step_of_a_small_network_equals_its_formula():
    "Forward once, backward twice, except that features need no gradient"
    net, clips = HAN(**TINY), blank_clips(3, frames="pooled")
    n = step_flops(Learner(net, clips, GuidedLoss(), epochs=2, device="cpu"), 1)
    first = linear_flops(10, 128, 64) + linear_flops(10, 2048, 64) + linear_flops(10, 512, 64)
    assert n == 3 * flops(net)[""] - first


def test_training_stages():
    table = training_costs(2, dim=64)
    ops, times = table["million operations"], table["times the bare Anchor"]
    assert (times.iloc[0] == 1).all() and (times.iloc[1:] > 1).all(axis=None)
    assert (ops["with tokens"][1:] > ops["without tokens"][1:]).all()
    forward = sum(flops(Reference(m, **TINY, tokens=False))[""] for m in ("audio", "visual")) / 1e6
    first, second = ops["without tokens"]["CoLeaF, epoch 1"], ops["without tokens"]["CoLeaF, epochs 2 and 3"]
    assert second - first >= forward                                            # both References once more, and their loss
    step = sum(step_flops_of_reference(m) for m in ("audio", "visual")) / 1e6
    assert first - ops["without tokens"].iloc[0] == pytest.approx(step)         # step 3 alone


def step_flops_of_reference(modality):
    "Forward once, backward twice, except that features need no gradient"
    first = linear_flops(10, 128, 64) if modality == "audio" else linear_flops(10, 2048, 64) + linear_flops(10, 512, 64)
    return 3 * flops(Reference(modality, **TINY, tokens=False))[""] - first


def test_what_tokens_have_to_cost():
    table = token_overhead(batch=8, classes=5, seconds=3)["million operations"] * 1e6
    n = {t: sum(every_frame(flops(Reference(m, classes=5, tokens=t), seconds=3)) for m in ("audio", "visual")) for t in (False, True)}
    assert table.iloc[0] == pytest.approx(n[False]) and table.iloc[1] == pytest.approx(n[True])
    once = 2 * linear_flops(5, 512, 3 * 512)                                    # of both References
    assert table.iloc[2] == pytest.approx(n[True] - once * 7 / 8)
    assert table.iloc[3] == pytest.approx(n[False] + once / 8 + 2 * attention_flops(3, 5, 512))


def test_another_number_of_classes():
    assert training_costs(2, classes=7, dim=32).notna().all(axis=None)


def test_an_impossible_epoch_is_refused():
    learner = Learner(HAN(**TINY), blank_clips(2), GuidedLoss(), epochs=2, device="cpu")
    for epoch in (-1, 2):
        with pytest.raises(InputError, match="epoch: .* expected 0 to 1"): step_flops(learner, epoch)


def test_the_claim_as_a_table(tmp_path):
    table = cost_table()
    row = table.row("Reference", "printed")
    assert [row.mean["Reference", k] for k in ("without tokens", "with tokens", "increase %")] == [12.7, 18.0, 41.7]
    inference = [table.row(k).mean["inference", "GFLOPs"] for k in ("bare Anchor", "CoLeaF")]
    assert inference[0] == inference[1] == pytest.approx(every_frame(flops(CMPAE())) / 1e9)
    assert "0.411" in table.to_markdown() and table.mark == ""
    assert all(p.exists() for p in table.save(tmp_path / "cost"))
