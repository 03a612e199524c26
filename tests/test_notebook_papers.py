"""`nbs/han.ipynb`, `nbs/ma.ipynb` and `nbs/claims.ipynb` as users run them: through papermill, at the tiny scale."""
import json

import pytest
from test_notebook_dgm import papermill, records
from tree import ROOT, Notebook


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    "One store for all notebooks, so that a run that two of them need is trained once"
    return tmp_path_factory.mktemp("papers") / "runs"


def execute(name, store, *args):
    "Executed copy of a notebook of nbs/"
    out = store.parent / f"{name}.ipynb"
    done = papermill(ROOT / "nbs" / f"{name}.ipynb", out, "-p", "scale", "tiny", "-p", "out", store, *args)
    assert done.returncode == 0, done.stderr[-6000:]
    return Notebook(out)


@pytest.mark.parametrize("name, method, figures", [("han", "han", 3), ("ma", "ma", 3)])
def test_paper_notebook(store, name, method, figures):
    nb = execute(name, store)
    outputs = [o for c in nb.cells for o in c.get("outputs", [])]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= figures
    assert "simulated" in json.dumps(outputs)
    found = [r for r in records(store).values() if r["spec"]["method"] == method]
    assert found and all(r["spec"]["scale"] == "tiny" and r["data"]["simulated"] for r in found)
    tables = sorted(p.name for p in store.rglob("tables/*.md"))
    assert tables and all(str(store) not in p.read_text() for p in store.rglob("tables/*.json"))


def test_claims_page(store):
    nb = execute("claims", store)
    text = json.dumps([o for c in nb.cells for o in c.get("outputs", [])])
    assert "not testable here" in text and "simulated" in text


@pytest.mark.parametrize("name", ["han", "ma", "claims"])
def test_mistyped_parameter(tmp_path, name):
    done = papermill(ROOT / "nbs" / f"{name}.ipynb", tmp_path / "x.ipynb", "-p", "scal", "tiny", "-p", "out", tmp_path / "runs")
    assert done.returncode != 0 and "scal: no such parameter" in done.stderr and not (tmp_path / "runs").exists()
