"""How fast is the scorer? `python bench/scoring.py`

Scores the same videos three times in one process and on one thread: with loops over videos, classes and runs in plain Python
(tests/oracle.py), with the same loops around small NumPy calls, as the public evaluation scripts are organised, and with
`avvp_nb.metrics.evaluate_videos`. The results are compared before any speed is reported.

The videos are random, with the density of LLP: one to three classes a video, each audible, visible or both, and predictions
made from the truth by dropping, shifting and inventing events.
"""
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np

from avvp_nb.counts import LEVELS, METRICS
from avvp_nb.metrics import evaluate, evaluate_videos

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from oracle import score  # noqa: E402


def make_videos(n, t=10, c=25, seed=0):
    "Random (4,N,T,C) uint8: predicted audio and visual, annotated audio and visual"
    rng, x = np.random.default_rng(seed), np.zeros((4, n, t, c), np.uint8)
    for i in range(n):
        for k in rng.choice(c, rng.integers(1, 4), replace=False):
            for m, likely in enumerate((.95, .65)):
                start, stop = sorted(rng.integers(0, t + 1, 2))
                if rng.random() < likely: x[2 + m, i, start:stop, k] = 1
                if rng.random() < .8: x[m, i, max(0, start + rng.integers(-1, 2)):stop + rng.integers(-1, 2), k] = 1
        start, stop = sorted(rng.integers(0, t + 1, 2))
        if rng.random() < .3: x[rng.integers(2), i, start:stop, rng.integers(c)] = 1
    return x


def row_runs(row):
    "Runs of one row, found with NumPy"
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row, [0]])))
    return edges[::2], edges[1::2]


def row_events(s, g):
    "TP, FP, FN of one row in runs"
    (p0, p1), (g0, g1) = row_runs(s), row_runs(g)
    common = np.maximum(np.minimum(p1[:, None], g1) - np.maximum(p0[:, None], g0), 0)
    hit = common / ((p1 - p0)[:, None] + (g1 - g0) - common) >= 0.5
    return hit.any(1).sum(), (~hit.any(1)).sum(), (~hit.any(0)).sum()


def row_segments(s, g):
    "TP, FP, FN of one row in seconds"
    return np.sum(s * g), np.sum(s * (1 - g)), np.sum((1 - s) * g)


def loop_video(pa, pv, ta, tv):
    "The nine scores of one video (T,C), class after class, at both levels"
    pairs = [(pa, ta), (pv, tv), (pa * pv, ta * tv), (pa * (1 - pv), ta * (1 - tv)), (pv * (1 - pa), tv * (1 - ta))]
    out = []
    for rows in (row_segments, row_events):
        counts = [np.array([rows(s, g) for s, g in zip(S.T, G.T)]) for S, G in pairs]
        f = []
        for k in (*counts, counts[0] + counts[1], counts[3] + counts[4]):
            k = k[k.sum(1) > 0]
            f.append((2 * k[:, 0] / (2 * k[:, 0] + k[:, 1] + k[:, 2])).mean() if len(k) else 1.0)
        a, v, av, ao, vo, ev, evo = f
        out += [a, v, av, (a + v + av) / 3, ev, ao, vo, (ao + vo + av) / 3, evo]
    return out


def clock(f, repeat=1):
    "Best time of `repeat` calls in seconds, and the last result"
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        result = f()
        times.append(time.perf_counter() - start)
    return min(times), result


def run(n=1200, t=10, c=25, repeat=20):
    "Time the three scorers on `n` videos; returns numbers for a record and raises if results differ"
    x = make_videos(n, t, c)
    plain, a = clock(lambda: score(*x))
    loops, b = clock(lambda: [loop_video(*v) for v in x.astype(int).swapaxes(0, 1)])
    ours, table = clock(lambda: evaluate_videos(*x), repeat)
    whole, _ = clock(lambda: evaluate(*x), repeat)
    a = np.array([[v[level][m] for level in LEVELS for m in METRICS] for v in a])
    difference = max(np.abs(table.to_numpy() - y).max() for y in (a, np.array(b)))
    if not difference < 1e-12: raise AssertionError(f"the scorers disagree by {difference}")
    return {"videos": n, "segments": t, "classes": c, "largest_difference": float(difference),
            "plain_python_videos_per_s": n / plain, "numpy_loops_videos_per_s": n / loops,
            "evaluate_videos_videos_per_s": n / ours, "evaluate_ms": 1e3 * whole,
            "ratio_to_plain_python": plain / ours, "ratio_to_numpy_loops": loops / ours,
            "machine": f"{platform.machine()}, Python {platform.python_version()}, NumPy {np.__version__}"}


if __name__ == "__main__":
    for size in ({}, {"n": 100, "t": 60, "c": 100}):
        print(json.dumps({k: round(v, 3) if isinstance(v, float) and v > 1e-9 else v for k, v in run(**size).items()}, indent=1))
