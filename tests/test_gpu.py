"""The report of a borrowed machine: what it measures, that it continues, that it needs nothing, and that its results come home."""
import argparse
import json
import os
import shutil
import subprocess
import sys
import types
from dataclasses import replace

import micro
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save as library_save
from torch.utils.flop_counter import FlopCounterMode
from tree import ROOT, load

from avvp_nb import runs
from avvp_nb.core import InputError, file_hash, read_json, shared, write_json
from avvp_nb.data import clips as clips_
from avvp_nb.data import tensors
from avvp_nb.methods import zoo
from avvp_nb.runs import gpu_report as reporting
from avvp_nb.runs import measure
from avvp_nb.runs import merge as merging
from avvp_nb.runs import parity as checks
from avvp_nb.runs.reproduce import reproduce
from avvp_nb.train import learner
from avvp_nb.train.graphs import Tape

CLIPS = clips_.random_clips(8, 4, 5, (8, 12, 6))
BLOCKED = ("matplotlib", "safetensors", "tqdm", "nbdev", "fastcore", "IPython", "papermill", "tabulate", "ipykernel", "execnb")


@pytest.fixture
def small(monkeypatch):
    "The scale `micro`, and networks of 32 dimensions"
    micro.install(monkeypatch.setitem)


# --- weights without the library -------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
          torch.uint8, torch.bool]
shapes = st.lists(st.integers(0, 4), max_size=3)
files = st.dictionaries(st.text(min_size=1, max_size=6).filter(lambda k: k != "__metadata__" and k.isprintable()),
                        st.tuples(st.sampled_from(DTYPES), shapes), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(files, st.text(max_size=8).filter(str.isprintable))
def test_tensor_files_are_those_of_the_library(wanted, text):
    x = {k: torch.arange(int(np.prod(s))).reshape(s).to(d) for k, (d, s) in wanted.items()}
    data = tensors.save(x, {"said": text})
    assert data == library_save(x, {"said": text})
    back, said = tensors.load(data)
    assert said == {"said": text} and set(back) == set(x)
    for k, v in x.items(): assert back[k].dtype == v.dtype and torch.equal(back[k], v)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_tensor_files_are_refused(data):
    "Cut anywhere, or with a header that says something else: a ValueError, never another exception or other numbers"
    whole = tensors.save({"a": torch.ones(3, 2), "b": torch.zeros(4)})
    cut = whole[:data.draw(st.integers(0, len(whole) - 1))]
    with pytest.raises((ValueError, KeyError)): tensors.load(cut)


# --- counting and measuring ------------------------------------------------------------------------------------------

def test_operations_are_those_of_pytorchs_own_counter():
    learner = measure.bench_learner(CLIPS, dim=16, batch_size=4)
    ours = measure.step_cost(learner)
    learner.i, learner.n_batches = 0, 1
    with FlopCounterMode(display=False) as theirs: learner.one_batch(np.arange(4))
    assert ours["GFLOP"] == theirs.get_total_flops() / 1e9 > 0


def test_bytes_of_a_step_grow_with_parameters_and_with_rows():
    "At least every parameter is read in both directions and by Adam, which reads four arrays and writes three"
    learner = measure.bench_learner(CLIPS, dim=64, batch_size=1)
    least = 4 * sum(p.numel() for p in learner.model.parameters()) * (1 + 4 + 3)
    one, eight = measure.step_cost(learner)["GB"], measure.step_cost(measure.bench_learner(CLIPS, dim=64, batch_size=8))["GB"]
    assert least / 1e9 < one < eight


@pytest.mark.parametrize("method", list(zoo.METHODS))
def test_every_method_can_be_compared(method):
    "One step of each method on each backbone, in its own learner"
    pairs = zoo.METHODS[method].backbones or (None,)
    for b in pairs[:2]:
        seconds = 10 if method == "mgn" else 4                                   # its cross step knows ten seconds only
        clips = clips_.random_clips(3, seconds, 5, (8, 12, 6), frames=zoo.METHODS[b or method].frames)
        rows = checks.parity_rows(method, "cpu", b, clips=clips, dim=32)
        assert [r["what"] for r in rows] == ["outputs", "loss", "gradients"], rows
        assert all(r["ok"] and r["difference"] == 0 for r in rows)


def test_parity_finds_a_wrong_device(monkeypatch):
    "One gradient of one parameter that is a thousandth off, one term of the loss, or a NaN"
    right = checks.one_step

    def wrong(spoil):
        def one_step(method, device="cpu", *args, **kwargs):
            catch = right(method, "cpu", *args, **kwargs)
            if device == "other": spoil(catch)
            return catch
        return one_step
    def off(catch): catch.gradients["head.maps.0.weight"] *= 1.001
    def term(catch): catch.loss["visual"] += 1e-3
    def nan(catch): catch.gradients["head.maps.0.bias"][0] = torch.nan
    def gone(catch): del catch.gradients["head.maps.0.bias"]
    for spoil, what, where in [(off, "gradients", "head.maps.0.weight"), (term, "loss", "visual"), (nan, "gradients", "head.maps.0.bias")]:
        monkeypatch.setattr(checks, "one_step", wrong(spoil))
        bad = [r for r in checks.parity_rows("han", "other", clips=CLIPS, dim=16) if not r["ok"]]
        assert [(r["what"], r["where"]) for r in bad] == [(what, where)]
    monkeypatch.setattr(checks, "one_step", wrong(gone))
    assert "other gradients than on the CPU" in checks.parity_rows("han", "other", clips=CLIPS, dim=16)[0]["where"]


def test_reference_cases_are_never_skipped_in_silence(monkeypatch, tmp_path):
    monkeypatch.setenv("AVVP_SHARED", str(tmp_path))
    rows = checks.golden_rows("cpu")
    assert len(rows) == 1 and rows[0]["what"] == "golden cases: not found" and rows[0]["ok"] is None


def test_reference_cases_decide(golden, monkeypatch):
    rows = checks.golden_rows("cpu")
    assert len(rows) >= 8 and all(r["ok"] for r in rows)
    monkeypatch.setattr(checks, "filled", lambda keys, rule, f=checks.filled: {k: v * 1.01 for k, v in f(keys, rule).items()})
    assert not checks.golden_case(shared("golden"), "han", "han_forward_chirp", "cpu")["ok"]


@pytest.mark.parametrize("method", [m for m, entry in zoo.METHODS.items() if entry.recordable])
def test_recorded_steps_are_compared(method, monkeypatch):
    "On a tape, which takes the place of a CUDA graph: equal to the last bit, and something was replayed"
    monkeypatch.setattr(learner, "tape_for", lambda device: Tape)
    rows = checks.engine_rows(method, "cpu", clips_.random_clips(24, 4, 25, (8, 12, 6)), dim=16)
    assert [(r["ok"], r["difference"], r["where"]) for r in rows] == [(True, 0., "4 replays an epoch")] * 2, rows


def test_recorded_steps_that_go_wrong_are_found(monkeypatch):
    class Forgetful(Tape):
        def again(self): pass
    monkeypatch.setattr(learner, "tape_for", lambda device: Forgetful)
    rows = checks.engine_rows("han", "cpu", clips_.random_clips(24, 4, 5, (8, 12, 6)), dim=16)
    assert [r["ok"] for r in rows] == [False] * 2

    class Broken(Tape):
        def first(self, f): raise RuntimeError("cannot")
    monkeypatch.setattr(learner, "tape_for", lambda device: Broken)
    rows = checks.engine_rows("han", "cpu", clips_.random_clips(24, 4, 5, (8, 12, 6)), dim=16)
    assert [(r["ok"], r["difference"], r["where"]) for r in rows] == [(False, 0., "RuntimeError: cannot")] * 2


def test_graphs_are_used_where_the_report_speaks_for_them(tmp_path):
    def write(ok=True, speed=20.):
        pd.DataFrame([{"what": "recorded steps", "ok": True}, {"what": "recorded steps", "ok": ok}, {"what": "loss", "ok": False}]).to_csv(tmp_path / "parity.csv")
        write_json({"results": {"a": {"videos/s": 10.}, "a, graphs": {"videos/s": 11.}, "b": {"videos/s": 10.}, "b, graphs": {"videos/s": speed}}}, tmp_path / "benchmark.json")
    assert reporting.pick_engine(tmp_path, "cuda") == "eager"              # nothing is known
    write()
    assert reporting.pick_engine(tmp_path, "cuda") == "graphs" and reporting.pick_engine(tmp_path, "cpu") == "eager"
    assert reporting.pick_engine(tmp_path, "cuda", {"x": "RuntimeError: CUDA error: an illegal memory access"}) == "eager"
    for kw in (dict(ok=False), dict(ok=None), dict(speed=9.)):
        write(**kw)
        assert reporting.pick_engine(tmp_path, "cuda") == "eager", kw
    (tmp_path / "benchmark.json").unlink()
    assert reporting.pick_engine(tmp_path, "cuda") == "eager"


def test_the_engine_of_a_report_is_checked_and_handed_on(tmp_path, small, monkeypatch):
    with pytest.raises(InputError, match="engine: 'graphs' needs a GPU"): reporting.gpu_report(tmp_path, "micro", device="cpu", jobs=[], engine="graphs")
    with pytest.raises(InputError, match="engine: 'fast' is not possible"): reporting.gpu_report(tmp_path, "micro", device="cpu", jobs=[], engine="fast")
    seen = []
    monkeypatch.setattr(reporting, "train_specs", lambda specs, store, device, engine: seen.append(engine))
    for job in reporting.table_jobs([runs.RunSpec("han", scale="micro")], tmp_path, "cpu", {}, engine=lambda: "compile"): job.do()
    assert seen == ["compile"]


def test_a_run_that_takes_the_gpu_with_it_ends_the_call_and_the_next_one_goes_past_it(tmp_path, small, monkeypatch, capsys):
    specs = [runs.RunSpec("han", {"temporal": "none"}, scale="micro", seed=s, epochs=1) for s in (1, 2)]
    right = reporting.run

    def run(spec, *args):
        if spec.seed == 1: raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return right(spec, *args)

    def gone(device): raise RuntimeError("CUDA error: the device is gone")
    monkeypatch.setattr(reporting, "run", run)
    monkeypatch.setattr(reporting, "all_specs", lambda *args: specs)
    monkeypatch.setattr(reporting, "check_alive", gone)
    with pytest.raises(RuntimeError, match="the device is gone"): reporting.gpu_report(tmp_path, "micro", pieces=("tables",), papers=["han"], device="cpu")
    failed = read_json(tmp_path / "manifest.json")["failed"]
    assert len(failed) == 1 and "illegal memory access" in next(iter(failed.values())) and not micro.records(tmp_path)
    monkeypatch.setattr(reporting, "check_alive", lambda device: None)                  # another process, with its GPU
    assert reporting.gpu_report(tmp_path, "micro", pieces=("tables",), papers=["han"], device="cpu") == []
    assert [r["seed"] for r in micro.records(tmp_path).values()] == [2]
    assert reporting.pick_engine(tmp_path, "cuda", read_json(tmp_path / "manifest.json")["failed"]) == "eager"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_parity_on_the_gpu():
    table = checks.parity("cuda")
    assert not (table["ok"] == False).any(), table[table["ok"] == False].to_string()  # noqa: E712


# --- a budget --------------------------------------------------------------------------------------------------------

@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(.5, 20), st.floats(.7, 1.)), min_size=1, max_size=20), st.floats(30, 100))
def test_a_budget_is_kept_once_the_kinds_are_known(wanted, budget):
    "With jobs that never take longer than the slowest of their kind, no call runs over, and all calls together finish"
    at, did = [0.], []

    def job(i, kind, cost, pace):
        def do(): at[0] += cost * pace; did.append(i)
        return reporting.Job("tables", str(i), f"run:{kind}", cost, do, lambda: i in did)
    jobs, rates = [job(i, *w) for i, w in enumerate(wanted)], {f"run:{k}": 1. for k in "abc"}
    for _ in range(len(jobs)):
        start = at[0]
        left = reporting.work(jobs, budget, rates, lambda: at[0], lambda s: None)
        assert at[0] - start <= budget
        if not left: break
        reporting.check_possible(left, rates, budget)
    assert sorted(did) == list(range(len(jobs)))


def test_the_first_of_a_kind_needs_half_a_budget():
    job = reporting.Job("benchmark", "x", "benchmark", 1., None, lambda: False)
    assert reporting.fits(job, {}, 50, 100) and not reporting.fits(job, {}, 49, 100)


def test_a_failing_run_is_noted_and_the_others_finish(small, tmp_path, monkeypatch, capsys):
    specs = [runs.RunSpec("han", {"temporal": t}, scale="micro") for t in ("none", "gru", "transformer")]
    failed, right = {}, reporting.run

    def run(spec, *args):
        if spec.options["temporal"] == "gru": raise FloatingPointError("loss is nan")
        return right(spec, *args)
    monkeypatch.setattr(reporting, "run", run)
    jobs = reporting.table_jobs(specs, tmp_path, "cpu", failed)
    assert reporting.work(jobs, 600, {}) == [] and len(micro.records(tmp_path)) == 2
    assert list(failed.values()) == ["FloatingPointError: loss is nan"] and "gru" in list(failed)[0]


def test_a_report_is_about_one_machine(tmp_path):
    m = reporting.open_manifest(tmp_path, "cpu")
    write_json({**m, "machine": {**m["machine"], "processor": "abacus", "torch": "1.0"}}, tmp_path / "manifest.json")
    with pytest.raises(InputError, match=r"manifest\.json: is of another processor and torch\. give another --out"): reporting.gpu_report(tmp_path, "tiny")


def test_changed_code_is_compared_and_measured_again(tmp_path):
    m = reporting.open_manifest(tmp_path, "cpu")
    write_json(m, tmp_path / "manifest.json")
    for name in ("parity.csv", "benchmark.json"): (tmp_path / name).write_text("")
    reporting.open_manifest(tmp_path, "cpu")
    assert (tmp_path / "parity.csv").exists()
    write_json({**m, "machine": {**m["machine"], "code": "other"}}, tmp_path / "manifest.json")
    assert reporting.open_manifest(tmp_path, "cpu")["machine"]["code"] == measure.code_hash()
    assert not (tmp_path / "parity.csv").exists() and not (tmp_path / "benchmark.json").exists()


# --- a machine with nothing but torch, numpy and pandas --------------------------------------------------------------

BARE = """
import sys
import types
class Without:
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {blocked} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(f) for f in sys.meta_path if hasattr(f, "find_spec")]
import torch
torch.set_num_threads(1)
from dataclasses import replace
from avvp_nb import runs
from avvp_nb.data.clips import random_clips
from avvp_nb.methods.zoo import METHODS
from avvp_nb.runs import gpu_report as gpu
runs.SCALES["micro"] = runs.Scale(48, 16, 16, epochs=3, step=2)
def small(m): return replace(m, build=lambda plain, sizes, *rest: m.build(plain, {{**sizes, "dim": 32}}, *rest))
for name, m in list(METHODS.items()): METHODS[name] = small(m)
def quick(out, device, **kw): return benchmark(out, device, batch_sizes=(2,), seconds=.01, methods=("han",), stacks=(2,), clips=random_clips(4))
benchmark, gpu.benchmark_jobs = gpu.benchmark_jobs, quick
import argparse
p = argparse.ArgumentParser(); gpu.add_arguments(p)
sys.exit(gpu.cmd_gpu_report(p.parse_args(sys.argv[1:])))
"""


def bare(*args):
    "Run `gpu-report` where nothing but torch, numpy and pandas can be imported"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "AVVP_SHARED": "/nowhere", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", BARE.format(blocked=set(BLOCKED)), *map(str, args)], env=env, text=True, capture_output=True, timeout=600)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    "A finished report of a bare machine at a micro scale, and what its two calls said"
    out = tmp_path_factory.mktemp("report")
    first = bare("--out", out, "--scale", "micro", "--papers", "ma", "--budget", ".001")
    return out, first, bare("--out", out, "--scale", "micro", "--papers", "ma")


def test_a_bare_machine_makes_a_whole_report(report):
    out, first, second = report
    assert first.returncode == 0 and "left: " in first.stdout and "run the same command again" in first.stdout, first.stderr[-2000:]
    assert second.returncode == 0 and second.stdout.splitlines()[-1] == "all done", (second.stdout + second.stderr)[-3000:]
    assert "golden cases: not found" in second.stdout and "the device is the CPU itself" in second.stdout
    m = read_json(out / "manifest.json")
    assert not m["failed"] and all(p["left"] == 0 for p in m["pieces"].values()) and len(m["calls"]) == 2
    assert m["machine"]["torch"] == torch.__version__
    assert set(m["seconds"]) and sum(m["seconds"].values()) <= sum(c["seconds"] for c in m["calls"]) + 1
    table = pd.read_csv(out / "parity.csv")
    assert set(table["case"]) >= {"han", "ma", "jomold", "dgm on jomold"} and (table["ok"].dropna().astype(str) == "True").all()
    assert {"ceilings", "han, batch 2, 2 stacked"} <= set(read_json(out / "benchmark.json")["results"])
    times = pd.read_csv(out / "times.csv").set_index("what")
    assert (times["runs"] == times["recorded"]).all() and list(times.index) == ["ma 1", "ma 2", "ma 3", "ma 4", "all"]
    effect = pd.read_csv(out / "precision.csv")
    assert list(effect) == ["level", "metric", "fp32", "sd over seeds", "bf16 - fp32"] and effect["fp32"].between(0, 100).all()


def test_the_records_of_a_bare_machine_are_like_any_others(report, small):
    "Weights read by the library, tables rendered, probabilities with their hash"
    out, _, _ = report
    store = runs.Store(out)
    records = store.records()
    assert len(records) >= 5 and all(store.probabilities(r).video.shape == (16, 25) for r in records)
    for r in records:
        with safe_open(store.weight_path(r["key"]), "pt") as f: assert json.loads(f.metadata()["avvp_nb"])["key"] == r["key"]
        runs.load_weights(store.weight_path(r["key"]))
    times = pd.read_csv(out / "times.csv").set_index("what")
    assert list(times["runs"]) == [8, 4, 5, 8, 19]
    usual = [r for r in records if r["spec"]["precision"] == "fp32"]
    assert times.loc["all", "seconds"] == pytest.approx(sum(r["wall_time"] for r in usual))
    assert {p.stem for p in (out / "tables").glob("*.md")} == {f"ma_{t}_micro_simulated{x}" for t in "1234" for x in ("", "_gains")}


def test_what_a_bare_machine_made_comes_home(report, tmp_path, small):
    out, _, _ = report
    done = merging.merge(out, tmp_path)
    n = len(runs.Store(out).records())
    assert done["copied"]["records"] == done["copied"]["probabilities"] == done["copied"]["weights"] == n
    assert {p.name: file_hash(p) for p in (tmp_path / "records").iterdir()} == {p.name: file_hash(p) for p in (out / "records").iterdir()}
    assert set(reproduce("ma", "1", "micro", (1,), tmp_path, train=False)) == {"ma 1"}
    again = merging.merge(out, tmp_path)
    assert not any(again["copied"].values()) and again["equal"] == sum(done["copied"].values())


# --- bringing results home -------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def source(tmp_path_factory):
    "A store with two runs"
    root, patch = tmp_path_factory.mktemp("source"), pytest.MonkeyPatch()
    micro.install(patch.setitem)
    for seed in (1, 2): runs.run(runs.RunSpec("han", scale="micro", seed=seed, epochs=1), root, "cpu", "off")
    patch.undo()
    return root


@pytest.fixture
def copy(source, tmp_path, small):
    "A copy of it that may be spoilt"
    shutil.copytree(source, tmp_path / "copy")
    return tmp_path / "copy"


def content(root): return {p.relative_to(root).as_posix(): file_hash(p) for p in sorted(root.rglob("*.*")) if p.is_file()}


def keys(root): return sorted(p.stem for p in (root / "records").glob("*.json"))


DAMAGE = {"cut record": ("records", lambda p: p.write_bytes(p.read_bytes()[:100]), "is not valid JSON"),
          "record of something else": ("records", lambda p: p.write_text("{}"), "is not a whole run record"),
          "renamed record": ("records", lambda p: p.rename(p.with_name("han-other.json")), "is the record of han-"),
          "flipped probabilities": ("probabilities", lambda p: p.write_bytes(p.read_bytes()[:-1] + b"?"), "is missing or not the file of this record"),
          "no probabilities": ("probabilities", lambda p: p.unlink(), "is missing or not the file of this record")}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_source_is_refused_and_named(copy, tmp_path, name):
    part, spoil, said = DAMAGE[name]
    victim = sorted((copy / part).iterdir())[-1]
    spoil(victim)
    with pytest.raises(InputError, match=said) as e: merging.merge(copy, tmp_path / "home")
    assert part in str(e.value) and e.value.fix and not (tmp_path / "home").exists()


def test_records_alone(copy, tmp_path):
    shutil.rmtree(copy / "probabilities")
    assert merging.merge(copy, tmp_path / "home", parts=("records",)) == {"copied": {"records": 2}, "equal": 0, "kept": 0}
    with pytest.raises(InputError, match="is missing or not the file"):
        store = runs.Store(tmp_path / "home")
        store.probabilities(store.records()[0])


def test_missing_weights_do_not_matter(copy, tmp_path):
    shutil.rmtree(copy / "weights")
    assert merging.merge(copy, tmp_path / "home")["copied"] == {"probabilities": 2, "weights": 0, "products": 0, "videos": 2, "records": 2}


@pytest.fixture
def rival(copy):
    "The same keys, one with other results"
    path = sorted((copy / "records").iterdir())[0]
    record = read_json(path)
    write_json({**record, "wall_time": record["wall_time"] + 1}, path)
    return copy, path.stem


def test_a_differing_record_is_never_overwritten(source, rival, tmp_path):
    other, key = rival
    home = tmp_path / "home"
    merging.merge(source, home)
    (home / "records" / f"{keys(home)[1]}.json").unlink()                       # something would be left to copy
    before = content(home)
    with pytest.raises(InputError, match=f"home/records/{key}.json: differs from .*copy/records/{key}.json"): merging.merge(other, home)
    assert content(home) == before
    done = merging.merge(other, home, keep=True)
    assert done["kept"] == 1 and done["copied"]["records"] == 1 and keys(home) == keys(source)
    assert all(content(home)[k] == v for k, v in before.items())


@pytest.mark.parametrize("moment", range(6))
def test_an_interrupted_merge_leaves_no_record_without_its_files(source, small, tmp_path, monkeypatch, moment):
    home, count, right = tmp_path / "home", [0], merging.copy_file

    def fail(a, b):
        if count[0] == moment: raise KeyboardInterrupt
        count[0] += 1
        right(a, b)
    monkeypatch.setattr(merging, "copy_file", fail)
    with pytest.raises(KeyboardInterrupt): merging.merge(source, home)
    store = runs.Store(home)
    for r in store.records(): store.probabilities(r)
    assert not list(home.rglob("*.part"))
    monkeypatch.setattr(merging, "copy_file", right)
    merging.merge(source, home)
    assert content(home) == {k: v for k, v in content(source).items() if k.split("/")[0] in merging.PARTS}


def test_merge_from_a_shell(source, small, tmp_path, capsys):
    p = argparse.ArgumentParser()
    merging.add_merge_arguments(p)
    merging.cmd_merge(p.parse_args([str(source), str(tmp_path / "home"), "--parts", "records"]))
    assert capsys.readouterr().out == "copied 2 records; 0 files were there already; 0 differ and were left as they are\n"
    with pytest.raises(InputError, match="parts: 'recods' is not possible.*did you mean 'records'"): merging.merge(source, tmp_path, ("recods",))


def test_the_keep_flag_keeps_all_files_of_a_run(source, copy, tmp_path):
    "Probabilities of the other run are not mixed with the record that is kept"
    home = tmp_path / "home"
    merging.merge(source, home)
    key = keys(home)[0]
    record = read_json(home / "records" / f"{key}.json")
    write_json(replace_wall(record), copy / "records" / f"{key}.json")
    (home / "weights" / f"{key}.safetensors").unlink()
    assert merging.merge(copy, home, keep=True)["copied"]["weights"] == 0


def replace_wall(record): return {**record, "wall_time": -1.}


def test_a_stack_is_measured():
    found = reporting.stack_rate(2, 4, clips=replace(CLIPS), dim=16, seconds=.01)
    assert found["runs"] == 2 and found["videos/s"] > 0


# --- make bench ------------------------------------------------------------------------------------------------------

def test_a_benchmark_is_saved_under_the_name_of_its_machine(tmp_path, monkeypatch, capsys):
    bench, fake = load(ROOT / "bench" / "__main__.py"), types.ModuleType("bench.scoring")
    fake.run = lambda: {"batch 16": {"ratio": 1.75}}
    monkeypatch.setitem(sys.modules, "bench.scoring", fake)
    monkeypatch.chdir(tmp_path)
    assert bench.main(["scoring", "--save"]) == 0
    path, = (tmp_path / "figures" / "bench").glob("*.json")
    record = read_json(path)
    assert path.stem == measure.slug(record["hardware"]) and record["results"]["scoring"]["batch 16"]["ratio"] == 1.75 and record["finished"]
    assert "| scoring | batch 16: ratio | 1.75 |" in path.with_suffix(".md").read_text()
    def fail(): raise OSError("no disk")
    fake.run = fail
    path.unlink()
    assert bench.main(["scoring", "--save"]) == 1 and not path.exists()       # what failed is not saved


def test_the_benchmark_measures_both_ways_in_turns():
    training = load(ROOT / "bench" / "training.py")
    order = []
    t = training.in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == list("ababab") and set(t) == {"a", "b"} and all(0 <= v < 1 for v in t.values())
    found = training.goals({"batch 128": {"ours, % of the ceiling": 71., "ratio": 2.5}, "batch 16": {"ratio": 2.}})
    assert [v["reached"] for v in found.values()] == [71., 2., 2.5] and all(v["wanted"] for v in found.values())
    x = torch.ones(4, 8)
    product, total = training.counted(lambda: x @ x.T), training.counted(lambda: x + 1)
    assert product["GFLOP"] == 2 * 4 * 8 * 4 / 1e9 and product["other GB"] == 0
    assert total == {"GFLOP": 0, "GB": 256 / 1e9, "other GB": 256 / 1e9}     # 32 numbers read, 32 written


def test_the_two_loops_of_the_benchmark_are_the_same_network():
    "Its reference from PyTorch's own parts gives our probabilities"
    training = load(ROOT / "bench" / "training.py")
    ours, reference = (m.eval() for m in training.pair(0.0))
    x = torch.rand(2, 10, 128), torch.rand(2, 80, 2048), torch.rand(2, 10, 512)
    with torch.no_grad(): a, b = ours(*x), reference(*x)
    for p, q in zip((a.video, a.audio, a.visual), b): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


# --- speed.ipynb -----------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_speed_notebook_runs(tmp_path):
    from test_notebook_dgm import papermill
    options = f"{{batch_sizes: [2, 4], seeds: [1], seconds: 0.01, device: cpu, out: {tmp_path}/runs}}"
    done = papermill(ROOT / "nbs" / "speed.ipynb", tmp_path / "out.ipynb", "-y", options)
    assert done.returncode == 0, done.stderr[-4000:]
    outputs = [o for c in json.loads((tmp_path / "out.ipynb").read_text())["cells"] for o in c.get("outputs", [])]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 3 and "simulated" in json.dumps(outputs)
