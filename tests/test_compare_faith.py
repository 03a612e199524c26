"""What an entry says of a method shows in every table: signs with footnotes, one modality alone, control rows."""
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from test_reproduce import MARK, record_of

from avvp_nb.core import InputError
from avvp_nb.counts import LEVELS, METRICS, ONLY, STANDARD
from avvp_nb.methods.method import FAITH
from avvp_nb.methods.zoo import METHODS
from avvp_nb.results import compare as C
from avvp_nb.results import plans as P
from avvp_nb.results import rows as W
from avvp_nb.results import rules as L
from avvp_nb.results.groups import scores
from avvp_nb.results.reported import AVG, reported
from avvp_nb.results.table import columns_of

OF = {faith: sorted(n for n, m in METHODS.items() if m.faith == faith) for faith in FAITH}      # names by grade
ALONE = {n: m.modalities.upper() for n, m in METHODS.items() if m.modalities != "av"}           # name: the only modality
NOTE = {faith: f"{sign} Ours is {FAITH[faith]}." for faith, sign in C.SIGNS.items() if sign}


def of(row, seeds=(1, 2), **kw):
    "Records with invented numbers of the system behind a printed row"
    return [record_of(W.system_of(row).spec(s, "tiny"), noise=1.0, **kw) for s in seeds]


def real(records):
    "The same numbers as if they had been measured on real features, where differences to printed ones are shown"
    return [r | {"data": r["data"] | {"simulated": False, "mark": ""}} for r in records]


def note(faith): return [NOTE[faith]] if faith in NOTE else []


def notes_of(table): return [n for n in table.notes if n in NOTE.values()]


def sources(table): return [r.source.split(",")[0] for r in table.rows if r.kind == "ours"]


# ---------------------------------------------------------------- signs

def test_each_grade_has_a_sign_of_its_own_and_some_method():
    assert set(C.SIGNS) == set(FAITH) and len(set(C.SIGNS.values())) == len(FAITH)
    assert C.SIGNS["code"] == "" and all(OF.values()) and "†" not in C.SIGNS.values(), "† is for doubtful printed numbers"
    assert {"han", "ma", "jomold", "cmpae", "coleaf"} <= set(OF["code"]) and "dgm" in OF["reconstruction"]


@pytest.mark.parametrize("row, faith", [("han", "code"), ("coleaf", "code"), ("dgm+msdu", "reconstruction"), ("talnet", "reconstruction"),
                                        ("ave", "reconstruction"), ("avsdn", "stand-in"), ("cvcms", "stand-in"), ("han+jocor", "stand-in")])
def test_the_sign_of_a_row_is_that_of_its_entry(row, faith):
    records = of(row)
    found = C.our_row("x", records)
    assert found.source == f"ours{C.SIGNS[faith]}, simulated, tiny, 2 seeds" and found.info["faith"] == faith == C.faith_of(records[0])


def test_every_method_can_stand_in_a_table():
    for name, method in METHODS.items():
        record = of("han", (1,))[0]
        record["spec"] |= {"method": name, "options": {}}
        found = C.ours({name: record})
        assert sources(found) == ["ours" + C.SIGNS[method.faith]] and notes_of(found) == note(method.faith), name


def test_a_method_that_is_not_at_hand_has_no_sign_and_all_its_columns():
    record = of("talnet", (1,))[0]
    record["spec"]["method"] = "of_somebody_else"
    row = C.our_row("x", [record])
    assert C.faith_of(record) == "" and row.source.startswith("ours, ") and AVG in row.mean and C.faith_notes([row]) == []


@pytest.mark.parametrize("rows, wanted", [
    (["han"], []), (["han", "ma"], []), (["han", "dgm+msdu"], ["reconstruction"]), (["cvcms", "han"], ["stand-in"]),
    (["dgm+msdu", "stpn"], ["reconstruction"]), (["avsdn", "dgm+msdu", "han"], ["reconstruction", "stand-in"])])
def test_a_footnote_stands_only_under_its_sign_and_once(rows, wanted):
    groups = {r: of(r) for r in rows}
    for table in (C.ours(groups), C.compare(groups), L.cross_table(groups), L.only_table(groups), L.selection_effect(groups)):
        text = " ".join(r.source for r in table.rows)
        assert notes_of(table) == [NOTE[k] for k in wanted]
        assert [k for k, s in C.SIGNS.items() if s and s in text] == wanted
    for name, records in groups.items(): assert notes_of(C.rules_table(records)) == note(C.faith_of(records[0])), name


def test_printed_rows_differences_and_floors_have_no_sign():
    table = C.compare({"AVSDN": real(of("avsdn"))}, {"AVSDN": reported("han", 1, "avsdn")})
    by = {kind: {r.source for r in table.rows if r.kind == kind} for kind in ("ours", "printed", "difference", "floor")}
    assert all(by.values()) and [kind for kind, found in by.items() if any("§" in s for s in found)] == ["ours"]


def test_a_stack_keeps_each_footnote_once():
    parts = [C.compare({r: of(r)}, floors=False) for r in ("dgm+msdu", "cvcms", "dgm", "han")]
    assert notes_of(C.stack(parts)) == [NOTE["reconstruction"], NOTE["stand-in"]] and notes_of(C.stack(parts[-1:])) == []


# ---------------------------------------------------------------- in every format

class Reader(HTMLParser):
    "The text of an HTML fragment, which has to be balanced"
    def __init__(self, text):
        super().__init__()
        self.text, self.open = "", []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs): self.open += [tag] * (tag not in ("br", "meta"))
    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, data): self.text += data


@pytest.fixture
def table(monkeypatch):
    "All three grades, with texts that every format has to escape"
    monkeypatch.setitem(FAITH, "reconstruction", "50 % of <R&D>_1")
    monkeypatch.setitem(FAITH, "stand-in", r"a {stand-in} of $0 & \more")
    return C.compare({"HAN": of("han"), "DGM": of("dgm+msdu"), "CVCMS": of("cvcms")}, caption="Three grades")


def test_markdown_shows_sign_and_note(table):
    text = table.to_markdown()
    assert "| HAN | ours, simulated" in text and "| DGM | ours‡, simulated" in text and "| CVCMS | ours§, simulated" in text
    assert text.count("‡") == text.count("§") == 2 and "\n‡ Ours is 50 % of <R&D>_1.\n" in text
    assert "\n§ Ours is a {stand-in} of $0 & \\more.\n" in text


def test_html_shows_sign_and_note(table):
    text = table.to_html()
    assert ">ours‡, simulated, tiny, 2 seeds<" in text and ">ours§, simulated, tiny, 2 seeds<" in text
    assert "‡ Ours is 50 % of &lt;R&amp;D&gt;_1." in text and "<R&D>" not in text
    read = Reader(text).text
    assert "‡ Ours is 50 % of <R&D>_1." in read and "§ Ours is a {stand-in} of $0 & \\more." in read
    assert read.count("‡") == read.count("§") == 2


def test_latex_shows_sign_and_note(table):
    text = table.to_latex()
    assert text.isascii() and text.count(r"$^\ddagger$") == text.count(r"$^{\S}$") == 2
    assert r"DGM & ours$^\ddagger$, simulated" in text and r"CVCMS & ours$^{\S}$, simulated" in text
    assert r"\footnotesize $^\ddagger$ Ours is 50 \% of \textless{}R\&D\textgreater{}\_1." in text
    assert r"\footnotesize $^{\S}$ Ours is a \{stand-in\} of \$0 \& \textbackslash{}more." in text
    bare = re.sub(r"\\[{}$&%#_\\]", "", text)
    assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0


def test_csv_keeps_the_sign_and_has_no_notes(table):
    lines = table.to_csv().splitlines()
    assert len(lines) == 1 + len(table.rows) and sum("ours‡" in x for x in lines) == sum("ours§" in x for x in lines) == 1


def test_saved_files_carry_the_notes(table, tmp_path):
    table.save(tmp_path / "t")
    for suffix, note in ((".md", "‡ Ours is 50 % of <R&D>_1."), (".html", "‡ Ours is 50 % of &lt;R&amp;D&gt;_1."),
                         (".tex", r"$^\ddagger$ Ours is 50 \% of \textless{}R\&D\textgreater{}\_1.")):
        assert note in (tmp_path / f"t{suffix}").read_text(encoding="utf-8")


# ---------------------------------------------------------------- one modality

def test_there_are_systems_of_either_modality():
    assert {ALONE[n] for n in ("kong", "talnet")} == {"A"} and {ALONE[n] for n in ("stpn", "cmcs")} == {"V"}


@pytest.mark.parametrize("row", ["kong2018", "talnet", "stpn", "cmcs"])
def test_a_system_of_one_modality_has_scores_of_that_one_only(row):
    records, printed = of(row), reported("han", 1, row)
    m = ALONE[records[0]["spec"]["method"]]
    cells = scores(records[0])
    assert {k[1] for k in cells} == {*METRICS, AVG[1]}, "the record holds all of them"
    assert C.own_part(records[0], cells) == {(lv, m): cells[lv, m] for lv in LEVELS}
    table = C.compare({"x": real(records)}, {"x": printed})
    own, ref, diff = (table.row("x", k) for k in ("ours", "printed", "difference"))
    assert set(own.mean) == set(own.sd) == set(ref.mean) == set(diff.mean) == {(lv, m) for lv in LEVELS}
    for lv in LEVELS:
        assert own.mean[lv, m] == pytest.approx(np.mean([r["metrics"][r["rule"]][lv][m] for r in records]))
        assert diff.mean[lv, m] == pytest.approx(own.mean[lv, m] - ref.mean[lv, m])
    assert [len(r.mean) for r in table.rows if r.kind == "floor"] == [len(METRICS) * 2 + 1] * 2, "floors have all columns"


@pytest.mark.parametrize("other", ["han", "dgm+msdu"])
def test_beside_other_rows_the_remaining_cells_are_empty(other):
    table = C.compare({"TALNet": of("talnet"), "STPN": of("stpn"), "other": of(other)}, floors=False)
    assert table.columns == [(lv, m) for lv in LEVELS for m in STANDARD] + [AVG] and AVG in table.row("other").mean
    frame = table.frame
    for name, m in (("TALNet", "A"), ("STPN", "V")):
        line = frame.xs(name).iloc[0]
        assert set(line.dropna().index) == {(lv, m) for lv in LEVELS} and np.isnan(line[AVG])
    cells = next(x for x in table.to_markdown().splitlines() if x.startswith("| TALNet")).split("|")[3:-1]
    assert [c.strip() == "–" for c in cells] == [m != "A" for _, m in table.columns]


def test_columns_of_such_rows_alone_are_their_modality():
    rows = [C.our_row("x", of("talnet"))]
    assert columns_of(rows) == [(lv, "A") for lv in LEVELS] and AVG not in rows[0].mean


def test_a_common_rule_does_not_bring_the_other_modality_back():
    for rule in ("han", "jomold"):
        row = C.ours({"x": of("cmcs")}, rule=rule).rows[0]
        assert set(row.mean) == {(lv, "V") for lv in LEVELS} and row.info["rule"] == rule
    rules = C.rules_table(of("cmcs"))
    assert len(rules.rows) > 1 and all(set(r.mean) == {(lv, "V") for lv in LEVELS} for r in rules.rows)


def test_tables_of_rules_leave_out_what_a_system_does_not_parse():
    keys, groups = [("event", "A"), ("event", "V"), ("event", "Type@AV")], {"TALNet": of("talnet"), "HAN": of("han")}
    t = L.cross_table(groups, keys, ("han", "ma"))
    assert t.columns == [(f"event {m}", r) for m in ("A", "V", "Type@AV") for r in ("han", "ma")]
    assert set(t.row("TALNet").mean) == {("event A", "han"), ("event A", "ma")} and set(t.row("HAN").mean) == set(t.columns)
    for treatment in L.TREATED: assert not {m for _, m in L.only_values(groups["TALNet"][0], treatment)} & set(ONLY)
    only = L.only_table(groups)
    assert only.frame.xs("TALNet").isna().all(axis=None) and only.frame.xs("HAN").notna().all(axis=None) and MARK in only.mark


# ---------------------------------------------------------------- tables of the papers

@pytest.mark.parametrize("paper, table", [("han", "1"), ("ma", "1"), ("dgm", "I"), ("coleaf", "6")])
def test_tables_with_baselines_have_signs_notes_and_empty_cells(paper, table):
    plan = P.plan(paper, table, "tiny", (1,))
    t = P.render(plan, real(record_of(s) for s in plan.specs))
    used, labels = {r.label: METHODS[r.specs[0].method] for r in plan.rows}, [r.label for r in plan.rows]
    assert [r.source.split(",")[0] for r in t.rows if r.kind == "ours"] == ["ours" + C.SIGNS[used[n].faith] for n in labels]
    assert notes_of(t) == [NOTE[k] for k in NOTE if k in {m.faith for m in used.values()}] and len(notes_of(t)) > 0
    controls = {r.label for r in plan.rows if (r.method, r.variant) in P.CONTROLS.get((paper, table), ())}
    for name, method in used.items():
        if name in controls: continue                                            # nobody has printed them
        own, diff, printed = (t.row(name, k) for k in ("ours", "difference", "printed"))
        assert set(diff.mean) == set(own.mean) & set(printed.mean) and diff.mean
        if method.modalities != "av": assert {m for _, m in own.mean} == {method.modalities.upper()} == {m for _, m in printed.mean}


@pytest.mark.parametrize("paper, table", [("han", "2"), ("ma", "2"), ("coleaf", "3")])
def test_tables_of_released_code_have_neither(paper, table):
    plan = P.plan(paper, table, "tiny", (1,))
    t = P.render(plan, [record_of(s) for s in plan.specs])
    assert notes_of(t) == [] and set(sources(t)) == {"ours"} and not set(t.to_markdown()) & {"‡", "§"}


def test_a_half_finished_table_has_the_notes_of_what_is_there():
    plan = P.plan("dgm", "I", "tiny", (1,))
    row = {r.method: r for r in plan.rows}
    for methods, wanted in ((("han",), []), (("han", "cvcms"), ["stand-in"]), (("dgm+msdu",), ["reconstruction"])):
        t = P.render(plan, [record_of(s) for m in methods for s in row[m].specs])
        assert notes_of(t) == [NOTE[k] for k in wanted]


# ---------------------------------------------------------------- controls

CASES = [(p, t, row) for (p, t), rows in P.CONTROLS.items() for row in rows]


@pytest.mark.parametrize("paper, table, row", CASES)
def test_a_control_is_run_and_never_printed(paper, table, row):
    plan = P.plan(paper, table, "tiny", (1, 2))
    control = next(r for r in plan.rows if (r.method, r.variant) == row)
    assert plan.rows.index(control) >= len(plan.rows) - len(P.CONTROLS[paper, table]), "after the printed rows"
    assert len(control.specs) == 2 and plan.printed(control).empty and set(control.specs) <= set(P.all_specs(paper, "tiny", (1, 2)))
    with pytest.raises(InputError): reported(paper, table, row[0], variant=row[1])
    t = P.render(plan, [record_of(s) for s in plan.specs])
    assert [(r.name, r.kind) for r in t.rows if r.kind != "floor"][-1] == (control.label, "ours")
    assert [r.kind for r in t.rows if r.name == control.label] == ["ours"] and t.row(control.label).info["seeds"] == 2
    for text in (t.to_markdown(), t.to_html(), t.to_latex(), t.to_csv()): assert text.count(control.label.split(" (")[1].rstrip(")")) >= 1


def test_mas_control_has_the_options_of_its_row():
    plan = P.plan("ma", 3, seeds=(1,))
    assert [r.label for r in plan.rows] == [f"MA (refine={k})" for k in ("audio", "visual", "both", "random")]
    random, both = (next(r.specs[0].full_options for r in plan.rows if r.label == f"MA (refine={k})") for k in ("random", "both"))
    assert random == both | {"refine": "random"}


def test_a_control_without_runs_leaves_no_row_but_a_note():
    plan = P.plan("ma", 3, "tiny", (1,))
    t = P.render(plan, [record_of(s) for s in plan.rows[0].specs])
    assert "Not run yet: MA (refine=visual), MA (refine=both), MA (refine=random)." in t.notes
    assert not [r for r in t.rows if r.name == "MA (refine=random)"]


def test_only_a_control_can_be_recorded():
    plan = P.plan("ma", 3, "tiny", (1,))
    t = P.render(plan, [record_of(s) for s in plan.rows[-1].specs])
    assert [(r.name, r.kind) for r in t.rows if r.kind == "ours"] == [("MA (refine=random)", "ours")]
    assert [r.kind for r in t.rows if r.kind != "floor"] == ["printed"] * 3 + ["ours"] and not [r for r in t.rows if r.kind == "difference"]


@pytest.mark.parametrize("paper, table", [x for x in W.all_tables() if x not in P.CONTROLS])
def test_other_tables_have_printed_rows_only(paper, table):
    plan = P.plan(paper, table, seeds=(1,))
    assert not any(plan.printed(r).empty for r in plan.rows)


# ---------------------------------------------------------------- notes below cross-tables, stacked levels

def test_networks_that_are_smaller_are_named_below_every_table_of_rules():
    from avvp_nb.results.compare import reduced_notes
    records = of("mm_pyramid", (1,))
    wanted = reduced_notes(records)
    assert wanted and wanted[0].startswith("MM-Pyramid at tiny: ")
    for table in (C.rules_table(records), L.cross_table({"MM-Pyramid": records}), L.only_table({"MM-Pyramid": records}),
                  L.selection_effect({"MM-Pyramid": records}), C.compare({"MM-Pyramid": records})):
        assert wanted[0] in table.notes, table.caption
    assert not [n for n in C.rules_table(of("han")).notes if "instead of" in n]


def test_stacked_levels_hold_the_same_numbers():
    table = C.compare({"HAN": of("han"), "TALNet": of("talnet")}, {"HAN": reported("dgm", "VII", "han")})
    tall = C.stacked(table)
    assert len(tall) == 2 * len(table) and len(tall.columns) == len(STANDARD) + 1 and tall.provenance == table.provenance
    for r in table.rows:
        for lv in LEVELS:
            line = next(x for x in tall.rows if x.name == r.name and x.kind == r.kind and x.source == f"{lv}, {r.source}")
            assert {m: line.mean[k] for k in line.mean if (m := k[1]) != "mean"} == {m: v for (l, m), v in r.mean.items() if l == lv and m in STANDARD}
            if AVG in r.mean: assert line.mean["", "mean"] == pytest.approx(np.mean([r.mean[lv, m] for m in STANDARD]))
    assert C.stacked(tall) is tall, "a table without levels stays as it is"


def test_ours_minus_printed_needs_real_features():
    for records, kinds in ((of("han"), ["ours", "printed"]), (real(of("han")), ["ours", "printed", "difference"])):
        assert [r.kind for r in C.compare({"HAN": records}, {"HAN": reported("dgm", "VII", "han")}, floors=False).rows] == kinds
