"""figures/ and the generated block of README.md say what the committed records say, byte for byte."""
import re
import shutil

import matplotlib
import pytest
from tree import ROOT, load

from avvp_nb.data.sources import DataSpec
from avvp_nb.methods.zoo import METHODS
from avvp_nb.records.spec import RunSpec, run_key
from avvp_nb.records.store import Store, whole_record
from avvp_nb.results.claims import UNTRAINED
from avvp_nb.results.groups import check_record, scale_of

results = load(ROOT / "tools" / "results.py")
FIGURES = ROOT / "figures"


@pytest.fixture(scope="module")
def records(): return results.committed()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A copy of everything in figures/ that `make results` makes: a slow test makes it anew and finds the same bytes"
    folder = tmp_path_factory.mktemp("figures")
    for stem, files in results.stems(FIGURES).items():
        for p in () if stem in results.KEPT else files:
            (folder / p.relative_to(FIGURES)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(p, folder / p.relative_to(FIGURES))
    return folder


def test_readme_is_rendered_from_the_committed_records():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert results.readme(text) == text, "run `make readme`"


def pinned(name):
    "The version of a package in requirements.lock"
    return re.search(rf"^{name}==(\S+)", (ROOT / "requirements.lock").read_text(), re.M)[1]


@pytest.mark.slow
def test_tables_and_pictures_are_rendered_to_the_same_bytes(records, made, tmp_path):
    "Pictures only with the version of matplotlib that drew them; no other lays text out to the same bytes"
    results.write(records, tmp_path)
    assert results.stems(tmp_path).keys() == results.stems(made).keys()
    differ = results.differences(tmp_path)
    if matplotlib.__version__ != pinned("matplotlib"): differ = [k for k in differ if k.parts[0] == "tables"]
    assert not list(differ), "run `make results`"


def test_a_changed_a_missing_and_a_stale_file_are_noticed(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "figures")
    monkeypatch.setattr(results, "FIGURES", tmp_path / "figures")
    assert not results.differences(made)
    changed, missing, stale = (tmp_path / "figures" / "tables" / f"{x}.md" for x in ("errata", "coleaf_cost", "stale"))
    changed.write_text("other")
    missing.unlink()
    stale.write_text("of a run that is gone")
    (tmp_path / "figures" / "han_fig4_pooling.png").write_bytes(b"kept: needs weights")
    found = results.differences(made)
    assert [k.name for k in found] == ["coleaf_cost.md", "errata.md", "stale.md"] and found[stale.relative_to(tmp_path / "figures")] is None


def test_files_that_are_no_tables_and_no_pictures_are_left_alone(made, tmp_path, monkeypatch):
    "Weights, records, benchmarks, other folders: `make results` once removed a file that it did not know"
    home = tmp_path / "figures"
    shutil.copytree(made, home)
    monkeypatch.setattr(results, "FIGURES", home)
    others = [home / x for x in ("weights/net.safetensors", "weights/net.json", "records/a.json", "bench/a.md", "elsewhere/a.png", "notes.txt", "README.md")]
    for p in others:
        p.parent.mkdir(exist_ok=True)
        p.write_text("mine")
    assert not results.differences(made)


def test_what_records_cannot_make_is_listed_with_its_notebook_and_is_there():
    for stem, nb in results.KEPT.items():
        assert (FIGURES / f"{stem}.json").is_file() and (ROOT / "nbs" / f"{nb}.ipynb").is_file(), stem
    assert results.KEPT.keys() <= results.stems(FIGURES).keys()


def test_every_table_and_picture_has_its_five_or_three_files(made):
    for stem, files in results.stems(made).items():
        assert len({p.suffix for p in files} & {".json", ".md", ".html", ".tex", ".csv", ".svg", ".png"}) == (5 if stem.startswith("tables/") else 3), stem


def test_there_are_tables_of_all_four_papers_and_their_gains(made):
    stems = {p.stem for p in (made / "tables").glob("*.md")}
    for paper in ("han", "ma", "dgm", "coleaf"):
        assert sum(s.startswith(f"{paper}_") and s.endswith("_simulated") for s in stems) >= 2, paper
        assert any(s.startswith(f"{paper}_") and s.endswith("_simulated_gains") for s in stems), paper


def test_nothing_is_judged_where_networks_are_not_trained(made):
    judged = [p.stem for p in made.rglob("*.json") if p.stem.startswith(("claim_", "claims_", "findings_"))]
    assert judged and not [s for s in judged if any(scale in s.split("_") for scale in UNTRAINED)]


def test_committed_records_are_whole(records):
    assert len(records) >= 100
    for r in records:
        check_record(r)
        assert r["data"]["mark"].startswith("simulated") or not r["data"]["simulated"]


def test_committed_records_of_real_signals_are_whole_and_say_so():
    found = [whole_record(p) for p in sorted((FIGURES / "records" / "signals").glob("*.json"))]
    assert len(found) >= 100
    for r in found:
        check_record(r)
        composed = r["data"]["identity"].get("dataset") == "signals"
        assert (r["data"]["simulated"], r["data"]["mark"].startswith("real signals")) == (not composed, composed)
        assert (FIGURES / "videos" / "signals" / f"{r['key']}.npz").exists(), r["key"]


def test_committed_records_stay_small():
    assert sum(p.stat().st_size for p in (FIGURES / "records").rglob("*.json")) < 20e6


def test_repeats_are_of_committed_runs_and_follow_one_rule(records):
    "The record that counts is the later one, unless other committed runs were trained from the earlier one"
    now, others = {r["key"]: r for r in records}, [whole_record(p) for p in sorted((FIGURES / "records" / "repeats").glob("*.json"))]
    assert others
    for r in map(check_record, others):
        kept = now[r["key"]]
        assert r["spec"] == kept["spec"] and r["data"]["identity"] == kept["data"]["identity"], r["key"]
        heirs = [x for x in records if r["key"] in (x.get("first") or ()) and x["finished"] < r["finished"]]
        assert (kept["finished"] > r["finished"]) != bool(heirs), r["key"]


def test_stages_come_before_what_was_trained_from_them(records):
    "A run compared with another shares its first stage: nothing is older than the record of the stage that it names"
    now = {r["key"]: r for r in records}
    for r in records:
        if scale_of(r) in UNTRAINED: continue
        for k in r.get("first") or ():
            if k in now: assert now[k]["finished"] < r["finished"], (r["key"], k)


def test_intervals_of_all_judged_runs_can_be_made_again_in_a_clone(records):
    store = Store(FIGURES)
    for r in records:
        if scale_of(r) in UNTRAINED or scale_of(r) == "calibration" or r.get("task", "parsing") != "parsing": continue
        kept = store.kept_videos(r)
        assert kept is not None and kept["own"].shape[0] == r["data"]["n"]["test"], r["key"]


def test_every_run_behind_a_table_or_picture_is_committed(records):
    from avvp_nb.core import read_json
    known = {r["key"] for r in records} | {p.stem for p in (FIGURES / "records" / "signals").glob("*.json")}
    for p in sorted(FIGURES.rglob("*.json")):
        if {"records", "bench"} & set(p.parts): continue
        assert set(read_json(p).get("runs", [])) <= known, p.relative_to(FIGURES)


def test_the_committed_calibration_run_is_within_three_points_of_the_simulator_specification(records):
    "HAN on 10,000 simulated videos with real annotations, four epochs (the setting in which the simulator was calibrated)"
    from avvp_nb.data.sim_files import calibration_rows
    wanted = calibration_rows().loc["HAN, simulated, 4 epochs"]
    found = [r for r in records if r["spec"]["scale"] == "calibration" and r["spec"]["method"] == "han"]
    if not found:
        pytest.skip("no record at the calibration scale is committed")
    for r in found:
        assert r["data"]["n"]["train"] == 10_000 and len(r["history"]) == 4
        for (level, metric), value in wanted.items():
            assert abs(r["metrics"]["han"][level][metric] - value) < 3, (r["key"], level, metric)


def test_the_keys_of_committed_records_are_those_that_a_run_would_have_today(records):
    "Nobody's store becomes worthless: what was asked for and what the data are still give the same address"
    checked = 0
    for r in records:
        s = r["spec"]
        if not set(s["options"]) <= set(METHODS[s["method"]].options): continue   # one record is older than its options
        data = DataSpec(dataset=r["data"]["identity"].get("dataset", "llp"))
        again = RunSpec(s["method"], s["options"], s["backbone"], s["protocol"], data=data, scale=s["scale"], seed=s["seed"],
                        precision=s["precision"], labels=s.get("labels"))
        assert again.plain() == s and run_key(again, r["data"]["identity"]) == r["key"], r["key"]
        checked += 1
    assert checked >= 100
