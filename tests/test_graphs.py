"""A recorded step is the step: the same history and weights to the last bit, on a tape everywhere, as a CUDA graph on a GPU."""
import functools
import shutil
import warnings
from dataclasses import replace

import micro
import numpy as np
import pytest
import test_stack as other
import torch
from test_stack import FIT, RUNS, log
from tree import ROOT

from avvp_nb.cli import main
from avvp_nb.core import InputError
from avvp_nb.methods.losses import GuidedLoss
from avvp_nb.records.spec import RunSpec
from avvp_nb.runs.single import run
from avvp_nb.runs.stacked import run_many, run_stacked
from avvp_nb.train import graphs, learner
from avvp_nb.train.callbacks import CheckpointCB, ProgressCB, ScoreCB, ValidateCB
from avvp_nb.train.graphs import CudaTape, Recorded, Tape
from avvp_nb.train.lanes import Lane
from avvp_nb.train.learner import Callback, Learner
from avvp_nb.train.stack import StackedLearner

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
STEADY = [k for k in RUNS if k not in ("cmpae", "padded")]


@pytest.fixture(autouse=True)
def tape(monkeypatch):
    "Without a GPU a tape takes the place of the CUDA graph"
    monkeypatch.setattr(learner, "tape_for", lambda device: CudaTape if torch.device(device).type == "cuda" else Tape)


@functools.lru_cache
def features(device): return {k: getattr(other.TRAIN.to(device), k) for k in ("audio", "frames", "motion")}


def resident(kind, device, **more):
    "`kind` with the features of `test_stack.TRAIN` on the device, the same for all lanes"
    def make(model, clips, loss, **kw):
        return kind(model, replace(clips.to(device), **features(device)), loss, **{**FIT, **kw, **more, "device": device})
    return make


def both(name, device, kind=Learner, runs=1):
    "The same runs, ordinary and recorded"
    return [[RUNS[name](r, resident(kind, device, engine=e)) for r in range(runs)] for e in ("eager", "graphs")]


def same_to_the_last_bit(a, b):
    assert log(a) == log(b)
    for (k, x), (_, y) in zip(a.model.state_dict().items(), b.model.state_dict().items(), strict=True): assert torch.equal(x, y), k
    for x, y in zip(a.opt.state_dict()["state"].values(), b.opt.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(x[k], y[k]) for k in x)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", STEADY)
def test_a_recorded_run_is_the_run(name, device, capsys):
    (plain,), (recorded,) = both(name, device)
    same_to_the_last_bit(plain.fit(), recorded.fit())
    assert recorded.recorded.replays == 1 and recorded.recorded.failure is None    # of 3 whole batches one is ordinary, one is recorded
    warm = "jomold" in name
    assert ("epoch 1 is not recorded: DenoiseCB does not treat all batches of an epoch alike" in capsys.readouterr().out) == warm


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", STEADY)
def test_a_recorded_stack_is_the_stack(name, device):
    plain, recorded = both(name, device, Lane, 4)
    one, two = StackedLearner(plain).fit(), StackedLearner(recorded).fit()
    assert not one.failed and not two.failed and two.recorded.replays == 1 and two.recorded.failure is None
    for a, b in zip(plain, recorded): same_to_the_last_bit(a, b)


@pytest.mark.parametrize("settings", [dict(noise=True), dict(noise=False), dict(apply="update"), dict(measure="score", target="encoder")])
def test_modulation_is_recorded(settings):
    from avvp_nb.methods.dgm import DGM, DGMNet, MSDULoss
    def fitted(engine):
        return Learner(DGMNet(micro.toy_han()), micro.toy_clips(70).to("cpu"), MSDULoss(GuidedLoss()), **FIT, callbacks=[DGM(.5, **settings)], engine=engine).fit()
    plain, recorded = fitted("eager"), fitted("graphs")
    same_to_the_last_bit(plain, recorded)
    assert recorded.recorded.replays == 2 and recorded.history[-1]["dgm"]["omega"] != recorded.history[0]["dgm"]["omega"]


# --- what is not recorded --------------------------------------------------------------------------------------------

class Look(Callback):
    def __init__(self): self.seen = []
    def after_loss(self, learner): self.seen.append((learner.i, sum(learner.terms.values()).item()))


class Sure(Look):
    "Says something that isn't true"
    def steady(self, learner): return True


def fitted(engine="graphs", callbacks=(), clips=None, model=None, **kw):
    return Learner(model or micro.toy_han(), micro.toy_clips(70).to("cpu") if clips is None else clips, GuidedLoss(), **{**FIT, **kw}, callbacks=callbacks, engine=engine).fit()


def test_a_callback_that_looks_at_every_batch_is_heard(capsys):
    a, b = Look(), Look()
    same_to_the_last_bit(fitted("eager", [a]), fitted("graphs", [b]))
    assert a.seen == b.seen and len(a.seen) == 5 * 5
    assert capsys.readouterr().out.count("is not recorded: Look does not treat all batches of an epoch alike") == 1


def test_a_step_that_cannot_be_recorded_goes_on_without(capsys):
    cb = Sure()
    found = fitted("graphs", [cb])
    assert len(cb.seen) >= 5 * 5 and found.epoch == 5 and "_local_scalar_dense" in found.recorded.failure
    assert capsys.readouterr().out.count("the step could not be recorded, going on without: RuntimeError") == 1


def test_out_of_memory_while_recording_is_raised():
    def step(at): raise torch.OutOfMemoryError("full")
    recorded = Recorded(step, Tape, torch.zeros(2, dtype=torch.long), warm=0)
    with pytest.raises(torch.OutOfMemoryError): recorded(torch.zeros(2, dtype=torch.long))
    assert not recorded.recording


def test_features_elsewhere_and_videos_of_many_lengths_are_named(capsys):
    fitted(clips=micro.toy_clips(40), epochs=1)
    other.padded(0, lambda model, clips, loss, **kw: Learner(model, clips.to("cpu"), loss, **{**FIT, **kw}, engine="graphs").fit())
    out = capsys.readouterr().out
    assert "epoch 1 is not recorded: the features are not on the device" in out and "epoch 1 is not recorded: videos differ in length" in out


def test_an_engine_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(learner, "tape_for", graphs.tape_for)
    with pytest.raises(InputError, match="engine: 'graphs' needs a GPU. expected 'eager' or 'compile' or 'quick-dropout' or 'onednn' on cpu"): fitted("graphs")
    with pytest.raises(InputError, match="engine: 'grafs' is not possible"): fitted("grafs")


def test_a_failing_lane_is_not_blamed_on_the_recording(capsys):
    "An error while recording belongs to the recording, and no lane is lost by it"
    clips = micro.toy_clips(70).to("cpu")
    lanes = [Lane(micro.toy_han(r), clips, GuidedLoss(), **FIT, seed=r, callbacks=[Sure()], engine="graphs") for r in range(2)]
    done = StackedLearner(lanes).fit()
    assert not done.failed and all(lane.epoch == 5 for lane in lanes) and "going on without" in capsys.readouterr().out


def test_a_lane_that_diverges_costs_itself_only():
    def made(engine):
        clips = micro.toy_clips(70).to("cpu")
        lanes = [Lane(micro.toy_han(r), clips, GuidedLoss(), **{**FIT, "lr": (5e-3, 1e30, 2e-3)[r]}, seed=r, callbacks=[ScoreCB()], engine=engine) for r in range(3)]
        return lanes, StackedLearner(lanes).fit()
    (a, one), (b, two) = made("eager"), made("graphs")
    assert [x.seed for x in two.failed] == [x.seed for x in one.failed] == [1] and str(two.failed[0].error) == str(one.failed[0].error)
    for r in (0, 2): same_to_the_last_bit(a[r], b[r])


# --- beside everything else ------------------------------------------------------------------------------------------

def test_a_recorded_run_goes_on_from_a_checkpoint_of_either_kind(tmp_path):
    whole = fitted("eager", [ScoreCB()])
    for first, then in (("eager", "graphs"), ("graphs", "eager")):
        path = tmp_path / f"{first}.pt"
        fitted(first, [ScoreCB(), CheckpointCB(path)], epochs=2)
        same_to_the_last_bit(whole, fitted(then, [ScoreCB(), CheckpointCB(path)]))


def test_progress_is_told_of_every_batch():
    count = []
    class Counting(ProgressCB):
        def after_batch(self, learner): count.append(learner.i)
    found = fitted("graphs", [Counting("bar")], epochs=1)
    assert count == list(range(5)) and found.recorded.replays == 2


def test_validation_sees_the_weights_of_the_recording():
    plain, recorded = (fitted(e, [ValidateCB(micro.toy_clips(30, seed=1), select="segment/Type@AV")]) for e in ("eager", "graphs"))
    same_to_the_last_bit(plain, recorded)
    assert len({h["val"]["segment/Type@AV"] for h in recorded.history}) > 1


def test_tf32_is_float32_on_a_cpu_and_is_switched_back():
    before = torch.backends.cuda.matmul.allow_tf32
    same_to_the_last_bit(fitted("eager"), fitted("eager", precision="tf32"))
    assert torch.backends.cuda.matmul.allow_tf32 == before


def test_gathering_on_the_device_is_the_batch():
    clips = micro.toy_clips(20).with_labels(removed_audio=np.eye(20, 3)).to("cpu")
    at = torch.tensor([3, 0, 19])
    for x, y in zip(clips.gather(at)[:5], clips.batch(at.numpy())[:5]): assert torch.equal(x, y)
    assert torch.equal(clips.gather(at).labels["removed_audio"], clips.batch(at.numpy()).labels["removed_audio"])


# --- torch.compile ---------------------------------------------------------------------------------------------------

def compiled(monkeypatch, backend):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    plain, found = (fitted(e, model=micro.toy_han(dropout=0.), callbacks=[ScoreCB()]) for e in ("eager", "compile"))
    other.close([h["loss"] for h in log(plain)], [h["loss"] for h in log(found)], 1e-5)
    assert found.net is not found.model and list(found.model.state_dict()) == list(plain.model.state_dict())


def test_a_compiled_network_has_the_losses_of_the_network(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled(monkeypatch, "aot_eager")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_generated_code_has_the_losses_of_the_network(monkeypatch): compiled(monkeypatch, "inductor")


def test_a_stack_is_not_compiled():
    lanes = [Lane(micro.toy_han(r), micro.toy_clips(20), GuidedLoss(), **FIT, seed=r, engine="compile") for r in range(2)]
    with pytest.raises(InputError, match="engine: 'compile' knows single runs only"): StackedLearner(lanes)


# --- runs ------------------------------------------------------------------------------------------------------------

def test_a_run_says_with_which_engine(tmp_path, monkeypatch):
    micro.install(monkeypatch.setitem)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    spec = RunSpec("han", scale="micro")
    plain, (compiled,) = run(spec, tmp_path / "a", "cpu", "off"), run_many([spec], tmp_path / "b", "cpu", "off", engine="compile")
    assert compiled["hardware"]["engine"] == "compile" and "engine" not in plain["hardware"] and compiled["key"] == plain["key"]
    assert [h["loss"] for h in compiled["history"]] == [h["loss"] for h in plain["history"]]


def test_an_engine_that_is_not_there_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(learner, "tape_for", graphs.tape_for)
    for f in (run, lambda spec, *args, **kw: run_many([spec], *args, **kw), lambda spec, *args, **kw: run_stacked([spec], *args, **kw)):
        with pytest.raises(InputError, match="engine: 'graphs' needs a GPU"): f(RunSpec("han"), tmp_path / "s", "cpu", "off", engine="graphs")
    assert not (tmp_path / "s").exists()
    for command in (["run", "han"], ["reproduce", "han"]):
        assert main([*command, "--engine", "graphs", "--device", "cpu", "--out", str(tmp_path / "s")]) == 2
        assert "engine: 'graphs' needs a GPU" in capsys.readouterr().err
    assert not (tmp_path / "s" / "records").exists()
    monkeypatch.setenv("RANK", "0")
    assert main(["run", "han", "--parallel", "--engine", "compile", "--out", str(tmp_path / "s")]) == 2
    assert "--engine: is not supported in several processes" in capsys.readouterr().err


# --- the benchmark ---------------------------------------------------------------------------------------------------

def test_the_benchmark_compares_engines_before_it_times_them(monkeypatch):
    "On a tape, and without a compiler: that it runs, what it says, and that it finds engines that differ"
    monkeypatch.syspath_prepend(ROOT)
    from bench import engines
    monkeypatch.setattr(engines, "tape_for", lambda device: Tape)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    full = engines.measure.bench_learner
    monkeypatch.setattr(engines.measure, "bench_learner", lambda clips, **kw: full(clips.to("cpu"), **{**kw, "dim": 16}))
    found = engines.run(rounds=1, sizes=(4,))
    assert found["largest relative loss difference"]["graphs"] == 0 and found["largest relative loss difference"]["compile"] < 1e-5
    assert found["batch 4"]["ratio, graphs to eager"] > 0 and found["batch 4"]["compile, first epoch, s"] > 0

    class Forgetful(Tape):
        def again(self): pass
    monkeypatch.setattr(learner, "tape_for", lambda device: Forgetful)
    with pytest.raises(AssertionError, match="losses with graphs differ"): engines.run(rounds=1, sizes=(4,))
