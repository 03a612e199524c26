"""Every library notebook runs from top to bottom, as `nbdev_test` runs it, and leaves nothing behind."""
import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from tree import NOTEBOOKS, ROOT, files

LIBRARY = [nb for nb in NOTEBOOKS if not nb.training]
RUN = "import sys; from nbdev.test import nbdev_test; nbdev_test(path=sys.argv[1], n_workers=0)"


def snapshot():
    "Contents of the tree in short"
    return {p.relative_to(ROOT).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files()}


def execute(nb):
    "One notebook in its own process and on one thread, two at a time being the point"
    env = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    return subprocess.run([sys.executable, "-c", RUN, f"nbs/{nb.name}.ipynb"], cwd=ROOT, env=env, capture_output=True,
                          text=True, timeout=600)


@pytest.fixture(scope="module")
def executed(request):
    "Results by name of the notebooks that were selected, and the tree before and after"
    wanted = {item.callspec.params["nb"].name for item in request.session.items
              if item.path == request.path and hasattr(item, "callspec")} or {nb.name for nb in LIBRARY}
    chosen, before = [nb for nb in LIBRARY if nb.name in wanted], snapshot()
    with ThreadPoolExecutor(2) as pool: results = list(pool.map(execute, chosen))
    return dict(zip([nb.name for nb in chosen], results)), before, snapshot()


@pytest.mark.parametrize("nb", LIBRARY, ids=lambda nb: nb.name)
def test_library_notebook_runs(nb, executed):
    done = executed[0][nb.name]
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "Success." in done.stdout, f"nbdev_test ran nothing: {done.stdout}{done.stderr}"


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
    done = subprocess.run([sys.executable, "-c", RUN, "nbs/bad.ipynb"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "bad.ipynb" in done.stderr
