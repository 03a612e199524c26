"""Every library notebook runs from top to bottom, as `nbdev_test` runs it, and leaves nothing behind."""
import hashlib
import json
import re

import pytest
from nbrun import run_all
from tree import NOTEBOOKS, ROOT, files

LIBRARY = [nb for nb in NOTEBOOKS if not nb.training]
# They take six seconds and more each, most of them in training, and run with the tests that take minutes
PATIENCE = {"data/15_ave_simulate", "data/17_cremad_simulate", "data/18a_signals_features", "media/01b_container", "methods/04_ma_swap",
        "methods/05_ma_refine", "methods/06_ma", "methods/07_jomold", "methods/10_cmpae", "methods/12_coleaf", "methods/15_ave",
        "methods/17_noisy", "methods/22_uwav", "results/06_figures_han", "runs/00_single", "runs/02_parallel", "scale", "train/05_stack",
        "data/12_unav_simulate", "methods/08a_valor_plus", "methods/14_picture_baselines", "methods/18_dhhn", "methods/23_psp",
        "results/07_figures_ma", "results/11_cost", "results/18_claims_page"}
SHORT, LONG = ([nb for nb in LIBRARY if (nb.name in PATIENCE) == long] for long in (False, True))
assert len(LONG) == len(PATIENCE), "a notebook of PATIENCE has another name now"


def snapshot():
    "Contents of the tree in short"
    return {p.relative_to(ROOT).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files()}


@pytest.fixture(scope="module")
def executed(request):
    "Results by name of the notebooks that were selected, and the tree before and after"
    wanted = {item.callspec.params["nb"].name for item in request.session.items
              if item.path == request.path and item.name.startswith("test_library_notebook_runs")} or {nb.name for nb in SHORT}
    chosen, before = [nb for nb in SHORT if nb.name in wanted], snapshot()
    results = run_all([f"nbs/{nb.name}.ipynb" for nb in chosen], ROOT)
    return dict(zip([nb.name for nb in chosen], results)), before, snapshot()


def succeeded(done):
    assert done.returncode == 0, done.said[-6000:]
    assert "Success." in done.said, f"nbdev_test ran nothing: {done.said}"


@pytest.mark.parametrize("nb", SHORT, ids=lambda nb: nb.name)
def test_library_notebook_runs(nb, executed): succeeded(executed[0][nb.name])


@pytest.mark.slow
@pytest.mark.parametrize("nb", LONG, ids=lambda nb: nb.name)
def test_long_library_notebook_runs(nb):
    before = snapshot()
    succeeded(*run_all([f"nbs/{nb.name}.ipynb"], ROOT))
    assert snapshot() == before


def test_notebooks_leave_the_tree_as_it_was(executed):
    _, before, after = executed
    assert {k for k in before | after if before.get(k) != after.get(k)} == set()


def test_a_failing_notebook_is_noticed(tmp_path):
    "The runner above is no rubber stamp"
    (tmp_path / "nbs").mkdir()
    (tmp_path / "settings.ini").write_text((ROOT / "settings.ini").read_text())
    (tmp_path / "nbs" / "bad.ipynb").write_text(
        '{"cells": [{"cell_type": "code", "execution_count": null, "id": "a", "metadata": {}, "outputs": [], '
        '"source": ["assert 1 == 2"]}], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}')
    (done,) = run_all(["nbs/bad.ipynb"], tmp_path)
    assert done.returncode != 0 and "bad.ipynb" in done.said


# --- experiments are committed executed, and what they ran is committed ------------------------------------------------

EXPERIMENTS = [nb for nb in NOTEBOOKS if nb.training]
SILENT = .5      # share of code cells that may show nothing: imports, parameters, checks of them


def faults(nb):
    "What says that a notebook was not executed from top to bottom"
    cells = [c for c in nb.cells if c["cell_type"] == "code" and "".join(c["source"]).strip()]
    silent = [c for c in cells if not c["outputs"]]
    said = ["no cell has an output"] * (len(silent) == len(cells)) + ["the last cell has none"] * (not cells[-1]["outputs"])
    return said + [f"{len(silent)} of {len(cells)} cells have none"] * (len(silent) > SILENT * len(cells))


@pytest.mark.parametrize("nb", EXPERIMENTS, ids=lambda nb: nb.name)
def test_an_experiment_is_committed_executed(nb): assert not faults(nb)


def test_an_experiment_without_outputs_is_noticed():
    nb = next(nb for nb in EXPERIMENTS if nb.name == "han")
    bare = type(nb)(nb.path)
    for c in bare.cells: c["outputs"] = []
    assert faults(bare) and not faults(nb)


PAGES = ("han", "ma", "dgm", "coleaf", "zoo", "claims", "ave", "cremad", "imbalance", "realism")
RECORDS = {p.stem for p in (ROOT / "figures" / "records").rglob("*.json")}


def runs_of(nb):
    "Keys of the runs that the outputs of a notebook name"
    text = json.dumps([c.get("outputs", []) for c in nb.cells])
    return set(re.findall(r"\b(?:\w+)-[0-9a-f]{16}\b", text))


@pytest.mark.parametrize("name", PAGES)
def test_every_run_that_an_experiment_shows_is_committed(name):
    shown = runs_of(next(nb for nb in EXPERIMENTS if nb.name == name))
    assert shown, f"{name} shows no runs"
    assert not shown - RECORDS


@pytest.mark.parametrize("name", ["han", "ma", "dgm", "coleaf", "zoo", "claims", "realism"])
def test_an_experiment_ends_with_its_findings_and_your_numbers(name):
    nb = next(nb for nb in EXPERIMENTS if nb.name == name)
    heads = [line for s in nb.of("markdown") for line in s.splitlines() if line.startswith("## ")]
    assert heads[-2:] == ["## Your numbers beside the committed ones", "## What we found"]
    said = json.dumps([c["outputs"] for c in nb.cells if c["cell_type"] == "code"][-4:])
    assert "What we found" in said


def test_index_and_readme_state_the_same_findings():
    nb = next(nb for nb in NOTEBOOKS if nb.name == "index")
    readme = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- results -->")[1].split("<!-- /results -->")[0]
    told = [line for line in readme.splitlines() if line.startswith("- ")]
    shown = "".join(x for c in nb.cells for o in c.get("outputs", []) for x in o.get("data", {}).get("text/markdown", []))
    assert told == [line for line in shown.splitlines() if line.startswith("- ")], "execute nbs/index.ipynb, or run `make readme`"
