"""The generated block of README.md says what the committed records say."""
import pytest
from tree import ROOT, load

results = load("tools/results.py")


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
