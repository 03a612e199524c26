"""Guided loss: cross entropy, smoothing and targets against plain Python."""
import math

import micro
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avvp_nb.core import InputError, Parsing
from avvp_nb.data.clips import Batch
from avvp_nb.methods.losses import GuidedLoss, bce, smooth_labels, without_removed

probability = st.floats(-.5, 2.1) | st.sampled_from([0., 1., 1e-9, 1 - 1e-9])


def entropy(p, y):
    "Mean two-sided cross entropy of two lists of numbers, clamped as the official code does"
    p = [min(max(x, 1e-7), 1 - 1e-7) for x in p]
    return sum(-(t * math.log(x) + (1 - t) * math.log(1 - x)) for x, t in zip(p, y)) / len(p)


def batch_of(weak, **labels):
    weak = torch.tensor(weak)
    return Batch(None, None, None, weak, torch.arange(len(weak)), {k: torch.tensor(v) for k, v in labels.items()})


def toy(seed=0, B=4, C=3):
    "A parsing with gradients, and weak labels"
    rng = np.random.default_rng(seed)
    p = [torch.tensor(rng.random((B, C)), dtype=torch.float32, requires_grad=True) for _ in range(3)]
    return Parsing(*p, None), (rng.random((B, C)) < .4).astype(np.float32).tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(probability, st.sampled_from([0., .05, .5, .95, 1.])), min_size=1, max_size=12))
def test_cross_entropy_equals_plain_python(pairs):
    p, y = zip(*pairs)
    p32 = torch.tensor([p], dtype=torch.float32)
    want = entropy([float(np.float32(min(max(x, 1e-7), 1 - 1e-7))) for x in p32[0].tolist()], y)
    assert bce(p32, torch.tensor([y])).item() == pytest.approx(want, rel=2e-4, abs=1e-6)


def test_cross_entropy_of_half_precision_and_of_truth_values():
    p, y = torch.tensor([[.3, .9]]), torch.tensor([[True, False]])
    want = entropy(p.bfloat16().float()[0].tolist(), [1, 0])
    assert bce(p.bfloat16(), y).item() == pytest.approx(want, rel=1e-4) and bce(p.bfloat16(), y).dtype == torch.float32


def test_no_gradient_where_the_clamp_acts():
    p = torch.tensor([[1.3, -.2, .5]], requires_grad=True)
    bce(p, torch.tensor([[1., 0., 1.]])).backward()
    assert p.grad[0, :2].tolist() == [0, 0] and p.grad[0, 2] == pytest.approx(-2 / 3)
    assert p.tolist()[0] == pytest.approx([1.3, -.2, .5])                      # out of place: the model's output is untouched


def test_nan_goes_through():
    assert bce(torch.tensor([[torch.nan, .5]]), torch.ones(1, 2)).isnan()


@settings(max_examples=40, deadline=None)
@given(st.floats(0, .99), st.integers(1, 25), st.sampled_from([0., 1.]))
def test_smoothing(eps, k, y):
    want = y if eps == 0 else (1 - eps) * y + eps / k
    assert smooth_labels(torch.tensor([[y]], dtype=torch.float64), eps, k).item() == pytest.approx(want)


def test_worked_example():
    "spec: P of the pooling example with label 1"
    one = torch.ones(1, 1)
    terms = GuidedLoss()(Parsing(.675 * one, .65 * one, .5 * one, None), batch_of([[1.]]))
    assert {k: round(v.item(), 6) for k, v in terms.items()} == {"audio": .430783, "visual": .693147, "video": .393043}
    assert sum(terms.values()).item() == pytest.approx(1.516973, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), eps=st.tuples(*[st.sampled_from([0., .1, .3])] * 2), w=st.tuples(*[st.sampled_from([0., 1., 2.5])] * 3))
def test_terms_equal_plain_python(seed, eps, w):
    if not any(w): w = (1., 1., 1.)
    parsing, weak = toy(seed)
    flat = [x for row in weak for x in row]
    got = GuidedLoss(*eps, *w)(parsing, batch_of(weak))
    smoothed = {m: [(1 - e) * y + e / 2 for y in flat] for m, e in zip(("audio", "visual"), eps)} | {"video": flat}
    assert list(got) == [k for k, x in zip(("audio", "visual", "video"), w) if x]
    for k, x in got.items():
        weight = dict(zip(("audio", "visual", "video"), w))[k]
        p = getattr(parsing, k).detach().flatten().tolist()
        assert x.item() == pytest.approx(weight * entropy(p, smoothed[k]), rel=1e-4)


def test_each_term_moves_its_own_probabilities_only():
    parsing, weak = toy()
    for k, term in GuidedLoss()(parsing, batch_of(weak)).items():
        grads = torch.autograd.grad(term, list(parsing.arrays().values())[:3], allow_unused=True, retain_graph=True)
        assert [g is not None for g in grads] == [k == name for name in ("video", "audio", "visual")]


def test_labels_of_a_modality_replace_the_weak_ones_in_its_term_only():
    parsing, weak = toy()
    other = (1 - np.array(weak)).astype(np.float32).tolist()
    plain, refined = (GuidedLoss()(parsing, batch_of(weak, **x)) for x in ({}, {"visual": other}))
    assert refined["audio"] == plain["audio"] and refined["video"] == plain["video"]
    want = entropy(parsing.visual.detach().flatten().tolist(), [.9 * y + .05 for row in other for y in row])
    assert refined["visual"].item() == pytest.approx(want, rel=1e-5)


def test_oracle_labels_travel_with_the_batches():
    clips = micro.toy_clips(6)
    audio, visual = clips.modality_labels()
    batch = clips.with_labels(audio=0 * audio, visual=visual).batch([4, 1])
    assert torch.equal(GuidedLoss().targets(batch)[0], torch.zeros(2, 3))
    torch.testing.assert_close(GuidedLoss().targets(batch)[1], .9 * torch.tensor(visual[[4, 1]]) + .05)


def test_removed_labels_are_exactly_zero_after_smoothing():
    weak = [[1., 1., 0.]]
    audio, visual = GuidedLoss().targets(batch_of(weak, removed_visual=[[0., 1., 0.]]))
    assert audio.tolist() == [[1, 1, 0]] and visual[0].tolist() == pytest.approx([.95, 0, .05]) and visual[0, 1] == 0
    audio, visual = GuidedLoss(eps_audio=.1).targets(batch_of(weak, removed_audio=[[True, False, False]]))
    assert audio[0].tolist() == pytest.approx([0, .95, .05]) and visual[0].tolist() == pytest.approx([.95, .95, .05])
    assert without_removed(torch.ones(1, 2)) is not None


def test_bootstrapping_mixes_the_label_with_the_prediction():
    "beta y + (1 - beta) p in the modality terms, without gradient through the target"
    parsing, weak = toy()
    got = GuidedLoss(eps_visual=0, beta=.8)(parsing, batch_of(weak))
    p = parsing.audio.detach().flatten().tolist()
    target = [.8 * y + .2 * x for y, x in zip([y for row in weak for y in row], p)]
    assert got["audio"].item() == pytest.approx(entropy(p, target), rel=1e-5)
    assert got["video"].item() == pytest.approx(GuidedLoss()(parsing, batch_of(weak))["video"].item())
    g = torch.autograd.grad(got["audio"], parsing.audio)[0].flatten()
    want = [-(t / x - (1 - t) / (1 - x)) / len(p) for t, x in zip(target, p)]
    torch.testing.assert_close(g, torch.tensor(want), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kw, message", [
    ({"eps_visual": 1.}, "eps_visual: 1.0 is not possible. expected 0 <= eps < 1"), ({"eps_audio": -.1}, "eps_audio: -0.1"),
    ({"eps_audio": float("nan")}, "eps_audio: nan"), ({"beta": 0.}, "beta: 0.0 is not possible"),
    ({"w_audio": 0, "w_visual": 0, "w_video": 0}, "all weights are 0")])
def test_impossible_settings_are_refused(kw, message):
    with pytest.raises(InputError, match=message): GuidedLoss(**kw)


@pytest.mark.parametrize("kw", [{"w_audio": -1.}, {"w_video": float("nan")}])
def test_impossible_weights_are_refused(kw):
    "A negative weight teaches the opposite, NaN teaches nothing"
    with pytest.raises(InputError, match=next(iter(kw))): GuidedLoss(**kw)


def test_removed_labels_of_another_shape_are_refused():
    with pytest.raises(InputError, match=r"removed labels: has shape \(1, 2\). expected \(1, 3\)"):
        GuidedLoss().targets(batch_of([[1., 1., 0.]], removed_audio=[[1., 0.]]))
