"""Values that don't fit, from a shell, a notebook and Python; and output that nobody takes: refused or borne, by name."""
import ast
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import typing
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

import micro
import numpy as np
import pytest
from tree import ROOT, Notebook

from avvp_nb import cli, core, runs
from avvp_nb.core import (
    InputError,
    Output,
    ParameterCheck,
    as_meant,
    check_device,
    check_seeds,
    check_type,
    output_folder,
    parse_json,
    read_json,
)
from avvp_nb.data.features import layout_source
from avvp_nb.records.spec import RunSpec
from avvp_nb.records.store import Store

HUGE = 2**64
def cases(names, values):
    "Parameters whose values are too long, or too strange, to name a test by"
    return pytest.mark.parametrize(names, values, ids=[str(i) for i in range(len(values))])


NOTEBOOKS = ("dgm", "han", "ma", "coleaf", "claims")


@pytest.fixture
def shell(capsys):
    "Run a command; its status, output and errors"
    def call(*argv):
        capsys.readouterr()
        try: status = cli.main([str(a) for a in argv])
        except SystemExit as e: status = e.code
        return status, *capsys.readouterr()
    return call


def refused(result, said):
    "Was a command refused on one line that says this, and short?"
    status, out, err = result
    last = err.strip().splitlines()[-1]
    return status == 2 and not out and said in last and len(last) < 2500 and "Traceback" not in err


# ---- B3: JSON ------------------------------------------------------------------------------------------------

DEEP = {"lists": "["*100_000, "closed": "["*5000 + "]"*5000, "objects": '{"a":'*100_000, "below Python's limit": "["*200 + "]"*200,
        "behind much else": json.dumps({"a": list(range(1000))})[:-1] + ', "b": ' + '[{"x": '*300 + "1" + "}]"*300 + "}"}


@pytest.mark.parametrize("kind", DEEP)
def test_deeply_nested_json_is_refused_by_name(tmp_path, kind):
    (tmp_path / "n.json").write_text(DEEP[kind])
    with pytest.raises(InputError, match=r"n\.json: is JSON that is nested too deep. expected at most 64 levels"): read_json(tmp_path / "n.json")


@cases("read, name", [
    (lambda p: cli.main(["sweep", str(p / "n.json"), "--dry-run"]), "n.json"), (lambda p: Store(p).record("han-1"), "records/han-1.json"),
    (layout_source, "SOURCE.json")])
def test_wherever_it_lies(tmp_path, read, name, capsys):
    (tmp_path / "records").mkdir()
    (tmp_path / name).write_text(DEEP["lists"])
    try: assert read(tmp_path) == 2
    except InputError as e: said = str(e)
    else: said = capsys.readouterr().err
    assert name in said and "nested too deep" in said and "\n" not in said.strip()


def test_what_is_read_is_limited_before_it_is_read(tmp_path, monkeypatch):
    with open(tmp_path / "large.json", "wb") as f: f.truncate(core.MOST_JSON + 1)                         # sparse
    with pytest.raises(InputError, match=r"large\.json: has 268,435,457 bytes. expected at most"): read_json(tmp_path / "large.json")


@cases("make, said", [
    (lambda p: p.mkdir(), "is a folder"), (lambda p: os.mkfifo(p), "is no regular file"), (lambda p: p.symlink_to(p), "cannot be read"),
    (lambda p: p.write_text("9"*5000), "is not valid JSON"), (lambda p: p.write_bytes(b"[\xff]"), "is not valid JSON")])
def test_what_is_no_json_file_is_named(tmp_path, make, said):
    make(tmp_path / "x.json")
    with pytest.raises(InputError, match=rf"x\.json: {said}"): read_json(tmp_path / "x.json")


def test_json_within_another_file():
    assert parse_json(b'{"a": [1]}', "header") == {"a": [1]} and parse_json("[" * 64 + "]" * 64, "header")
    for text in ("["*65 + "]"*65, b"["*99_999): pytest.raises(InputError, parse_json, text, "header of x").match("header of x: is JSON that is nested")
    def refuse(pairs): raise InputError("occurs twice", where="a")
    with pytest.raises(InputError, match="a: occurs twice"): parse_json('{"a": 1}', "x", object_pairs_hook=refuse)


# ---- messages -------------------------------------------------------------------------------------------------

def test_a_message_is_one_line_that_a_terminal_can_show():
    e = InputError("is listed twice:\n'x'", where="\x1b[31mred\x1b[0m.csv", expected="\x9b5m \u202egnp.exe \ud800", fix="x" * 100_000)
    assert "\n" not in str(e) and "\x1b" not in str(e) and "\\x1b[31mred" in str(e) and "\u202e" not in str(e) and len(str(e)) < 1500
    str(e).encode("utf-8")
    assert e.where.startswith("\x1b")                                                                    # what it was stays


@cases("value", ["a" * 100_000, [0] * 100_000, 10**5000, -10**30])
def test_a_refused_value_is_not_repeated_in_full(value):
    for f in (lambda: core.check_choice(value, ("a", "b"), "x"), lambda: check_type(value, bool, "x")):
        with pytest.raises(InputError, match="^x: ") as e: f()
        assert len(str(e.value)) < 400


def test_nested_lists_are_shown_shortly():
    x = []
    for _ in range(100_000): x = [x]
    assert core.brief(x) == "a deeply nested list"
    while x: x = x[0]                                                                                    # Python frees it level by level


# ---- B10: numbers ---------------------------------------------------------------------------------------------

@cases("value, hint, said", [
    (HUGE, int, "x: 18446744073709551616 is too large. expected a number of at most 64 bits"), (-HUGE, int, "is too large"),
    (10**5000, float, "a number of thousands of digits is too large"), (float("nan"), float, "x: nan is no number"),
    (float("-inf"), float, "-inf is no number"), ([1, HUGE], list[int], r"x\[1\]: 18446744073709551616 is too large"),
    (float("inf"), typing.Optional[float], "inf is no number"), (HUGE, typing.Optional[int], "is too large"),
    (np.float64("nan"), float, "nan is no number")])
def test_numbers_that_do_not_fit(value, hint, said):
    with pytest.raises(InputError, match=said): check_type(value, hint, "x")


@cases("seeds, said", [([], "no seeds"), ([1, 2, 1], "seeds: 1 is given twice"), ([-1], "-1 is not possible"), ([HUGE], "too large"),
                                         ([1.5], r"seeds\[0\]: 1.5 is a float"), (["1"], "is a str"), ([True], "is a bool"), ((), "no seeds")])
def test_seeds(seeds, said):
    with pytest.raises(InputError, match=said): check_seeds(seeds)
    assert check_seeds(range(3)) == [0, 1, 2] and check_seeds([HUGE - 1]) == [HUGE - 1]


@cases("spec", [dict(seed=HUGE), dict(seed=-1), dict(epochs=HUGE), dict(epochs=0), dict(method="dgm", options={"gamma": float("nan")}),
                                  dict(method="ma", options={"n_partners": 10**400})])
def test_a_spec_of_them_cannot_be_made(spec):
    name = next(iter(spec.get("options", spec)))
    with pytest.raises(InputError, match=f"^{name}: "): RunSpec(**spec)


@cases("args, said", [
    (["run", "han", "--seeds", HUGE], "seeds: 18446744073709551616 is too large"), (["run", "han", "--seeds", "-1"], "seeds: -1 is not possible"),
    (["run", "han", "--seeds", 1, 1], "seeds: 1 is given twice"), (["run", "han", "--seeds"], "--seeds: expected at least one"),
    (["run", "han", "--seeds", "nan"], "invalid int value: 'nan'"), (["run", "han", "--epochs", 10**30], "epochs: 1000000"),
    (["reproduce", "han", "--table", "1", "--seeds", 2, 2], "seeds: 2 is given twice"), (["gpu-report", "--out", "@", "--seeds", HUGE], "too large"),
    (["gpu-report", "--out", "@", "--budget", "nan"], "budget: nan"), (["gpu-report", "--out", "@", "--budget", "-1"], "budget: -1.0 is not possible"),
    (["gpu-report", "--out", "@", "--stack", "0"], "stack: 0 is not possible"), (["run", "han", "--stack", "-3"], "stack: -3 is not possible"),
    (["run", "han", "--stack", "0"], "stack: 0"), (["sweep", "g.json", "--stack", "0"], "stack: 0"), (["sweep", "g.json", "--retries", "-1"], "retries: -1"),
    (["sweep", "g.json", "--gpus-per-task", "inf"], "gpus-per-task: inf"), (["sweep", "g.json", "--progress", "x"], "progress: 'x' is not possible"),
    (["simulate", "@", "--seed", HUGE], "seed: 18446744073709551616 is too large"), (["simulate", "@", "--videos", 1, 1, 10**30], "videos: 1000000")])
def test_from_a_shell(shell, tmp_path, monkeypatch, args, said):
    monkeypatch.chdir(tmp_path)
    assert refused(shell(*[str(tmp_path / "new") if a == "@" else a for a in args]), said)
    assert not list(tmp_path.iterdir())                                                                  # before any work


# ---- B22: texts -----------------------------------------------------------------------------------------------

@cases("args, said", [
    (["--out", ""], "out: is empty"), (["--out", "  "], "out: is empty"), (["--annotations", ""], "annotations: is empty"), (["--baseline", ""], "baseline: is empty"),
    (["--out", "a\0b"], r"out: 'a\x00b' is no name"), (["--device", "meta"], "device: 'meta' is not possible"), (["--device", ""], "device: is empty"),
    (["--device", "cuda:1e9"], "device: 'cuda:1e9'"), (["--device", "\x1b[31m"], r"device: '\x1b[31m'"),
    (["--set", "gamma=" + "-"*5000 + "1"], "--set gamma: '-----"), (["--set", "gamma=" + "-"*900 + "1"], "is a str. expected float"),
    (["--set", "gamma=" + "("*100_000], "is too long"), (["--set", "gamma=" + "("*999], "is a str. expected float"), (["--set", "x"*100_000], "has no '='"),
    (["--set", "gamma=" + "9"*900], "is a str. expected float"), (["--set", "gamma=1e999"], "gamma: inf is no number"), (["--set", "gamma=1", "gamma=2"], "given twice"),
    (["--set", "gamma={[]: 1}"], "is a str. expected float"), (["--seeds", "9"*100_000], "invalid int value"), (["--x" + "y"*100_000], "unrecognized arguments"),
    (["--rule", "hna"], "invalid choice: 'hna'"), (["--select", "segment/Typ@AV"], "invalid choice")])
def test_texts_that_mean_nothing(shell, tmp_path, monkeypatch, args, said):
    monkeypatch.chdir(tmp_path)
    if said == "is a str. expected float" and "9"*900 in args[-1]: said = "too large"
    assert refused(shell("run", "dgm", "--scale", "tiny", *args), said)
    assert not list(tmp_path.iterdir())


@cases("pairs, want", [
    (["noise=false"], {"noise": False}), (["noise=TRUE", "gamma=1e-1"], {"noise": True, "gamma": .1}), (["measure=score"], {"measure": "score"})])
def test_options_that_mean_something_obvious(pairs, want): assert cli.read_options(pairs, "dgm") == want


def test_devices():
    assert [check_device(d) for d in ("auto", "cpu", "cuda", "cuda:1")] == ["auto", "cpu", "cuda", "cuda:1"]
    for d in ("meta", "cpu:0x", "CUDA", None, 3): pytest.raises(InputError, check_device, d)


# ---- the command line reaches what a spec has -------------------------------------------------------------------

def test_rule_select_and_fresh(monkeypatch):
    parse = cli.parser().parse_args
    a = parse(["run", "dgm", "--baseline", "jomold", "--rule", "han", "--select", "segment/AV", "--seeds", "2"])
    assert [(s.method, s.plain()["rule"], s.recipe()["select"]) for s in cli.run_specs(a)] == [(m, "han", "segment/AV") for m in ("jomold", "dgm")]
    assert cli.run_specs(parse(["run", "dgm"])) == [RunSpec("dgm")]
    asked = {}
    monkeypatch.setattr(cli, "run_many", lambda specs, *args, **kw: asked.update(kw) or [])
    monkeypatch.setattr(cli, "compare", lambda records: type("T", (), {"to_markdown": lambda self: ""})())
    for words, fresh in ((["--fresh"], True), ([], False)):
        assert cli.main(["run", "han", *words]) == 0 and asked["fresh"] is fresh
    with pytest.raises(InputError, match="--fresh: is not supported in several processes"): cli.cmd_run(parse(["run", "han", "--parallel", "--fresh"]))
    assert {"events", "score"} <= set(cli.COMMANDS)


# ---- how a value is written in a notebook -----------------------------------------------------------------------

DECLARED = """gamma: float = .1
msdu: bool = True
n: int = 1
measure: str = "fusion"
seeds: list[int] = [1]
tables: list[str] = []
annotations: Optional[str] = None
epochs: Optional[int] = None"""


def given(cell):
    ns = {"Optional": typing.Optional}
    ns["check"] = ParameterCheck(ns)
    exec(DECLARED, ns)
    exec(cell, ns)
    return ns["check"]()


@cases("cell, want", [
    ("seeds = 3", {"seeds": [3]}), ("seeds = '3'", {"seeds": [3]}), ("seeds = '[1, 2]'", {"seeds": [1, 2]}), ("seeds = '1,2'", {"seeds": [1, 2]}),
    ("seeds = (1, 2)", {"seeds": [1, 2]}), ("seeds = 3.0", {"seeds": [3]}), ("msdu = 'false'", {"msdu": False}), ("msdu = 'True'", {"msdu": True}),
    ("gamma = '1e-1'", {"gamma": .1}), ("gamma = ' -.5 '", {"gamma": -.5}), ("gamma = 1", {"gamma": 1.}), ("n = '7'", {"n": 7}), ("n = 1e3", {"n": 1000}),
    ("measure = 2024", {"measure": "2024"}), ("tables = 2", {"tables": ["2"]}), ("tables = 'VI'", {"tables": ["VI"]}),
    ("tables = '[\"1\", \"2\"]'", {"tables": ["1", "2"]}), ("tables = [1, 'VI']", {"tables": ["1", "VI"]}), ("tables = '[]'", {"tables": []}),
    ("epochs = '2'", {"epochs": 2}), ("annotations = 'x'", {"annotations": "x"})])
def test_what_can_only_mean_one_thing_is_taken_for_it(cell, want):
    got = given(cell)
    assert {k: got[k] for k in want} == want and all(type(got[k]) is type(v) for k, v in want.items())


@cases("cell, said", [
    ("msdu = 1", "msdu: 1 is a int. expected bool. write True or False"), ("msdu = 'off'", "write True or False"), ("gamma = '0,3'", "write a number such as 0.1"),
    ("gamma = 'nan'", "gamma: 'nan' is a str"), ("gamma = float('nan')", "gamma: nan is no number"), ("n = 1.5", "write a whole number such as 3"),
    ("n = 1e30", "n: 1e[+]30 is a float"), ("n = '9'*30", "n: '999"), (f"n = {HUGE}", "n: 18446744073709551616 is too large"), ("n = True", "expected int"),
    ("seeds = None", r"seeds: None is a NoneType.*write a list, with papermill -y '{seeds: \[1, 2\]}'"), ("seeds = 'all'", r"seeds\[0\]: 'all'"),
    ("seeds = [1, 1]", "seeds: 1 is given twice"), ("seeds = ['1', 1]", "seeds: 1 is given twice"), ("tables = ['2', 2]", "tables: '2' is given twice"),
    ("measure = None", "write a text, in quotes"), ("measure = 1.5", "write a text"), ("measure = ''", "measure: is empty"), ("annotations = ''", "annotations: is empty"),
    ("annotations = 5", "annotations: 5 is a int"), ("measure = True", "measure: True is a bool"), ("seeds = {1: 2}", "is a dict")])
def test_for_the_rest_it_is_said_how_to_write_it(cell, said):
    with pytest.raises(InputError, match=f"(?s){said}"): given(cell)


def test_what_was_meant_leaves_other_values_alone():
    for value, hint in ((None, int), ([], dict), (1, bool), ("x", int), (b"1", int), (float("nan"), int), (float("inf"), list[int]), ("1", dict)):
        meant = as_meant(value, hint)
        assert meant == value or meant == [value] or value != value


# ---- the notebooks, up to the end of their checks ---------------------------------------------------------------

def checks(name, cwd, **injected):
    "Run the imports, the parameters, what is injected and the cell that checks, and nothing else"
    cells = [(c, "".join(c["source"])) for c in Notebook(ROOT / "nbs" / f"{name}.ipynb").cells if c["cell_type"] == "code"]
    first = next(i for i, (c, _) in enumerate(cells) if "parameters" in c["metadata"].get("tags", []))
    ns, here = {}, os.getcwd()
    os.chdir(cwd)
    try:
        with mock.patch("IPython.display.display"):
            for i in range(first + 1): exec(cells[i][1], ns)
        exec("\n".join(f"{k} = {v!r}" for k, v in injected.items()), ns)
        exec(cells[first + 1][1], ns)
    finally: os.chdir(here)
    return ns


@pytest.mark.parametrize("name", NOTEBOOKS)
@cases("injected, said", [
    ({"seeds": []}, "seeds: no seeds"), ({"seeds": [1, 1]}, "seeds: 1 is given twice"), ({"seeds": [-1]}, "-1 is not possible"), ({"seeds": HUGE}, "too large"),
    ({"tables": ["IX"]}, "'IX' is not possible"), ({"tables": "99"}, "'99' is not possible"), ({"device": "meta"}, "device: 'meta'"), ({"out": ""}, "out: is empty"),
    ({"audio_table": 1999}, "audio_table: '1999' is not possible")])
def test_a_notebook_refuses_before_any_work(tmp_path, name, injected, said):
    if name == "claims" and {"seeds", "tables", "device"} & set(injected): pytest.skip("claims trains nothing")
    with pytest.raises(InputError, match=re.escape(said)): checks(name, tmp_path, **injected)
    assert not list(tmp_path.iterdir())


@cases("injected, said", [({"papers": []}, "no papers"), ({"claim": "D-genral-jomold"}, "did you mean 'D-general-jomold'"),
                                            ({"papers": "han"}, "no such claim"), ({"papers": ["dgx"]}, "'dgx' is not possible")])
def test_claims_refuses_before_any_work(tmp_path, injected, said):
    with pytest.raises(InputError, match=re.escape(said)): checks("claims", tmp_path, **injected)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_says_where_it_writes(tmp_path, name, capsys):
    ns = checks(name, ROOT / "nbs", audio_table=2020, **({} if name == "claims" else {"seeds": 3, "scale": "tiny"}))
    want = os.path.join("..", ns["given"]["out"])
    assert ns["out"] == want and f"everything is written below {want}\n" in capsys.readouterr().out and ns["audio_table"] == "2020"
    assert checks(name, tmp_path)["out"] == ns["given"]["out"] and str(ROOT) not in capsys.readouterr().out


def test_out_is_meant_from_the_root_of_a_checkout(tmp_path, monkeypatch):
    (tmp_path / "nbs" / "methods").mkdir(parents=True)
    for place in ("nbs", "nbs/methods"):
        monkeypatch.chdir(tmp_path / place)
        assert output_folder("runs") == "runs"                                                           # no checkout of this library
    (tmp_path / "settings.ini").touch()
    (tmp_path / "nbs" / "00_core.ipynb").touch()
    for place, want in (("nbs", "../runs"), ("nbs/methods", "../../runs"), (".", "runs")):
        monkeypatch.chdir(tmp_path / place)
        assert output_folder("runs") == want
        assert output_folder(str(tmp_path / "x")) == str(tmp_path / "x") and output_folder("../x") in ("../x", "../../x", "../../../x")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert output_folder("~/runs") == str(tmp_path / "runs")


def test_dgm_without_msdu_has_all_its_diagrams():
    "`papermill nbs/dgm.ipynb -p msdu False` stopped at Fig. 2"
    import matplotlib.pyplot as plt
    cell = next(s for s in Notebook(ROOT / "nbs" / "dgm.ipynb").of("code") if "diagram_pipelines(plain_model" in s)
    for msdu, want in ((False, ["dgm_fig3_pipelines"]), (True, ["dgm_fig2_framework", "dgm_fig3_pipelines"])):
        saved, ns = [], checks("dgm", ROOT / "nbs", msdu=msdu, backbone="han")
        sizes = dict(classes=25, audio_dim=8, frame_dim=8, motion_dim=8, dim=32)
        ns |= {"model": ns["METHODS"]["dgm"].build(ns["our_specs"][0].plain(), sizes)[0], "network_sizes": lambda _, sizes=sizes: sizes, "data": {"train": None},
               "save_figure": lambda fig, path, source, saved=saved: saved.append(path.rpartition("/")[2]), "display": plt.close}
        exec(cell, ns)
        assert saved == want


def test_what_the_papers_do_not_say_can_be_run_with_every_option():
    "A variant that is impossible with the options of the notebook would stop it after all training"
    tree = ast.parse(next(s for s in Notebook(ROOT / "nbs" / "dgm.ipynb").of("code") if s.startswith("variants = ")))
    ns = {}
    exec(compile(ast.Module(tree.body[:1], []), "variants", "exec"), ns)
    for options in (dict(target="encoder"), dict(shared="split"), dict(apply="update"), dict(msdu=False), dict(apply="update", target="encoder", msdu=False)):
        for method, change in ns["variants"].values():
            if method == "dgm": RunSpec("dgm", {**options, **change})


# ---- where output goes ----------------------------------------------------------------------------------------

class Pipe(io.StringIO):
    "A stream that fails from the n-th write on"
    def __init__(self, error, n=0):
        super().__init__()
        self.error, self.left = error, n

    def write(self, text):
        if self.left <= 0: raise self.error
        self.left -= 1
        return super().write(text)


def into(out, err, *argv):
    "Status of a command whose output goes to these streams"
    with redirect_stdout(out), redirect_stderr(err): return cli.main([str(a) for a in argv])


@pytest.mark.parametrize("code", ["ascii", "cp1252", "gbk", "cp437", "latin-1", "utf-16"])
def test_any_encoding(code, tmp_path):
    micro_text = "γ = 0.1 ± 0.2 – 你好 é \udcff"
    raw = io.BytesIO()
    out = Output(io.TextIOWrapper(raw, encoding=code))
    print(micro_text, file=out, flush=True)
    said = raw.getvalue().decode(code)
    assert "= 0.1" in said and ("γ" in said or "\\u03b3" in said) and out.lost is None
    assert into(io.TextIOWrapper(io.BytesIO(), encoding=code), io.StringIO(), "reported", "dgm", "VII") == 0
    (tmp_path / "AVVP_x").touch()
    err = io.TextIOWrapper(io.BytesIO(), encoding=code)
    assert into(io.StringIO(), err, "annotations", tmp_path / "é你") == 2 and b"error" in err.buffer.getvalue().replace(b"\0", b"")


@pytest.mark.parametrize("n", [0, 1])
def test_a_reader_that_goes_away_stops_nothing(n):
    err = io.StringIO()
    assert into(Pipe(BrokenPipeError(32, "Broken pipe"), n), err, "reported", "dgm", "VII") == 0 and not err.getvalue()
    assert into(Pipe(BrokenPipeError(32, "Broken pipe"), n), err, "annotations", "nowhere") == 2 and "nowhere" in err.getvalue()
    assert into(io.StringIO(), Pipe(BrokenPipeError(32, "Broken pipe"), n), "annotations", "nowhere") == 2


def test_a_run_is_recorded_although_nobody_reads(tmp_path, monkeypatch):
    micro.install(monkeypatch.setitem)
    args = ["run", "han", "--scale", "micro", "--epochs", "1", "--device", "cpu", "--out", tmp_path]
    assert into(Pipe(BrokenPipeError(32, "Broken pipe")), Pipe(BrokenPipeError(32, "Broken pipe")), *args) == 0
    (record,) = runs.Store(tmp_path).records()
    err = io.StringIO()
    assert into(Pipe(OSError(28, "No space left on device")), err, *args) == 2
    assert err.getvalue() == "error: the output could not be written (No space left on device); files are complete\n"
    assert runs.Store(tmp_path).records() == [record]


def test_streams_that_are_closed_or_are_not_there(monkeypatch):
    for name in ("stdout", "stderr"): monkeypatch.setattr(sys, name, None)
    assert (cli.main(["reported", "dgm", "VII"]), cli.main(["annotations", "nowhere"])) == (0, 2)
    closed = io.StringIO()
    closed.close()
    assert into(closed, io.StringIO(), "reported", "dgm", "VII") == 2
    out = Output(None)
    assert out.isatty() is False and out.encoding == "utf-8" and out.write("x") == 1


def test_escape_sequences_do_not_reach_a_terminal(shell, tmp_path):
    red = tmp_path / "\x1b[31mred"
    red.mkdir()
    for argv in (["annotations", red], ["doctor", red, "--annotations", red]):
        status, out, err = shell(*argv)
        assert status == 2 and "\x1b" not in out + err and "\\x1b[31mred" in err
    out = io.StringIO()
    print("\x1b]0;title\x07 mark \x9b", file=Output(out))
    assert out.getvalue() == "\\x1b]0;title\\x07 mark \\x9b\n"
    print("\rbar\x1b[A", file=Output(out, raw=True))
    assert out.getvalue().endswith("\rbar\x1b[A\n")


@cases("error, said", [(PermissionError(13, "Permission denied", "x.lock"), "error: x.lock: Permission denied\n"),
                                         (MemoryError(), "error: not enough memory\n"), (InputError("bad", where="a"), "error: a: bad\n")])
def test_what_the_system_refuses_is_one_line(shell, monkeypatch, error, said):
    def fail(a): raise error
    monkeypatch.setitem(cli.COMMANDS, "reported", (fail, cli.add_reported))
    assert shell("reported", "dgm") == (2, "", said)


# ---- C6: Ctrl-C -----------------------------------------------------------------------------------------------

DURING = """
import importlib.abc, os, signal, sys, time
class Press(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {name!r}: os.kill(os.getpid(), signal.SIGINT); time.sleep(60)
import avvp_nb.__main__ as m
sys.meta_path.insert(0, Press())
{before}
print(m.main(["annotations", "nowhere"]))
"""


def listen(): signal.signal(signal.SIGINT, signal.default_int_handler)   # a suite in the background of a shell ignores it


def pressed(name, before=""):
    return subprocess.run([sys.executable, "-c", DURING.format(name=name, before=before)], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, preexec_fn=listen)


@pytest.mark.parametrize("name", ["avvp_nb.cli", "argparse", "avvp_nb.core", "numpy"])
def test_ctrl_c_while_modules_are_imported(name):
    done = pressed(name)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted; repeat the command to continue\n")


def test_where_ctrl_c_is_ignored_it_stays_so():
    done = pressed("avvp_nb.cli", "signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep = lambda s: print('went on') or sys.exit(3)")
    assert (done.returncode, done.stdout) == (3, "went on\n")


def test_ctrl_c_while_arguments_are_read(shell, monkeypatch):
    def press(*_): raise KeyboardInterrupt
    for f in ("parser", "check_arguments"):
        with monkeypatch.context() as m:
            m.setattr(cli, f, press)
            assert shell("run", "han") == (130, "", "interrupted; the same command continues at the last full epoch\n")


@pytest.mark.slow
def test_ctrl_c_in_the_first_seconds_of_a_process(tmp_path):
    for after in (.3, 1., 2.):
        p = subprocess.Popen([sys.executable, "-m", "avvp_nb", "run", "han", "--out", str(tmp_path / "runs")], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))     # a shell's background jobs ignore it
        time.sleep(after)
        p.send_signal(signal.SIGINT)
        said = p.communicate(timeout=600)[1]
        assert p.returncode == 130 and said.startswith("interrupted; ") and said.count("\n") == 1


@pytest.mark.slow
def test_a_process_whose_output_is_closed():
    command = f"{sys.executable} -m avvp_nb reported dgm VII"
    for how, want in (("| true; exit ${PIPESTATUS[0]}", 0), (">&- 2>&-", 0), ("> /dev/full", 2)):
        done = subprocess.run(["bash", "-c", f"{command} {how}"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == want and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
