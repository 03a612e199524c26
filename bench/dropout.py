"""What do cheaper random numbers bring to dropout? `make bench ARGS=dropout`

Masks of PyTorch and of the engine `quick-dropout`, which decides four elements with one draw (`avvp_nb.train.dropout`). First both
are held to their distribution: the share of zeros of many masks, and of pairs of zeros next to each other; then masks, and epochs
of HAN with either, are timed in turns.
"""
import math

import torch
from torch.nn import functional as F

from avvp_nb.data.clips import random_clips
from avvp_nb.runs import measure
from avvp_nb.train.dropout import word_mask
from bench.training import in_turns

WAYS = {"eager": lambda x, p: F.dropout(x, p), "quick-dropout": lambda x, p: x * word_mask(x.shape, p)}


def deviation(way, p, n=2_000_000):
    "Standard errors by which the share of zeros, and of pairs of zeros next to each other, differ from p and p * p"
    torch.manual_seed(0)
    zero = WAYS[way](torch.ones(n), p) == 0
    share, pairs = zero.double().mean().item(), (zero[1:] & zero[:-1]).double().mean().item()
    return max(abs(share - p) / math.sqrt(p * (1 - p) / n), abs(pairs - p * p) / math.sqrt(p * p * (1 - p * p) * 3 / n))


def run(rounds=5, sizes=(16, 32, 128), n_batches=4, numel=327_680):
    "Masks as large as those of one layer of HAN at batch 32, and epochs of HAN"
    out = {"standard errors from the distribution": {w: max(deviation(w, p) for p in (.1, .2, .5)) for w in WAYS}}
    for w, found in out["standard errors from the distribution"].items():
        if not found < 5: raise AssertionError(f"masks of {w} are {found:.1f} standard errors from their distribution")
    x = torch.randn(numel)
    t = {w: measure.clock(lambda f=f: f(x, .1)) for w, f in WAYS.items()}
    out |= {f"mask, {w}, ns an element": s / numel * 1e9 for w, s in t.items()} | {"ratio, masks": t["eager"] / t["quick-dropout"]}
    for size in sizes:
        clips, jobs = random_clips(size * n_batches), {}
        for e in WAYS:
            learner = measure.bench_learner(clips, batch_size=size, device="cpu", engine=e)
            measure.start(learner)
            jobs[e] = learner.one_epoch
        t = in_turns(jobs, rounds)
        out[f"ratio, epochs at batch {size}"] = t["eager"] / t["quick-dropout"]
    return out
