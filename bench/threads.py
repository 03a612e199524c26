"""What does a busy neighbour cost? `make bench ARGS=threads`

An epoch of HAN (random videos, batch 16) is timed while nothing else of ours runs, and again beside a competitor: a process
that never sleeps, bound to one core. One thread, all threads that spin while they wait, all threads that sleep, and the number
that `avvp_nb.train.threads` chooses, each in a process of its own, since OpenMP reads its settings when it is loaded. What is
printed are ratios to the quiet epoch of one thread and to each one's own quiet epoch, best of several in turns. On a machine
with other work the quiet epochs are not quiet; then the ratios are too small.
"""
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager

import torch

from avvp_nb.data.clips import random_clips
from avvp_nb.runs import measure
from avvp_nb.train.threads import PATIENT, Rules, ThreadsCB
from avvp_nb.train.threads import fit as fit_with_threads

SPIN = "import os\nwhile os.getppid() == {parent}: pass"
WAYS = ("one thread", "all threads, spinning", "all threads, sleeping", "chosen")


@contextmanager
def competitor(core=None):
    "A process beside us that never sleeps, on one core where the system can bind it; it ends with the block, or with us"
    if core is None and hasattr(os, "sched_getaffinity"): core = min(os.sched_getaffinity(0))
    bind = "" if core is None else f"import os\nos.sched_setaffinity(0, {{{core}}})\n"
    process = subprocess.Popen([sys.executable, "-c", bind + SPIN.format(parent=os.getpid())])
    try: yield process
    finally:
        process.kill()
        process.wait()


def epochs(way, n_batches=8, rounds=2, size=16, **kwargs):
    "Seconds of the quickest epoch of this process, quiet and beside the competitor"
    clips, found = random_clips(size * n_batches), {}
    if way == "one thread": torch.set_num_threads(1)
    for name in ("quiet", "busy") * rounds:
        with competitor() if name == "busy" else open(os.devnull):
            time.sleep(0.1)
            learner = measure.bench_learner(clips, batch_size=size, **kwargs)
            if way == "chosen":                  # two epochs to find out, the third one counts
                learner.epochs = 3
                fit_with_threads(learner, "auto", lambda: ThreadsCB(rules=Rules(least=1)))
                seconds = learner.history[-1]["seconds"]
            else:
                measure.start(learner)
                seconds = measure.clock(learner.one_epoch, seconds=0, calls=1, warm=1)
            found[name] = min(found.get(name, seconds), seconds)
    return found


def environment(way):
    "Of the process that measures"
    kept = {k: v for k, v in os.environ.items() if k not in (*PATIENT, "OMP_NUM_THREADS")}
    return {**kept, **(PATIENT if way == "all threads, sleeping" else {})}


def ratios(found):
    "Seconds by way -> what is told of them"
    one, out = found["one thread"]["quiet"], {}
    for way, t in found.items():
        out[way] = {"quiet epoch, s": t["quiet"], "ratio, quiet to one quiet thread": t["quiet"] / one,
                    "ratio, busy to one quiet thread": t["busy"] / one, "ratio, busy to its own quiet": t["busy"] / t["quiet"]}
    return out


def run(ways=WAYS, **kwargs):
    "Every way, each in a process of its own"
    found = {}
    for way in ways:
        code = f"import json\nfrom bench.threads import epochs\nprint(json.dumps(epochs({way!r}, **{kwargs!r})))"
        done = subprocess.run([sys.executable, "-c", code], env=environment(way), capture_output=True, text=True, check=True)
        found[way] = json.loads(done.stdout.splitlines()[-1])
    return ratios(found)
