"""Tables and figures: printed numbers, means over seeds, refusals, formats, provenance, files."""
import io
import json
import os
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from avvp_nb.core import InputError, content_hash, write_json
from avvp_nb.counts import LEVELS, METRICS, STANDARD
from avvp_nb.metrics import FLOORS, RULES, evaluate_videos, floors
from avvp_nb.results import compare as C
from avvp_nb.results import groups as G
from avvp_nb.results import plots as P
from avvp_nb.results import reported as R
from avvp_nb.results import table as T

MARK = "simulated v1 seed=0 world=7"


def toy_record(seed=1, method="dgm", gamma=0.1, scale="tiny", gain=0.0, epochs=5, simulated=True, mark=None, **changes):
    "A run record with invented numbers, in the format of `runs.run`"
    rng = np.random.default_rng([seed, round(100 * gamma), len(method)])

    def scores():
        x = {m: 50 + gain + rng.normal() for m in METRICS}
        x["Type@AV"] = (x["A"] + x["V"] + x["AV"]) / 3
        return x

    def epoch(e):
        out = {"epoch": e, "lr": 3e-4, "seconds": 1.0, "val": {},
               "loss": {k: float(np.exp(-e / 5) + rng.random() / 50) for k in ("audio", "visual", "video")}}
        if method == "dgm":
            out["dgm"] = {"omega": 1.2, "mu_audio": 1.0, "mu_visual": 0.9, "damped_audio": 0.25, "damped_visual": 0.75}
        return out

    options = {"gamma": gamma, "msdu": True, "modulate": True} if method == "dgm" else {}
    spec = {"method": method, "backbone": "han", "options": options,
            "recipe": {"epochs": epochs}, "scale": scale, "seed": seed, "protocol": "official", "rule": "han",
            "precision": "fp32"}
    level = {n: {m: x for m in METRICS} for n, x in (("nothing", 8.0), ("true segments", 100.0), ("weak label", 55.0))}
    return {"format": 1, "key": content_hash([spec, simulated]), "spec": spec, "commit": "abc1234", "versions": {},
            "hardware": {},
            "data": {"simulated": simulated, "mark": (MARK if simulated else "") if mark is None else mark,
                     "identity": {"annotations": "embedded"}, "source": {}, "n": {}},
            "wall_time": 1.0, "finished": "2000-01-01T00:00:00", "rule": "han",
            "selection": {"metric": "last", "epoch": epochs}, "history": [epoch(e) for e in range(1, epochs + 1)],
            "metrics": {r: {lv: scores() for lv in LEVELS} for r in ("han", "ma")},
            "floors": {n: {lv: dict(x) for lv in LEVELS} for n, x in level.items()}, "probabilities": {}} | changes


@pytest.fixture
def dgm(): return [toy_record(s) for s in (1, 2, 3)]


@pytest.fixture
def han(): return [toy_record(s, method="han") for s in (1, 2, 3)]


# ---------------------------------------------------------------- printed numbers

def test_every_printed_number_is_reachable():
    lines = R.reported_lines()
    found = 0
    for paper, table in lines[["paper", "table"]].drop_duplicates().itertuples(index=False):
        if table == "text": continue
        wide = R.reported(paper, table, dataset=None)
        part = lines[(lines.paper == paper) & (lines.table == table)].drop_duplicates([*R.ROW, "level", "metric"])
        for line in part.itertuples():
            assert wide.loc[(line.paper, line.table, line.method, line.variant, line.level), line.metric] == line.value
        assert wide.count().sum() == len(part)
        found += len(part)
    assert found > 850


def test_reported_columns_are_in_the_standard_order():
    assert list(R.reported("coleaf", 6).columns) == list(METRICS)
    assert list(R.reported("dgm", "VI").columns) == [*STANDARD, "AVG"]


def test_reported_lines_cannot_be_changed_by_a_caller():
    lines = R.reported_lines()
    lines["value"] = -1
    assert (R.reported_lines()["value"] > 0).all()


@pytest.mark.parametrize("args, message", [
    (dict(paper="dmg"), "did you mean 'dgm'"), (dict(paper="dgm", table="VIII"), "did you mean 'VII'"),
    (dict(paper="han", table=7), "table: '7' is not possible"),
    (dict(paper="dgm", table="VII", method="hann"), "did you mean 'han'"),
    (dict(paper="dgm", table="VI", variant="gamma=1.5"), "no printed row with gamma=1.5"),
    (dict(dataset="lpl"), "did you mean 'llp'")])
def test_unknown_names_are_answered_with_what_exists(args, message):
    with pytest.raises(InputError, match=re.escape(message)): R.reported(**args)


def test_variant_matches_pairs_not_text():
    assert R.reported("dgm", "VI", variant={"gamma": 0.2}).equals(R.reported("dgm", "VI", variant="gamma=0.2"))
    assert len(R.reported("ma", 4, variant="tau=0.2")) == 1
    assert set(R.reported("han", variant="").index.get_level_values("variant")) == {""}


def test_notes_reach_the_table_as_daggers():
    table = C.printed(R.reported("ma", 1, "ma"))
    assert "58.9†" in table.to_markdown() and any("58.47" in n for n in table.notes)
    assert "†" not in C.printed(R.reported("dgm", "VII", "han")).to_markdown()


# ---------------------------------------------------------------- our numbers

def test_ours_is_mean_and_sample_sd_over_seeds(dgm):
    table = C.ours(dgm)
    values = [[r["metrics"]["han"][lv][m] for r in dgm] for lv, m in table.columns[:-1]]
    np.testing.assert_allclose(table.frame.iloc[0, :-1].astype(float), np.mean(values, 1))
    np.testing.assert_allclose(table.spread.iloc[0, :-1].astype(float), np.std(values, 1, ddof=1))
    ten = [np.mean([r["metrics"]["han"][lv][m] for lv in LEVELS for m in STANDARD]) for r in dgm]
    assert table.frame.iloc[0][R.AVG] == pytest.approx(np.mean(ten))
    assert table.spread.iloc[0][R.AVG] == pytest.approx(np.std(ten, ddof=1))
    assert table.rows[0].info["runs"] == [r["key"] for r in dgm] and table.rows[0].info["seeds"] == 3


def test_a_single_seed_has_no_spread(dgm):
    table = C.ours(dgm[:1])
    assert table.rows[0].sd == {} and "±" not in table.text.to_string() and "1 seed" in table.rows[0].source


def test_the_same_run_given_twice_counts_once(dgm):
    assert C.ours(dgm + dgm[:2]).rows[0].info["seeds"] == 3


def test_rule_is_the_records_own_unless_asked(dgm):
    assert C.ours(dgm).rows[0].info["rule"] == "han"
    other = C.ours(dgm, rule="ma")
    mean = np.mean([r["metrics"]["ma"]["event"]["V"] for r in dgm])
    assert other.frame.iloc[0][("event", "V")] == pytest.approx(mean)
    with pytest.raises(InputError, match="did you mean 'han'"): C.ours(dgm, rule="hann")


def test_labels_name_what_differs(dgm, han):
    names = [r.name for r in C.ours(han + dgm + [toy_record(gamma=0.5)]).rows]
    assert names == ["HAN", "DGM+MSDU on HAN gamma=0.1", "DGM+MSDU on HAN gamma=0.5"]
    assert [r.name for r in C.ours(dgm + han, label=lambda r: r["spec"]["method"]).rows] == ["dgm", "han"]


def test_different_experiments_are_not_averaged(dgm):
    with pytest.raises(InputError, match="label 'ours': mixes runs that differ in gamma"):
        C.ours(dgm + [toy_record(gamma=0.5)], label="ours")
    with pytest.raises(InputError, match="differ in gamma"): C.rules_table(dgm + [toy_record(gamma=0.5)])


@pytest.mark.parametrize("other, message", [(dict(scale="full"), "different scales: full, tiny"),
                                            (dict(simulated=False), "different data: real, simulated")])
def test_mixtures_are_refused_or_shown(dgm, other, message):
    records = dgm + [toy_record(9, method="han", **other)]
    with pytest.raises(InputError, match=message): C.compare(records)
    table = C.compare(records, mixed=True)
    assert len({r.source for r in table.rows if r.kind == "ours"}) == 2
    assert {r.kind for r in table.rows} == {"ours", "floor"}


@pytest.mark.parametrize("f", [C.ours, C.compare, C.rules_table, P.plot_modulation, G.provenance,
                               lambda r: P.plot_losses(r, r)])
def test_empty_records_are_refused(f):
    with pytest.raises(InputError, match="no run records"): f([])


def test_the_same_settings_on_other_data_are_not_repeats(dgm):
    dgm[2]["data"]["identity"] = {"annotations": "other"}
    with pytest.raises(InputError, match="differ in data.annotations"): C.ours(dgm, label="ours")


def test_incomplete_records_are_named(dgm):
    del dgm[0]["metrics"]
    with pytest.raises(InputError, match=f"{dgm[0]['key']}: lacks metrics"): C.ours(dgm)


# ---------------------------------------------------------------- simulated is said

@pytest.mark.parametrize("record", [toy_record(mark=""), toy_record(mark="v1 seed=0"),
                                    toy_record(simulated=False, mark=MARK)])
def test_records_whose_mark_contradicts_their_data_are_refused(record):
    for f in (lambda: C.compare(record, R.reported("dgm", "VII", "han")), lambda: C.ours(record),
              lambda: G.provenance(record),
              lambda: P.plot_modulation(record), lambda: T.table_of(pd.DataFrame({"a": [1]}), "", record)):
        with pytest.raises(InputError, match="never share a table without that mark"): f()


def test_a_row_cannot_hide_its_mark():
    with pytest.raises(InputError, match="does not say so"): T.Row("x", "ours", "ours", {}, info={"mark": MARK})


def test_every_simulated_row_says_so_in_every_format(dgm):
    table = C.compare(dgm, R.reported("dgm", "VII", "dgm+msdu@han"))
    for text in (table.to_markdown(), table.to_html(), table.to_latex(), table.to_csv(), repr(table)):
        assert text.count("simulated") >= sum(r.kind != "printed" for r in table.rows)
    assert MARK in table.notes[0]
    assert all("simulated" in r.source for r in table.rows if r.kind != "printed")


def test_real_runs_are_not_called_simulated():
    table = C.compare(toy_record(simulated=False), R.reported("dgm", "VII", "han"))
    assert "simulated" not in table.to_markdown() and not table.provenance["simulated"]


# ---------------------------------------------------------------- compare

def test_differences_are_taken_before_rounding_of_real_features_only(dgm):
    assert not [r for r in C.compare(dgm, R.reported("dgm", "VII", "dgm+msdu@han")).rows if r.kind == "difference"]
    table = C.compare([toy_record(s, simulated=False) for s in (1, 2)], R.reported("dgm", "VII", "dgm+msdu@han"))
    own, printed, diff = table.rows[:3]
    assert (own.kind, printed.kind, diff.kind) == ("ours", "printed", "difference")
    for k in table.columns: assert diff.mean[k] == pytest.approx(own.mean[k] - printed.mean[k])
    assert re.fullmatch(r"[+−]\d+\.\d", T.cell_text(diff, ("segment", "A")))


def test_printed_rows_are_paired_by_label_or_name(dgm, han):
    table = C.compare({"a": han, "b": dgm}, {"b": R.reported("dgm", "VI", variant="gamma=0.3")}, floors=False)
    assert [(r.name, r.kind) for r in table.rows] == [("a", "ours"), ("b", "ours"), ("b", "printed")]
    table = C.compare(han + dgm, R.reported("dgm", "VII"), floors=False)
    assert [r.kind for r in table.rows] == ["ours", "printed"] * 2 + ["printed"] * 2
    assert [r.name for r in table.rows[1:4:2]] == ["HAN", "DGM+MSDU on HAN"]
    with pytest.raises(InputError, match="reported_rows: 'c' is not possible"):
        C.compare({"a": han}, {"c": R.reported("dgm", "VII", "han")})
    with pytest.raises(InputError, match="as `reported` returns it"): C.compare(han, pd.DataFrame({"A": [1.0]}))


def test_columns_follow_the_printed_rows(dgm):
    assert C.compare(dgm).columns == C.columns_for(*STANDARD)
    assert ("segment", "Ao") in C.compare(dgm, R.reported("coleaf", 6, "coleaf", variant="")).columns
    assert C.compare(dgm, metrics=("A",)).columns == [("segment", "A"), ("event", "A"), R.AVG]


def test_floors_go_from_nothing_to_the_oracle(dgm):
    rows = [r for r in C.compare(dgm).rows if r.kind == "floor"]
    assert [r.name for r in rows] == ["nothing", "weak label", "true segments"]
    assert not [r for r in C.compare(dgm, floors=False).rows if r.kind == "floor"]


def test_the_floors_of_the_library_fit():
    rng = np.random.default_rng(0)
    audio, visual = rng.integers(0, 2, (2, 6, 10, 25), dtype=np.uint8)
    table = floors((audio | visual).any(1).astype(float), audio, visual)
    record = toy_record(floors={n: table.loc[n].T.to_dict() for n in FLOORS})
    rows = [r.name for r in C.compare(record).rows if r.kind == "floor"]
    assert set(rows) == set(FLOORS) and rows[0] == "nothing" and rows[-1].startswith("true segments")


def test_floors_must_agree(dgm):
    dgm[1]["floors"]["nothing"]["segment"]["A"] += 1
    with pytest.raises(InputError, match="floor 'nothing' differs"): C.compare(dgm)


def test_records_without_floors_give_none(dgm):
    for r in dgm: del r["floors"]
    assert not [r for r in C.compare(dgm).rows if r.kind == "floor"]


def test_stack_keeps_floors_once_and_last(dgm):
    parts = [C.compare({f"γ={g}": toy_record(gamma=g)}, {f"γ={g}": R.reported("dgm", "VI", variant=f"gamma={g}")},
                       gamma=g) for g in (0.1, 0.2, 0.3)]
    table = C.stack(parts, "VI")
    assert [r.kind for r in table.rows] == ["ours", "printed"] * 3 + ["floor"] * 3
    assert len(table.provenance["runs"]) == 3 and table.provenance["mark"] == MARK
    assert table.provenance["parts"][1]["gamma"] == 0.2
    with pytest.raises(InputError, match="no tables"): C.stack([])


def test_rules_table_shows_every_rule(dgm):
    table = C.rules_table(dgm)
    assert [r.name for r in table.rows] == ["han (own)", "ma"]
    assert table.columns == C.columns_for(*METRICS)
    assert {r.info["rule"] for r in table.rows} <= set(RULES)


def test_table_of_any_frame(dgm):
    frame = pd.DataFrame({("segment", "A"): [1.25], ("", "n"): [3], ("", "why"): ["50 %"]}, index=["Speech"])
    table = T.table_of(frame, "x", dgm, digits=2, tau=0.5)
    assert table.text.iloc[0].tolist() == ["1.25", "3", "50 %"] and table.rows[0].source == "simulated"
    assert table.provenance["parameters"] == {"tau": 0.5}
    assert T.table_of(pd.DataFrame({"a": [None, 1.0]})).text.iloc[0].tolist() == ["–"]


# ---------------------------------------------------------------- formats

@pytest.fixture
def table(dgm): return C.compare(dgm, R.reported("dgm", "VII", "dgm+msdu@han"), caption="A & B_1: 50% <γ>",
                                 notebook="nbs/dgm.ipynb", gamma=0.1)


def test_latex_is_balanced_and_escaped(table):
    tex = table.to_latex("tab:x")
    assert tex.count(r"\begin{") == tex.count(r"\end{") == 2
    bare = re.sub(r"\\[{}$&%#_\\]", "", tex)
    assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0
    body = tex[tex.index(r"\toprule"):tex.index(r"\bottomrule")]
    rows = [line for line in body.splitlines() if line.endswith(r"\\")]
    assert {re.sub(r"\\&", "", line).count("&") for line in rows[1:]} == {len(table.columns) + 1}
    assert sum(map(int, re.findall(r"multicolumn\{(\d+)\}", rows[0]))) == len(table.columns)
    assert r"\caption{A \& B\_1: 50\% \textless{}$\gamma$\textgreater{}}" in tex and r"\label{tab:x}" in tex
    assert all(r in tex for r in (r"\toprule", r"\midrule", r"\bottomrule")) and tex.isascii()


def test_html_is_balanced_escaped_and_colourless(table):
    class Balance(HTMLParser):
        stack = []
        def handle_starttag(self, tag, attrs): self.stack += [tag] * (tag != "br")
        def handle_endtag(self, tag): assert self.stack.pop() == tag
    parser = Balance(); parser.feed(table._repr_html_())
    assert parser.stack == [] and "A &amp; B_1: 50% &lt;γ&gt;" in table.to_html()
    # so that it reads on light and dark pages
    assert not re.search(r"(?<!-)color:\s*(#|black|white|rgb)", table.to_html())
    assert all(k in table.to_html() for k in table.rows[0].info["runs"])


def test_markdown_rows_have_equal_cells(table):
    lines = [x for x in table.to_markdown().splitlines() if x.startswith("|")]
    assert len({x.count("|") for x in lines}) == 1 and len(lines) == len(table) + 2


def test_csv_holds_unrounded_numbers_and_runs(table):
    back = pd.read_csv(io.StringIO(table.to_csv()))
    np.testing.assert_allclose(back["segment A"], table.frame["segment", "A"].astype(float))
    assert back["segment A sd"].notna().sum() == 1 and back["runs"][0].split() == table.rows[0].info["runs"]
    assert back["mark"][0] == MARK


def test_save_writes_five_files_and_is_deterministic(table, tmp_path):
    first = [p.read_bytes() for p in table.save(tmp_path / "a" / "gamma0.1")]
    second = [p.read_bytes() for p in table.save(tmp_path / "b" / "gamma0.1")]
    assert first == second and len(first) == 5
    names = {f"gamma0.1.{s}" for s in ("md", "html", "tex", "csv", "json")}
    assert {p.name for p in (tmp_path / "a").iterdir()} == names


def test_provenance_says_what_made_it(table, dgm, tmp_path):
    table.save(tmp_path / "t")
    prov = json.loads((tmp_path / "t.json").read_text())
    assert prov["runs"] == [r["key"] for r in dgm] and prov["seeds"] == [1, 2, 3] and prov["scale"] == ["tiny"]
    assert prov["mark"] == MARK and prov["simulated"] is True and prov["commit"] == ["abc1234"]
    assert prov["notebook"] == "nbs/dgm.ipynb" and prov["parameters"]["gamma"] == 0.1
    assert set(prov["files"]) == {"t.md", "t.html", "t.tex", "t.csv"}


def test_a_failed_save_leaves_the_old_files(table, tmp_path, monkeypatch):
    table.save(tmp_path / "t")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    def full(*a): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    table.caption = "new"
    with pytest.raises(InputError, match="No space left"): table.save(tmp_path / "t")
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_records_read_back_from_json_give_the_same_table(dgm, tmp_path):
    for i, r in enumerate(dgm): write_json(r, tmp_path / f"{i}.json")
    back = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(3)]
    assert C.compare(back).to_csv() == C.compare(dgm).to_csv()


# ---------------------------------------------------------------- figures

@pytest.fixture
def truth():
    rng = np.random.default_rng(0)
    return tuple((rng.random((2, 12, 7, 5)) < 0.3).astype(np.uint8))  # seven seconds, five classes


def figures(dgm, han, truth):
    names = [f"c{i}" for i in range(5)]
    return {"losses": P.plot_losses(han, dgm), "modulation": P.plot_modulation(dgm),
            "timelines": P.plot_timelines(truth, {"BS": truth[::-1], "Our": truth}, [0, 1, 2], classes=names,
                                          mark=MARK),
            "strip": P.strip_plot(truth[0][0], truth[1][0], truth[1][0], truth[0][0], classes=names, mark=MARK)}


def test_figures_are_marked_described_and_deterministic(dgm, han, truth, tmp_path):
    for name, fig in figures(dgm, han, truth).items():
        assert MARK in P.drawn_text(fig) and len(fig.get_label()) > 40, name
        prov = G.provenance(dgm, notebook="nbs/dgm.ipynb", figure=name)
        svg, png, meta = P.save_figure(fig, tmp_path / "a" / name, prov)
        again = P.save_figure(figures(dgm, han, truth)[name], tmp_path / "b" / name, prov)
        assert svg.read_bytes() == again[0].read_bytes(), name
        assert "dc:date" not in svg.read_text() and fig.get_label().split(".")[0] in " ".join(ET.parse(svg).getroot().itertext())
        assert png.read_bytes()[:4] == b"\x89PNG"
        info = json.loads(meta.read_text())
        assert info["mark"] == MARK and info["caption"] == fig.get_label()
        assert set(info["files"]) == {f"{name}.svg", f"{name}.png"}


def test_no_text_of_a_figure_overlaps_another(dgm, han, truth):
    import matplotlib.text
    for name, fig in figures(dgm, han, truth).items():
        fig.draw_without_rendering()
        axes = [(ax.xaxis, ax.get_xlim()) for ax in fig.axes] + [(ax.yaxis, sorted(ax.get_ylim())) for ax in fig.axes]
        unseen = {id(t.label1) for axis, (lo, hi) in axes
                  for t in axis.get_major_ticks() if not lo <= t.get_loc() <= hi}
        texts = [t for t in fig.findobj(matplotlib.text.Text) if t.get_text().strip() and t.get_visible() and id(t) not in unseen]
        boxes = [(t.get_text(), t.get_window_extent()) for t in texts]
        for i, (s, a) in enumerate(boxes):
            for u, b in boxes[i + 1:]:
                wide = min(a.x1, b.x1) - max(a.x0, b.x0)
                high = min(a.y1, b.y1) - max(a.y0, b.y0)
                assert not (wide > 2 and high > 2), (name, s, u)


def test_an_unmarked_figure_of_simulated_data_is_refused(dgm, truth, tmp_path):
    fig = P.strip_plot(truth[0][0], truth[1][0], classes=list("abcde"))
    with pytest.raises(InputError, match="does not say so"): P.save_figure(fig, tmp_path / "x", G.provenance(dgm))
    assert not list(tmp_path.iterdir())


def test_figures_of_one_epoch_and_one_seed(dgm):
    one = toy_record(epochs=1)
    assert P.plot_losses(one, one) and P.plot_modulation(one)


def test_losses_need_both_modalities_and_equal_lengths(dgm, han):
    with pytest.raises(InputError, match="no dgm 'omega'"): P.plot_modulation(han)
    with pytest.raises(InputError, match="runs of different length"):
        P.plot_losses([*dgm, toy_record(9, epochs=2)], dgm)
    for h in han[0]["history"]: del h["loss"]["visual"]
    with pytest.raises(InputError, match="no loss 'visual'.*it has audio, video there"): P.plot_losses(han, dgm)


def test_strip_and_timeline_shapes_are_checked(truth):
    with pytest.raises(InputError, match=r"two arrays \(T, C\)"): P.strip_plot(truth[0], truth[1])
    with pytest.raises(InputError, match="nothing is annotated"):
        P.strip_plot(0 * truth[0][0], 0 * truth[1][0], classes=list("abcde"))
    with pytest.raises(InputError, match="25 names for 5 classes"): P.strip_plot(truth[0][0], truth[1][0])
    with pytest.raises(InputError, match="25 names for 5 classes"): P.plot_timelines(truth, {"BS": truth}, [0])
    with pytest.raises(InputError, match="of one shape"):
        P.plot_timelines(truth, {"BS": (truth[0][:3], truth[1][:3])}, [0])
    with pytest.raises(InputError, match="0 videos"): P.plot_timelines(truth, {"BS": truth}, [])


def test_a_video_without_events_and_more_classes_than_colours():
    rng = np.random.default_rng(1)
    many = tuple((rng.random((2, 3, 10, 25)) < 0.2).astype(np.uint8))
    for x in many: x[1] = 0
    fig = P.plot_timelines(many, {"BS": many}, [0, 1], mark=MARK)
    assert "video 1: nothing" in fig.get_label()


@pytest.mark.parametrize("row, runs", [([], []), ([0, 0], []), ([1], [(0, 1)]), ([1, 1, 0, 1], [(0, 2), (3, 1)]),
                                       ([True, False, True], [(0, 1), (2, 1)])])
def test_segments_of(row, runs):
    assert P.segments_of(row) == runs


def test_pick_videos_follows_its_rule(truth):
    before, after = np.zeros(11), np.arange(11) / 10 - 0.5  # video 5 does not change
    picked = P.pick_videos(before, after, ids=list("abcdefghijk"), quantiles=(0, 0.5, 1))
    assert picked["id"].tolist()[::2] == ["a", "k"] and 5 not in picked["index"].tolist()
    shuffled = np.random.default_rng(0).permutation(11)
    again = P.pick_videos(before[shuffled], after[shuffled], ids=np.array(list("abcdefghijk"))[shuffled],
                          quantiles=(0, 0.5, 1))
    assert again["id"].tolist() == picked["id"].tolist()  # the order of the files does not matter
    frames = [evaluate_videos(*p, *truth) for p in (truth[::-1], truth)]
    assert P.pick_videos(*frames)["difference"].is_monotonic_increasing
    with pytest.raises(InputError, match="at least 3"): P.pick_videos([0, 1], [1, 1])
    with pytest.raises(InputError, match="same number"): P.pick_videos([0, 1], [1])


# ---------------------------------------------------------------- the first page

def test_links_of_the_index_exist():
    nbs = Path(__file__).parents[1] / "nbs"
    cells = json.loads((nbs / "index.ipynb").read_text())["cells"]
    text = "".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    links = set(re.findall(r"\]\(([^)]+)\)", text))
    assert len(links) > 10 and not [x for x in links if not (nbs / x).is_file()]
