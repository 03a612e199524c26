"""Sweeps: grids, claims, stores behind URLs, and a real Ray cluster whose workers and drivers are killed.

Started as a script this file is a driver: `test_cluster.py '{"out": ..., "executor": ...}'` sweeps `GRID` and prints what became of it.
Tests marked `ray` need `pip install 'avvp_nb[cluster]'` and are skipped without it."""
import argparse
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import micro
import pytest
import torch

from avvp_nb.core import InputError, write_json
from avvp_nb.data import sources
from avvp_nb.records.spec import RunSpec
from avvp_nb.records.store import Store
from avvp_nb.results import figures_ma
from avvp_nb.results.plans import plan, with_first
from avvp_nb.runs import sweep as cluster
from avvp_nb.runs.remote import Remote, create_once, open_url, pull, push
from avvp_nb.runs.single import run
from avvp_nb.runs.stacked import StackFailure
from avvp_nb.runs.sweep import Outcome, expand, plan_tasks, read_grid, sweep

GRID = [{"method": "han", "options": {"temporal": ["none", "gru"]}, "scale": "micro", "seed": [1, 2], "epochs": 8},
        {"method": "ma", "options": {"refine": "audio"}, "scale": "micro", "epochs": 4}]          # needs its base model first
N = 6                                                                                             # runs of it, the base included
FAST = dict(pulse=.2, patience=60.)    # nothing here may have to wait for patience


@pytest.fixture(autouse=True)
def small_networks(monkeypatch): micro.install(monkeypatch.setitem)


def small_work(*args, work=cluster.work):
    "What a worker does, with networks of 32 dimensions"
    import micro
    if "micro" not in micro.runs.SCALES: micro.install()
    return work(*args)


def deadly_work(job, specs, *args):
    "... that dies with one of the runs, every time"
    if specs[0].options.get("temporal") == "gru" and specs[0].seed == 2: os.kill(os.getpid(), signal.SIGKILL)
    return small_work(job, specs, *args)


class SmallRequeued(cluster.Requeued):
    "Slurm's stand-in imports this file"
    def __call__(self, *args): return small_work(*args)


def essences(store):
    "What must be equal, by run"
    return {r["key"]: micro.essence(store, r) for r in micro.records(store).values()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    "The grid on one process: {key: essence}"
    with pytest.MonkeyPatch.context() as m:
        micro.install(m.setitem)
        store = tmp_path_factory.mktemp("reference")
        assert [o.state for o in sweep(expand(GRID), store, device="cpu", progress="off")] == ["trained"] * N
        return essences(store)


# --- grids -----------------------------------------------------------------------------------------------------------

def test_a_grid_is_the_same_as_yaml_and_as_json(tmp_path):
    yaml = pytest.importorskip("yaml")
    grid = {"method": "dgm", "backbone": ["han", "jomold"], "options": {"gamma": [.05, .1], "msdu": [True, False]}, "seed": [1, 2, 3]}
    (tmp_path / "g.yaml").write_text(yaml.safe_dump(grid))
    write_json(grid, tmp_path / "g.json")
    specs = read_grid(tmp_path / "g.yaml")
    assert specs == read_grid(tmp_path / "g.json") and len(specs) == 24 == len(set(specs))
    assert Counter((s.backbone, s.options["gamma"], s.options["msdu"]) for s in specs) == dict.fromkeys(
        [(b, g, m) for b in ("han", "jomold") for g in (.05, .1) for m in (True, False)], 3)


def test_without_pyyaml_a_yaml_grid_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    (tmp_path / "g.yaml").write_text("method: han\n")
    with pytest.raises(InputError, match=r"g\.yaml: YAML needs PyYAML\. pip install 'avvp_nb\[cluster\]', or write the same as JSON"):
        read_grid(tmp_path / "g.yaml")


@pytest.mark.parametrize("grid, said", [
    ({"metod": "han"}, "g.json: metod: no such key. did you mean 'method'"),
    ([{"method": "han"}, {"sead": 1}], r"g.json\[1\]: sead: no such key. did you mean 'seed'"),
    ({"method": "hna"}, "g.json: method: 'hna' is not possible"),
    ({"method": "dgm", "options": {"gama": 1.}}, "g.json: options: gama: no such key. did you mean 'gamma'"),
    ({"method": "dgm", "options": [.1]}, "g.json: options: 0.1 is a float"),
    ({"method": "dgm", "options": {"gamma": "1e-1"}}, "g.json: gamma: '1e-1' is a str. expected float"),
    ({"seed": []}, "g.json: seed: an empty list"),
    ({"seed": "1"}, "g.json: seed: '1' is a str"),
    ({"data": {"anotations": "x"}}, "g.json: data: anotations: no such key. did you mean 'annotations'"),
    ({"data": {"sim": {"nothing": 1}}}, "g.json: data: sim: nothing: no such key"),
    ({"data": {"features": "x"}}, "features without annotations"),
    ({"tables": {"paper": "dgm", "table": "IX"}}, "table of dgm: 'IX' is not possible"),
    ({"tables": {"papr": "dgm"}}, "g.json: tables: papr: no such key. did you mean 'paper'"),
    ({"tables": {"paper": "dgm"}, "options": {}}, "g.json: options: no such key"),
    ("han", "g.json: 'han' is a str. expected names and values"),
    (None, "g.json: None is a NoneType")])
def test_what_a_grid_cannot_say_is_refused_with_its_place(tmp_path, grid, said):
    (tmp_path / "g.json").write_text(json.dumps(grid))
    with pytest.raises(InputError, match=said): read_grid(tmp_path / "g.json")


def test_tables_are_what_reproduce_plans():
    assert expand({"tables": {"paper": "dgm", "table": ["V", "VI"]}, "scale": "tiny", "seed": 3}) == list(dict.fromkeys(
        plan("dgm", "V", "tiny", (3,)).specs + plan("dgm", "VI", "tiny", (3,)).specs))
    assert set(expand({"tables": {"paper": "han"}})) == {s for t in ("1", "2") for s in plan("han", t).specs}


def test_what_is_needed_first_comes_first():
    specs = with_first(expand({"tables": {"paper": ["dgm", "ma"]}, "scale": "tiny"}))
    for size in (1, 3, 100):
        tasks = plan_tasks(specs, size)
        place = {s: i for i, t in enumerate(tasks) for s in t.specs}
        assert sorted(place.values()) == sorted(i for i, t in enumerate(tasks) for _ in t.specs) and set(place) == set(specs)
        for i, t in enumerate(tasks):
            assert set(t.after) == {place[f] for s in t.specs for f in s.base.first(s)} and all(j < i for j in t.after)
        assert [i for layer in cluster.layers(tasks) for i in layer] == sorted(range(len(tasks)), key=lambda i: cluster.depth(tasks[i].specs[0]))


# --- claims and URLs -------------------------------------------------------------------------------------------------

@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path): return f"memory://{tmp_path.name}" if request.param == "memory" else f"file://{tmp_path}/remote"


def at_once(n, f):
    "Results of `f(0) ... f(n-1)`, in n threads that start together"
    barrier, out = threading.Barrier(n), [None] * n

    def go(i):
        barrier.wait()
        out[i] = f(i)
    threads = [threading.Thread(target=go, args=(i,)) for i in range(n)]
    for t in threads: t.start()
    for t in threads: t.join()
    return out


def test_of_many_who_create_one_object_one_succeeds(url):
    fs, root = open_url(url)
    for k in range(20):
        got = at_once(8, lambda i, k=k: create_once(fs, f"{root}/x/{k}", str(i).encode() * 1000))
        assert got.count(True) == 1 and fs.cat_file(f"{root}/x/{k}") == str(got.index(True)).encode() * 1000


def test_of_many_who_claim_one_run_one_succeeds(url, tmp_path):
    remotes = [Remote(url, tmp_path / "stage", pulse=.05, patience=30) for _ in range(6)]
    for k in range(10):
        got = at_once(6, lambda i, k=k: remotes[i].claim(f"han-{k}"))
        assert sum(c is not None for c in got) == 1


def test_of_many_who_take_over_a_dead_claim_one_succeeds(url, tmp_path):
    remotes = [Remote(url, tmp_path / "stage", pulse=.05, patience=.3) for _ in range(6)]
    dead = remotes[0].claim("han-1")
    assert [r.claim("han-1") for r in remotes] == [None] * 6                       # everybody begins to watch
    time.sleep(.4)
    got = at_once(6, lambda i: remotes[i].claim("han-1"))
    assert sum(c is not None for c in got) == 1 and next(c for c in got if c).generation == 1
    dead.beat()
    assert dead.lost


def test_a_living_claim_is_never_taken_over(url, tmp_path):
    a, b = (Remote(url, tmp_path / "stage", pulse=.05, patience=.4) for _ in range(2))
    with a.claim("han-1"):
        for _ in range(12):
            assert b.claim("han-1") is None
            time.sleep(.1)
    assert b.claim("han-1").generation == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/ns/pid"), reason="needs Linux")
def test_the_claim_of_a_process_that_is_gone_is_taken_over_at_once(url, tmp_path):
    a, b = (Remote(url, tmp_path / "stage", pulse=1, patience=1000) for _ in range(2))
    claim = a.claim("han-1")
    assert b.claim("han-1") is None
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    a.fs.pipe_file(claim.path, claim.content().replace(f"pid {os.getpid()}:".encode(), f"pid {child.pid}:".encode()))
    assert b.claim("han-1").generation == 1


def test_who_slept_through_its_patience_uploads_nothing(url, tmp_path):
    "Both compute, one record: that of the one who took over"
    spec = RunSpec("han", {"temporal": "none"}, scale="micro", epochs=1)
    a, b = (Remote(url, tmp_path / n, pulse=1000, patience=.2) for n in "ab")
    key = run(spec, a.store, "cpu", "off")["key"]
    with a.claim(key) as asleep:
        assert b.claim(key) is None
        time.sleep(.3)
        with b.claim(key) as awake:
            assert not push(a, key, asleep) and not a.has(key)
            run(spec, b.store, "cpu", "off")
            assert push(b, key, awake) and b.has(key)
        assert not push(a, key, asleep)
    assert a.claimed(key) == (-1, None) and a.recorded() == {key}


def test_the_first_complete_record_stays(url, tmp_path):
    "Even where both were sure of themselves"
    spec = RunSpec("han", {"temporal": "none"}, scale="micro", epochs=1)
    remotes = [Remote(url, tmp_path / n) for n in "abc"]
    key = [run(spec, r.store, "cpu", "off")["key"] for r in remotes][0]
    for i, r in enumerate(remotes): write_json({**r.store.record(key), "wall_time": i}, r.store.record_path(key))
    got = at_once(3, lambda i: push(remotes[i], key))
    assert got.count(True) == 1
    assert pull(remotes[0], key, Store(tmp_path / "copy"))["wall_time"] == got.index(True)


def test_an_upload_that_breaks_off_leaves_no_record(url, tmp_path, monkeypatch):
    spec = RunSpec("han", {"temporal": "none"}, scale="micro", epochs=1)
    remote = Remote(url, tmp_path / "stage")
    put = remote.fs.put_file

    def unplugged(local, path):
        if "weights" in path: raise OSError("network is unreachable")
        put(local, path)
    with monkeypatch.context() as m:
        m.setattr(remote.fs, "put_file", unplugged)
        (o,) = sweep([spec], url, device="cpu", progress="off", stage=tmp_path / "stage")
    assert o.state == "failed" and "lies in the stage: OSError: network is unreachable" in o.why and not remote.recorded()
    monkeypatch.setattr(cluster, "run_group", lambda specs, store, *a: [store.record(o.key)])     # nothing is trained again
    assert [x.state for x in sweep([spec], url, device="cpu", progress="off", stage=tmp_path / "stage")] == ["trained"]


def test_a_url_gives_what_a_folder_gives(url, tmp_path, reference):
    outcomes = sweep(expand(GRID), url, device="cpu", progress="off", stage=tmp_path / "stage", **FAST)
    assert [o.state for o in outcomes] == ["trained"] * N
    assert cluster.collect(outcomes, url, tmp_path / "here", tmp_path / "stage") == N
    assert essences(tmp_path / "here") == reference
    again = sweep(expand(GRID), url, device="cpu", progress="off", stage=tmp_path / "another", **FAST)
    assert [o.state for o in again] == ["recorded"] * N
    if url.startswith("file"): assert essences(tmp_path / "remote") == reference                   # the layout is that of a store
    refined = next(r for r in micro.records(tmp_path / "here").values() if r["first"])
    assert figures_ma.refinement_of(refined, Store(tmp_path / "here"))                                   # products travel as well


def test_a_first_stage_that_another_machine_made_is_fetched(tmp_path, reference):
    url = f"file://{tmp_path}/remote"
    ma = expand(GRID)[-1]
    sweep(with_first([ma])[:1], url, device="cpu", progress="off", stage=tmp_path / "one", **FAST)
    outcomes = sweep([ma], url, device="cpu", progress="off", stage=tmp_path / "two", **FAST)
    assert [o.state for o in outcomes] == ["recorded", "trained"]
    assert essences(tmp_path / "remote") == {k: v for k, v in reference.items() if k.startswith("ma-")}


@pytest.mark.parametrize("url, said", [("nonsense://x", "nonsense://x: Protocol not known"), ("file:///proc/x", "cannot be written")])
def test_a_url_that_cannot_be_used_is_refused_before_any_work(tmp_path, monkeypatch, url, said):
    monkeypatch.setattr(cluster, "run_group", None)
    with pytest.raises(InputError, match=said): sweep([RunSpec(scale="micro")], url, stage=tmp_path / "stage")


def test_storage_that_forgets_exclusive_creation_is_refused(tmp_path, monkeypatch):
    remote = Remote("memory://forgetful", tmp_path / "stage")
    pipe = remote.fs.pipe_file
    monkeypatch.setattr(remote.fs, "pipe_file", lambda path, data, mode="overwrite": pipe(path, data))
    with pytest.raises(InputError, match="does not refuse to create an object twice"): remote.prepare()


# --- the driver ------------------------------------------------------------------------------------------------------

def test_a_run_that_fails_stops_only_what_needs_it(tmp_path, monkeypatch):
    def diverges(spec, *args):
        if spec.method == "ma" and spec.options["refine"] == "none": raise FloatingPointError("loss term 'audio' is nan")
        return run(spec, *args)
    monkeypatch.setattr(cluster, "run", diverges)
    outcomes = sweep(expand(GRID), tmp_path, device="cpu", progress="off")
    assert [o.state for o in outcomes] == ["trained"] * 4 + ["failed", "skipped"]
    assert outcomes[4].why == "FloatingPointError: loss term 'audio' is nan" and "Traceback" in outcomes[4].details
    assert outcomes[5].why == f"needs {outcomes[4].key}, which failed" and len(micro.records(tmp_path)) == 4


def test_a_stack_makes_the_records_of_its_runs(tmp_path, reference):
    outcomes = sweep(expand(GRID), tmp_path, device="cpu", progress="off", stack=4)
    assert [o.state for o in outcomes] == ["trained"] * N and {o.key for o in outcomes} == set(reference) == set(essences(tmp_path))


def test_a_run_that_fails_in_a_stack_leaves_the_others(tmp_path, monkeypatch):
    "What the stack says about each of its runs becomes the outcome of that run"
    def half(specs, store, *args):
        keys, records = list(cluster.keys_of(specs, store).values()), [run(specs[0], store, "cpu", "off"), *[None] * (len(specs) - 1)]
        raise StackFailure({k: f"Traceback ...\nFloatingPointError: {k} is nan\n" for k in keys[1:]}, records)
    monkeypatch.setattr(cluster, "run_stacked", half)
    a, b = sweep([RunSpec("han", {"temporal": "none"}, scale="micro", seed=s, epochs=1) for s in (1, 2)], tmp_path, progress="off", stack=2)
    assert (a.state, b.state, b.why) == ("trained", "failed", f"FloatingPointError: {b.key} is nan") and b.details.startswith("Traceback")
    monkeypatch.setattr(cluster, "run_stacked", lambda *args: 1 / 0)
    assert {o.why for o in sweep([RunSpec(scale="micro", seed=s) for s in (1, 2)], tmp_path, progress="off", stack=2)} == {"ZeroDivisionError: division by zero"}


def test_the_engine_is_handed_on(tmp_path, monkeypatch):
    "Compiled runs are tasks of their own; an engine that is not there is refused before any work where it can be known"
    monkeypatch.setattr(torch, "compile", lambda model, **kw: model)
    specs = [RunSpec("han", {"temporal": "none"}, scale="micro", seed=s, epochs=1) for s in (1, 2)]
    assert [o.state for o in sweep(specs, tmp_path / "a", device="cpu", progress="off", stack=2, engine="compile")] == ["trained"] * 2
    assert [r["hardware"]["engine"] for r in micro.records(tmp_path / "a").values()] == ["compile"] * 2
    with pytest.raises(InputError, match="engine: 'graphs' needs a GPU"): sweep(specs, tmp_path / "b", device="cpu", engine="graphs")
    with pytest.raises(InputError, match="engine: 'fast' is not possible"): sweep(specs, tmp_path / "b", "ray", engine="fast")
    assert not (tmp_path / "b").exists()
    outcomes = cluster.run_group(specs, Store(tmp_path / "c"), "cpu", "off", "graphs")     # a worker without a GPU
    assert all("needs a GPU" in o.why for o in outcomes)


def test_a_worker_that_writes_elsewhere_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "work", lambda job, specs, wait, *before: [Outcome(k, "trained") for k in cluster.keys_of(specs, Store(tmp_path)).values()])
    (o,) = sweep([RunSpec(scale="micro")], tmp_path, progress="off")
    assert o.state == "failed" and "not in this store: use a folder that all machines share" in o.why


def test_a_scale_of_your_own_travels_with_the_task(tmp_path, monkeypatch):
    monkeypatch.setitem(sources.SCALES, "own", sources.Scale(16, 8, 8, epochs=1))
    monkeypatch.setattr(cluster, "work", lambda job, *args, work=cluster.work: (sources.SCALES.pop("own"), work(job, *args))[1])
    assert [o.state for o in sweep([RunSpec(scale="own")], tmp_path, device="cpu", progress="off")] == ["trained"]


def test_a_task_whose_worker_never_answers_has_failed(tmp_path, monkeypatch):
    def dies(*args): raise RuntimeError("The worker died unexpectedly")
    monkeypatch.setattr(cluster, "work", dies)
    outcomes = sweep(expand(GRID), tmp_path, progress="off")
    assert {(o.state, o.why) for o in outcomes} == {("failed", "RuntimeError: The worker died unexpectedly")}


def test_the_command_says_what_failed(tmp_path, monkeypatch, capsys):
    write_json({"method": "han", "scale": "micro", "seed": [1, 2], "epochs": 1}, tmp_path / "g.json")
    parser = argparse.ArgumentParser()
    cluster.add_arguments(parser)
    a = parser.parse_args([str(tmp_path / "g.json"), "--out", str(tmp_path / "store"), "--device", "cpu", "--progress", "off"])
    with monkeypatch.context() as m:
        m.setattr(cluster, "run", lambda spec, *args: run(spec, *args) if spec.seed == 1 else 1 / 0)
        assert cluster.cmd_sweep(a) == 1
    out, err = capsys.readouterr()
    assert "1 of 2 runs recorded" in out and "failed: ZeroDivisionError: division by zero" in err and "Traceback" in err
    assert cluster.cmd_sweep(a) == 0 and "2 of 2 runs recorded" in capsys.readouterr().out


def driver(out, executor="local", **kw):
    "A driver in a process of its own; `out` is a folder or URL"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, __file__, json.dumps({"out": str(out), "executor": executor, **kw})], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def answer(process, timeout=300):
    "What became of the runs: a Counter of states by what the driver printed last"
    said = process.communicate(timeout=timeout)[0]
    assert process.returncode == 0, said
    print(said[-5000:])                                                          # shown by pytest where a test fails
    return Counter(json.loads(said.splitlines()[-1]))


def wait_for(condition, process=None, seconds=180):
    "Wait until something is true, but not for ever, nor when the process has ended"
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        assert process is None or process.poll() is None, process.stdout.read()
        time.sleep(.02)


def stores(kind, tmp_path):
    "(what the driver is given, the folder in which records appear, the folder in which checkpoints appear)"
    if kind == "folder": return dict(out=str(tmp_path / "store")), tmp_path / "store", tmp_path / "store"
    return dict(out=f"file://{tmp_path}/remote", stage=str(tmp_path / "stage"), **FAST), tmp_path / "remote", tmp_path / "stage"


kinds = pytest.mark.parametrize("kind", ["folder", "url"])


@pytest.mark.slow
@kinds
def test_kill_9_of_a_driver(tmp_path, reference, kind):
    "Killed in the middle of a run and started again: nothing is lost, nothing is done twice"
    to, store, stage = stores(kind, tmp_path)
    process = driver(**to)
    wait_for(lambda: len(micro.records(store)) >= 1 and any(stage.glob("checkpoints/*.pt")), process)
    process.kill()
    process.communicate()
    before = len(micro.records(store))
    assert 1 <= before < N
    assert answer(driver(**to)) == {"recorded": before, "trained": N - before}
    assert essences(store) == reference and not any(stage.glob("checkpoints/*.pt"))


@pytest.mark.slow
@kinds
def test_two_drivers_on_one_store(tmp_path, reference, kind):
    to, store, _ = stores(kind, tmp_path)
    a, b = (answer(p) for p in [driver(**to), driver(**to)])
    assert a["trained"] + b["trained"] == N and a.total() == b.total() == N
    assert essences(store) == reference


# --- Slurm's stand-in ------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_submitit_runs_the_same(tmp_path, reference, monkeypatch):
    pytest.importorskip("submitit", reason="pip install 'avvp_nb[cluster]'")
    monkeypatch.setattr(cluster, "Requeued", SmallRequeued)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (os.path.dirname(__file__), os.environ.get("PYTHONPATH")))))
    outcomes = sweep(expand(GRID)[-1:], tmp_path / "store", "slurm", "cpu", "off", cluster="local", folder=tmp_path / "jobs")
    assert [o.state for o in outcomes] == ["trained"] * 2, outcomes                               # two jobs, one after the other
    assert essences(tmp_path / "store") == {k: v for k, v in reference.items() if k.startswith("ma-")}
    assert len({o.worker for o in outcomes} | {f":{os.getpid()}"}) == 3


def test_slurm_without_slurm_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="pip install 'avvp_nb[cluster]'")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="no sbatch on this machine"): sweep([RunSpec(scale="micro")], tmp_path, "slurm", progress="off")


@pytest.mark.parametrize("executor, package", [("ray", "ray"), ("slurm", "submitit")])
def test_an_executor_that_is_not_installed_names_the_extra(tmp_path, monkeypatch, executor, package):
    find = cluster.importlib.util.find_spec
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(InputError, match=rf"needs the package {package}.*pip install 'avvp_nb\[cluster\]'"):
        sweep([RunSpec(scale="micro")], tmp_path, executor, progress="off")


# --- Ray -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def address():
    "A Ray cluster of two processors on this machine"
    ray = pytest.importorskip("ray", reason="pip install 'avvp_nb[cluster]'")
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    ray.init(num_cpus=2, object_store_memory=80_000_000, include_dashboard=False, log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def parent(pid):
    "Parent of a process, 0 when it has gone"
    try: return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError: return 0


def workers():
    "Processes of this test's cluster that are in the middle of a task"
    def ours(pid):
        while pid > 1:
            if (pid := parent(pid)) == os.getpid(): return True
        return False

    def busy(p):
        try: return p.joinpath("cmdline").read_bytes().startswith((b"ray::work", b"ray::small_work"))
        except OSError: return False
    return [int(p.name) for p in Path("/proc").glob("[0-9]*") if busy(p) and ours(int(p.name))]


@pytest.mark.ray
@kinds
def test_kill_9_of_ray_workers(address, tmp_path, reference, kind):
    "Ray starts their tasks again on other workers, which go on"
    to, store, stage = stores(kind, tmp_path)
    process, killed, rng = driver(executor="ray", address=address, **to), set(), random.Random(0)
    for n in (0, 1):
        wait_for(lambda n=n: any(stage.glob("checkpoints/*.pt")) and len(micro.records(store)) >= n and set(workers()) - killed, process)
        victim = rng.choice(sorted(set(workers()) - killed))
        os.kill(victim, signal.SIGKILL)
        killed.add(victim)
    assert answer(process)["failed"] == 0 and len(killed) == 2
    assert essences(store) == reference


@pytest.mark.ray
@kinds
def test_kill_9_of_a_ray_driver(address, tmp_path, reference, kind):
    to, store, stage = stores(kind, tmp_path)
    process = driver(executor="ray", address=address, **to)
    wait_for(lambda: len(micro.records(store)) >= 1 and any(stage.glob("checkpoints/*.pt")), process)
    process.kill()
    process.communicate()
    assert len(micro.records(store)) < N
    got = answer(driver(executor="ray", address=address, **to))
    assert got.total() == N and set(got) <= {"recorded", "trained"}
    assert essences(store) == reference


@pytest.mark.ray
@kinds
def test_two_ray_drivers_on_one_store(address, tmp_path, reference, kind):
    to, store, _ = stores(kind, tmp_path)
    a, b = (answer(p) for p in [driver(executor="ray", address=address, **to) for _ in range(2)])
    assert a["trained"] + b["trained"] == N and a.total() == b.total() == N
    assert essences(store) == reference


@pytest.mark.ray
def test_a_worker_that_always_dies_fails_alone(address, tmp_path):
    "After its retries the task is given up; the others are recorded"
    said = answer(driver(tmp_path, "ray", address=address, deadly=True, retries=1))
    assert said == {"trained": 5, "failed": 1} and len(micro.records(tmp_path)) == 5


@pytest.mark.ray
def test_kill_9_of_a_ray_worker_with_a_stack(address, tmp_path):
    "A task of several runs is started again as a whole; those that are recorded stay as they are"
    process = driver(tmp_path, "ray", address=address, stack=4)
    wait_for(lambda: any(tmp_path.glob("checkpoints/*.pt")) and workers(), process)
    os.kill(workers()[0], signal.SIGKILL)
    assert answer(process)["failed"] == 0 and len(micro.records(tmp_path)) == N
    for r in micro.records(tmp_path).values(): Store(tmp_path).probabilities(r)


def main(out, executor, deadly=False, **kw):
    "Sweep `GRID`"
    micro.install()
    cluster.work = deadly_work if deadly else small_work
    outcomes = sweep(expand(GRID), out, executor, "cpu", "lines", **kw)
    print("\n".join(o.details for o in outcomes if o.details))
    print(json.dumps(Counter(o.state for o in outcomes)))


if __name__ == "__main__": main(**json.loads(sys.argv[1]))
