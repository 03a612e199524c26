"""The generated block of README.md says what the committed records say."""
import pytest
from tree import ROOT, load

results = load(ROOT / "tools" / "results.py")


def test_readme_is_rendered_from_the_committed_records():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert results.readme(text) == text, "run `make readme`"


def test_committed_records_are_whole():
    found = results.committed()
    if not found:
        pytest.skip("no record is committed")
    from avvp_nb.report import check_record
    for r in found:
        check_record(r)
        assert r["data"]["mark"].startswith("simulated") or not r["data"]["simulated"]


def test_the_committed_calibration_run_is_within_three_points_of_the_simulator_specification():
    "HAN on 10,000 simulated videos with real annotations, four epochs (the setting in which the simulator was calibrated)"
    from avvp_nb.simulate import calibration_rows
    wanted = calibration_rows().loc["HAN, simulated, 4 epochs"]
    found = [r for r in results.committed() if r["spec"]["scale"] == "calibration" and r["spec"]["method"] == "han"]
    if not found:
        pytest.skip("no record at the calibration scale is committed")
    for r in found:
        assert r["data"]["n"]["train"] == 10_000 and len(r["history"]) == 4
        for (level, metric), value in wanted.items():
            assert abs(r["metrics"]["han"][level][metric] - value) < 3, (r["key"], level, metric)
