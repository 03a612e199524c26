"""Your numbers beside the committed ones: what is compared, what is usual, the same seed twice, the sentence, the command."""
import argparse
import copy
import math

import numpy as np
import pytest
from test_reproduce import record_of
from tree import ROOT

from avvp_nb.core import InputError, read_json, write_json
from avvp_nb.data.sources import DataSpec
from avvp_nb.records.store import Store
from avvp_nb.results import verify as V
from avvp_nb.results.rows import system_of


def of(method, seeds=(1, 2, 3), scale="small", dataset="llp", **kw):
    return [record_of(system_of(method).spec(s, scale, DataSpec(dataset=dataset)), **{"noise": 0.4, **kw}) for s in seeds]


def moved(record, points, loss=0.0):
    "The same run with other rounding"
    r = copy.deepcopy(record)
    for levels in r["metrics"].values():
        for row in levels.values():
            for m in row: row[m] += points
    r["history"][0]["loss"]["audio"] += loss
    return r | {"wall_time": 77.0}


def shifted(records, points): return [moved(r, points) for r in records]


def test_the_committed_records_verify_themselves():
    got = V.verify(V.committed_folder())
    assert got.within is True and all(r.mean["", "difference"] == 0 for r in got.table.rows) and len(got.sentences) == 1
    committed = [read_json(p) for p in sorted((ROOT / "figures" / "records").glob("*.json"))]
    assert sum(r.mean["seeds", "yours"] for r in got.table.rows) == len(committed)


def test_a_gap_is_measured_against_the_pooled_variance_by_hand():
    ref = of("han") + of("ma")
    a, b = ([V.score_of(r) for r in rs] for rs in (ref[:3], ref[3:]))
    s = math.sqrt((np.var(a, ddof=1) * 2 + np.var(b, ddof=1) * 2) / 4)
    mine = moved(ref[0], 0.7)
    got = V.verify([mine], ref)
    s = math.sqrt((np.var(a, ddof=1) * 2 + np.var(b, ddof=1) * 2 + 0) / 4)
    row = got.table.rows[0].mean
    assert row["", "usual, ±"] == pytest.approx(2.77645 * s * math.sqrt(1 + 1 / 3), rel=1e-4)
    assert row["", "difference"] == pytest.approx(V.score_of(mine) - np.mean(a)) and row["seeds", "yours"] == 1


@pytest.mark.parametrize("points, within", [(0.0, True), (0.3, True), (30.0, False), (-30.0, False)])
def test_one_sentence_says_within_or_not(points, within):
    got = V.verify(shifted(of("han") + of("ma"), points), of("han") + of("ma"))
    assert got.within is within and got.sentences[0].startswith("Within the spread" if within else "Not within the spread")
    assert {r.mean["", "within"] for r in got.table.rows} == ({"yes"} if within else {"no"})
    if not within: assert "HAN by" in got.sentences[0] and "MA by" in got.sentences[0]
    for text in (got.to_markdown(), got._repr_html_(), repr(got)): assert got.sentences[0] in text


def test_one_in_twenty_is_outside_by_chance():
    rng, outside = np.random.default_rng(0), 0
    base = of("han", noise=0)
    for _ in range(120):
        ref = [moved(r, x - 2 * r["seed"]) for r, x in zip(base, rng.normal(0, 1, 3))]
        new = [moved(base[0], rng.normal(0, 1) - 2)]
        outside += V.verify(new, ref).within is False
    assert outside <= 14, outside


def test_what_was_never_repeated_cannot_be_told():
    got = V.verify(of("han", (1,)), of("han", (1,)))
    assert got.within is None and "what is usual is unknown" in got.sentences[0] and got.table.rows[0].mean["", "within"] == "unknown"


def test_scales_and_data_are_kept_apart():
    ref = of("han") + of("han", scale="tiny", gain=-20.0) + of("han", dataset="unav100", gain=5.0)
    got = V.verify(shifted(ref, 0.1), ref)
    assert len(got.table) == 3 and got.within
    with pytest.raises(InputError, match="none of these experiments"): V.verify(of("han", scale="full"), ref)
    with pytest.raises(InputError, match="none of these experiments"): V.verify(of("jomold"), ref)


def test_the_same_seed_on_two_machines_is_said():
    ref = of("han")
    got = V.verify([moved(ref[0], 1.0, 3e-6), *ref[1:]], ref)
    assert got.sentences[1] == ("1 run with the same seed differ by up to 3e-06 in the loss of the first epoch and 1.0 points in the end: "
                                "rounding that grows in training, not an error.")
    assert "to the last digit" in V.machines_text(V.same_seeds([moved(ref[0], 0.0)], ref))
    assert V.same_seeds(ref, ref) == [], "the same records are no second machine"


@pytest.mark.parametrize("how", ["store", "folder", "records", "file", "list"])
def test_records_come_from_anywhere(tmp_path, how):
    ref = of("han")
    for r in ref: write_json(r, Store(tmp_path).record_path(r["key"]))
    source = {"store": Store(tmp_path), "folder": str(tmp_path), "records": tmp_path / "records",
              "file": Store(tmp_path).record_path(ref[0]["key"]), "list": ref}[how]
    assert len(V.records_of(source)) == (1 if how == "file" else 3)


def test_bad_sources_are_refused(tmp_path):
    for source, said in ((tmp_path / "no", "does not exist"), (tmp_path, "no run records"), ([], "no run records")):
        with pytest.raises(InputError, match=said): V.records_of(source)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"): V.records_of(tmp_path)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(InputError, match="not a whole run record"): V.records_of(tmp_path)


def test_outside_of_a_checkout_a_reference_has_to_be_named(tmp_path, monkeypatch):
    monkeypatch.setattr(V.avvp_nb, "__file__", str(tmp_path / "avvp_nb" / "__init__.py"))
    with pytest.raises(InputError, match="name a folder of records"): V.verify(of("han"))
    assert V.your_numbers(of("han")).startswith("Nothing to compare with")


def test_the_cell_of_an_experiment():
    ref = of("han")
    assert V.your_numbers(of("jomold"), ref).startswith("None of these experiments is committed")
    assert V.your_numbers(ref + of("jomold"), ref).within and len(V.your_numbers(ref + of("jomold"), ref).table) == 1
    with pytest.raises(InputError, match="no run records"): V.your_numbers([], ref)


def test_the_command(tmp_path, capsys):
    p, ref = argparse.ArgumentParser(), of("han")
    V.add_verify_arguments(p)
    for name, rs in (("mine", shifted(ref, 0.1)), ("ref", ref), ("off", shifted(ref, 40.0))):
        for r in rs: write_json(r, Store(tmp_path / name).record_path(r["key"]))
    codes = [V.cmd_verify(p.parse_args([str(tmp_path / n), "--reference", str(tmp_path / "ref")])) for n in ("mine", "off")]
    out = capsys.readouterr().out
    assert codes == [0, 1] and out.startswith("Within the spread") and "| HAN | simulated, small |" in out and str(tmp_path) not in out


def test_runs_made_twice():
    "By hand: differences 1, -1, 2 points; half their mean square is 1"
    before = of("han")
    again = [moved(r, x, loss=1e-6) for r, x in zip(before, (1.0, -1.0, 2.0))]
    table, text = V.repeats_table(again, before, notebook="x"), V.repeats_text(again, before)
    assert [r.mean["score", "difference"] for r in table.rows] == pytest.approx([1.0, -1.0, 2.0])
    assert [r.mean["loss, epoch 1", "difference"] for r in table.rows] == ["1e-06"] * 3
    assert text in table.notes and text.startswith("3 runs were made twice with the same seed. Where") and "up to 2.0 points" in text
    sd = np.std([V.score_of(r) for r in again], ddof=1)
    assert text.endswith(f"is 1.0 points over such repeats, and {sd:.1f} over seeds of the same experiments.")
    assert table.provenance["runs"] == [r["key"] for r in again] and table.provenance["notebook"] == "x"


def test_one_run_made_twice_has_no_spread_over_seeds():
    before = of("han", (1,))
    text = V.repeats_text([moved(before[0], 2.0)], before)
    assert text.startswith("1 run was made twice") and text.endswith(f"is {2 ** .5:.1f} points over such repeats.")


def test_repeats_that_agree_are_counted_and_left_out_of_the_spread():
    before = of("han")
    text = V.repeats_text([before[0], moved(before[1], 2.0), moved(before[2], -2.0)], before)
    assert text.startswith("3 runs were made twice with the same seed; 1 came out the same to the last digit. ")
    assert f"is {2 ** .5:.1f} points over such repeats, and " in text
    same = V.repeats_table(before, before)
    assert {r.mean["loss, epoch 1", "difference"] for r in same.rows} == {"0"} and same.notes[0].endswith("the same to the last digit.")


def test_runs_of_other_keys_are_no_repeats():
    with pytest.raises(InputError, match="no run was made twice"): V.repeats_table(of("han", (4,)), of("han"))
