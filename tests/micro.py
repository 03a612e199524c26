"""Small things that several suites share: toy clips, toy networks, runs that take a fraction of a second, and processes
that can be killed. Started as a script it is a server that starts such processes (see `Server`)."""
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from avvp_nb import runs
from avvp_nb.core import file_hash, read_json
from avvp_nb.data import sources
from avvp_nb.data.clips import Clips
from avvp_nb.methods import zoo
from avvp_nb.methods.han import HAN
from avvp_nb.train import learner

torch.set_num_threads(1)
SIZES = dict(classes=3, audio_dim=8, frame_dim=8, motion_dim=8, dim=16)  # of the toy network


def toy_clips(n, seed=0, T=5, C=3, D=8, noise=(.3, .3), **kw):
    "Clips with an event planted in both modalities; `noise` is that of sound and picture"
    rng = np.random.default_rng(seed)
    dense = (rng.random((n, T, C)) < .35).astype(np.uint8)
    code = np.random.default_rng(7).normal(size=(C, D))
    def x(s): return (dense @ code + s * rng.normal(size=(n, T, D))).astype(np.float32)
    return Clips([f"toy{i:08d}_0_{T}" for i in range(n)], x(noise[0]), x(noise[1]), x(noise[1]),
                 dense.max(1).astype(np.float32), dense, dense, source={"simulated": True, "mark": "toy", "split": "toy"}, **kw)


def toy_han(seed=0, **kw):
    "A HAN of 16 dimensions"
    torch.manual_seed(seed)
    return HAN(**{**SIZES, **kw})


def same_weights(a, b):
    "Are two modules equal to the last bit?"
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# --- runs at a micro scale -------------------------------------------------------------------------------------------

SCALE = sources.Scale(48, 16, 16, epochs=3, step=2)  # selects on the validation set, as the paper does


def _small(method):
    "The same method on networks of 32 dimensions"
    def build(plain, sizes, *rest): return method.build(plain, {**sizes, "dim": 32}, *rest)
    return replace(method, build=build)


def install(setitem=dict.__setitem__):
    "Add the scale `micro`, and shrink all networks to 32 dimensions; `monkeypatch.setitem` undoes it after a test"
    setitem(sources.SCALES, "micro", SCALE)
    for name, method in list(zoo.METHODS.items()): setitem(zoo.METHODS, name, _small(method))


def killed_and_continued(tmp_path, monkeypatch, engine):
    "Records of a run with an engine: one that was left alone, and one that was interrupted in its third epoch and called again"
    install(monkeypatch.setitem)
    spec = runs.RunSpec("han", scale="micro", epochs=3)
    def go(folder): return runs.run(spec, tmp_path / folder, "cpu", "off", engine=engine)
    whole, real, count = go("a"), learner.logged_epoch, []

    def killed(one):
        count.append(1)
        if len(count) == 3: raise KeyboardInterrupt
        real(one)
    with monkeypatch.context() as m:
        m.setattr(learner, "logged_epoch", killed)
        with pytest.raises(KeyboardInterrupt): go("b")
    return whole, go("b")


def essence(store, record):
    "All of a finished run that must not depend on how often it was interrupted"
    store = runs.Store(store)
    history = [{k: v for k, v in h.items() if k != "seconds"} for h in record["history"]]
    kept = {k: record[k] for k in ("key", "spec", "selection", "metrics", "floors", "probabilities")}
    with safe_open(store.weight_path(record["key"]), "np") as f:
        weights = {k: hashlib.sha256(f.get_tensor(k).tobytes()).hexdigest() for k in f.keys()} | {"": f.metadata()["avvp_nb"]}
    return {**kept, "history": history, "weights": weights, "arrays": file_hash(store.probability_path(record["key"]))}


def records(store):
    "Finished records of a store, by file name"
    return {p.name: read_json(p) for p in Path(store).glob("records/*.json")}


# --- processes -------------------------------------------------------------------------------------------------------

def die_at(moment):
    "Let this process kill itself at its n-th write: odd moments before a file is renamed into place, even ones after"
    from avvp_nb import core
    count = [0]

    def counted(f):
        def call(*args):
            before = f is os.fsync
            if not before: f(*args)
            count[0] += 1
            if count[0] == moment: os.kill(os.getpid(), signal.SIGKILL)
            if before: f(*args)
        return call

    class Os:
        fsync, replace = staticmethod(counted(os.fsync)), staticmethod(counted(os.replace))
        def __getattr__(self, name): return getattr(os, name)
    core.os = Os()


def die_anywhere(moment, log=None):
    """Let this process kill itself at its n-th change of a file, whoever makes it: odd moments before a file gets its name or is
    safe on disk, even ones after. Moments are counted in the file `log`"""
    count = [0]

    def counted(f):
        def call(*args, **kw):
            for part in (0, 1):
                if part: done = f(*args, **kw)
                count[0] += 1
                if log: Path(log).write_text(str(count[0]))
                if count[0] == moment: os.kill(os.getpid(), signal.SIGKILL)
            return done
        return call
    for name in ("fsync", "replace", "rename"): setattr(os, name, counted(getattr(os, name)))


def train(store, spec, die=None, limit=None, argv=None, log=None):
    """One run, or the command `argv`; `die` is a moment of `die_at` (of `die_anywhere` with a `log` of moments), `limit` the
    largest file in bytes"""
    if log: die_anywhere(die, log)
    elif die: die_at(die)
    if limit:
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if argv:
        from avvp_nb.cli import main
        status = main(argv)
        if status: raise SystemExit(f"status {status}")
        return {}
    return runs.run(runs.RunSpec(**spec), store, device="cpu", progress="lines")


def _fork(out, job):
    "Start `train(**job)` in a child that writes everything it says to the file `out`; returns its process id"
    pid = os.fork()
    if pid: return pid
    status = 1
    try:
        fd = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        print("\n" + json.dumps(train(**job)), flush=True)
        status = 0
    except (Exception, SystemExit) as e: print(f"{type(e).__name__}: {e}", flush=True)
    finally: os._exit(status)


def _wait(pid, out, after=None):
    "Wait for a child, or kill -9 it `after` seconds; how it ended, and what it said"
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    said = Path(out).read_text() if Path(out).exists() else ""
    end = "killed" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL else ("done", "failed")[status != 0]
    return {"end": end, "said": said, "record": json.loads(said.splitlines()[-1]) if end == "done" else None}


class Server:
    "A process that has imported everything and forks, so that a killed attempt costs no import"
    def __init__(self, folder):
        self.out = Path(folder) / "said"
        self.process = command("serve", stdin=subprocess.PIPE)
        self.ask([])  # returns when everything is imported

    def ask(self, jobs, after=None):
        "Run all `jobs` at once, each in a process of its own; with `after`, kill them after so many seconds"
        self.process.stdin.write(json.dumps([str(self.out), jobs, after]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the server of child processes has died"
        return json.loads(answer)

    def run(self, store, after=None, die=None, limit=None, **spec):
        "One child that runs one spec"
        return self.ask([{"store": str(store), "spec": {"scale": "micro", **spec}, "die": die, "limit": limit}], after)[0]

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


def serve():
    "The loop of a `Server`, after a first use of what PyTorch imports late"
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.zeros(2)
    torch.optim.Adam([weight], fused=True).step()
    runs.load_data(runs.DataSpec(), "micro")
    for line in sys.stdin:
        out, jobs, after = json.loads(line)
        started = [(_fork(f"{out}{i}", job), f"{out}{i}") for i, job in enumerate(jobs)]
        print(json.dumps([_wait(pid, file, after) for pid, file in started]), flush=True)


def command(*args, **kw):
    "This file as a process with a fresh interpreter"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, __file__, *args], env=env, text=True, stdout=subprocess.PIPE, **kw)


if __name__ == "__main__":
    install()
    if sys.argv[1] == "serve": serve()
    else: print("\n" + json.dumps(train(**json.loads(sys.argv[2]))), flush=True)
