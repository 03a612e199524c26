"""How fast is training? `python bench/training.py`

The same HAN, trained on the same videos in the same order, twice in one process:

- *reference*: a loop that reads three `.npy` files for each video of a batch, projects all 80 frames of a video and averages
  afterwards, and calls PyTorch's own attention once for each modality and kind, the way the public training scripts are
  organised (this is our own loop, not their code). Files are small in number and warm in the page cache, which flatters it.
- *ours*: `Learner` on a packed store.

Both are first run without dropout, and their losses compared step by step; speed is reported only if they agree.

The two are timed in turns, together with the machine's own matrix product at the shapes of a step, so that a machine that
is busy for a while slows all of them down. FLOPs and bytes of one step are counted (`avvp_nb.runs.measure.Counter`). From these
follow two ratios that our loop could reach with this arithmetic: with nothing but products, at their ceiling, and with every
other byte moved at the rate of a large copy (what fits into a cache moves faster). Stacked runs are timed beside as many single ones.
"""
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from avvp_nb.data import clips as clips_
from avvp_nb.data.annotations import load_annotations
from avvp_nb.data.clips import load_clips
from avvp_nb.data.packed import open_store, pack
from avvp_nb.data.sim_files import write_simulated
from avvp_nb.methods.han import HAN
from avvp_nb.methods.losses import GuidedLoss
from avvp_nb.methods.official import to_official
from avvp_nb.results import speed
from avvp_nb.runs import measure
from avvp_nb.train.dropout import dropout_of
from avvp_nb.train.learner import Callback, Learner, batches

FEATURES = {"audio": "vggish", "frames": "res152", "motion": "r2plus1d_18"}


class ReferenceLayer(nn.Module):
    "One hybrid attention layer from PyTorch's own parts"
    def __init__(self, dim, dropout):
        super().__init__()
        self.self_attn, self.cm_attn = (nn.MultiheadAttention(dim, 1, dropout, batch_first=True) for _ in range(2))
        self.linear1, self.linear2 = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, own, other):
        x = own + self.dropout(self.cm_attn(own, other, other)[0]) + self.dropout(self.self_attn(own, own, own)[0])
        x = self.norm1(x)
        return self.norm2(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class ReferenceHAN(nn.Module):
    "HAN with every map on its own; names follow the official checkpoint, so that weights can be exchanged"
    def __init__(self, dim=512, classes=25, dropout=0.1):
        super().__init__()
        self.fc_prob, self.fc_frame_att, self.fc_av_att = (nn.Linear(dim, classes) for _ in range(3))
        self.fc_a, self.fc_v, self.fc_st = nn.Linear(128, dim), nn.Linear(2048, dim), nn.Linear(512, dim)
        self.fc_fusion = nn.Linear(2 * dim, dim)
        self.hat_encoder = nn.ModuleDict({"layers": nn.ModuleList([ReferenceLayer(dim, dropout)])})

    def forward(self, audio, frames, motion):
        layer = self.hat_encoder["layers"][0]
        a, per_frame = self.fc_a(audio), self.fc_v(frames)  # (B,T,D), (B,8T,D)
        v = per_frame.reshape(len(frames), audio.shape[1], -1, per_frame.shape[-1]).mean(2)
        v = self.fc_fusion(torch.cat([v, self.fc_st(motion)], -1))
        x = torch.stack([layer(a, v), layer(v, a)], 2)  # (B,T,2,D)
        p = torch.sigmoid(self.fc_prob(x))
        w_time, w_mod = torch.softmax(self.fc_frame_att(x), 1), torch.softmax(self.fc_av_att(x), 2)
        by_modality = (w_time * p).sum(1)
        return (w_time * w_mod * p).sum((1, 2)), by_modality[:, 0], by_modality[:, 1]


def reference_epochs(model, root, clips, batch_size, epochs, seed=1):
    "Loss of every step of the per-file loop"
    opt, out = torch.optim.Adam(model.parameters(), 3e-4), []
    for epoch in range(epochs):
        for idx in batches(len(clips), batch_size, seed, epoch):
            files = {k: [np.load(root / d / f"{clips.ids[i][:11]}.npy") for i in idx] for k, d in FEATURES.items()}
            x = {k: torch.from_numpy(np.stack(v)) for k, v in files.items()}
            y = torch.from_numpy(clips.weak[idx])
            video, audio, visual = (p.clamp(1e-7, 1 - 1e-7) for p in model(**x))
            bce = F.binary_cross_entropy
            loss = bce(audio, y) + bce(visual, 0.9 * y + 0.05) + bce(video, y)
            opt.zero_grad()
            loss.backward()
            opt.step()
            out.append(loss.item())
    return out


class Losses(Callback):
    "A callback that keeps the loss of every step"
    def __init__(self): self.seen = []
    def after_step(self, learner): self.seen.append(sum(t.item() for t in learner.terms.values()))


def ours(model, clips, batch_size, epochs, precision="fp32"):
    "Loss of every step of `Learner`"
    keep = Losses()
    Learner(model, clips, GuidedLoss(), batch_size=batch_size, epochs=epochs, device="cpu", precision=precision, callbacks=[keep]).fit()
    return keep.seen


def quick(*args):
    "The same with the engine `quick-dropout`"
    with dropout_of("quick-dropout"): return ours(*args)


def pair(dropout, seed=0):
    "Our network and the reference with the same weights"
    torch.manual_seed(seed)
    model, reference = HAN(dropout=dropout), ReferenceHAN(dropout=dropout)
    reference.load_state_dict(to_official(model))
    return model.train(), reference.train()


def in_turns(jobs, rounds, device="cpu"):
    "Best wall time of each of several functions (name: function), called in turns"
    best = dict.fromkeys(jobs, float("inf"))
    for _ in range(rounds):
        for name, f in jobs.items():
            measure.wait(device)
            start = time.perf_counter()
            f()
            measure.wait(device)
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def counted(f):
    "GFLOP and GB of what `f` does, and the GB of what multiplies no matrices"
    with measure.Counter() as c: f()
    return c.total() | {"other GB": sum(moved for _, flops, moved in c.rows if not flops) / 1e9}


def products(batch_size):
    "The large matrix products of a step, each as a function, and the FLOPs of one call: {name: (function, GFLOP)}"
    def one(m, k, n):
        a, b = torch.randn(m, k), torch.randn(k, n)
        return (lambda: [a @ b for _ in range(8)]), 8 * 2 * m * k * n / 1e9
    return {name: one(*shape) for name, shape in {**speed.shapes(batch_size), "1024 x 1024 x 1024": (1024,) * 3}.items()}


def at(size, root, clips, epochs, rounds, copy):
    "Videos per second at one batch size: the reference, ours, ours in bfloat16; the ceilings, and the share of them"
    (model, reference), gemm = pair(0.1), products(size)
    loops = {"reference": lambda: reference_epochs(reference, root, clips, size, epochs), "ours": lambda: ours(model, clips, size, epochs),
             "bf16": lambda: ours(model, clips, size, epochs, "bf16"), "quick": lambda: quick(model, clips, size, epochs)}
    t = in_turns(loops | {name: f for name, (f, _) in gemm.items()}, rounds)
    rates = {name: gflop / t[name] for name, (_, gflop) in gemm.items()}
    part, best = clips[:size], max(rates.values())
    cost = {"reference": counted(lambda: reference_epochs(reference, root, part, size, 1)), "ours": counted(lambda: ours(model, part, size, 1))}
    n, steps = len(clips) * epochs, epochs * len(clips) / size
    rate = cost["ours"]["GFLOP"] * steps / t["ours"]
    fastest = steps * (cost["ours"]["GFLOP"] / best + cost["ours"]["other GB"] / copy)
    return {"reference videos/s": n / t["reference"], "ours videos/s": n / t["ours"], "ours in bf16 videos/s": n / t["bf16"],
            "ours with quick-dropout videos/s": n / t["quick"],
            "reference GFLOP/step": cost["reference"]["GFLOP"], "ours GFLOP/step": cost["ours"]["GFLOP"],
            "reference GB/step": cost["reference"]["GB"], "ours GB/step": cost["ours"]["GB"],
            "ceiling, products, GFLOP/s": rates, "ceiling, GFLOP/s": best, "reference GFLOP/s": cost["reference"]["GFLOP"] * steps / t["reference"],
            "ours GFLOP/s": rate, "ours, % of the ceiling": 100 * rate / best,
            "ours, GB/step without products": cost["ours"]["other GB"],
            "ratio at the ceiling": t["reference"] * best / (cost["ours"]["GFLOP"] * steps),
            "ratio with products at the ceiling and all else at the copy rate": t["reference"] / fastest,
            "ratio": t["reference"] / t["ours"], "ratio with quick-dropout": t["reference"] / t["quick"],
            "ratio in bf16 (other numbers)": t["reference"] / t["bf16"]}


def stacks(n, rounds, size=16, batches_=4, **kwargs):
    "One epoch of `n` runs as a stack beside `n` epochs of one: how many times as fast"
    from avvp_nb.train.lanes import Lane
    from avvp_nb.train.stack import StackedLearner
    clips = clips_.random_clips(size * batches_)
    def learner(kind, seed=0): return measure.bench_learner(clips, batch_size=size, seed=seed, learner=kind, **kwargs)
    one, stack = learner(Learner), StackedLearner([learner(Lane, r) for r in range(n)])
    measure.start(one)
    measure.start_stack(stack)
    t = in_turns({"one": lambda: [one.one_epoch() for _ in range(n)], "stack": stack.one_epoch}, rounds)
    return {"one after another videos/s": n * len(clips) / t["one"], "stacked videos/s": n * len(clips) / t["stack"], "ratio": t["one"] / t["stack"]}


def goals(found):
    "What is wanted of two CPU cores, and what was reached"
    times = {f"times the per-file loop at batch {size}": {"wanted": wanted, "reached": found[f"batch {size}"]["ratio"]}
             for size, wanted in ((16, 2.2), (128, 3.0))}
    return {"share of the ceiling at batch 128, %": {"wanted": 75, "reached": found["batch 128"]["ours, % of the ceiling"]}, **times}


def run(videos=512, epochs=1, rounds=3):
    "Videos per second of both loops at batch 16 and 128, after checking that they compute the same"
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        write_simulated(tmp, {"train": videos, "val": 2, "test": 2})
        annotations, root = load_annotations(tmp / "data"), tmp / "feats"
        pack(root, tmp / "store", annotations["train"].video_ids, dtype="float32")
        clips = load_clips(annotations, open_store(tmp / "store"), "train")
        model, reference = pair(0.0)
        a, b = ours(model, clips, 16, 1), reference_epochs(reference, root, clips, 16, 1)
        gap = float(np.abs(np.array(a) / np.array(b) - 1).max())
        if not gap < 1e-3: raise AssertionError(f"losses differ by {gap:.1e} (relative)")
        copy = measure.copy_rate(seconds=1.)
        out = {"steps compared": len(a), "largest relative loss difference": gap, "copy, GB/s": copy}
        for size in (16, 128): out[f"batch {size}"] = at(size, root, clips[:videos // size * size], epochs, rounds, copy)
    out["4 runs stacked, batch 16"] = stacks(4, rounds)
    out["16 small runs stacked (D = 32), batch 16"] = stacks(16, rounds, dim=32)
    out["goals"] = goals(out)
    return out


if __name__ == "__main__":
    sys.path.insert(0, os.fspath(Path(__file__).resolve().parent.parent))
    print(json.dumps(run(), indent=1))
