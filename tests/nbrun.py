"""Execute library notebooks as `nbdev_test` does, each in a process of its own.

A fork server has imported the packages that most of them import, so a notebook doesn't wait for torch, pandas and matplotlib again:
that took four of the five seconds of an average one."""
import multiprocessing
import os
import sys
import tempfile
import traceback
from contextlib import contextmanager
from typing import NamedTuple

PRELOAD = ["torch", "pandas", "scipy.stats", "matplotlib.pyplot", "IPython", "execnb.shell", "nbdev.test", "fastcore.test", "avvp_nb.cli"]
ENV = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}


class Done(NamedTuple):
    "How a notebook ended: 0 or 1, and everything that was printed"
    returncode: int
    said: str


def run_one(job):
    "(path, folder) of a notebook: `Done`"
    from nbdev.test import nbdev_test
    path, folder = job
    os.chdir(folder)
    os.environ.update(ENV)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as f:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(f.fileno(), stream.fileno())
        try: nbdev_test(path=path, n_workers=0); code = 0
        except SystemExit as e: code = int(bool(e.code))
        except BaseException: traceback.print_exc(); code = 1
        for stream in (sys.stdout, sys.stderr): stream.flush()
        f.seek(0)
        return Done(code, f.read())


@contextmanager
def fork_server():
    "The context of processes that have imported `PRELOAD`; one where each imports for itself on systems without fork"
    kept = {k: os.environ.get(k) for k in ENV}
    os.environ.update(ENV)
    try:
        context = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
        if hasattr(os, "fork"): context.set_forkserver_preload(PRELOAD)
        yield context
    finally:
        for k, v in kept.items():
            if v is None: del os.environ[k]
            else: os.environ[k] = v


def run_all(paths, folder, processes=2, timeout=1800):
    "`Done` of each notebook"
    with fork_server() as context, context.Pool(processes, maxtasksperchild=1) as pool:
        return pool.map_async(run_one, [(str(p), str(folder)) for p in paths], chunksize=1).get(timeout)
