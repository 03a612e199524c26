"""The simulator beside public real runs: statistics with their sources, eight tests that can fail, the subset of LLP, the page."""
import json
import math
import re

import numpy as np
import pytest
from test_notebook_dgm import papermill
from tree import ROOT, Notebook, load

from avvp_nb.core import CLASSES, InputError, asset, read_json, shared, to_plain
from avvp_nb.data.sources import DataSpec, identify, load_data
from avvp_nb.records.spec import RunSpec, run_key
from avvp_nb.records.store import Store
from avvp_nb.results import realism as rz
from avvp_nb.results.groups import invented_record
from avvp_nb.results.realism_page import (
    absent,
    imitated,
    nearest,
    plot_realism,
    printed_han,
    rows_of,
    runs_in,
)
from avvp_nb.runs.single import run

REAL = rz.real_runs()


# --- statistics of the real runs ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def script(): return load(ROOT / "tools" / "real_statistics.py")


def test_the_committed_statistics_are_what_the_script_makes(script):
    folder = shared("real")
    if not folder.is_dir(): pytest.skip("real/ not found: set AVVP_SHARED to the folder that holds it")
    assert read_json(asset("real_runs.json")) == to_plain(script.statistics(folder))
    assert script.main(["--check"]) == 0


def test_the_statistics_are_small_sourced_and_name_no_video():
    path = asset("real_runs.json")
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size <= 40_000
    assert set(REAL) == {"format", "sources"} | set(REAL["sources"]) and all("github.com/" in x for x in REAL["sources"].values())
    assert not re.search(r"[\w-]{11}_\d+_\d+", text) and "logtrain" not in text


def test_the_four_plain_runs_are_those_that_the_report_describes():
    best = REAL["han"]["best"]["mean"]
    row = [best[level][m] for level in ("segment", "event") for m in ("A", "V", "AV", "Type@AV", "Event@AV")]
    np.testing.assert_allclose(row, [62.0, 54.1, 49.9, 55.3, 57.1, 53.2, 49.1, 43.4, 48.6, 49.4], atol=.051)
    mean = dict(enumerate(REAL["han"]["by_epoch"]["val"]["mean"], 1))
    np.testing.assert_allclose([mean[e] for e in (1, 2, 3, 4, 5, 10, 11, 15, 20, 30, 40)],
                               [51.2, 53.4, 52.8, 52.9, 53.2, 53.3, 55.0, 54.6, 54.7, 54.1, 54.2], atol=.051)
    np.testing.assert_allclose([REAL["han"]["by_epoch"]["loss"]["mean"][e - 1] for e in (1, 2, 5, 10, 20, 40)],
                               [.58, .39, .34, .33, .27, .26], atol=.0051)


def test_the_pooling_numbers_come_from_the_line_that_quotes_them(script):
    five = "1.0 2.0 3.0 4.0 5.0 ‖ 6.0 7.0 8.0 9.0 10.0"
    got = script.pooling(f"nothing\n1. *Pooling ablation*: attentive {five}; **mean {five}; max {five}**.")
    assert list(got) == ["attentive", "mean", "max"] and got["max"]["event"]["Type@AV"] == 9.0
    assert [REAL["pooling"][k]["segment"]["Type@AV"] for k in got] == [54.0, 52.8, 17.4]


# --- the tests ---------------------------------------------------------------------------------------------------------

def real_record(i):
    "A run record with the curves of a real run, its test score two points below the best epoch"
    r = invented_record(i + 1, method="han", scale="small")
    val, loss = REAL["han"]["val"][i], REAL["han"]["loss"][i]
    r["history"] = [{"epoch": e, "loss": {"a": x / 2, "b": x / 2}, "val": {rz.VAL: v}} for e, (v, x) in enumerate(zip(val, loss), 1)]
    r["selection"] = {"metric": rz.VAL, "epoch": int(np.argmax(val)) + 1}
    for rule in r["metrics"].values(): rule["segment"]["Type@AV"] = max(val) - 2
    r["spec"], r["data"]["n"] = {**r["spec"], "recipe": {"step": 10}}, {"train": 10_000, "val": 649, "test": 1200}
    return {**r, "key": f"han-real{i}"}


def scored(label, score, seeds=(1, 2, 3)):
    "Runs of a label with a given test score"
    out = []
    for s in seeds:
        r = real_record(s)
        for rule in r["metrics"].values(): rule["segment"]["Type@AV"] = score + s / 100
        out.append({**r, "key": f"{label}-{s}"})
    return out


@pytest.fixture
def found():
    "What reported runs would look like as records"
    pooling = {k: v["segment"]["Type@AV"] for k, v in REAL["pooling"].items()}
    han = [real_record(i) for i in range(4)]
    base = [r["metrics"]["han"]["segment"]["Type@AV"] - 17.9 for r in han]
    def moved(label, offset):
        out = [json.loads(json.dumps(r)) for r in han]
        for r, b in zip(out, base):
            r["key"] += label
            for rule in r["metrics"].values(): rule["segment"]["Type@AV"] = b + offset
        return out
    near = moved("mean", 17.9 - 1.2)
    return {"HAN": han, "mean pooling": near, "max pooling": scored("max", pooling["max"]), rz.SPOKEN: moved("speech", 0),
            rz.SPOKEN + rz.AGAIN: moved("again", -2.9)}


def verdicts(found): return {o.test: o.verdict for o in rz.outcomes(found)}


def test_the_real_runs_pass(found):
    asked = {k: v for k, v in verdicts(found).items() if v != rz.BESIDE}
    assert len(asked) == 12 and all(v.startswith("pass") for v in asked.values()), asked


WRONG = {   # what is changed in each run of HAN -> which test fails
    "(i)": lambda r: r["history"][0]["val"].update({rz.VAL: 30.}),
    "(ii)": lambda r: r["history"][10]["val"].update({rz.VAL: r["history"][9]["val"][rz.VAL] - 1}),
    "(iii)": lambda r: r["history"][-1]["val"].update({rz.VAL: 45.}),
    "(iv)": lambda r: [h["val"].update({rz.VAL: h["val"][rz.VAL] + 10 * (r["spec"]["seed"] - 1)}) for h in r["history"]],
    "(v) loss at epoch 1": lambda r: r["history"][0].update(loss={"a": .8}),
    "(v) loss at epoch 10": lambda r: r["history"][9].update(loss={"a": .2}),
    "(v) loss at epoch 40": lambda r: r["history"][39].update(loss={"a": .4}),
    "(vi)": lambda r: [x["segment"].update({"Type@AV": x["segment"]["Type@AV"] + 4}) for x in r["metrics"].values()]}


@pytest.mark.parametrize("name", WRONG)
def test_each_test_of_a_run_can_fail(found, name):
    for r in found["HAN"]: WRONG[name](r)
    said = next(v for k, v in verdicts(found).items() if k.startswith(name))
    assert said.startswith("fail"), said


@pytest.mark.parametrize("label, score, test", [("mean pooling", 40., "(vii) attentive"), ("max pooling", 40., "(vii) max"),
                                                (rz.SPOKEN, 50., "(viii) HAN minus"), (rz.SPOKEN + rz.AGAIN, 36., "(viii) MA retrained")])
def test_each_blind_test_can_fail(found, label, score, test):
    found[label] = scored(label, score)
    said = next(v for k, v in verdicts(found).items() if k.startswith(test))
    assert said.startswith("fail"), said


def test_what_cant_be_decided_is_never_a_pass(found):
    few = {k: rs[:1] for k, rs in found.items()}
    assert verdicts(few)["(iv) deviation over seeds, points"] == "undecided: 1 seed, at least 3 are needed"
    short = json.loads(json.dumps(found))
    for rs in short.values():
        for r in rs: r["data"]["n"]["train"], r["history"] = 4000, r["history"][:20]
    got = {o.test: o for o in rz.outcomes(short)}
    course = [o for o in got.values() if o.test.startswith(("(i)", "(ii)", "(iii)", "(v)"))]
    assert len(course) == 6 and {o.verdict for o in course} == {"undecided: 4,000 of 10,000 videos, 20 of 40 epochs"}
    assert rz.told(got["(iv) deviation over seeds, points"]).endswith("on 4,000 of 10,000 videos, 20 of 40 epochs")
    assert math.isnan(got["(v) loss at epoch 40"].simulated.mean)
    tiny = json.loads(json.dumps(found))
    for rs in tiny.values():
        for r in rs: r["spec"]["scale"] = "tiny"
    assert {v for v in verdicts(tiny).values() if v != rz.BESIDE} == {"undecided: scale tiny"}
    assert not any(v.startswith("pass") for v in verdicts({}).values())


def test_one_run_borrows_the_spread_of_real_runs(found):
    few = {k: rs[:1] for k, rs in found.items()}
    first, *_, gap = [o for o in rz.outcomes(few) if o.test.startswith(("(i)", "(vi)"))]
    assert first.simulated.lent and "~[" in first.simulated.text() and gap.simulated.lent
    alone = next(o for o in rz.outcomes(few) if o.test.startswith("(vii) max"))
    assert math.isnan(alone.simulated.low) and alone.verdict == "pass, not certain"


def test_the_table_and_the_findings_say_what_is_what(found):
    table = rz.realism_table({"full": found})
    assert "as reported by third parties" in table.to_markdown() and "invented" in table.to_markdown()
    assert sum(s in " ".join(table.notes) for s in REAL["sources"].values()) == len(REAL["sources"])
    said = rz.realism_findings({"full": found})
    assert said[0].startswith("Of 12 lines ") and said[0].endswith("0 are undecided.") and len(said) == 13
    with pytest.raises(InputError, match="nothing to test"): rz.realism_table({"full": {}})


# --- the subset of LLP -------------------------------------------------------------------------------------------------

SPEECH = DataSpec(settings={"train_with": "Speech", "train_most": 50})


def test_a_subset_changes_training_videos_only_and_no_other_key():
    whole, part = (load_data(d, "tiny", None) for d in (DataSpec(), SPEECH))
    assert len(part["train"]) == 50 and part["train"].weak[:, CLASSES.index("Speech")].all()
    assert set(part["train"].ids) < set(whole["train"].ids)
    for k in ("val", "test"): assert part[k].ids == whole[k].ids and (part[k].audio == whole[k].audio).all()
    plain, own = identify(DataSpec(), None)[0], identify(SPEECH, None)[0]
    assert own == plain | {"train_with": "Speech", "train_most": 50}
    assert run_key(RunSpec(), plain) == "han-651386fef77dad7b", "the key of a committed run"
    default = DataSpec(settings={"train_with": "", "train_most": 0})
    assert default == DataSpec() and identify(default, None)[0] == plain


@pytest.mark.parametrize("settings, message", [({"train_with": "Speach"}, "did you mean 'Speech'"), ({"train_most": -3}, "train_most: -3"),
                                               ({"train_wiht": "Speech"}, "did you mean 'train_with'"), ({"train_most": 1.5}, "train_most")])
def test_an_impossible_subset_is_refused_before_any_work(settings, message, tmp_path):
    with pytest.raises(InputError, match=re.escape(message)): run(RunSpec(data=DataSpec(settings=settings), scale="tiny"), tmp_path / "s")
    assert not (tmp_path / "s" / "records").exists()


def test_the_runs_of_the_page_are_found_in_any_folder(tmp_path):
    specs = {"HAN": rz.realism_specs("tiny", [1])["HAN"]}
    store = Store(tmp_path / "s")
    assert absent(specs, runs_in(specs, [tmp_path])) == specs["HAN"]
    key = run_key(specs["HAN"][0], identify(DataSpec(), None)[0])
    committed = ROOT / "figures" / "records" / f"{key}.json"
    store.record_path(key).parent.mkdir(parents=True)
    store.record_path(key).write_bytes(committed.read_bytes())
    got = runs_in(specs, [tmp_path / "none", tmp_path])
    assert [r["key"] for r in got["HAN"]] == [key] and not absent(specs, got)


# --- vectors, calibration, picture -------------------------------------------------------------------------------------

def test_vector_statistics_know_sparsity_rank_and_memory():
    rng = np.random.default_rng(0)
    thin = rng.standard_normal((60, 10, 3)) @ rng.standard_normal((3, 20))
    got = rz.vector_statistics(thin)
    assert got["effective rank"] < 3.001 and got["explained"][2] > .999 and abs(got["autocorrelation"][1]) < .1
    still = np.repeat(rng.standard_normal((60, 1, 20)), 10, 1)
    assert rz.vector_statistics(still)["autocorrelation"] == [1.0] * 10 and rz.vector_statistics(still)["within clips"] == 0
    assert rz.vector_statistics(np.maximum(thin, 0))["zeros"] == pytest.approx((thin < 0).mean(), abs=1e-4)


def test_the_calibration_is_compared_with_three_real_rows():
    found = imitated({"print": printed_han(), "best": REAL["han"]["best"]["mean"], "last": REAL["han"]["last"]["mean"]})
    assert [found.loc[r, k].sum() for r, k in (("print", "printed test row"), ("best", "real validation, best epoch"),
                                               ("last", "real validation, last epoch"))] == [0, 0, 0]
    assert "best epoch (0.0 points off)" in nearest(found, "best")
    record = json.loads((ROOT / "figures" / "records" / "han-e453ba0500767ebc.json").read_text())
    val, test = rows_of(record).values()
    assert val["segment"]["Type@AV"] == pytest.approx(record["history"][3]["val"][rz.VAL])
    assert test["segment"]["Type@AV"] == pytest.approx(record["metrics"]["han"]["segment"]["Type@AV"])


def test_the_picture_has_its_panels_also_where_little_was_run(found):
    vectors = rz.vector_statistics(np.random.default_rng(0).random((20, 10, 128)))
    for by_scale in ({"full": found}, {"full": {}, "small": {"HAN": found["HAN"][:1]}}, {}):
        assert len(plot_realism(by_scale, vectors, "simulated toy").axes) == 8


# --- the page ----------------------------------------------------------------------------------------------------------

def test_the_page_reads_records_and_trains_nothing_unasked(tmp_path):
    out = tmp_path / "realism.ipynb"
    done = papermill(ROOT / "nbs" / "realism.ipynb", out, "-p", "out", tmp_path / "runs")
    assert done.returncode == 0, done.stderr[-6000:]
    text = json.dumps([c.get("outputs", []) for c in Notebook(out).cells])
    assert "nothing is trained" in text and "What we found" in text and "as reported by third parties" in text
    assert not (tmp_path / "runs" / "weights").exists()
    saved = {p.stem for p in (tmp_path / "runs").rglob("*.json")}
    assert {"realism", "realism_vectors", "realism_calibration"} <= saved


@pytest.mark.parametrize("bad, message", [("scales: [smal]", "did you mean 'small'"), *(pytest.param(*x, marks=pytest.mark.slow) for x in (
    ("train: [tiny]", "train: 'tiny' is not possible"), ("seeds: []", "no seeds"), ("scale: small", "did you mean 'scales'")))])
def test_the_page_refuses_wrong_parameters(bad, message, tmp_path):
    done = papermill(ROOT / "nbs" / "realism.ipynb", tmp_path / "x.ipynb", "-p", "out", tmp_path / "runs", "-y", bad)
    assert done.returncode and message in done.stderr, done.stderr[-2000:]


def test_the_page_ends_on_findings():
    nb = Notebook(ROOT / "nbs" / "realism.ipynb")
    heads = [line for s in nb.of("markdown") for line in s.splitlines() if line.startswith("## ")]
    assert heads[-2:] == ["## Your numbers beside the committed ones", "## What we found"]
