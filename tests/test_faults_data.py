"""Faults that a campaign found in what reads labels, features, packed stores and pseudo-labels: each is refused by name."""
import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from avvp_nb import limits as L
from avvp_nb.core import InputError
from avvp_nb.data import annotations as A
from avvp_nb.data import features as F
from avvp_nb.data import packed as K
from avvp_nb.data import pseudo as P
from avvp_nb.data.tables import parse_intervals, parse_table
from avvp_nb.data.unav_features import unav_doctor

TINY = Path(__file__).parent / "data" / "llp_tiny"
SMALL = {"audio": F.FeatureSet("vggish", 4), "frames": F.FeatureSet("res152", 6, 8), "motion": F.FeatureSet("r2plus1d_18", 5)}
IDS = [f"-toy_{i:06d}" for i in range(6)]
ESCAPE = "\x1b[31m"


def line(error):
    "The message, which has to be one line that a terminal prints as it stands"
    text = str(error.value)
    assert text.isprintable() and len(text) < 1200, text[:2000]
    return text


def refused(contains, call, *args, **kw):
    with pytest.raises(InputError) as e: call(*args, **kw)
    said = line(e)
    assert contains in said, said
    return said


@pytest.fixture
def labels(tmp_path):
    "A copy of the tiny annotations, and a function that replaces text in one of its files"
    root = tmp_path / "labels"
    shutil.copytree(TINY, root)

    def edit(name, old, new):
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new))
        return root
    return edit


@pytest.fixture
def layout(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {k: rng.standard_normal((6, 10 * s.per_second, s.dim)).astype(np.float32) for k, s in SMALL.items()}
    F.write_layout(arrays, tmp_path / "feats", ids=IDS, source={"simulated": False, "mark": ""}, sets=SMALL)
    return tmp_path


def header(shape, descr="<f4", fill=0):
    "The beginning of a .npy file"
    raw = io.BytesIO()
    np.lib.format.write_array_header_1_0(raw, {"descr": descr, "fortran_order": False, "shape": shape})
    return raw.getvalue() + bytes(fill)


def long_header(n=70_000):
    "A .npy file whose header is longer than NumPy reads without being told to trust it"
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (10, 4)}" + b" " * n + b"\n"
    return b"\x93NUMPY\x02\x00" + len(text).to_bytes(4, "little") + text + bytes(160)


# ---------------------------------------------------------------- S3: ids become names of files

@pytest.mark.parametrize("name", ["../../../PWx_0_10", "/etc/passwd_0_10", "..\\..\\PW_0_10", "..", ".hidden_0_10", "a" * 101, "a\0b_0_10",
                                  " aTinyTrain1_0_10"])
@pytest.mark.parametrize("file", [A.SPLITS["train"], A.SPLITS["test"], A.DENSE["audio"]])
def test_s3_an_id_is_never_a_path(labels, name, file):
    old = {A.SPLITS["train"]: "aTinyTrain1_0_10", A.SPLITS["test"]: "gTinyTest_1_0_10", A.DENSE["audio"]: "Lost3Chr_0_10"}[file]
    said = refused("the filename '", A.load_annotations, labels(file, old, name))
    assert file + ":" in said


def test_s3_an_id_of_a_megabyte_makes_a_short_message(labels):
    refused("has 1,000,000 characters", A.load_annotations, labels(A.SPLITS["train"], "aTinyTrain1_0_10", "x" * 10**6))


def test_s3_a_class_of_a_megabyte_makes_a_short_message(labels):
    refused("event_labels is 'xxx", A.load_annotations, labels(A.SPLITS["val"], "Cat", "x" * 10**6))


def test_s3_nothing_is_written_outside(tmp_path):
    clips = {k: np.zeros((1, 10 * s.per_second, s.dim), np.float32) for k, s in SMALL.items()}
    for bad in ("../../../PWx_0_10", "../PW", "..", "a/b", "a/../../PW"):
        refused("ids: the id '", F.write_layout, clips, tmp_path / "in" / "out", ids=[bad], sets=SMALL)
    assert list(tmp_path.iterdir()) == []


def test_s3_simulate_with_annotations_stays_inside(labels, tmp_path):
    from avvp_nb.cli import main
    root = labels(A.SPLITS["train"], "aTinyTrain1_0_10", "../../../PWx_0_10")
    assert main(["simulate", str(tmp_path / "t" / "out"), "--annotations", str(root), "--videos", "3", "1", "1"]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["labels"]


@pytest.mark.parametrize("bad", ["../../x", "a\0b", "/etc/passwd"])
def test_s3_nothing_is_read_outside(layout, bad):
    refused("ids: the id '", F.doctor, layout, [bad], sets=SMALL)
    refused("ids: the id '", K.pack, layout, layout / "s", [*IDS, bad], sets=SMALL)
    for m in P.FOLDERS.values(): (layout / "valor" / m).mkdir(parents=True)
    refused("ids: the id '", P.load_pseudo_labels, layout / "valor", [bad])
    refused("ids: the id '", P.pseudo_doctor, layout / "valor", [bad])


def test_s3_short_ids_and_other_alphabets_stay_possible(tmp_path):
    splits = {"train": {"a_0_3": "Dog"}, "val": {"vidéo 7_0_3": "Dog"}, "test": {"t.x_0_3": "Dog"}}
    A.write_annotations(tmp_path, splits, [], [])
    assert A.load_annotations(tmp_path).video_ids == ["a_0_3", "vidéo 7_0_3", "t.x_0_3"]


# ---------------------------------------------------------------- S5: nothing reaches a terminal raw

def test_s5_ids_and_classes(labels):
    said = refused("cannot be printed", A.load_annotations,
                   labels(A.SPLITS["train"], "aTinyTrain1_0_10", f"a{ESCAPE}"))
    assert r"a\x1b[31m" in said


@pytest.mark.parametrize("file,old,new", [(A.SPLITS["val"], "Cat", f"Cat{ESCAPE}"), (A.DENSE["audio"], "\t2\t6\tDog", f"\t2\t6\tDog{ESCAPE}"),
                                          (A.DENSE["audio"], "\t2\t6\tDog", f"\t2{ESCAPE}\t6\tDog"),
                                          (A.SPLITS["test"], "filename\tevent_labels", f"filename\t{ESCAPE}")])
def test_s5_other_cells(labels, file, old, new):
    refused(r"\x1b[31m", A.load_annotations, labels(file, old, new))


def test_s5_names_of_files(layout):
    folder = layout / "feats" / "vggish"
    (folder / f"{ESCAPE}X.npy").touch()
    (folder / f"{IDS[0]}.npy").rename(folder / f"{IDS[0]}{ESCAPE}.npy")
    report = F.doctor(layout, IDS, sets=SMALL)
    text = report.problems.to_string() + repr(report) + report._repr_html_()
    assert "\x1b" not in text and r"\x1b[31mX.npy" in text
    with pytest.raises(InputError) as e: report.raise_if_bad()
    assert r"\x1b[31m.npy is there" in line(e)


def test_s5_listings_of_folders(tmp_path):
    (tmp_path / ESCAPE).mkdir()
    refused(r"no feature folders (\x1b[31m)", F.find_layout, tmp_path)
    refused(r"no pseudo-labels (\x1b[31m)", P.find_pseudo, tmp_path)
    for m in P.FOLDERS.values(): (tmp_path / m).mkdir(parents=True)
    (tmp_path / P.FOLDERS["audio"] / f"{ESCAPE}.npy").write_bytes(b"")
    assert "\x1b" not in P.pseudo_doctor(tmp_path).problems.to_string()


@pytest.mark.parametrize("source", [{"mark": f"real{ESCAPE}"}, {"mark": 3}, {"mark": ["a"]}, {"mark": "", "simulated": "no"}])
def test_s5_marks_of_features(layout, source):
    (layout / "feats" / F.SOURCE_FILE).write_text(json.dumps(source))
    said = refused(F.SOURCE_FILE, K.pack, layout, layout / "store", IDS, sets=SMALL)
    assert "restore it or delete it" in said and not (layout / "store").exists()


# ---------------------------------------------------------------- B2: numbers of many digits

@pytest.mark.parametrize("cell", ["9" * 20, "-" + "9" * 25, "9" * 4000, str(2**63), "1000000000"])
def test_b2_numbers_of_many_digits_are_outside_the_clip(labels, cell):
    root = labels(A.DENSE["visual"], "\t0\t10\tDog", f"\t{cell}\t10\tDog")
    assert "AVVP_eval_visual.csv:2" in refused("is outside the clip. expected a whole second, 0 to 10", A.load_annotations, root)


@pytest.mark.parametrize("cell", ["٣", "²", "1e1", "0x1", "1_0", "+1"])
def test_b2_only_digits_are_whole_numbers(cell):
    refused("is not a whole number", parse_intervals, f"filename\tonset\toffset\tevent_labels\na\t{cell}\t3\tDog\n", ("Dog",), 10, "a.csv")
    assert L.whole_number("0" * 40 + "3") == 3


# ---------------------------------------------------------------- B5, B25: headers of .npy files

HEADERS = {"2**64": (header((2**64, 4)), "unreadable"), "2**62": (header((2**62, 4), fill=160), "unreadable"),
           "terabyte": (header((10**10, 25)), "truncated"), "many": (header((2**40, 2**40)), "truncated"),
           "negative": (header((-1, 4), fill=160), "unreadable"), "axes": (header((1,) * 60), "unreadable"),
           "long": (long_header(), "unreadable"), "deep": (b"\x93NUMPY\x01\x00" + (9000).to_bytes(2, "little") + b"(" * 9000, "unreadable"),
           "minus": (b"\x93NUMPY\x01\x00" + (9000).to_bytes(2, "little") + b"-" * 8999 + b"1", "unreadable"),
           "no dict": (b"\x93NUMPY\x01\x00\x04\x00[1]\n", "unreadable"), "version": (b"\x93NUMPY\x09\x00" + bytes(90), "unreadable"),
           "descr": (header((10, 4)).replace(b"<f4", b"<q9"), "unreadable"), "nothing": (b"", "unreadable")}


@pytest.mark.parametrize("how", HEADERS)
@pytest.mark.parametrize("full", [False, True])
def test_b5_headers(layout, how, full):
    data, kind = HEADERS[how]
    path = layout / "feats" / "vggish" / f"{IDS[2]}.npy"
    path.write_bytes(data)
    report = F.doctor(layout, IDS, full=full, sets=SMALL)
    assert report.serious[["id", "file", "problem"]].values.tolist() == [[IDS[2], str(path), kind]]
    assert "pickle" not in report.serious.found.item()
    assert str(path) in refused("5 of 6 videos can be used", K.pack, layout, layout / "store", IDS, sets=SMALL)


@pytest.mark.parametrize("how", HEADERS)
def test_b6_b25_the_same_headers_as_pseudo_labels(tmp_path, how):
    for m in P.FOLDERS.values():
        (tmp_path / m).mkdir(parents=True)
        for i in IDS: np.save(tmp_path / m / f"{i}.npy", np.zeros((10, 25), np.int64))
    path = tmp_path / P.FOLDERS["visual"] / f"{IDS[1]}.npy"
    path.write_bytes(HEADERS[how][0])
    report = P.pseudo_doctor(tmp_path, IDS)
    assert report.problems[["id", "file", "problem"]].values.tolist() == [[IDS[1], str(path), "unreadable"]]
    assert "pickled" not in refused("could not be read", P.load_pseudo_labels, tmp_path, IDS)


def test_b25_what_is_called_pickled_is_pickled(tmp_path):
    (tmp_path / "long.npy").write_bytes(long_header())
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    refused("a header of 70,", P.read_pseudo, tmp_path / "long.npy", (10, 4))
    refused("pickled objects", P.read_pseudo, tmp_path / "objects.npy", (10, 4))


def test_b5_lengths_do_not_overflow():
    h = L.Header((2**48, 2**48, 128), np.dtype("f8"), 128, 5248)
    assert h.expected_size == 128 + 2**96 * 1024 and h.fault == ("truncated", f"5,248 of {h.expected_size:,} bytes")


# ---------------------------------------------------------------- B6: archives

@pytest.mark.parametrize("how", ["terabyte", "2**64", "long", "cut", "no zip", "folder", "objects", "not an array"])
def test_b6_archives_are_refused_by_name(tmp_path, how):
    path, data = tmp_path / "a.npz", header((10, 4), fill=160)
    if how in HEADERS: data = HEADERS[how][0]
    if how == "not an array": data = b"text"
    if how == "objects": np.savez(path, a=np.array([{}]))
    elif how == "folder": path.mkdir()
    else:
        with zipfile.ZipFile(path, "w") as z: z.writestr("a.npy", data)
        if how == "cut": path.write_bytes(path.read_bytes()[:-9])
        if how == "no zip": path.write_bytes(b"x" * 99)
    assert str(path) in refused("could not be read", L.read_npz, path)


def test_b6_a_zip_bomb_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as z: z.writestr("a.npy", header((2**22,), fill=2**24))
    assert (tmp_path / "a.npz").stat().st_size < 2**17
    refused("more than 1,000,000", L.read_npz, tmp_path / "a.npz", most=10**6)
    assert L.read_npz(tmp_path / "a.npz")["a"].shape == (2**22,)


def test_b6_archives_of_numpy_are_read_as_by_numpy(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"a": rng.random((3, 4)), "f": np.asfortranarray(rng.random((3, 4))), "none": np.zeros((0, 2)), "one": np.float32(3), "text": np.array(["a", "bc"])}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **arrays)
        read = L.read_npz(tmp_path / "x.npz")
        assert list(read) == list(arrays) and all(np.array_equal(read[k], v) and read[k].dtype == v.dtype for k, v in arrays.items())


# ---------------------------------------------------------------- B7: what is no file

def odd(path, how):
    "Put something that is no file in place of one"
    if path.exists(): path.unlink()
    if how == "folder": path.mkdir()
    elif how == "pipe":
        if not hasattr(os, "mkfifo"): pytest.skip("the system has no named pipes")
        os.mkfifo(path)
    else: path.symlink_to("/dev/zero" if how == "device" else "nowhere")
    if how == "device" and not Path("/dev/zero").exists(): pytest.skip("the system has no /dev/zero")


@pytest.mark.parametrize("how", ["folder", "pipe", "device"])
def test_b7_what_is_no_file_is_named_and_never_waited_for(layout, how):
    path = layout / "feats" / "vggish" / f"{IDS[0]}.npy"
    odd(path, how)
    for full in (False, True):
        r = F.doctor(layout, IDS, full=full, sets=SMALL).serious
        assert (r.file.item(), r.problem.item()) == (str(path), "unreadable")
    assert "is a" in r.found.item()


@pytest.mark.parametrize("how", ["folder", "pipe", "broken link"])
def test_b7_pseudo_labels(tmp_path, how):
    from avvp_nb.data.sources import DataSpec, identify
    for m in P.FOLDERS.values():
        (tmp_path / m).mkdir(parents=True)
        for i in IDS: np.save(tmp_path / m / f"{i}.npy", np.zeros((10, 25), np.int64))
    path = tmp_path / P.FOLDERS["audio"] / f"{IDS[3]}.npy"
    odd(path, how)
    report = P.pseudo_doctor(tmp_path, IDS)
    assert report.problems.file.tolist() == [str(path)] and report.usable == [i for i in IDS if i != IDS[3]]
    assert str(path) in refused("", P.load_pseudo_labels, tmp_path, IDS)
    assert str(path) in refused("is no file", identify, DataSpec(pseudo_labels=str(tmp_path)), tmp_path / "cache")


@pytest.mark.parametrize("how", ["folder", "pipe"])
def test_b7_tables(labels, how):
    root = labels(A.SPLITS["val"], "Cat", "Cat")
    odd(root / A.SPLITS["val"], how)
    refused("could not be read as text (is a", A.load_annotations, root)


def test_b7_a_table_of_any_size_is_not_read(labels):
    root = labels(A.SPLITS["val"], "Cat", "Cat")
    try:
        with open(root / A.SPLITS["val"], "ab") as f: f.truncate(2**33)      # a hole: it takes no room
    except OSError: pytest.skip("the file system has no files with holes")
    refused("could not be read as text (has 8,589,934,592 bytes", A.load_annotations, root)


# ---------------------------------------------------------------- B8: packed stores

def without(key):
    def change(m): del m[key]
    return change


def with_(**changes):
    def change(m): m.update(changes)
    return change


def array(k, **changes):
    def change(m): m["arrays"][k].update(changes)
    return change


MANIFESTS = {"repeated ids": (with_(ids=[*IDS[:5], IDS[0]]), "occurs twice"), "no source": (without("source"), "`source`"),
             "source a list": (with_(source=[]), "`source`"), "mark": (with_(source={"mark": ESCAPE}), "`mark`"),
             "no hash": (lambda m: m["arrays"]["motion"].pop("source_sha256"), "motion has no source_sha256"),
             "hash a list": (array("audio", source_sha256=[]), "audio has no source_sha256"),
             "no arrays": (without("arrays"), "no arrays"), "arrays a list": (with_(arrays=[]), "no arrays"),
             "an array a number": (lambda m: m["arrays"].update(audio=3), "audio is not described"),
             "no file": (lambda m: m["arrays"]["audio"].pop("file"), "audio has no file"),
             "another file": (array("audio", file="../feats/vggish/x.npy"), "audio has the file '../feats"),
             "absolute": (array("audio", file="/etc/passwd"), "audio has the file '/etc"),
             "shape": (array("audio", shape=[6, 10]), "audio has no shape"), "huge": (array("audio", shape=[6, 10, 2**70]), "audio has no shape"),
             "shape of text": (array("audio", shape="abc"), "audio has no shape"), "dtype": (array("audio", dtype=3), "audio has no dtype"),
             "ids of numbers": (with_(ids=[1, 2, 3, 4, 5, 6]), "is not text"), "ids a text": (with_(ids="abcdef"), "no ids"),
             "ids null": (with_(ids=None), "no ids"), "no ids at all": (with_(ids=[]), "no ids"), "an id a path": (with_(ids=["../x", *IDS[1:]]), "separator"),
             "seconds": (with_(seconds=[10]), "seconds"), "format": (with_(format=99), "format 99"), "kind a list": (with_(kind=[]), "kind"),
             "lengths": (with_(lengths=[10, 10]), "lengths"), "lengths too long": (with_(lengths=[99] * 6), "lengths"), "a number": (None, "is not a JSON object")}


@pytest.mark.parametrize("how", MANIFESTS)
def test_b8_manifests(layout, how):
    K.pack(layout, layout / "store", IDS, sets=SMALL)
    path = layout / "store" / K.MANIFEST
    manifest = json.loads(path.read_text())
    change, said = MANIFESTS[how]
    if change: change(manifest)
    path.write_text(json.dumps(manifest if change else 3))
    assert str(path) in refused(said, K.open_store, layout / "store")
    with pytest.raises(InputError): K.pack(layout, layout / "store", IDS[:3], sets=SMALL)
    if how in ("a number", "no source", "repeated ids"):
        assert len(K.pack(layout, layout / "store", IDS[:3], sets=SMALL, overwrite=True)) == 3


def test_b8_unfinished_work_with_a_damaged_plan_is_started_anew(layout):
    work = layout / ".store.packing"
    for text in ("{", "[" * 500, "", "\0"):
        work.mkdir()
        (work / "plan.json").write_text(text)
        assert len(K.pack(layout, layout / "store", IDS, sets=SMALL)) == 6
        shutil.rmtree(layout / "store")


def test_b8_finished_work_with_a_damaged_manifest(layout):
    K.pack(layout, layout / "store", IDS, sets=SMALL)
    shutil.move(layout / "store", layout / ".again.packing")
    (layout / ".again.packing" / K.MANIFEST).write_text("[]")
    assert len(K.pack(layout, layout / "again", IDS, sets=SMALL)) == 6


# ---------------------------------------------------------------- B25 and issue 10: blame what is wrong

def test_b25_a_missing_folder_blames_nothing_else(layout):
    shutil.rmtree(layout / "feats" / "vggish")
    report = F.doctor(layout, IDS, sets=SMALL)
    assert report.summary().to_dict() == {"missing": {"audio": 6}} and report.seconds == 10


@pytest.mark.parametrize("m,rows", [("audio", 9), ("frames", 72), ("motion", 11), ("frames", 79), ("audio", 0)])
def test_issue_10_a_wrong_set_is_blamed_and_not_the_others(layout, m, rows):
    for i in IDS: np.save(layout / "feats" / SMALL[m].folder / f"{i}.npy", np.ones((rows, SMALL[m].dim), np.float32))
    assert F.doctor(layout, IDS, sets=SMALL).summary().to_dict() == {"shape": {m: 6}}


def test_issue_10_t_comes_from_the_annotations(tmp_path):
    a = A.load_annotations(TINY)
    arrays = {k: np.ones((len(a.video_ids), 10 * s.per_second, s.dim), np.float32) for k, s in SMALL.items()}
    F.write_layout(arrays, tmp_path, ids=a.video_ids, sets=SMALL)
    for i in a.video_ids:
        for m in ("audio", "motion"): np.save(tmp_path / SMALL[m].folder / f"{i}.npy", np.ones((9, SMALL[m].dim), np.float32))
    assert F.doctor(tmp_path, a.video_ids, sets=SMALL).seconds == 9       # two of three say so, and nobody else
    report = F.doctor(tmp_path, a, sets=SMALL)
    assert report.seconds == 10 and report.summary().to_dict() == {"shape": {"audio": 10, "motion": 10}}
    refused("expected (10, 4)", K.pack, tmp_path, tmp_path / "store", a, sets=SMALL)


def test_issue_10_eight_bit_values_as_floats_are_found(tmp_path):
    sets = {**SMALL, "audio": F.FEATURE_SETS["audio"]}
    rng = np.random.default_rng(0)
    arrays = {k: rng.random((3, 10 * s.per_second, s.dim), dtype=np.float32) for k, s in sets.items()}
    arrays["audio"][1] = rng.integers(0, 256, (10, 128))
    F.write_layout(arrays, tmp_path, ids=IDS[:3], source={"simulated": False, "mark": ""}, sets=sets)
    report = F.doctor(tmp_path, IDS[:3], full=True, sets=sets)
    assert report.serious[["modality", "id", "problem"]].values.tolist() == [["audio", IDS[1], "8-bit"]]
    assert "post-processing" in report.serious.fix.item() and F.doctor(tmp_path, IDS[:3], sets=sets).ok
    assert f"{IDS[1]}.npy" in refused("whole numbers from 0 to 255", K.load_layout, tmp_path, IDS[:3], sets=sets)
    assert not F.is_eight_bit(np.ones((10, 128))) and not F.is_eight_bit(np.zeros((10, 128)))


@pytest.mark.parametrize("name", ["{}_30_40.npy", "{}.npz", "{}.npy.gz", "{} (1).npy", "{}_vggish.npy", "{}.pt"])
def test_issue_10_other_names_get_a_hint(layout, name):
    folder = layout / "feats" / "vggish"
    (folder / f"{IDS[0]}.npy").rename(folder / name.format(IDS[0]))
    r = F.doctor(layout, IDS, sets=SMALL).serious.iloc[0]
    assert (r.problem, r.found, r.expected) == ("missing", f"{name.format(IDS[0])} is there", f"{IDS[0]}.npy") and "rename" in r.fix
    assert name.format(IDS[0]) in refused("missing", K.pack, layout, layout / "store", IDS, sets=SMALL)


def test_issue_10_hints_for_pseudo_labels(tmp_path):
    for m in P.FOLDERS.values():
        (tmp_path / m).mkdir(parents=True)
        for i in IDS: np.save(tmp_path / m / f"{i}_0_10.npy", np.zeros((10, 25), np.int64))
    refused(f"{IDS[0]}_0_10.npy is there: rename it", P.load_pseudo_labels, tmp_path, IDS)
    assert set(P.pseudo_doctor(tmp_path, IDS).serious.expected) == {f"{i}.npy" for i in IDS}


def test_issue_10_the_doctor_counts_by_kind(tmp_path):
    a = A.load_annotations(TINY)
    arrays = {k: np.ones((len(a.video_ids), 10 * s.per_second, s.dim), np.float32) for k, s in SMALL.items()}
    F.write_layout(arrays, tmp_path, ids=a.video_ids, sets=SMALL)
    (tmp_path / "vggish" / "aTinyTrain1.npy").unlink()
    (tmp_path / "res152" / "dTinyTrain5.npy").write_bytes(b"")
    counts = F.doctor(tmp_path, a, sets=SMALL).counts()
    assert list(counts.index) == ["train", "val", "test"]
    assert counts.loc["train"].to_dict() == dict(annotated=5, found=4, missing=1, broken=1, usable=3)
    assert (counts.loc[["val", "test"], ["missing", "broken"]] == 0).all(axis=None)
    assert F.doctor(tmp_path, a.video_ids, sets=SMALL).counts().loc["all", "usable"] == 8
    assert list(counts.columns) == ["annotated", "found", "missing", "broken", "usable"]      # as UnAV-100's


@pytest.mark.parametrize("name", ["#NAME?", "#REF!", "#####", "1.23E+10", "12-Mar", "Jan-07", "'-TinyTrain2_30_40", "=-TinyTrain2_30_40", "Err:508"])
def test_issue_10_what_a_spreadsheet_does_to_ids_is_named(labels, name):
    root = labels(A.SPLITS["train"], "-TinyTrain2_30_40", name)
    said = refused("was changed by a spreadsheet", A.load_annotations, root)
    assert "AVVP_train.csv:3" in said and "edit it as text" in said


@pytest.mark.parametrize("split", A.SPLITS)
def test_issue_10_a_table_without_rows_is_refused_as_such(labels, split):
    root = labels(A.SPLITS["val"], "Cat", "Cat")
    (root / A.SPLITS[split]).write_text("filename\tevent_labels\n")
    refused(f"{A.SPLITS[split]}: has a header and no rows", A.load_annotations, root)
    (root / A.SPLITS[split]).write_text("")
    refused(f"{A.SPLITS[split]}: is empty", A.load_annotations, root)


def test_b25_remedies_can_be_typed_on_a_shell(layout):
    K.pack(layout, layout / "store", IDS, sets=SMALL)
    assert "another folder" in refused("different pack", K.pack, layout, layout / "store", IDS[:3], sets=SMALL)
    (layout / "feats" / "vggish" / f"{IDS[0]}.npy").unlink()
    assert "--on-missing drop" in refused("missing", K.pack, layout, layout / "other", IDS, sets=SMALL)
    np.save(layout / "feats" / "vggish" / f"{IDS[0]}.npy", np.full((10, 4), 1e6, np.float32))
    assert "--dtype float32" in refused("does not fit", K.pack, layout, layout / "other", IDS, sets=SMALL)


# ---------------------------------------------------------------- what is right stays as it was

def test_files_of_numpy_are_read_as_by_numpy(tmp_path):
    rng = np.random.default_rng(0)
    for x in (rng.random((3, 4)), np.asfortranarray(rng.random((3, 4))), np.zeros((0, 4)), np.float32(2), np.arange(5)[::2], rng.random((2, 3)) > .5):
        np.save(tmp_path / "x.npy", x)
        y = L.array_of((tmp_path / "x.npy").read_bytes())
        assert np.array_equal(x, y) and y.dtype == np.asarray(x).dtype and y.flags.writeable


def test_real_files_are_accepted(llp):
    "No id, cell or number of the real tables is outside the limits"
    for table in A.AUDIO_TABLES: assert len(A.load_annotations(llp, audio_table=table).video_ids) == 11_849


def test_a_table_may_have_spaces_at_its_end():
    assert len(parse_table("filename\tevent_labels\na_0_10\tDog\n\n\n", ("filename", "event_labels"), "t.csv")) == 1


def test_files_of_unav_with_the_same_faults(tmp_path):
    folder = tmp_path / "av_features"
    folder.mkdir()
    for suffix in ("rgb", "flow", "vggish"): (folder / f"aTinyVideo1_{suffix}.npy").write_bytes(HEADERS["2**64"][0])
    assert set(unav_doctor(tmp_path, ["aTinyVideo1"], full=True).problems.problem) == {"unreadable"}
