"""The printed table of the field: its file against itself, the four papers and hand-copied rows; tracks, tables, the picture."""
import re

import pandas as pd
import pytest

import avvp_nb.methods.deep
import avvp_nb.methods.uwav  # noqa: F401
from avvp_nb.core import InputError, asset
from avvp_nb.counts import LEVELS, STANDARD
from avvp_nb.metrics import RULES
from avvp_nb.results import field as F
from avvp_nb.results.reported import reported


def row(track, method, variant="", level="segment"): return F.field(track).loc[(method, variant, level)].tolist()


@pytest.mark.parametrize("key, want", [
    (("teacher", "uwav"), [64.2, 70.0, 63.4, 65.9, 63.9]), (("teacher", "uwav", "", "event"), [58.6, 66.7, 57.5, 60.9, 57.4]),
    (("teacher", "mug", "", "event"), [59.5, 63.9, 55.3, 59.6, 57.7]), (("classic", "deep"), [62.1, 64.3, 57.8, 61.4, 60.3]),
    (("classic", "deep_refined", "", "event"), [55.2, 64.3, 52.6, 57.3, 54.4]), (("clip", "nrep"), [70.2, 70.9, 64.4, 68.5, 68.8]),
    (("clip", "ecma", "", "event"), [54.5, 66.6, 53.5, 58.2, 54.3]), (("labels", "uwav"), [78.4, 74.5, 65.5, 72.8, 78.4])])
def test_rows_copied_by_hand(key, want):
    assert row(*key) == want


def test_the_file():
    raw = pd.read_csv(asset("field.csv"), dtype=str, keep_default_na=False)
    assert list(raw) == ["track", "method", "variant", "dataset", "venue", "year", "level", *STANDARD, "kind", "source", "note"]
    assert set(raw["level"]) == set(LEVELS) and set(raw["kind"]) == set(F.KINDS) and set(raw["track"]) == {*F.TRACKS, *F.ASIDE}
    assert all(re.fullmatch(r"\d\d\.\d|", x) for m in STANDARD for x in raw[m]) and (raw[list(STANDARD)] != "").any(axis=1).all()
    assert (raw["source"] != "").all() and not raw["source"].str.contains(r"\bid\b|index", regex=True).any()
    one_source = raw.groupby(["track", "method", "variant"])[["source", "kind", "note", "dataset"]].nunique()
    assert (one_source == 1).all(axis=None)


def test_the_copy_may_be_changed():
    a = F.field_lines()
    a["A"] = 0
    assert F.field_lines()["A"].max() > 0


def test_unknown_tracks():
    for f in (F.field_lines, F.field, F.field_table, F.best):
        with pytest.raises(InputError, match="did you mean 'classic'"): f("clasic")
    with pytest.raises(InputError, match="track: 'all'"): F.plot_field(("all",))


def test_means_that_are_none():
    found = F.broken(F.field())
    assert found[("ppl", "", "event")] == pytest.approx(1.2667, abs=1e-3) and len(found) == 6
    clean = pd.DataFrame([[60., 50., 40., 50.1, 0.], [60., 50., 40., 50.2, 0.], [60., 50., float("nan"), 70., 0.]], columns=STANDARD)
    assert list(F.broken(clean).index) == [1]
    flagged = {(r.info["method"], l) for t in F.TRACKS for r in F.field_rows(t) for l, _ in r.flags}
    assert ("ppl", "event") in flagged and ("uwav", "event") not in flagged and ("ppl", "segment") not in flagged


def test_coleaf_stands_where_its_numbers_were_made():
    "UWAV's row is CoLeaF's Table 7 (labels of VALOR), E-CMA's is its Table 6 (classic features, selected thresholds)"
    seven = reported("coleaf", 7, "coleaf").droplevel(["paper", "table", "method", "variant"])
    assert (F.field("teacher").xs(("coleaf", ""), level=["method", "variant"]) == seven.loc[list(LEVELS), list(STANDARD)]).all(axis=None)
    six = reported("coleaf", 6, "coleaf", variant="thresholds=selected").droplevel(["paper", "table", "method", "variant"])
    assert row("classic", "coleaf", "thresholds=selected") == six.loc["segment", list(STANDARD)].tolist()
    same = F.repeats()
    assert {("teacher", "coleaf", ""), ("teacher", "valor", ""), ("classic", "dhhn", "labels=smoothed")} <= set(same.index)
    assert (same["difference"] <= .05).all() and len(F.repeats(limit=6)) > len(same)


def test_the_best_of_each_column():
    t = F.best("teacher")
    assert t.loc[("segment", "Event@AV")].tolist() == [64.7, "MUG"] and t.loc[("event", "Event@AV")].tolist() == [57.9, "PPL"]
    assert t.loc[("segment", "A")].tolist() == [65.9, "PPL"] and t.loc[("event", "A")].tolist() == [59.5, "MUG"]
    assert set(F.best("free")["by"]) == {"lasso re-weighting"}                                # AV2A scores in its own way
    assert list(F.best("unav100").index) == [("segment", "AV"), ("event", "AV")]


@pytest.mark.parametrize("track", [*F.TRACKS, *F.ASIDE])
def test_tables(track, tmp_path):
    t = F.field_table(track)
    heights = [F.height(r) for r in t.rows]
    assert heights == sorted(heights, reverse=True) and t.mark == "" and all(r.kind == "printed" for r in t.rows)
    assert t.notes[-1].startswith("Reported by others") and all(r.source for r in t.rows)
    for r in t.rows:
        if r.info.get("note"): assert any(r.info["note"] in n for n in t.notes)
    assert all(any(k in r.mean for r in t.rows) for k in t.columns)
    paths = t.save(tmp_path/track)
    assert len(paths) == 5 and "†" in t.to_markdown() or not any(r.flags for r in t.rows)


def test_the_papers_own_rows():
    t = F.field_table("classic")
    assert len(t) == len(F.field_table("classic", papers=False)) + len(F.PAPER_ROWS)
    assert t.row("HAN", "printed").mean["segment", "Type@AV"] == 54.0 and "Table 1" in t.row("HAN", "printed").source
    assert "Ao" not in {m for _, m in t.columns}
    assert len(F.field_table("teacher")) == len(F.field_rows("teacher"))


def test_what_is_trained_here():
    assert F.trained_here("han") == "yes" and F.trained_here("uwav") == F.trained_here("deep_refined") == "reconstruction"
    assert F.trained_here("ppl") == ""
    assert F.field_table("teacher").row("UWAV", "printed").mean[F.HERE] == "reconstruction"
    assert F.HERE not in F.field_table("clip").columns and F.HERE not in F.field_table("labels").columns
    for method in ("deep", "deep_refined", "uwav", "uwav_hard", "uwav_soft", "uwav_reweight", "uwav_mixup"): assert method in set(F.field_lines()["method"])


def test_names():
    assert F.field_name("cvcms", "labels=refined") == "CVCMS (labels=refined)" and F.field_name("av2a") == "AV²A"
    assert not {F.field_name(m) for m in F.field_lines()["method"]} & set(F.UNREAD)


def test_the_picture():
    label = F.plot_field().get_label()
    assert "classic features, external teacher: 10 printed, up to 65.9 (UWAV)" in label and "NREP" in label
    assert "Event" not in label and "up to 68.8 (NREP)" in F.plot_field(("clip",), ("segment", "Event@AV")).get_label()
    with pytest.raises(InputError, match="clip: nothing is printed for event Ao"): F.plot_field(("clip",), ("event", "Ao"))


def test_the_rules_of_the_field_are_there():
    assert {"nrep", "leap", "mmcse"} <= set(RULES)
