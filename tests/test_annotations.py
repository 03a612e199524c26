"""Label files: parity with the real tables and the official grids, every defect, every refusal."""
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avvp_nb.core import CLASSES, InputError
from avvp_nb.data import annotations as A

TINY = Path(__file__).parent / "data" / "llp_tiny"
CARD = Path(__file__).parents[1] / "data_cards" / "llp.md"


@pytest.fixture
def folder(tmp_path):
    "A private copy of the tiny data set, with a function that replaces text in one of its files"
    root = tmp_path / "llp"
    shutil.copytree(TINY, root)

    def edit(name, old, new):
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new, 1))
        return root

    return root, edit


@pytest.fixture(scope="module")
def real(llp):
    return {table: A.load_annotations(llp, audio_table=table) for table in A.AUDIO_TABLES}


# ---------------------------------------------------------------- the real files

def test_real_sizes(llp, llp_stats):
    a = A.load_annotations(llp)
    summary = json.loads((llp_stats / "summary.json").read_text())
    assert {k: len(s) for k, s in a.items()} == summary["n_videos"]
    assert list(a.classes) == summary["classes"]
    assert (len(a.audio_rows), len(a.visual_rows)) == (4131, 2495)
    rows = a.row_counts()
    for file, key in ((A.DENSE["audio"], "audio"), (A.DENSE["visual"], "visual")):
        matched = summary[f"rows_eval_{key}_matched"]
        assert rows.loc[file, ["of val", "of test"]].tolist() == [matched["val"], matched["test"]]
    assert a["train"].audio is None and a["train"].visual is None
    assert a["test"].audio.shape == (1200, 10, 25) and a["test"].audio.dtype == np.uint8
    assert a["train"].weak.dtype == np.float32
    assert a.notes == []


@pytest.mark.parametrize("table,key", [("2024", ""), ("2020", "_2020_copy")])
def test_real_events_after_rasterisation(real, llp_stats, table, key):
    summary = json.loads((llp_stats / "summary.json").read_text())
    stats = real[table].stats()
    for split in ("val", "test"):
        for name, mine in (("audio", "audio"), ("visual", "visual"), ("audio_visual", "av")):
            assert stats.loc[split, f"{mine} events"] == summary[f"events_after_rasterisation{key}"][split][name]
            if table == "2024":
                assert stats.loc[split, f"{mine} seconds"] == summary["active_seconds"][split][name]
                assert stats.loc[split, f"no {mine}"] == summary["videos_without"][split][name]


def test_real_class_frequencies(real, llp_stats):
    table = pd.read_csv(llp_stats / "class_frequency.csv")
    count = next(c for c in table.columns if "video" in c)
    for split in A.SPLITS:
        want = table[(table.split == split) & (table.class_id >= 0)].sort_values("class_id")[count].to_numpy()
        assert (real["2024"][split].weak.sum(0) == want).all()


def test_real_modality_shares(real):
    shares = A.modality_shares(real["2024"])
    assert shares.videos["all"] == 3348
    assert (100 * shares.loc["all"].iloc[1:]).round(1).tolist() == [94.7, 64.5, 60.3, 34.4, 4.2, 1.1]


@pytest.mark.parametrize("table,prefix", [("2024", ""), ("2020", "common_")])
def test_real_grids_are_those_of_the_official_code(real, golden, table, prefix):
    case = golden("metrics_llp_test")
    truth = np.unpackbits(case[prefix + "gt_packed"], axis=1)[:, :500].reshape(1200, 2, 25, 10)
    test = real[table]["test"]
    assert test.ids == case["filenames"].tolist()
    assert (test.audio == truth[:, 0].transpose(0, 2, 1)).all()
    assert (test.visual == truth[:, 1].transpose(0, 2, 1)).all()


KINDS = {"offset<=onset": "D1", "exact duplicate row": "D2", "video not in val/test": "D3", "same-class overlap": "D5",
         "same-class adjacent intervals": "D6", "dense label absent from weak label": "D7",
         "weak label absent from dense annotation": "D8", "fractional start/end in filename": "D9",
         "label repeated inside a row": "D10", "no audio event after rasterisation": "D11",
         "corrupted filename in the 2020 copy": "2020"}


@pytest.mark.parametrize("kind", KINDS)
def test_real_report_row_by_row(real, llp_stats, kind):
    "Every row of the reference list is in the report, with file and line, and nothing else is"
    listed = pd.read_csv(llp_stats / "annotation_defects.csv", dtype=str, keep_default_na=False)
    listed = listed[listed.defect == kind]
    assert len(listed) and set(pd.read_csv(llp_stats / "annotation_defects.csv").defect) == set(KINDS)
    report = real["2020" if KINDS[kind] == "2020" else "2024"].report()
    mine = report[report.id == KINDS[kind]]
    lined = (listed.line != "").to_numpy()
    assert lined.all() or not lined.any()
    names = [f.replace(" (2020 copy)", "").replace(".common_copy", "") for f in listed.file]
    want = sorted(zip(names, listed.line if lined.all() else [""] * len(listed), listed.row))
    lines = mine.line.astype(str) if lined.all() else [""] * len(mine)
    assert sorted(zip([f.replace(".common_copy", "") for f in mine.file], lines, mine.row)) == want


def test_real_defect_counts(real):
    report = real["2024"].report()
    counts = A.count_defects(report).set_index(["id", "file"])
    audio, visual = A.DENSE.values()
    rows = {("D1", audio): 6, ("D2", audio): 8, ("D3", audio): 14, ("D3", visual): 11, ("D4", audio): 1, ("D5", audio): 15,
            ("D6", audio): 11, ("D6", visual): 3, ("D7", audio): 76, ("D7", visual): 51,
            ("D9", A.SPLITS["train"]): 5, ("D10", A.SPLITS["test"]): 1,
            ("D11", A.SPLITS["val"]): 4, ("D11", A.SPLITS["test"]): 6, ("D12", A.SPLITS["val"]): 70,
            ("D12", A.SPLITS["test"]): 121, ("D13", A.SPLITS["val"]): 93, ("D13", A.SPLITS["test"]): 174}
    assert {k: counts.loc[k, "rows"] for k in rows} == rows
    assert counts.loc[("D2", audio), "videos"] == 5
    assert (counts.loc[("D7", audio), "pairs"], counts.loc[("D7", visual), "pairs"]) == (51, 40)
    d3, d7, d8 = (report[report.id == k] for k in ("D3", "D7", "D8"))
    assert d3.video.nunique() == 8
    assert (d7[["video", "class"]].drop_duplicates().shape[0], d7.video.nunique()) == (65, 54)
    assert (len(d8), d8.video.nunique(), (d8["class"] == "Speech").sum()) == (38, 35, 19)
    drift = " ".join(report[report.id == "D14"].row)
    assert all(s in drift for s in ("1.606 (at most 3)", "Clapping on 1.6% of train, 7.0%",
                                    "Acoustic_guitar on 5.0% of train, 8.4%", "Cheering on 5.3% of train, 7.1%"))


def test_real_prefix_collision_does_not_leak(real):
    d4 = real["2024"].report().query("id == 'D4'").iloc[0]
    val = real["2024"]["val"]
    i = val.ids.index(d4.video)
    on = np.flatnonzero((val.audio[i] | val.visual[i]).any(0))
    assert [CLASSES[c] for c in on] == ["Violin_fiddle"]


@pytest.mark.parametrize("asked,have", [("2024", "2020"), ("2020", "2024"), ("2024", "2024"), ("2020", "2020")])
def test_real_single_audio_file_of_either_copy(llp, real, tmp_path, asked, have):
    "A clone with one file called AVVP_eval_audio.csv gives the same labels and fingerprint, whichever copy it is"
    for name in (*A.SPLITS.values(), A.DENSE["visual"]):
        shutil.copy(llp / name, tmp_path)
    source = next(f for f in (A.DENSE["audio"], A.COPY_2020) if A.which_audio_table((llp / f).read_text()) == have)
    shutil.copy(llp / source, tmp_path / A.DENSE["audio"])
    before = (tmp_path / A.DENSE["audio"]).read_bytes()
    a = A.load_annotations(tmp_path, audio_table=asked)
    assert a.audio_table == asked and a.fingerprint == real[asked].fingerprint
    assert (a["test"].audio == real[asked]["test"].audio).all()
    assert any("in memory" in n for n in a.notes) == (asked != have)
    assert (tmp_path / A.DENSE["audio"]).read_bytes() == before


def test_real_copies_differ_by_eight_seconds(real):
    new, old = real["2024"]["test"].audio, real["2020"]["test"].audio
    assert (new >= old).all() and int(new.sum()) - int(old.sum()) == 8
    assert (new != old).any((1, 2)).sum() == 2
    report = real["2020"].report()
    assert (report.id == "2020").sum() == 3
    assert len(report.query("id == 'D3'")) == len(real["2024"].report().query("id == 'D3'")) == 25  # listed once, not twice


def test_real_strict_refuses(llp):
    with pytest.raises(InputError, match="AVVP_eval_audio.csv:48: D1 offset <= onset .6 such rows"):
        A.load_annotations(llp, strict=True)


def test_data_card_is_up_to_date(real):
    "The facts block is what the function says about the real files"
    card = CARD.read_text()
    assert A.with_facts(card, A.facts(real["2024"])) == card


def test_data_card_order():
    "The card has its front matter and sections in the usual order"
    card = CARD.read_text()
    assert card.startswith("---\n") and "\n---\n" in card[4:]
    heads = [line[3:] for line in card.splitlines() if line.startswith("## ")]
    order = ["Dataset Description", "Dataset Structure", "Dataset Creation", "Annotations and known defects",
             "Considerations for Using the Data", "Additional Information"]
    assert heads == order
    assert all(f"**{k}" in card for k in A.DEFECTS if k != "2020")


# ---------------------------------------------------------------- the tiny data set

def test_tiny_labels():
    a = A.load_annotations(TINY)
    assert [len(s) for s in a.values()] == [5, 2, 3] and list(a) == list(A.SPLITS)
    test = a["test"]
    assert test.video_ids == ["gTinyTest_1", "hTinyTest_2", "-_TinyTest3"]
    assert test.audio[0, :, 3].tolist() == [1, 1, 1, 1, 1, 1, 0, 0, 0, 0]
    assert test.audio[1, :, CLASSES.index("Clapping")].sum() == 0  # 9..0 is not 0..9
    assert a["val"].audio[1].sum() == 2                            # the colliding filename's Dog stays out
    assert test.weak[1].sum() == 1                                 # "Clapping,Clapping"
    assert a.video_ids == a["train"].video_ids + a["val"].video_ids + test.video_ids


def test_tiny_report_has_everything():
    a = A.load_annotations(TINY)
    report = a.report()
    assert set(report.id) == set(A.DEFECTS) - {"2020"}
    assert report.query("id == 'D1'").line.tolist() == [10, 11]
    assert report.query("id == 'D4'").video.tolist() == ["fTinyValid2_8_30"]
    assert report.query("id == 'D5'").row.tolist() == ["gTinyTest_1_0_10\tDog\t(0, 4) and (2, 6)"]
    assert (report.effect == report.id.map(lambda k: A.DEFECTS[k][1])).all()
    assert list(report.id.drop_duplicates()) == [k for k in A.DEFECTS if k != "2020"]


def test_displays():
    a = A.load_annotations(TINY)
    assert repr(a).startswith("Annotations(train 5, val 2, test 3; 25 classes, T=10, audio table other, ")
    assert repr(a["train"]) == "Split(train, 5 videos, 25 classes, weak labels only)"
    assert "<table" in a._repr_html_() and "neither copy" in a._repr_html_()
    assert "<table" in a["test"]._repr_html_()


def test_tiny_fingerprint_follows_the_content(folder):
    root, edit = folder
    before = A.load_annotations(root).fingerprint
    for p in root.iterdir():
        p.write_bytes(p.read_bytes().replace(b"\n", b"\r\n"))
    assert A.load_annotations(root).fingerprint == before == A.load_annotations(TINY).fingerprint
    edit(A.DENSE["visual"], "2\t8", "2\t9")
    assert A.load_annotations(root).fingerprint != before


def test_byte_order_mark_is_accepted(folder):
    root, _ = folder
    p = root / A.SPLITS["val"]
    p.write_bytes(b"\xef\xbb\xbf" + p.read_bytes())
    assert A.load_annotations(root)["val"].ids == A.load_annotations(TINY)["val"].ids


def test_other_classes_and_lengths(tmp_path):
    splits = {"train": {"a_0_3": "b"}, "val": {"v_0_3": "a,b"}, "test": {"t_0_3": "a"}}
    A.write_annotations(tmp_path, splits, [("v_0_3", 0, 3, "a")], [("t_0_3", 1, 2, "a")])
    a = A.load_annotations(tmp_path, classes=("a", "b"), seconds=3, strict=True)
    assert a["val"].audio.tolist() == [[[1, 0]] * 3]
    assert a["test"].visual[0, :, 0].tolist() == [0, 1, 0]
    with pytest.raises(InputError, match="0 to 2"):
        A.load_annotations(tmp_path, classes=("a", "b"), seconds=2)


def test_empty_dense_tables(tmp_path):
    A.write_annotations(tmp_path, {"train": {"a_0_3": "Dog"}, "val": {"v_0_3": "Dog"}, "test": {"t_0_3": "Dog"}}, [], [])
    a = A.load_annotations(tmp_path, strict=True)
    assert a["val"].audio.sum() == 0
    assert set(a.report().id) == {"D8", "D11", "D12", "D13", "D14"}


def test_full_table_is_optional_and_compared(folder):
    root, edit = folder
    edit(A.FULL_TABLE, "Cat", "Dog")
    assert any("not train, val and test in order" in n for n in A.load_annotations(root).notes)
    (root / A.FULL_TABLE).unlink()
    assert any(A.FULL_TABLE in n for n in A.load_annotations(root).notes)


@pytest.mark.parametrize("defect", A.STRICT)
def test_strict_refuses_each_kind(folder, defect):
    root, edit = folder
    audio = A.DENSE["audio"]
    repairs = {"D1": [("\t9\t0\tClapping", "\t0\t9\tClapping"), ("\t3\t3\tCar", "\t3\t4\tCar")],
               "D3": [("Lost3Chr_0_10", "eTinyValid1_0_10"), ("fTinyValid2_8_300\t0\t10\tDog", "fTinyValid2_8_30\t0\t10\tCat")],
               "D7": [("\t0\t10\tCheering", "\t0\t10\tClapping")]}
    for other in A.STRICT:
        for old, new in repairs[other] if other != defect else ():
            edit(audio, old, new)
    with pytest.raises(InputError, match=f"AVVP_eval_audio.csv:\\d+: {defect} "):
        A.load_annotations(root, strict=True)
    for old, new in repairs[defect]:
        edit(audio, old, new)
    assert A.load_annotations(root, strict=True)["test"].audio.any()


# ---------------------------------------------------------------- refusals

BAD = [
    (A.SPLITS["test"], "Dog,Speech", "Dogs,Speech", "AVVP_test_pd.csv:2: unknown class 'Dogs'", "did you mean 'Dog'?"),
    (A.SPLITS["val"], "Cat", "cat", "AVVP_val_pd.csv:3: unknown class 'cat'", "verbatim"),
    (A.DENSE["audio"], "\t2\t6\tDog", "\t2\t6\tDogg", "AVVP_eval_audio.csv:3: unknown class 'Dogg'", "did you mean 'Dog'?"),
    (A.DENSE["audio"], "\t2\t6\tDog", "\t2.5\t6\tDog", "AVVP_eval_audio.csv:3: onset '2.5' is not a whole number", "0 to 10"),
    (A.DENSE["audio"], "\t2\t6\tDog", "\t2\tx\tDog", "AVVP_eval_audio.csv:3: offset 'x' is not a whole number", "0 to 10"),
    (A.DENSE["visual"], "\t0\t10\tDog", "\t-1\t10\tDog", "AVVP_eval_visual.csv:2: onset '-1' is outside the clip", "0 to 10"),
    (A.DENSE["visual"], "\t0\t10\tDog", "\t0\t11\tDog", "AVVP_eval_visual.csv:2: offset '11' is outside the clip", "0 to 10"),
    (A.DENSE["visual"], "\t0\t10\tDog", "\t\t10\tDog", "AVVP_eval_visual.csv:2: onset is empty", "complete the row"),
    (A.SPLITS["train"], "\tCar", "\tnan", "AVVP_train.csv:4: event_labels is empty ('nan')", "complete the row"),
    (A.SPLITS["train"], "\tCar", " Car", "AVVP_train.csv:4: 1 columns", "2: filename, event_labels"),
    (A.SPLITS["train"], "filename\tevent_labels", "file\tlabels", "AVVP_train.csv:1: columns are file, labels", "filename, event_labels"),
    (A.SPLITS["train"], "filename\tevent_labels", "filename,event_labels", "AVVP_train.csv:1: columns are separated by ','", "expected tabs"),
    (A.SPLITS["train"], "-TinyTrain2_30_40", "aTinyTrain1_0_10", "AVVP_train.csv:3: aTinyTrain1_0_10 is listed twice (first in line 2)", "every video once"),
    (A.SPLITS["val"], "eTinyValid1_0_10", "aTinyTrain1_0_10", "AVVP_val_pd.csv:2: aTinyTrain1_0_10 is also in AVVP_train.csv:2", "disjoint splits"),
]


@pytest.mark.parametrize("name,old,new,message,hint", BAD, ids=[b[3].split(": ", 1)[1][:40] for b in BAD])
def test_bad_cells_name_file_and_line(folder, name, old, new, message, hint):
    _, edit = folder
    root = edit(name, old, new)
    with pytest.raises(InputError) as e:
        A.load_annotations(root)
    assert message in str(e.value) and hint in str(e.value) and e.value.fix


@pytest.mark.parametrize("name", [*A.SPLITS.values(), *A.DENSE.values()])
def test_missing_file(folder, name):
    root, _ = folder
    (root / name).unlink()
    with pytest.raises(InputError, match="no such file") as e:
        A.load_annotations(root)
    assert str(e.value.where).endswith(name) and "AVVP-ECCV20" in e.value.fix


def test_missing_folder_and_parent_folder(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        A.load_annotations(tmp_path / "nowhere")
    shutil.copytree(TINY, tmp_path / "data")
    with pytest.raises(InputError, match="it lies in the folder `data` below"):
        A.load_annotations(tmp_path)


def test_not_text(folder):
    root, _ = folder
    (root / A.SPLITS["test"]).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="could not be read as text"):
        A.load_annotations(root)


def test_wrong_options(folder):
    root, _ = folder
    with pytest.raises(InputError, match="audio_table: '2023' is not possible"):
        A.load_annotations(root, audio_table="2023")
    with pytest.raises(InputError, match="did you mean 'train'"):
        A.load_annotations(root)["trian"]


# ---------------------------------------------------------------- properties

INTERVALS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 7), st.integers(0, 7), st.integers(0, 2)), max_size=20)


@settings(max_examples=60, deadline=None)
@given(INTERVALS)
def test_rasterise_is_the_official_slice_assignment(intervals):
    ids = ["a", "b", "c"]  # position 3 is a video of no split
    names = ["a", "b", "c", "other"]
    table = pd.DataFrame([(names[v], on, off, c) for v, on, off, c in intervals], columns=["filename", "onset", "offset", "label"])
    slow = np.zeros((3, 7, 3), np.uint8)
    for v, on, off, c in intervals:
        if v < 3:
            slow[v, on:off, c] = 1
    assert (A.rasterise(table.astype({"onset": int, "offset": int, "label": int}), ids, 7, 3) == slow).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=6, max_size=6), min_size=1, max_size=5))
def test_count_events_counts_runs(rows):
    grid = np.array(rows)[:, :, None]
    runs = sum(len([r for r in "".join(map(str, row)).split("0") if r]) for row in rows)
    assert A.count_events(grid) == runs
