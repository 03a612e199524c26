"""One run on two processes: the same losses, weights and records as on one, and what happens when a process fails or is killed.

Started by torchrun this file is one of the processes: `test_parallel.py curves OUT`, or `test_parallel.py run '{"store": ...}'`."""
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import micro
import numpy as np
import pytest
import torch
import torch.distributed as dist

from avvp_nb.core import InputError
from avvp_nb.methods.losses import GuidedLoss
from avvp_nb.methods.ma import MALoss
from avvp_nb.methods.zoo import METHODS
from avvp_nb.records.spec import RunSpec
from avvp_nb.records.store import Store
from avvp_nb.runs import parallel
from avvp_nb.runs.parallel import ParallelLearner, agree, process_group, run_parallel, share
from avvp_nb.runs.single import run
from avvp_nb.train.callbacks import CheckpointCB, ScoreCB
from avvp_nb.train.learner import Learner, predict

CASES = {  # name: (videos, batch size, loss, options of the toy network)
    "one video left over": (17, 8, GuidedLoss(), {}),
    "odd shares": (23, 7, GuidedLoss(eps_visual=.2), {"temporal": "gru"}),
    "bootstrap": (20, 6, GuidedLoss(eps_visual=0., beta=.9), {"share_layer": False}),
    "contrast": (21, 5, MALoss(), {}),
    "terms left out": (18, 8, GuidedLoss(w_audio=0., w_visual=0.), {"temporal": "none"}),
    "guided only": (18, 8, GuidedLoss(w_video=0.), {"video": "larger"}),
    "a layer left out": (18, 8, GuidedLoss(), {})}


def network(name):
    "The toy network of a case, without dropout"
    model = micro.toy_han(dropout=0., **CASES[name][3])
    if name == "a layer left out": model.idle = torch.nn.Linear(3, 3)
    return model


def fitted(make, name, epochs=3, **kw):
    "A toy run without dropout: history, weights, and what the network then says of its clips"
    n, batch_size, loss, _ = CASES[name]
    model, clips = network(name), micro.toy_clips(n)
    learner = make(model, clips, loss, lr=1e-2, batch_size=batch_size, epochs=epochs, step=2, device="cpu", callbacks=[ScoreCB()], **kw).fit()
    history = [{k: v for k, v in h.items() if k != "seconds"} for h in learner.history]
    return history, {k: v.clone() for k, v in learner.model.state_dict().items()}, predict(model, clips).segments


def no_dropout(setitem=dict.__setitem__):
    "Micro networks without dropout"
    micro.install(setitem)

    def still(method):
        def build(*args):
            model, *rest = method.build(*args)
            for m in model.modules():
                if isinstance(m, torch.nn.Dropout): m.p = 0.
                if isinstance(m, torch.nn.MultiheadAttention): m.dropout = 0.
            return model, *rest
        return replace(method, build=build)
    for name in ("han", "ma"): setitem(METHODS, name, still(METHODS[name]))


def torchrun(*args, n=2):
    "This file in `n` processes"
    env = {k: v for k, v in os.environ.items() if k not in parallel.NEEDED} | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), __file__, *args],
                            env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def said(process, timeout=300):
    "Everything that was printed, and the exit status"
    return process.communicate(timeout=timeout)[0], process.returncode


# --- shares ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_shares_are_the_batch(world):
    for n in range(1, 20):
        parts = [share(np.arange(100, 100 + n), r, world) for r in range(world)]
        assert sum(w for _, w in parts) == pytest.approx(1) and all(len(i) for i, _ in parts)
        assert np.concatenate([i for i, w in parts if w]).tolist() == list(range(100, 100 + n))
        assert max(len(i) for i, w in parts if w) - min(len(i) for i, w in parts if w) <= 1


@pytest.mark.parametrize("spec, said", [
    (RunSpec("dgm", backbone="han"), "dgm looks across the videos of a batch"), (RunSpec("jomold"), "jomold looks across"),
    (RunSpec("ogm"), "ogm looks across"), (RunSpec("han", rule="cmpae"), "rule: is not supported in several processes")])
def test_what_cannot_be_shared_out_is_refused_before_anything_starts(tmp_path, spec, said):
    with pytest.raises(InputError, match=said): run_parallel([spec], tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", [m for m, entry in METHODS.items() if entry.separable])
def test_what_is_shared_out_has_no_callbacks_of_its_own(name):
    "They would see a share and take it for the batch"
    assert METHODS[name].build(RunSpec(name).plain(), {"classes": 3, "audio_dim": 8, "frame_dim": 8, "motion_dim": 8})[2] == []


def test_without_torchrun_it_is_said_how(tmp_path, monkeypatch):
    for k in parallel.NEEDED: monkeypatch.delenv(k, raising=False)
    with pytest.raises(InputError, match="--parallel: not started by torchrun. expected torchrun --standalone"): run_parallel([RunSpec()], tmp_path)


@pytest.mark.parametrize("error, text", [
    (RuntimeError("[/x/gloo/pair.cc:1] Connection closed by peer [127.0.0.1]:1"), "another process has ended"),
    (InputError("no such file", where="x"), "InputError: x: no such file"), (RuntimeError("size mismatch"), "RuntimeError: size mismatch")])
def test_blame(error, text): assert parallel.blame(error).startswith(text)


# --- the same numbers ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    "Histories and weights of all cases on two processes"
    out = tmp_path_factory.mktemp("curves")
    text, status = said(torchrun("curves", str(out)))
    assert status == 0, text
    return [torch.load(out / f"{r}.pt", weights_only=False) for r in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_the_loss_curve_of_two_processes_is_that_of_one(curves, name):
    "Weights are not compared: where the exact gradient is 0, such as that of a key's bias, Adam turns rounding into steps"
    history, _, said = fitted(Learner, name)
    for rank in range(2):
        other, _, theirs = curves[rank][name]
        assert [list(h) for h in other] == [list(h) for h in history]
        for a, b in zip(history, other):
            assert b["loss"] == pytest.approx(a["loss"], rel=2e-5) and b["lr"] == a["lr"] and b["scores"] == pytest.approx(a["scores"], rel=2e-5)
        np.testing.assert_allclose(theirs, said, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_processes_end_with_equal_weights(curves, name):
    a, b = (c[name][1] for c in curves)
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["project.audio.weight"], network(name).state_dict()["project.audio.weight"])


@pytest.mark.parametrize("name, idle", [("contrast", []), ("a layer left out", ["idle.weight", "idle.bias"])])
def test_parameters_that_take_no_part_are_known(name, idle):
    learner = Learner(network(name), micro.toy_clips(3), CASES[name][2], device="cpu")
    assert parallel.unused(learner) == idle and learner.model.training and all(p.grad is None for p in learner.model.parameters())


def test_a_mean_of_unweighted_shares_would_not_pass():
    "The test above sees the difference that it is there to see: shares of one batch have different losses"
    n, batch_size, loss, _ = CASES["one video left over"]
    clips, model = micro.toy_clips(n), micro.toy_han(dropout=0.)
    def total(idx):
        b = clips.batch(idx)
        return sum(loss(model(*b.features), b).values()).item()
    idx = np.arange(5)
    parts = [share(idx, r, 2) for r in range(2)]
    assert sum(w * total(i) for i, w in parts) == pytest.approx(total(idx), rel=1e-5)
    assert abs(np.mean([total(i) for i, _ in parts]) - total(idx)) > 1e-4


# --- runs ------------------------------------------------------------------------------------------------------------

SPECS = [dict(method="han"), dict(method="ma", options={"refine": "audio"})]


def start(store, n=2, **kw): return torchrun("run", json.dumps({"store": str(store), **kw}), n=n)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "The same runs on one process"
    store = Store(tmp_path_factory.mktemp("alone"))
    with pytest.MonkeyPatch.context() as m:
        no_dropout(m.setitem)
        return {r["key"]: r for r in [run(RunSpec(**{"scale": "micro", **s}), store, "cpu", "off") for s in SPECS]}, store


def same_run(ours, theirs, store, other_store):
    "Equal but for rounding"
    assert [h["epoch"] for h in ours["history"]] == [h["epoch"] for h in theirs["history"]]
    for a, b in zip(ours["history"], theirs["history"]): assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
    np.testing.assert_allclose(other_store.probabilities(theirs).segments, store.probabilities(ours).segments, atol=2e-3)
    assert {k: v for k, v in ours.items() if k in ("key", "spec", "selection", "floors", "first", "rule")} == {
        k: v for k, v in theirs.items() if k in ("key", "spec", "selection", "floors", "first", "rule")}


@pytest.mark.slow
def test_two_processes_make_the_records_of_one(tmp_path, alone):
    "In stages too: MA's base model and its refined labels are made once and read by both"
    records, store = alone
    text, status = said(start(tmp_path))
    assert status == 0, text
    there = micro.records(tmp_path)
    assert len(there) == 3 and set(records) < {r["key"] for r in there.values()}
    for key, r in records.items():
        theirs = Store(tmp_path).record(key)
        assert theirs["hardware"]["processes"] == 2 and theirs["hardware"]["backend"] == "gloo"
        same_run(r, theirs, store, Store(tmp_path))
    assert text.count("epoch 1/3") == 3 and not any(tmp_path.glob("checkpoints/*"))              # one process talks, nothing is left behind
    assert text.count("threads of the group left: 0") == 2                                        # one that outlives the group may abort the process at its end
    text, status = said(start(tmp_path))                                                          # a second call only reads
    assert status == 0 and "epoch" not in text


@pytest.mark.slow
def test_a_killed_process_ends_all_and_the_next_call_continues(tmp_path, alone):
    records, store = alone
    process = start(tmp_path, specs=SPECS[:1], epochs=60)
    pids, lines = [], []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("pid "): pids.append(int(line.split()[1]))
        if re.match("epoch +3/60", line): break
    assert len(pids) == 2, lines
    os.kill(pids[1], signal.SIGKILL)
    text, status = said(process)
    # whoever notices first says it: the other process, or torchrun, which then ends the other process before it can
    why = f"process [01] of 2 ends: another process has ended|Signal 9 \\(SIGKILL\\) received by PID {pids[1]}"
    assert status != 0 and re.search(why, text + "".join(lines)) and not micro.records(tmp_path)
    text, status = said(start(tmp_path, specs=SPECS[:1], epochs=60))
    (record,) = micro.records(tmp_path).values()
    assert status == 0 and not re.search("epoch +1/60", text) and "epoch 60/60" in text
    with pytest.MonkeyPatch.context() as m:
        no_dropout(m.setitem)
        whole = run(RunSpec("han", scale="micro", epochs=60), tmp_path / "whole", "cpu", "off")
    for a, b in zip(whole["history"], record["history"]): assert b["loss"] == pytest.approx(a["loss"], rel=1e-2)


@pytest.mark.parametrize("fails, message", [
    ("nan", r"process 0 of 2 ends: NotFiniteError: loss term 'audio' is nan in epoch 1, batch 1"),
    pytest.param("share", r"process 1 of 2 ends: InputError: share: out of luck", marks=pytest.mark.slow),
    pytest.param("folder", r"process [01] of 2 ends: InputError: checkpoint: begin at epochs \[2, 0\]", marks=pytest.mark.slow)])
def test_a_process_that_fails_ends_all_with_its_message(tmp_path, fails, message):
    text, status = said(start(tmp_path, specs=SPECS[:1], fails=fails))
    assert status != 0 and re.search(message, text), text
    assert not micro.records(tmp_path)                              # and it did end: nobody waits for the one that failed


# --- processes -------------------------------------------------------------------------------------------------------

def write_curves(out):
    with process_group("cpu"):
        result = {name: fitted(ParallelLearner, name) for name in CASES}
        assert agree(lambda: 7) == 7
        torch.save(result, Path(out) / f"{dist.get_rank()}.pt")


def spoil(fails):
    "Let something go wrong in this process"
    rank, learner = int(os.environ["RANK"]), parallel.ParallelLearner
    if fails == "nan" and rank == 1:
        old = learner.weighted
        learner.weighted = lambda self, loss: lambda p, b: {k: v * float("nan") for k, v in old(self, loss)(p, b).items()}
    if fails == "share" and rank == 1:
        def out_of_luck(*args): raise InputError("out of luck", where="share")
        parallel.share = out_of_luck
    if fails == "folder":                              # only the first process sees the checkpoint
        def before_fit(self, learner): learner.epoch = 2 if rank == 0 else 0
        CheckpointCB.before_fit = before_fit


def run_specs(store, specs=SPECS, fails=None, **kw):
    no_dropout()
    print(f"pid {os.getpid()}", flush=True)
    if fails: spoil(fails)
    run_parallel([RunSpec(**{"scale": "micro", **s, **kw}) for s in specs], store, "cpu", "lines")
    print(f"threads of the group left: {sum('gloo' in f.read_text() for f in Path('/proc/self/task').glob('*/comm'))}", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "curves": write_curves(sys.argv[2])
    else: run_specs(**json.loads(sys.argv[2]))
