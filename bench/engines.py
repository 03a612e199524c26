"""What do `torch.compile` and CUDA graphs bring? `make bench ARGS=engines`

HAN is trained on the same random videos with every engine that this machine has: operation by operation (`eager`), through
`torch.compile`, and on a GPU with recorded steps (`graphs`), there also as a stack. The losses of the first epoch are
compared without dropout before anything is timed, and the engines are timed in turns.
"""
import time

import numpy as np
import torch

from avvp_nb.data import clips as clips_
from avvp_nb.runs import measure, parity
from avvp_nb.train.graphs import tape_for
from avvp_nb.train.lanes import Lane
from avvp_nb.train.learner import Learner
from avvp_nb.train.stack import StackedLearner
from bench.training import in_turns


def learner(clips, size, engine, device, kind=Learner, seed=1, dropout=True):
    "A HAN of full width with an engine"
    made = measure.bench_learner(clips, batch_size=size, device=device, engine=engine, seed=seed, learner=kind)
    if not dropout: parity.still(made)
    return made


def started(runs, clips, size, engine, device):
    "What trains one epoch when it is called: one run, or a stack of several"
    if runs == 1:
        one = learner(clips, size, engine, device)
        measure.start(one)
    else:
        one = StackedLearner([learner(clips, size, engine, device, Lane, r) for r in range(runs)])
        measure.start_stack(one)
    return one.one_epoch


def gap(clips, size, engine, device):
    "Largest relative difference of the loss terms of an epoch to those of `eager`, without dropout"
    a, b = (list(learner(clips, size, e, device, dropout=False).fit().history[0]["loss"].values()) for e in ("eager", engine))
    return float(np.abs(np.array(a) / np.array(b) - 1).max())


def at(size, runs, engines, device, rounds, n_batches):
    "Videos per second with each engine, and ratios to `eager`"
    clips = clips_.random_clips(size * n_batches)
    if device != "cpu": clips = clips.to(device)
    out, jobs = {}, {}
    for e in engines:
        start = time.perf_counter()
        jobs[e] = started(runs, clips, size, e, device)
        jobs[e]()
        measure.wait(device)
        out[f"{e}, first epoch, s"] = time.perf_counter() - start
    t = in_turns(jobs, rounds, device)
    out |= {f"{e} videos/s": runs * len(clips) / t[e] for e in engines}
    return out | {f"ratio, {e} to eager": t["eager"] / t[e] for e in engines if e != "eager"}


def run(rounds=5, sizes=(16, 128), device=None):
    "Every engine that there is, at each batch size; alone, and on a GPU in stacks"
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    engines = ("eager", "compile", "graphs") if tape_for(device) else ("eager", "compile")
    small, n_batches = clips_.random_clips(8 * 5), 64 if device == "cuda" else 4
    out = {"largest relative loss difference": {e: gap(small.to(device) if device == "cuda" else small, 8, e, device) for e in engines[1:]}}
    for e, found in out["largest relative loss difference"].items():
        if not found < 1e-3: raise AssertionError(f"losses with {e} differ by {found:.1e} (relative)")
    for size in sizes:
        out[f"batch {size}"] = at(size, 1, engines, device, rounds, n_batches)
        for n in (4, 16, 45) if device == "cuda" else ():
            out[f"batch {size}, {n} stacked"] = at(size, n, ("eager", "graphs"), device, rounds, n_batches)
    return out

