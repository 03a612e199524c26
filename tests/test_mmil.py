"""MMIL pooling against plain loops in double precision, and the head that computes it."""
import math

import micro  # noqa: F401  (sets one torch thread)
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from avvp_nb.core import InputError
from avvp_nb.methods.mmil import POOLINGS, MMILHead, attentive_pool, max_pool, mean_pool, mmil_pool, tied_call


def softmax(x):
    "Of a list of numbers"
    e = [math.exp(v - max(x)) for v in x]
    return [v / sum(e) for v in e]


def loops(P, tp, av, T, pooling):
    "Video, audio, visual of one video and class: P, tp, av are lists of T pairs (audio, visual); only the first T count"
    modality = []
    for m in (0, 1):
        p = [P[t][m] for t in range(T)]
        if pooling == "max": modality.append(max(p))
        elif pooling == "mean": modality.append(sum(p) / T)
        else: modality.append(sum(w * x for w, x in zip(softmax([tp[t][m] for t in range(T)]), p)))
    if pooling == "max": return max(modality), *modality
    if pooling == "mean": return sum(modality) / 2, *modality
    weights = [softmax([tp[t][m] for t in range(T)]) for m in (0, 1)]
    video = sum(weights[m][t] * softmax(list(av[t]))[m] * P[t][m] for t in range(T) for m in (0, 1))
    return video, *modality


def inputs(B=3, T=6, C=4, seed=0, scale=2.):
    g = torch.Generator().manual_seed(seed)
    p = torch.rand(B, T, 2, C, generator=g, dtype=torch.float64)
    return (p, *(scale * torch.randn(B, T, 2, C, generator=g, dtype=torch.float64) for _ in range(2)))


@settings(max_examples=40, deadline=None)
@given(B=st.integers(1, 3), T=st.integers(1, 12), C=st.integers(1, 4), seed=st.integers(0, 999), scale=st.sampled_from([0., 1., 30.]),
       pooling=st.sampled_from(POOLINGS), data=st.data())
def test_pooling_equals_the_loops(B, T, C, seed, scale, pooling, data):
    P, tp, av = inputs(B, T, C, seed, scale)
    lengths = data.draw(st.lists(st.integers(1, T), min_size=B, max_size=B))
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    got = mmil_pool(P, tp, av, pooling, None if lengths == [T] * B else mask)
    for b in range(B):
        for c in range(C):
            want = loops(*(x[b, :, :, c].tolist() for x in (P, tp, av)), lengths[b], pooling)
            np.testing.assert_allclose([x[b, c].item() for x in got], want, rtol=1e-12, atol=1e-14)


def test_worked_example():
    "spec: audio (.8,.2) attended (.75,.25), visual (.4,.6) attended (.5,.5), modality weight of audio (.75,.5)"
    ln3 = math.log(3)
    P, tp, av = (torch.tensor(x)[None, :, :, None] for x in ([[.8, .4], [.2, .6]], [[ln3, 0.], [0., 0.]], [[ln3, 0.], [0., 0.]]))
    assert [round(x.item(), 6) for x in attentive_pool(P, tp, av)] == [.675, .65, .5]
    assert attentive_pool(torch.ones_like(P), tp, av)[0].item() == pytest.approx(1.0625)


def test_the_video_probability_reaches_two():
    tp, av = torch.zeros(1, 2, 2, 1), torch.zeros(1, 2, 2, 1)
    for t in (0, 1): tp[0, t, t], av[0, t, t] = 60., 60.
    assert [x.item() for x in attentive_pool(torch.ones(1, 2, 2, 1), tp, av)] == pytest.approx([2, 1, 1])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), T=st.integers(1, 10), scale=st.sampled_from([0., 1., 20.]))
def test_modality_probabilities_are_averages(seed, T, scale):
    P, tp, av = inputs(2, T, 3, seed, scale)
    video, audio, visual = attentive_pool(P, tp, av)
    for m, x in enumerate((audio, visual)):
        assert (P[:, :, m].amin(1) - 1e-12 <= x).all() and (x <= P[:, :, m].amax(1) + 1e-12).all()
    assert (video >= 0).all() and (video <= audio + visual + 1e-12).all()


def test_order_of_seconds_and_names_of_modalities_do_not_matter():
    P, tp, av = inputs()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    for pooling in POOLINGS:
        video, audio, visual = mmil_pool(P, tp, av, pooling)
        for x, y in zip(mmil_pool(P[:, order], tp[:, order], av[:, order], pooling), (video, audio, visual)): torch.testing.assert_close(x, y)
        for x, y in zip(mmil_pool(P.flip(2), tp.flip(2), av.flip(2), pooling), (video, visual, audio)): torch.testing.assert_close(x, y)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("filler", [0., 1., 1e4, -1e4])
def test_padding_changes_nothing_whatever_it_contains(pooling, filler):
    P, tp, av = inputs()
    longer = [torch.cat([x, torch.full((3, 5, 2, 4), filler, dtype=x.dtype)], 1) for x in (P, tp, av)]
    mask = (torch.arange(11) < 6).expand(3, 11)
    for x, y in zip(mmil_pool(*longer, pooling, mask), mmil_pool(P, tp, av, pooling)): torch.testing.assert_close(x, y)


def test_gradients_of_attentive_pooling():
    P, tp, av = (x.requires_grad_() for x in inputs(2, 3, 2))
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert torch.autograd.gradcheck(lambda *x: attentive_pool(*x), (P, tp, av))
    assert torch.autograd.gradcheck(lambda *x: attentive_pool(*x, mask), (P, tp, av))


def test_max_pooling_learns_from_one_second_and_mean_from_all():
    P = inputs()[0].requires_grad_()
    max_pool(P)[1].sum().backward()
    assert ((P.grad != 0).sum((1, 2)) == 1).all()
    P.grad = None
    mean_pool(P)[1].sum().backward()
    torch.testing.assert_close(P.grad[:, :, 0], torch.full((3, 6, 4), 1 / 6, dtype=torch.float64))


@pytest.mark.parametrize("f", [lambda: mmil_pool(*inputs(), "sum"), lambda: MMILHead(8, 3, pooling="sum")])
def test_an_unknown_pooling_is_refused(f):
    with pytest.raises(InputError, match="pooling: 'sum' is not possible. expected one of 'attentive', 'max', 'mean'"): f()


# --- the head --------------------------------------------------------------------------------------------------------

def head_by_hand(xa, xv, maps, pooling):
    "The head with each of its affine maps on its own, one video at a time, in double precision"
    C = maps[0].out_features // 3
    W = [m.weight.detach().double() for m in maps]
    b = [m.bias.detach().double() for m in maps]
    x = torch.stack([xa, xv], 2).double()                                     # (B,T,2,D)
    def pick(logits, c): return [[at[m][c].item() for m in (0, 1)] for at in logits]
    out = []
    for video in x:
        logits = [[[W[m % len(W)][k] @ video[t, m] + b[m % len(b)][k] for k in range(3 * C)] for m in (0, 1)] for t in range(len(video))]
        P = [[[1 / (1 + math.exp(-logits[t][m][c])) for m in (0, 1)] for t in range(len(video))] for c in range(C)]
        out.append([loops(P[c], pick(logits, C + c), pick(logits, 2 * C + c), len(video), pooling) for c in range(C)])
    return torch.tensor(out, dtype=torch.float64)                              # (B,C,3)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_head_is_its_three_maps(shared, pooling):
    torch.manual_seed(1)
    head = MMILHead(5, 2, pooling=pooling, shared=shared)
    for p in head.parameters(): p.data.mul_(3)
    xa, xv = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    out, want = head(xa, xv), head_by_hand(xa, xv, head.maps, pooling)
    torch.testing.assert_close(torch.stack([out.video, out.audio, out.visual], -1).double(), want, rtol=1e-5, atol=1e-6)
    assert out.segments.shape == (2, 4, 2, 2)
    first = torch.sigmoid(xv[1, 3] @ head.maps[-1].weight[1] + head.maps[-1].bias[1])
    torch.testing.assert_close(out.segments[1, 3, 1, 1], first)


def test_number_of_parameters_and_initialisation():
    one, two = (sum(p.numel() for p in MMILHead(512, 25, shared=s).parameters()) for s in (True, False))
    assert one == 38_475 and two - one == 38_475
    bound = 1 / math.sqrt(512)                                                 # Kaiming uniform with a = sqrt(5)
    assert .98 * bound < MMILHead(512, 25).maps[0].weight.abs().max() <= bound


def test_two_of_three_biases_have_no_effect_when_shared():
    torch.manual_seed(0)
    xa, xv = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    for shared in (True, False):
        head = MMILHead(8, 3, shared=shared).double()
        before = head(xa.double(), xv.double())
        for m in head.maps: m.bias.data[3:] += 2.
        after = head(xa.double(), xv.double())
        torch.testing.assert_close(before.video, after.video, rtol=1e-5, atol=1e-6)
        head.maps[0].bias.data[6:] += 1.                                       # only audio's modality bias where there are two
        assert torch.allclose(head(xa.double(), xv.double()).video, after.video, rtol=1e-5, atol=1e-6) is shared


def test_the_larger_modality_as_video_probability():
    torch.manual_seed(0)
    head, x = MMILHead(8, 3, video="larger"), torch.randn(2, 4, 6, 8)
    out = head(*x)
    assert torch.equal(out.video, torch.maximum(out.audio, out.visual))
    with pytest.raises(InputError, match="video: 'largest' is not possible"): MMILHead(8, 3, video="largest")


def test_tied_weights_are_used_through_their_function():
    lin, x = nn.Linear(3, 2), torch.randn(4, 3)
    torch.testing.assert_close(tied_call(lin, None, 0, x), lin(x))
    for m in (0, 1): torch.testing.assert_close(tied_call(lin, lambda p, m: p * (m + 2), m, x), (m + 2) * lin(x))
    head = MMILHead(8, 3)
    xa, xv = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    plain = head(xa, xv)
    head.tie = lambda p, m: p * 1
    torch.testing.assert_close(head(xa, xv).video, plain.video)
    head.tie = lambda p, m: p * (1 - m)                                         # picture's use of the weights is switched off
    assert (head(xa, xv).visual == .5).all() and torch.allclose(head(xa, xv).audio, plain.audio)
