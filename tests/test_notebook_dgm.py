"""`nbs/dgm.ipynb` as users run it: through papermill, at the tiny scale, with its record checked."""
import ast
import hashlib
import json
import math
import os
import re
import subprocess
import sys

import pytest
from tree import ROOT, Notebook

DGM = ROOT / "nbs" / "dgm.ipynb"
pytestmark = pytest.mark.skipif(not DGM.exists(), reason="nbs/dgm.ipynb is not there yet")
SEGMENT = {"A", "V", "AV", "Type@AV", "Event@AV"}


def papermill(*args, cwd=ROOT):
    "Run papermill with the kernel of this environment"
    env = os.environ | {"JUPYTER_PREFER_ENV_PATH": "1", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    env.pop("MPLBACKEND", None)  # the kernel chooses its own, so that figures land in the notebook
    return subprocess.run([sys.executable, "-m", "papermill", *map(str, args)], cwd=cwd, env=env, capture_output=True,
                          text=True, timeout=900)


def records(folder):
    "Every run record below a folder, by path"
    found = {p: json.loads(p.read_text()) for p in sorted(folder.rglob("*.json"))}
    return {p: r for p, r in found.items() if isinstance(r, dict) and {"format", "key", "metrics"} <= set(r)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "The notebook executed at the tiny scale: (executed notebook, folder of its outputs)"
    out = tmp_path_factory.mktemp("dgm")
    done = papermill(DGM, out / "executed.ipynb", "-p", "scale", "tiny", "-p", "gamma", 0.2, "-p", "out", out / "runs")
    assert done.returncode == 0, done.stderr[-6000:]
    return Notebook(out / "executed.ipynb"), out / "runs"


def test_the_records_say_what_was_run(tiny):
    found = records(tiny[1])
    assert found, "no run record was written"
    assert any("0.2" in json.dumps(r["spec"]) for r in found.values()), "gamma=0.2 is in no spec"
    for path, r in found.items():
        assert r["format"] == 1 and r["key"] and r["spec"]["scale"] == "tiny", path
        assert {"method", "seed", "protocol"} <= set(r["spec"]), path
        assert r["data"]["simulated"] is True and "simulated" in r["data"]["mark"], path
        assert set(r["data"]["n"]) == {"train", "val", "test"} and min(r["data"]["n"].values()) > 0
        assert r["versions"]["torch"] and r["hardware"] and r["commit"] is not None and r["finished"]
        assert r["wall_time"] == pytest.approx(sum(h["seconds"] for h in r["history"]), abs=.06) and r["selection"]["epoch"] <= len(r["history"])


def test_the_history_is_whole_and_finite(tiny):
    modulated = 0
    for r in records(tiny[1]).values():
        assert [h["epoch"] for h in r["history"]] == list(range(1, len(r["history"]) + 1))
        for h in r["history"]:
            assert {"audio", "visual", "video"} <= set(h["loss"]) and all(math.isfinite(x) for x in h["loss"].values())
            if "dgm" in h:
                modulated += 1
                assert {"omega", "mu_audio", "mu_visual", "damped_audio", "damped_visual"} <= set(h["dgm"])
                assert 0 < h["dgm"]["mu_audio"] <= 1 and 0 < h["dgm"]["mu_visual"] <= 1
    assert modulated, "no epoch of any run was modulated"


def test_the_metrics_stand_under_every_rule(tiny):
    from avvp_nb.metrics import RULES
    for r in records(tiny[1]).values():
        assert set(RULES) <= set(r["metrics"]) and r["rule"] in r["metrics"]
        for levels in r["metrics"].values():
            for level in ("segment", "event"):
                assert SEGMENT <= set(levels[level]) and all(0 <= x <= 100 for x in levels[level].values())


def test_the_probabilities_are_the_ones_recorded(tiny):
    for path, r in records(tiny[1]).items():
        name = r["probabilities"]["file"]
        file = next(p for p in (path.parent / name, tiny[1] / name) if p.is_file())
        assert hashlib.sha256(file.read_bytes()).hexdigest() == r["probabilities"]["sha256"]


def test_the_executed_notebook_shows_figures_and_says_that_features_are_simulated(tiny):
    outputs = [o for c in tiny[0].cells for o in c.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 3, "loss curves, coefficients, timelines"
    assert re.search("simulated", json.dumps(outputs), re.I)


@pytest.mark.parametrize("name, value, said", [
    ("gama", "0.3", "gama: .*did you mean 'gamma'"),
    *(pytest.param(*x, marks=pytest.mark.slow) for x in (
        ("gamma", "high", "gamma: .*high"), ("scale", "huge", "huge.*small"), ("annotations", "no/such/folder", "no/such/folder")))])
def test_a_wrong_parameter_stops_the_run_before_any_work(tmp_path, name, value, said):
    given = {"scale": "tiny", "out": tmp_path / "runs", name: value}
    done = papermill(DGM, tmp_path / "x.ipynb", *(a for k, v in given.items() for a in ("-p", k, v)))
    assert done.returncode != 0, "papermill only warns about an unknown name; the notebook has to stop"
    said_so = re.sub(r"\x1b\[[0-9;]*m", "", done.stderr).rpartition("InputError: ")
    assert said_so[1] and re.search(said, said_so[2], re.S), done.stderr[-3000:]
    assert not any(p.is_file() for p in (tmp_path / "runs").rglob("*")), "something was written"


def parameters():
    "Names in the `parameters` cell, in order"
    cell = next(c for c in Notebook(DGM).cells if "parameters" in c["metadata"].get("tags", []))
    return [s.target.id for s in ast.parse("".join(cell["source"])).body if isinstance(s, ast.AnnAssign)]


def test_every_parameter_is_listed_with_type_default_and_help():
    wanted = {"gamma", "backbone", "measure", "msdu", "noise", "apply", "scale", "seeds", "annotations", "features", "device",
              "out"}
    assert wanted <= set(parameters()), f"missing: {wanted - set(parameters())}"
    done = papermill("--help-notebook", DGM)
    assert done.returncode == 0, done.stderr
    for name in parameters():
        entry = re.search(rf"^\s+{name}: (\w+).*?\(default ([^\n]+)\)\s+(\S[^\n]+)", done.stdout, re.M)
        assert entry, f"{name} has no type, default or help in\n{done.stdout}"
