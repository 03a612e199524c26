"""The stand-in for CVCMS: its terms against loops and hand-made numbers, padding, stacks, and that it is called a stand-in everywhere."""
import math

import micro
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from avvp_nb.core import InputError, Parsing
from avvp_nb.data.clips import Batch
from avvp_nb.data.pseudo import with_pseudo_labels
from avvp_nb.methods import cvcms
from avvp_nb.methods.cvcms import (
    ClassAttention,
    ClassHead,
    CVCMSLike,
    CVCMSLoss,
    class_contrast,
    joint_bce,
    joint_pool,
)
from avvp_nb.methods.han import HAN
from avvp_nb.methods.losses import DenseLoss, GuidedLoss
from avvp_nb.methods.method import METHODS
from avvp_nb.records.spec import RunSpec
from avvp_nb.records.store import Store
from avvp_nb.records.weights import load_weights
from avvp_nb.runs.single import run
from avvp_nb.train.callbacks import CheckpointCB, ScoreCB
from avvp_nb.train.lanes import Lane, why_not
from avvp_nb.train.learner import Learner, predict, predict_both
from avvp_nb.train.stack import StackedLearner

TINY = {**micro.SIZES, "width": 8}
TRAIN = micro.toy_clips(60)
FIT = dict(lr=5e-3, batch_size=16, epochs=4, step=3, device="cpu")


def tiny(seed=0, **kw):
    torch.manual_seed(seed)
    return CVCMSLike(**{**TINY, **kw})


def batch_of(weak): return Batch(None, None, None, weak, None, {})


# ---- class vectors

def test_attention_is_pytorchs_with_one_head():
    torch.manual_seed(0)
    layer, e = ClassAttention(8).eval(), torch.randn(2, 3, 2, 5, 8)
    theirs = torch.nn.MultiheadAttention(8, 1, batch_first=True)
    theirs.load_state_dict({"in_proj_weight": layer.qkv.weight.data, "in_proj_bias": layer.qkv.bias.data,
                            "out_proj.weight": layer.out.weight.data, "out_proj.bias": layer.out.bias.data})
    flat = e.flatten(0, 2)
    want, weights = theirs(flat, flat, flat)
    torch.testing.assert_close(layer(e), layer.norm(flat + want).view_as(e))
    torch.testing.assert_close(layer.weights(e).flatten(0, 2), weights)


def test_each_class_has_its_own_view_of_a_second():
    head, (a, v) = ClassHead(16, 3, 8, attention=False).eval(), torch.randn(2, 2, 4, 16)
    e = head.vectors(a, v)
    w, b = head.views.weight.view(3, 8, 16), head.views.bias.view(3, 8)
    for m, x in enumerate((a, v)):
        for c in range(3): torch.testing.assert_close(e[:, :, m, c], head.attend(x @ w[c].T + b[c] + head.who[c]), rtol=1e-4, atol=1e-5)


def test_without_attention_classes_and_modalities_do_not_see_each_other():
    head, (a, v) = ClassHead(16, 3, 8, attention=False).eval(), torch.randn(2, 2, 4, 16)
    base, other = head(a, v), head(a, v + 1)
    assert torch.equal(base.audio, other.audio) and not torch.equal(base.visual, other.visual)
    with torch.no_grad(): head.who[2] += 1
    changed = head(a, v)
    assert torch.equal(base.segments[..., :2], changed.segments[..., :2]) and not torch.equal(base.segments[..., 2], changed.segments[..., 2])


def test_with_attention_classes_see_each_other_within_a_second():
    head, (a, v) = ClassHead(16, 3, 8).eval(), torch.randn(2, 2, 4, 16)
    e = head.vectors(a, v)
    with torch.no_grad(): head.who[2] += 3
    assert ((head.vectors(a, v) - e)[..., :2, :].abs() > 1e-5).any(-1).all()
    x = a.clone()
    x[:, 1] += 1
    moved = (head.vectors(x, v) != head.vectors(a, v)).flatten(3).any(-1)
    assert moved[:, 1, 0].all() and moved.sum() == 2


def test_pooling_is_hans():
    "Probabilities of the video are weighted means of those of seconds"
    net, b = tiny().eval(), TRAIN.batch(range(8))
    p = net(*b.features)
    assert (p.audio <= p.segments[:, :, 0].amax(1)).all() and (p.visual >= p.segments[:, :, 1].amin(1)).all()
    lo, hi = torch.minimum(p.audio, p.visual), torch.maximum(p.audio, p.visual)
    assert (p.video <= p.segments.amax((1, 2))).all() and lo.shape == hi.shape == p.video.shape


# ---- the joint stream

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), t=st.integers(1, 6))
def test_joint_pool_is_the_product_of_both_attentions(seed, t):
    g = torch.Generator().manual_seed(seed)
    probs, temporal = torch.rand(2, t, 2, 3, generator=g), 3 * torch.randn(2, t, 2, 3, generator=g)
    a = temporal.softmax(1).prod(2)
    want = ((a / a.sum(1, keepdim=True)) * probs[:, :, 0] * probs[:, :, 1]).sum(1)
    torch.testing.assert_close(joint_pool(probs, temporal), want, rtol=1e-4, atol=1e-6)


def test_joint_pool_by_hand():
    probs = torch.tensor([[.8, .5], [.2, 1.]]).view(1, 2, 2, 1)
    assert joint_pool(probs, torch.zeros(1, 2, 2, 1)).item() == pytest.approx(.3)
    at = torch.tensor([[math.log(3), 0], [0, 0]]).view(1, 2, 2, 1)
    assert joint_pool(probs, at).item() == pytest.approx(.35)


def test_joint_term_looks_only_where_both_claim_the_class():
    p_a, p_v = torch.tensor([[.6, .6, .4, .5]]), torch.tensor([[.7, .4, .9, .9]])
    said = Parsing(None, p_a, p_v, None, {"joint": torch.tensor([[.3, .3, .3, .3]], requires_grad=True)})
    term = joint_bce(said, torch.ones(1, 4))
    assert term.item() == pytest.approx(-math.log(.3) / 4)                # exactly 0.5 is no claim
    term.backward()
    assert torch.equal(said.extra["joint"].grad != 0, torch.tensor([[True, False, False, False]]))


# ---- contrast

def by_loops(g, weak, tau):
    "The formula, entry by entry"
    items = [(i, c) for i in range(weak.shape[0]) for c in range(weak.shape[1]) if weak[i, c] > 0]
    def s(a, b): return F.cosine_similarity(g[a], g[b], dim=0).item() / tau
    each = []
    for a in items:
        others = [b for b in items if b != a]
        partners = [b for b in others if b[1] == a[1]]
        if not partners: continue
        total = math.log(sum(math.exp(s(a, b)) for b in others))
        each.append(sum(total - s(a, p) for p in partners) / len(partners))
    return sum(each) / len(each) if each else 0.


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), videos=st.integers(1, 5), classes=st.integers(1, 3), tau=st.sampled_from([.2, 1.]))
def test_contrast_is_its_formula(seed, videos, classes, tau):
    gen = torch.Generator().manual_seed(seed)
    g = torch.randn(videos, classes, 4, generator=gen)
    weak = (torch.rand(videos, classes, generator=gen) < .6).float()
    assert class_contrast(g, weak, tau).item() == pytest.approx(by_loops(g, weak, tau), abs=2e-5)


def test_contrast_by_hand():
    weak, g = torch.tensor([[1., 0], [1, 0], [0, 1]]), torch.zeros(3, 2, 2)
    g[:2, 0, 0], g[2, 1, 1] = 2., 1.
    assert class_contrast(g, weak, 1.).item() == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-6)
    assert class_contrast(g, weak, .2).item() == pytest.approx(math.log(1 + math.exp(-5)), abs=1e-6)


@pytest.mark.parametrize("weak", [torch.zeros(2, 3), torch.eye(3)[:2]])
def test_contrast_without_partners_is_zero_and_harmless(weak):
    g = torch.randn(2, 3, 4, requires_grad=True)
    term = class_contrast(g, weak)
    term.backward()
    assert term.item() == 0 and torch.equal(g.grad, torch.zeros_like(g))


def test_contrast_pulls_and_pushes():
    torch.manual_seed(0)
    weak, g = (torch.rand(12, 3) < .5).float(), torch.randn(12, 3, 6, requires_grad=True)
    opt = torch.optim.Adam([g], .1)
    for _ in range(150):
        opt.zero_grad()
        class_contrast(g, weak).backward()
        opt.step()
    x, own = F.normalize(g.detach(), dim=-1)[weak > 0], weak.nonzero()[:, 1]
    same = own[:, None] == own
    assert (x @ x.T)[same].mean() > .9 and (x @ x.T)[~same].mean() < .1


def test_the_term_is_the_mean_of_both_modalities():
    net, b = tiny().eval(), TRAIN.batch(range(16))
    p = net(*b.features)
    terms = CVCMSLoss()(p, b)
    g = p.extra["classes"]
    want = .1 * (class_contrast(g[:, 0], b.weak) + class_contrast(g[:, 1], b.weak)) / 2
    torch.testing.assert_close(terms["contrast"], want)
    torch.testing.assert_close(CVCMSLoss(w_joint=2.)(p, b)["joint"], 4 * terms["joint"])
    plain = GuidedLoss()(p, b)
    assert all(torch.equal(terms[k], plain[k]) for k in plain)


# ---- padding, passes, refusals

def test_padding_changes_nothing():
    clips = micro.toy_clips(6, lengths=np.array([5, 3, 5, 2, 4, 5]))
    net = tiny().eval()
    b = clips.batch(range(6))
    out = net(*b.features, mask=b.mask)
    for i, n in enumerate(clips.lengths):
        one = net(*(x[i:i + 1, :n] for x in b.features))
        for k in ("video", "audio", "visual"): torch.testing.assert_close(getattr(out, k)[i:i + 1], getattr(one, k), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(out.segments[i:i + 1, :n], one.segments, rtol=1e-4, atol=1e-6)
        for k in ("classes", "joint"): torch.testing.assert_close(out.extra[k][i:i + 1], one.extra[k], rtol=1e-4, atol=1e-6)
    learner = Learner(tiny(), clips, CVCMSLoss(), epochs=1, batch_size=3, device="cpu").fit()
    assert all(math.isfinite(v) for v in learner.history[0]["loss"].values())


def test_both_passes_and_full_frames():
    net = tiny()
    with_, without = predict_both(net, TRAIN)
    np.testing.assert_allclose(with_.segments, predict(net, TRAIN).segments, atol=1e-6)
    np.testing.assert_allclose(without.segments, predict(net, TRAIN, cross_attention=False).segments, atol=1e-6)
    assert np.abs(with_.segments - without.segments).max() > 1e-4
    x = [torch.randn(2, n, 8) for n in (5, 40, 5)]
    net.eval()
    torch.testing.assert_close(net(*x).video, net(x[0], x[1].unflatten(1, (5, 8)).mean(2), x[2]).video)


@pytest.mark.parametrize("options, message", [
    ({"w_contrast": -.1}, "w_contrast: -0.1 is not possible"), ({"w_joint": math.inf}, "w_joint: inf is no number"),
    ({"temperature": 0.}, "temperature: 0.0 is not possible. expected a finite number > 0"),
    ({"class_attention": 1}, "class_attention: 1 is a int"), ({"refined": True}, "refined: cvcms has no such option")])
def test_impossible_options_are_refused(options, message):
    with pytest.raises(InputError, match=message): RunSpec("cvcms", options)


@pytest.mark.parametrize("kw", [dict(temperature=math.nan), dict(w_contrast=math.nan), dict(w_joint=-1.), dict(eps_visual=2.)])
def test_impossible_losses_are_refused(kw):
    with pytest.raises(InputError, match=f"{next(iter(kw))}: .* is not possible"): CVCMSLoss(**kw)


def test_it_is_called_a_stand_in_everywhere():
    m = METHODS["cvcms"]
    assert m.faith == "stand-in" and m.idea.startswith("stand-in") and m.protocols == ("stand-in",) and m.rows == {"cvcms": {}}
    assert "stand-in" in cvcms.__doc__ and "stand-in" in CVCMSLike.__doc__ and "stand-in" in CVCMSLoss.__doc__
    assert RunSpec("cvcms").plain()["protocol"] == "stand-in"             # and so in every record


# ---- training

def make(seed, kind, *callbacks, **kw):
    return kind(tiny(seed, **kw), TRAIN, CVCMSLoss(), seed=seed, callbacks=[ScoreCB(), *callbacks], **FIT)


def test_it_learns():
    learner = make(0, Learner).fit()
    terms = [h["loss"] for h in learner.history]
    assert list(terms[0]) == ["audio", "visual", "video", "contrast", "joint"]
    for k in ("audio", "visual", "video"): assert terms[-1][k] < terms[0][k]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learner.model.parameters())


def test_contrast_brings_the_vectors_of_a_class_together():
    "More so than training without it does"
    def left(w):
        model = Learner(tiny(), TRAIN, CVCMSLoss(w_contrast=w), **FIT).fit().model.eval()
        b = TRAIN.batch(range(60))
        return class_contrast(model(*b.features).extra["classes"][:, 0], b.weak).item()
    assert left(1.) < left(0.) - .1


def test_switched_off_ideas_leave_no_trace():
    "Without its terms, and with HAN's own head, the loop and the loss are HAN's"
    assert list(CVCMSLoss(w_contrast=0., w_joint=0.)(tiny().eval()(*TRAIN.batch(range(4)).features), TRAIN.batch(range(4)))) == [
        "audio", "visual", "video"]
    net = METHODS["cvcms"].build(RunSpec("cvcms", {"class_attention": False}).plain(), micro.SIZES)[0]
    assert not any(isinstance(m, ClassAttention) for m in net.modules())
    assert net.layers.state_dict().keys() == HAN(**micro.SIZES).layers.state_dict().keys()


@pytest.mark.parametrize("kw", [{}, {"class_attention": False}])
def test_runs_of_a_stack_are_the_runs_alone(kw):
    assert why_not(tiny(**kw), [ScoreCB()]) is None
    alone = [make(r, Learner, **kw).fit() for r in range(3)]
    stack = StackedLearner([make(r, Lane, **kw) for r in range(3)]).fit()
    assert not stack.failed and not stack.apart
    for a, b in zip(alone, stack.lanes):
        for x, y in zip(a.history, b.history):
            assert x["loss"] == pytest.approx(y["loss"], abs=2e-4) and x["scores"] == pytest.approx(y["scores"], abs=2e-4)


def test_with_pseudo_labels():
    clips = with_pseudo_labels(TRAIN, {m: TRAIN.dense_audio for m in ("audio", "visual")})
    learner = Learner(tiny(), clips, DenseLoss(CVCMSLoss()), epochs=2, lr=5e-3, batch_size=16, device="cpu").fit()
    assert list(learner.history[0]["loss"])[-2:] == ["dense_audio", "dense_visual"]


def test_an_interrupted_run_continues_to_the_same_end(tmp_path):
    class Stop(ScoreCB):
        def after_epoch(self, learner):
            super().after_epoch(learner)
            if learner.epoch == 3: raise KeyboardInterrupt
    def start(*callbacks): return Learner(tiny(), TRAIN, CVCMSLoss(), callbacks=callbacks, **FIT)
    with pytest.raises(KeyboardInterrupt): start(CheckpointCB(tmp_path / "c.pt", "x"), Stop()).fit()
    again, whole = start(CheckpointCB(tmp_path / "c.pt", "x")).fit(), start().fit()
    assert micro.same_weights(again.model, whole.model)


def test_a_run_from_the_spec_to_the_record(tmp_path, monkeypatch):
    micro.install(monkeypatch.setitem)
    record = run(RunSpec("cvcms", scale="micro"), tmp_path, "cpu", "off")
    assert math.isfinite(record["metrics"]["han"]["segment"]["Type@AV"]) and record["spec"]["protocol"] == "stand-in"
    model, header = load_weights(Store(tmp_path).weight_path(record["key"]))
    assert type(model).__name__ == "CVCMSLike" and header["key"] == record["key"]
    assert run(RunSpec("cvcms", scale="micro"), tmp_path, "cpu", "off")["finished"] == record["finished"]
