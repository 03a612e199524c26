"""Gain against gain: paired and unpaired differences, the block, the baselines of all printed rows, the formats."""
import io
import math
import re

import numpy as np
import pandas as pd
import pytest
from test_reproduce import MARK, record_of

from avvp_nb.core import InputError
from avvp_nb.counts import LEVELS, STANDARD
from avvp_nb.results import gains as G
from avvp_nb.results import intervals as I
from avvp_nb.results.groups import scores
from avvp_nb.results.plans import plan
from avvp_nb.results.reported import AVG, reported
from avvp_nb.results.rows import DATASET, RATES, TABLES, system_of


def of(method, variant="", seeds=(1, 2, 3), **kw):
    return [record_of(system_of(method, variant).spec(s, "small"), **kw) for s in seeds]


# ---------------------------------------------------------------- intervals

@pytest.mark.parametrize("a, b, nu, half", [([2, 3, 4], [1, 2, 3], 4, 2.776445 * (2 / 3) ** 0.5), ([1, 3], [0, 0, 0, 0], 1, 12.7062)])
def test_welchs_interval_by_hand(a, b, nu, half):
    mean, low, high = I.welch_interval(a, b)
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=1e-3) and mean == np.mean(a) - np.mean(b)


def test_the_false_discovery_rate_of_independent_nothings_is_kept():
    rng = np.random.default_rng(0)
    found = [(I.q_values([I.seed_p(d) for d in rng.normal(0, 1, (20, 3))]) <= 0.05).any() for _ in range(400)]
    assert np.mean(found) < 0.08, "with nothing to find, one table in twenty has a discovery"


def test_p_and_q_values_by_hand():
    assert I.seed_p([1.0, 2.0, 3.0]) == pytest.approx(0.0742, abs=1e-4) and math.isnan(I.seed_p([1.0])) and I.seed_p([2.0, 2.0]) == 0.0
    assert I.q_values([0.06, math.nan, 0.01, 0.02]) == pytest.approx([0.06, math.nan, 0.03, 0.03], nan_ok=True)
    assert np.isnan(I.q_values([math.nan])).all()


# ---------------------------------------------------------------- one gain

def test_seeds_that_move_both_sides_alike_do_not_widen_a_gain():
    got = G.gained(of("dgm+msdu@han", gain=3.0, noise=0), of("han", gain=1.0, noise=0))
    assert (got.mean, got.low, got.high, got.seeds, got.paired) == pytest.approx((2, 2, 2, 3, True))


@pytest.mark.parametrize("left, right, seeds, paired", [((1, 2, 3), (1, 2, 3), 3, True), ((1, 2, 3), (2, 3, 9), 2, True),
                                                        ((1, 2), (3, 4, 5), 2, False), ((1, 2), (2, 7), 2, False), ((1,), (1, 2), 1, True), ((1,), (2,), 1, False)])
def test_pairs_are_the_shared_seeds(left, right, seeds, paired):
    got = G.gained(of("ma", seeds=left), of("han", seeds=right))
    assert (got.seeds, got.paired) == (seeds, paired) and math.isnan(got.low) == (seeds == 1)
    assert got.certain == (seeds > 1 and (got.low > 0 or got.high < 0))


def test_a_score_that_one_side_lacks_is_refused():
    with pytest.raises(InputError, match="no record has segment mAP"): G.gained(of("ma"), of("han"), ("segment", "mAP"))


# ---------------------------------------------------------------- blocks

def test_a_block_holds_printed_gains_beside_ours():
    dgm, han = of("dgm+msdu@han"), of("han")
    t = G.over({"HAN": han, "DGM": dgm}, "HAN", {"HAN": reported("dgm", "VII", "han"), "DGM": reported("dgm", "VII", "dgm+msdu@han")})
    assert [r.kind for r in t.rows] == ["printed gain", "gain"] * 3
    assert [r.source for r in t.rows] == [f"{lv}, {x}" for lv in (*LEVELS, "both") for x in ("printed", "ours‡, simulated")]
    a, b = (reported("dgm", "VII", m).droplevel(["paper", "table", "method", "variant"]) for m in ("dgm+msdu@han", "han"))
    for lv, r in zip(LEVELS, t.rows[::2]):
        for m in STANDARD: assert r.mean["", m] == pytest.approx(a.loc[lv, m] - b.loc[lv, m])
    assert t.rows[4].mean == {("", "mean"): pytest.approx(1.89)}
    for lv, r in zip(LEVELS, t.rows[1::2]):
        for m in STANDARD:
            d = [scores(x)[lv, m] - scores(y)[lv, m] for x, y in zip(dgm, han)]
            assert (r.mean["", m], *r.span["", m]) == pytest.approx(I.seed_interval(d))
    assert t.rows[5].mean["", "mean"] == pytest.approx(np.mean([scores(x)[AVG] - scores(y)[AVG] for x, y in zip(dgm, han)]))


def test_scale_and_seeds_stand_in_the_caption_once():
    t = G.over({"HAN": of("han"), "DGM": of("dgm+msdu@han")}, "HAN")
    assert t.caption.endswith("; simulated, scale small, 3 seeds") and not any("seed" in r.source or "small" in r.source for r in t.rows)
    odd = G.over({"HAN": of("han"), "DGM": of("dgm+msdu@han"), "MA": of("ma", seeds=(1,)), "X": of("jomold", seeds=(8, 9))}, "HAN")
    assert {r.source.split(", ", 2)[2] for r in odd.rows if r.name == "MA over HAN"} == {"simulated, 1 seed"}
    assert all(r.source.endswith("simulated, 2 seeds, not paired") for r in odd.rows if r.name == "X over HAN")


def test_every_format_shows_the_interval_and_the_mark():
    t = G.over({"HAN": of("han"), "DGM": of("dgm+msdu@han")}, "HAN")
    for text in (t.to_markdown(), t.to_latex(), re.sub("<[^>]+>", " ", t.to_html())): assert re.search(r"[+−]\d\.\d\s+\[[+−]\d\.\d, [+−]\d\.\d\]", text.replace("$-$", "−"))
    for text in (t.to_markdown(), t.to_latex(), t.to_html(), t.to_csv()): assert "simulated" in text
    back = pd.read_csv(io.StringIO(t.to_csv()))
    known = back.dropna(subset="A low")
    assert len(known) == 2 and (known["A low"] <= known["A"]).all() and (known["A"] <= known["A high"]).all()
    assert {"mean", "mean low", "mean high"} <= set(back.columns) and set(back["mark"]) == {MARK}
    assert re.search("<br><small", t.to_html()), "the interval stands below its number, so that six of them fit a page"


def test_text_of_a_row_is_left_aligned_and_fits():
    t = G.over({"HAN": of("han"), "DGM": of("dgm+msdu@han")}, "HAN", {"HAN": reported("dgm", "VII", "han"), "DGM": reported("dgm", "VII", "dgm+msdu@han")})
    row = next(x for x in t.to_html().splitlines() if x.startswith("<tr") and "ours" in x)
    assert row.count("text-align:left") == 2 and row.count("text-align:right") == len(t.columns) == 6


# ---------------------------------------------------------------- whose baseline

EVERY = [(p, t) for p in TABLES for t in TABLES[p] if (p, t) not in RATES]


@pytest.mark.parametrize("paper, table", [x for x in EVERY if x not in (("dgm", "II"), ("dgm", "III"))])
def test_each_baseline_is_a_printed_row_that_can_be_run(paper, table):
    rows = [(r.method, r.variant) for r in plan(paper, table).rows]
    found = {(m, v): G.baseline_of(paper, table, m, v, rows) for m, v in rows}
    for (m, v), (base, why) in found.items():
        if base is None: continue
        assert why and base != (paper, table, m, v) and base[2:] != (m, v)
        printed = reported(*base[:2], dataset=None).reset_index()
        assert ((printed["method"] == base[2]) & (printed["variant"] == base[3])).any() and system_of(*base[2:]).spec
    assert any(b for b, _ in found.values()), "some row has a baseline"


def test_the_rules_of_baselines_by_hand():
    def of_row(paper, table, method, variant=""):
        rows = [(r.method, r.variant) for r in plan(paper, table).rows]
        base, why = G.baseline_of(paper, table, method, variant, rows)
        return base and base[2], why
    assert of_row("dgm", "VII", "dgm+msdu@han") == ("han", G.PUT_ON) and of_row("dgm", "VII", "jomold") == ("han", G.GOES_BACK)
    assert of_row("dgm", "I", "ma") == ("han", G.GOES_BACK) and of_row("dgm", "I", "talnet")[0] is None
    assert of_row("coleaf", "6", "cmpae", "thresholds=selected")[0] == "cmpae"
    assert of_row("ma", "4", "ma", "contrastive=1;refine=both;tau=0.2")[0] is None, "the baseline itself"


# ---------------------------------------------------------------- a printed table

@pytest.mark.parametrize("paper, table", [x for x in EVERY if x not in (("dgm", "II"), ("dgm", "III"))])
def test_every_printed_table_has_its_block(paper, table):
    wanted = plan(paper, table, "small", (1, 2))
    records = [record_of(s) for s in wanted.specs]
    if (paper, table) in G.BASELINES:
        at = G.BASELINES[paper, table][0]
        known = {r["key"] for r in records}
        records += [r for r in of(*at[2:], seeds=(1, 2)) if r["key"] not in known]
    t = G.gains(wanted, records)
    names = dict.fromkeys(r.name for r in t.rows)
    rows = [(r.method, r.variant) for r in wanted.rows]
    expected = [r for r in wanted.rows if r.specs and G.baseline_of(paper, table, r.method, r.variant, rows)[0]]
    assert len(names) == len(expected) and all(n.split(" over ")[0] == r.label for n, r in zip(names, expected))
    assert t.provenance["parameters"]["table"] == table and t.mark == (MARK if DATASET.get((paper, table)) is None else t.mark)


def test_missing_records_leave_a_block_out_or_are_refused():
    wanted = plan("dgm", "VII", "small", (1, 2))
    some = of("han", seeds=(1, 2)) + of("dgm+msdu@han", seeds=(1, 2))
    assert {r.name for r in G.gains(wanted, some).rows} == {"DGM+MSDU on HAN over HAN"}
    with pytest.raises(InputError, match="nothing to compare"): G.gains(wanted, of("han", seeds=(1, 2)))
    with pytest.raises(InputError, match="is a table of rates"): G.gains(plan("coleaf", 1, "small"), some)


def test_saved_files_are_those_of_other_tables(tmp_path):
    t = G.over({"HAN": of("han"), "DGM": of("dgm+msdu@han")}, "HAN")
    assert sorted(p.suffix for p in t.save(tmp_path / "x")) == [".csv", ".html", ".json", ".md", ".tex"]
