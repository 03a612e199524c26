"""UnAV-100: the authors' files read strictly, a simulator that writes them, and one way to clips for both."""
import json
import os
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avvp_nb.core import InputError
from avvp_nb.data import packed
from avvp_nb.data import unav100 as U
from avvp_nb.data import unav_features as UF
from avvp_nb.data import unav_simulate as US
from avvp_nb.data.annotations import with_facts
from avvp_nb.data.features import layout_source
from avvp_nb.data.packed import open_store
from avvp_nb.data.sim_labels import SimParams
from avvp_nb.metrics import RULES, evaluate
from avvp_nb.train.learner import predict

ARRAYS = ("audio", "frames", "motion")
SIZES = {"train": 5, "val": 2, "test": 3}
ID = "aTinyVideo1"


def event(label="man speaking", label_id=0, segment=(1, 4), **more):
    return {"label": label, "label_id": label_id, "segment": list(segment), **more}


def video(*events, duration=20.0, subset="train", **more):
    return {"duration": duration, "subset": subset, "annotations": list(events) or [event()], **more}


def write(path, database, **head):
    path.write_text(json.dumps({"version": "1.0", "database": database, **head}), encoding="utf-8")
    return path


@pytest.fixture
def layout(tmp_path):
    "A small simulated data set in the authors' files"
    return US.write_unav(tmp_path/"unav", SIZES)


# ---- annotations ---------------------------------------------------------------------------------------------

def test_reads_what_is_written(tmp_path):
    path = write(tmp_path/"a.json", {ID: video(event(), event("ambulance siren", 97, (0, 20))), "-_TinyVide2": video(subset="validation", duration=10),
                                    "bTinyVideo3": video(subset="test", duration=59.01)})
    u = U.load_unav(path)
    assert [(k, s.ids, s.name) for k, s in u.items()] == [("train", [ID], "train"), ("val", ["-_TinyVide2"], "val"), ("test", ["bTinyVideo3"], "test")]
    assert np.argwhere(u["train"].weak).tolist() == [[0, 0], [0, 97]] and u.seconds == 60
    assert u["train"].weak.dtype == np.float32 and u["train"].grid.dtype == np.uint8
    assert not len(u.notes) and u.fingerprint == U.load_unav(path).fingerprint
    (tmp_path/U.FILE).write_bytes(b"\xef\xbb\xbf" + path.read_bytes())          # a folder, and a byte order mark
    assert U.load_unav(tmp_path).fingerprint == u.fingerprint
    other = U.load_unav(write(tmp_path/"b.json", {ID: video(event(segment=(1, 4.5)))}))
    assert other.fingerprint != u.fingerprint
    with pytest.raises(InputError, match="no split 'valid'.*expected train.*possible|did you mean"): u["valid"]


@given(st.floats(0, 50), st.floats(.01, 60), st.floats(.01, 60))
@settings(max_examples=60, deadline=None)
def test_seconds_of_an_event(start, length, rest):
    "floor(start) .. ceil(end)-1, whatever the fractions, and never beyond T"
    end, duration = start + length, start + length + rest
    s = U._collect("val", [(ID, duration, [(3, start, end)])], "by hand")
    on = np.flatnonzero(s.raster()[0, :, 3])
    assert on[0] == int(np.floor(start)) and on[-1] == int(np.ceil(end)) - 1 and len(on) == on[-1] - on[0] + 1
    assert s.lengths[0] == int(np.ceil(duration)) and on[-1] < s.lengths[0]


def test_events_of_a_class_join_and_classes_do_not(tmp_path):
    u = U.load_unav(write(tmp_path/"a.json", {ID: video(event(segment=(0, 2.5)), event(segment=(2.6, 4)), event("thunder", 50, (3, 4)), event(segment=(3.5, 6)))}))
    g = u["train"].grid[0]
    assert np.flatnonzero(g[:, 0]).tolist() == [0, 1, 2, 3, 4, 5] and np.flatnonzero(g[:, 50]).tolist() == [3]
    assert u.notes.note.tolist() == ["overlap: man speaking 2.6-4 and 3.5-6"]


def collected(path):
    "(what is refused, ids of what is read) where a defect doesn't stop the reading"
    refused = []
    annotations = U.load_unav(path, refused=refused)
    return [(i, split, str(e)) for i, split, e in refused], [i for s in annotations.values() for i in s.ids]


BAD = {
    "label": ([event("man speeking")], "event 0: unknown class 'man speeking'.*did you mean 'man speaking'"),
    "case": ([event("Man speaking")], "unknown class 'Man speaking'"),
    "id of the label": ([event(), event(label_id=1)], "event 1: label_id 1 for 'man speaking'. expected 0"),
    "id as text": ([event(label_id="0")], "label_id is '0'"),
    "id as truth": ([event(label_id=False)], "label_id is False"),
    "empty event": ([event(segment=(4, 4))], "ends at 4 s and starts at 4 s"),
    "backwards": ([event(segment=(5, 4))], "ends at 4 s and starts at 5 s"),
    "too early": ([event(segment=(-.5, 4))], "-0.5 to 4 s lies outside the video"),
    "too late": ([event(segment=(1, 20.01))], "1 to 20.01 s lies outside the video. expected 0 to 20 s"),
    "three times": ([event(segment=(1, 2, 3))], "segment is .1, 2, 3."),
    "no number": ([event(segment=(1, "4"))], "segment is '4'. expected a number"),
    "not a number": ([event(segment=(1, float("nan")))], "segment is nan"),
    "no segment": ([{"label": "thunder", "label_id": 50}], "has no 'segment'"),
    "no object": (["thunder"], "has no 'label'"),
}


@pytest.mark.parametrize("events,message", BAD.values(), ids=BAD)
def test_bad_events_are_refused(tmp_path, events, message):
    with pytest.raises(InputError, match=message) as e: U.load_unav(write(tmp_path/"bad.json", {ID: {**video(), "annotations": events}}))
    assert "bad.json" in str(e.value) and ID in str(e.value)
    assert collected(tmp_path/"bad.json") == ([(ID, "train", str(e.value))], [])


BAD_VIDEOS = {
    "too long": (video(duration=60.2), r"a video of 60.2 s is longer than the model's maximum. expected at most 60 s. cut the video, or read with max_seconds=61"),
    "no length": (video(duration=0), "duration is 0. expected seconds"),
    "endless": (video(duration=float("inf")), "duration is inf"),
    "subset": (video(subset="val"), "unknown subset 'val'. expected train, validation, test"),
    "no subset": ({"duration": 3.0, "annotations": []}, "has no 'subset'"),
    "no events": ({**video(), "annotations": []}, "has no events"),
    "events as object": ({**video(), "annotations": {}}, "annotations is {}"),
}


@pytest.mark.parametrize("entry,message", BAD_VIDEOS.values(), ids=BAD_VIDEOS)
def test_bad_videos_are_refused(tmp_path, entry, message):
    with pytest.raises(InputError, match=message) as e: U.load_unav(write(tmp_path/"bad.json", {ID: entry, "aGoodVideo1": video()}))
    assert f"bad.json: {ID}" in str(e.value)
    split = "train" if entry.get("subset") == "train" else "?"
    assert collected(tmp_path/"bad.json") == ([(ID, split, str(e.value))], ["aGoodVideo1"])


@pytest.mark.parametrize("text,message", [
    ("{", "is not readable JSON"), ("[]", "has no videos"), ('{"database": {}}', "has no videos"), ('{"database": []}', "has no videos"),
    (f'{{"database": {{"{ID}": {{}}, "{ID}": {{}}}}}}', f"'{ID}' occurs twice"), ('{"database": {"..": {}}}', "'..' is not a YouTube id"),
    ('{"database": {"a/../../etc": {}}}', "is not a YouTube id"), ('{"database": {"short": {}}}', "'short' is not a YouTube id")])
def test_bad_files_are_refused(tmp_path, text, message):
    (tmp_path/"bad.json").write_text(text)
    with pytest.raises(InputError, match=message): U.load_unav(tmp_path/"bad.json")


def test_no_file_or_no_text(tmp_path):
    with pytest.raises(InputError, match="no such file"): U.load_unav(tmp_path/"none.json")
    with pytest.raises(InputError, match=f"{U.FILE}: no such file"): U.load_unav(tmp_path)
    (tmp_path/"a.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not readable JSON"): U.load_unav(tmp_path/"a.json")


def test_a_longer_maximum_can_be_asked_for(tmp_path):
    u = U.load_unav(write(tmp_path/"a.json", {ID: video(duration=75.5)}), max_seconds=80)
    assert u["train"].lengths.tolist() == [76]


# ---- features ------------------------------------------------------------------------------------------------

@given(st.integers(1, 190), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_adaptive_pooling_is_torchs(rows, seconds):
    x = np.random.default_rng(rows).standard_normal((rows, 3)).astype(np.float32)
    want = torch.nn.functional.adaptive_avg_pool1d(torch.tensor(x.T), seconds).T
    np.testing.assert_allclose(UF.adaptive_pool(x, seconds), want, atol=1e-5)


def test_pack_cuts_to_the_shorter_and_pads(layout):
    u = U.load_unav(layout)
    i, n = u["val"].ids[0], int(u["val"].lengths[0])
    x = np.load(UF.unav_file(layout, i, "audio"))
    np.save(UF.unav_file(layout, i, "audio"), np.concatenate([x, x[:9] + 1]))                 # a longer sound
    store = UF.pack_unav(layout, layout/"s", u, dtype="float32")
    row = store.ids.index(i)
    np.testing.assert_allclose(store.audio[row, :n], UF.adaptive_pool(x, n), atol=1e-6)
    assert store.audio.shape == (10, u.seconds, 128) and store.motion.shape[2] == store.frames.shape[2] == 1024
    for k in store.arrays.values(): assert not k[row, n:].any() and isinstance(k, np.memmap)
    assert open_store(layout/"s").fingerprint == store.fingerprint == store.verify().fingerprint
    assert store.source["mark"] == "simulated UnAV-100 v1 seed=0 world=7 embedded labels"
    again = UF.pack_unav(layout, layout/"s", u, dtype="float32")                              # nothing to do
    assert again.fingerprint == store.fingerprint
    with pytest.raises(InputError, match="holds a different pack"): UF.pack_unav(layout, layout/"s", u, dtype="float16")
    assert UF.pack_unav(layout, layout/"s", u, dtype="float16", overwrite=True).audio.dtype == np.float16


def test_interrupted_packing_continues(layout, monkeypatch):
    u, reads = U.load_unav(layout), []
    monkeypatch.setattr(packed, "CHUNK", 4)
    read = UF._UnavPlan.read
    def stops(self, video):
        reads.append(video)
        if len(reads) == 7: raise KeyboardInterrupt
        return read(self, video)
    monkeypatch.setattr(UF._UnavPlan, "read", stops)
    with pytest.raises(KeyboardInterrupt): UF.pack_unav(layout, layout/"s", u, workers=1)
    assert not (layout/"s").exists()
    monkeypatch.setattr(UF._UnavPlan, "read", read)
    with pytest.raises(InputError, match="packing was not finished"): open_store(layout/"s")
    store = UF.pack_unav(layout, layout/"s", u)
    whole = UF.pack_unav(layout, layout/"t", u)
    for k in ARRAYS: np.testing.assert_array_equal(store.arrays[k], whole.arrays[k])


def spoil(path, how):
    x = np.load(path)
    if how == "missing": path.unlink()
    elif how == "truncated": path.write_bytes(path.read_bytes()[:-9])
    elif how == "unreadable": path.write_bytes(b"no array")
    elif how == "shape": np.save(path, x[:, 1:])
    elif how == "dtype": np.save(path, x.astype(int))
    elif how == "objects": np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    elif how == "non-finite": x[0, 0] = np.nan; np.save(path, x)


@pytest.mark.parametrize("how", ["missing", "truncated", "unreadable", "shape", "dtype", "objects", "non-finite"])
def test_bad_feature_files_are_found(layout, how):
    u = U.load_unav(layout)
    bad = UF.unav_file(layout, u["test"].ids[1], "motion")
    spoil(bad, how)
    ids = [i for s in u.values() for i in s.ids]
    report = UF.unav_doctor(layout, ids, full=True)
    assert report.serious.problem.tolist() == [how] and report.serious.file.tolist() == [str(bad)] and len(report.usable) == 9
    message = "contains NaN or infinity" if how == "non-finite" else how
    with pytest.raises(InputError, match=message) as e: UF.pack_unav(layout, layout/"s", u)
    assert bad.name in str(e.value)
    if how == "non-finite": return                                                            # found while reading
    store = UF.pack_unav(layout, layout/"s", u, on_missing="drop")
    with pytest.raises(InputError, match="no features for 1 of 3 test videos"): UF.load_unav_clips(u, store, "test")
    clips = UF.load_unav_clips(u, store, "test", on_missing="drop")
    assert clips.ids == [u["test"].ids[0], u["test"].ids[2]] and clips.rows.tolist() == [0, 2]
    np.testing.assert_array_equal(clips.dense_audio[1], u["test"].raster(u.seconds)[2])


def test_a_store_belongs_to_its_annotations(layout):
    "Rows are averaged into the seconds of a video, so other durations need another store"
    u = U.load_unav(layout)
    store = UF.pack_unav(layout, layout/"s", u)
    raw = json.loads((layout/U.FILE).read_text())
    i = u["test"].ids[1]
    raw["database"][i]["duration"] += -2 if u["test"].lengths[1] == u.seconds else 2
    raw["database"][i]["annotations"] = [event()]
    other = U.load_unav(write(layout/U.FILE, raw["database"]))
    a, b = u["test"].lengths[1], other["test"].lengths[1]
    with pytest.raises(InputError, match=f"{i} has {a} s in the features and {b} s in the annotations"): UF.load_unav_clips(other, store, "test")
    if other.seconds == u.seconds:
        with pytest.raises(InputError, match="holds a different pack"): UF.pack_unav(layout, layout/"s", other)
    assert UF.load_unav_clips(other, UF.pack_unav(layout, layout/"t", other), "test").lengths[1] == b


@pytest.mark.parametrize("text,owner", [
    ('"ID": {"duration": 9, "subset": "train", "annotations": [E]}, "ID": {"duration": 9, "subset": "train", "annotations": [E]}', ID),
    ('"ID": {"duration": 8, "duration": 9, "subset": "train", "annotations": [E]}', ID),
    ('"ID": {"duration": 9, "subset": "train", "annotations": [{"label_id": 0, "label_id": 0, "segment": [1, 4], "label": "man speaking"}]}', ID),
    ('"ID": {"duration": 9, "duration": 9, "subset": "train", "annotations": 5}', ID),
    ('"ID": {"duration": 9, "subset": "train", "annotations": [E]}, "note": {"by": 1, "by": 2}', "note"),
    ('"ID": {"duration": 9, "subset": "train", "annotations": [E], "more": {"by": 1, "by": 2}}', "")])
def test_what_occurs_twice_has_an_owner(tmp_path, text, owner):
    path = tmp_path/"a.json"
    path.write_text('{"database": {' + text.replace("ID", ID).replace("[E]", json.dumps([event()])) + "}}")
    with pytest.raises(InputError, match="occurs twice"): U.load_unav(path)
    twice = [(i, e) for i, _, e in collected(path)[0] if "occurs twice" in e]
    assert [i for i, _ in twice] == [owner]
    root = US.write_unav(tmp_path/"features", {"train": 1})
    report = UF.check_unav(root, path)
    assert not report.ok and set(report.ids) == {ID} | ({owner} - {""})


@pytest.mark.parametrize("rows,problem", [(.49, "length"), (.85, "length"), (1.2, "length"), (2, "length"), (.93, None), (1.07, None)])
def test_rows_have_to_fit_the_duration(layout, rows, problem):
    "All three files of a video alike, so that they are not uneven"
    u = U.load_unav(layout)
    i, d = u["train"].ids[0], float(u["train"].durations[0])
    for m in ARRAYS:
        x = np.load(UF.unav_file(layout, i, m))
        assert len(x) == UF.n_rows(d)
        np.save(UF.unav_file(layout, i, m), np.resize(x, (round(rows*len(x)), x.shape[1])))
    report = UF.check_unav(layout, layout)
    assert report.problems.problem.tolist() == [problem]*(problem is not None) and report.ok == (problem is None)
    assert UF.unav_doctor(layout, [i]).ok                                                      # nothing is known of a bare id
    if problem is None: assert len(UF.pack_unav(layout, layout/"s", u)) == 10
    else:
        with pytest.raises(InputError, match=f"length: .* rows .*expected about {UF.n_rows(d)}, for {d:g} s"): UF.pack_unav(layout, layout/"s", u)


def test_a_report_without_splits_counts_as_well(layout):
    report = UF.unav_doctor(layout, [ID])
    assert report.counts().loc["?"].to_dict() == dict(annotated=1, found=0, missing=1, broken=0, usable=0)
    assert (report.counts().loc[["train", "val", "test"]] == 0).all(axis=None) and "0 of 1 videos usable" in repr(report)


def test_extra_files_are_told_and_ignored(layout):
    (layout/"av_features"/"notes.txt").write_text("x")
    u = U.load_unav(layout)
    report = UF.unav_doctor(layout, [i for s in u.values() for i in s.ids])
    assert report.ok and report.problems.problem.tolist() == ["extra"]
    with pytest.raises(InputError, match="no feature folder"): UF.unav_doctor(layout.parent, [ID])


def test_clips_of_a_store(layout):
    u = U.load_unav(layout)
    store = UF.pack_unav(layout, layout/"s", u)
    for split, n in SIZES.items():
        c = UF.load_unav_clips(u, store, split)
        assert (len(c), c.classes, c.lengths.tolist()) == (n, U.UNAV_CLASSES, u[split].lengths.tolist())
        assert (c.dense_audio is None) == (split == "train") and not c.oracle
        np.testing.assert_array_equal(c.weak, u[split].weak)
        assert c.source["dataset"] == "unav100" and c.source["simulated"] and c.mark.startswith("simulated UnAV-100")
    assert UF.load_unav_clips(u, store, "train", oracle=True).oracle
    assert len(UF.load_unav_clips(u, store, "train", n=2)) == 2 and len(UF.load_unav_clips(u, store, "train", n=99)) == 5
    c = UF.load_unav_clips(u, store, "test")
    assert c.source["fingerprint"] != UF.load_unav_clips(u, store, "test", n=2).source["fingerprint"]
    b = c.batch([0, 1])
    assert b.audio.shape[1] == c.lengths[:2].max()
    with pytest.raises(InputError, match="split: 'validation' is not possible"): UF.load_unav_clips(u, store, "validation")


# ---- simulator -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def whole():
    return {k: US.simulate_unav_labels(split=k) for k in U.SIZES}


def test_annotations_match_the_counted_facts(whole):
    d = US.describe_unav(whole.values())
    assert d["videos"] == 10_790 and d["events per video"] == pytest.approx(2.79, abs=.08) and d["classes per video"] == pytest.approx(1.60, abs=.03)
    assert d["mean duration (s)"] == pytest.approx(42.1, abs=.5) and 10 <= d["shortest video (s)"] < 10.2 and d["longest video (s)"] == 60
    assert d["median event (s)"] == pytest.approx(6.4, abs=.4) and d["shortest event (s)"] == pytest.approx(.21, abs=.011) and 59 < d["longest event (s)"] <= 60
    for k, n in {"man speaking": 2515, "woman speaking": 1519, "kid speaking": 725}.items(): assert d[k] == pytest.approx(n, rel=.12)
    assert d["ambulance siren"] == pytest.approx(116, abs=40)


def test_the_anchor_is_close_to_the_real_one(whole):
    floor = US.weak_label_floor(whole["test"])
    assert floor["segment"] == pytest.approx(75.8, abs=1.5) and floor["event"] == pytest.approx(54.9, abs=2)


def test_simulated_annotations_are_well_formed(whole):
    for s in whole.values():
        e = s.events
        assert (e.start >= 0).all() and (e.end <= s.durations[e.video]).all() and (e.end > e.start).all() and s.lengths.max() <= 60
        assert (s.weak.sum(1) >= 1).all() and (np.diff(e.video) >= 0).all()
        key = e.video*100 + e.label
        same = key[1:] == key[:-1]
        assert (e.start[1:] - e.end[:-1])[same].min() > 1.9                                   # events of a class stay apart
    assert sum(len(s.events.label) for s in whole.values()) == sum(int((np.diff(s.grid.astype(np.int8), axis=1, prepend=0) == 1).sum()) for s in whole.values())   # none joined


def test_event_counts():
    n = US.event_counts()
    assert n.shape == (100,) and n.sum() == pytest.approx(30_059, abs=1) and n.min() == pytest.approx(116) and n.argmin() == 97
    assert n[:3].tolist() == [2515, 1519, 725]


def test_a_video_does_not_depend_on_its_company():
    a, b, c = US.simulate_unav(12), US.simulate_unav(3, start=6), US.simulate_unav(12, workers=1)
    for i in range(3):
        n = b.lengths[i]
        assert a.ids[6 + i] == b.ids[i] and a.lengths[6 + i] == n
        for k in ARRAYS: np.testing.assert_array_equal(getattr(a, k)[6 + i, :n], getattr(b, k)[i, :n])
    for k in ARRAYS: np.testing.assert_array_equal(getattr(a, k), getattr(c, k))
    assert not np.array_equal(US.simulate_unav(3, seed=1).audio[0, :10], a.audio[0, :10])
    assert not np.array_equal(US.simulate_unav(3, split="val").audio[0, :10], a.audio[0, :10])


def test_generator_is_pinned():
    "The output cannot change while its version stays"
    s = US.simulate_unav_labels(2)
    assert s.ids == ["unatr000000", "unatr000001"]
    c = US.simulate_unav(2, dtype="float32")
    got = [float(x) for x in (s.durations[0], s.events.start[0], s.events.end[0], c.audio[0].sum(), c.frames[1].sum(), c.motion[1].sum())]
    assert got == pytest.approx([53.06, 7.05, 10.8, 2250.4819, 2836.4434, 4855.9023], rel=1e-4)


def test_features_are_plausible():
    c = US.simulate_unav(20, dtype="float32")
    exists = c.mask.astype(bool)
    for k in ARRAYS:
        x = getattr(c, k)
        assert np.isfinite(x).all() and (x >= 0).all() and not x[~exists].any() and x[exists].mean() > .1
    assert (c.audio.shape[2], c.frames.shape[2], c.motion.shape[2]) == (128, 1024, 1024)


def test_an_event_changes_its_own_seconds_only():
    "With the same draws, features differ where the event is, up to the width of a window"
    quiet = SimParams(context_leak=0)
    def rows(end):
        s = U._collect("val", [(ID, 40.0, [(12, 10.0, end)])], "by hand")
        return US.simulated_rows(s, 0, quiet)["audio"]
    changed = np.flatnonzero(np.abs(rows(20.0) - rows(30.0)).max(1) > 1e-6)*UF.HOP/UF.RATE
    assert 20 - .96 < changed.min() < 20 + .32 and 30 - .32 <= changed.max() + .32 <= 30 + .32


@pytest.mark.parametrize("name,value", [("missing_labels", .5), ("labels", "markov"), ("label_sets", "train"), ("boundary_blur", 0.)])
def test_parameters_without_meaning_are_refused(name, value):
    with pytest.raises(InputError, match=f"{name}: has no meaning for UnAV-100"): US.simulate_unav(2, params=SimParams(**{name: value}))


def test_changed_parameters_are_in_the_mark():
    c = US.simulate_unav(2, seed=4, params=SimParams(audio_snr=9, world_seed=1))
    assert c.mark == "simulated UnAV-100 v1 seed=4 world=1 embedded labels [audio_snr=9]"
    assert c.source["simulated"] and c.source["fingerprint"] != US.simulate_unav(2, seed=4).source["fingerprint"]


@pytest.mark.parametrize("kw,message", [({"n": 0}, "n=0 videos"), ({"n": 2, "start": -1}, "start=-1"), ({"n": 2, "split": "valid"}, "split: 'valid' is not possible"),
                                        ({"n": 2, "dtype": "int8"}, "dtype: 'int8' is not possible")])
def test_impossible_requests(kw, message):
    with pytest.raises(InputError, match=message): US.simulate_unav(**kw)


# ---- one way for both ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-5), ("float16", 2e-3)])
def test_written_files_give_the_same_clips(layout, dtype, tolerance):
    u = U.load_unav(layout)
    store = UF.pack_unav(layout, layout/"s", u, dtype=dtype)
    for split, n in SIZES.items():
        real, sim = UF.load_unav_clips(u, store, split), US.simulate_unav(n, split=split, dtype=dtype)
        T = sim.audio.shape[1]
        assert real.ids == sim.ids and real.mark == sim.mark
        np.testing.assert_array_equal(real.weak, sim.weak); np.testing.assert_array_equal(real.lengths, sim.lengths)
        for k in ARRAYS: np.testing.assert_allclose(np.asarray(getattr(real, k)[:, :T], np.float32), np.asarray(getattr(sim, k), np.float32), atol=tolerance)
        if split != "train": np.testing.assert_array_equal(real.dense_visual[:, :T], sim.dense_visual)


def test_real_annotations_with_simulated_features(layout):
    u = U.load_unav(layout)
    c = US.simulate_unav(split="test", annotations=u)
    assert c.mark.endswith("real annotations") and c.ids == u["test"].ids
    root = US.write_unav(layout.parent/"features", None, annotations=u)
    assert not (root/U.FILE).exists() and layout_source(root)["simulated"]
    got = UF.load_unav_clips(u, UF.pack_unav(root, root/"s", u), "test")
    np.testing.assert_allclose(got.audio[:, :c.audio.shape[1]].astype(np.float32), c.audio.astype(np.float32), atol=2e-3)


def test_writing_never_mixes_sources(layout):
    with pytest.raises(InputError, match="holds features of another source"): US.write_unav(layout, {"train": 1}, seed=2)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_read_only_folder(tmp_path):
    (tmp_path/"x").mkdir(mode=0o500)
    with pytest.raises(InputError, match="could not be written"): US.write_unav(tmp_path/"x"/"y", {"train": 1})


def test_identity_and_clips_for_runs(layout, tmp_path):
    data = SimpleNamespace(annotations=None, features=None, sim=SimParams())
    identity, annotations, store = US.unav_identity(data, tmp_path)
    assert annotations is store is None and identity["dataset"] == "unav100" and "simulated UnAV-100" in identity["simulator"]
    assert len(US.unav_clips(data, "val", 3)) == 3
    assert US.unav_identity(SimpleNamespace(annotations=None, features=None, sim=SimParams(seed=1)), tmp_path)[0] != identity
    data = SimpleNamespace(annotations=str(layout/U.FILE), features=str(layout/"av_features"), sim=SimParams(), on_missing="error")
    identity, annotations, store = US.unav_identity(data, tmp_path)
    assert US.unav_identity(data, tmp_path)[0] == identity and len(list(tmp_path.glob("unav100-*"))) == 1
    assert len(US.unav_clips(data, "train", 4, annotations, store)) == 4 and len(US.unav_clips(data, "test", 400, annotations, store)) == 3
    data.features = str(store.path)                                                       # the store itself: the same data
    assert US.unav_identity(data, tmp_path)[0] == identity
    x = np.load(UF.unav_file(layout, annotations["test"].ids[0], "audio"))
    np.save(UF.unav_file(layout, annotations["test"].ids[0], "audio"), x + 1)              # a changed file is other data
    data.features = str(layout)
    assert US.unav_identity(data, tmp_path)[0] != identity


def test_perfect_and_empty_predictions_on_simulated_clips():
    c = US.simulate_unav(30, split="test")
    truth = c.dense_audio, c.dense_visual
    assert (evaluate(*truth, *truth, mask=c.mask)["AV"] == 100).all()
    assert (evaluate(0*truth[0], 0*truth[1], *truth, mask=c.mask)["AV"] == 0).all()


def test_a_network_is_scored(layout):
    from avvp_nb.methods.han import HAN
    u = U.load_unav(layout)
    c = UF.load_unav_clips(u, UF.pack_unav(layout, layout/"s", u), "test")
    p = predict(HAN(classes=100, audio_dim=128, frame_dim=1024, motion_dim=1024, dim=16), c)
    table = evaluate(*RULES["han"].decide(p), c.dense_audio, c.dense_visual, mask=c.mask)
    assert isinstance(table, pd.DataFrame) and table["AV"].between(0, 100).all()
    assert not p.segments[~c.mask.astype(bool)].any()


def test_card_holds_the_generated_facts(request):
    card = (request.config.rootpath/"data_cards"/"unav100.md").read_text(encoding="utf-8")
    assert with_facts(card, US.unav_facts()) == card
