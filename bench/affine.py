"""What does oneDNN bring to linear layers on this processor? `make bench ARGS=affine`

Products of PyTorch and of the engine `onednn` (`avvp_nb.train.affine`). First both are held to the exact result; then the three products
of a layer, and epochs of HAN and of MM-Pyramid with either, are timed in turns.
"""
import torch
from torch.nn import functional as F

from avvp_nb.data.clips import random_clips
from avvp_nb.runs import measure
from avvp_nb.train.affine import Affine, has_onednn
from bench.training import in_turns

WAYS = {"eager": F.linear, "onednn": Affine.apply}
SHAPES = ((160, 512, 512), (320, 2048, 512), (320, 512, 1536))  # (rows, in, out): seconds of 16 videos, of both streams


def layer(way, given, dtype=torch.float32):
    "A linear layer and its three gradients"
    *inputs, g = (t.to(dtype) for t in given)
    y = WAYS[way](*(t.requires_grad_() for t in inputs))
    return y, *torch.autograd.grad(y, inputs, g)


def error(way, given):
    "Largest error relative to the largest entry, of the layer and its gradients"
    exact = layer("eager", given, torch.float64)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(layer(way, given), exact))


def run(rounds=5, shapes=SHAPES, methods=("han", "mm_pyramid"), size=16, n_batches=4, dim=None):
    "Layers of several sizes, and epochs of two networks"
    if not has_onednn(): return {"onednn": "not in this PyTorch"}
    out = {}
    for n, k, m in shapes:
        torch.manual_seed(0)
        given = [torch.randn(*s) for s in ((n, k), (m, k), (m,), (n, m))]
        off = {w: error(w, given) for w in WAYS}
        for w, e in off.items():
            if not e < 1e-5: raise AssertionError(f"a layer of {w} is {e:.1e} from the exact result")
        t = in_turns({w: lambda w=w, given=given: layer(w, given) for w in WAYS}, rounds)
        name = f"layer {n} x {k} to {m}"
        out |= {f"{name}: {w}, GFLOP/s": 6e-9 * n * k * m / s for w, s in t.items()} | {f"{name}: error, {w}": e for w, e in off.items()}
        out[f"{name}: ratio"] = t["eager"] / t["onednn"]
    for method in methods:
        clips, jobs = random_clips(size * n_batches), {}
        for e in WAYS:
            learner = measure.bench_learner(clips, method, batch_size=size, device="cpu", engine=e, dim=dim)
            measure.start(learner)
            jobs[e] = learner.one_epoch
        t = in_turns(jobs, rounds)
        out[f"ratio, epochs of {method} at batch {size}"] = t["eager"] / t["onednn"]
    return out
