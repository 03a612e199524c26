"""From printed rows to runs and back: the mapping, the sweep, the tables, the rules, the command."""
import argparse
import json

import numpy as np
import pandas as pd
import pytest

from avvp_nb.core import InputError, content_hash, write_json
from avvp_nb.counts import LEVELS, METRICS
from avvp_nb.data import sources
from avvp_nb.data.sources import SCALES, DataSpec, identify
from avvp_nb.methods.method import METHODS
from avvp_nb.metrics import RULES
from avvp_nb.records.invented import invented
from avvp_nb.records.spec import RunSpec, run_key
from avvp_nb.records.store import Store
from avvp_nb.results import compare as comparing
from avvp_nb.results import groups
from avvp_nb.results import plans as P
from avvp_nb.results import rows as W
from avvp_nb.results import rules as L
from avvp_nb.results.field import field_lines
from avvp_nb.results.groups import SELECTED
from avvp_nb.results.reported import reported, reported_lines
from avvp_nb.runs import reproduce as R

MARK = "simulated v1 seed=0 world=7"
GAIN = {"han": 0.0, "ma": 2.0, "jomold": 3.0, "jomold_estimator": -5.0, "dgm": 4.0, "cmpae": 3.0, "coleaf": 5.0, "valor": 4.5}
OTHERS = {m: -1.0 - i / 10 for i, m in enumerate(sorted(set(METHODS) - set(GAIN)))}     # every other system has its own number
ONLY = {"skip": -20.0, "pooled": -30.0}  # points by which the corrected scores of invented records are lower
ALL = [(p, t) for p, ts in W.TABLES.items() for t in ts]
each_table = pytest.mark.parametrize("paper, table", ALL)
NEW = ("kong", "talnet", "stpn", "cmcs", "ave", "avsdn")      # the rows of HAN's Table 1 that are no ablations of HAN


def record_of(spec, gain=None, noise=0.1, rules=None, **changes):
    "A record with invented numbers for a real spec; the seed moves all systems alike, so pairing matters"
    if spec.task != "parsing": return {**invented(spec), "data": {**invented(spec)["data"], "mark": f"{MARK} {spec.data.dataset}"}, **changes}
    rng = np.random.default_rng([spec.seed, int(content_hash(spec.plain()), 16) % 2**32])
    gain, rules = (GAIN | OTHERS)[spec.method] if gain is None else gain, rules or dict.fromkeys(RULES, 0.0)

    def scores(shift):
        x = {m: 50 + gain + shift + 2 * spec.seed + noise * rng.normal() for m in METRICS}
        return x | {"Type@AV": (x["A"] + x["V"] + x["AV"]) / 3}

    def epoch(e):
        val = {f"{lv}/{m}": v for lv in LEVELS for m, v in scores(-abs(e - 3)).items()}
        return {"epoch": e, "lr": 3e-4, "seconds": 1.0, "val": val, "loss": {"audio": 0.4, "visual": 0.3, "video": 0.2}}

    identity, plain = identify(spec.data, "none")[0], spec.plain()
    floors = {n: {lv: dict.fromkeys(METRICS, x) for lv in LEVELS} for n, x in (("nothing", 8.0), ("true segments", 100.0))}
    searched = {"thresholds": [0.5], "modality": "visual", "rule": plain["rule"], "metrics": {lv: scores(1.0) for lv in LEVELS}}
    only = {r: {k: {lv: scores(s + x) for lv in LEVELS} for k, x in ONLY.items()} for r, s in rules.items()}
    only_floors = {n: {k: {lv: dict.fromkeys(METRICS, x) for lv in LEVELS} for k in ONLY} for n, x in (("nothing", 0.0), ("true segments", 100.0))}
    return {"format": 1, "key": run_key(spec, identity), "spec": plain, "seed": spec.seed, "rule": plain["rule"],
            "commit": "abc", "wall_time": 1.0, "selection": {"metric": "last", "epoch": 4}, "floors": floors,
            "selected": {"kept": searched}, "only": only, "only_floors": only_floors,
            "data": {"simulated": True, "mark": MARK, "identity": identity, "source": {}, "n": {}},
            "history": [epoch(e) for e in range(1, 5)], "probabilities": {},
            "metrics": {r: {lv: scores(s) for lv in LEVELS} for r, s in rules.items()}} | changes


def fill(store, specs, **kw):
    "Records of these specs in a store"
    records = [record_of(s, **kw) for s in specs]
    for r in records: write_json(r, store.record_path(r["key"]))
    return records


@pytest.fixture
def store(tmp_path): return Store(tmp_path / "store")


@pytest.fixture
def trained(monkeypatch):
    "Pretend to train: the list of what was trained"
    calls = []

    def run(spec, store, device="auto", progress="auto"):
        calls.append(spec)
        return fill(store, [spec])[0]

    monkeypatch.setattr(R, "run", run)
    return calls


# ---------------------------------------------------------------- from rows to runs

@each_table
def test_every_printed_row_is_mapped_or_listed_as_printed_only(paper, table):
    plan = P.plan(paper, table)
    printed = reported(paper, table, dataset=None).reset_index()[["method", "variant"]].drop_duplicates()
    controls = list(P.CONTROLS.get((paper, table), ()))
    assert [(r.method, r.variant) for r in plan.rows] == list(printed.itertuples(index=False, name=None)) + controls
    assert [plan.printed(r).empty for r in plan.rows] == [(r.method, r.variant) in controls for r in plan.rows]
    for r in plan.rows:
        assert (r.method in W.PRINTED_ONLY) == (not r.specs) == bool(r.reason)
        assert [s.seed for s in r.specs] in ([], [1, 2, 3])
    assert len({r.label for r in plan.rows}) == len(plan.rows)


def test_all_llp_tables_of_f_scores_are_there_and_no_id_is_listed_in_vain():
    lines = reported_lines()
    part = lines[lines["paper"].isin(W.TABLES) & (lines["table"] != "text")]
    assert set(ALL) == set(part[["paper", "table"]].itertuples(index=False, name=None))
    for dataset, task in (("ave", "localisation"), ("cremad", "classification")):
        assert set(part[part["dataset"] == dataset]["method"]) == set(W.row_of(task))
    part = part[part["dataset"].isin(["llp", "unav100"])]
    printed, held = {m.partition("@")[0] for m in part["method"]}, set(W.row_of())
    assert held | set(W.PRINTED_ONLY) >= printed >= set(W.PRINTED_ONLY) and not held & set(W.PRINTED_ONLY)
    elsewhere = {r for r, (method, _) in W.row_of().items() if method in ("deep", "uwav")}
    assert held - printed == elsewhere and elsewhere <= set(field_lines()["method"]), "rows of other papers' tables"


def test_a_row_that_no_system_stands_for_is_printed_only(monkeypatch):
    monkeypatch.setitem(W.PRINTED_ONLY, "stpn", "nobody has built it")
    plan = P.plan("han", 1, "tiny", (1,))
    stpn = next(r for r in plan.rows if r.method == "stpn")
    assert (stpn.specs, stpn.reason) == ((), "nobody has built it") and all(r.specs for r in plan.rows if r is not stpn)
    t = P.render(plan, [record_of(s) for s in plan.specs])
    assert [r.kind for r in t.rows if r.name == "STPN"] == ["printed"] and "Printed only, no system of ours: STPN." in t.notes
    assert "(nobody has built it)" in repr(plan) and not any(s.method == "stpn" for s in P.all_specs(seeds=(1,)))


@each_table
def test_distinct_rows_of_a_table_are_distinct_experiments(paper, table):
    experiments = [(W.experiment(r.specs[0].plain()), r.rule, r.read) for r in P.plan(paper, table).rows if r.specs]
    assert len(set(experiments)) == len(experiments)


@pytest.mark.parametrize("a, b", [
    (("han", "1", "han", ""), ("dgm", "VII", "han", "")),
    (("han", "1", "han", ""), ("han", "2", "han", "loss=wsl+g;pooling=attentive;temporal=han;noisy_label=label_smoothing")),
    (("ma", "1", "ma", ""), ("ma", "4", "ma", "contrastive=1;refine=both;tau=0.2")),
    (("ma", "2", "ma_wo_cl", "contrastive=0;refine=both"), ("dgm", "I", "ma_wo_cl", "")),
    (("dgm", "I", "dgm+msdu", ""), ("dgm", "VI", "dgm+msdu", "gamma=0.1;measure=fusion;msdu=1")),
    (("coleaf", "2", "coleaf", "anchor_loss=evt;selfmo=1;tokens=1;cocls=1"), ("coleaf", "6", "coleaf", "")),
    (("coleaf", "6", "coleaf", ""), ("coleaf", "6", "coleaf", "thresholds=selected")),
    (("coleaf", "1", "cmpae", "event=audible_only;context=unimodal"), ("coleaf", "5", "cmpae", "")),
    (("coleaf", "6", "jomold", ""), ("dgm", "I", "jomold", ""))])
def test_the_same_experiment_in_two_tables_is_one_run(a, b):
    specs = [next(r.specs[0] for r in P.plan(*x[:2]).rows if (r.method, r.variant) == x[2:]) for x in (a, b)]
    assert run_key(specs[0], {}) == run_key(specs[1], {}) and len(W.distinct(specs)) == 1


@pytest.mark.parametrize("method, variant, options", [
    ("mmil_base", "loss=wsl;pooling=attentive;temporal=none;noisy_label=none", {"loss": "wsl", "temporal": "none", "noisy": "none"}),
    ("mmil+gru", "loss=wsl+g;pooling=mean;temporal=gru;noisy_label=bootstrap", {"temporal": "gru", "pooling": "mean", "noisy": "bootstrap"}),
    ("ma_baseline", "", {"contrast": False, "refine": "none"}), ("ma", "tau=0.3", {"tau": 0.3, "contrast": True}),
    ("dgm", "gamma=0.1;measure=fusion;msdu=0", {"msdu": False, "gamma": 0.1}), ("jomold_wo_cl", "", {"contrast": False}),
    ("dgm+msdu", "gamma=none;msdu=1", {"modulate": False, "msdu": True}),
    ("coleaf", "anchor_loss=bce;selfmo=0;tokens=1;cocls=0", {"anchor_loss": "bce", "selfmo": False, "tokens": True, "cocls": False})])
def test_variants_become_options(method, variant, options):
    full = W.system_of(method, variant).spec().full_options
    assert {k: full[k] for k in options} == options


def test_dgm_stands_on_jomold_unless_the_paper_says_otherwise():
    assert W.system_of("dgm+msdu").spec().backbone == "jomold"
    assert W.system_of("dgm+msdu@han").spec().backbone == "han"
    assert all(m in METHODS for m, _ in W.row_of().values())


def test_coleaf_stands_on_cmpae_unless_the_paper_says_otherwise():
    assert [W.system_of(m).spec().backbone for m in ("coleaf", "coleaf@han", "coleaf@jomold")] == ["cmpae", "han", "jomold"]


def test_labels_and_data_sets_of_coleafs_tables():
    weak, dense = P.plan("coleaf", 6, seeds=(1,)), P.plan("coleaf", 7, seeds=(1,))
    assert {s.labels for s in weak.specs} == {None} and {s.labels for s in dense.specs} == {"clip+clap"}
    own, other = DataSpec("a", "b"), DataSpec("c", "d", dataset="unav100")
    assert [P.plan("coleaf", t, data=(own, other)).data for t in (6, 8)] == [own, other]
    assert P.plan("coleaf", 8, data=own).data == DataSpec(dataset="unav100"), "features of LLP are no features of UnAV-100"
    assert P.plan("coleaf", 6, data=other).data == DataSpec()
    assert {s.data for s in P.all_specs("coleaf", seeds=(1,), data=(own, other))} == {own, other}
    with pytest.raises(InputError, match="several of llp"): P.plan("coleaf", 6, data=(own, own))


@pytest.mark.parametrize("call, said", [
    (lambda: P.plan("hna", 1), "paper: 'hna' is not possible. expected one of 'han', 'ma', 'dgm', 'coleaf'"),
    (lambda: P.plan("dgm", "VIII"), "table of dgm: 'VIII' is not possible. expected one of 'I', 'II'"),
    (lambda: P.plan("ma", 1, "huge"), "scale: 'huge'"), (lambda: P.plan("ma", 1, seeds=[]), "no seeds"),
    (lambda: P.plan("ma", 1, seeds=["one"]), "'one' is a str"),
    (lambda: W.system_of("cmpae", "thresholds=mine"), "variant 'thresholds=mine': 'mine' is not possible"),
    (lambda: P.plan("coleaf", 9), "table of coleaf: '9'"), (lambda: L.against_nothing("coleaf", "12"), "table of coleaf: '12'"),
    (lambda: W.system_of("hann"), "did you mean 'han'"), (lambda: W.system_of("ma", "t=1"), "variant 't=1': 't' is not possible"),
    (lambda: W.all_tables(None, "VI"), "needs one paper"), (lambda: P.all_specs("x"), "paper: 'x'"),
    (lambda: R.reproduce("dgm", "IX"), "table of dgm: 'IX'")])
def test_unknown_names_are_refused_with_what_is_possible(call, said):
    with pytest.raises(InputError, match=said.replace("(", r"\(")): call()


def test_seeds_follow_the_scale():
    assert [len(P.default_seeds(s)) for s in ("tiny", "small", "full")] == [1, 3, 5]
    assert set(P.SEEDS) == set(SCALES)


def test_the_whole_set_holds_every_table_once_with_its_first_stages():
    specs = P.all_specs(seeds=(1,))
    def key(s): return run_key(s, {"dataset": s.data.dataset})
    keys = {key(s) for s in specs}
    assert len(keys) == len(specs)
    for p, t in ALL: assert {key(s) for s in P.plan(p, t, seeds=(1,)).specs} <= keys
    at = {key(s): i for i, s in enumerate(specs)}
    for s in specs:
        for f in s.base.first(s): assert at[key(f)] < at[key(s)], "a stage comes before what needs it"
    assert any(s.full_options.get("modulate") is False for s in specs), "DGM, Fig. 5"
    assert len(P.all_specs("han", seeds=(1, 2))) == 2 * (14 + len(NEW))
    assert {s.method for s in P.all_specs("han", seeds=(1,))} == {*NEW, "han"}


# ---------------------------------------------------------------- the sweep

def test_a_sweep_trains_what_is_missing_and_counts_the_whole(store, trained, capsys):
    specs = P.plan("ma", 3, "tiny").specs
    assert R.train_missing(specs, store) == 5 and len(trained) == 5     # three rows, a control, and their common base
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "5 runs, 0 of them recorded" and [x[:5] for x in lines[1:]] == [f"[{i}/5]" for i in range(1, 6)]
    assert "left" not in lines[1] and all("left" in x for x in lines[2:])
    assert R.train_missing(P.plan("ma", 2, "tiny").specs, store) == 2
    assert "[3/4]" in capsys.readouterr().out and len(trained) == 7
    assert R.train_missing(specs, store, progress="off") == 0 and capsys.readouterr().out == ""


def test_an_interrupted_sweep_continues(store, monkeypatch):
    specs, done = P.plan("han", 2, "tiny").specs, []

    def run(spec, store, *a):
        if len(done) == 5 and done.append("stop") is None: raise KeyboardInterrupt
        done.append(spec)
        return fill(store, [spec])[0]

    monkeypatch.setattr(R, "run", run)
    with pytest.raises(KeyboardInterrupt): R.train_missing(specs, store, progress="off")
    assert R.train_missing(specs, store, progress="off") == 14 - 5


def test_a_run_that_diverges_does_not_stop_the_others_and_is_named(store, monkeypatch):
    def run(spec, store, *a):
        if spec.full_options["pooling"] == "max": raise FloatingPointError("loss is nan")
        return fill(store, [spec])[0]

    monkeypatch.setattr(R, "run", run)
    with pytest.raises(FloatingPointError, match=r"2 of 14 runs diverged: han \(.*pooling=max"):
        R.train_missing(P.plan("han", 2, "tiny").specs, store, progress="off")
    assert len(store.records()) == 12


@pytest.mark.parametrize("seconds, text", [(0, "0 s"), (99, "99 s"), (600, "10 min"), (7200, "2.0 h")])
def test_durations(seconds, text): assert R.duration(seconds) == text


# ---------------------------------------------------------------- tables

ACCURACIES = (("dgm", "II"), ("dgm", "III"))


@pytest.mark.parametrize("paper, table", ACCURACIES)
def test_tables_of_accuracies_are_drawn_beside_the_printed_numbers(paper, table, store):
    plan = P.plan(paper, table, "tiny", (1, 2))
    t = P.draw(plan, [record_of(s) for s in plan.specs], store)
    assert [r.kind for r in t.rows if r.kind != "floor"] == ["ours", "printed"] * 2 and "simulated" in t.rows[0].source
    assert t.provenance["parameters"]["table"] == table and not any("Not run yet" in n for n in t.notes)
    half = P.draw(plan, [record_of(plan.specs[0])], store)
    assert any("Not run yet" in n for n in half.notes) and any("Seeds missing" in n for n in half.notes)


@pytest.mark.parametrize("paper, table", [x for x in ALL if x not in W.RATES and x not in ACCURACIES])
def test_each_table_is_rendered_with_printed_numbers_differences_and_floors(paper, table):
    plan = P.plan(paper, table, "tiny", (1, 2))
    records = [record_of(s) for s in plan.specs]
    t = P.render(plan, records)
    controls = [r for r in plan.rows if (r.method, r.variant) in P.CONTROLS.get((paper, table), ())]
    for r in plan.rows:
        kinds = ["ours"] * bool(r.specs) + ["printed"] * (r not in controls)       # no difference: ours are simulated
        assert [x.kind for x in t.rows if x.name == r.label] == kinds
    assert [r.name for r in t.rows if r.kind == "floor"] == ["nothing", "true segments"]
    order = [r.name for r in t.rows if r.kind == "printed"]
    assert order == [r.label for r in plan.rows if r not in controls]
    row = next(r for r in plan.rows if r.specs)
    own, printed = (t.row(row.label, k) for k in ("ours", "printed"))
    k = next(k for k in t.columns if k in printed.mean)     # not every table has the same columns
    values = [r["metrics"][r["rule"]][k[0]][k[1]] for r in records if W.experiment(r["spec"]) == W.experiment(row.specs[0].plain())]
    assert own.mean[k] == pytest.approx(np.mean(values)) and own.sd[k] == pytest.approx(np.std(values, ddof=1))
    assert printed.mean[k] == plan.printed(row).loc[(paper, table, row.method, row.variant, k[0]), k[1]]
    real = P.render(plan, [r | {"data": r["data"] | {"simulated": False, "mark": ""}} for r in records])
    assert real.row(row.label, "difference").mean[k] == pytest.approx(own.mean[k] - printed.mean[k])
    assert len(own.info["runs"]) == 2 and all("simulated" in r.source for r in t.rows if r.kind != "printed")


@pytest.mark.parametrize("table, metrics", [("2", 3), ("3", 3), ("4", 3), ("5", 3), ("6", 9), ("7", 9), ("8", 1)])
def test_coleafs_tables_have_the_columns_of_the_paper(table, metrics):
    plan = P.plan("coleaf", table, "tiny", (1,))
    t = P.render(plan, [record_of(s) for s in plan.specs])
    printed = reported("coleaf", table, dataset=None)
    assert [m for lv, m in t.columns if lv == "segment"] == list(printed.columns) and len(t.columns) == 2 * metrics
    assert ("UnAV-100" in t.notes[0]) == (table == "8")


def test_selected_thresholds_are_read_from_the_same_runs():
    plan = P.plan("coleaf", 6, "tiny", (1, 2))
    records = [record_of(s, noise=0) for s in plan.specs]
    t = P.render(plan, records)
    own, searched = (t.row(n) for n in ("CoLeaF", "CoLeaF (thresholds=selected)"))
    assert own.info["runs"] == searched.info["runs"] and searched.info["rule"] == "coleaf, selected thresholds"
    assert searched.mean["event", "Vo"] - own.mean["event", "Vo"] == pytest.approx(1)
    for r in records: r["selected"].pop("kept")
    t = P.render(plan, records)
    assert [r.kind for r in t.rows if r.name == "CoLeaF (thresholds=selected)"] == ["printed"] and "Not run yet" in " ".join(t.notes)
    with pytest.raises(InputError, match="has no selected thresholds"): groups.scores(records[0], SELECTED)


def test_table_6_in_three_settings():
    plan = P.plan("coleaf", 6, "tiny", (1, 2))
    t = L.settings(plan, [record_of(s, noise=0, rules=RULE) for s in plan.specs], common="ma")
    assert list(t) == ["own", "common", "selected"] and {r.info["rule"] for r in t["common"].rows if r.kind == "ours"} == {"ma"}
    by = {k: x.row("CMPAE").mean["segment", "Ao"] for k, x in t.items()}
    assert by["common"] - by["own"] == pytest.approx(RULE["ma"] - RULE["cmpae"])
    assert by["selected"] == t["own"].row("CMPAE (thresholds=selected)").mean["segment", "Ao"]
    assert [r.name for r in t["selected"].rows if r.kind == "printed"] == ["CMPAE", "CoLeaF"]
    assert not [r for r in t["common"].rows if r.kind in ("printed", "difference")] and [r for r in t["common"].rows if r.kind == "floor"]
    assert len({x.caption for x in t.values()}) == 3
    with pytest.raises(InputError, match="common: 'mb'"): L.settings(plan, [], common="mb")


def test_data_sets_are_not_mixed():
    llp, unav = (record_of(W.system_of("han").spec(1, "tiny", DataSpec(dataset=d))) for d in ("llp", "unav100"))
    assert llp["key"] != unav["key"]
    with pytest.raises(InputError, match="different data sets: llp, unav100"): P.by_experiment([llp, unav])


def test_a_half_finished_table_says_what_is_missing():
    plan = P.plan("ma", 3, "tiny", (1, 2))
    t = P.render(plan, [record_of(s) for s in (*plan.rows[0].specs, plan.rows[1].specs[0])])
    assert "Not run yet: MA (refine=both), MA (refine=random)." in t.notes and "Seeds missing: MA (refine=visual) (1 of 2 seeds)." in t.notes
    assert [r.kind for r in t.rows if r.name == "MA (refine=both)"] == ["printed"]
    assert not [r for r in t.rows if r.name == "MA (refine=random)"], "nobody has printed it"
    with pytest.raises(InputError, match="none of its runs is recorded.*reproduce ma --table 3"): P.render(plan, [])


def test_records_of_another_scale_or_other_data_are_not_taken(store):
    from avvp_nb.data.sim_labels import SimParams
    spec = W.system_of("han").spec
    other = DataSpec(sim=SimParams(seed=9))
    fill(store, [spec(1, "tiny"), spec(1, "small"), spec(1, "tiny", other)])
    assert len(store.records()) == 3 and len(P.load_records(store, "tiny")) == 1
    assert len(P.load_records(store, "tiny", other)) == 1 and P.load_records(store, "full") == []
    with pytest.raises(InputError, match="different scales"): P.by_experiment([record_of(spec(1, s)) for s in ("tiny", "small")])


def test_reproduce_trains_renders_and_saves_without_machine_paths(store, trained):
    tables = R.reproduce("dgm", "VI", "tiny", (1, 2), store, progress="off")
    assert list(tables) == ["dgm VI"] and len(trained) == 9 * 2 + 2      # the noise estimator once a seed
    stem = P.table_stem(P.plan("dgm", "VI", "tiny"), store)
    saved = {s: stem.with_name(stem.name + s).read_text() for s in (".md", ".html", ".tex", ".csv", ".json")}
    prov = json.loads(saved[".json"])
    assert len(prov["runs"]) == 18 and prov["simulated"] and prov["parameters"]["data"] == "simulated"
    assert not any(str(store.root) in text for text in saved.values())
    again = R.reproduce("dgm", "vi", "tiny", (1, 2), store, train=False)
    assert len(trained) == 20 and again["dgm VI"].to_csv() == saved[".csv"]


def test_a_paper_is_all_its_tables_and_several_papers_share_runs(store, trained):
    tables = R.reproduce(["han", "ma"], scale="tiny", store=store, progress="off")
    assert list(tables) == ["han 1", "han 2", "ma 1", "ma 2", "ma 3", "ma 4"]
    assert len({W.experiment(s.plain()) for s in trained}) == len(trained)


def test_nothing_is_trained_when_the_input_is_wrong(store, trained, tmp_path):
    for wrong in (dict(paper="dgm", table="X"), dict(paper="dgm", scale="x"), dict(paper="dgm", seeds=()),
                  dict(paper="dgm", data=DataSpec(annotations=str(tmp_path / "none")))):
        with pytest.raises(InputError): R.reproduce(store=store, **wrong)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="could not be written"): R.reproduce("han", store=tmp_path / "file")
    assert trained == []


def test_the_kind_of_data_is_in_the_file_name():
    kinds = [P.data_kind(d) for d in (DataSpec(), DataSpec("a"), DataSpec("a", "f"))]
    assert kinds == ["simulated", "annotated", "real"]


def test_a_table_of_real_runs(store, monkeypatch):
    "No invented record: one real run of HAN in a fraction of its size"
    from micro import install
    install(monkeypatch.setitem)
    t = R.reproduce("han", 1, "micro", store=store, device="cpu", progress="off")["han 1"]
    floors = [r.name for r in t.rows if r.kind == "floor"]
    assert floors[0] == "nothing" and {"true video-level label per modality", "true segments"} <= set(floors)
    assert t.row("HAN").info["seeds"] == 1 and t.mark.startswith("simulated")


def test_coleafs_tables_of_real_runs(store, monkeypatch):
    "Rates from the probabilities of a real run, and an ablation, in a fraction of their size"
    from micro import install
    install(monkeypatch.setitem)
    rates = R.reproduce("coleaf", 1, "micro", store=store, device="cpu", progress="off")["coleaf 1"]
    assert rates.columns[0] == ("A", "U") and rates.mark.startswith("simulated") and len(rates.provenance["runs"]) == 1
    assert rates.provenance["parameters"]["table"] == "1" and (store.root / "tables" / "coleaf_1_micro_simulated.csv").exists()
    t = R.reproduce("coleaf", 3, "micro", store=store, device="cpu", progress="off")["coleaf 3"]
    assert [r.name for r in t.rows if r.kind == "ours"] == ["CoLeaF (selfmo=0)", "CoLeaF (selfmo=1)"]
    records = P.load_records(store, "micro")
    own = L.only_table(L.headline(records))
    nothing = {r.source.split("; ")[1]: r.mean["segment", "Vo"] for r in own.rows if r.kind == "floor"}
    assert nothing["as published"] > 30 and nothing[L.TREATED["skip"]] == nothing[L.TREATED["pooled"]] == 0


# ---------------------------------------------------------------- rules and selection

RULE = {**dict.fromkeys(RULES, 0.0), "ma": 1.0, "jomold": 2.0, "cmpae": 0.5, "coleaf": -1.0}


def seeds_of(method, seeds=(1, 2, 3), **kw): return [record_of(W.system_of(method).spec(s, "tiny"), noise=0, rules=RULE, **kw) for s in seeds]


def test_methods_times_rules():
    t = L.cross_table({"HAN": seeds_of("han"), "JoMoLD": seeds_of("jomold")}, metrics=[("event", "V")])
    assert t.columns == [("event V", r) for r in RULES]
    assert t.row("JoMoLD").mean["event V", "coleaf"] - t.row("HAN").mean["event V", "ma"] == pytest.approx(3 - 2)
    assert "own rule jomold" in t.row("JoMoLD").source and t.mark == MARK
    with pytest.raises(InputError, match="rule of run"): L.cross_table({"HAN": seeds_of("han")}, rules=["x"])
    with pytest.raises(InputError, match="no run records"): L.cross_table({})


def test_headline_names_the_main_systems():
    records = seeds_of("han") + seeds_of("dgm+msdu@han") + seeds_of("ma_cl_only")
    assert {k: len(v) for k, v in L.headline(records).items()} == {"HAN": 3, "DGM+MSDU on HAN": 3}


# ---------------------------------------------------------------- videos without an event

def ladder(): return {n: seeds_of(m, (1, 2)) for n, m in (("HAN", "han"), ("CMPAE", "cmpae"), ("CoLeaF", "coleaf"))}


def test_only_scores_are_shown_in_three_ways_with_the_empty_prediction():
    t = L.only_table(ladder())
    assert [r.name for r in t.rows] == ["HAN"] * 3 + ["CMPAE"] * 3 + ["CoLeaF"] * 3 + ["nothing"] * 3
    published, skip, pooled = (r.mean["segment", "Vo"] for r in t.rows[:3])
    assert skip - published == pytest.approx(ONLY["skip"]) and pooled - published == pytest.approx(ONLY["pooled"])
    assert [r.mean["event", "Ao"] for r in t.rows[-3:]] == [8, 0, 0] and all("simulated" in r.source for r in t.rows)
    assert len([n for n in t.notes if n.startswith("Runs:")]) == 1 and t.notes[-1].count("HAN:") == 1
    old = [{k: v for k, v in r.items() if k != "only"} for r in seeds_of("han")]
    with pytest.raises(InputError, match="has no corrected scores under han"): L.only_table({"HAN": old})


def test_the_empty_prediction_of_a_real_record_scores_nothing_where_it_should():
    "What the corrected floors stand for: no hit at all"
    from avvp_nb.metrics import only_scores
    a, v = np.zeros((2, 4, 6, 3), int)
    a[0, :3, 0] = 1; v[1, 2:, 1] = 1
    published, skip, pooled = (only_scores(0 * a, 0 * a, a, v, empty=e).loc["segment"] for e in ("one", "skip", "pooled"))
    assert published["Ao"] == published["Vo"] == 75 and skip["Ao"] == skip["Vo"] == pooled["Ao"] == pooled["Vo"] == 0


def test_the_change_of_ranking_is_computed():
    groups = ladder()
    for r in groups["CoLeaF"]: r["only"][r["rule"]]["skip"]["segment"]["Vo"] = 0.0
    published, skip, pooled = (r for r in L.ranking(groups).rows if r.name == "Vo segment")
    assert [r.source for r in (published, skip, pooled)] == [f"{x}, simulated" for x in L.TREATED.values()]
    assert published.mean == {("", "order, best first"): "CoLeaF > CMPAE > HAN > nothing"}
    assert skip.mean["", "order, best first"] == "CMPAE > HAN > CoLeaF = nothing"
    assert skip.mean["", "τ to published"] == pytest.approx(-1 / 3) and pooled.mean["", "τ to published"] == 1
    assert skip.mean["", "change places"] == "HAN and CoLeaF; CMPAE and CoLeaF" and pooled.mean["", "change places"] == "none"


@pytest.mark.parametrize("a, b, tau", [("abc", "abc", 1), ("abc", "cba", -1), ("abc", "bac", 1 / 3)])
def test_kendalls_tau(a, b, tau):
    before, after = ({n: -s.index(n) for n in "abc"} for s in (a, b))
    assert L.kendall(before, after) == pytest.approx(tau) and len(L.swapped_pairs(before, after)) == round(3 * (1 - tau) / 2)


def test_printed_scores_are_held_against_the_empty_prediction():
    t = L.against_nothing()
    assert [r.name for r in t.rows][0] == "HAN" and len(t.rows) == 7, "rows that print no Ao are left out"
    assert all(r.mean["segment", "Vo"] < 0 for r in t.rows) and "(7 of 7)" in " ".join(t.notes)
    assert t.row("CoLeaF", "difference").mean["segment", "Vo"] == pytest.approx(62.4 - 65.5833, abs=1e-3)
    assert t.row("CoLeaF", "difference").mean["event", "Ao"] > 0


def test_the_part_of_a_gain_that_is_the_rule():
    own, ref = seeds_of("jomold"), seeds_of("han", (2, 3, 4))
    row = L.rule_share(own, ref).rows[0]
    assert row.mean == pytest.approx({("", "gain"): 5, ("model: both under", "han"): 3, ("model: both under", "jomold"): 3,
                                      ("", "rule"): 2, ("", "rule, % of gain"): 40})
    assert row.info["seeds"] == 2 and len(row.info["runs"]) == 4
    one = L.rule_share(own, ref, common="cmpae").rows[0].mean
    assert [k for k in one if k[0]] == [("model: both under", "cmpae")]


def test_the_two_ways_to_split_are_averaged():
    own, ref = seeds_of("jomold", (1,))[0], seeds_of("han", (1,))[0]
    own["metrics"]["jomold"]["event"]["A"] += 4        # the rule helps the new method more than the old one
    parts = L.split_gain(own, ref, ("event", "A"))
    assert parts["", "gain"] == pytest.approx(9) and parts["", "rule"] == pytest.approx((6 + 2) / 2)


def test_no_share_of_a_gain_that_is_not_there():
    row = L.rule_share(seeds_of("han", gain=0.1), seeds_of("han")).rows[0]
    assert row.mean["", "rule"] == 0 and np.isnan(row.mean["", "rule, % of gain"])
    with pytest.raises(InputError, match=r"no seed in common: \[1\] and \[2\]"):
        L.rule_share(seeds_of("ma", (1,)), seeds_of("han", (2,)))


def test_gains_under_every_rule_and_their_picture():
    groups = {"HAN": seeds_of("han"), "JoMoLD": seeds_of("jomold")}
    frame = L.gains(groups, "HAN")
    assert frame.loc["JoMoLD"].to_dict() == pytest.approx({"own rules": 5, **dict.fromkeys(RULES, 3)})
    assert "JoMoLD: +5.0 under own rules, +3.0 to +3.0" in L.plot_gains(groups, "HAN").get_label()
    with pytest.raises(InputError, match="reference: 'x'"): L.gains(groups, "x")


def test_selection_metrics_pick_from_history_with_ties_to_the_later_epoch():
    frame = pd.DataFrame({"event/A": [1.0, 2.0, 2.0, 1.0]}, index=[1, 2, 3, 4])
    assert L.picked_epoch(frame, "event/A") == 3 and L.picked_epoch(frame, "last") == 4
    with pytest.raises(InputError, match="selector: 'x'"): L.picked_epoch(frame, "x")
    t = L.selection_effect({"HAN": seeds_of("han")})
    epochs = [r.mean["kept", "epoch"] for r in t.rows]
    assert epochs == [3, 3, 3, 4] and "unknown" in t.notes[-1]
    assert t.rows[2].mean["validation score there", "avg10"] - t.rows[3].mean["validation score there", "avg10"] == pytest.approx(1)


def test_a_history_without_validation_is_refused():
    for history in ([], [{"epoch": 1, "val": {}}], [{"epoch": 1}]):
        with pytest.raises(InputError, match="has no validation scores"): L.validation({"key": "k", "history": history})


# ---------------------------------------------------------------- the command

def parse(*argv):
    p = argparse.ArgumentParser()
    R.add_arguments(p)
    return p.parse_args([str(a) for a in argv])


@pytest.mark.slow
def test_the_command(store, trained, capsys, monkeypatch):
    R.cmd_reproduce(parse("ma", "--table", 4, "--scale", "tiny", "--seeds", 1, 2, "--out", store.root, "--progress", "off"))
    out = capsys.readouterr().out
    assert "**MA, Table 4, at scale tiny" in out and "1 table saved below" in out and len(trained) == 16
    R.cmd_reproduce(parse("coleaf", "--table", 5, "--scale", "tiny", "--seeds", 1, "--out", store.root))
    assert "| CoLeaF on HAN |" in capsys.readouterr().out
    monkeypatch.setattr(P, "rates_table", lambda records, *a, **kw: comparing.compare({"CMPAE": records}))     # needs probabilities
    R.cmd_reproduce(parse("all", "--scale", "tiny", "--seeds", 1, "--out", store.root))
    assert "21 tables saved below" in capsys.readouterr().out
    n = len(trained)
    R.cmd_reproduce(parse("dgm", "--scale", "tiny", "--seeds", 1, "--out", store.root, "--no-train"))
    assert len(trained) == n
    with pytest.raises(InputError, match="paper: 'x'"): R.cmd_reproduce(parse("x"))


def test_the_arguments_say_where_the_data_are():
    llp, unav, *_ = sources.data_of(parse("ma", "--annotations", "a", "--features", "f", "--audio-table", "2020", "--pseudo-labels", "p", "--unav-annotations", "u"))
    assert (llp.annotations, llp.features, llp.audio_table, llp.pseudo_labels) == ("a", "f", "2020", "p")
    assert (unav.dataset, unav.annotations, unav.features) == ("unav100", "u", None)
    assert isinstance(W.System("han").spec(data=llp), RunSpec)
