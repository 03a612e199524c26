"""Many runs as one: equal to the runs alone, whoever the neighbours are and whatever happens to them."""
import os
import signal
import subprocess
import sys
from dataclasses import replace

import micro
import numpy as np
import pytest
import torch

from avvp_nb import runs
from avvp_nb.core import InputError
from avvp_nb.data import sim_labels as labels_
from avvp_nb.data.sources import first_dataset
from avvp_nb.methods import zoo
from avvp_nb.methods.cmpae import CMPAE, CMPAELoss, StepCB
from avvp_nb.methods.dgm import DGM, DGMNet, MSDULoss
from avvp_nb.methods.jomold import DenoiseCB, JoMoLD, JoMoLDLoss, NoiseEstimator
from avvp_nb.methods.losses import DenseLoss, GuidedLoss
from avvp_nb.methods.ma import MALoss
from avvp_nb.methods.mmil import MMILHead
from avvp_nb.records.spec import RunSpec
from avvp_nb.records.store import Store
from avvp_nb.results.systems import TAUGHT
from avvp_nb.runs import single, stacked
from avvp_nb.runs.stacked import StackFailure, plan_stacks, run_stacked, stack_key
from avvp_nb.train import lanes as lanes_
from avvp_nb.train import learner as learner_module
from avvp_nb.train import stack
from avvp_nb.train.callbacks import CheckpointCB, ScoreCB, ValidateCB
from avvp_nb.train.lanes import Lane, why_not
from avvp_nb.train.learner import Callback, Learner, batches, predict_both
from avvp_nb.train.stack import StackedLearner

TRAIN, VALID = micro.toy_clips(60), micro.toy_clips(30, seed=1)
FIT = dict(lr=5e-3, batch_size=16, epochs=5, step=3, device="cpu")  # 5 epochs of 4 steps


def net(seed, cls=None, **kw):
    torch.manual_seed(seed)
    return (cls or micro.HAN)(**{**micro.SIZES, **kw})


def ratios(seed): return np.random.default_rng(seed).random((2, 3)) / 2
def removed(seed, n=60): return (np.random.default_rng(seed).random((n, 3)) < .3).astype(np.float32)


# --- the same runs alone and together --------------------------------------------------------------------------------

def together(make, R=4, **kw):
    "(learners trained alone, the same as lanes of one stack, the stack)"
    alone = [make(r, lambda *a, **k: Learner(*a, **{**FIT, **k, **kw})).fit() for r in range(R)]
    lanes = [make(r, lambda *a, **k: Lane(*a, **{**FIT, **k, **kw})) for r in range(R)]
    return alone, lanes, StackedLearner(lanes).fit()


def log(learner): return [{k: v for k, v in h.items() if k != "seconds"} for h in learner.history]


def close(a, b, eps=1e-5, where=""):
    "Equal structure, and numbers that agree"
    if isinstance(a, dict):
        assert set(a) == set(b), where
        for k in a: close(a[k], b[k], eps, f"{where}/{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)): close(x, y, eps, f"{where}/{i}")
    elif isinstance(a, torch.Tensor): torch.testing.assert_close(b, a, rtol=1e-4, atol=eps, msg=lambda m: f"{where}: {m}")
    else: assert a == b or abs(a - b) <= eps * max(1, abs(a)), (where, a, b)


def moved(learner, eps=1e-5):
    "Parameters by name, without the numbers whose gradient is nothing but rounding (spec: biases that cancel)"
    moments = [s["exp_avg_sq"] for _, s in sorted(learner.opt.state_dict()["state"].items())]
    named = [(k, p) for k, p in learner.model.named_parameters() if p in learner.opt.state]
    return {k: torch.where(m.sqrt() > eps, p.detach(), 0.) for (k, p), m in zip(named, moments, strict=True)}


def same(alone, lanes, eps=1e-5):
    for a, b in zip(alone, lanes, strict=True):
        close(log(a), log(b), eps)
        close(moved(a), moved(b), 20 * eps)
        x, y = a.opt.state_dict(), b.opt.state_dict()
        assert x["param_groups"] == y["param_groups"]
        close(x["state"], y["state"], eps)
        for p, q in zip(predict_both(a.model, VALID), predict_both(b.model, VALID)):
            np.testing.assert_allclose(q.segments, p.segments, atol=20 * eps)


def han(r, kind, **kw):
    callbacks = [ScoreCB(), ValidateCB(VALID, select="segment/Type@AV")]
    return kind(net(r, **kw), TRAIN, GuidedLoss(eps_visual=(.1, .2)[r % 2], w_audio=1. + r), lr=(5e-3, 2e-3)[r % 2], seed=r, callbacks=callbacks)


def ma(r, kind, mixed=True):
    clips = TRAIN.with_labels(removed_audio=removed(r) * TRAIN.weak, removed_visual=removed(9 + r) * TRAIN.weak)
    return kind(net(r), clips, MALoss(tau=.2 + .1 * r * mixed, protocol=("official", "paper")[r % 2 * mixed]), seed=r, callbacks=[ScoreCB()])


def dgm(r, kind, cls=None, msdu=True, **kw):
    settings = [dict(), dict(noise=False, measure="score"), dict(apply="update", variance="literal"), dict(target="encoder", measure="discrepancy")][r]
    loss = MSDULoss((GuidedLoss if cls is None else JoMoLDLoss)(), weight=1 + r / 4)
    model = net(r, cls)
    denoise = [DenoiseCB(*ratios(r))] if cls else []
    return kind(DGMNet(model, msdu=msdu), TRAIN, loss, seed=r, callbacks=[ScoreCB(), *denoise, DGM(.1 + .2 * r, **settings)], **kw)


def jomold(r, kind, equal=False, **kw):
    loss = JoMoLDLoss() if equal else JoMoLDLoss(temperature=.2 + .1 * r, w_contrast=r % 2)
    return kind(net(r, JoMoLD, **kw), TRAIN, loss, seed=r, callbacks=[ScoreCB(), DenoiseCB(*ratios(r), denoise_eval_mode=equal)])


def estimator(r, kind): return kind(net(r, NoiseEstimator), TRAIN, JoMoLDLoss(w_audio=1.), seed=r, callbacks=[ScoreCB()])


def cmpae(r, kind):
    return kind(net(r, CMPAE), TRAIN, CMPAELoss(), seed=r, callbacks=[StepCB(), ScoreCB(), ValidateCB(VALID, rule="cmpae"), DenoiseCB(*ratios(r))])


def ma_rows(r, kind):
    "Rows of MA's Table 3: labels removed from one modality, from both, from none"
    names = [("removed_audio",), ("removed_visual",), ("removed_audio", "removed_visual"), ()][r]
    return kind(net(r), TRAIN.with_labels(**{k: removed(r) * TRAIN.weak for k in names}), MALoss(), seed=r, callbacks=[ScoreCB()])


def dense(r, kind):
    labels = {f"pseudo_{m}": np.random.default_rng(r).integers(0, 2, (60, 5, 3)).astype(np.float32) for m in ("audio", "visual")}
    return kind(net(r), TRAIN.with_labels(**labels), DenseLoss(GuidedLoss()), seed=r)


def padded(r, kind):
    "Without dropout: the masks of a batch depend on how wide its neighbours make it"
    return kind(net(r, dropout=0.), replace(TRAIN, lengths=np.arange(60) % 4 + 2), MALoss(), seed=r, callbacks=[ScoreCB()])


RUNS = {"han": han, "han without dropout": lambda r, k: han(r, k, dropout=0.), "han paper": lambda r, k: han(r, k, protocol="paper"),
        "han max": lambda r, k: han(r, k, pooling="max"), "han two layers": lambda r, k: han(r, k, share_layer=False),
        "no temporal": lambda r, k: han(r, k, temporal="none"), "ma": ma, "ma alike": lambda r, k: ma(r, k, False), "ma rows": ma_rows,
        "dgm": dgm, "dgm without msdu": lambda r, k: dgm(r, k, msdu=False), "dgm on jomold": lambda r, k: dgm(r, k, JoMoLD),
        "jomold": jomold, "jomold alike": lambda r, k: jomold(r, k, True), "estimator": estimator, "cmpae": cmpae, "dense": dense, "padded": padded}


@pytest.mark.parametrize("name", RUNS)
def test_each_run_of_a_stack_is_the_run_alone(name):
    alone, lanes, whole = together(RUNS[name])
    assert not whole.failed and not whole.apart, whole.apart
    same(alone, lanes)


@pytest.mark.parametrize("name", ["dgm", "dgm without msdu", "dgm on jomold", "jomold", "jomold alike"])
def test_callbacks_one_by_one_say_the_same_as_their_joint_form(name, monkeypatch):
    monkeypatch.setattr(stack, "joint", lambda kind, moment: None)
    alone, lanes, _ = together(RUNS[name])
    same(alone, lanes)


def test_lanes_with_other_callbacks_share_a_stack():
    "Denoising asks for a pass that the neighbours don't want; their dropout must not notice"
    alone, lanes, whole = together(lambda r, k: jomold(r, k) if r % 2 else estimator_like(r, k))
    assert whole.kinds is None and not whole.failed
    same(alone, lanes)


def estimator_like(r, kind): return kind(net(r, JoMoLD), TRAIN, JoMoLDLoss(), seed=r, callbacks=[ScoreCB()])


def test_half_precision_stays_within_its_rounding(monkeypatch):
    monkeypatch.setenv("AVVP_SLOW_BF16", "1")   # also where it takes long
    alone, lanes, _ = together(han, precision="bf16")
    for a, b in zip(alone, lanes): close([h["loss"] for h in a.history], [h["loss"] for h in b.history], 2e-2)


def test_neighbours_make_no_difference():
    def lanes(rs): return [han(r, lambda *a, **k: Lane(*a, **{**FIT, **k})) for r in rs]
    few, many = lanes((0, 1)), lanes((2, 1, 3, 0))
    StackedLearner(few).fit(), StackedLearner(many).fit()
    same(few, [many[3], many[1]], 1e-6)


def test_a_stack_of_one_is_a_run():
    alone, lanes, _ = together(dgm, R=1)
    same(alone, lanes)


def test_a_lane_by_itself_is_a_learner_to_the_last_bit():
    a, b = (dgm(0, lambda *x, kind=kind, **k: kind(*x, **{**FIT, **k})).fit() for kind in (Learner, Lane))
    assert log(a) == log(b) and micro.same_weights(a.model, b.model)


def test_the_sum_of_losses_does_not_mix_gradients():
    "A neighbour with a thousandfold loss changes nothing"
    def make(r, kind): return kind(net(r), TRAIN, GuidedLoss(w_audio=1000. if r else 1.), seed=r)
    alone, lanes, _ = together(make, R=2)
    same(alone[:1], lanes[:1])


# --- masks -----------------------------------------------------------------------------------------------------------

def generators(*seeds): return [torch.Generator().manual_seed(s) for s in seeds]


@pytest.mark.parametrize("at_once", [True, False])
def test_masks_keep_the_right_share_and_belong_to_their_run(at_once):
    notes = [lanes_.Mask((40, 50), .1, torch.float32), lanes_.Mask((30, 70), .5, torch.bfloat16)]
    a, b = (lanes_.drawn(notes, generators(*s), at_once) for s in ((1, 2), (2, 3, 1)))
    assert torch.equal(a[0][0], b[0][2]) and torch.equal(a[1][1], b[1][0]) and not torch.equal(a[0][0], a[0][1])
    for m, note in zip(a, notes):
        assert m.dtype == note.dtype and m.shape == (2, *note.shape)
        assert m.float().mean().item() == pytest.approx(1, abs=.05)
        assert sorted(m.unique().tolist()) == pytest.approx([0, 1 / (1 - note.p)], rel=1e-2)
    assert lanes_.drawn([], generators(1), at_once) == []


def test_masks_drawn_at_once_do_not_depend_on_the_neighbours(monkeypatch):
    "As on a GPU"
    original = lanes_.drawn
    monkeypatch.setattr(lanes_, "drawn", lambda masks, generators, at_once, words: original(masks, generators, True))
    few, many, other = ([jomold(r, lambda *a, **k: Lane(*a, **{**FIT, **k})) for r in rs] for rs in ((0, 1), (2, 1, 3, 0), (0,)))
    for lanes in (few, many, other): StackedLearner(lanes).fit()
    same(few, [many[3], many[1]])
    same(few[:1], other)
    alone = jomold(0, lambda *a, **k: Learner(*a, **{**FIT, **k})).fit()
    a, b = (x.history[-1]["loss"]["audio"] for x in (alone, few[0]))
    assert a != b and abs(a / b - 1) < .2                          # other masks of the same distribution


def test_nothing_but_our_masks_is_random_in_a_stack():
    class Noisy(micro.HAN):
        def before_head(self, x_audio, x_visual): return x_audio + torch.randn_like(x_audio), x_visual
    lanes = [Lane(net(r, Noisy), TRAIN, GuidedLoss(), **FIT) for r in range(2)]
    with pytest.raises(RuntimeError, match="randomness error mode"): StackedLearner(lanes).fit()


def test_dropout_masks_change_from_step_to_step_and_epoch_to_epoch():
    seen = []
    class Look(Callback):
        def after_loss(self, learner):
            if learner.seed == 0: seen.append(learner.parsing.segments.detach().clone())
    few = TRAIN[:16]
    lanes = [Lane(net(0), few, GuidedLoss(), **{**FIT, "lr": 0., "epochs": 3}, seed=s, callbacks=[Look()]) for s in (0, 1)]
    StackedLearner(lanes).fit()
    ordered = [s.sum().item() for s in seen]
    assert len(set(ordered)) == 3


# --- what callbacks see ----------------------------------------------------------------------------------------------

def test_replaced_and_scaled_gradients_are_honoured():
    class Double(Callback):
        def after_backward(self, learner):
            for i, p in enumerate(learner.model.parameters()):
                if i % 2: p.grad = p.grad * 2 + .1
                else: p.grad.mul_(.5).add_(.01)
    def make(r, kind): return kind(net(r), TRAIN, GuidedLoss(), seed=r, callbacks=[Double()])
    alone, lanes, _ = together(make)
    same(alone, lanes)


def test_clipping_sees_the_norm_of_its_own_lane():
    class Clip(Callback):
        def __init__(self): self.seen = []
        def after_backward(self, learner): self.seen.append(torch.nn.utils.clip_grad_norm_(learner.model.parameters(), .3).item())
    def make(r, kind): return kind(net(r), TRAIN, GuidedLoss(w_audio=1. + 5 * r), seed=r, callbacks=[Clip()])
    alone, lanes, _ = together(make)
    same(alone, lanes)
    close([a.callbacks[0].seen for a in alone], [b.callbacks[0].seen for b in lanes])


def test_a_callback_sees_everything_that_a_learner_has():
    class Look(Callback):
        def __init__(self): self.seen = []
        def note(self, learner, *more):
            self.seen.append([learner.seed, learner.epoch, learner.i, learner.n_batches, learner.batch.index.tolist(), learner.batch.weak.sum().item(), *more])
        def before_batch(self, learner): self.note(learner)
        def after_loss(self, learner):
            self.note(learner, {k: v.item() for k, v in learner.terms.items()}, learner.parsing.video.sum().item(), len(learner.parsing.extra["attended"]))
        def after_step(self, learner): self.note(learner, sum(p.detach().abs().sum().item() for n, p in learner.model.named_parameters() if "project.audio" in n))
    def make(r, kind): return kind(net(r), TRAIN, GuidedLoss(w_video=r % 2), seed=r, callbacks=[Look()])
    alone, lanes, _ = together(make, R=3)
    for a, b in zip(alone, lanes): close(a.callbacks[0].seen, b.callbacks[0].seen, 1e-4)


def test_changed_batches_are_trained_on():
    class Augment(Callback):
        def before_batch(self, learner):
            b = learner.batch
            learner.batch = b._replace(audio=b.audio * (1 + learner.seed), weak=1 - b.weak, labels={"removed_audio": b.weak} if learner.seed else {})
    def make(r, kind): return kind(net(r), TRAIN, GuidedLoss(), seed=r, callbacks=[Augment()])
    alone, lanes, _ = together(make, R=3)
    same(alone, lanes)


def test_features_of_its_own_fail_the_lane():
    class Other(Callback):
        def before_batch(self, learner):
            e = learner.projections()
            if learner.seed: learner.forward(projected=tuple(x * 2 for x in e))
    lanes = [Lane(net(r), TRAIN, GuidedLoss(), **FIT, seed=r, callbacks=[Other()]) for r in range(2)]
    whole = StackedLearner(lanes).fit()
    assert [lane.seed for lane in whole.failed] == [1] and "projected features of its own" in whole.failed[0].traceback


# --- losses ----------------------------------------------------------------------------------------------------------

def test_losses_that_vmap_cannot_take_are_computed_one_by_one():
    class Item(GuidedLoss):
        def __call__(self, parsing, batch):
            terms = super().__call__(parsing, batch)
            assert terms["audio"].item() > 0     # looks at a number, which no vmap can do
            return terms
    Item.__module__ = "avvp_nb.test"
    def make(r, kind): return kind(net(r + 20), TRAIN, Item(), seed=r)
    alone, lanes, whole = together(make)
    assert len(whole.apart) == 1
    same(alone, lanes)


def test_equal_losses_are_recognised_and_no_others():
    m = lanes_.meaning
    assert m(GuidedLoss()) == m(GuidedLoss()) != m(GuidedLoss(eps_audio=.1)) != m(JoMoLDLoss(eps_audio=.1))
    assert m(MSDULoss(GuidedLoss(), .5)) == m(MSDULoss(GuidedLoss(), .5)) != m(MSDULoss(GuidedLoss(), .6))
    assert m(MALoss(GuidedLoss(), tau=.3)) != m(MALoss())
    assert m(DenseLoss(GuidedLoss(), .5)) == m(DenseLoss(GuidedLoss(), .5)) != m(DenseLoss(GuidedLoss(), .4))
    f, g = (lambda p, b: {}), (lambda p, b: {})
    assert m(f) != m(g) and m(f) == m(f)
    assert m([1, "a", None]) == m((1, "a", None)) != m([1, "a", 0])


# --- what goes wrong -------------------------------------------------------------------------------------------------

class Fail(Callback):
    def __init__(self, moment, at):
        def trip(learner):
            if (learner.epoch, getattr(learner, "i", 0)) == at: raise ValueError("stumbled")
        setattr(self, moment, trip)


@pytest.mark.parametrize("moment, at", [("before_fit", (0, 0)), ("before_epoch", (1, 3)), ("before_batch", (2, 1)), ("after_loss", (0, 0)),
                                        ("after_backward", (4, 3)), ("after_step", (1, 2)), ("after_epoch", (3, 3)), ("after_fit", (5, 3))])
def test_a_callback_that_raises_costs_its_own_lane_only(moment, at):
    def make(r, kind): return kind(net(r + 20), TRAIN, GuidedLoss(), seed=r, callbacks=[Fail(moment, at if r == 1 else None)])
    lanes = [make(r, lambda *a, **k: Lane(*a, **{**FIT, **k})) for r in range(3)]
    whole = StackedLearner(lanes).fit()
    assert [lane.seed for lane in whole.failed] == [1] and "ValueError: stumbled" in lanes[1].traceback and "in trip" in lanes[1].traceback
    assert [lane.seed for lane in whole.lanes] == [0, 2]
    same([make(r, lambda *a, **k: Learner(*a, **{**FIT, **k})).fit() for r in (0, 2)], [lanes[0], lanes[2]])


def test_a_loss_that_is_no_number_costs_its_own_lane_and_says_where():
    class Poison(GuidedLoss):
        def __call__(self, parsing, batch): return {k: v * (torch.nan if k == "visual" and self.eps_audio else 1) for k, v in super().__call__(parsing, batch).items()}
    def make(r, kind): return kind(net(r + 20), TRAIN, Poison(eps_audio=.1 * (r == 2)), seed=r)
    lanes = [make(r, lambda *a, **k: Lane(*a, **{**FIT, **k})) for r in range(3)]
    whole = StackedLearner(lanes).fit()
    assert [lane.seed for lane in whole.failed] == [2] and "loss term 'visual' is nan in epoch 1, batch 1" in lanes[2].traceback
    same([make(r, lambda *a, **k: Learner(*a, **{**FIT, **k})).fit() for r in (0, 1)], lanes[:2])


@pytest.mark.parametrize("every, step", [(3, 0), (3, 2), (3, 3), (64, 1), (64, 3), (2, 2)])
def test_terms_that_are_looked_at_later_still_name_their_batch(every, step):
    "As on a GPU, where the terms of many batches are looked at together"
    class Late(GuidedLoss):
        def __call__(self, parsing, batch):
            terms = super().__call__(parsing, batch)
            bad = (batch.labels["at"][:, 0] == -1).any()
            return {k: torch.where(bad, torch.nan, v) for k, v in terms.items()}
    Late.__module__ = "avvp_nb.test"
    order = np.concatenate(batches(60, 16, 1, 0))
    at = np.zeros((60, 3), np.float32)
    at[order[16 * step]] = -1                                      # a video of that batch, in lane 1's order
    lanes = [Lane(net(r + 20), TRAIN.with_labels(at=at * r), Late(), **FIT, seed=r) for r in range(3)]
    whole = StackedLearner(lanes[:2])
    whole.every = every
    whole.fit()
    assert [lane.seed for lane in whole.failed] == [1] and f"is nan in epoch 1, batch {step + 1}." in lanes[1].traceback


def test_a_loss_that_raises_costs_its_own_lane():
    class Refuse(GuidedLoss):
        def __call__(self, parsing, batch):
            if self.eps_audio: raise InputError("does not like this", where="loss")
            return super().__call__(parsing, batch)
    def make(r, kind): return kind(net(r + 20), TRAIN, Refuse(eps_audio=.1 * (r == 0)), seed=r)
    lanes = [make(r, lambda *a, **k: Lane(*a, **{**FIT, **k})) for r in range(3)]
    whole = StackedLearner(lanes).fit()
    assert [lane.seed for lane in whole.failed] == [0] and "does not like this" in lanes[0].traceback
    same([make(r, lambda *a, **k: Learner(*a, **{**FIT, **k})).fit() for r in (1, 2)], lanes[1:])


def test_when_all_lanes_fail_the_stack_ends():
    lanes = [Lane(net(r), TRAIN, GuidedLoss(), **FIT, seed=r, callbacks=[Fail("after_loss", (1, 1))]) for r in range(2)]
    whole = StackedLearner(lanes).fit()
    assert len(whole.failed) == 2 and not whole.lanes and [len(lane.history) for lane in lanes] == [1, 1]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_running_out_of_memory_is_nobodys_fault(error):
    class Greedy(Callback):
        def after_loss(self, learner): raise error
    lanes = [Lane(net(r), TRAIN, GuidedLoss(), **FIT, callbacks=[Greedy()]) for r in range(2)]
    with pytest.raises(type(error)): StackedLearner(lanes).fit()


@pytest.mark.parametrize("other, message", [
    (dict(batch_size=8), "batch_size: the lanes differ"), (dict(epochs=2), "epochs: the lanes differ"), (dict(precision="bf16"), "precision: the lanes differ"),
    (dict(train=TRAIN[:30]), "number of videos: the lanes differ"), (dict(train=VALID[np.arange(60) % 30]), "different videos"),
    (dict(train=TRAIN.with_labels(audio=TRAIN.weak)), "labels of other names"), (dict(model=dict(pooling="mean")), "network: the lanes differ"),
    (dict(model=dict(dropout=.3)), "network: the lanes differ"), (dict(model=dict(dim=8)), "network: the lanes differ")])
def test_lanes_that_do_not_fit_are_refused(other, message, monkeypatch):
    monkeypatch.setenv("AVVP_SLOW_BF16", "1")   # also where it takes long
    def lane(model=None, train=TRAIN, **kw): return Lane(net(0, **(model or {})), train, GuidedLoss(), **{**FIT, **kw})
    with pytest.raises(InputError, match=message): StackedLearner([lane(), lane(**other)]).fit()


def test_no_lanes_are_refused():
    with pytest.raises(InputError, match="no lanes"): StackedLearner([])


@pytest.mark.parametrize("model, reason", [(dict(temporal="gru"), "recurrent layers"), (dict(temporal="transformer"), "draws its dropout")])
def test_networks_without_a_batched_form_are_refused(model, reason):
    assert reason in why_not(net(0, **model))
    with pytest.raises(InputError, match=reason): StackedLearner([Lane(net(r, **model), TRAIN, GuidedLoss(), **FIT) for r in range(2)])


# --- validation ------------------------------------------------------------------------------------------------------

SHORT = replace(VALID, lengths=np.arange(30) // 12 + 3)       # 3, 4 and 5 seconds: batches of validation differ in width
RULED = [("han", "segment/Type@AV"), ("ma", "avg10"), ("cmpae", "event/V"), ("han", "last")]


def ruled(r, kind, valid=VALID, cls=None, *extra):
    "Lanes with their own rules and selections; HAN can do without cross-attention, so all rules suit it"
    rule, select = RULED[r]
    return kind(net(r + 20, cls), TRAIN, GuidedLoss(), seed=r, callbacks=[ScoreCB(), ValidateCB(valid, rule, select), *extra])


def ruled_cmpae(r, kind):
    return kind(net(r + 20, CMPAE), TRAIN, CMPAELoss(), seed=r, callbacks=[StepCB(), ValidateCB(VALID, ("cmpae", "ma")[r % 2], "avg10/only")])


VALIDATED = {"rules": ruled, "short videos": lambda r, k: ruled(r, k, SHORT), "jomold": lambda r, k: ruled(r, k, VALID, JoMoLD), "cmpae": ruled_cmpae}


def kept(lane): return next(cb for cb in lane.callbacks if isinstance(cb, ValidateCB))


def same_choice(alone, lanes):
    "The same scores after each epoch, to the last bit, and the same epoch kept"
    for a, b in zip(alone, lanes, strict=True):
        assert [h["val"] for h in a.history] == [h["val"] for h in b.history] and all(h["val"] for h in b.history)
        assert (kept(a).best, kept(a).best_epoch) == (kept(b).best, kept(b).best_epoch)
        assert (kept(a).state is None) == (kept(b).state is None)
        assert all(v._base is None for v in (kept(b).state or {}).values())          # copies, which later steps don't touch


def refuse(*args, **kw): raise AssertionError("not to be used here")


@pytest.mark.parametrize("name", VALIDATED)
@pytest.mark.parametrize("seconds", [40960, 1])       # all videos in one pass, or 16 at a time
def test_lanes_are_validated_together(name, seconds, monkeypatch):
    make = VALIDATED[name]
    alone = [make(r, lambda *a, **k: Learner(*a, **{**FIT, **k})).fit() for r in range(4)]
    monkeypatch.setattr(stack, "SECONDS", seconds)
    for f in ("predict", "predict_both"): monkeypatch.setattr(learner_module, f, refuse)
    lanes = [make(r, lambda *a, **k: Lane(*a, **{**FIT, **k})) for r in range(4)]
    whole = StackedLearner(lanes).fit()
    assert not whole.failed and not whole.apart
    same_choice(alone, lanes)
    monkeypatch.undo()
    same(alone, lanes)


def joint_calls(monkeypatch):
    "How often lanes are predicted together"
    calls, original = [], stack.decisions
    monkeypatch.setattr(stack, "decisions", lambda *a: calls.append(1) or original(*a))
    return calls


@pytest.mark.parametrize("valids, times", [((VALID, VALID), 5), ((VALID, replace(VALID, weak=VALID.weak)), 5), ((VALID, VALID[:20]), 0), ((VALID, VALID[np.arange(30)]), 0),
                                           ((VALID, SHORT), 0), ((SHORT, SHORT), 5), ((VALID, None), 0), ((None, None), 0), ((VALID[:0], VALID[:0]), 0)])
def test_only_lanes_with_the_same_clips_are_validated_together(valids, times, monkeypatch):
    calls = joint_calls(monkeypatch)
    def make(r, kind): return kind(net(r), TRAIN, GuidedLoss(), seed=r, callbacks=[ValidateCB(valids[r])])
    alone, lanes, whole = together(make, R=2)
    assert len(calls) == times and not whole.failed and not whole.apart
    same(alone, lanes)


def test_large_networks_are_validated_one_by_one_on_a_cpu(monkeypatch):
    monkeypatch.setattr(stack, "SMALL", 1)
    monkeypatch.setattr(stack, "decisions", refuse)
    alone, lanes, _ = together(ruled)
    same(alone, lanes)


def test_a_network_that_has_no_joint_form_in_evaluation_is_validated_one_by_one(monkeypatch):
    calls = joint_calls(monkeypatch)
    class Looks(micro.HAN):
        def before_head(self, x_audio, x_visual):
            if not self.training and x_audio.mean() > 1e9: x_audio = 0 * x_audio
            return x_audio, x_visual
    alone, lanes, whole = together(lambda r, kind: ruled(r, kind, VALID, Looks))
    assert len(calls) == 1 and whole.apart == {stack.validate_together} and not whole.failed
    same(alone, lanes)
    same_choice(alone, lanes)


def test_running_out_of_memory_in_validation_is_nobodys_fault(monkeypatch):
    def out(*args): raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(stack, "decisions", out)
    lanes = [ruled(r, lambda *a, **k: Lane(*a, **{**FIT, **k})) for r in range(2)]
    with pytest.raises(torch.OutOfMemoryError): StackedLearner(lanes).fit()
    assert all(lane.error is None for lane in lanes)


class Spoil(Callback):
    "Something that happens to the weights of a lane before it is validated"
    order = -1
    def __init__(self, value): self.value = value
    def after_epoch(self, learner):
        if self.value is not None and learner.epoch == 2:
            with torch.no_grad(): learner.model.head.maps[0].bias.fill_(self.value)


class Raw(micro.HAN):
    "A network whose head may answer beyond 1"
    def forward(self, *args, **kw):
        p = super().forward(*args, **kw)
        p.segments = p.segments * (1 + 3 * (self.head.maps[0].bias.min() > 99))
        return p


@pytest.mark.parametrize("value, said", [(torch.nan, "parsing: video of video 0 holds nan"), (100., "parsing: segments of video 0 holds 4. expected probabilities in [0,1]")])
@pytest.mark.parametrize("bad", [1, 2])               # a rule of one pass, and one of two
def test_impossible_probabilities_cost_their_own_lane_only(bad, value, said, monkeypatch):
    def make(r, kind): return ruled(r, kind, VALID, Raw, Spoil(value if r == bad else None))
    with pytest.raises(InputError) as single: make(bad, lambda *a, **k: Learner(*a, **{**FIT, **k})).fit()
    calls = joint_calls(monkeypatch)
    lanes = [make(r, lambda *a, **k: Lane(*a, **{**FIT, **k})) for r in range(4)]
    whole = StackedLearner(lanes).fit()
    assert whole.failed == [lanes[bad]] and str(lanes[bad].error) == str(single.value) and said in str(single.value)
    assert "val" not in lanes[bad].history[1] and len(lanes[bad].history) == 2 and len(calls) == 5 and not whole.apart
    others = [r for r in range(4) if r != bad]
    alone = [make(r, lambda *a, **k: Learner(*a, **{**FIT, **k})).fit() for r in others]
    same_choice(alone, [lanes[r] for r in others])
    same(alone, [lanes[r] for r in others])


def test_lanes_that_have_failed_are_not_scored():
    class Stumble(Callback):
        order = -1
        def __init__(self, r): self.r = r
        def after_epoch(self, learner):
            if self.r == 0 and learner.epoch == 3: raise ValueError("stumbled")
    lanes = [ruled(r, lambda *a, **k: Lane(*a, **{**FIT, **k}), VALID, None, Stumble(r)) for r in range(3)]
    whole = StackedLearner(lanes).fit()
    assert whole.failed == [lanes[0]] and ["val" in h for h in lanes[0].history] == [True, True, False]
    same([ruled(r, lambda *a, **k: Learner(*a, **{**FIT, **k})).fit() for r in (1, 2)], lanes[1:])


def test_clips_without_dense_labels_are_refused_as_in_a_single_run():
    blind = replace(VALID, dense_audio=None, dense_visual=None)
    def make(r, kind): return kind(net(r), TRAIN, GuidedLoss(), seed=r, callbacks=[ValidateCB(blind)])
    with pytest.raises(InputError) as single: make(0, lambda *a, **k: Learner(*a, **{**FIT, **k})).fit()
    lanes = [make(r, lambda *a, **k: Lane(*a, **{**FIT, **k})) for r in range(2)]
    whole = StackedLearner(lanes).fit()
    assert len(whole.failed) == 2 and {str(lane.error) for lane in lanes} == {str(single.value)}


def test_validation_draws_nothing_and_leaves_the_weights_alone():
    lanes = [ruled(r, lambda *a, **k: Lane(*a, **{**FIT, **k})) for r in range(4)]
    whole = StackedLearner(lanes)
    whole.begin()
    def state(): return [torch.get_rng_state(), *(g.get_state() for g in whole.generators), *(v.detach().clone() for v in whole.params.values())]
    before = state()
    scores = stack.lane_scores(whole, VALID, [kept(lane).rule for lane in lanes])
    assert all(torch.equal(x, y) for x, y in zip(before, state(), strict=True)) and all(lane.model.training for lane in lanes)
    assert scores == [kept(lane).score(lane) for lane in lanes] == stack.lane_scores(whole, VALID.to("cpu"), [kept(lane).rule for lane in lanes])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("valid", [VALID, SHORT])
def test_lanes_are_validated_together_on_a_gpu(valid):
    lanes = [ruled(r, lambda *a, **k: Lane(*a, **{**FIT, **k, "device": "cuda", "deterministic": True}), valid) for r in range(4)]
    whole = StackedLearner(lanes).fit()
    assert not whole.failed and not whole.apart and isinstance(whole.plans["valid"].audio, torch.Tensor)
    for lane in lanes:       # the model is that of the kept epoch; a decision at the very threshold may differ
        assert kept(lane).score(lane) == pytest.approx(lane.history[kept(lane).best_epoch - 1]["val"], abs=2)


# --- checkpoints -----------------------------------------------------------------------------------------------------

def saved(folder, r, kind, *extra, R=3, **kw):
    callbacks = [*extra, ValidateCB(VALID, select="segment/Type@AV"), CheckpointCB(folder / f"{r}.pt", f"run {r}"), DGM(.1 + .1 * r)]
    return kind(DGMNet(net(r)), TRAIN, MSDULoss(GuidedLoss()), seed=r, callbacks=callbacks, **{**FIT, **kw})


class Die(Callback):
    def __init__(self, at): self.at = at
    def after_step(self, learner):
        if (learner.epoch, learner.i) == self.at: raise KeyboardInterrupt


def lanes_of(folder, *extra, **kw): return [saved(folder, r, Lane, *extra, **kw) for r in range(3)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return [saved(folder, r, Learner).fit() for r in range(3)], StackedLearner(lanes_of(tmp_path_factory.mktemp("whole"))).fit().lanes


def test_an_interrupted_stack_goes_on_to_the_last_bit(tmp_path, undisturbed):
    with pytest.raises(KeyboardInterrupt): StackedLearner(lanes_of(tmp_path, Die((2, 1)))).fit()
    lanes = lanes_of(tmp_path)
    StackedLearner(lanes).fit()
    for a, b in zip(undisturbed[1], lanes): assert log(a) == log(b) and micro.same_weights(a.model, b.model)
    same(undisturbed[0], lanes)


def test_lanes_go_on_as_single_runs_and_the_other_way_round(tmp_path, undisturbed):
    with pytest.raises(KeyboardInterrupt): StackedLearner(lanes_of(tmp_path, Die((2, 1)))).fit()
    alone = saved(tmp_path, 0, Learner).fit()                         # a lane's checkpoint continued alone
    same(undisturbed[0][:1], [alone])
    with pytest.raises(KeyboardInterrupt): saved(tmp_path / "other", 1, Learner, Die((2, 3))).fit()
    os.replace(tmp_path / "other" / "1.pt", tmp_path / "1.pt")        # a single run's checkpoint continued in a stack
    lanes = [saved(tmp_path, r, Lane) for r in (1, 2)]
    StackedLearner(lanes).fit()
    same(undisturbed[0][1:], lanes)


def test_lanes_at_different_epochs_are_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt): saved(tmp_path, 1, Learner, Die((2, 3))).fit()
    with pytest.raises(InputError, match="different epochs"): StackedLearner(lanes_of(tmp_path)).fit()


def test_a_checkpoint_holds_its_own_lane_only(tmp_path):
    StackedLearner([saved(tmp_path / "stack", r, Lane, epochs=1) for r in range(8)]).fit()
    saved(tmp_path / "single", 0, Learner, epochs=1).fit()
    sizes = [(tmp_path / d / "0.pt").stat().st_size for d in ("stack", "single")]
    assert sizes[0] == pytest.approx(sizes[1], rel=.02)
    a, b = (torch.load(tmp_path / d / "0.pt", weights_only=True) for d in ("stack", "single"))
    assert set(a) == set(b) and set(a["opt"]["state"]) == set(b["opt"]["state"]) and a["opt"]["param_groups"] == b["opt"]["param_groups"]
    for s, t in zip(a["opt"]["state"].values(), b["opt"]["state"].values()):
        assert {k: (v.shape, v.dtype) for k, v in s.items()} == {k: (v.shape, v.dtype) for k, v in t.items()}


def test_parameters_without_gradient_have_no_state_either(tmp_path):
    "The estimator never uses its cross-attention; an optimiser alone keeps no state for it"
    alone, lanes, _ = together(estimator, R=2)
    assert set(alone[0].opt.state_dict()["state"]) == set(lanes[0].opt.state_dict()["state"]) != set(range(len(list(alone[0].model.parameters()))))


def test_a_damaged_checkpoint_costs_its_own_lane(tmp_path):
    (tmp_path / "1.pt").write_bytes(b"nothing")
    whole = StackedLearner(lanes_of(tmp_path)).fit()
    assert [lane.seed for lane in whole.failed] == [1] and "is damaged" in whole.failed[0].traceback and len(whole.lanes) == 2


# --- planning --------------------------------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def small_networks(monkeypatch): micro.install(monkeypatch.setitem)


def spec(method="han", seed=1, **kw):
    options = {k: kw.pop(k) for k in list(kw) if k in zoo.METHODS[method].options}
    return RunSpec(method, options, seed=seed, **{"scale": "micro", **kw})


def want(*args, **kw): return lambda: spec(*args, **kw)    # a spec that is made when its scale is there


@pytest.mark.parametrize("a, b", [
    (want(), want(seed=2)), (want(), want(noisy="bootstrap")), (want(), want(loss="wsl")), (want(), want(select="last")), (want(), want("ma")),
    (want("dgm", backbone="han"), want("dgm", 3, backbone="han", gamma=.5, noise=False, target="encoder", apply="update", measure="score")),
    (want("dgm"), want("dgm", gamma=.7)), (want("ma", tau=.1), want("ma", refine="audio")), (want("jomold", ratios="released"), want("jomold")), (want("jomold"), want("jomold", contrast=False))])
def test_specs_that_share_a_stack(a, b):
    a, b = a(), b()
    assert stack_key(a) == stack_key(b)
    assert plan_stacks([a, b]) == ([[a, b]], [])


@pytest.mark.parametrize("a, b", [
    (want(), want(protocol="paper")), (want(), want(pooling="max")), (want(), want(share_layer=False)), (want(), want(epochs=2)),
    (want(), want(precision="bf16")), (want(), want(scale="tiny")), (want(), want(data=runs.DataSpec(sim=labels_.SimParams(audio_snr=1.)))),
    (want("dgm"), want("dgm", msdu=False)), (want("dgm"), want("dgm", msdu_gradient=False)), (want("dgm"), want("dgm", backbone="han")),
    (want(), want("ma", epochs=4)), (want(loss="guided"), want()), (want("jomold"), want("jomold_estimator"))])
def test_specs_that_do_not(a, b):
    a, b = a(), b()
    assert stack_key(a) != stack_key(b)
    plan = plan_stacks([a, b])
    assert plan.stacks == [] and [s for s, _ in plan.alone] == [a, b] and all("no other run" in why for _, why in plan.alone)


@pytest.mark.parametrize("one, reason", [
    (want(temporal="gru"), "recurrent layers (GRU) have no batched form"), (want(temporal="transformer"), "draws its dropout"),
    (want("dgm", shared="split"), "tied copies"), (want("coleaf", backbone="han"), "nobody has tried CoLeaFCB in a stack")])
def test_reasons_against_a_stack_are_named(one, reason):
    one = one()
    plan = plan_stacks([one, replace(one, seed=2), one])
    assert plan.stacks == [] and len(plan.alone) == 2 and reason in plan.alone[0][1] and reason in repr(plan)


def test_every_callback_of_a_method_is_either_tried_or_a_reason():
    for name, method in zoo.METHODS.items():
        for backbone in method.backbones or (None,):
            kw = {"labels": "clip+clap"} if name in TAUGHT else {}
            if method.task != "parsing": kw["data"] = runs.DataSpec(dataset=first_dataset(method.task))
            one = RunSpec(name, backbone=backbone, scale="micro", **kw)
            model, _, callbacks = method.build(one.plain(), stacked.NOMINAL, None)
            untried = [type(cb).__name__ for cb in callbacks if not cb.stackable]
            assert (stacked.look(one).reason is not None) == bool(untried or why_not(model)), (name, untried)


def test_a_head_that_is_tied_is_a_reason():
    head = MMILHead(4, 2)
    assert why_not(head) is None
    head.tie = lambda p, m: p
    assert why_not(head).startswith("tied copies")


def test_the_size_of_a_stack_follows_the_memory(monkeypatch):
    clips = micro.toy_clips(32)
    one = stacked.run_bytes(spec(), clips)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (10 * one + clips.nbytes, 0))
    monkeypatch.setattr(stacked, "pick_device", torch.device)
    assert stacked.stack_size(spec(), clips, "cuda") == int(stacked.SHARE * 10)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (10**15, 0))
    assert stacked.stack_size(spec(), clips, "cuda") == stacked.STACK_LIMIT
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (0, 0))
    assert stacked.stack_size(spec(), clips, "cuda") == 1
    assert stacked.stack_size(spec(), clips, "cpu") > 1     # 32 dimensions
    monkeypatch.setattr(stacked, "SMALL", 1000)
    assert stacked.stack_size(spec(), clips, "cpu") == 1


def test_saved_bytes_counts_what_the_backward_pass_needs():
    x = torch.ones(1000, requires_grad=True)
    assert stacked.saved_bytes(lambda: x + 1) == 0 and stacked.saved_bytes(lambda: x.exp()) == 4000
    assert stacked.saved_bytes(lambda: x.exp().exp()) == 8000


# --- from specs to records -------------------------------------------------------------------------------------------

def go(specs, store, **kw): return run_stacked(specs, store, "cpu", kw.pop("progress", "off"), **kw)


def mixed():
    return [spec(), spec(seed=2), spec(noisy="bootstrap"), spec("dgm", gamma=.3), spec("dgm", seed=2), spec("ma"), spec("ma", seed=2, refine="audio"),
            spec("ma", seed=2), spec("jomold", ratios="released"), spec("jomold", seed=2), spec(temporal="gru")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "The same specs stacked and one by one: ((store, records), (store, records))"
    with pytest.MonkeyPatch.context() as m:
        micro.install(m.setitem)
        a, b = (Store(tmp_path_factory.mktemp(n)) for n in ("stacked", "single"))
        return (a, go(mixed(), a)), (b, runs.run_many(mixed(), b, "cpu", "off", stack=1))


def test_records_are_those_of_single_runs(finished):
    (a, stacked), (b, single) = finished
    for s, x, y in zip(mixed(), stacked, single):
        assert set(x) == set(y) | ({"stack"} if s.full_options.get("temporal") != "gru" else set())
        for k in ("key", "spec", "seed", "first", "rule", "selection", "floors", "data", "format"): assert x[k] == y[k], k
        close(*([{k: v for k, v in h.items() if k != "seconds"} for h in r["history"]] for r in (x, y)))
        assert [set(h) for h in x["history"]] == [set(h) for h in y["history"]]
        close(x["metrics"], y["metrics"], 1e-3)
        for without in (False, True):
            p, q = (store.probabilities(r, without) for store, r in ((a, x), (b, y)))
            np.testing.assert_allclose(p.segments, q.segments, atol=2e-3)
        assert a.record(x["key"]) == x and runs.load_weights(a.weight_path(x["key"]))[1]["key"] == x["key"]
    assert {p.name for p in a.root.glob("records/*")} == {p.name for p in b.root.glob("records/*")}
    assert not list(a.root.glob("checkpoints/*.pt")) and {p.name for p in a.root.glob("products/*")} == {p.name for p in b.root.glob("products/*")}


def test_stacks_say_how_large_they_were_and_first_stages_are_stacked_too(finished):
    (a, records), _ = finished
    assert [r.get("stack") for r in records[:3]] == [{"size": 6, "index": i} for i in range(3)]    # with MA, which has HAN's network
    assert [r["stack"]["index"] for r in records[5:8]] == [3, 4, 5]
    first = [a.record(r["first"][0]) for r in records if r["first"]]
    assert first and all(r["stack"]["size"] >= 2 for r in first)


def test_what_is_there_is_not_trained_again(finished, monkeypatch):
    (a, records), _ = finished
    monkeypatch.setattr(stacked, "make_lane", None)
    assert go(mixed(), a) == records
    assert go([mixed()[1], mixed()[1]], a) == [records[1]] * 2


def test_run_many_hands_over_to_stacks(tmp_path):
    records = runs.run_many([spec(), spec(seed=2)], tmp_path, "cpu", "off", stack=2)
    assert [r["stack"]["size"] for r in records] == [2, 2]
    assert "stack" not in runs.run_many([spec(seed=3)], tmp_path, "cpu", "off")[0]


def test_the_given_size_is_kept(tmp_path):
    records = go([spec(seed=s) for s in range(5)], tmp_path, size=2)
    assert [r.get("stack", {}).get("size") for r in records] == [2, 2, 2, 2, None]
    with pytest.raises(InputError, match="size: 0"): go([spec()], tmp_path, size=0)


def crash_at(monkeypatch, epoch):
    "Let stacks be interrupted after so many epochs"
    original = StackedLearner.one_epoch
    def one_epoch(self):
        if self.epoch == epoch: raise KeyboardInterrupt
        original(self)
    monkeypatch.setattr(StackedLearner, "one_epoch", one_epoch)


def test_an_interrupted_stack_of_specs_goes_on(tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        crash_at(m, 2)
        with pytest.raises(KeyboardInterrupt): go(mixed()[:3], tmp_path)
    assert len(list(tmp_path.glob("checkpoints/*.pt"))) == 3
    whole = tmp_path / "whole"
    assert [micro.essence(tmp_path, r) for r in go(mixed()[:3], tmp_path)] == [micro.essence(whole, r) for r in go(mixed()[:3], whole)]


def test_runs_at_different_epochs_are_stacked_by_epoch(tmp_path, monkeypatch, capsys, finished):
    with monkeypatch.context() as m:
        crash_at(m, 2)
        with pytest.raises(KeyboardInterrupt): go(mixed()[:2], tmp_path)
    records = go(mixed()[:3], tmp_path, progress="lines")
    said = capsys.readouterr().out
    assert "2 together: han, micro, seed 1; han, micro, seed 2" in said and "1 together: han (noisy=bootstrap)" in said
    for x, y in zip(records, finished[1][1]): close(x["metrics"], y["metrics"], 1e-3)


def test_an_interrupted_stack_may_go_on_as_single_runs(tmp_path, monkeypatch, finished):
    with monkeypatch.context() as m:
        crash_at(m, 1)
        with pytest.raises(KeyboardInterrupt): go(mixed()[:2], tmp_path)
    records = runs.run_many(mixed()[:2], tmp_path, "cpu", "off", stack=1)
    for x, y in zip(records, finished[1][1]):
        close(x["metrics"], y["metrics"], 1e-3)
        close([h["loss"] for h in x["history"]], [h["loss"] for h in y["history"]])


SCRIPT = """
import sys; sys.path.insert(0, {tests!r})
import micro
from avvp_nb.records.spec import RunSpec
from avvp_nb.runs.stacked import run_stacked
micro.install()

import os, signal
from avvp_nb import core
class Os:
    "Kills the process when it has put the third checkpoint into its place"
    n = 0
    def replace(self, part, path):
        os.replace(part, path)
        self.n += "checkpoints" in str(path)
        if self.n == 3: os.kill(os.getpid(), signal.SIGKILL)
    def __getattr__(self, name): return getattr(os, name)
core.os = Os()
run_stacked([RunSpec("han", scale="micro", seed=s) for s in (1, 2)], {store!r}, "cpu", "off")
"""


def test_a_killed_process_leaves_a_store_that_goes_on(tmp_path, finished):
    "kill -9 between the checkpoints of two lanes: they stand at different epochs"
    code = SCRIPT.format(tests=os.path.dirname(__file__), store=str(tmp_path))
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    store = Store(tmp_path)
    specs = [spec(), spec(seed=2)]
    keys = [stacked.StackRunner(store, "cpu", "off").key(s) for s in specs]
    assert sorted(stacked.epoch_of(store, k) for k in keys) == [1, 2]
    for x, y in zip(go(specs, store), finished[1][1]): close(x["metrics"], y["metrics"], 1e-3)
    assert not list(store.root.glob("*/.*.part"))


def wild(monkeypatch, method, seed, error=None):
    "Let the runs of a method with this seed fail"
    original = zoo.METHODS[method]
    def loss(p, b):
        if error: raise error
        return {"video": p.video.sum() * torch.nan}
    def build(plain, sizes, product=None):
        model, good, callbacks = original.build(plain, sizes, product)
        return model, loss if plain["seed"] == seed else good, callbacks
    monkeypatch.setitem(zoo.METHODS, method, replace(original, build=build))


@pytest.mark.parametrize("error, said", [(None, "'video' is nan in epoch 1, batch 1"), (ZeroDivisionError("oops"), "ZeroDivisionError: oops")])
def test_a_run_that_fails_is_reported_and_the_others_finish(tmp_path, monkeypatch, capsys, error, said):
    wild(monkeypatch, "han", 2, error)
    with pytest.raises(StackFailure, match="1 run failed: han-") as e: go([spec(seed=s) for s in (1, 2, 3)], tmp_path, progress="lines")
    assert [r is None for r in e.value.records] == [False, True, False]
    (key, trace), = e.value.failures.items()
    assert said in trace and "Traceback" in trace
    out = capsys.readouterr().out
    assert "failed: han, micro, seed 2" in out and said in out


def test_a_first_stage_that_fails_is_named_by_what_needs_it(tmp_path, monkeypatch):
    wild(monkeypatch, "jomold_estimator", 2)
    with pytest.raises(StackFailure) as e: go([spec("dgm", seed=s, gamma=g) for s in (1, 2, 3) for g in (.1, .2)], tmp_path)
    assert [r is None for r in e.value.records] == [False, False, True, True, False, False]
    assert sum("what must come first has failed: jomold_estimator, micro, seed 2" in t for t in e.value.failures.values()) == 2


def test_a_run_that_cannot_be_recorded_costs_nobody_else(tmp_path, monkeypatch):
    original = single.finish
    def finish(store, record, *args):
        if record["seed"] == 1: raise OSError("disk full")
        return original(store, record, *args)
    monkeypatch.setattr(stacked, "finish", finish)
    with pytest.raises(StackFailure, match="disk full") as e: go([spec(seed=s) for s in (1, 2, 3)], tmp_path)
    assert [r is None for r in e.value.records] == [True, False, False]


def limited(monkeypatch, most, error=torch.OutOfMemoryError("CUDA out of memory")):
    "Let training of more than so many lanes fail after its first epoch"
    original = StackedLearner.part_with_failed
    def out(self):
        if len(self.lanes) > most: raise error
        original(self)
    monkeypatch.setattr(StackedLearner, "part_with_failed", out)


def test_out_of_memory_halves_the_stack_and_goes_on(tmp_path, monkeypatch, capsys, finished):
    limited(monkeypatch, 1)
    specs = [*mixed()[:3], spec(seed=3)]
    records = go(specs, tmp_path, progress="lines")
    said = capsys.readouterr().out
    assert "out of memory with 4 runs; going on with 2 at once" in said and "out of memory with 2 runs; going on with 1 at once" in said
    for x, y in zip(records, finished[1][1][:3]): close([h["loss"] for h in x["history"]], [h["loss"] for h in y["history"]])
    assert all("stack" not in r for r in records)


def test_a_single_run_that_has_no_room_is_a_failure(tmp_path, monkeypatch):
    class Greedy(ScoreCB):
        def after_loss(self, learner):
            if learner.seed == 2: raise torch.OutOfMemoryError("CUDA out of memory")
            super().after_loss(learner)
    monkeypatch.setattr(single, "ScoreCB", Greedy)
    with pytest.raises(StackFailure, match="out of memory") as e: go([spec(seed=s) for s in (1, 2, 3)], tmp_path)
    assert [r is None for r in e.value.records] == [False, True, False]


def test_what_turns_out_not_to_stack_is_trained_one_by_one(tmp_path, monkeypatch, capsys):
    limited(monkeypatch, 1, RuntimeError("no batching rule"))
    records = go([spec(), spec(seed=2)], tmp_path, progress="lines")
    assert len(records) == 2 and "2 runs could not be stacked, going on one by one (RuntimeError: no batching rule)" in capsys.readouterr().out


def test_locks_are_taken_in_the_order_of_their_names_and_given_back(tmp_path):
    taken = []
    class Spy(Store):
        def lock(self, key):
            taken.append(key)
            return super().lock(key)
    with stacked.locked(Spy(tmp_path), ["c", "a", "b"]):
        assert taken == ["a", "b", "c"] and Store(tmp_path).lock("a").acquire.__self__ is not None
        with pytest.raises(TimeoutError): Store(tmp_path).lock("b").acquire(timeout=0)
    with Store(tmp_path).lock("b"): pass


def test_a_stack_holds_the_locks_of_its_runs_while_it_trains(tmp_path, monkeypatch):
    seen = []
    original = StackedLearner.fit
    def fit(self):
        for s in (1, 2):
            key = stacked.StackRunner(tmp_path, "cpu", "off").key(spec(seed=s))
            with pytest.raises(TimeoutError): Store(tmp_path).lock(key).acquire(timeout=0)
            seen.append(key)
        return original(self)
    monkeypatch.setattr(StackedLearner, "fit", fit)
    assert [r["key"] for r in go([spec(), spec(seed=2)], tmp_path)] == seen


def test_an_impossible_device_is_refused_before_any_work(tmp_path):
    with pytest.raises(InputError, match="device"): run_stacked([spec()], tmp_path / "store", "gpu0")
    assert not (tmp_path / "store").exists()


def test_specs_that_are_one_run_are_trained_once(tmp_path):
    "Equal keys in one list would wait for each other's lock"
    other = spec(data=runs.DataSpec(audio_table="2020"))     # of no consequence for embedded labels: the same run
    assert other != spec() and stacked.StackRunner(tmp_path, "cpu", "off").key(other) == stacked.StackRunner(tmp_path, "cpu", "off").key(spec())
    a, b, _ = go([spec(), other, spec(seed=2)], tmp_path)
    assert a == b


def test_the_seconds_of_a_lane_are_its_share(monkeypatch):
    ticks = iter(range(0, 1000, 6))
    monkeypatch.setattr(stack.time, "perf_counter", lambda: next(ticks))
    lanes = [Lane(net(r), TRAIN, GuidedLoss(), **FIT, seed=r) for r in range(3)]
    StackedLearner(lanes).fit()
    assert [[h["seconds"] for h in lane.history] for lane in lanes] == [[2.] * 5] * 3
