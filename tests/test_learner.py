"""The training loop: what one epoch computes, selection, checkpoints, and what stops it."""
import errno
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from micro import same_weights, toy_clips, toy_han
from torch import nn

from avvp_nb import core
from avvp_nb.core import InputError, file_hash
from avvp_nb.methods.han import RECIPE
from avvp_nb.methods.losses import GuidedLoss
from avvp_nb.metrics import evaluate
from avvp_nb.train.callbacks import CheckpointCB, ProgressCB, ScoreCB, ValidateCB, epoch_line
from avvp_nb.train.learner import (
    Callback,
    Learner,
    NotFiniteError,
    batches,
    check_terms,
    deterministic_mode,
    epoch_seed,
    pick_device,
    predict,
)

TRAIN, VALID = toy_clips(60), toy_clips(30, seed=1)


def learner(*callbacks, train=TRAIN, loss=None, model=None, **kw):
    kw = {"lr": 1e-2, "epochs": 3, **kw}
    return Learner(model or toy_han(), train, loss or GuidedLoss(), callbacks=callbacks, device="cpu", **kw)


def losses(history): return [h["loss"] for h in history]


class Record(Callback):
    "Everything that happens, in order"
    def __init__(self): self.moments, self.batches, self.rates, self.terms = [], [], [], []
    def before_fit(self, ln): self.moments.append("before_fit")
    def before_epoch(self, ln): self.moments.append("before_epoch")
    def before_batch(self, ln): self.moments.append("before_batch")
    def after_loss(self, ln):
        self.moments.append("after_loss")
        self.batches.append((ln.epoch, ln.batch.index.numpy().copy()))
        self.terms.append({k: v.item() for k, v in ln.terms.items()})
    def after_backward(self, ln): self.moments.append("after_backward")
    def after_step(self, ln): self.rates.append(ln.opt.param_groups[0]["lr"])
    def after_epoch(self, ln): self.moments.append("after_epoch")
    def after_fit(self, ln): self.moments.append("after_fit")


class StopAt(Callback):
    "Raise after the backward pass of one batch"
    def __init__(self, epoch, batch): self.at = epoch, batch
    def after_backward(self, ln):
        if (ln.epoch, ln.i) == self.at: raise KeyboardInterrupt


# --- order -----------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 200), size=st.integers(1, 64), seed=st.integers(0, 2**31), epoch=st.integers(0, 100))
def test_every_video_once_an_epoch(n, size, seed, epoch):
    todo = batches(n, size, seed, epoch)
    assert sorted(np.concatenate(todo)) == list(range(n))
    assert [len(b) for b in todo] == [size] * (n // size) + [n % size] * (n % size > 0)
    assert all(np.array_equal(a, b) for a, b in zip(todo, batches(n, size, seed, epoch)))


def test_seeds_of_epochs_runs_and_uses_differ():
    seeds = {epoch_seed(s, e, u) for s in range(5) for e in range(50) for u in range(3)}
    assert len(seeds) == 750 and all(0 <= s < 2**63 for s in seeds)
    orders = {tuple(np.concatenate(batches(20, 4, s, e))) for s in range(5) for e in range(10)}
    assert len(orders) == 50


# --- what one epoch computes -----------------------------------------------------------------------------------------

def adam_by_hand(model, clips, seed, epochs, rates, size=16):
    "Training without dropout, with Adam written out in double precision"
    model = model.double().eval()                                               # evaluation mode switches dropout off
    state = {k: [torch.zeros_like(p), torch.zeros_like(p)] for k, p in model.named_parameters()}
    step, means = 0, []
    for e in range(epochs):
        total = {}
        for idx in batches(len(clips), size, seed, e):
            b = clips.batch(idx, dtype=torch.float64)
            terms = GuidedLoss()(model(b.audio, b.frames, b.motion), b)
            for k, v in terms.items(): total[k] = total.get(k, 0) + v.item() * len(idx) / len(clips)
            grads = torch.autograd.grad(sum(terms.values()), list(model.parameters()))
            step += 1
            with torch.no_grad():
                for (k, p), g in zip(model.named_parameters(), grads):
                    m, v = state[k]
                    m.mul_(.9).add_(.1 * g)
                    v.mul_(.999).add_(.001 * g * g)
                    p -= rates[e] * (m / (1 - .9**step)) / ((v / (1 - .999**step)).sqrt() + 1e-8)
        means.append(total)
    return model, means


def test_training_is_adam_on_the_sum_of_the_terms():
    got = learner(model=toy_han(dropout=0.), epochs=3, step=2, factor=.1, seed=5).fit()
    model, means = adam_by_hand(toy_han(dropout=0.), TRAIN, 5, 3, [1e-2, 1e-2, 1e-3])
    for mine, want in zip(losses(got.history), means): assert mine == pytest.approx(want, rel=1e-3)
    want = dict(model.named_parameters())
    for k, p in got.model.named_parameters():
        if "bias" in k: continue                    # some have no gradient but rounding noise, which Adam follows
        torch.testing.assert_close(p.double(), want[k], rtol=1e-2, atol=2e-3)


def test_moments_come_in_order():
    seen = Record()
    learner(seen, epochs=2, batch_size=40).fit()
    batch = ["before_batch", "after_loss", "after_backward"]
    assert seen.moments == ["before_fit", *(["before_epoch", *batch, *batch, "after_epoch"] * 2), "after_fit"]
    assert [list(i) for _, i in seen.batches] == [list(b) for e in (0, 1) for b in batches(60, 40, 1, e)]


def test_a_logged_loss_is_the_mean_over_videos():
    seen = Record()
    got = learner(seen, epochs=1).fit()
    for k in ("audio", "visual", "video"):
        want = sum(t[k] * len(i) for t, (_, i) in zip(seen.terms, seen.batches)) / 60
        assert got.history[0]["loss"][k] == pytest.approx(want, rel=1e-5)


def test_scores_of_an_epoch_are_means_over_labels():
    class Keep(Callback):
        audio, visual = [], []
        def after_loss(self, ln):
            for p, out in ((ln.parsing.audio, self.audio), (ln.parsing.visual, self.visual)):
                out.extend(p.detach()[ln.batch.weak > 0].tolist())
    got = learner(ScoreCB(), Keep(), epochs=1).fit().history[0]["scores"]
    assert got == pytest.approx({"audio": np.mean(Keep.audio), "visual": np.mean(Keep.visual)}, rel=1e-5)


def test_learning_rates_of_the_recipe():
    "3e-4, divided by ten after every ten epochs"
    seen = Record()
    kw = {k: RECIPE[k] for k in ("lr", "epochs", "step", "factor")}
    got = learner(seen, train=toy_clips(4), batch_size=4, **kw).fit()
    want = [3e-4 * 10.**-(e // 10) for e in range(40)]
    assert seen.rates == pytest.approx(want, rel=1e-12) and [h["lr"] for h in got.history] == pytest.approx(want, rel=1e-12)


def test_same_seed_same_numbers():
    a, b, c = (learner(epochs=2, seed=s).fit() for s in (1, 1, 2))
    assert losses(a.history) == losses(b.history) and same_weights(a.model, b.model)
    assert losses(a.history) != losses(c.history)


def test_looking_does_not_change_what_is_seen(tmp_path):
    "Validation, progress, checkpoints and whatever somebody draws outside leave the numbers alone"
    class Draw(Callback):
        def after_epoch(self, ln): torch.rand(7)
    want = learner(epochs=3).fit()
    torch.manual_seed(99)
    got = learner(ValidateCB(VALID), Draw(), ProgressCB("off"), CheckpointCB(tmp_path / "c.pt"), epochs=3).fit()
    assert losses(got.history) == losses(want.history) and same_weights(got.model, want.model)


def test_every_epoch_has_its_own_dropout():
    class Draw(Callback):
        def before_batch(self, ln): self.seen = [*getattr(self, "seen", []), tuple(torch.rand(3).tolist())]
    a, b, c = Draw(), Draw(), Draw()
    for cb, seed in ((a, 1), (b, 1), (c, 2)): learner(cb, epochs=4, seed=seed).fit()
    assert a.seen == b.seen and len({*a.seen, *c.seen}) == 2 * 4 * 4


def test_dropout_is_on_in_training_only():
    "None in prediction, and the mode is put back"
    model = toy_han(dropout=.5)
    a, b = predict(model, VALID), predict(model, VALID)
    assert model.training and (a.segments == b.segments).all()
    class Modes(Callback):
        seen = []
        def after_loss(self, ln): self.seen.append((ln.model.training, ln.parsing.video.requires_grad))
    learner(ValidateCB(VALID), Modes(), model=model, epochs=2).fit()
    assert Modes.seen == [(True, True)] * 8


@pytest.mark.parametrize("size", [1, 7, 30, 256])
def test_prediction_does_not_depend_on_the_batch(size):
    model = toy_han().eval()
    got = predict(model, VALID, size)
    b = VALID.batch(slice(None))
    with torch.no_grad(): want = model(b.audio, b.frames, b.motion)
    for k, x in got.arrays().items(): np.testing.assert_allclose(x, getattr(want, k), rtol=1e-5, atol=1e-6)
    assert not model.training and got.video.dtype == np.float32


def test_prediction_passes_arguments_on():
    model = toy_han()
    b = VALID.batch(slice(None))
    with torch.no_grad(): want = model.eval()(b.audio, b.frames, b.motion, cross_attention=False)
    got = predict(model, VALID, cross_attention=False)
    np.testing.assert_allclose(got.segments, want.segments, rtol=1e-5, atol=1e-6)
    assert not np.allclose(got.segments, predict(model, VALID).segments)


# --- selection -------------------------------------------------------------------------------------------------------

class Scores(ValidateCB):
    "Validation with invented scores"
    def __init__(self, scores, **kw):
        super().__init__(VALID, **kw)
        self.scores, self.weights = scores, []
    def score(self, ln):
        self.weights.append({k: v.clone() for k, v in ln.model.state_dict().items()})
        return {"segment/Type@AV": self.scores[ln.epoch - 1], "event/A": -self.scores[ln.epoch - 1]}


@pytest.mark.parametrize("scores, select, kept", [
    ([1., 3., 2., 3., 0.], "segment/Type@AV", 4), ([1., 1., 1., 1., 1.], "segment/Type@AV", 5),
    ([5., 1., 1., 1., 1.], "segment/Type@AV", 1),
    ([1., 3., 2., 3., 0.], "event/A", 5), ([9., 1., 1., 1., 1.], "last", 5), ([0., 0., 0., 0., -1.], "segment/Type@AV", 4)])
def test_the_best_epoch_is_kept_and_ties_go_to_the_later_one(scores, select, kept):
    keep = Scores(scores, select=select)
    got = learner(keep, epochs=5).fit()
    assert keep.best_epoch == kept
    for k, x in got.model.state_dict().items(): assert torch.equal(x, keep.weights[kept - 1][k])


def test_validation_metrics_are_those_of_the_validation_clips():
    got = learner(ValidateCB(VALID, rule="ma"), epochs=2).fit()
    p = predict(got.model, VALID)
    gated = [(p.segments[:, :, m] >= .5) & (x >= .5)[:, None] for m, x in enumerate((p.audio, p.visual))]    # MA's rule by hand
    want = evaluate(*gated, VALID.dense_audio, VALID.dense_visual)
    for level in want.index:
        for name in want.columns: assert got.history[-1]["val"][f"{level}/{name}"] == pytest.approx(want.loc[level, name])


@pytest.mark.parametrize("valid", [None, VALID[:0]])
def test_without_validation_clips(valid):
    got = learner(ValidateCB(valid), epochs=2).fit()
    assert [h["val"] for h in got.history] == [{}, {}]


@pytest.mark.parametrize("kw, message", [
    ({"valid": None, "select": "segment/A"}, "select: there are no dense validation labels.*use select='last'"),
    ({"valid": VALID[:0], "select": "segment/A"}, "no dense validation labels"), ({"valid": VALID, "rule": "hna"}, "did you mean 'han'"),
    ({"valid": toy_clips(3).__class__(["toy00000000_0_5"], *(np.zeros((1, 5, 8), np.float32),) * 3, np.zeros((1, 3), np.float32)),
      "select": "segment/A"}, "no dense validation labels")])
def test_impossible_selections_are_refused(kw, message):
    with pytest.raises(InputError, match=message): ValidateCB(**kw)


def test_an_unknown_metric_is_refused_before_training():
    with pytest.raises(InputError, match="select: 'segment/Type' is not possible"): ValidateCB(VALID, select="segment/Type")


# --- several networks in one module ----------------------------------------------------------------------------------

class Two(nn.Module):
    "Two networks; `scales` are their shares of the learning rate, None: nothing is said about it"
    def __init__(self, scales=None, dropout=0.):
        super().__init__()
        self.nets = nn.ModuleList(toy_han(seed, dropout=dropout) for seed in (0, 1))
        if scales: self.parameter_groups = lambda: [{"params": n.parameters(), "scale": s} for n, s in zip(self.nets, scales)]
    def forward(self, *x):
        p, q = (n(*x) for n in self.nets)
        p.extra["other"] = q
        return p


def both(parsing, batch):
    return {f"{k} {n}": v for n, p in enumerate((parsing, parsing.extra["other"])) for k, v in GuidedLoss()(p, batch).items()}


@pytest.mark.parametrize("scales", [None, (1., 1.), (1., .2), (3., .5)])
def test_networks_in_one_module_are_trained_as_if_alone(scales):
    got = learner(model=Two(scales), loss=both, step=2).fit()
    for n, (net, s) in enumerate(zip(got.model.nets, scales or (1., 1.))):
        alone = learner(model=toy_han(n, dropout=0.), lr=s * 1e-2, step=2).fit()
        for p, q in zip(net.parameters(), alone.model.parameters()): torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        for h, g in zip(got.history, alone.history):
            assert [h["loss"][f"{k} {n}"] for k in g["loss"]] == pytest.approx(list(g["loss"].values()), rel=1e-5)
    assert [h["lr"] for h in got.history] == pytest.approx([1e-2, 1e-2, 1e-3])


def test_rates_of_one_are_no_rates_at_all():
    a, b = (learner(model=Two(s, dropout=.1), loss=both).fit() for s in (None, (1., 1.)))
    assert same_weights(a.model, b.model) and losses(a.history) == losses(b.history)


def test_a_network_without_groups_has_one_without_a_scale():
    assert [set(g) for g in learner().opt.param_groups] == [set(torch.optim.Adam(toy_han().parameters()).param_groups[0])]
    assert len(learner(model=Two((1., .2)), loss=both).opt.state_dict()["param_groups"]) == 2


@pytest.mark.parametrize("groups, message", [
    (lambda m: [{"params": m.nets[0].parameters()}], "'nets.1.project.audio.weight' is in 0 groups"),
    (lambda m: [{"params": n.parameters()} for n in (*m.nets, m.nets[1])], "'nets.1.project.audio.weight' is in 2 groups"),
    (lambda m: [{"params": m.parameters(), "scale": s} for s in (0.,)], "scale 0.0 is not possible"),
    (lambda m: [{"params": m.parameters(), "scale": float("inf")}], "scale inf"), (lambda m: [{"params": m.parameters(), "scale": float("nan")}], "scale nan")])
def test_impossible_groups_are_refused(groups, message):
    model = Two()
    model.parameter_groups = lambda: groups(model)
    with pytest.raises(InputError, match=message): learner(model=model, loss=both)


def test_what_is_not_trained_needs_no_group():
    model = Two()
    model.nets[1].requires_grad_(False)
    model.parameter_groups = lambda: [{"params": model.nets[0].parameters(), "scale": .5}]
    before = {k: v.clone() for k, v in model.nets[1].state_dict().items()}
    got = learner(model=model).fit()
    assert all(torch.equal(v, before[k]) for k, v in got.model.nets[1].state_dict().items())


@pytest.mark.parametrize("at", [(1, 0), (2, 1)])
def test_an_interrupted_pair_continues_bit_for_bit(tmp_path, at):
    def run(path, *more): return kept_run(path, *more, model=Two((1., .2), dropout=.1), loss=both)[0]
    want = run(tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt): run(tmp_path / "c.pt", StopAt(*at))
    got = run(tmp_path / "c.pt")
    assert same_weights(got.model, want.model) and losses(got.history) == losses(want.history)
    assert [g["scale"] for g in got.opt.param_groups] == [1., .2]
    with pytest.raises(InputError, match="its optimiser has other groups"): kept_run(tmp_path / "c.pt", model=Two(), loss=both)


# --- checkpoints -----------------------------------------------------------------------------------------------------

def kept_run(path, *extra, select="segment/Type@AV", epochs=4, **kw):
    keep = ValidateCB(VALID, select=select)
    got = learner(*extra, keep, CheckpointCB(path, "toy"), epochs=epochs, step=2, **kw).fit()
    return got, keep


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory): return kept_run(tmp_path_factory.mktemp("whole") / "c.pt")


@pytest.mark.parametrize("at", [(0, 0), (1, 0), (1, 3), (2, 1), (3, 3)])
def test_an_interrupted_run_continues_bit_for_bit(tmp_path, uninterrupted, at):
    want, keep = uninterrupted
    with pytest.raises(KeyboardInterrupt): kept_run(tmp_path / "c.pt", StopAt(*at))
    assert (tmp_path / "c.pt").exists() == (at[0] > 0)
    got, kept = kept_run(tmp_path / "c.pt")
    assert [{k: v for k, v in h.items() if k != "seconds"} for h in got.history] == [
        {k: v for k, v in h.items() if k != "seconds"} for h in want.history]
    assert same_weights(got.model, want.model) and kept.best_epoch == keep.best_epoch
    a, b = got.opt.state_dict()["state"], want.opt.state_dict()["state"]
    assert all(torch.equal(a[i][k], b[i][k]) for i in a for k in a[i])


def test_interrupted_in_every_epoch(tmp_path, uninterrupted):
    for e in range(4):
        with pytest.raises(KeyboardInterrupt): kept_run(tmp_path / "c.pt", StopAt(e, e))
    assert same_weights(kept_run(tmp_path / "c.pt")[0].model, uninterrupted[0].model)


def test_a_finished_checkpoint_trains_no_more(tmp_path, uninterrupted):
    kept_run(tmp_path / "c.pt")
    seen = Record()
    got, keep = kept_run(tmp_path / "c.pt", seen)
    assert seen.moments == ["before_fit", "after_fit"] and same_weights(got.model, uninterrupted[0].model)
    assert keep.best_epoch == uninterrupted[1].best_epoch


def test_checkpoint_before_validation_in_the_list(tmp_path):
    "The order of callbacks must not decide whether the last epoch's score and best state survive"
    def go(*extra):
        keep = ValidateCB(VALID, select="segment/Type@AV")
        return learner(CheckpointCB(tmp_path / "c.pt"), keep, *extra, epochs=4).fit(), keep
    with pytest.raises(KeyboardInterrupt): go(StopAt(2, 0))
    assert [bool(h.get("val")) for h in go()[0].history] == [True] * 4


@pytest.mark.parametrize("kw, signature", [({}, "other"), ({"seed": 2}, "toy")])
def test_the_checkpoint_of_another_run_is_refused(tmp_path, kw, signature):
    path = tmp_path / "c.pt"
    kept_run(path, epochs=1)
    before = file_hash(path)
    with pytest.raises(InputError, match=r"c\.pt: is the checkpoint of another run.*delete it"):
        learner(CheckpointCB(path, signature), **kw).fit()
    assert file_hash(path) == before


@pytest.mark.parametrize("how", ["cut", "text", "empty", "flipped", "folder"])
def test_a_damaged_checkpoint_is_refused_and_left_alone(tmp_path, how):
    path = tmp_path / "c.pt"
    kept_run(path, epochs=1)
    data = bytearray(path.read_bytes())
    if how == "folder":
        path.unlink()
        path.mkdir()
    else:
        data[100:160] = bytes(60)                                                # inside the list of what the file holds
        path.write_bytes({"cut": bytes(data[:-2000]), "text": b"not a checkpoint", "empty": b"", "flipped": bytes(data)}[how])
    before = None if how == "folder" else file_hash(path)
    with pytest.raises(InputError, match=r"c\.pt: is damaged .*delete it to start this run again"): kept_run(path)
    assert before is None or file_hash(path) == before


@pytest.mark.parametrize("content", [{"a": 1}, [1], torch.zeros(3)])
def test_a_file_that_holds_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(InputError, match=r"c\.pt: "): kept_run(tmp_path / "c.pt")


def test_a_checkpoint_with_a_flipped_bit_is_refused(tmp_path):
    path = tmp_path / "c.pt"
    kept_run(path, epochs=1)
    weight = CheckpointCB(path).read()["model"]["layers.0.ffn1.weight"].numpy().tobytes()
    data = bytearray(path.read_bytes())
    data[bytes(data).index(weight) + 40] ^= 4
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"c\.pt: is damaged"): kept_run(path)


class Evil:
    "Writes a file when it is unpickled"
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return open, (self.path, "w")


def test_a_checkpoint_with_code_is_refused_and_not_executed(tmp_path):
    torch.save({"signature": "toy", "seed": 1, "x": Evil(tmp_path / "executed")}, tmp_path / "c.pt")
    with pytest.raises(InputError, match=r"c\.pt: is damaged"): kept_run(tmp_path / "c.pt")
    assert not (tmp_path / "executed").exists()


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, uninterrupted):
    path, real, calls = tmp_path / "c.pt", core.os.fsync, []
    def fsync(fd):
        calls.append(fd)
        if len(calls) == 3: raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)
    monkeypatch.setattr(core.os, "fsync", fsync)
    with pytest.raises(InputError, match=r"c\.pt: could not be written \(No space left on device\)"): kept_run(path)
    assert CheckpointCB(path).read()["epoch"] == 2 and [p.name for p in tmp_path.iterdir()] == ["c.pt"]
    monkeypatch.undo()
    assert same_weights(kept_run(path)[0].model, uninterrupted[0].model)


# --- what stops a run ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("value, said", [(np.nan, "nan"), (np.inf, "nan|inf")])
@pytest.mark.parametrize("where", ["audio", "frames"])
def test_a_bad_number_is_traced_to_epoch_and_batch(value, said, where):
    clips = toy_clips(60)
    getattr(clips, where)[17, 2, 3] = value
    batch = next(i for i, b in enumerate(batches(60, 16, 1, 0)) if 17 in b)
    with pytest.raises(NotFiniteError, match=rf"loss term '\w+' is ({said}) in epoch 1, batch {batch + 1}\."):
        learner(train=clips).fit()


@pytest.mark.parametrize("term", ["audio", "visual", "video"])
def test_the_offending_term_is_named_and_nothing_of_it_is_saved(tmp_path, term):
    class Breaks:
        "A loss whose `term` becomes NaN in the third batch of the second epoch"
        calls = 0
        def __call__(self, parsing, batch):
            self.calls += 1
            terms = GuidedLoss()(parsing, batch)
            return {k: v * (torch.nan if k == term and self.calls == 4 + 3 else 1) for k, v in terms.items()}
    path = tmp_path / "c.pt"
    with pytest.raises(NotFiniteError, match=rf"loss term '{term}' is nan in epoch 2, batch 3\. Lower the learning rate"):
        learner(CheckpointCB(path), loss=Breaks()).fit()
    saved = CheckpointCB(path).read()
    assert saved["epoch"] == 1 and all(x.isfinite().all() for x in saved["model"].values())


def test_terms_are_checked_with_their_own_batch_numbers():
    """On a GPU several batches are looked at together"""
    values = torch.ones(5, 3)
    check_terms(values, list("abc"), 0, 10)
    values[3, 1] = -torch.inf
    with pytest.raises(NotFiniteError, match="'b' is -inf in epoch 3, batch 14"): check_terms(values, list("abc"), 2, 10)


def test_the_checks_of_a_gpu_run_cover_every_batch(monkeypatch):
    "With 64 batches between two looks, all batches are looked at, whatever their number"
    from avvp_nb.train import learner as module
    looked = []
    monkeypatch.setattr(module, "check_terms", lambda v, names, epoch, first: looked.extend(range(first, first + len(v))))
    ln = learner(train=toy_clips(150), batch_size=1, epochs=1)
    class Pretends:
        "The processor under the name of a GPU"
        type = "cuda"
    ln.device = Pretends()
    ln.train.batch = lambda idx, device: toy_clips(150)[idx].batch(slice(None))
    ln.seed, ln.log = 1, {}
    monkeypatch.setattr(module.torch, "tensor", lambda x, device=None: torch.as_tensor(x))
    ln.one_epoch()
    assert looked == list(range(150))


def test_devices():
    assert pick_device("cpu").type == "cpu" and pick_device().type in ("cpu", "cuda")
    for name in ("gpu0", "cuda:99"):
        with pytest.raises(InputError, match=f"device: '{name}' cannot be used .*expected 'auto', 'cpu' or 'cuda'"): pick_device(name)
    with pytest.raises(InputError, match="precision: 'fp8' is not possible. expected one of 'fp32', 'tf32', 'bf16'"): learner(precision="fp8")


def test_bfloat16_is_close_and_keeps_float32_weights(monkeypatch):
    monkeypatch.setenv("AVVP_SLOW_BF16", "1")   # also where it takes long
    half, full = learner(precision="bf16", epochs=4).fit(), learner(epochs=4).fit()
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    for h, f in zip(losses(half.history), losses(full.history)):
        assert h != f and sum(h.values()) == pytest.approx(sum(f.values()), rel=.05)
    class Products(Callback):
        def before_fit(self, ln):
            self.seen = []
            ln.model.project.audio.register_forward_hook(lambda m, x, y: self.seen.append(y.dtype))
    cb = Products()
    learner(cb, precision="bf16", epochs=1).fit()
    assert set(cb.seen) == {torch.bfloat16}
    assert same_weights(half.model, learner(precision="bf16", epochs=4).fit().model)


def test_deterministic_mode_lasts_as_long_as_the_fit():
    class Asks(Callback):
        def after_loss(self, ln): assert torch.are_deterministic_algorithms_enabled()
    class Fails(Callback):
        def after_epoch(self, ln): raise RuntimeError
    want = learner(epochs=1).fit()
    assert same_weights(learner(Asks(), deterministic=True, epochs=1).fit().model, want.model)
    with pytest.raises(RuntimeError): learner(Asks(), Fails(), deterministic=True).fit()
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic_mode(False): assert not torch.are_deterministic_algorithms_enabled()


# --- progress --------------------------------------------------------------------------------------------------------

def test_a_line_an_epoch(capsys):
    learner(ValidateCB(VALID), ProgressCB("lines"), epochs=3).fit()
    lines = capsys.readouterr().out.splitlines()
    assert [x[:9] for x in lines] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert all("lr 1.0e-02" in x and "(audio " in x and "val Type@AV " in x and x.endswith(" s") for x in lines)


def test_silence_and_bars(capsys):
    pytest.importorskip("tqdm")
    learner(ProgressCB("off"), epochs=1).fit()
    assert capsys.readouterr() == ("", "")
    learner(ProgressCB("bar"), epochs=2).fit()
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2 and "epoch 1/2" in err and "/4 [" in err
    learner(ProgressCB("auto"), epochs=1).fit()                                 # nobody is watching
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match="progress: 'loud'"): ProgressCB("loud")


def test_in_jupyter_one_line_is_replaced(monkeypatch, capsys):
    "A handle that stands for a line of a notebook"
    class Handle:
        shown = []
        def update(self, data, raw): self.shown.append(data["text/plain"])
    from avvp_nb.train import callbacks as module
    monkeypatch.setattr(module, "_handle", Handle)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    clock = iter(np.arange(0., 1e4, .6))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    learner(ProgressCB(), epochs=2).fit()
    assert Handle.shown[0].startswith("epoch 1/2, batch 1/4, about") and Handle.shown[-1].startswith("2 epochs in")
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_the_line_of_an_epoch():
    log = {"epoch": 7, "lr": 3e-5, "loss": {"audio": .25, "video": .5}, "val": {"segment/Type@AV": 41.27}, "seconds": 61.04}
    assert epoch_line(log, 40) == "epoch  7/40  lr 3.0e-05  loss 0.750 (audio 0.250 video 0.500)  val Type@AV 41.3  61.0 s"


# --- extension -------------------------------------------------------------------------------------------------------

def test_a_callback_may_change_the_batch_and_the_gradients():
    class Zero(Callback):
        def before_batch(self, ln): ln.batch = ln.batch._replace(labels={"audio": 0 * ln.batch.weak})
        def after_backward(self, ln):
            for p in ln.model.parameters(): p.grad = None
    model = toy_han()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    got = learner(Zero(), model=model, epochs=1).fit()
    assert all(torch.equal(v, before[k]) for k, v in got.model.state_dict().items())
    assert not math.isclose(got.history[0]["loss"]["audio"], learner(epochs=1).fit().history[0]["loss"]["audio"])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_same_losses():
    kw = dict(lr=1e-2, epochs=3)
    cpu = Learner(toy_han(dropout=0.), TRAIN, GuidedLoss(), device="cpu", **kw).fit()
    gpu = Learner(toy_han(dropout=0.), TRAIN, GuidedLoss(), device="cuda", **kw).fit()
    for a, b in zip(losses(cpu.history), losses(gpu.history)): assert a == pytest.approx(b, rel=2e-2)
    broken = toy_clips(60)
    broken.audio[17] = np.nan
    with pytest.raises(NotFiniteError, match="in epoch 1, batch"): Learner(toy_han(), broken, GuidedLoss(), device="cuda").fit()
    assert isinstance(gpu.model.head.maps[0], nn.Linear)
