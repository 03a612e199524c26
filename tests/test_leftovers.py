"""Odds and ends of the hardening: empty tables, names with escapes, JSON from one place, seeds, precisions, memory, handles, no home."""
import argparse
import ast
import contextlib
import io
import json
import os
import resource
import socket
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import micro
import numpy as np
import pytest
import torch
from tree import ROOT

from avvp_nb import cli, runs
from avvp_nb.core import InputError, atomic_write, write_json
from avvp_nb.data import tensors
from avvp_nb.data.pseudo import FOLDERS, label_clips, write_pseudo_layout
from avvp_nb.data.sim_files import is_leftover, write_simulated
from avvp_nb.data.simulate import simulate
from avvp_nb.data.unav_features import unav_doctor
from avvp_nb.data.unav_simulate import write_unav
from avvp_nb.methods.han import HAN
from avvp_nb.records import provenance as origin
from avvp_nb.records.weights import load_weights, save_weights
from avvp_nb.results.cost import flops
from avvp_nb.results.plans import plan
from avvp_nb.runs import measure, parallel, single
from avvp_nb.runs import sweep as sweeping
from avvp_nb.runs.grid import expand
from avvp_nb.train import learner
from avvp_nb.train.learner import predict_both

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits and /proc of Linux")
SIZES = dict(classes=25, audio_dim=128, frame_dim=2048, motion_dim=512)


@pytest.fixture(autouse=True)
def small(monkeypatch): micro.install(monkeypatch.setitem)


@pytest.fixture
def shell(capsys):
    def call(*argv):
        capsys.readouterr()
        return cli.main([str(a) for a in argv]), *capsys.readouterr()
    return call


def han(seed=1, **kw): return runs.RunSpec("han", scale="micro", seed=seed, epochs=1, **kw)


# ---- simulate, doctor -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("dataset", ["llp", "unav100"])
@pytest.mark.parametrize("videos", [(6, 0, 3), (0, 1, 1), (1, 1, 0), (0, 0, 0), (3, 2, -1)], ids=str)
def test_no_table_without_a_video_is_written(shell, tmp_path, dataset, videos):
    status, out, err = shell("simulate", tmp_path/"new", "--dataset", dataset, "--videos", *videos)
    assert status == 2 and not out and len(err.strip().splitlines()) == 1 and not (tmp_path/"new").exists()
    assert f"--videos: {' '.join(map(str, videos))} videos. expected three numbers from 1 on" in err


def test_what_is_written_can_be_loaded_and_features_alone_may_lack_a_split(shell, tmp_path):
    assert shell("simulate", tmp_path/"a", "--videos", 2, 1, 1)[0] == 0
    data = runs.DataSpec(str(tmp_path/"a"/"data"), str(tmp_path/"a"))
    assert [len(c) for c in runs.load_data(data, "micro", tmp_path/"cache").values()] == [2, 1, 1]
    status, _, err = shell("simulate", tmp_path/"b", "--annotations", tmp_path/"a"/"data", "--videos", 2, 0, 1)
    assert status == 0 and len(list((tmp_path/"b"/"feats"/"vggish").glob("*.npy"))) == 3, err
    assert shell("simulate", tmp_path/"b", "--annotations", tmp_path/"a"/"data", "--videos", 0, 0, 0)[0] == 2


NAMES = ["\x1b[31mX.npy", "\x1b]0;title\x07.npy", "a\nb_rgb.npy", "\u202ex.npy", "\udcff.npy", "y"*240, "ö ß.npy", "tab\t.npy"]


def test_foreign_names_are_shown_alike_by_both_doctors(shell, tmp_path):
    llp, unav = write_simulated(tmp_path/"llp", {"train": 1, "val": 1, "test": 1}), write_unav(tmp_path/"unav", {"train": 1, "val": 1, "test": 1})
    for folder in (llp/"feats"/"vggish", unav/"av_features"):
        for name in NAMES: (folder/os.fsdecode(os.fsencode(name))).touch()
    report = unav_doctor(unav, [])
    ours = report.problems
    assert all(str(x).isprintable() for x in report.problems.to_numpy().ravel())
    from avvp_nb.data.features import doctor
    theirs = doctor(llp, [p.stem for p in (llp/"feats"/"res152").glob("*.npy")], progress=False).problems
    assert sorted(theirs.found) == sorted(set(ours.found) & set(theirs.found)) and len(theirs) == len(NAMES)
    assert r"\x1b[31mX.npy" in set(ours.found) and "ö ß.npy" in set(ours.found) and "'" not in "".join(ours.found)
    for root, more in ((llp, ["--annotations", llp/"data"]), (unav, ["--dataset", "unav100", "--annotations", unav])):
        out = shell("doctor", root, *more)[1]
        assert "\x1b" not in out and "\u202e" not in out


def test_the_doctor_counts_videos_by_split(shell, tmp_path):
    root = write_simulated(tmp_path/"llp", {"train": 3, "val": 2, "test": 2})
    files = sorted((root/"feats"/"vggish").glob("simtr*.npy"))
    files[0].unlink(); files[1].write_bytes(b"x")
    status, out, _ = shell("doctor", root, "--annotations", root/"data")
    lines = {words[0]: words[1:] for words in map(str.split, out.splitlines()) if words}
    assert status == 1 and lines["train"] == ["3", "2", "1", "1", "1"] and lines["val"] == lines["test"] == ["2", "2", "0", "0", "2"]
    assert "1 missing. " in out and "1 unreadable. " in out and "--on-missing drop" in out


def test_the_doctor_names_a_label_that_is_a_folder(shell, tmp_path):
    "It used to end with it, before it had looked at the others"
    root = write_pseudo_layout(tmp_path/"p", label_clips(simulate(4, frames=None)))
    labels = sorted((root/FOLDERS["audio"]).glob("*.npy"))
    labels[0].unlink(); labels[0].mkdir(); labels[1].write_bytes(b"")
    status, out, err = shell("doctor", "--pseudo-labels", root)
    assert status == 1 and not err and labels[0].name in out and labels[1].name in out and "2 of 4 videos usable" in out
    with pytest.raises(InputError, match="is no file"): runs.run(han(labels="clip+clap", data=runs.DataSpec(pseudo_labels=str(root))), tmp_path, "cpu", "off")


# ---- JSON and arrays ------------------------------------------------------------------------------------------

def calls(path, *wanted):
    "Where a module calls functions by these dotted names"
    tree = ast.parse(path.read_text())
    return [(path.name, ast.unparse(n.func)) for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) in wanted]


def test_json_is_parsed_in_one_place():
    found = {c for p in (ROOT/"avvp_nb").rglob("*.py") for c in calls(p, "json.loads", "json.load")}
    assert found == {("core.py", "json.loads")}


DEEP = "["*100_000


@pytest.mark.parametrize("text", [DEEP, "{" + '"a":{'*100_000, "[]", "3", "{", "", "\ud800", "nul"], ids=lambda t: t[:6])
def test_headers_of_tensors_and_weights_are_refused_in_a_line(tmp_path, text):
    data = text.encode("utf-8", "surrogatepass")
    with pytest.raises(ValueError) as e: tensors.load(struct.pack("<Q", len(data)) + data)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500
    path = tmp_path/"w.safetensors"
    path.write_bytes(tensors.save({"x": torch.zeros(2)}, {"avvp_nb": text.encode("utf-8", "replace").decode()}))
    with pytest.raises(InputError, match="w.safetensors: is not a weights file of this library") as e: load_weights(path)
    assert "\n" not in str(e.value) and len(str(e.value)) < 700


def test_heads_of_refinements_are_refused_in_a_line(tmp_path):
    from avvp_nb.methods.ma_refine import Refinement
    for head in (DEEP, "{", "", "3"):
        np.savez(tmp_path/"r.npz", head=np.array(head), weak=np.zeros((1, 1), bool))
        with pytest.raises(InputError, match="r.npz: cannot be read as a refinement") as e: Refinement.load(tmp_path/"r.npz")
        assert len(str(e.value)) < 700


def test_weights_still_round_trip(tmp_path):
    torch.manual_seed(0)
    model = HAN(**SIZES, dim=32)
    header = {"spec": han().plain(), "sizes": SIZES, "mark": "ä", "key": "k", "classes": None}
    save_weights(model, tmp_path/"w.safetensors", header)
    back, said = load_weights(tmp_path/"w.safetensors")
    assert said == header and micro.same_weights(model, back)


# ---- seeds ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seeds, said", [([], "no seeds"), ([1, 1], "1 is given twice"), ([-1], "-1 is not possible"), ([2**70], "too large"), (["1"], "'1' is a str"),
                                         ([True], "True is a bool"), ([1.5], "1.5 is a float")], ids=str)
def test_seeds_of_a_plan(seeds, said):
    with pytest.raises(InputError, match=said): plan("han", "1", "tiny", seeds)


@pytest.mark.parametrize("seed, said", [([1, 2, 1], "grid: seed: 1 is given twice"), ([0, -1], "grid: seed: -1 is not possible"), ([2**70], "grid: seed.*too large"),
                                        (["1", 2], "grid: seed.*'1' is a str"), ([[1]], "grid: seed.*is a list"), ([None], "grid: seed")], ids=str)
def test_seeds_of_a_grid(seed, said):
    with pytest.raises(InputError, match=said): expand({"method": "han", "seed": seed})
    with pytest.raises(InputError, match=said.replace("grid: seed", "grid.*seed")): expand({"tables": {"paper": "han", "table": "1"}, "scale": "tiny", "seed": seed})


def test_good_seeds_are_as_before():
    assert [s.seed for s in expand({"method": "han", "seed": [3, 1]})] == [3, 1] and plan("han", "1", "tiny").seeds == (1,)
    assert [s.seed for s in expand([{"method": "han", "seed": 1}, {"method": "han", "seed": [1, 2]}])] == [1, 2]     # twice in two grids


# ---- precisions -----------------------------------------------------------------------------------------------

@pytest.fixture
def imitated(monkeypatch):
    "A processor that only imitates products in bfloat16"
    monkeypatch.delenv("AVVP_SLOW_BF16", raising=False)
    monkeypatch.setattr(learner, "bf16_slowdown", lambda *_: 50.)


def grid(tmp_path): write_json({"method": "han", "scale": "micro", "epochs": 1, "precision": "bf16"}, tmp_path/"g.json"); return tmp_path/"g.json"


def test_an_imitated_precision_is_refused_before_any_work(imitated, shell, tmp_path):
    spec, out = han(precision="bf16"), tmp_path/"out"
    for f in (lambda: runs.run(spec, out, "cpu", "off"), lambda: runs.run_many([spec], out, "cpu", "off"), lambda: runs.run_stacked([spec], out, "cpu", "off"),
              lambda: sweeping.sweep([spec], out, device="cpu", progress="off")):
        with pytest.raises(InputError, match="precision: 'bf16' takes 50 times as long"): f()
    for command in (("run", "han", "--scale", "micro", "--precision", "bf16"), ("sweep", grid(tmp_path))):
        status, _, err = shell(*command, "--out", out, "--device", "cpu")
        assert status == 2 and len(err.strip().splitlines()) == 1 and "takes 50 times" in err
    assert not list(out.rglob("*.json")) and not list(out.glob("checkpoints/*"))


def test_a_recorded_run_is_returned_whatever_this_processor_can(monkeypatch, tmp_path):
    monkeypatch.setattr(learner, "bf16_slowdown", lambda *_: 1.)
    spec = han(precision="bf16")
    record = runs.run(spec, tmp_path, "cpu", "off")
    monkeypatch.setattr(learner, "bf16_slowdown", lambda *_: 50.)
    monkeypatch.delenv("AVVP_SLOW_BF16", raising=False)
    assert runs.run(spec, tmp_path, "cpu", "off") == record and runs.run_stacked([spec], tmp_path, "cpu", "off") == [record]
    assert [o.state for o in sweeping.sweep([spec], tmp_path, device="cpu", progress="off")] == ["recorded"]
    with pytest.raises(InputError, match="takes 50 times"): runs.run(spec, tmp_path, "cpu", "off", fresh=True)
    assert runs.Store(tmp_path).record(record["key"]) == record                                      # and is still there


def test_only_precisions_that_are_there_are_measured(imitated, monkeypatch):
    assert measure.precisions("cpu") == ("fp32",) and measure.precisions("cuda") == learner.PRECISIONS
    monkeypatch.setenv("AVVP_SLOW_BF16", "1")
    assert measure.precisions("cpu") == ("fp32", "bf16")


# ---- parallel, sweep, cost ------------------------------------------------------------------------------------

def test_a_recorded_run_needs_no_lock_in_several_processes(monkeypatch, tmp_path):
    record = runs.run(han(), tmp_path, "cpu", "off")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    monkeypatch.setattr(parallel, "agree", lambda f: f())
    for name in ("turn", "locked"): monkeypatch.setattr(parallel, name, lambda *_: pytest.fail("asked for the lock"))
    assert parallel.run_here(han(), runs.Store(tmp_path), torch.device("cpu"), "off") == record
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_sweep_needs_no_home(monkeypatch, shell, tmp_path):
    def homeless(): raise RuntimeError("Could not determine home directory.")
    monkeypatch.setattr(Path, "home", homeless)
    write_json({"method": "han", "scale": "micro", "epochs": 1}, tmp_path/"g.json")
    status, out, err = shell("sweep", tmp_path/"g.json", "--out", tmp_path/"out", "--device", "cpu")
    assert status == 0 and "1 of 1 runs recorded" in out, err
    status, _, err = shell("sweep", tmp_path/"g.json", "--out", tmp_path/"out", "--executor", "slurm")
    assert status == 2 and "--executor slurm: needs a home folder. set HOME" in err


def test_costs_of_a_network_without_two_passes():
    class Bare(torch.nn.Module):
        def __init__(self): super().__init__(); self.net = HAN(**SIZES, dim=32)
        def forward(self, audio, frames, motion, mask=None): return self.net(audio, frames, motion)
    bare = Bare()
    assert flops(bare, both=True)[""] == flops(bare)[""] > 0                    # one pass is both
    assert flops(bare.net, both=True)[""] > flops(bare.net)[""]
    clips = simulate(2)
    a, b = predict_both(bare, clips)
    assert np.array_equal(a.video, b.video)                        # the same pass twice


# ---- memory and handles ---------------------------------------------------------------------------------------

MEMORY = [RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 123 bytes.\nframe #0: x\n"),
          RuntimeError("can't start new thread"), RuntimeError("std::bad_alloc"), MemoryError(), MemoryError("Unable to allocate 1.2 GiB"),
          torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), RuntimeError("unable to mmap 99 bytes: Cannot allocate memory (12)")]


@pytest.mark.parametrize("error", MEMORY, ids=lambda e: str(e)[:30])
def test_out_of_memory_is_one_line(error, monkeypatch, shell):
    def broken(a): raise error
    monkeypatch.setitem(cli.COMMANDS, "reported", (broken, cli.add_reported))
    status, out, err = shell("reported", "han")
    assert status == 2 and not out and err.startswith("error: not enough memory") and len(err.strip().splitlines()) == 1 and len(err) < 300
    assert (str(error).strip().split("\n")[0][:20] or "memory") in err


def test_other_errors_keep_their_traces(monkeypatch, shell):
    def broken(a): raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    monkeypatch.setitem(cli.COMMANDS, "reported", (broken, cli.add_reported))
    with pytest.raises(RuntimeError, match="mat1 and mat2"): shell("reported", "han")


def in_child(tmp_path, work) -> tuple:
    "(status, what it said) of a forked copy of this process"
    said = tmp_path/"said"
    pid = os.fork()
    if not pid:
        status = 99
        try:
            fd = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for k in (1, 2): os.dup2(fd, k)
            sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(k, "wb", 0, closefd=False), write_through=True) for k in (1, 2))
            status = work()
        finally: os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.read_text(errors="replace")


def limited(argv, megabytes):
    "A command that may take so much more memory than this process has"
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages*resource.getpagesize() + megabytes*2**20,)*2)
    return cli.main(argv)


@linux
@pytest.mark.parametrize("megabytes", [1, 30, 100, 200])
def test_too_little_memory_ends_a_run_in_a_line(tmp_path, megabytes):
    argv = ["run", "han", "--scale", "small", "--epochs", "1", "--device", "cpu", "--out", str(tmp_path)]
    status, said = in_child(tmp_path, lambda: limited(argv, megabytes))
    assert status == 2 and "Traceback" not in said and said.strip().splitlines()[-1].startswith("error: not enough memory"), said


@linux
def test_a_run_that_memory_ended_continues(tmp_path):
    argv = ["run", "han", "--scale", "micro", "--epochs", "1", "--device", "cpu", "--out", str(tmp_path/"out")]
    def unlucky():
        def fit(*_): raise RuntimeError("can't start new thread")
        single.fit = fit
        return cli.main(argv)
    status, said = in_child(tmp_path, unlucky)
    assert status == 2 and said.strip().splitlines()[-1] == "error: not enough memory (can't start new thread)"
    assert in_child(tmp_path, lambda: cli.main(argv))[0] == 0
    (record,) = runs.Store(tmp_path/"out").records()
    plain = runs.run(runs.RunSpec("han", scale="micro", epochs=1), tmp_path/"plain", "cpu", "off")
    assert micro.essence(tmp_path/"out", record) == micro.essence(tmp_path/"plain", plain)


@linux
def test_a_record_says_why_it_has_no_commit(tmp_path, monkeypatch):
    def few():
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 4,)*2)
        with contextlib.suppress(OSError):
            while True: os.open(os.devnull, os.O_RDONLY)
        found, why = origin.commit_and_why()
        os.write(1, json.dumps([found, why]).encode())
        return 0
    status, said = in_child(tmp_path, few)
    assert status == 0 and json.loads(said) == [None, "git could not be asked (Too many open files)"]
    monkeypatch.setattr(single, "commit_and_why", lambda: (None, "git could not be asked (Too many open files)"))
    record = runs.run(han(), tmp_path, "cpu", "off")
    assert record["commit"] is None and record["no_commit"].endswith("(Too many open files)")
    monkeypatch.setattr(single, "commit_and_why", lambda: (None, ""))
    record = runs.run(han(2), tmp_path, "cpu", "off")
    assert record["commit"] is None and "no_commit" not in record                    # not a checkout: nothing to explain


def git(code, err="", out=""): return SimpleNamespace(returncode=code, stderr=err, stdout=out)


@pytest.mark.parametrize("answers, found", [
    ([git(0, out="a"*40 + "\n"), git(0)], ("a"*40, "")), ([git(0, out="a"*40), git(0, out=" M core.py\n")], ("a"*40 + "+", "")),
    ([git(128, "fatal: not a git repository (or any of the parent directories): .git\n")], (None, "")),
    ([git(128, "fatal: detected dubious ownership in repository at '/srv/x'\nadd an exception\n")], (None, "git refused: detected dubious ownership in repository at ...")),
    ([git(128, "fatal: cannot open '/srv/x': Too many open files")], (None, "git refused: cannot open ... Too many open files")),
    ([git(0, out="a"*40), git(128, "fatal: out of memory")], (None, "git refused: out of memory")), ([git(1)], (None, "git refused: without a reason")),
    ([FileNotFoundError(2, "No such file or directory", "git")], (None, "git could not be asked (No such file or directory)")),
    ([origin.subprocess.TimeoutExpired("git", 10)], (None, "git could not be asked (TimeoutExpired)"))], ids=str)
def test_what_git_says(answers, found, monkeypatch):
    answers = iter(answers)
    def ask(*_, **kw):
        assert kw["env"]["LC_ALL"] == "C"
        x = next(answers)
        if isinstance(x, Exception): raise x
        return x
    monkeypatch.setattr(origin.subprocess, "run", ask)
    assert origin.commit_and_why() == found and "/home" not in str(found)


def test_unfinished_files_do_not_name_the_machine(tmp_path):
    with atomic_write(tmp_path/"han-1.json") as f:
        f.write("x")
        (part,) = tmp_path.glob(".*")
        assert socket.gethostname() not in part.name and not is_leftover(part)
    dead = tmp_path/part.name.replace(f".{os.getpid()}", ".2147483646")
    dead.touch()
    assert is_leftover(dead)


# ---- again ----------------------------------------------------------------------------------------------------

def test_fresh_repeats_each_run_once(tmp_path):
    from avvp_nb.runs.reproduce import train_missing
    specs = [han(), han(), runs.RunSpec("ma", {"refine": "audio"}, scale="micro", epochs=1)]
    assert train_missing(specs, tmp_path, "cpu", "off") == 3                       # MA's base is the third
    times = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("records/*.json")}
    assert train_missing(specs, tmp_path, "cpu", "off") == 0
    assert train_missing(specs, tmp_path, "cpu", "off", fresh=True) == 3
    assert all(p.stat().st_mtime_ns > times[p.name] for p in tmp_path.glob("records/*.json"))


def test_arguments_of_the_commands():
    "`--on-missing` wherever data are named"
    for name, (_, add) in cli.COMMANDS.items():
        p = argparse.ArgumentParser(); add(p)
        options = {o for a in p._actions for o in a.option_strings}
        if "--features" in options or "--unav-features" in options or name in ("sweep", "pack"): assert "--on-missing" in options, name
