"""Contracts: messages, whole-or-absent files, content addresses, `Parsing`, and parameters that cannot be mistyped."""
import csv
import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import typing
from concurrent.futures import ThreadPoolExecutor

import micro  # noqa: F401  (sets one torch thread)
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avvp_nb import core
from avvp_nb.core import InputError, ParameterCheck, Parsing, check_type

plain = st.recursive(st.none() | st.booleans() | st.integers(-10**9, 10**9) | st.text(max_size=5)
                     | st.floats(allow_nan=False, allow_infinity=False),
                     lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=4), max_leaves=8)


# --- names -----------------------------------------------------------------------------------------------------------

def test_the_classes_are_those_of_the_label_files(llp):
    "Every class of the real training labels is in the list, and the other way round"
    with open(llp / "AVVP_train.csv", encoding="utf-8") as f:
        found = {name for row in csv.DictReader(f, delimiter="\t") for name in row["event_labels"].split(",")}
    assert found == set(core.CLASSES) and len(core.CLASSES) == 25


# --- messages --------------------------------------------------------------------------------------------------------

def test_a_message_has_its_parts_in_order():
    e = InputError("unknown class", where="a.csv:3", expected="one of 25.", fix="did you mean 'Dog'?")
    assert str(e) == "a.csv:3: unknown class. expected one of 25. did you mean 'Dog'?"
    assert (e.what, e.where, e.expected, e.fix) == ("unknown class", "a.csv:3", "one of 25.", "did you mean 'Dog'?")
    assert str(InputError("alone")) == "alone" and isinstance(e, ValueError)


@pytest.mark.parametrize("given, valid, hint", [
    ("gama", ["gamma", "noise"], "did you mean 'gamma'?"), ("zzz", ["a1", "b2"], "possible: a1, b2"),
    (3, ["30", "x"], "did you mean '30'?"), ("x", [], "possible: ")])
def test_hints(given, valid, hint):
    assert core.did_you_mean(given, valid) == hint


def test_a_choice_is_returned_or_refused_with_the_list():
    assert core.check_choice("b", ("a", "b"), "letter") == "b"
    with pytest.raises(InputError, match=r"letter: 'c' is not possible. expected one of 'a', 'b'"):
        core.check_choice("c", ("a", "b"), "letter")


@pytest.mark.parametrize("own, other, said", [
    (["a", "b"], ["a", "c"], "class 1 is 'b'. expected 'c'"), (["b", "a"], ["a", "b"], "class 0 is 'b'. expected 'a'"),
    (["a"], ["a", "b"], "class 1 is None. expected 'b'"), (["a", "b"], ("a",), "class 1 is 'b'. expected None"), ([], ["a"], "class 0 is None")])
def test_the_first_class_that_differs_is_told(own, other, said):
    core.check_same_classes(own, tuple(own), "file", "other class", "nothing")
    with pytest.raises(InputError) as e: core.check_same_classes(own, other, "a.json", "made for other classes: class", "use b.json", note=", as there")
    assert str(e.value).startswith(f"a.json: made for other classes: {said}") and str(e.value).endswith(", as there. use b.json")


# --- files -----------------------------------------------------------------------------------------------------------

def names(folder): return sorted(p.name for p in folder.iterdir())


def test_writing_creates_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "x.txt"
    for text in ("one", "twö"):
        with core.atomic_write(path) as f: f.write(text)
        assert path.read_text(encoding="utf-8") == text and names(path.parent) == ["x.txt"]
    with core.atomic_write(path, "wb") as f: f.write(b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"


def test_readers_see_the_old_content_until_the_end(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with core.atomic_write(path) as f:
        f.write("new")
        f.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_block_that_fails_changes_nothing(tmp_path, error):
    (tmp_path / "x").write_text("old")
    with pytest.raises(error), core.atomic_write(tmp_path / "x") as f:
        f.write("ne")
        raise error
    assert (tmp_path / "x").read_text() == "old" and names(tmp_path) == ["x"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_changes_nothing_and_names_the_file(tmp_path, monkeypatch, call):
    def full(*_): raise OSError(errno.ENOSPC, "No space left on device")
    (tmp_path / "x").write_text("old")
    monkeypatch.setattr(core.os, call, full)
    with pytest.raises(InputError, match=r"x: could not be written \(No space left on device\).*what was there before is intact"):
        core.write_json({"a": 1}, tmp_path / "x")
    assert (tmp_path / "x").read_text() == "old" and names(tmp_path) == ["x"]


def test_a_real_write_error_changes_nothing(tmp_path):
    "A file size limit makes the operating system refuse to write more"
    (tmp_path / "x").write_text("old")
    code = ("import resource, signal, sys; from avvp_nb.core import InputError, write_json\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
            "try: write_json(list(range(10**5)), sys.argv[1])\n"
            "except InputError as e: print(e); sys.exit(3)")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], capture_output=True, text=True)
    assert done.returncode == 3 and "x: could not be written (File too large)" in done.stdout, done.stderr
    assert (tmp_path / "x").read_text() == "old" and names(tmp_path) == ["x"]


@pytest.mark.parametrize("where", ["file/x", "folder"])
def test_a_place_that_cannot_be_written_is_named(tmp_path, where):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=f"{where}: could not be written"), core.atomic_write(tmp_path / where) as f:
        f.write("new")
    assert (tmp_path / "file").read_text() == "old" and names(tmp_path / "folder") == []


def test_kill_while_writing_leaves_the_old_file(tmp_path):
    (tmp_path / "x").write_text("old")
    code = ("import os, signal, sys; from avvp_nb.core import atomic_write\n"
            "with atomic_write(sys.argv[1]) as f: f.write('n'*10**5); f.flush(); os.kill(os.getpid(), signal.SIGKILL)")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")])
    assert done.returncode == -signal.SIGKILL and (tmp_path / "x").read_text() == "old"


def test_many_writers_of_one_file(tmp_path):
    "Whoever comes last wins, and nobody's content is mixed with another's"
    texts = [chr(97 + i) * 50_000 for i in range(8)]
    def write(text):
        with core.atomic_write(tmp_path / "x") as f: f.write(text)
    with ThreadPoolExecutor(8) as pool: list(pool.map(write, texts * 4))
    assert (tmp_path / "x").read_text() in texts and names(tmp_path) == ["x"]


def test_json_of_everything_a_record_holds(tmp_path):
    obj = {"b": np.float32(.5), "a": (1, np.arange(2)), "t": torch.tensor([[1., 2.]]), "p": tmp_path, "s": {"y", "x"}, 3: None,
           "i": np.int64(7), "scalar": torch.tensor(2.)}
    core.write_json(obj, tmp_path / "r.json")
    want = {"b": .5, "a": [1, [0, 1]], "t": [[1, 2]], "p": str(tmp_path), "s": ["x", "y"], "3": None, "i": 7, "scalar": 2}
    assert core.read_json(tmp_path / "r.json") == want
    assert list(json.loads((tmp_path / "r.json").read_text())) == sorted(want)


@given(plain)
@settings(max_examples=50, deadline=None)
def test_json_round_trip(tmp_path_factory, obj):
    path = tmp_path_factory.getbasetemp() / "round.json"
    core.write_json(obj, path)
    assert core.read_json(path) == obj


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan")])
def test_what_is_no_number_is_not_written(tmp_path, value):
    core.write_json(1, tmp_path / "x.json")
    with pytest.raises(ValueError): core.write_json({"a": value}, tmp_path / "x.json")
    assert core.read_json(tmp_path / "x.json") == 1 and names(tmp_path) == ["x.json"]


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe{}", b"{'a': 1}"])
def test_damaged_json_is_named(tmp_path, content):
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(InputError, match=r"r\.json: is not valid JSON .*delete it and run again"):
        core.read_json(tmp_path / "r.json")
    assert (tmp_path / "r.json").read_bytes() == content


def test_missing_json_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.json: no such file"): core.read_json(tmp_path / "none.json")


# --- content addresses -----------------------------------------------------------------------------------------------

def shuffled(obj, rng):
    "The same content with the keys of every dictionary in another order"
    if isinstance(obj, dict):
        keys = list(obj)
        rng.shuffle(keys)
        return {k: shuffled(obj[k], rng) for k in keys}
    return [shuffled(x, rng) for x in obj] if isinstance(obj, list) else obj


@given(plain, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_an_address_is_the_hash_of_canonical_json(obj, seed):
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    want = hashlib.sha256(text.encode()).hexdigest()
    assert core.content_hash(obj) == want[:16] and core.content_hash(obj, 40) == want[:40]
    assert core.content_hash(shuffled(obj, random.Random(seed))) == want[:16]


def test_any_change_changes_the_address():
    base = {"a": [1, 2], "b": {"c": .1}}
    others = [{"a": [2, 1], "b": {"c": .1}}, {"a": [1, 2], "b": {"c": .2}}, {"a": [1, 2], "b": {"d": .1}}, {"a": [1, 2]}]
    assert len({core.content_hash(x) for x in [base, *others]}) == 5
    assert core.content_hash({"x": (1, np.int32(2))}) == core.content_hash({"x": [1, 2]})


def test_file_hash(tmp_path):
    data = os.urandom(3_000_001)
    (tmp_path / "x").write_bytes(data)
    assert core.file_hash(tmp_path / "x") == hashlib.sha256(data).hexdigest()


# --- Parsing ---------------------------------------------------------------------------------------------------------

def parsing(n=4, seed=0):
    rng = np.random.default_rng(seed)
    return Parsing(*(torch.tensor(rng.random((n, *s)), requires_grad=True) for s in ((3,), (3,), (3,), (5, 2, 3))), {"loss": "only"})


def test_parsing_is_four_arrays():
    p = parsing()
    assert list(p.arrays()) == ["video", "audio", "visual", "segments"] and len(p) == 4
    assert repr(p) == "Parsing(video=(4, 3), audio=(4, 3), visual=(4, 3), segments=(4, 5, 2, 3))"
    assert p.map(lambda x: x).extra == {} and p.map(lambda x: x, keep_extra=True).extra == {"loss": "only"}
    assert torch.equal(p[1:3].segments, p.segments[1:3])


def test_parsing_to_numpy_and_joined():
    p, q = parsing(3), parsing(2, seed=1)
    a = p.numpy()
    assert all(x.dtype == np.float32 and isinstance(x, np.ndarray) for x in a.arrays().values())
    assert p.numpy(np.float16).video.dtype == np.float16
    joined = Parsing.cat([p, q])
    for k, x in joined.arrays().items():
        np.testing.assert_array_equal(x, np.concatenate([getattr(p, k).detach().float(), getattr(q, k).detach().float()]))
    half = parsing(2).map(lambda x: x.detach().bfloat16())
    assert half.numpy().video.dtype == np.float32  # NumPy has no bfloat16


# --- types of parameters ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("value, hint, want", [
    (1, float, 1.0), (.5, float, .5), (2, int, 2), (True, bool, True), ("a", str, "a"), (None, typing.Optional[str], None),
    (3, typing.Optional[float], 3.0), ([1, 2], list[int], [1, 2]), ((1,), list[float], [1.0]), ([1, "a"], list, [1, "a"]),
    ([], list[int], []), ([[1]], list[list[int]], [[1]]), ({"a": 1}, dict, {"a": 1}), (1, typing.Union[str, float], 1.0)])
def test_types_that_fit(value, hint, want):
    got = check_type(value, hint, "x")
    assert got == want and type(got) is type(want)


@pytest.mark.parametrize("value, hint, message", [
    ("0.3", float, "x: '0.3' is a str. expected float"), (True, int, "expected int"), (True, float, "expected float"),
    (1, bool, "expected bool"), (1.0, int, "1.0 is a float. expected int"), (None, str, "expected str"), ("a", list[int], "expected list"),
    ([1, 2.5], list[int], r"x\[1\]: 2.5 is a float"), (5, typing.Optional[str], "expected"), ("12", list, "expected list"),
    ([True], list[int], r"x\[0\]")])
def test_types_that_do_not_fit(value, hint, message):
    with pytest.raises(InputError, match=message): check_type(value, hint, "x")


def test_the_short_way_to_write_an_option():
    assert check_type(None, float | None, "x") is None
    got = check_type(1, float | None, "x")
    assert got == 1.0 and type(got) is float


def notebook(*cells, before=None):
    "Run cells as a notebook does: what was there, then the parameters, then what papermill adds"
    ns = dict(before or {})
    ns["check"] = ParameterCheck(ns)
    for cell in cells: exec(cell, ns)
    return ns["check"](), ns


DECLARED = "gamma: float = 0.1\nseeds: list[int] = [1]\nout: Optional[str] = None"
BEFORE = {"Optional": typing.Optional, "display": print}


@pytest.mark.parametrize("injected, want", [
    ("", {"gamma": .1, "seeds": [1], "out": None}), ("gamma = 1", {"gamma": 1., "seeds": [1], "out": None}),
    ("seeds = [2, 3]\nout = 'x'", {"gamma": .1, "seeds": [2, 3], "out": "x"})])
def test_declared_parameters_are_checked_and_returned(injected, want):
    got, ns = notebook(DECLARED, injected, before=BEFORE)
    assert got == want and ns["gamma"] == want["gamma"] and type(ns["gamma"]) is float


@pytest.mark.parametrize("injected, message", [
    ("gama = 0.3", "gama: no such parameter. did you mean 'gamma'?.*nothing was run"), ("gamma = '0,3'", "gamma: '0,3' is a str"),
    ("seeds = {1: 2}", "seeds: {1: 2} is a dict"), ("seeds = ['x']", r"seeds\[0\]"), ("quite_different = 1", "quite_different: no such parameter. possible"),
    ("gamma = None", "gamma: None"), ("out = 5", "out: 5 is a int")])
def test_unknown_names_and_wrong_types_stop(injected, message):
    with pytest.raises(InputError, match=message): notebook(DECLARED, injected, before=BEFORE)


def test_a_parameter_named_like_something_imported_stops():
    "`-p display 3` is as unknown as `-p gama 3`, and would break the notebook further down"
    with pytest.raises(InputError, match="display: no such parameter"): notebook(DECLARED, "display = 3", before=BEFORE)


def test_annotations_made_before_the_check_are_no_parameters():
    got, _ = notebook(DECLARED, before={**BEFORE, "__annotations__": {"old": int}, "old": "not an int"})
    assert "old" not in got


# --- places ----------------------------------------------------------------------------------------------------------

def test_assets_exist_or_are_refused():
    assert core.asset("reported.csv").is_file()
    with pytest.raises(InputError, match=r"reportd\.csv: no such package file. did you mean 'reported\.csv'"): core.asset("reportd.csv")


def test_shared_material_is_found_by_variable_or_beside_the_checkout(tmp_path, monkeypatch):
    monkeypatch.setenv("AVVP_SHARED", str(tmp_path / "s"))
    assert core.shared("llp", "x") == tmp_path / "s" / "llp" / "x"
    monkeypatch.delenv("AVVP_SHARED")
    (tmp_path / "shared").mkdir()
    (tmp_path / "checkout" / "nbs").mkdir(parents=True)
    for cwd in ("checkout", "checkout/nbs"):
        monkeypatch.chdir(tmp_path / cwd)
        assert core.shared("llp").resolve() == tmp_path / "shared" / "llp"
