"""Features: pooling, the check-up of a layout, and stores that survive being killed."""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avvp_nb.core import InputError, file_hash
from avvp_nb.data import features as F
from avvp_nb.data import packed as K

SMALL = {"audio": F.FeatureSet("vggish", 4), "frames": F.FeatureSet("res152", 6, 8), "motion": F.FeatureSet("r2plus1d_18", 5)}
SIM = {"simulated": True, "mark": "random numbers"}


def ids_of(n):
    return [f"-toy_{i:06d}" for i in range(n)]


def make(root, n=10, t=10, seed=0, sets=SMALL, source=None):
    "Write `n` random videos in the authors' layout; return ids and arrays"
    rng = np.random.default_rng(seed)
    arrays = {k: rng.standard_normal((n, t * s.per_second, s.dim)).astype(np.float32) for k, s in sets.items()}
    F.write_layout(arrays, root, ids=ids_of(n), source=source or {"simulated": False, "mark": ""}, sets=sets)
    return ids_of(n), arrays


@pytest.fixture
def layout(tmp_path):
    ids, arrays = make(tmp_path / "feats")
    return tmp_path, ids, arrays


def snapshot(folder):
    "Names and content hashes of all files below a folder"
    return {str(p.relative_to(folder)): file_hash(p) for p in sorted(Path(folder).rglob("*")) if p.is_file()}


# ---------------------------------------------------------------- pooling

@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 6), t=st.integers(1, 12), d=st.integers(1, 9), per=st.sampled_from([1, 2, 3, 5, 8]),
       dtype=st.sampled_from([np.float16, np.float32, np.float64]), seed=st.integers(0, 99))
def test_pooling_is_the_mean_and_the_same_for_any_number_of_videos(n, t, d, per, dtype, seed):
    x = np.random.default_rng(seed).standard_normal((n, t * per, d)).astype(dtype)
    y = F.pool_frames(x, per)
    assert y.shape == (n, t, d) and y.dtype == np.float32
    np.testing.assert_allclose(y, x.reshape(n, t, per, d).astype(np.float64).mean(2), rtol=1e-5, atol=1e-6)
    for i in range(n):
        assert (F.pool_frames(x[i], per) == y[i]).all()
    assert (F.pool_frames(np.asfortranarray(x), per) == y).all()
    assert (F.pool_frames(torch.from_numpy(x), per).numpy() == y).all()


def test_pooling_equal_rows_is_exact():
    x = np.random.default_rng(0).standard_normal((3, 10, 7)).astype(np.float32)
    assert (F.pool_frames(np.repeat(x, 8, axis=1)) == x).all()


def test_pooling_refuses_incomplete_seconds():
    with pytest.raises(InputError, match="79 rows. expected a multiple of 8"):
        F.pool_frames(np.zeros((2, 79, 3)))


# ---------------------------------------------------------------- the layout

def test_layout_round_trip_and_feats_folder(layout):
    root, ids, arrays = layout
    assert F.find_layout(root) == root / "feats" == F.find_layout(root / "feats")
    x = np.load(root / "feats" / "res152" / f"{ids[3]}.npy", allow_pickle=False)
    assert x.dtype == np.float32 and (x == arrays["frames"][3]).all()
    assert not list(root.rglob("*.part"))


def test_pooled_frames_are_written_as_equal_rows(tmp_path):
    _, arrays = make(tmp_path / "a", n=2)
    pooled = {**arrays, "frames": F.pool_frames(arrays["frames"])}
    F.write_layout(pooled, tmp_path / "b", ids=ids_of(2), source=SIM, sets=SMALL)
    store = K.load_layout(tmp_path / "b", ids_of(2), sets=SMALL)
    assert (store.frames == pooled["frames"]).all()


def test_simulated_features_cannot_join_real_ones(layout):
    root, ids, arrays = layout
    (root / "feats" / F.SOURCE_FILE).unlink()  # real features come without this file
    before = snapshot(root / "feats")
    with pytest.raises(InputError, match="holds features of another source"):
        F.write_layout(arrays, root / "feats", ids=ids, source=SIM, sets=SMALL)
    assert snapshot(root / "feats") == before


def test_mark_travels_from_layout_to_store(tmp_path):
    ids, _ = make(tmp_path / "feats", source={**SIM, "split": "train", "world": 7})
    store = K.pack(tmp_path, tmp_path / "store", ids, sets=SMALL)
    assert store.source == {**SIM, "world": 7}
    assert K.open_store(tmp_path / "store").source["mark"] == "random numbers" and "random numbers" in repr(store)
    assert K.load_layout(tmp_path, ids, sets=SMALL).source == store.source


def test_no_layout(tmp_path):
    (tmp_path / "audio").mkdir()
    with pytest.raises(InputError, match="no feature folders .audio.. expected vggish, res152, r2plus1d_18"):
        F.find_layout(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        F.doctor(tmp_path / "x", ids_of(1))


def test_damaged_source_file(layout):
    root, ids, _ = layout
    (root / "feats" / F.SOURCE_FILE).write_text("[]")
    with pytest.raises(InputError, match="is not a JSON object"):
        K.pack(root, root / "store", ids, sets=SMALL)


# ---------------------------------------------------------------- the doctor

class Evil:
    "Would create a file if it were unpickled"
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return (open, (self.path, "w"))


def spoil(root, ids, how):
    "Damage the audio file of the first video; return what the doctor should say"
    path = root / "feats" / "vggish" / f"{ids[0]}.npy"
    x = np.load(path)
    if how == "missing": path.unlink()
    elif how == "unreadable": path.write_bytes(b"not a NumPy file")
    elif how == "unreadable empty": path.write_bytes(b"")
    elif how == "truncated": path.write_bytes(path.read_bytes()[:-7])
    elif how == "truncated longer": path.write_bytes(path.read_bytes() + b"1234")
    elif how == "objects": np.save(path, np.array([Evil(root / "pwned")], dtype=object), allow_pickle=True)
    elif how == "dtype": np.save(path, x.astype(np.int32))
    elif how == "shape": np.save(path, x[:9])
    elif how == "shape dims": np.save(path, x[None])
    elif how == "non-finite": x[2, 1] = np.inf; np.save(path, x)
    elif how == "unreadable order": np.save(path, np.asfortranarray(x))
    return path


@pytest.mark.parametrize("how", ["missing", "unreadable", "unreadable empty", "unreadable order", "truncated", "truncated longer", "objects",
                                 "dtype", "shape", "shape dims", "non-finite"])
def test_doctor_finds_and_pack_refuses(layout, how):
    root, ids, _ = layout
    path = spoil(root, ids, how)
    report = F.doctor(root, ids, full=True, sets=SMALL)
    assert report.serious[["modality", "id", "file", "problem"]].values.tolist() == [["audio", ids[0], str(path), how.split()[0]]]
    assert not report.ok and report.usable == ids[1:] and report.seconds == 10
    with pytest.raises(InputError, match="9 of 10 videos can be used") as e:
        report.raise_if_bad()
    assert str(e.value.where) == str(path) and e.value.fix
    with pytest.raises(InputError) as e:
        K.pack(root, root / "store", ids, sets=SMALL)
    assert str(e.value.where) == str(path)
    assert not K.is_store(root / "store") and not (root / "store").exists()
    assert not (root / "pwned").exists()


def test_cheap_mode_does_not_read_numbers(layout):
    root, ids, _ = layout
    spoil(root, ids, "non-finite")
    assert F.doctor(root, ids, sets=SMALL).ok and not F.doctor(root, ids, full=True, sets=SMALL).ok


def test_doctor_extra_files_are_not_serious(layout):
    root, ids, _ = layout
    report = F.doctor(root, [f"{i}_30_40" for i in ids[:8]], sets=SMALL)  # full filenames are cut to the id
    assert report.ok and set(report.problems.id) == set(ids[8:]) and len(report.problems) == 6
    assert report.summary().loc["audio", "extra"] == 2
    assert "8 of 8 videos usable" in repr(report) and "<table" in report._repr_html_()


def test_doctor_missing_folder_lists_every_file(layout):
    root, ids, _ = layout
    shutil.rmtree(root / "feats" / "r2plus1d_18")
    report = F.doctor(root, ids, sets=SMALL)
    assert report.summary().loc["motion", "missing"] == 10 and report.usable == []
    with pytest.raises(InputError, match="0 of 10"):
        K.pack(root, root / "store", ids, sets=SMALL, on_missing="drop")


def test_doctor_repeated_and_no_ids(layout):
    root, ids, _ = layout
    with pytest.raises(InputError, match="occurs twice"):
        F.doctor(root, [ids[0] + "_0_10", ids[0] + "_10_20"], sets=SMALL)
    with pytest.raises(InputError, match="no ids"):
        F.doctor(root, [], sets=SMALL)


def test_other_lengths(tmp_path):
    ids, arrays = make(tmp_path, n=4, t=7)
    store = K.pack(tmp_path, tmp_path / "s", ids, sets=SMALL, dtype="float32")
    assert store.audio.shape == (4, 7, 4) and store.manifest["seconds"] == 7
    assert F.doctor(tmp_path, ids, seconds=10, sets=SMALL).usable == []


# ---------------------------------------------------------------- packing

@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("frames", ["pooled", "full"])
def test_pack_holds_the_features(layout, dtype, frames):
    root, ids, arrays = layout
    order = ids[::-1]
    store = K.pack(root, root / "store", order, dtype=dtype, frames=frames, sets=SMALL)
    want = {**arrays, "frames": F.pool_frames(arrays["frames"]) if frames == "pooled" else arrays["frames"]}
    for k, x in want.items():
        assert (store.arrays[k] == x[::-1].astype(dtype)).all() and store.arrays[k].dtype == dtype
        assert isinstance(store.arrays[k], np.memmap) and not store.arrays[k].flags.writeable
        assert store.manifest["arrays"][k]["sha256"] == file_hash(root / "store" / f"{k}.npy")
    assert store.ids == order and len(store) == 10
    assert store.find([ids[2] + "_1_11", "nobody"]).tolist() == [7, -1]
    assert isinstance(K.open_store(root / "store", mmap=False).audio, np.ndarray)
    assert sorted(p.name for p in (root / "store").iterdir()) == ["audio.npy", "frames.npy", "manifest.json", "motion.npy"]
    assert store.verify() is store
    memory = K.load_layout(root, order, dtype=dtype, frames=frames, sets=SMALL)
    assert (memory.frames == store.frames).all() and memory.fingerprint == store.fingerprint


def test_pack_bytes_do_not_depend_on_threads_or_chunks(layout, monkeypatch):
    root, ids, _ = layout
    K.pack(root, root / "one", ids, workers=1, sets=SMALL)
    monkeypatch.setattr(K, "CHUNK", 3)
    K.pack(root, root / "two", ids, workers=7, sets=SMALL)
    assert snapshot(root / "one") == snapshot(root / "two")


def test_pack_again_is_free_and_other_packs_are_refused(layout):
    root, ids, _ = layout
    K.pack(root, root / "store", ids, sets=SMALL)
    before = snapshot(root / "store")
    assert K.pack(root, root / "store", ids, sets=SMALL).ids == ids
    for other in (dict(ids=ids[:5]), dict(ids=ids[::-1]), dict(ids=ids, dtype="float32"), dict(ids=ids, frames="full")):
        with pytest.raises(InputError, match="holds a different pack"):
            K.pack(root, root / "store", sets=SMALL, **other)
    assert snapshot(root / "store") == before
    assert len(K.pack(root, root / "store", ids[:5], sets=SMALL, overwrite=True)) == 5
    assert [p.name for p in root.iterdir() if p.name.startswith(".")] == []


def test_changed_source_file_is_a_different_pack(layout):
    root, ids, _ = layout
    K.pack(root, root / "store", ids, sets=SMALL)
    path = root / "feats" / "vggish" / f"{ids[0]}.npy"
    x = np.load(path)
    np.save(path, x + 1)
    os.utime(path, ns=(0, 0))
    with pytest.raises(InputError, match="different pack"):
        K.pack(root, root / "store", ids, sets=SMALL)


def test_pack_never_touches_other_folders(layout):
    root, ids, _ = layout
    (root / "mine").mkdir()
    (root / "mine" / "thesis.tex").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="is not a feature store"):
            K.pack(root, root / "mine", ids, sets=SMALL, overwrite=overwrite)
    assert (root / "mine" / "thesis.tex").read_text() == "x"
    (root / "empty").mkdir()
    assert len(K.pack(root, root / "empty", ids, sets=SMALL)) == 10


def test_drop_records_what_was_left_out(layout):
    root, ids, _ = layout
    spoil(root, ids, "truncated")
    (root / "feats" / "res152" / f"{ids[4]}.npy").unlink()
    store = K.pack(root, root / "store", ids, sets=SMALL, on_missing="drop")
    assert store.ids == [i for i in ids if i not in (ids[0], ids[4])]
    assert store.manifest["dropped"] == {ids[0]: "audio: truncated", ids[4]: "frames: missing"}


def test_annotations_can_be_packed_whole(tmp_path):
    from avvp_nb.data.annotations import load_annotations
    a = load_annotations(Path(__file__).parent / "data" / "llp_tiny")
    n = len(a.video_ids)
    arrays = {k: np.ones((n, 10 * s.per_second, s.dim), np.float32) for k, s in SMALL.items()}
    F.write_layout(arrays, tmp_path, ids=a.video_ids, source=SIM, sets=SMALL)
    assert K.pack(tmp_path, tmp_path / "s", a, sets=SMALL).ids == a.video_ids


def test_float16_overflow_and_nan(layout):
    root, ids, _ = layout
    path = root / "feats" / "vggish" / f"{ids[0]}.npy"
    x = np.load(path)
    x[0, 0] = 1e6
    np.save(path, x)
    with pytest.raises(InputError, match="does not fit in float16.*float32"):
        K.pack(root, root / "s16", ids, sets=SMALL)
    assert K.pack(root, root / "s32", ids, sets=SMALL, dtype="float32").audio[0, 0, 0] == 1e6


@pytest.mark.parametrize("name,value", [("dtype", "float64"), ("frames", "mean"), ("on_missing", "skip")])
def test_wrong_options(layout, name, value):
    root, ids, _ = layout
    with pytest.raises(InputError, match=f"{name}: '{value}' is not possible"):
        K.pack(root, root / "s", ids, sets=SMALL, **{name: value})


# ---------------------------------------------------------------- interruption

CHILD = """
import sys, time
from avvp_nb.data import packed as F
sys.path.insert(0, {tests!r})
from test_features import SMALL, ids_of
F.CHUNK = 5
read = F.read_video
def slow(*args): time.sleep(.02); return read(*args)
F.read_video = slow
F.pack({root!r}, {out!r}, ids_of(60), workers=2, sets=SMALL)
"""


def pack_in_child(root, out):
    code = CHILD.format(tests=str(Path(__file__).parent), root=str(root), out=str(out))
    return subprocess.Popen([sys.executable, "-c", code])


def wait_for_journal(work, lines, child):
    for _ in range(600):
        if (work / "journal").exists() and (work / "journal").read_text().count("\n") >= lines:
            return
        assert child.poll() is None, "the child finished before it could be killed"
        time.sleep(.05)
    raise AssertionError("no progress")


def test_kill_and_resume_gives_identical_bytes(tmp_path, monkeypatch):
    "kill -9 twice in the middle: nothing opens as a store, nothing is read again, the bytes are those of an undisturbed run"
    ids, _ = make(tmp_path / "feats", n=60)
    out, work = tmp_path / "out" / "store", tmp_path / "out" / ".store.packing"
    for lines in (2, 5):
        child = pack_in_child(tmp_path, out)
        wait_for_journal(work, lines, child)
        child.send_signal(signal.SIGKILL)
        child.wait()
        with pytest.raises(InputError, match="packing was not finished"):
            K.open_store(out)
    done, reads, read = K._journal(work)["audio"], [], K.read_video
    monkeypatch.setattr(K, "read_video", lambda layout, video, *rest: (reads.append(video), read(layout, video, *rest))[1])
    K.pack(tmp_path, out, ids, sets=SMALL)
    assert 25 <= len(done) < 60 and sorted(reads) == sorted(ids[len(done):])
    K.pack(tmp_path, tmp_path / "calm", ids, sets=SMALL)
    assert snapshot(out) == snapshot(tmp_path / "calm")
    assert [p.name for p in out.parent.iterdir()] == ["store"]


def interrupted(root, ids, monkeypatch, after):
    "Stop packing with an exception in chunk `after`"
    write, count = K._write_chunk, iter(range(99))

    def stop(*args):
        if next(count) == after: raise KeyboardInterrupt
        write(*args)
    monkeypatch.setattr(K, "CHUNK", 3)
    monkeypatch.setattr(K, "_write_chunk", stop)
    with pytest.raises(KeyboardInterrupt):
        K.pack(root, root / "store", ids, sets=SMALL)
    monkeypatch.setattr(K, "_write_chunk", write)


def test_half_written_journal_line_is_ignored(layout, monkeypatch):
    root, ids, _ = layout
    interrupted(root, ids, monkeypatch, after=2)
    work = root / ".store.packing"
    with open(work / "journal", "a") as f:
        f.write("abc,def")
    assert len(K._journal(work)["audio"]) == 6
    K.pack(root, root / "store", ids, sets=SMALL)
    K.pack(root, root / "calm", ids, sets=SMALL)
    assert snapshot(root / "store") == snapshot(root / "calm")


def test_unfinished_pack_of_other_videos_is_started_anew(layout, monkeypatch):
    root, ids, _ = layout
    interrupted(root, ids, monkeypatch, after=1)
    K.pack(root, root / "store", ids[::-1], sets=SMALL)
    K.pack(root, root / "calm", ids[::-1], sets=SMALL)
    assert snapshot(root / "store") == snapshot(root / "calm")


@pytest.mark.parametrize("left", ["nothing", "arrays", "all but the journal"])
def test_kill_before_the_first_chunk_or_at_the_very_end(layout, monkeypatch, left):
    root, ids, _ = layout
    work = root / ".store.packing"
    if left == "nothing": work.mkdir()
    elif left == "arrays": work.mkdir(); (work / "audio.npy").write_bytes(b"half")
    else:
        monkeypatch.setattr(K.os, "rename", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            K.pack(root, root / "store", ids, sets=SMALL)
        monkeypatch.undo()
        assert not (work / "journal").exists() and (work / "manifest.json").exists()
    K.pack(root, root / "store", ids, sets=SMALL)
    K.pack(root, root / "calm", ids, sets=SMALL)
    assert snapshot(root / "store") == snapshot(root / "calm") and not work.exists()


def test_two_processes_cannot_pack_the_same_store(tmp_path):
    pytest.importorskip("fcntl")
    ids, _ = make(tmp_path / "feats", n=60)
    child = pack_in_child(tmp_path, tmp_path / "store")
    try:
        wait_for_journal(tmp_path / ".store.packing", 1, child)
        with pytest.raises(InputError, match="another process is packing"):
            K.pack(tmp_path, tmp_path / "store", ids, sets=SMALL)
    finally:
        child.kill()
        child.wait()


# ---------------------------------------------------------------- full disks and read-only folders

def test_full_disk_is_seen_before_reading(layout, monkeypatch):
    root, ids, _ = layout
    monkeypatch.setattr(K.shutil, "disk_usage", lambda p: SimpleNamespace(free=10))
    with pytest.raises(InputError, match="GB needed") as e:
        K.pack(root, root / "store", ids, sets=SMALL)
    assert "free some space" in e.value.fix and not (root / "store").exists()


LIMITED = """
import resource, sys
from avvp_nb.data import packed as F
sys.path.insert(0, {tests!r})
from test_features import SMALL, ids_of
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try: F.pack({root!r}, {out!r}, ids_of(10), sets=SMALL, overwrite=True)
except F.InputError as e: print("refused:", e)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits on the size of files")
def test_disk_fills_up_while_packing(layout):
    "A file size limit in a child process makes a real write fail; the old store stays, and packing goes on later"
    root, ids, _ = layout
    K.pack(root, root / "store", ids[:2], sets=SMALL)
    before = snapshot(root / "store")
    code = LIMITED.format(tests=str(Path(__file__).parent), root=str(root), out=str(root / "store"))
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.stdout.startswith("refused: ") and "could not be written" in child.stdout and "intact" in child.stdout, child.stderr
    assert snapshot(root / "store") == before
    assert len(K.pack(root, root / "store", ids, sets=SMALL, overwrite=True)) == 10


def test_write_error_in_a_chunk(layout, monkeypatch):
    root, ids, _ = layout

    def full(*a): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(K, "_write_chunk", full)
    with pytest.raises(InputError, match="No space left on device.*it continues where it stopped"):
        K.pack(root, root / "store", ids, sets=SMALL)


def test_out_below_a_file(layout):
    root, ids, arrays = layout
    (root / "file").write_text("x")
    with pytest.raises(InputError, match="could not be written"):
        K.pack(root, root / "file" / "store", ids, sets=SMALL)
    with pytest.raises(InputError, match="could not be written"):
        F.write_layout(arrays, root / "file" / "feats", ids=ids, source=SIM, sets=SMALL)
    assert (root / "file").read_text() == "x"


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_read_only_folder(layout):
    root, ids, _ = layout
    (root / "ro").mkdir()
    (root / "ro").chmod(0o500)
    with pytest.raises(InputError, match="could not be written"):
        K.pack(root, root / "ro" / "store", ids, sets=SMALL)


# ---------------------------------------------------------------- damaged stores

def damage(store, how):
    "Damage a store; return the file that the message must name"
    if how == "missing array": (store / "motion.npy").unlink(); return "motion.npy"
    if how == "truncated array":
        data = (store / "frames.npy").read_bytes()
        (store / "frames.npy").write_bytes(data[:-1]); return "frames.npy"
    if how == "other array": np.save(store / "audio.npy", np.zeros((10, 10, 3), np.float16)); return "audio.npy"
    if how == "objects": np.save(store / "audio.npy", np.array([Evil(store / "pwned")], dtype=object), allow_pickle=True); return "audio.npy"
    manifest = json.loads((store / "manifest.json").read_text())
    if how == "no ids": del manifest["ids"]
    elif how == "fewer ids": manifest["ids"].pop()
    elif how == "other kind": manifest["kind"] = "something"
    elif how == "a list": manifest = []
    (store / "manifest.json").write_text(json.dumps(manifest) if how != "not json" else "{")
    return "manifest.json"


@pytest.mark.parametrize("how", ["missing array", "truncated array", "other array", "objects", "no ids", "fewer ids", "other kind", "a list", "not json"])
def test_damaged_store_is_refused_by_name(layout, how):
    root, ids, _ = layout
    K.pack(root, root / "store", ids, sets=SMALL)
    name = damage(root / "store", how)
    with pytest.raises(InputError) as e:
        K.open_store(root / "store")
    assert str(e.value.where).endswith(name)
    assert not (root / "store" / "pwned").exists()


def test_verify_finds_a_flipped_bit(layout):
    root, ids, _ = layout
    K.pack(root, root / "store", ids, sets=SMALL)
    data = bytearray((root / "store" / "motion.npy").read_bytes())
    data[-1] ^= 1
    (root / "store" / "motion.npy").write_bytes(data)
    with pytest.raises(InputError, match="motion.npy: content does not match its SHA-256"):
        K.open_store(root / "store").verify()


def test_no_store(tmp_path):
    with pytest.raises(InputError, match="no feature store.*pack.root, out, ids."):
        K.open_store(tmp_path / "nothing")


def test_load_layout_refuses_and_drops(layout):
    root, ids, _ = layout
    spoil(root, ids, "missing")
    with pytest.raises(InputError, match="missing"):
        K.load_layout(root, ids, sets=SMALL)
    assert K.load_layout(root, ids, sets=SMALL, on_missing="drop").ids == ids[1:]
    with pytest.raises(InputError, match="frames: 'mean' is not possible"):
        K.load_layout(root, ids[1:], frames="mean", sets=SMALL)
