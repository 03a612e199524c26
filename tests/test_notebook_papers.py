"""`nbs/han.ipynb`, `nbs/ma.ipynb`, `nbs/coleaf.ipynb` and `nbs/claims.ipynb` as users run them: through papermill, at the tiny scale."""
import json

import pytest
from test_notebook_dgm import papermill, records
from tree import ROOT, Notebook

from avvp_nb.records.spec import RunSpec
from avvp_nb.runs.single import run


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


def check_paper(store, name, figures, *more):
    "Execute a paper's notebook, which draws at least so many figures"
    nb = execute(name, store, *more)
    outputs = [o for c in nb.cells for o in c.get("outputs", [])]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= figures
    assert "simulated" in json.dumps(outputs)
    found = [r for r in records(store).values() if r["spec"]["method"] == name]
    assert found and all(r["spec"]["scale"] == "tiny" and r["data"]["simulated"] for r in found)
    tables = sorted(p.name for p in store.rglob("tables/*.md"))
    assert tables and all(str(store) not in p.read_text() for p in store.rglob("tables/*.json"))


@pytest.mark.slow
def test_han_notebook(store): check_paper(store, "han", 3)


@pytest.mark.slow
def test_ma_notebook(store): check_paper(store, "ma", 3)


@pytest.mark.slow
def test_coleaf_notebook_leaves_everything_it_announces(store):
    "Three settings, corrected scores, cost, claims, figures, each with provenance"
    check_paper(store, "coleaf", 6, "-y", 'tables: ["3"]')
    tables = {p.stem: json.loads(p.read_text()) for p in store.glob("tables/*.json")}
    wanted = {f"coleaf_{x}" for x in ("3_tiny_simulated", "6_own", "6_common", "6_selected", "only", "ranking", "cost", "rules", "6_nothing", "7_nothing", "protocols")}
    assert wanted | {"claims_coleaf_tiny", "errata_coleaf"} <= set(tables)
    assert all(tables[k]["simulated"] and tables[k]["runs"] for k in wanted - {"coleaf_cost", "coleaf_6_nothing", "coleaf_7_nothing"})
    assert not tables["coleaf_6_nothing"]["runs"] and tables["coleaf_only"]["notebook"] == "nbs/coleaf.ipynb"
    figures = {p.stem: json.loads(p.read_text()) for p in store.glob("figures/coleaf_*.json")}
    assert {"coleaf_fig1_task", "coleaf_fig2_framework", "coleaf_fig3_events", "coleaf_losses", "coleaf_exchange", "coleaf_cost"} <= set(figures)
    assert figures["coleaf_fig3_events"]["simulated"] and len(figures["coleaf_fig3_events"]["runs"]) >= 3
    only = (store / "tables" / "coleaf_only.csv").read_text()
    assert only.count("as published") >= 4 and "nothing" in only
    for r in records(store).values(): assert "only" in r and "kept" in r["selected"], r["key"]


@pytest.mark.slow
def test_claims_page(store):
    for loss in ("both", "wsl"): run(RunSpec("han", {"loss": loss}, scale="tiny"), store, device="cpu", progress="off")
    nb = execute("claims", store)
    text = json.dumps([o for c in nb.cells for o in c.get("outputs", [])])
    assert "undecided" in text and "simulated" in text and "scale tiny" in text
    assert "of this store" in text, "its own runs, and not the committed ones"


@pytest.mark.slow
def test_claims_page_of_an_empty_store_reads_the_committed_records(tmp_path):
    out = tmp_path / "claims.ipynb"
    done = papermill(ROOT / "nbs" / "claims.ipynb", out, "-p", "out", tmp_path / "runs")
    assert done.returncode == 0, done.stderr[-6000:]
    text = json.dumps([o for c in Notebook(out).cells for o in c.get("outputs", [])])
    assert "committed ones" in text and "Claims by paper and verdict" in text
    assert (tmp_path / "runs" / "tables" / "claims_dgm_small_simulated.md").exists() and not (tmp_path / "runs" / "records").exists()


@pytest.mark.parametrize("name", ["han", *(pytest.param(x, marks=pytest.mark.slow) for x in ("ma", "coleaf", "claims"))])
def test_mistyped_parameter(tmp_path, name):
    done = papermill(ROOT / "nbs" / f"{name}.ipynb", tmp_path / "x.ipynb", "-p", "scal", "tiny", "-p", "out", tmp_path / "runs")
    assert done.returncode != 0 and "scal: no such parameter" in done.stderr and not (tmp_path / "runs").exists()
