"""Padding must not matter: every network, loss and staged method on videos of different length."""
import math

import numpy as np
import pytest
import torch

from avvp_nb.core import InputError
from avvp_nb.data.clips import Batch, Clips
from avvp_nb.methods.dgm import DGMNet, MSDULoss
from avvp_nb.methods.han import HAN, TEMPORAL
from avvp_nb.methods.jomold import (
    DenoiseCB,
    JoMoLD,
    JoMoLDLoss,
    NoiseEstimator,
    contrastive,
    estimate_ratios,
    mixture_nce,
    noise_ratios,
)
from avvp_nb.methods.losses import GuidedLoss
from avvp_nb.methods.ma import MALoss, contrast
from avvp_nb.methods.ma import contrastive as ma_contrastive
from avvp_nb.methods.ma_refine import refine
from avvp_nb.methods.ma_swap import assembled, draw_partners, looped, swap_test
from avvp_nb.methods.mmil import POOLINGS, mmil_pool
from avvp_nb.train.learner import Learner, predict, predict_both

LENGTHS, C = (9, 4, 6), 5
SIZES = dict(classes=C, audio_dim=6, frame_dim=7, motion_dim=3, dim=16, dropout=0.)
RUBBISH = 1e3   # finite: features are checked where they are read, and padding is written as zeros


def jomold(**kw):
    return JoMoLD(**SIZES, visual_dropout=0., **kw)


NETWORKS = {
    **{f"han {k}": lambda k=k: HAN(**SIZES, temporal=k) for k in TEMPORAL},
    **{f"han {k} pooling": lambda k=k: HAN(**SIZES, pooling=k) for k in POOLINGS},
    "han paper": lambda: HAN(**SIZES, protocol="paper"),
    "han, a layer each": lambda: HAN(**SIZES, share_layer=False),
    "han, larger modality": lambda: HAN(**SIZES, video="larger"),
    "jomold": jomold,
    "jomold, two layers": lambda: jomold(n_layers=2),
    "noise estimator": lambda: NoiseEstimator(**SIZES, visual_dropout=0.),
    "dgm on han": lambda: DGMNet(HAN(**SIZES)),
    "dgm on jomold": lambda: DGMNet(jomold()),
    "dgm, split": lambda: DGMNet(HAN(**SIZES), msdu=False, shared="split"),
}
LOSSES = {"guided": GuidedLoss(), "jomold": JoMoLDLoss(), "jomold, before attention": JoMoLDLoss(features="ma"), "ma": MALoss(),
          "ma, paper": MALoss(protocol="paper"), "msdu": MSDULoss(JoMoLDLoss())}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def videos(per_second=1, seed=0):
    "Features of three videos, each on its own, and their weak labels"
    g = torch.Generator().manual_seed(seed)
    x = [tuple(torch.randn(1, t*k, d, generator=g) for d, k in ((6, 1), (7, per_second), (3, 1))) for t in LENGTHS]
    return x, (torch.rand(3, C, generator=g) > .5).float()


def padded(x, T=max(LENGTHS), fill=0.):
    "The features of several videos in one batch, and the mask"
    out, t = [], [f[0].shape[1] for f in x]
    for j in range(3):
        k = x[0][j].shape[1]//t[0]
        out.append(torch.cat([torch.nn.functional.pad(f[j], (0, 0, 0, (T - n)*k), value=fill) for f, n in zip(x, t)]))
    return out, torch.arange(T) < torch.tensor(t)[:, None]


def close(a, b, tol=1e-6):
    torch.testing.assert_close(a, b, atol=tol, rtol=tol)


def gradients(model):
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def step(model, loss, features, weak, mask=None):
    "(terms, gradients) of one batch"
    model.zero_grad()
    kw = {} if mask is None else {"mask": mask}
    terms = loss(model(*features, **kw), Batch(*features, weak, None, {}, mask))
    sum(terms.values()).backward()
    return {k: v.detach() for k, v in terms.items()}, gradients(model)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("fill", [0., RUBBISH])
def test_outputs_do_not_see_the_padding(name, fill):
    model = NETWORKS[name]()
    x, _ = videos()
    features, mask = padded(x, T=11, fill=fill)
    for training in (True, False):
        model.train(training)
        p = model(*features, mask=mask)
        for i, (f, t) in enumerate(zip(x, LENGTHS)):
            q = model(*f)
            for k in ("video", "audio", "visual"): close(getattr(p, k)[i:i + 1], getattr(q, k))
            close(p.segments[i:i + 1, :t], q.segments)
            for a, b in zip(p.extra["attended"], q.extra["attended"]): close(a[i:i + 1, :t], b, 1e-5)
            for a, b in zip(p.extra.get("measured", ()), q.extra.get("measured", ())): close(a[i:i + 1], b)


@pytest.mark.parametrize("name", ["han han", "jomold, two layers", "noise estimator", "dgm on jomold"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("fill", [0., RUBBISH])
def test_terms_and_gradients_do_not_see_the_padding(name, loss, fill):
    model, (x, weak) = NETWORKS[name](), videos()
    features, mask = padded(x[1:2], T=9, fill=fill)
    terms, grads = step(model, LOSSES[loss], features, weak[1:2], mask)
    alone, alone_grads = step(model, LOSSES[loss], x[1], weak[1:2])
    assert set(terms) == set(alone) and set(grads) == set(alone_grads)
    for k in alone: close(terms[k], alone[k])
    for k in alone_grads: close(grads[k], alone_grads[k], 1e-5)
    assert all(g.isfinite().all() for g in grads.values())


@pytest.mark.parametrize("name", ["han han", "han gru", "jomold", "dgm on han"])
@pytest.mark.parametrize("loss", LOSSES)
def test_batch_of_different_lengths_is_the_mean_of_its_videos(name, loss):
    "Video-level terms are means over videos, the contrast is a mean over the seconds that exist"
    model, (x, weak) = NETWORKS[name](), videos()
    features, mask = padded(x, fill=RUBBISH)
    terms, grads = step(model, LOSSES[loss], features, weak, mask)
    model.zero_grad()
    want = {}
    for f, y, t in zip(x, weak, LENGTHS):
        for k, v in LOSSES[loss](model(*f), Batch(*f, y[None], None, {})).items():
            want[k] = want.get(k, 0) + v*(t/sum(LENGTHS) if k == "contrast" else 1/len(x))
    sum(want.values()).backward()
    for k in want: close(terms[k], want[k].detach(), 2e-6)
    for k, g in gradients(model).items(): close(grads[k], g, 1e-5)


def test_full_frames_with_a_mask():
    model = HAN(**SIZES).eval()
    x, _ = videos(per_second=8)
    features, mask = padded(x, fill=RUBBISH)
    p = model(*features, mask=mask)
    for i, f in enumerate(x): close(p.visual[i:i + 1], model(*f).visual)


def test_both_passes_with_a_mask():
    model = jomold().eval()
    x, _ = videos()
    features, mask = padded(x, fill=RUBBISH)
    for p, cross in zip(model.both_passes(*features, mask=mask), (True, False)):
        for i, f in enumerate(x): close(p.audio[i:i + 1], model(*f, cross_attention=cross).audio)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_ignores_padding_in_values_and_gradients(pooling):
    g = torch.Generator().manual_seed(1)
    probs, temporal, modality = (torch.rand(2, 7, 2, C, generator=g, requires_grad=True) for _ in range(3))
    mask = torch.arange(7) < torch.tensor([[7], [3]])
    out = mmil_pool(probs, temporal, modality, pooling, mask)
    for a, b in zip(out, mmil_pool(probs[1:, :3], temporal[1:, :3], modality[1:, :3], pooling)): close(a[1:], b)
    sum(x.sum() for x in out).backward()
    for x in (probs, temporal, modality):
        if x.grad is None: continue
        assert x.grad.isfinite().all() and not x.grad[1, 3:].any()
    one = mmil_pool(probs, temporal, modality, pooling, torch.arange(7) < torch.ones(2, 1))    # videos of one second
    close(one[1], probs[:, 0, 0]); assert all(x.isfinite().all() for x in one)


# ---- contrastive terms ---------------------------------------------------------------------------------------

TERMS = {"jomold": lambda x, m=None: mixture_nce(x, .1, m), "jomold, no smoothing": lambda x, m=None: mixture_nce(x, 0., m),
         "ma": lambda x, m=None: contrast(x, .1, m), "ma, paper": lambda x, m=None: contrast(x, 0., m)}


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("T,own", [(6, 6), (6, 3), (9, 2)])
def test_contrast_of_padded_logits(term, T, own):
    x = torch.randn(1, T, T, dtype=torch.float64)
    x[:, own:], x[:, :, own:] = math.nan, math.inf
    x.requires_grad_()
    mask = (torch.arange(T) < own)[None]
    y = x.detach()[:, :own, :own].clone().requires_grad_()
    got, want = term(x.nan_to_num(0., 1e30), mask), term(y)
    close(got, want, 1e-7)
    got.backward(); want.backward()
    close(x.grad[:, :own, :own], y.grad, 1e-7)
    assert not x.grad[:, own:].any() and not x.grad[:, :, own:].any()


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
def test_contrast_without_mask_equals_a_full_mask(term):
    x = torch.randn(3, 8, 8, dtype=torch.float64)
    close(term(x, torch.ones(3, 8, dtype=bool)), term(x), 1e-7)


def test_contrast_of_one_second():
    mask = torch.tensor([[True, False, False]])
    x = torch.randn(1, 3, 3, requires_grad=True)
    assert mixture_nce(x, .1, mask).item() == pytest.approx(-math.log(.9)) and contrast(x, .1, mask).item() == 0
    (mixture_nce(x, .1, mask) + contrast(x, .1, mask)).backward()
    assert x.grad.isfinite().all()
    with pytest.raises(InputError, match="one second has nothing to be contrasted with"): contrast(torch.zeros(1, 1, 1))


def test_feature_contrasts_take_the_mask():
    a, v = torch.randn(2, 2, 7, 4)
    mask = torch.arange(7) < torch.tensor([[7], [3]])
    for f in (contrastive, ma_contrastive):
        close(f(a, v, mask=mask), (7*f(a[:1], v[:1]) + 3*f(a[1:, :3], v[1:, :3]))/10)


# ---- clips of different length -------------------------------------------------------------------------------

def clips_of(n=24, seed=0, top=9):
    g = np.random.default_rng(seed)
    lengths = g.integers(3, top + 1, n); lengths[0] = top
    exists = (np.arange(top) < lengths[:, None])[..., None]
    a, f, m = (g.standard_normal((n, top, d)).astype(np.float32)*exists for d in (6, 7, 3))
    weak = np.eye(C, dtype=np.float32)[g.integers(0, C, n)]
    dense = (weak[:, None]*exists).astype(np.uint8)
    return Clips([f"v{i}" for i in range(n)], a, f, m, weak, dense, dense, lengths=lengths, classes=tuple("abcde"),
                 source={"simulated": True, "mark": "toy"})


def one_by_one(model, clips, **kw):
    return [model(*(torch.tensor(getattr(clips, k)[i:i + 1, :t]) for k in ("audio", "frames", "motion")), **kw) for i, t in enumerate(clips.lengths)]


def test_predictions_of_clips():
    clips, model = clips_of(), jomold().eval()
    p, (q, without) = predict(model, clips, batch_size=7), predict_both(model, clips, batch_size=24)
    for i, alone in enumerate(one_by_one(model, clips)):
        for x in (p, q):
            np.testing.assert_allclose(x.audio[i], alone.audio[0].detach(), atol=1e-6)
            np.testing.assert_allclose(x.segments[i, :clips.lengths[i]], alone.segments[0].detach(), atol=1e-6)
        assert not p.segments[i, clips.lengths[i]:].any()
    for i, alone in enumerate(one_by_one(model, clips, cross_attention=False)): np.testing.assert_allclose(without.visual[i], alone.visual[0].detach(), atol=1e-6)


def test_noise_estimator_and_denoising():
    clips = clips_of()
    model = NoiseEstimator(**SIZES)
    ratios = estimate_ratios(model, clips)
    alone = one_by_one(model.eval(), clips)
    want = noise_ratios(torch.cat([p.audio for p in alone]), torch.cat([p.visual for p in alone]), clips.weak)
    for a, b in zip(ratios, want): np.testing.assert_allclose(a, b, atol=1e-9)
    learner = Learner(jomold(), clips, JoMoLDLoss(), lr=1e-3, batch_size=8, epochs=2, device="cpu",
                      callbacks=[DenoiseCB(np.full(C, .5), np.full(C, .5), warmup=None)]).fit()
    assert all(np.isfinite(v) for h in learner.history for v in h["loss"].values())
    assert learner.history[0]["denoise"]["removed_audio"] > 0


def test_denoising_losses_are_those_of_the_single_videos():
    clips, model = clips_of(), jomold()
    learner = Learner(model, clips, JoMoLDLoss(), batch_size=24, device="cpu")
    learner.batch, learner.projected = clips.batch(slice(None)), None
    got = DenoiseCB(np.zeros(C), np.zeros(C), denoise_eval_mode=True).losses(learner)
    from avvp_nb.methods.losses import bce_each
    targets = learner.loss.targets(learner.batch)
    model.eval()
    for i, p in enumerate(one_by_one(model, clips, cross_attention=False)):
        for g, x, y in zip(got, (p.audio, p.visual), targets): close(g[i], bce_each(x, y[i:i + 1])[0].detach(), 1e-5)


def test_looped_tracks():
    x = torch.arange(24.).reshape(2, 6, 2)                              # 3 seconds of 2 rows
    y = looped(x, torch.tensor([3, 1]), 3, 7)
    assert y.shape == (2, 14, 2)
    assert torch.equal(y[0].reshape(7, 2, 2), x[0].reshape(3, 2, 2)[[0, 1, 2, 0, 1, 2, 0]])
    assert torch.equal(y[1].reshape(7, 2, 2), x[1].reshape(3, 2, 2)[[0]*7])


@pytest.mark.parametrize("batch_size", [1, 5, 256])
def test_assembled_videos_are_as_long_as_their_longer_track(batch_size):
    clips, model = clips_of(), HAN(**SIZES).eval()
    i, j = np.arange(24), np.roll(np.arange(24), 5)
    got = assembled(model, clips, j, i, batch_size)
    for k in range(24):
        own, other = clips.lengths[k], clips.lengths[j[k]]
        T = max(own, other)
        a = torch.tensor(clips.audio[j[k], np.arange(T) % other])[None]
        f, m = (torch.tensor(getattr(clips, x)[k, np.arange(T) % own])[None] for x in ("frames", "motion"))
        p = model(a, f, m)
        np.testing.assert_allclose(got[k], torch.cat([p.audio, p.visual]).detach(), atol=1e-6)


def test_refinement_of_clips_with_lengths():
    clips, model = clips_of(40), HAN(**SIZES)
    r = refine(model, clips)
    p = predict(model, clips)
    np.testing.assert_allclose(r.swap.a, p.audio, atol=1e-6); np.testing.assert_allclose(r.swap.v, p.visual, atol=1e-6)
    assert (r.removed_audio <= r.weak).all() and len(r.apply(clips)) == 40 and r.apply(clips).lengths is clips.lengths
    learner = Learner(HAN(**SIZES), r.apply(clips), MALoss(), lr=1e-3, batch_size=16, epochs=1, device="cpu").fit()
    assert np.isfinite(learner.history[0]["loss"]["contrast"])


def test_symmetric_partners_ask_each_pair_once():
    clips, model = clips_of(40), HAN(**SIZES)
    mates = draw_partners(clips.weak, symmetric=True)
    swap, i = swap_test(model, clips, mates), np.arange(40)
    both = mates[mates[:, 0], 0] == i
    assert both.any()
    np.testing.assert_array_equal(swap.v_a[both], swap.v_v[mates[both, 0]])


def test_tracks_are_reused_only_for_equally_long_videos():
    clips, model = clips_of(12, top=6), HAN(**SIZES)
    partners = draw_partners(clips.weak)
    for x, y in zip(swap_test(model, clips, partners), swap_test(model, clips, partners, reuse=False)): np.testing.assert_array_equal(x, y)
    same = Clips(clips.ids, clips.audio, clips.frames, clips.motion, clips.weak)
    for x, y in zip(swap_test(model, same, partners), swap_test(model, same, partners, reuse=False)): np.testing.assert_allclose(x, y, atol=1e-6)
