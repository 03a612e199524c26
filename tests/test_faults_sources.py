"""Faults of data before a run, each found by trying: parts of killed processes, stores whose numbers were changed, marks that are
no text, disks that are too small, runs that pack at the same time, counts that don't fit, ids that a terminal would obey."""
import json
import os
import signal
import sys
import time
import traceback
from types import SimpleNamespace

import numpy as np
import pytest

from avvp_nb import cli
from avvp_nb.core import InputError, read_json, write_json
from avvp_nb.data import sim_files as W
from avvp_nb.data import sim_labels as L
from avvp_nb.data import simulate as S
from avvp_nb.data import sources
from avvp_nb.data import unav100 as U
from avvp_nb.data import unav_features as UF
from avvp_nb.data import unav_simulate as US
from avvp_nb.data.annotations import load_annotations
from avvp_nb.data.packed import open_store, pack
from avvp_nb.data.sources import DataSpec, identify

fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked here")
GONE = 2**31 - 1          # larger than the number of any process
NO_NUMBER = [0, -1, 2.5, float("nan"), True, "3", 10**5000]


def child(f, log=None):
    "Start `f()` in a process of its own; its number. What it says on standard error goes to `log`"
    pid = os.fork()
    if pid: return pid
    status = 1
    try:
        if log: sys.stderr = open(log, "w", buffering=1)
        f()
        status = 0
    except BaseException: traceback.print_exc()
    finally: os._exit(status)


def status_of(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(moment, f):
    "Run `f()` in a process that dies before the `moment`-th file it renames into place"
    def dying():
        done, real = [], os.replace
        def replace(*args):
            done.append(args)
            if len(done) == moment: os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)
        os.replace = replace
        f()
    assert status_of(child(dying)) == -signal.SIGKILL


def parts(root): return sorted(p.name for p in root.rglob("*.part"))


def names(root): return sorted(str(p.relative_to(root)) for p in root.rglob("*"))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return W.write_simulated(tmp_path_factory.mktemp("sources")/"llp", {"train": 3, "val": 2, "test": 2})


@pytest.fixture(scope="module")
def unav(tmp_path_factory):
    return US.write_unav(tmp_path_factory.mktemp("sources")/"unav", {"train": 2, "val": 1, "test": 1})


@pytest.fixture
def store(written, tmp_path):
    "A packed store that may be spoiled"
    return pack(written, tmp_path/"store", load_annotations(written/"data"), dtype="float32", progress=False).path


def of_store(written, store): return DataSpec(str(written/"data"), str(store))


# ---- L1, L6: parts of killed processes --------------------------------------------------------------------------

@fork
@pytest.mark.parametrize("moment", ["array", "manifest", "rename"])
def test_a_killed_run_leaves_no_cache(tmp_path, monkeypatch, moment):
    def run(): W.cached_simulate(tmp_path, 2, frames=None)
    def die(*args, **kw): os.kill(os.getpid(), signal.SIGKILL)
    with monkeypatch.context() as m:
        if moment == "array": m.setattr(W, "fill_features", die)
        if moment == "array": assert status_of(child(run)) == -signal.SIGKILL
        else: killed_at({"manifest": 1, "rename": 2}[moment], run)
    left = [p for p in tmp_path.iterdir() if p.name.endswith(".part")]
    assert len(left) == 1 and (left[0]/"audio.npy").stat().st_size > 1000
    identify(DataSpec(), tmp_path)                          # the next start
    assert names(tmp_path) == []
    run()
    assert parts(tmp_path) == [] and len(list(tmp_path.iterdir())) == 1


@fork
@pytest.mark.parametrize("moment", [1, 2, 5, 8])   # SOURCE.json, the first feature, one of each of the other folders
def test_a_killed_simulate_leaves_nothing(tmp_path, moment):
    def run(): W.write_simulated(tmp_path, {"train": 2, "val": 1, "test": 1})
    killed_at(moment, run)
    assert len(parts(tmp_path)) == 1
    run()
    assert parts(tmp_path) == [] and len(load_annotations(tmp_path/"data")["train"].ids) == 2


@fork
@pytest.mark.parametrize("moment", [1, 3, 13])     # SOURCE.json, a feature, the annotations
def test_a_killed_simulate_of_unav_leaves_nothing(tmp_path, moment):
    def run(): US.write_unav(tmp_path, {"train": 2, "val": 1, "test": 1})
    killed_at(moment, run)
    assert len(parts(tmp_path)) == 1
    run()
    assert parts(tmp_path) == [] and len(U.load_unav(tmp_path)["train"]) == 2


LEFT = [f".han-0a1b.json.{GONE}.0123abcd.part", f".simabc_1.-x.npy.{GONE}.part", f"..writable.{GONE}.12345678.part",
        f".K.safetensors.{GONE}.ffffffff.part", f".ma-1.npz.{GONE}.00000000.part", f".table 1.html.{GONE}.01234567.part"]
YOURS = ["a.part", ".part", ".x.part", f"x.{GONE}.part", f".x.{GONE}.part.npy", f".x.{GONE}", ".x.99999999999999.part", ".x.0.part"]


def test_parts_of_dead_processes_are_told_from_all_else(tmp_path):
    living = [f".x.npy.{os.getpid()}.part", f".x.json.{os.getpid()}.0123abcd.part", W.part_name("simulated")]
    for name in (*LEFT, *YOURS, *living): (tmp_path/name).write_text("x")
    removed = W.sweep_leftovers(tmp_path)
    assert sorted(p.name for p in removed) == sorted(LEFT) and names(tmp_path) == sorted(YOURS + living)
    assert W.sweep_leftovers(tmp_path) == []


def test_a_number_that_was_given_to_another_process(tmp_path):
    "In a container, the next process often has the number of the last"
    for name in (f".a.npy.{os.getpid()}.part", f".b.npy.{os.getppid()}.part"):
        (tmp_path/name).write_text("x"); os.utime(tmp_path/name, (10**9, 10**9))
    W.sweep_leftovers(tmp_path)
    if W.began(os.getpid()): assert names(tmp_path) == []     # where it is known when a process began


def test_a_part_of_another_machine_is_kept_for_a_day(tmp_path):
    for name, age in (("old", 2*W.ABANDONED), ("new", 60)):
        path = tmp_path/f".{name}.{GONE}-00000000.0123abcd.part"
        path.mkdir(); (path/"audio.npy").write_text("x")
        for p in (path/"audio.npy", path): os.utime(p, (time.time() - age,)*2)
    W.sweep_leftovers(tmp_path)
    assert [p.name[:4] for p in tmp_path.iterdir()] == [".new"]


def test_a_link_is_removed_and_not_followed(tmp_path):
    (tmp_path/"mine").mkdir(); (tmp_path/"mine"/"data").write_text("x"); (tmp_path/"cache").mkdir()
    (tmp_path/"cache"/LEFT[0]).symlink_to(tmp_path/"mine")
    assert len(W.sweep_leftovers(tmp_path/"cache")) == 1 and (tmp_path/"mine"/"data").exists()
    assert W.sweep_leftovers(tmp_path/"none") == W.sweep_leftovers(tmp_path/"mine"/"data") == []


@fork
def test_a_process_that_died_and_was_not_waited_for_is_gone():
    pid = child(lambda: None)
    for _ in range(1000):
        if W.began(pid) is None: break
        time.sleep(.01)
    found = W.began(pid); os.waitpid(pid, 0)
    assert found in (None, 0) and W.began(pid) is None


# ---- B16: a store with other numbers ----------------------------------------------------------------------------

def reversed_audio(store): np.save(store/"audio.npy", np.load(store/"audio.npy")[::-1].copy())


def one_number(store):
    "... in the middle of the file, whose times are put back"
    path = store/"motion.npy"
    before, x = path.stat(), np.load(path)
    x.flat[x.size//2] += 1
    np.save(path, x); os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def other_width(store):
    "... and the manifest agrees with it"
    x = np.load(store/"audio.npy")[..., :64].copy()
    np.save(store/"audio.npy", x)
    manifest = read_json(store/"manifest.json")
    manifest["arrays"]["audio"]["shape"] = list(x.shape)
    write_json(manifest, store/"manifest.json")


def other_width_and_hash(store):
    other_width(store)
    manifest = read_json(store/"manifest.json")
    manifest["arrays"]["audio"]["sha256"] = W.file_hash(store/"audio.npy")
    write_json(manifest, store/"manifest.json")


def other_hash(store):
    manifest = read_json(store/"manifest.json")
    manifest["arrays"]["frames"]["sha256"] = "0"*64
    write_json(manifest, store/"manifest.json")


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("change,message", [
    (reversed_audio, "audio.npy: content does not match"), (one_number, "motion.npy: content does not match"),
    (other_width, "audio holds vectors of .64,.. expected 128|audio.npy: content does not match"),
    (other_width_and_hash, "audio holds vectors of .64,.. expected 128, as vggish gives|64"), (other_hash, "frames.npy: content does not match")])
def test_a_store_with_other_numbers_is_no_data_of_a_run(written, store, tmp_path, change, message, seen):
    if seen: identify(of_store(written, store), tmp_path/"cache")
    change(store)
    for _ in range(2):
        with pytest.raises(InputError, match=message): identify(of_store(written, store), tmp_path/"cache")
    with pytest.raises(InputError, match=message): sources.load_data(of_store(written, store), "tiny", tmp_path/"cache")


def test_run_refuses_a_changed_store(written, store, tmp_path, capsys):
    reversed_audio(store)
    assert cli.main(["run", "han", "--scale", "tiny", "--annotations", str(written/"data"), "--features", str(store), "--out", str(tmp_path/"runs")]) == 2
    assert "audio.npy: content does not match its SHA-256" in capsys.readouterr().err
    assert not list((tmp_path/"runs").glob("records/*"))


def test_a_store_is_read_once(written, store, tmp_path, monkeypatch):
    reads, real = [], W.file_hash
    def counted(path): reads.append(path); return real(path)
    monkeypatch.setattr("avvp_nb.data.packed.file_hash", counted)
    def look():
        reads.clear(); identify(of_store(written, store), tmp_path/"cache")
        return len(reads)
    assert look() == 3
    assert look() == 0
    W._VERIFIED.clear()                      # another process
    assert look() == 0
    W._VERIFIED.clear()
    os.utime(store/"audio.npy", (1, 1))      # nothing was changed, but it might have been
    assert look() == 3 and look() == 0
    notes = list((tmp_path/"cache"/"verified").iterdir())
    for damaged in ("[", "3", "{}"):
        notes[0].write_text(damaged); W._VERIFIED.clear()
        assert look() == 3
    assert len(notes) == 1


def test_a_store_of_unav_with_other_numbers(unav, tmp_path):
    data = DataSpec(str(unav), str(UF.pack_unav(unav, tmp_path/"s", U.load_unav(unav)).path), dataset="unav100")
    identify(data, tmp_path/"cache")
    reversed_audio(tmp_path/"s")
    with pytest.raises(InputError, match="audio.npy: content does not match"): identify(data, tmp_path/"cache")


@pytest.mark.parametrize("lengths", [3, ["10"]*4, [10], [0]*4, [10**6]*4, None])
def test_lengths_of_a_store_of_unav(unav, tmp_path, lengths):
    path = UF.pack_unav(unav, tmp_path/"s", U.load_unav(unav)).path
    write_json({**read_json(path/"manifest.json"), "lengths": lengths}, path/"manifest.json")
    with pytest.raises(InputError, match="lengths|is no store of UnAV-100"): identify(DataSpec(str(unav), str(path), dataset="unav100"), tmp_path)


def test_a_spoiled_store_in_the_cache_is_made_again(written, tmp_path):
    data, cache = DataSpec(str(written/"data"), str(written)), tmp_path/"cache"
    before = identify(data, cache)[0]
    packed = next(cache.glob("features-*"))
    reversed_audio(packed)
    with pytest.raises(InputError, match=f"content does not match.*delete {packed}"): identify(data, cache)
    for p in packed.iterdir(): p.unlink()
    packed.rmdir()
    assert identify(data, cache)[0] == before


@pytest.mark.parametrize("bad", [None, 3, ["x"]])
def test_source_hashes_must_be_hashes(written, store, tmp_path, bad):
    manifest = read_json(store/"manifest.json")
    manifest["arrays"]["audio"]["source_sha256"] = bad
    write_json(manifest, store/"manifest.json")
    with pytest.raises(InputError, match="manifest.json: .*"): identify(of_store(written, store), tmp_path)


# ---- B18: what is said about the origin -------------------------------------------------------------------------

BAD_SOURCES = [{"simulated": True, "mark": 3}, {"simulated": True, "mark": ["simulated"]}, {"simulated": "yes", "mark": "simulated"},
               {"simulated": True, "mark": "simulated \x1b[31m"}, {"simulated": True, "mark": "simulated\nreal"}, {"simulated": True},
               {"simulated": False, "mark": "simulated v1"}, {"mark": "simulated v1"}, {"simulated": True, "mark": "simulated "*1000}]


@pytest.mark.parametrize("source", BAD_SOURCES)
def test_marks_are_refused_before_anything_is_packed(written, unav, tmp_path, source):
    for root, folder, data in ((written, "feats", DataSpec(str(written/"data"), str(tmp_path/"feats"))),
                               (unav, "av_features", DataSpec(str(unav), str(tmp_path), dataset="unav100"))):
        (tmp_path/folder).symlink_to(root/folder) if folder == "av_features" else (tmp_path/folder).mkdir()
        if folder == "feats":
            for p in (written/"feats").iterdir():
                if p.is_dir(): (tmp_path/folder/p.name).symlink_to(p)
        (tmp_path/("feats" if folder == "feats" else "")/"SOURCE.json").write_text(json.dumps(source))
        with pytest.raises(InputError, match="SOURCE.json: `(mark|simulated)` is") as e: identify(data, tmp_path/"cache")
        assert len(str(e.value)) < 1000 and "\x1b" not in str(e.value)
    assert not list(tmp_path.glob("cache/*"))


@pytest.mark.parametrize("source", [*BAD_SOURCES, 3, []])
def test_marks_in_a_store(written, store, tmp_path, source):
    write_json({**read_json(store/"manifest.json"), "source": source}, store/"manifest.json")
    with pytest.raises(InputError, match="manifest.json.*(mark|simulated|no JSON|not a JSON)"): identify(of_store(written, store), tmp_path/"cache")


def test_a_corrected_mark_is_used(written, tmp_path):
    "The packed store in the cache had the old one"
    root = tmp_path/"llp"
    (root/"feats").mkdir(parents=True)
    for p in (written/"feats").iterdir(): (root/"feats"/p.name).symlink_to(p) if p.is_dir() else (root/"feats"/p.name).write_bytes(p.read_bytes())
    data = DataSpec(str(written/"data"), str(root))
    first = identify(data, tmp_path/"cache")
    write_json({"simulated": True, "mark": "simulated by hand"}, root/"feats"/"SOURCE.json")
    second = identify(data, tmp_path/"cache")
    assert (first[0], "simulated by hand") == (second[0], second[2].source["mark"]) and first[2].source != second[2].source


# ---- B20: room on the disk, and the limit -----------------------------------------------------------------------

@pytest.fixture
def small_disk(monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(total=10**9, used=10**9 - 10**6, free=10**6))


@pytest.mark.parametrize("dataset", ["llp", "unav100"])
def test_simulate_looks_before_it_writes(tmp_path, small_disk, capsys, dataset):
    def simulate(*videos): return cli.main(["simulate", str(tmp_path/"d"), "--dataset", dataset, "--videos", *map(str, videos)])
    assert simulate(2, 1, 1) == 2
    assert "GB needed, 0.00 GB free" in capsys.readouterr().err
    assert simulate(10**6, 1, 1) == 2           # also where the labels alone would take minutes
    assert "GB needed" in capsys.readouterr().err and names(tmp_path) == []


@pytest.mark.parametrize("dataset", ["llp", "unav100"])
@pytest.mark.parametrize("videos", [(2_000_000, 1, 1), (1, 1, 1_000_001), (1, 10**30, 1)])
def test_the_limit_of_videos_comes_first(tmp_path, capsys, dataset, videos):
    assert cli.main(["simulate", str(tmp_path/"d"), "--dataset", dataset, "--videos", *map(str, videos)]) == 2
    said = capsys.readouterr().err           # the shell refuses numbers that no computer holds
    assert ("expected a whole number from 1 to 1000000" in said or "64 bits" in said) and names(tmp_path) == []


def test_a_cache_looks_before_it_writes(tmp_path, small_disk):
    with pytest.raises(InputError, match="0.01 GB needed, 0.00 GB free"): W.cached_simulate(tmp_path, 10, frames="full")
    assert names(tmp_path) == []
    W.cached_simulate(tmp_path, 3, frames=None)


def test_videos_that_are_there_need_no_room(tmp_path, monkeypatch):
    W.write_simulated(tmp_path/"a", {"train": 2}); US.write_unav(tmp_path/"b", {"train": 1})
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    W.write_simulated(tmp_path/"a", {"train": 2}); US.write_unav(tmp_path/"b", {"train": 1})
    with pytest.raises(InputError, match="GB needed"): W.write_simulated(tmp_path/"a", {"train": 3})
    with pytest.raises(InputError, match="GB needed"): US.write_unav(tmp_path/"b", {"train": 2})


def test_annotations_with_fewer_videos_are_noticed_before_anything_is_written(written, tmp_path):
    with pytest.raises(InputError, match="train: n=4 videos"):
        W.write_simulated(tmp_path/"x", {"val": 1, "train": 4}, annotations=load_annotations(written/"data"))
    assert names(tmp_path) == []


# ---- C1: several runs at once -----------------------------------------------------------------------------------

def at_once(n, f, tmp_path):
    "Run `f(i)` in `n` processes that begin together; what each said"
    ready, go = os.pipe()
    def one(i):
        os.close(go); os.read(ready, 1)      # returns when the other end is closed
        f(i)
    children = [child(lambda i=i: one(i), tmp_path/f"said{i}") for i in range(n)]
    os.close(go); os.close(ready)
    return [status_of(pid) for pid in children], [(tmp_path/f"said{i}").read_text() for i in range(n)]


@fork
@pytest.mark.parametrize("dataset", ["llp", "unav100"])
def test_one_run_packs_and_the_others_wait(written, unav, tmp_path, monkeypatch, dataset):
    data = DataSpec(str(written/"data"), str(written)) if dataset == "llp" else DataSpec(str(unav), str(unav), dataset="unav100")
    module, name = (sources, "pack") if dataset == "llp" else (US, "pack_unav")
    real = getattr(module, name)
    def slow(*args, **kw):
        (tmp_path/f"packed-{os.getpid()}").touch(); time.sleep(.5)
        return real(*args, **kw)
    monkeypatch.setattr(module, name, slow)
    def run(i): write_json(identify(data, tmp_path/"cache")[0], tmp_path/f"identity{i}.json")
    ends, said = at_once(4, run, tmp_path)
    assert ends == [0]*4, said
    assert len(list(tmp_path.glob("packed-*"))) == 1
    assert len({p.read_text() for p in tmp_path.glob("identity*.json")}) == 1
    for text in said: assert text.count("waiting for it") <= 1 and "another process is packing" not in text
    assert not list(tmp_path.glob("cache/*.part"))


@fork
def test_who_is_waited_for_is_said_once(written, tmp_path):
    data, out = DataSpec(str(written/"data"), str(written)), []
    ready, go = os.pipe()
    def waiting():
        os.close(go); os.read(ready, 1)
        identify(data, tmp_path/"cache")
    pid = child(waiting, tmp_path/"said")
    key = os.path.basename(identify(data, tmp_path/"other")[2].path)
    with W.one_at_a_time(tmp_path/"cache"/key):
        os.close(ready); os.close(go)
        while "waiting" not in (tmp_path/"said").read_text() if (tmp_path/"said").exists() else True:
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), (tmp_path/"said").read_text()
            time.sleep(.05)
        time.sleep(.3)                      # it looks again, and says nothing
    out.append(status_of(pid))
    assert out == [0] and (tmp_path/"said").read_text().count("\n") == 1
    assert f"{key}: process {os.getpid()} on " in (tmp_path/"said").read_text()


@fork
def test_a_killed_packer_is_succeeded(written, tmp_path, monkeypatch):
    data = DataSpec(str(written/"data"), str(written))
    def die(*args, **kw): os.kill(os.getpid(), signal.SIGKILL)
    with monkeypatch.context() as m:
        m.setattr("avvp_nb.data.packed._publish", die)
        assert status_of(child(lambda: identify(data, tmp_path/"cache"))) == -signal.SIGKILL
    assert identify(data, tmp_path/"cache")[0] == identify(data, tmp_path/"other")[0]


def test_a_holder_that_is_no_holder(tmp_path):
    for text in (b"\xff\xfe", b"process 3 on \x1b[31m", b"x"*10**6, b"process 3 on a\nprocess 4 on b"):
        (tmp_path/"note").write_bytes(text)
        assert W._holder(tmp_path/"note") == "another process"


# ---- B10: seeds and counts --------------------------------------------------------------------------------------

SEEDS = [-1, 2**64, 10**5000, float("nan"), 1.0, True, "3"]
WITH_SEED = {
    "simulate": lambda seed, to: S.simulate(1, seed=seed, frames=None), "labels": lambda seed, to: L.simulate_labels(1, seed=seed),
    "cache": lambda seed, to: W.cached_simulate(to, 1, seed=seed), "files": lambda seed, to: W.write_simulated(to, {"val": 1}, seed=seed),
    "world": lambda seed, to: L.SimParams(world_seed=seed), "unav": lambda seed, to: US.simulate_unav(1, seed=seed),
    "labels of unav": lambda seed, to: US.simulate_unav_labels(1, seed), "files of unav": lambda seed, to: US.write_unav(to, {"val": 1}, seed=seed)}


@pytest.mark.parametrize("what", WITH_SEED)
def test_seeds_that_do_not_fit(tmp_path, what):
    for seed in SEEDS:
        with pytest.raises(InputError, match="seed: .* is not possible. expected a whole number from 0 to 18446744073709551615") as e:
            WITH_SEED[what](seed, tmp_path/"d")
        assert len(str(e.value)) < 300
    assert names(tmp_path) == []


WITH_COUNT = {
    "simulate": lambda n, to: S.simulate(n, frames=None), "start": lambda n, to: S.simulate(1, start=n, frames=None),
    "splits": lambda n, to: S.simulate_splits({"val": n}), "cache": lambda n, to: W.cached_simulate(to, n),
    "files": lambda n, to: W.write_simulated(to, {"val": n}), "chunk": lambda n, to: W.write_simulated(to, {"val": 1}, chunk=n),
    "workers": lambda n, to: W.write_simulated(to, {"val": 1}, workers=n), "chunk of simulate": lambda n, to: S.simulate(1, chunk=n),
    "unav": lambda n, to: US.simulate_unav(n), "labels of unav": lambda n, to: US.simulate_unav_labels(n),
    "start of unav": lambda n, to: US.simulate_unav(1, start=n), "files of unav": lambda n, to: US.write_unav(to, {"val": n}),
    "workers of unav": lambda n, to: US.simulate_unav(1, workers=n)}


@pytest.mark.parametrize("what", WITH_COUNT)
def test_counts_that_do_not_fit(tmp_path, what):
    allowed = {"start": [0], "start of unav": [0], "chunk": [10**5000], "workers": [10**5000], "chunk of simulate": [10**5000], "workers of unav": [10**5000]}
    for n in NO_NUMBER:
        if n in allowed.get(what, []) and not isinstance(n, bool): continue
        with pytest.raises(InputError, match="not possible|n=.* videos from start=|n=nan|start=") as e: WITH_COUNT[what](n, tmp_path/"d")
        assert len(str(e.value)) < 300
    assert names(tmp_path) == []


@pytest.mark.parametrize("profile", [{}, [], 3, None, "tini", {"dev": 3}, [("train", 3)]])
def test_profiles_that_are_none(tmp_path, profile):
    with pytest.raises(InputError, match="profile|split|tiny"): W.write_simulated(tmp_path/"d", profile)
    if profile is not None:                    # all videos
        with pytest.raises(InputError, match="profile|split|tiny"): US.write_unav(tmp_path/"d", profile)
    assert names(tmp_path) == []


def test_a_split_without_videos_names_the_file(written, tmp_path):
    annotations = {"val": SimpleNamespace(ids=[], weak=np.zeros((0, 25)), audio=None, visual=None, name="val")}
    with pytest.raises(InputError, match="somewhere: holds no video of val"):
        sources.llp_clips(DataSpec("somewhere"), "val", 3, annotations, None, tmp_path)
    with pytest.raises(InputError, match="val: the annotations hold no video of this split"): S.simulate(split="val", annotations=annotations)


# ---- S5, and the annotation file of UnAV-100 --------------------------------------------------------------------

ENTRY = {"duration": 20.0, "subset": "train", "annotations": [{"segment": [1, 4], "label": "man speaking", "label_id": 0}]}
BAD_IDS = ["\x1b[31mredredre", "\x1b]0;title\x07", "a\nerror: done", "‮abcdefghij", "\x00"*11, "x"*10**6, "../../../etc", "", "\ud800abcdefghij"]


@pytest.mark.parametrize("id_", BAD_IDS, ids=range(len(BAD_IDS)))
def test_ids_of_unav_that_a_terminal_would_obey(unav, tmp_path, capsys, id_):
    path = tmp_path/U.FILE
    path.write_text(json.dumps({"database": {id_: ENTRY, "aGoodVideo1": ENTRY}}))
    with pytest.raises(InputError, match="is not a YouTube id") as e: U.load_unav(path)
    text = str(e.value)
    assert text.isprintable() and len(text) < 600
    report = UF.check_unav(unav, path)
    assert not report.ok and all(str(x).isprintable() and len(str(x)) < 600 for x in report.problems.to_numpy().ravel())
    assert cli.main(["doctor", str(unav), "--annotations", str(path), "--dataset", "unav100"]) == 1
    said = capsys.readouterr().out
    assert len(said) < 10_000 and said.replace("\n", "").isprintable()


def test_names_of_files_that_a_terminal_would_obey(unav, tmp_path):
    (tmp_path/"av_features").mkdir()
    for name in ("\x1b[31mX.npy", "a\nb_rgb.npy", "‮x.npy"): (tmp_path/"av_features"/name).touch()
    report = UF.check_unav(tmp_path, unav)
    extra = report.problems[report.problems.problem == "extra"]
    assert len(extra) == 3 and all(str(x).isprintable() for x in extra.to_numpy().ravel())


BAD_ENTRIES = [("duration", 10**400), ("duration", 1e300), ("duration", 1e15), ("duration", -1e300), ("subset", "\x1b[31m" + "x"*10**5), ("subset", 10**400),
               ("annotations", [{**ENTRY["annotations"][0], "label": "\x1b[31m" + "x"*10**4}]), ("annotations", [{**ENTRY["annotations"][0], "label_id": 10**400}]),
               ("annotations", [{**ENTRY["annotations"][0], "segment": [0, 10**400]}]), ("annotations", [{**ENTRY["annotations"][0], "segment": list(range(10**4))}])]


@pytest.mark.parametrize("field,value", BAD_ENTRIES, ids=range(len(BAD_ENTRIES)))
def test_entries_of_unav_that_do_not_fit(tmp_path, field, value):
    (tmp_path/U.FILE).write_text(json.dumps({"database": {"aGoodVideo1": {**ENTRY, field: value}}}))
    with pytest.raises(InputError, match="aGoodVideo1") as e: U.load_unav(tmp_path)
    assert str(e.value).isprintable() and len(str(e.value)) < 1500   # the hundred classes are listed


@pytest.mark.parametrize("text", ["["*100_000, '{"database": ' + '{"a": '*100_000, '{"database": {"aGoodVideo1": {"duration": ' + "1"*5000 + "}}}", "\ufeff[", "{\x00}"])
def test_files_of_unav_that_are_no_json(tmp_path, text):
    (tmp_path/U.FILE).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=f"{U.FILE}: is .*fetch the file again"): U.load_unav(tmp_path)


def test_a_folder_or_a_pipe_in_place_of_the_file(tmp_path):
    (tmp_path/U.FILE).mkdir()
    with pytest.raises(InputError, match=f"{U.FILE}: is a folder"): U.read_unav_json(tmp_path/U.FILE)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path/"pipe")
        with pytest.raises(InputError, match="pipe: is no regular file"): U.load_unav(tmp_path/"pipe")


@pytest.mark.parametrize("text", ["[]", "3", '"simulated"', '{"version": 3}'])
def test_annotations_of_somebody_else_stay(tmp_path, text):
    (tmp_path/U.FILE).write_text(text)
    with pytest.raises(InputError, match="holds annotations that were not simulated"): US.write_unav(tmp_path, {"val": 1})
    assert names(tmp_path) == [U.FILE] and (tmp_path/U.FILE).read_text() == text


def test_open_store_is_as_it_was(written, store):
    "What is refused here is refused for runs; a store can still be looked at"
    reversed_audio(store)
    assert len(open_store(store)) == 7
