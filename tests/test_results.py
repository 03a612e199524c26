"""The generated block of README.md says what the committed records say."""
import pytest
from tree import ROOT, load

from avvp_nb.core import content_hash, read_json
from avvp_nb.data.sources import DataSpec, identify
from avvp_nb.methods.zoo import METHODS
from avvp_nb.records.spec import RunSpec, run_key
from avvp_nb.results.groups import dataset_of
from avvp_nb.results.plans import plan, render
from avvp_nb.results.rows import DATASET
from avvp_nb.results.rules import against_nothing, settings

results = load(ROOT / "tools" / "results.py")


def test_readme_is_rendered_from_the_committed_records():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert results.readme(text) == text, "run `make readme`"


def test_committed_records_are_whole():
    found = results.committed()
    if not found:
        pytest.skip("no record is committed")
    from avvp_nb.results.groups import check_record
    for r in found:
        check_record(r)
        assert r["data"]["mark"].startswith("simulated") or not r["data"]["simulated"]


def test_the_committed_calibration_run_is_within_three_points_of_the_simulator_specification():
    "HAN on 10,000 simulated videos with real annotations, four epochs (the setting in which the simulator was calibrated)"
    from avvp_nb.data.sim_files import calibration_rows
    wanted = calibration_rows().loc["HAN, simulated, 4 epochs"]
    found = [r for r in results.committed() if r["spec"]["scale"] == "calibration" and r["spec"]["method"] == "han"]
    if not found:
        pytest.skip("no record at the calibration scale is committed")
    for r in found:
        assert r["data"]["n"]["train"] == 10_000 and len(r["history"]) == 4
        for (level, metric), value in wanted.items():
            assert abs(r["metrics"]["han"][level][metric] - value) < 3, (r["key"], level, metric)


TABLES = ROOT / "figures" / "tables"


def same_files(stem, tmp_path):
    "Are all files of a rendered table, its provenance included, those that are committed?"
    made = {p.name: p.read_bytes() for p in tmp_path.glob(f"{stem}.*")}
    assert len(made) == 5
    return {name: made[name] == (TABLES / name).read_bytes() for name in made} == dict.fromkeys(made, True)


def planned():
    "The committed tables that a plan describes: (stem, paper, table, scale, seeds)"
    for path in sorted(TABLES.glob("*_simulated.json")):
        found = read_json(path)
        p = found.get("parameters", {})
        if set(p) >= {"paper", "table", "wanted_seeds"}:
            yield path.stem, p["paper"], p["table"], found["scale"][0], tuple(p["wanted_seeds"])


@pytest.mark.parametrize(("stem", "paper", "table", "scale", "seeds"), list(planned()), ids=lambda x: x if isinstance(x, str) else None)
def test_a_committed_table_is_rendered_to_the_same_bytes(stem, paper, table, scale, seeds, tmp_path):
    data = DataSpec(dataset=DATASET.get((paper, table), "llp"))
    wanted = content_hash(identify(data, None)[0])
    records = [r for r in results.committed() if r["spec"]["scale"] == scale and content_hash(r["data"]["identity"]) == wanted]
    render(plan(paper, table, scale, seeds, data), records, data="simulated").save(tmp_path / stem)
    assert same_files(stem, tmp_path)


def test_there_are_committed_tables():
    assert len(list(planned())) >= 19


@pytest.mark.parametrize("setting", ["own", "common", "selected"])
def test_the_three_readings_of_table_6_are_rendered_to_the_same_bytes(setting, tmp_path):
    found = read_json(TABLES / f"coleaf_6_{setting}.json")
    params = {k: v for k, v in found["parameters"].items()
              if k not in ("paper", "table", "rule", "setting", "wanted_seeds")} | {"notebook": found["notebook"]}
    records = [r for r in results.committed() if r["spec"]["scale"] == "tiny" and dataset_of(r) == "llp"]
    settings(plan("coleaf", "6", "tiny", (1,)), records, **params)[setting].save(tmp_path / f"coleaf_6_{setting}")
    assert same_files(f"coleaf_6_{setting}", tmp_path)


@pytest.mark.parametrize("table", ["6", "7"])
def test_what_nothing_scores_is_rendered_to_the_same_bytes(table, tmp_path):
    against_nothing("coleaf", table).save(tmp_path / f"coleaf_{table}_nothing")
    assert same_files(f"coleaf_{table}_nothing", tmp_path)


def test_the_keys_of_committed_records_are_those_that_a_run_would_have_today():
    "Nobody's store becomes worthless: what was asked for and what the data are still give the same address"
    checked = 0
    for r in results.committed():
        s = r["spec"]
        if not set(s["options"]) <= set(METHODS[s["method"]].options): continue   # one record is older than its options
        again = RunSpec(s["method"], s["options"], s["backbone"], s["protocol"], scale=s["scale"], seed=s["seed"],
                        precision=s["precision"], labels=s.get("labels"))
        assert again.plain() == s and run_key(again, r["data"]["identity"]) == r["key"], r["key"]
        checked += 1
    assert checked >= 80
