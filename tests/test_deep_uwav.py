"""DEEP and UWAV: reconstructions, so held against their formulas, PyTorch's own functions, hand examples and each other."""
import math
from dataclasses import replace

import micro
import numpy as np
import pytest
import torch
from torch.distributions import Beta
from torch.nn import functional as F

import avvp_nb.methods.deep as D
import avvp_nb.methods.uwav as U
from avvp_nb.core import InputError
from avvp_nb.data.clips import Batch
from avvp_nb.data.pseudo import PseudoParams, label_clips, simulate_pseudo_labels, write_pseudo_layout
from avvp_nb.data.simulate import simulate
from avvp_nb.data.sources import DataSpec
from avvp_nb.methods.jomold import DenoiseCB
from avvp_nb.methods.losses import DenseLoss, GuidedLoss
from avvp_nb.methods.method import METHODS
from avvp_nb.metrics import RULES
from avvp_nb.records.spec import RunSpec
from avvp_nb.records.store import Store
from avvp_nb.runs import single
from avvp_nb.train.callbacks import CheckpointCB, ScoreCB, ValidateCB
from avvp_nb.train.lanes import Lane, why_not
from avvp_nb.train.learner import Callback, Learner, predict, predict_both
from avvp_nb.train.stack import StackedLearner

TRAIN, VALID = micro.toy_clips(48), micro.toy_clips(20, seed=1)
FIT = dict(lr=5e-3, batch_size=16, epochs=3, step=2, device="cpu")


def deep(seed=0, **kw):
    torch.manual_seed(seed)
    return D.DEEP(**{**micro.SIZES, **kw})


def features(n=3, T=6, per=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, k*T, 8, generator=g) for k in (1, per, 1))


# ---- DEEP: evidence -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("e, p, u", [((3., 1.), 1/2, 1/3), ((1., 1.), 1/4, 1/2), ((0., 0.), 0, 1), ((8., 0.), .8, .2), ((0., 8.), 0, .2)])
def test_opinion_by_hand(e, p, u):
    found = D.opinion(torch.tensor(e, dtype=torch.float64).clamp(min=1e-4).log())
    assert [k.item() for k in found] == pytest.approx([p, u], abs=2e-4)


def test_opinion_adds_up_and_never_overflows():
    z = 40*torch.randn(500, 2)
    p, u = D.opinion(z)
    against = D.opinion(z.flip(-1))[0]
    torch.testing.assert_close(p + against + u, torch.ones(500))
    assert ((p >= 0) & (p < 1) & (u > 0)).all()
    half = D.opinion(z.bfloat16())[0]
    assert half.dtype == torch.float32 and half.isfinite().all()


def test_the_loss_is_the_likelihood_under_the_beta_distribution():
    "Mean of Bernoulli likelihoods over samples of the Beta with the same parameters"
    z = torch.tensor([[.7, -.4]], dtype=torch.float64)
    a, b = (z.exp() + 1)[0]
    torch.manual_seed(0)
    q = Beta(a, b).sample((400_000,))
    for y, like in ((1., q), (0., 1 - q)):
        assert D.evidential(z, torch.tensor([y])).item() == pytest.approx(-like.mean().log().item(), abs=3e-3)


@pytest.mark.parametrize("y, want", [(1., math.log(1.5)), (0., math.log(3)), (.95, .95*math.log(1.5) + .05*math.log(3))])
def test_evidential_by_hand(y, want):
    assert D.evidential(torch.tensor([[3., 1.]]).log(), torch.tensor([y])).item() == pytest.approx(want, abs=1e-6)


def test_evidential_gradient():
    z = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    y = torch.rand(4, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: D.evidential(x, y), z)


# ---- DEEP: network --------------------------------------------------------------------------------------------------

def by_hand(net, audio, frames, motion):
    "The network once more, video by video, with loops over modalities and classes"
    f, h, j = net.features, net.heads, net.joint
    e = F.elu(audio@f.audio.weight.T + f.audio.bias), None
    parts = torch.cat([frames@f.frames.weight.T + f.frames.bias, motion@f.motion.weight.T + f.motion.bias], -1)
    e = e[0], F.elu(parts@f.fusion.weight.T + f.fusion.bias)
    inter = [net.layer(e[m], e[1 - m]) for m in (0, 1)]
    intra = [net.layer(e[m], e[1 - m], False) for m in (0, 1)]
    mixed = [.8*intra[m] + .2*inter[m] for m in (0, 1)]
    fore = [h.presence[m](inter[m]) for m in (0, 1)]
    back = [h.absence[m](intra[1 - m]) for m in (0, 1)]
    C = h.classes
    scores = [mixed[m]@h.weigh.weight.T + h.weigh.bias for m in (0, 1)]
    time = [s[..., :C].softmax(1) for s in scores]
    modality = torch.stack([s[..., C:] for s in scores]).softmax(0)
    def p(f, b): return f.exp()/(f.exp() + b.exp() + 2)
    pooled = [[(time[m]*z[m]).sum(1) for z in (fore, back)] for m in (0, 1)]
    video = [sum((time[m]*modality[m]*z[m]).sum(1) for m in (0, 1)) for z in (fore, back)]
    s = (e[0] + e[1])@j.maps.weight.T + j.maps.bias
    joint = [(s[..., 2*C:].softmax(1)*s[..., k*C:(k + 1)*C]).sum(1) for k in (0, 1)]
    return p(*video), p(*pooled[0]), p(*pooled[1]), torch.stack([p(fore[m], back[m]) for m in (0, 1)], 2), p(*joint)


def test_network_by_hand():
    net, x = deep().eval(), features()
    with torch.no_grad():
        out, want = net(*x), by_hand(net, *x)
        joint = D.opinion(out.extra["logits"]["joint"])[0]
    for a, b in zip((out.video, out.audio, out.visual, out.segments, joint), want): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [(6, 4, 1), (2, 6, 5)])
def test_padding_changes_nothing(lengths):
    net, x = deep().eval(), features(per=8)
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        out = net(*x, mask=mask)
        for i, n in enumerate(lengths):
            alone = net(x[0][i:i + 1, :n], x[1][i:i + 1, :8*n], x[2][i:i + 1, :n])
            torch.testing.assert_close(out.segments[i:i + 1, :n], alone.segments, rtol=1e-4, atol=1e-5)
            for k in ("video", "audio", "visual"): torch.testing.assert_close(getattr(out, k)[i:i + 1], getattr(alone, k), rtol=1e-4, atol=1e-5)


def test_pooled_and_full_frames_are_the_same():
    net, x = deep().eval(), features(per=8)
    with torch.no_grad(): a, b = net(*x), net(x[0], x[1].unflatten(1, (6, 8)).mean(2), x[2])
    torch.testing.assert_close(a.segments, b.segments, rtol=1e-4, atol=1e-5)


def test_without_cross_attention_absence_comes_from_the_other_modality_alone():
    net, x = deep().eval(), features()
    with torch.no_grad():
        a, b = net(*x, cross_attention=False), net(x[0], 3*x[1], x[2], cross_attention=False)
        z = [net.heads.logits(*[net.look(net.project(*y), False)]*2) for y in (x, (x[0], 3*x[1], x[2]))]
    assert not torch.equal(a.segments[:, :, 0], b.segments[:, :, 0])                       # through the absence of sound
    torch.testing.assert_close(z[0][:, :, 0, :, 0], z[1][:, :, 0, :, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(z[0][:, :, 1, :, 1], z[1][:, :, 1, :, 1], rtol=1e-4, atol=1e-5)
    with torch.no_grad(): torch.testing.assert_close(net(*x, projected=net.project(*x)).video, net(*x).video)


# ---- DEEP: loss and training ----------------------------------------------------------------------------------------

def test_terms_one_by_one():
    net, x = deep().eval(), features()
    weak = torch.tensor([[1., 0, 1], [0, 1, 0], [0, 0, 0]])
    p, batch = net(*x), Batch(*x, weak, None, {"removed_visual": torch.tensor([[1., 0, 0]]*3)})
    terms, z = D.DEEPLoss()(p, batch), p.extra["logits"]
    want = {"video": (z["video"], weak), "joint": (z["joint"], weak), "audio": (z["audio"], weak)}
    visual = .9*weak + .05
    visual[:, 0] = 0                                                                       # removed
    for k, (logits, y) in (want | {"visual": (z["visual"], visual)}).items():
        q = (logits.exp() + 1)/(logits.exp() + 1).sum(-1, keepdim=True)
        torch.testing.assert_close(terms[k], -(y*q[..., 0].log() + (1 - y)*q[..., 1].log()).mean())
    each = [-(p.extra["when"][b, :, c]*p.extra["weights"][b, :, m, c].log()).sum() for b, c in ((0, 0), (0, 2), (1, 1)) for m in (0, 1)]
    attention = (sum(each[:4])/4 + sum(each[4:])/2)/3
    torch.testing.assert_close(terms["attention"], .01*attention)
    sum(terms.values()).backward()
    assert all(q.grad is not None and q.grad.abs().max() > 0 for q in net.parameters())


@pytest.mark.parametrize("kw, message", [
    (dict(w_joint=-1), "w_joint: -1"), (dict(w_attention=float("inf")), "w_attention: inf"), (dict(w_contrast=float("nan")), "w_contrast: nan"),
    (dict(tau=0), "tau: 0 is not possible"), (dict(guided=GuidedLoss(beta=.5)), "beta: 0.5")])
def test_loss_refuses(kw, message):
    with pytest.raises(InputError) as e: D.DEEPLoss(**kw)
    assert message in str(e.value)


def test_network_refuses():
    with pytest.raises(InputError, match="mix: -0.1 is not possible"): D.DEEP(mix=-.1)
    with pytest.raises(InputError, match="ratios: 'x' is not possible"): RunSpec("deep", {"ratios": "x"})
    with pytest.raises(InputError, match="has no such option"): RunSpec("deep", {"alpha": 1})


def test_deep_trains():
    learner = Learner(deep(), TRAIN, D.LOSS, callbacks=[ScoreCB(), ValidateCB(VALID, rule="nrep")], **FIT | dict(epochs=10, step=10)).fit()
    first, last = (sum(learner.history[k]["loss"].values()) for k in (0, -1))
    assert last < .8*first
    p, true = predict(learner.model, VALID), VALID.dense_audio > 0
    assert p.segments[:, :, 0][true].mean() > p.segments[:, :, 0][~true].mean() + .1
    passes = predict_both(learner.model, VALID)
    assert not np.array_equal(*(q.segments for q in passes)) and np.array_equal(passes[0].segments, p.segments)


def test_deep_with_denoising_and_with_dense_labels():
    ratios = np.full((2, 3), .3)
    learner = Learner(deep(), TRAIN, D.LOSS, callbacks=[DenoiseCB(*ratios, warmup=None)], **FIT).fit()
    assert learner.history[-1]["denoise"]["removed_audio"] > 0
    dense = TRAIN.with_labels(pseudo_audio=TRAIN.dense_audio, pseudo_visual=TRAIN.dense_visual)
    learner = Learner(deep(), dense, DenseLoss(D.LOSS), **FIT | dict(epochs=1)).fit()
    assert list(learner.history[0]["loss"])[-2:] == ["dense_audio", "dense_visual"]
    assert (DenseLoss(D.LOSS).w_audio, DenseLoss(D.LOSS).w_visual) == (1., 1.)


def test_deep_on_videos_of_different_length():
    uneven = replace(TRAIN, lengths=np.arange(48) % 4 + 2)
    learner = Learner(deep(), uneven, D.LOSS, **FIT).fit()
    assert sum(learner.history[-1]["loss"].values()) < sum(learner.history[0]["loss"].values())


def test_deep_stacks():
    assert why_not(deep()) is None
    def make(r, kind): return kind(deep(r), TRAIN, D.DEEPLoss(w_joint=1. + r, tau=.2 + .1*r), seed=r, callbacks=[ScoreCB()], **FIT)
    alone, lanes = [make(r, Learner).fit() for r in range(3)], [make(r, Lane) for r in range(3)]
    whole = StackedLearner(lanes).fit()
    assert not whole.failed and not whole.apart
    for a, b in zip(alone, lanes):
        for x, y in zip(a.history, b.history): assert x["loss"] == pytest.approx(y["loss"], rel=1e-4, abs=1e-5)
        np.testing.assert_allclose(predict(b.model, VALID).segments, predict(a.model, VALID).segments, atol=2e-4)


# ---- UWAV: labels ---------------------------------------------------------------------------------------------------

CLIPS = simulate(80)


@pytest.mark.parametrize("margin, temperature, want", [(2, 2, 1/(1 + math.exp(-1))), (2, 1, 1/(1 + math.exp(-2))), (0, 2, .5), (-np.inf, 2, 0), (1e9, 1, 1)])
def test_soft_label_by_hand(margin, temperature, want):
    found = U.soft_labels(np.full((1, 1, 2), margin), [[1, 0]], temperature)
    assert found[0, 0].tolist() == [pytest.approx(want, abs=1e-6), 0] and found.dtype == np.float32


@pytest.mark.parametrize("params", [PseudoParams(), PseudoParams(miss=.4, false_alarm=.3, memory=0), PseudoParams(miss=0, false_alarm=0),
                                    PseudoParams(miss=1, false_alarm=1), PseudoParams(seed=9)])
def test_the_teacher_is_the_one_of_the_hard_labels(params):
    margins, hard, cell = U.simulate_teacher(CLIPS, params), simulate_pseudo_labels(CLIPS, params), CLIPS.weak[:, None] > 0
    for m in ("audio", "visual"):
        assert not np.isnan(margins[m]).any()
        assert np.array_equal((margins[m] > 0) & cell, hard[m] > 0)
    assert U.agrees(label_clips(U.with_soft_labels(CLIPS, margins), params=params).labels)


def test_the_teacher_does_not_depend_on_the_company():
    whole, part = U.simulate_teacher(CLIPS), U.simulate_teacher(CLIPS[[40, 7]])
    for m in whole: assert np.array_equal(whole[m][[40, 7]], part[m])


@pytest.mark.parametrize("change, message", [
    (lambda m: {"audio": m["audio"]}, "no visual margins"), (lambda m: {**m, "audio": m["audio"][:, :5]}, "expected (N,T,C) = (80, 10, 25)"),
    (lambda m: {**m, "visual": m["visual"]*np.nan}, "holds NaN")])
def test_margins_are_refused(change, message):
    with pytest.raises(InputError) as e: U.with_soft_labels(CLIPS, change(U.simulate_teacher(CLIPS)))
    assert message in str(e.value)


def test_real_videos_have_no_simulated_teacher():
    bare = replace(CLIPS, dense_audio=None, dense_visual=None)
    with pytest.raises(InputError, match="nothing is known second by second"): U.simulate_teacher(bare)
    plain = RunSpec("uwav", labels="clip+clap").plain()
    assert U.with_teacher(plain, None, bare) is bare                                        # a run then takes the given files


def test_padding_has_no_labels():
    short = replace(CLIPS[:8], lengths=np.arange(8) + 1)
    taught = label_clips(U.with_soft_labels(short, U.simulate_teacher(short)))
    for i, n in enumerate(short.lengths): assert not taught.labels["soft_visual"][i, n:].any()
    assert U.agrees(taught.labels) and taught.labels["soft_visual"].any()


def test_printed_quality_can_be_reached():
    c = simulate(150, split="test", frames=None)
    for k in (0, 1):
        m = U.miss_for(c, U.PRINTED["uwav"][k], ("audio", "visual")[k])
        assert U.label_quality(c, PseudoParams(miss=m))[k] == pytest.approx(U.PRINTED["uwav"][k], abs=.4)
    with pytest.raises(InputError, match="out of reach"): U.miss_for(c, 99.9, "audio")
    with pytest.raises(InputError, match="modality: 'sound'"): U.miss_for(c, 70., "sound")


# ---- UWAV: loss, mixing, network ------------------------------------------------------------------------------------

def test_weighted_bce_against_torch():
    p, y, f = torch.rand(4, 6, 3), torch.rand(4, 6, 3), torch.tensor([.1, .5, .9])
    want = -(.5*(1 - f)*y*p.log() + f*(1 - y)*(1 - p).log()).mean()
    torch.testing.assert_close(U.weighted_bce(p, y, f), want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(U.weighted_bce(p, y), F.binary_cross_entropy(p, y), rtol=1e-4, atol=1e-6)
    mask = torch.arange(6) < torch.tensor([6, 2, 3, 1])[:, None]
    some = [U.weighted_bce(p[i:i + 1, :n], y[i:i + 1, :n], f)*n for i, n in enumerate((6, 2, 3, 1))]
    torch.testing.assert_close(U.weighted_bce(p, y, f, mask), sum(some)/12, rtol=1e-4, atol=1e-6)
    zero = U.weighted_bce(torch.zeros(1, 1, 1), torch.ones(1, 1, 1), torch.tensor([.5]))
    assert zero.isfinite()


def test_mixing_is_linear_and_repeatable():
    batch = label_clips(CLIPS).batch(range(6))
    share, order = U.mixing(3, 1, 2, 6)
    out = U.mixed(batch, share, order)
    for k in ("audio", "frames", "motion", "weak"):
        x = getattr(batch, k)
        torch.testing.assert_close(getattr(out, k), share*x + (1 - share)*x[order])
    for k, x in batch.labels.items(): torch.testing.assert_close(out.labels[k], share*x + (1 - share)*x[order])
    assert out.mask is None and torch.equal(out.index, batch.index)
    again = U.mixing(3, 1, 2, 6)
    assert again[0] == share and torch.equal(again[1], order)
    assert len({U.mixing(s, e, i, 6)[0] for s in (1, 2) for e in (0, 1) for i in (0, 1)}) == 8


def test_mixing_leaves_the_random_numbers_alone():
    torch.manual_seed(0)
    U.mixing(1, 0, 0, 8)
    drawn = torch.rand(2)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(2), drawn)


def test_mixed_shares_follow_the_beta_distribution():
    x = np.array([U.mixing(0, 0, i, 1)[0] for i in range(4000)])
    want = Beta(torch.tensor(1.7), torch.tensor(1.7))
    assert x.mean() == pytest.approx(.5, abs=.02) and x.var() == pytest.approx(want.variance.item(), abs=.005)


def uwav(seed=0, **kw):
    torch.manual_seed(seed)
    return U.UWAV(**{**micro.SIZES, "heads": 4, "hidden": 32, **kw})


@pytest.mark.parametrize("layers", [1, 3])
def test_network(layers):
    net, x = uwav(n_layers=layers).eval(), features(per=8)
    mask = torch.arange(6) < torch.tensor([[6], [4], [1]])
    with torch.no_grad():
        out = net(*x, mask=mask)
        alone = net(x[0][1:2, :4], x[1][1:2, :32], x[2][1:2, :4])
    assert len(net.layers) == layers and out.segments.shape == (3, 6, 2, 3)
    torch.testing.assert_close(out.segments[1:2, :4], alone.segments, rtol=1e-4, atol=1e-5)
    e = net.project(*x)
    a, v = e
    for layer in net.layers:                                                                # sound first
        a = layer(a, v)
        v = layer(v, a)
    for mine, want in zip(net.attend(*e), (a, v)): torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-5)


# ---- UWAV: training -------------------------------------------------------------------------------------------------

def taught(clips=TRAIN, soft=True):
    p = PseudoParams()
    out = label_clips(clips, params=p)
    return U.with_soft_labels(out, U.simulate_teacher(clips, p)) if soft else out


def fit(clips, callbacks=(), loss=None, epochs=3, **kw):
    return Learner(uwav(), clips, loss or U.UWAVLoss(), **FIT | dict(epochs=epochs), callbacks=[U.UwavCB(**kw), *callbacks])


def test_uwav_trains_and_says_who_taught():
    learner = fit(taught(), epochs=8).fit()
    assert sum(learner.history[-1]["loss"].values()) < sum(learner.history[0]["loss"].values())
    assert learner.history[0]["teacher"] == "soft" and type(learner.opt).__name__ == "AdamW"
    assert fit(taught(soft=False)).fit().history[0]["teacher"] == "hard"
    assert fit(taught(), soft=False).fit().history[0]["teacher"] == "hard"
    other = label_clips(taught(), params=PseudoParams(seed=4))
    assert fit(other).fit().history[0]["teacher"] == "hard"                                 # labels that were given win
    with pytest.raises(InputError, match="no labels of a teacher"): fit(TRAIN).fit()


def test_the_loss_around_it_is_taken_off():
    a, b = (fit(taught(), loss=loss).fit() for loss in (U.UWAVLoss(), DenseLoss(U.UWAVLoss(soft=False))))
    assert a.history[-1]["loss"] == b.history[-1]["loss"] and micro.same_weights(a.model, b.model)


def test_frequencies_of_the_labels():
    learner = fit(taught()).fit()
    want = np.stack([learner.train.labels[f"soft_{m}"].mean((0, 1)) for m in ("audio", "visual")])
    np.testing.assert_allclose(learner.loss.frequency, want, rtol=1e-5)
    assert fit(taught(), reweight=False).fit().loss.frequency is None


def test_each_switch_changes_the_run():
    runs = [fit(taught(), **kw).fit().history[-1]["loss"]["video"] for kw in ({}, dict(soft=False), dict(reweight=False), dict(mixup=False))]
    assert len(set(runs)) == 4


def test_an_interrupted_run_goes_on(tmp_path):
    class Stop(Callback):
        order = 1000
        def after_epoch(self, learner):
            if learner.epoch == 2: raise KeyboardInterrupt
    whole = fit(taught(), epochs=4).fit()
    with pytest.raises(KeyboardInterrupt): fit(taught(), [CheckpointCB(tmp_path/"c", "key"), Stop()], epochs=4).fit()
    again = fit(taught(), [CheckpointCB(tmp_path/"c", "key")], epochs=4).fit()
    assert [h["loss"] for h in again.history] == [h["loss"] for h in whole.history] and micro.same_weights(again.model, whole.model)


def test_uwav_does_not_stack():
    assert "UwavCB" in why_not(uwav(), [U.UwavCB()])


def test_videos_of_different_length():
    learner = fit(taught(replace(TRAIN, lengths=np.arange(48) % 4 + 2)), epochs=6).fit()
    assert sum(learner.history[-1]["loss"].values()) < sum(learner.history[0]["loss"].values())


# ---- as runs --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["deep", "uwav"])
def test_entries(name):
    m = METHODS[name]
    assert m.faith == "reconstruction" and m.rule in RULES and m.idea and set(m.builds_on) <= set(METHODS)
    for options in m.rows.values(): RunSpec(name, options, labels="clip+clap" if name == "uwav" else None)
    assert set(m.rows) == set(m.names)


def test_refused_runs():
    with pytest.raises(InputError, match="UWAV learns from labels of a teacher"): RunSpec("uwav")
    with pytest.raises(InputError, match="layers: 0 is not possible"): RunSpec("uwav", {"layers": 0}, labels="clip+clap")
    with pytest.raises(InputError, match="protocol: 'code' is not possible"): RunSpec("uwav", protocol="code", labels="clip+clap")


def test_runs_of_deep(tmp_path, monkeypatch):
    micro.install(monkeypatch.setitem)
    store = Store(tmp_path)
    done = single.run(RunSpec("deep", scale="micro"), store, "cpu", "off")
    assert done["rule"] == "nrep" and done["first"] == [] and set(done["metrics"]) == set(RULES)
    refined = single.run(RunSpec("deep", {"denoise": True}, scale="micro"), store, "cpu", "off")
    assert len(refined["first"]) == 1 and "denoise" in refined["history"][-1]
    taught = single.run(RunSpec("deep", {"denoise": True}, scale="micro", labels="clip+clap"), store, "cpu", "off")
    assert taught["first"] == [] and "dense_audio" in taught["history"][0]["loss"]


def test_runs_of_uwav(tmp_path, monkeypatch):
    micro.install(monkeypatch.setitem)
    store = Store(tmp_path/"store")
    def run(options=None, **kw): return single.run(RunSpec("uwav", options or {}, scale="micro", labels="clip+clap", **kw), store, "cpu", "off")
    done = run()
    assert done["history"][0]["teacher"] == "soft" and "simulated pseudo-labels miss 0.2" in done["data"]["mark"]
    assert set(done["history"][0]["loss"]) == {"video", "dense_audio", "dense_visual"}
    assert run({"soft": False})["history"][0]["teacher"] == "hard"
    assert run(protocol="paper")["key"] != done["key"]
    clips = single.load_data(DataSpec(), "micro", None, "pooled")["train"]
    root = write_pseudo_layout(tmp_path/"files", label_clips(clips, params=PseudoParams(seed=3)))
    given = run(data=DataSpec(pseudo_labels=str(root)))
    assert given["history"][0]["teacher"] == "hard" and given["key"] != done["key"]
