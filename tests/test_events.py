"""Events out of a run, and anybody's predictions in: round trips, both commands, and what is refused."""
import argparse
import hashlib
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from avvp_nb.core import CLASSES, InputError, Parsing, file_hash, write_json
from avvp_nb.data.annotations import load_annotations
from avvp_nb.data.simulate import simulate
from avvp_nb.data.sources import DataSpec, identify
from avvp_nb.data.tables import DENSE, SPLITS
from avvp_nb.metrics import RULES, class_scores, evaluate
from avvp_nb.records.store import Store, bare_record
from avvp_nb.results import events as E
from avvp_nb.results import scoring as S

TINY = Path(__file__).parent / "data" / "llp_tiny"
KEY = "han-0123456789abcdef"


def names(n): return [f"{i:011d}_0_10" for i in range(n)]


def draw(n=40, T=10, C=25, seed=0):
    "Probabilities of n videos, both passes, as stored: float16"
    rng = np.random.default_rng(seed)
    def one():
        x = rng.random((n, T, 2, C))**3
        p = Parsing(x.max((1, 2)), x[:, :, 0].max(1), x[:, :, 1].max(1), x)
        return p.map(lambda a: a.astype(np.float16).astype(np.float32))
    return one(), one()


def grids(n=40, T=10, C=25, seed=0, density=.1):
    rng = np.random.default_rng([seed, 1])
    return tuple((rng.random((n, T, C)) < density).astype(np.uint8) for _ in range(2))


def truth_of(audio, visual, ids, known=()):
    return S.Truth(list(ids), audio, visual, CLASSES, frozenset(known), "test")


def make_run(root, parsing, without, rule="han", data=None, **arrays):
    "A store with one record of these probabilities"
    store = Store(root)
    path = store.probability_path(KEY)
    path.parent.mkdir(parents=True)
    packed = {s + k: v.astype(np.float16) for s, p in (("", parsing), ("without_", without))
              for k, v in p.arrays().items()}
    np.savez(path, **packed, **arrays)
    none = {level: {} for level in ("segment", "event")}
    changes = {"probabilities": {"sha256": file_hash(path)}, "rule": rule, "metrics": {rule: none}}
    if data: changes["data"] = data
    write_json(bare_record(KEY, changes=changes), store.record_path(KEY))
    return store


def shell(act, *args):
    p = argparse.ArgumentParser()
    {E.cmd_events: E.add_events_arguments, S.cmd_score: S.add_score_arguments}[act](p)
    return act(p.parse_args([str(a) for a in args]))


@pytest.fixture
def run(tmp_path):
    ids = names(40)
    return make_run(tmp_path / "runs", *draw(), ids=np.array(ids), classes=np.array(CLASSES)), ids


# ---------------------------------------------------------------- the round trip

@pytest.mark.parametrize("format", E.FORMATS)
@pytest.mark.parametrize("seed, density", [(0, .02), (1, .3), (2, .9), (3, 0), (4, 1)])
def test_grids_come_back_and_score_as_the_arrays(tmp_path, format, seed, density):
    ids, pred, true = names(12), grids(12, seed=seed, density=density), grids(12, seed=9)
    out = E.write_events(E.events_of(*pred, ids), tmp_path / ("x" + ".json" * (format == "json")), format)
    back = S.read_predictions(out)
    for a, b in zip(back.grids(), pred): np.testing.assert_array_equal(a, b)
    got = S.score_predictions(back, truth_of(*true, ids))
    assert got.metrics.equals(evaluate(*pred, *true))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("format", E.FORMATS)
def test_a_run_scores_alike_as_events_and_as_probabilities(tmp_path, run, rule, format):
    (store, ids), true = run, grids(seed=5)
    out = tmp_path / ("out" + ".json" * (format == "json"))
    shell(E.cmd_events, KEY, "--store", store.root, "--rule", rule, "--format", format, "--out", out)
    record = store.record(KEY)
    want = evaluate(*RULES[rule].decide(*[store.probabilities(record, without=w) for w in (False, True)]), *true)
    truth = truth_of(*true, ids)
    assert S.score_predictions(S.read_predictions(out), truth).metrics.equals(want)
    p = S.read_predictions(store.probability_path(KEY))
    assert S.score_predictions(p, truth, rule).metrics.equals(want)


def test_other_orders_of_videos_score_alike(tmp_path):
    ids, pred, true = names(12), grids(12), grids(12, seed=9)
    order = np.random.default_rng(0).permutation(12)
    other = E.events_of(*(x[order] for x in pred), [ids[i] for i in order])
    want, truth = evaluate(*pred, *true), truth_of(*true, ids)
    assert S.score_predictions(other, truth).metrics.equals(want)
    rng = np.random.default_rng(0)
    segments = rng.random((12, 10, 2, 25)).astype(np.float32)
    np.savez(tmp_path / "a.npz", segments=segments)
    np.savez(tmp_path / "b.npz", segments=segments[order], ids=np.array([ids[i] for i in order]))
    a, b = (S.score_predictions(S.read_predictions(tmp_path / f"{k}.npz"), truth, "ma").metrics for k in "ab")
    assert a.equals(b)


def test_events_of_a_whole_llp_folder_are_read_by_the_loader(tmp_path):
    "Written beside LLP's weak labels, the tables are annotations for `load_annotations`"
    real = load_annotations(TINY)
    test = real["test"]
    pred = grids(len(test), seed=3)
    for f in SPLITS.values(): shutil.copy(TINY / f, tmp_path)
    E.write_events(E.events_of(*pred, test.ids), tmp_path)
    back = load_annotations(tmp_path)["test"]
    np.testing.assert_array_equal(back.audio, pred[0])
    np.testing.assert_array_equal(back.visual, pred[1])


def test_sixty_seconds_and_other_classes(tmp_path):
    classes, ids = tuple(f"thing {i}" for i in range(100)), ["abcdefghij" + c for c in "klm"]
    pred = grids(3, 60, 100)
    for out, format in ((tmp_path / "x", "csv"), (tmp_path / "x.json", "json")):
        back = E.read_events(E.write_events(E.events_of(*pred, ids, classes), out, format))
        assert (back.classes, back.seconds, back.ids) == (classes, 60, ids)
        for a, b in zip(back.grids(), pred): np.testing.assert_array_equal(a, b)
        shell(S.cmd_score, out, out)                        # annotated by itself: classes come with the file


# ---------------------------------------------------------------- real annotations

def test_real_annotations_against_themselves_give_100(llp, capsys, tmp_path):
    for split in ("test", "val"):
        truth = S.read_truth(llp, split)
        got = S.score_predictions(S.read_predictions(llp), truth)
        assert (got.metrics == 100).all(axis=None)
        f = got.classes.filter(regex="^(segment|event)")
        assert ((f == 100) | f.isna()).all(axis=None)
        assert (got.classes["predicted A"] == got.classes["annotated A"]).all()
    shell(S.cmd_score, llp, llp, "--by-class", "--json", tmp_path / "s.json")
    said = capsys.readouterr().out
    assert "1,200 videos of test" in said and "Telephone_bell_ringing" in said
    assert set(json.loads((tmp_path / "s.json").read_text())["metrics"]["event"].values()) == {100.0}


def test_the_two_audio_tables_against_each_other(llp):
    "What data_cards/llp.md says about them"
    new, old = (load_annotations(llp, t)["test"] for t in ("2024", "2020"))
    got = 100 - evaluate(new.audio, new.visual, old.audio, old.visual)
    assert got.loc["event", "A"] == pytest.approx(.05, abs=1e-9) and got.loc["segment", "A"] < .05
    assert got.max(axis=None) == got.loc["event", "A"]
    other = 100 - evaluate(old.audio, old.visual, new.audio, new.visual)
    assert np.allclose(got, other)
    card = (Path(__file__).parents[1] / "data_cards" / "llp.md").read_text()
    assert "at most 0.04" not in card and "0.050" in card


# ---------------------------------------------------------------- by class

def test_class_table_is_the_mean_over_active_videos():
    pred, true = grids(30), grids(30, seed=2)
    for x in (*pred, *true): x[..., 7] = 0
    t = S.class_table(*pred, *true)
    for level in ("segment", "event"):
        for k, pair in {"A": (pred[0], true[0]), "AV": (pred[0] & pred[1], true[0] & true[1])}.items():
            f, active = class_scores(*pair, level)
            assert t.loc["Dog", f"{level} {k}"] == pytest.approx(100 * f[active[:, 3], 3].mean())
    assert t.loc[CLASSES[7]].filter(like="segment").isna().all() and t.loc[CLASSES[7], "annotated V"] == 0
    one = np.zeros((1, 10, 25), np.uint8)
    one[0, [0, 1, 5], 0] = 1
    assert S.class_table(one, one, one, one).loc["Speech", "annotated A"] == 2


# ---------------------------------------------------------------- records

def test_record_by_key_and_by_path(run, tmp_path, capsys):
    store, ids = run
    shell(E.cmd_events, KEY, "--store", store.root)
    shell(E.cmd_events, store.record_path(KEY), "--out", tmp_path / "b")
    a = store.root / "events" / f"{KEY}-han"
    for f in DENSE.values(): assert (a / f).read_bytes() == (tmp_path / "b" / f).read_bytes()
    assert "simulated" in capsys.readouterr().out
    about = json.loads((a / E.ABOUT).read_text())
    assert (about["run"], about["rule"], about["ids"]) == (KEY, "han", ids) and "simulated" in about["mark"]


def test_the_mark_goes_along(run, capsys, tmp_path):
    store, ids = run
    E.write_events(E.events_of(*grids(), ids), tmp_path / "truth")
    for format in E.FORMATS:
        out = tmp_path / f"e.{format}"
        shell(E.cmd_events, KEY, "--store", store.root, "--format", format, "--out", out)
        shell(S.cmd_score, out, tmp_path / "truth", "--json", tmp_path / "s.json")
        assert json.loads((tmp_path / "s.json").read_text())["mark"] == "simulated: nothing"
    capsys.readouterr()
    shell(S.cmd_score, store.probability_path(KEY), tmp_path / "truth")
    assert "simulated: nothing" in capsys.readouterr().out


@pytest.mark.parametrize("name, message", [
    ("han-0123456789abcdee", f"did you mean '{KEY}'"), ("zzz", "there are 1 records there"),
    ("../records/" + KEY, "no record"), ("../../x.json", "does not lie in the folder `records`")])
def test_no_such_record(run, name, message):
    with pytest.raises(InputError, match=message): E.find_record(name, run[0])


def test_an_empty_store_says_so(tmp_path):
    with pytest.raises(InputError, match="name the store with --store"): E.find_record(KEY, tmp_path)
    assert not list(tmp_path.iterdir())


def test_names_of_simulated_data_are_made_again(tmp_path):
    "Runs that stored no names"
    identity = identify(DataSpec(), tmp_path / "cache")[0]
    data = {"simulated": True, "mark": "simulated", "identity": identity, "source": {}, "n": {"test": 4}}
    store = make_run(tmp_path / "runs", *draw(4), data=data)
    events = E.record_events(store.record(KEY), store)
    assert events.ids == simulate(4, split="test").ids and events.classes == tuple(CLASSES)


def test_names_of_real_data_have_to_be_given(tmp_path):
    spec = DataSpec(annotations=str(TINY))
    identity = identify(spec, tmp_path / "cache")[0]
    test = load_annotations(TINY)["test"]
    data = {"simulated": True, "mark": "simulated", "identity": identity, "source": {}, "n": {"test": len(test)}}
    store = make_run(tmp_path / "runs", *draw(len(test)), data=data)
    with pytest.raises(InputError, match="does not hold the names.*--annotations"):
        shell(E.cmd_events, KEY, "--store", store.root)
    with pytest.raises(InputError, match="does not hold the names"):       # other data
        E.record_events(store.record(KEY), store, data=[DataSpec()])
    assert not (store.root / "events").exists()
    shell(E.cmd_events, KEY, "--store", store.root, "--annotations", TINY)
    assert E.read_events(store.root / "events" / f"{KEY}-han").ids == test.ids


# ---------------------------------------------------------------- what is refused: writing

@pytest.mark.parametrize("taken", list(DENSE.values()))
def test_nobodys_annotations_are_replaced(run, tmp_path, taken):
    store, _ = run
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / taken).write_text("mine")
    with pytest.raises(InputError, match="was not written by this command"):
        shell(E.cmd_events, KEY, "--store", store.root, "--out", tmp_path / "data")
    assert [p.name for p in (tmp_path / "data").iterdir()] == [taken]
    assert (tmp_path / "data" / taken).read_text() == "mine"


def test_nobodys_json_is_replaced(run, tmp_path):
    (tmp_path / "x.json").write_text("{}")
    for out, message in (("x.json", "was not written by"), ("x.txt", "does not end with .json")):
        with pytest.raises(InputError, match=message):
            shell(E.cmd_events, KEY, "--store", run[0].root, "--format", "json", "--out", tmp_path / out)
    with pytest.raises(InputError, match="is a file"):
        shell(E.cmd_events, KEY, "--store", run[0].root, "--out", tmp_path / "x.json")
    (tmp_path / "s.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="holds no scores"):
        shell(S.cmd_score, TINY, TINY, "--json", tmp_path / "s.json")


@pytest.mark.parametrize("when", [1, 2, 3])
def test_interrupted_writing_is_noticed_and_repaired(tmp_path, monkeypatch, when):
    ids, old, new = names(12), grids(12), grids(12, seed=1)
    E.write_events(E.events_of(*old, ids), tmp_path / "x")
    replace, calls = os.replace, []
    def stop(a, b):
        calls.append(b)
        if len(calls) == when: raise KeyboardInterrupt
        replace(a, b)
    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt): E.write_events(E.events_of(*new, ids), tmp_path / "x")
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.part"))
    if when == 1:
        for a, b in zip(E.read_events(tmp_path / "x").grids(), old): np.testing.assert_array_equal(a, b)
    else:
        with pytest.raises(InputError, match="write the events again"): E.read_events(tmp_path / "x")
    (tmp_path / "x" / f".{DENSE['audio']}.999999999.aa.part").write_text("killed")
    E.write_events(E.events_of(*new, ids), tmp_path / "x")
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == sorted([E.ABOUT, *DENSE.values()])
    for a, b in zip(E.read_events(tmp_path / "x").grids(), new): np.testing.assert_array_equal(a, b)


# ---------------------------------------------------------------- what is refused: reading

HEAD = "filename\tonset\toffset\tevent_labels\n"


@pytest.fixture
def folder(tmp_path):
    "A folder of bare tables; `write(audio rows)`"
    ids = names(3)
    def write(rows, head=HEAD):
        (tmp_path / DENSE["audio"]).write_text(head + "".join(f"{r}\n" for r in rows))
        (tmp_path / DENSE["visual"]).write_text(HEAD)
        return tmp_path
    return write, ids, truth_of(*grids(3), ids, {"trainvideo1_0_10"})


@pytest.mark.parametrize("row, message", [
    ("{0}\t0\t3\tspeech", r"audio.csv:3: unknown class 'speech'.*did you mean 'Speech'"),
    ("{0}\t0\t11\tSpeech", r"audio.csv:3: offset '11' is outside the clip"),
    ("{0}\t-1\t1\tSpeech", r"audio.csv:3: onset '-1' is outside"),
    ("{0}\t0\t1.5\tSpeech", r"audio.csv:3: offset '1.5' is not a whole number"),
    ("{0}\t0\t99999999999999999999\tSpeech", r"audio.csv:3: offset '9+' is outside"),
    ("{0}\t0\t1", r"audio.csv:3: 3 columns"),
    ("{0}\t0\t1\t", r"audio.csv:3: event_labels is empty"),
    ("unknown0000_0_10\t0\t1\tSpeech", r"audio.csv:3: 'unknown0000_0_10' is not in the annotations.*in full"),
    ("00000000001\t0\t1\tSpeech", r"audio.csv:3: .*did you mean '00000000001_0_10'"),
    ("\x1b[31mx\t0\t1\tSpeech", r"audio.csv:3: "),
])
def test_a_bad_row_is_named(folder, row, message):
    write, ids, truth = folder
    path = write([f"{ids[0]}\t0\t3\tSpeech", row.format(*ids)])
    with pytest.raises(InputError, match=message) as e: S.score_predictions(S.read_predictions(path), truth)
    assert "\x1b" not in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("head", [HEAD.replace("\t", ","), "video\tonset\toffset\tevent_labels\n",
                                  "filename\tonset\toffset\n"])
def test_another_header_is_told_how_to_write_it(folder, head):
    with pytest.raises(InputError, match=r"audio.csv:1: .*separated by tabs.*to_csv"):
        E.read_events(folder[0]([], head))


def test_bare_tables_say_what_they_leave_open(folder):
    write, ids, truth = folder
    got = S.score_predictions(E.read_events(write([f"{ids[1]}\t0\t3\tSpeech", f"{ids[1]}\t3\t3\tDog",
                                                   "trainvideo1_0_10\t0\t3\tSpeech"])), truth)
    assert got.notes == ["1 predicted videos are not among those of test and left out",
                         "2 of 3 videos have no row and count as predicted empty"]
    pred = np.zeros((3, 10, 25), np.uint8)
    pred[1, :3, 0] = 1
    assert got.metrics.equals(evaluate(pred, 0 * pred, truth.audio, truth.visual))


@pytest.mark.parametrize("missing", list(DENSE.values()))
def test_a_missing_table_is_named(folder, missing):
    path = folder[0]([])
    (path / missing).unlink()
    with pytest.raises(InputError, match=f"{missing}: could not be read"): E.read_events(path)


@pytest.mark.parametrize("path, message", [("nowhere", "no such file or folder"), ("", "is empty"),
                                           (".", "eval_audio.csv: could not be read"),
                                           ("a.csv,b.csv", "a.csv: could not be read"),
                                           ("nowhere.npz", "no such file"), ("nowhere.npy", "could not be read"),
                                           ("nowhere.json", "no such file")])
def test_nothing_there(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message): S.read_predictions(path)


GOOD = {"kind": E.KIND, "format": 1, "seconds": 10, "classes": list(CLASSES), "ids": names(3), "visual": [],
        "audio": [{"filename": names(3)[0], "onset": 0, "offset": 2, "event_labels": "Dog"}]}


def event(**changes): return {"audio": [GOOD["audio"][0], {**GOOD["audio"][0], **changes}]}


@pytest.mark.parametrize("changes, message", [
    ({"kind": "other"}, "holds no events"), ({"seconds": "10"}, "seconds is '10'"), ({"seconds": True}, "seconds is"),
    ({"seconds": 10**9}, "seconds is"), ({"classes": []}, "classes is"), ({"classes": [1]}, "classes is"),
    ({"ids": None}, "ids is None"), ({"ids": [*names(3), names(1)[0]]}, "ids:4: 00000000000_0_10 is listed twice"),
    ({"ids": [3]}, "ids:1: 3 is no filename"), ({"audio": {}}, "audio is {}"), ({"visual": None}, "visual is None"),
    ({"audio": [3]}, "audio event 1: 3 is no event"), (event(onset="0"), "audio event 2: .* is no event"),
    (event(onset=True), "audio event 2: .* is no event"), (event(more=1), "audio event 2: .* is no event"),
    (event(offset=12), "audio event 2: offset '12' is outside the clip"),
    (event(event_labels="Doge"), "audio event 2: unknown class 'Doge'.*did you mean 'Dog'"),
    (event(filename="x\ty"), "audio event 2: .* is no event"), (event(filename=""), "audio event 2: filename"),
    (event(filename=names(4)[3]), "'00000000003_0_10' is not in the list of videos"),
    (event(offset=10**30), "audio event 2: offset"),
])
def test_bad_json_is_named(tmp_path, changes, message):
    (tmp_path / "x.json").write_text(json.dumps({**GOOD, **changes}))
    with pytest.raises(InputError, match=message) as e: E.read_events(tmp_path / "x.json")
    assert "x.json" in str(e.value) and len(str(e.value)) < 1500


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", "3", '{"seconds": ' + "1" * 5000 + "}", ""])
def test_broken_json(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match="x.json"): E.read_events(tmp_path / "x.json")


def header_of(shape):
    f = io.BytesIO()
    np.lib.format.write_array_header_1_0(f, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return f.getvalue()


@pytest.mark.parametrize("data", [b"", b"not an array", header_of((2**40, 10, 2, 25)), header_of((2**64, 10, 2, 25)),
                                  header_of((3, 10, 2, 25)) + b"short"])
def test_broken_arrays(tmp_path, data):
    (tmp_path / "x.npy").write_bytes(data)
    (tmp_path / "x.npz").write_bytes(data)
    for name in ("x.npy", "x.npz"):
        with pytest.raises(InputError, match=f"{name}: could not be read"): S.read_predictions(tmp_path / name)


class Bomb:
    def __reduce__(self): return (Path.touch, (Path("executed"),))


def test_objects_are_never_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    objects = np.array([Bomb()], object)
    np.save("x.npy", objects)
    np.savez("x.npz", segments=objects)
    np.savez("y.npz", segments=np.zeros((1, 10, 2, 25)), ids=objects)
    for name in ("x.npy", "x.npz", "y.npz"):
        with pytest.raises(InputError, match=name): S.read_predictions(name)
    assert not Path("executed").exists()


SEG = np.full((3, 10, 2, 25), .5, np.float32)


@pytest.mark.parametrize("arrays, message", [
    ({"other": SEG}, "has no array 'segments'"), ({"segments": SEG[0]}, "has shape"),
    ({"segments": SEG[:0]}, "has shape"), ({"segments": SEG[:, :, :1]}, "has shape"),
    ({"segments": SEG.astype(str)}, "segments holds <U"), ({"segments": SEG * 1j}, "segments holds complex"),
    ({"segments": SEG * 3}, "logits need a sigmoid"), ({"segments": SEG * np.nan}, "segments of video 0 holds nan"),
    ({"segments": SEG, "video": SEG[:2, 0, 0]}, "video has shape"),
    ({"segments": SEG, "ids": np.array(names(2))}, "holds 3 videos for 2 names"),
    ({"segments": SEG, "ids": np.array(["a", "b", "a"])}, "ids:3: a is listed twice"),
    ({"segments": SEG, "ids": np.array([["a", "b", "c"]])}, "ids has shape"),
    ({"segments": SEG, "ids": np.arange(3)}, "ids holds int64"),
    ({"segments": SEG, "classes": np.array(["a"])}, "holds 25 classes for 1 names"),
    ({"segments": SEG, "without_segments": SEG[:, 0]}, "without_segments has shape"),
])
def test_bad_probabilities_are_named(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(InputError, match=message) as e: S.read_predictions(tmp_path / "x.npz")
    assert "x.npz" in str(e.value)


# ---------------------------------------------------------------- what is refused: predictions against annotations

def test_videos_that_are_missing_or_unknown(tmp_path):
    ids, true = names(4), grids(4)
    truth = truth_of(*true, ids, {"trainvideo1_0_10"})
    few = E.events_of(*(x[:2] for x in true), ids[:2])
    with pytest.raises(InputError, match=r"mine: has no prediction for 00000000002_0_10 and 1 more.*--partial"):
        S.score_predictions(few, truth, path="mine")
    part = S.score_predictions(few, truth, partial=True)
    assert part.info["videos"] == 2 and part.metrics.equals(evaluate(*(x[:2] for x in true * 2)))
    for name, message in (("nobody00000_0_10", "ids:2: 'nobody00000_0_10' is not in the annotations"),
                          ("00000000001_3_13", "did you mean '00000000001_0_10'")):
        with pytest.raises(InputError, match=message):
            S.score_predictions(E.events_of(*(x[:2] for x in true), [ids[0], name]), truth, partial=True)
    with pytest.raises(InputError, match="lists no video of test.*right split"):
        S.score_predictions(E.events_of(*(x[:1] for x in true), ["trainvideo1_0_10"]), truth, partial=True)


def test_forms_that_do_not_fit(tmp_path):
    ids, true = names(3), grids(3)
    truth = truth_of(*true, ids)
    turned = [CLASSES[1], CLASSES[0], *CLASSES[2:]]
    for p, message in (
            (E.events_of(*true, ids, turned), "class 0 is 'Car'. expected 'Speech'"),
            (E.events_of(*(x[:, :9] for x in true), ids), "has 9 seconds and 25 classes. expected 10 and 25")):
        with pytest.raises(InputError, match=message): S.score_predictions(p, truth, path="mine")
    for shape, message in (((2, 10, 2, 25), "holds 2 videos without names. expected 3, in the order.*--ids"),
                           ((3, 9, 2, 25), "has 9 seconds"), ((3, 10, 2, 24), "and 24 classes")):
        np.save(tmp_path / "x.npy", np.zeros(shape))
        with pytest.raises(InputError, match=message):
            S.score_predictions(S.read_predictions(tmp_path / "x.npy"), truth)


def test_rules_are_for_probabilities(tmp_path):
    ids, true = names(3), grids(3)
    truth = truth_of(*true, ids)
    with pytest.raises(InputError, match="has no effect on events"):
        S.score_predictions(E.events_of(*true, ids), truth, "han")
    np.save(tmp_path / "x.npy", SEG)
    p = S.read_predictions(tmp_path / "x.npy")
    with pytest.raises(InputError, match="rule: 'hann' is not possible.*did you mean 'han'"):
        S.score_predictions(p, truth, "hann")
    got = S.score_predictions(p, truth, "coleaf")
    assert got.info["rule"] == "coleaf" and any("two passes" in n for n in got.notes)
    assert S.score_predictions(p, truth).info["rule"] == "han"


def test_a_file_that_is_not_the_runs_has_no_origin(run, tmp_path):
    "Nobody's numbers are given out as those of a record"
    store, ids = run
    path = store.probability_path(KEY)
    assert S.read_predictions(path).about["run"] == KEY
    np.savez(path, segments=np.zeros((40, 10, 2, 25)))
    assert S.read_predictions(path).about == {}


# ---------------------------------------------------------------- the commands

def test_ids_and_classes_from_files(tmp_path, capsys):
    ids, classes, true = names(3), ["a", "b"], grids(3, 5, 2, density=.4)
    truth = E.events_of(*true, ids, classes)
    for k, t in truth.tables.items(): (tmp_path / f"{k}.csv").write_text(E._tsv(t))
    (tmp_path / "ids.txt").write_text("\n".join(ids[::-1]) + "\n")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    np.save(tmp_path / "x.npy", np.stack(true, 2)[::-1].astype(float))
    pair = f"{tmp_path / 'audio.csv'},{tmp_path / 'visual.csv'}"
    shell(S.cmd_score, tmp_path / "x.npy", pair, "--ids", tmp_path / "ids.txt", "--classes", tmp_path / "classes.txt",
          "--seconds", 5, "--json", tmp_path / "s.json")
    assert set(json.loads((tmp_path / "s.json").read_text())["metrics"]["segment"].values()) == {100.0}
    (tmp_path / "ids.txt").write_text(f"{ids[0]}\n\n{ids[1]}\n")
    with pytest.raises(InputError, match="ids.txt:2: '' is no filename"):
        shell(S.cmd_score, tmp_path / "x.npy", pair, "--ids", tmp_path / "ids.txt")
    with pytest.raises(InputError, match="--seconds: 0 is not possible"):
        shell(S.cmd_score, tmp_path / "x.npy", pair, "--seconds", 0)


def test_a_pair_that_does_not_list_empty_videos_says_how(tmp_path):
    ids, true = names(3), grids(3)
    for x in true: x[2] = 0
    for k, t in E.events_of(*true, ids).tables.items(): (tmp_path / f"{k}.csv").write_text(E._tsv(t))
    pair = f"{tmp_path / 'audio.csv'},{tmp_path / 'visual.csv'}"
    with pytest.raises(InputError, match="'00000000002_0_10' has no row in the annotations.*--ids"):
        S.score_predictions(E.events_of(*true, ids), S.read_truth(pair))
    got = S.score_predictions(E.events_of(*true, ids), S.read_truth(pair, ids=ids))
    assert got.info["videos"] == 3 and (got.metrics == 100).all(axis=None)


def test_scoring_writes_nothing_when_it_fails(tmp_path):
    with pytest.raises(InputError): shell(S.cmd_score, tmp_path / "no", TINY, "--json", tmp_path / "s.json")
    assert not list(tmp_path.iterdir())


def test_numbers_in_json_are_those_of_evaluate(tmp_path):
    ids, pred, true = names(12), grids(12), grids(12, seed=9)
    for x in (*pred, *true): x[..., 4] = 0
    E.write_events(E.events_of(*pred, ids), tmp_path / "p")
    E.write_events(E.events_of(*true, ids), tmp_path / "t.json", "json")
    shell(S.cmd_score, tmp_path / "p", tmp_path / "t.json", "--json", tmp_path / "s.json")
    shell(S.cmd_score, tmp_path / "p", tmp_path / "t.json", "--json", tmp_path / "s.json")    # may be replaced
    got = json.loads((tmp_path / "s.json").read_text())
    want = evaluate(*pred, *true)
    assert got["metrics"] == want.T.to_dict() and got["videos"] == 12
    assert got["classes"]["Cat"]["segment A"] is None and got["classes"]["Cat"]["annotated A"] == 0
    assert hashlib.sha256((tmp_path / "p" / DENSE["audio"]).read_bytes()).hexdigest() in (
        tmp_path / "p" / E.ABOUT).read_text()
