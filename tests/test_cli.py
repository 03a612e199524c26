"""The commands about files: simulate, check, pack and load, for both data sets and for pseudo-labels."""
import json
import os
import shutil
from dataclasses import replace

import micro
import numpy as np
import pytest

from avvp_nb import cli, runs
from avvp_nb.core import InputError, read_json
from avvp_nb.data import packed, sources
from avvp_nb.data import unav100 as U
from avvp_nb.data import unav_features as UF
from avvp_nb.data import unav_simulate as US
from avvp_nb.data.features import layout_source
from avvp_nb.data.packed import is_store, open_store
from avvp_nb.data.pseudo import FOLDERS, label_clips, write_pseudo_layout
from avvp_nb.data.simulate import simulate
from avvp_nb.data.sources import DataSpec, load_data

ARRAYS = ("audio", "frames", "motion")
MARK = "simulated UnAV-100 v1 seed=3 world=7 embedded labels"


@pytest.fixture(autouse=True)
def small(monkeypatch): micro.install(monkeypatch.setitem)


@pytest.fixture
def shell(capsys):
    "Run a command; its status, output and errors"
    def call(*argv):
        capsys.readouterr()
        return cli.main([str(a) for a in argv]), *capsys.readouterr()
    return call


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    "A simulated data set, written by the command"
    root = tmp_path_factory.mktemp("unav") / "data"
    assert cli.main(["simulate", str(root), "--dataset", "unav100", "--videos", "6", "3", "4", "--seed", "3"]) == 0
    return root


@pytest.fixture
def unav(written, tmp_path):
    "A copy that may be spoiled"
    return shutil.copytree(written, tmp_path / "unav")


def doctor(root, *more): return "doctor", root / "av_features", "--annotations", root / U.FILE, "--dataset", "unav100", *more


def table(out):
    "The table of counts in what the doctor says, by split"
    lines = [line.split() for line in out.splitlines()]
    head = next(i for i, words in enumerate(lines) if words[:1] == ["annotated"])
    return {words[0]: dict(zip(lines[head], map(int, words[1:]))) for words in lines[head + 1:head + 5] if words and words[0] in ("train", "val", "test", "?")}


# ---- the whole way -------------------------------------------------------------------------------------------

def test_from_simulation_to_a_run(unav, shell, tmp_path):
    "simulate -> doctor -> pack -> load -> the same clips as from the folder -> the same run"
    assert layout_source(unav)["mark"] == MARK and read_json(unav / U.FILE)["version"] == "simulated"
    status, out, _ = shell(*doctor(unav))
    assert status == 0 and out.startswith("UnavReport(13 of 13 videos usable, every number checked, 0 findings)")
    assert table(out) == {k: dict(annotated=n, found=n, missing=0, broken=0, usable=n) for k, n in zip(U.SUBSETS, (6, 3, 4))}
    status, out, _ = shell("pack", unav / "av_features", tmp_path / "store", "--annotations", unav / U.FILE, "--dataset", "unav100")
    assert status == 0 and "Store(13 videos" in out and "float16" in out and MARK in out

    folder, store = (DataSpec(str(unav / U.FILE), str(p), dataset="unav100") for p in (unav, tmp_path / "store"))
    a, b = (load_data(d, "micro", tmp_path / "cache") for d in (folder, store))
    assert a.identity == b.identity and "simulator" not in a.identity
    for split, n in zip(U.SUBSETS, (6, 3, 4)):
        x, y = a[split], b[split]
        assert len(x) == n and (x.ids, x.source, x.mark, x.classes) == (y.ids, y.source, y.mark, y.classes) and x.mark == MARK
        for k in (*ARRAYS, "weak", "lengths", "rows"): np.testing.assert_array_equal(getattr(x, k), getattr(y, k))
        if split != "train": np.testing.assert_array_equal(x.dense_audio, y.dense_audio)

    args = ["run", "han", "--dataset", "unav100", "--unav-annotations", unav / U.FILE, "--scale", "micro", "--epochs", "1", "--out", tmp_path / "runs"]
    status, out, err = shell(*args, "--unav-features", tmp_path / "store")
    assert status == 0 and MARK in out, err
    assert shell(*args, "--unav-features", unav)[0] == 0                       # the same data: nothing is trained again
    (record,) = runs.Store(tmp_path / "runs").records()
    assert record["data"]["mark"] == MARK and record["data"]["n"] == {"train": 6, "val": 3, "test": 4}


def test_a_printed_table_from_a_packed_store(unav, shell, tmp_path):
    shell("pack", unav, tmp_path / "store", "--annotations", unav, "--dataset", "unav100", "--dtype", "float32")
    status, out, err = shell("reproduce", "coleaf", "--table", "8", "--scale", "micro", "--seeds", "1", "--unav-annotations", unav / U.FILE,
                             "--unav-features", tmp_path / "store", "--out", tmp_path / "runs", "--progress", "off")
    assert status == 0 and "CoLeaF, Table 8" in out and MARK in out, err
    assert {r["data"]["mark"] for r in runs.Store(tmp_path / "runs").records()} == {MARK}


def test_the_same_seed_writes_the_same_files(written, shell, tmp_path):
    def simulate(seed):
        root = tmp_path / f"again{seed}"
        shell("simulate", root, "--dataset", "unav100", "--videos", "6", "3", "4", "--seed", seed)
        return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    before = {p.relative_to(written).as_posix(): p.read_bytes() for p in written.rglob("*") if p.is_file()}
    assert simulate(3) == before and len(before) == 2 + 3*13
    assert simulate(4).keys() == before.keys() and simulate(4)[U.FILE] != before[U.FILE]


# ---- doctor --------------------------------------------------------------------------------------------------

def feature(root, i=0, split="train", m="motion"):
    "A feature file of a simulated video"
    return UF.unav_file(root, US.unav_id(split, i), m)


def rows(path, n):
    "Keep `n` rows of a file, or repeat it until it has so many"
    x = np.load(path)
    np.save(path, np.resize(x, (n, x.shape[1])))


BROKEN = {  # how a file is spoiled, what is found
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-9]), "bytes. fetch the file again"),
    "unreadable": (lambda p: p.write_bytes(b"not found"), "fetch the file again"),
    "objects": (lambda p: np.save(p, np.array([{}], dtype=object), allow_pickle=True), "pickled Python objects. never loaded"),
    "dtype": (lambda p: np.save(p, np.load(p).astype(int)), "int64. features are floating-point numbers"),
    "shape": (lambda p: np.save(p, np.load(p)[:, 1:]), "1023). expected (L,1024)"),
    "non-finite": (lambda p: np.save(p, np.where(np.arange(1024) == 5, np.nan, np.load(p))), "numbers. extract it again"),
    "length": (lambda p: rows(p, len(np.load(p))//2), "rows. expected about")}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_counted_and_named(unav, shell, tmp_path, kind):
    spoil, said = BROKEN[kind]
    path = feature(unav, 1, "test")
    spoil(path)
    status, out, _ = shell(*doctor(unav))
    assert status == 1 and f"1 {kind}. {path}: " in out and said in out
    assert table(out)["test"] == dict(annotated=4, found=4, missing=0, broken=1, usable=3) and table(out)["train"]["usable"] == 6
    status, out, err = shell("pack", unav, tmp_path / "store", "--annotations", unav, "--dataset", "unav100")
    assert status == 2 and not is_store(tmp_path / "store") and path.name in err


def test_missing_files_are_counted_by_video(unav, shell):
    for k in range(6): feature(unav, k).unlink()
    feature(unav, 0, m="audio").unlink()
    status, out, _ = shell(*doctor(unav, "--quick"))
    assert status == 1 and "7 missing. " in out and "headers and sizes checked" in out and ", ...)" in out
    assert table(out)["train"] == dict(annotated=6, found=0, missing=6, broken=0, usable=0) and table(out)["val"]["usable"] == 3


def test_uneven_and_extra_files_are_told_and_stop_nothing(unav, shell, tmp_path):
    path = feature(unav, 2, m="audio")
    rows(path, len(np.load(path)) + 2)
    (unav / "av_features" / "README").write_text("x")
    status, out, _ = shell(*doctor(unav))
    assert status == 0 and "13 of 13 videos usable" in out and f"1 uneven. {path}: " in out and "cut to the shortest" in out and "1 extra. " in out
    assert shell("pack", unav, tmp_path / "store", "--annotations", unav, "--dataset", "unav100")[0] == 0


def edited(root, change):
    "Change the annotation file; `change` gets the database"
    raw = json.loads((root / U.FILE).read_text())
    change(raw["database"])
    (root / U.FILE).write_text(json.dumps(raw))


def test_every_bad_video_of_the_annotations_is_counted(unav, shell):
    "The loader stops at the first; the doctor goes on"
    ids = [US.unav_id("train", k) for k in range(4)]
    def change(d):
        d[ids[0]]["annotations"][0]["segment"] = [1, 100]
        d[ids[1]]["annotations"][0] |= {"label": "dog barkin"}
        d[ids[2]]["duration"] = 61.5
        d[ids[3]]["subset"] = "validating"
        d["../up"] = d[ids[0]]
    edited(unav, change)
    status, out, err = shell(*doctor(unav))
    assert status == 1 and not err
    assert f"2 event. {unav / U.FILE}: {ids[0]}, event 0: 1 to 100 s lies outside the video. expected 0 to" in out and f"(also {ids[1]})" in out
    assert f"3 video. {unav / U.FILE}: {ids[2]}: a video of 61.5 s is longer than the model's maximum. expected at most 60 s" in out and f"(also {ids[3]}, ../up)" in out
    assert table(out)["train"] == dict(annotated=6, found=5, missing=1, broken=4, usable=2)
    assert table(out)["?"] == dict(annotated=1, found=1, missing=0, broken=1, usable=0)
    status, _, err = shell("pack", unav, unav / "store", "--annotations", unav, "--dataset", "unav100")
    assert status == 2 and ids[0] in err                     # nothing is packed by annotations that have a defect
    report = UF.check_unav(unav, unav)
    assert not report.ok and set(report.usable) == {US.unav_id(s, k) for s, n in zip(U.SUBSETS, (6, 3, 4)) for k in range(n)} - set(ids)


def test_what_occurs_twice_is_counted(unav, shell):
    "An id, and a field of a video"
    text, twice, field = (unav / U.FILE).read_text(), US.unav_id("val", 1), US.unav_id("test", 0)
    entry = json.dumps(json.loads(text)["database"][twice])
    text = text.replace(f'"{twice}": {entry}', f'"{twice}": {entry}, "{twice}": {entry}')
    (unav / U.FILE).write_text(text.replace('"subset": "test"', '"subset": "test", "subset": "test"', 1))
    status, out, _ = shell(*doctor(unav))
    assert status == 1 and "2 duplicate. " in out and f"{field}: 'subset' occurs twice. expected every video, and every field of it, once. keep one of the two (also {twice})" in out
    for split, n in (("val", 3), ("test", 4)): assert table(out)[split] == dict(annotated=n, found=n, missing=0, broken=1, usable=n - 1)
    assert "?" not in table(out)
    assert shell("pack", unav, unav / "store", "--annotations", unav, "--dataset", "unav100")[0] == 2


@pytest.mark.parametrize("args, said", [
    (["doctor", "nowhere", "--annotations", "@", "--dataset", "unav100"], "nowhere: no such folder. expected av_features/ with"),
    (["doctor", "@", "--annotations", "nowhere.json", "--dataset", "unav100"], "nowhere.json: no such file"),
    (["doctor", "@", "--dataset", "unav100"], "--annotations: is missing"),
    (["doctor"], "doctor: nothing to check. expected a folder of features, or --pseudo-labels"),
    (["doctor", "--pseudo-labels", "nowhere"], "nowhere: no such folder"),
    (["doctor", "--pseudo-labels", "@", "--dataset", "unav100"], "--pseudo-labels: are labels of LLP"),
    (["pack", "@", "@/new", "--annotations", "@", "--dataset", "unav100", "--frames", "full"], "--frames: 'full' has no meaning for UnAV-100"),
    (["pack", "@", "@/new", "--annotations", "@", "--dataset", "unav100", "--dtype", "int8"], "dtype: 'int8' is not possible"),
    (["pack", "@", "@/new", "--annotations", "@", "--dataset", "unav100", "--on-missing", "skip"], "on_missing: 'skip' is not possible"),
    (["pack", "@", "@/av_features", "--annotations", "@", "--dataset", "unav100"], "av_features: is not a feature store"),
    (["simulate", "@/new", "--dataset", "unav100", "--profile", "tini"], "profile: 'tini' is not possible"),
    (["simulate", "@/new", "--dataset", "unav100", "--videos", "0", "0", "0"], "--videos: 0 0 0 videos"),
    (["simulate", "@/new", "--videos", "3", "-1", "0"], "--videos: 3 -1 0 videos"),
    (["simulate", "@/new", "--dataset", "unav100", "--seed", "-1"], "seed: -1 is not possible"),
    (["simulate", "@/new", "--dataset", "unav100", "--annotations", "nowhere"], "nowhere: no such file"),
    (["simulate", "@", "--dataset", "unav100", "--videos", "1", "1", "1"], "holds features of another source"),
    (["run", "han", "--dataset", "unav100", "--annotations", "@"], "--annotations: has no effect with --dataset unav100. leave it out; use --unav-annotations"),
    (["run", "han", "--dataset", "unav100", "--features", "@"], "--features: has no effect with --dataset unav100"),
    (["run", "han", "--dataset", "unav100", "--pseudo-labels", "@"], "--pseudo-labels: has no effect with --dataset unav100"),
    (["run", "han", "--unav-annotations", "@"], "--unav-annotations: has no effect with --dataset llp. leave it out; add --dataset unav100"),
    (["run", "han", "--unav-features", "@"], "--unav-features: has no effect with --dataset llp"),
])
def test_what_cannot_be_done_is_said_before_any_work(written, shell, args, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = sorted(written.rglob("*"))
    status, out, err = shell(*[a.replace("@", str(written)) for a in args])
    assert status == 2 and said in err and not out
    assert sorted(written.rglob("*")) == before and not list(tmp_path.iterdir())


# ---- pack ----------------------------------------------------------------------------------------------------

def test_a_store_without_some_videos_can_be_run(unav, shell, tmp_path):
    feature(unav, 1).unlink()
    args = ["pack", unav, tmp_path / "store", "--annotations", unav, "--dataset", "unav100"]
    status, _, err = shell(*args)
    assert status == 2 and "1 missing; 12 of 13 videos can be used" in err and "fetch it" in err
    assert shell(*args, "--on-missing", "drop")[0] == 0
    data = DataSpec(str(unav), str(tmp_path / "store"), dataset="unav100")
    with pytest.raises(InputError, match="no features for 1 of 6 train videos .*--on-missing drop"): load_data(data, "micro", tmp_path / "cache")
    clips = load_data(replace(data, on_missing="drop"), "micro", tmp_path / "cache")
    assert [len(c) for c in clips.values()] == [5, 3, 4] and clips["train"].rows.tolist() == [0, 2, 3, 4, 5]
    annotations = U.load_unav(unav)
    part = UF.load_unav_clips(annotations, open_store(tmp_path / "store"), "train", 3, on_missing="drop")     # of those that are there
    assert part.rows.tolist() == [0, 2, 3]
    with pytest.raises(InputError, match="no features for 1 of 3 train videos"): UF.load_unav_clips(annotations, open_store(tmp_path / "store"), "train", 3)
    assert len(UF.load_unav_clips(annotations, open_store(tmp_path / "store"), "train", 1)) == 1


def test_a_pack_that_is_killed_continues(unav, shell, tmp_path, monkeypatch):
    "Wherever it stops, nothing is there, and the same command finishes without reading again what is packed"
    store, reads = tmp_path / "store", []
    args = ["pack", unav, store, "--annotations", unav, "--dataset", "unav100"]
    monkeypatch.setattr(packed, "CHUNK", 4)
    read = UF._UnavPlan.read
    monkeypatch.setattr(UF._UnavPlan, "read", lambda plan, video: reads.append(video) or read(plan, video))
    def stop(*a): raise KeyboardInterrupt
    write = packed._write_chunk
    monkeypatch.setattr(packed, "_write_chunk", lambda work, plan, start, videos: stop() if start == 8 else write(work, plan, start, videos))
    assert shell(*args)[0] == 130 and not store.exists() and len(reads) == 12
    monkeypatch.setattr(packed, "_write_chunk", write)
    with monkeypatch.context() as m:
        m.setattr("avvp_nb.data.packed.os.rename", stop)        # between the last byte and the name
        assert shell(*args)[0] == 130 and not store.exists() and len(reads) == 12 + 5
    assert shell(*args)[0] == 0 and len(reads) == 17
    whole = UF.pack_unav(unav, tmp_path / "whole", U.load_unav(unav))
    assert open_store(store).verify().fingerprint == whole.fingerprint
    for k in ARRAYS: np.testing.assert_array_equal(open_store(store).arrays[k], whole.arrays[k])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store", "unav", "whole"]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_store_that_cannot_be_written(unav, shell, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    status, _, err = shell("pack", unav, tmp_path / "closed" / "store", "--annotations", unav, "--dataset", "unav100")
    assert status == 2 and "could not be written" in err


def test_a_store_of_llp_is_no_store_of_unav(unav, shell, tmp_path):
    llp = tmp_path / "llp"
    assert shell("simulate", llp, "--videos", "3", "2", "2")[0] == 0
    assert shell("pack", llp / "feats", tmp_path / "store", "--annotations", llp / "data")[0] == 0
    status, _, err = shell("run", "han", "--dataset", "unav100", "--unav-annotations", unav, "--unav-features", tmp_path / "store", "--scale", "micro", "--out", tmp_path / "runs")
    assert status == 2 and "store: is no store of UnAV-100" in err and "pack --dataset unav100" in err


# ---- simulate ------------------------------------------------------------------------------------------------

def test_features_for_annotations_that_are_there(written, shell, tmp_path):
    status, out, _ = shell("simulate", tmp_path / "new", "--dataset", "unav100", "--annotations", written, "--videos", "2", "0", "9", "--seed", "5")
    assert status == 0 and not (tmp_path / "new" / U.FILE).exists()
    assert layout_source(tmp_path / "new")["mark"] == "simulated UnAV-100 v1 seed=5 world=7 real annotations"
    assert len(list((tmp_path / "new" / "av_features").iterdir())) == 3*(2 + 4)


def test_real_annotations_are_never_written_over(shell, tmp_path, written):
    raw = json.loads((written / U.FILE).read_text())
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / U.FILE).write_text(json.dumps({**raw, "version": "1.0"}))
    before = (tmp_path / "real" / U.FILE).read_text()
    status, _, err = shell("simulate", tmp_path / "real", "--dataset", "unav100", "--videos", "1", "1", "1")
    assert status == 2 and "holds annotations that were not simulated" in err
    assert (tmp_path / "real" / U.FILE).read_text() == before and len(list((tmp_path / "real").iterdir())) == 1


def test_profiles_are_as_large_as_the_scales():
    for name, sizes in US.UNAV_PROFILES.items():
        scale = sources.SCALES[name]
        assert name == "full" or sizes == {"train": scale.train, "val": scale.val, "test": scale.test}
    assert US.UNAV_PROFILES["full"] == U.SIZES and US.unav_sizes(None) == dict.fromkeys(U.SUBSETS)


# ---- LLP and its pseudo-labels -------------------------------------------------------------------------------

def test_llp_is_meant_unless_another_is_named(shell, tmp_path):
    llp = tmp_path / "llp"
    assert shell("simulate", llp, "--videos", "4", "2", "2", "--seed", "1")[0] == 0
    args = ["doctor", llp / "feats", "--annotations", llp / "data"]
    status, out, _ = shell(*args)
    assert status == 0 and out.startswith("FeatureReport(8 of 8 videos usable, T=10, every number checked, 0 findings)\n")
    assert {k: (v["annotated"], v["usable"]) for k, v in table(out).items()} == {"train": (4, 4), "val": (2, 2), "test": (2, 2)}
    assert shell(*args, "--dataset", "llp")[:2] == (status, out)
    (llp / "feats" / "vggish" / "simtr000002.npy").unlink()
    status, out, _ = shell(*args, "--quick")
    assert status == 1 and "7 of 8 videos usable" in out and table(out)["train"]["missing"] == 1 and "1 missing. " in out and "simtr000002.npy" in out
    assert shell("pack", llp / "feats", tmp_path / "store", "--annotations", llp / "data", "--on-missing", "drop")[0] == 0
    assert len(open_store(tmp_path / "store")) == 7


@pytest.fixture
def labels(tmp_path):
    "Pseudo-labels of six simulated videos as files"
    return write_pseudo_layout(tmp_path / "valor", label_clips(simulate(6, seed=1, frames=None)))


def test_whole_pseudo_labels(labels, shell, tmp_path):
    status, out, _ = shell("doctor", "--pseudo-labels", labels.parent)
    assert status == 0 and out.startswith("PseudoReport(6 of 6 videos usable, T=10, every number checked, 0 findings)")
    x = np.stack([np.load(p) for p in (labels / FOLDERS["audio"]).glob("*.npy")])
    speech = next(line.split() for line in out.splitlines() if line.startswith("Speech"))
    assert list(map(int, speech[1:3])) == [x[:, :, 0].any(1).sum(), x[:, :, 0].sum()] and x[:, :, 0].any()
    assert len([line for line in out.splitlines() if line.startswith(("Clapping", "Basketball_bounce"))]) == 2


def test_damaged_pseudo_labels_beside_features(labels, shell, tmp_path):
    llp = tmp_path / "llp"
    shell("simulate", llp, "--videos", "8", "1", "1", "--seed", "1")                # two training videos have no labels
    bad = labels / FOLDERS["audio"] / "simtr000002.npy"
    np.save(bad, np.load(bad)*.5 + .1)
    turned = labels / FOLDERS["visual"] / "simtr000003.npy"
    np.save(turned, np.load(turned).T)
    args = ["doctor", "--pseudo-labels", labels, "--annotations", llp / "data"]
    status, out, _ = shell(*args)
    assert status == 1 and "PseudoReport(4 of 8 videos usable" in out
    assert "4 missing. " in out and "(also simtr000007.npy, simtr000006.npy, simtr000007.npy)" in out
    assert f"1 values. {bad}: row 0, column 0 (Speech) holds 0." in out and "these are labels, not similarities" in out
    assert f"1 shape. {turned}: has shape (25, 10). expected (T,C) = (10, 25). it is (C,T): transpose it" in out
    status, out, _ = shell(*args, llp / "feats")
    assert status == 1 and "FeatureReport(10 of 10 videos usable" in out and "PseudoReport(4 of 8" in out      # one of the two is enough
