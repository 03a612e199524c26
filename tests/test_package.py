"""What `pip install .` gives: a wheel from an isolated build that works beside torch, numpy and pandas alone."""
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, distribution

import pytest
from packaging.requirements import Requirement
from tree import ROOT, files

NOT_NEEDED = ("nbdev", "fastcore", "execnb", "papermill", "IPython", "ipykernel", "jupyter_core", "nbformat", "matplotlib",
              "safetensors", "tqdm")


def run(*args, **kwargs):
    "Run a command and return what it printed"
    done = subprocess.run([str(a) for a in args], capture_output=True, text=True, timeout=600, **kwargs)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "A wheel built in an environment of its own, from a copy of the files that are in git"
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in files():
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    try: run(sys.executable, "-m", "build", "--wheel", "--outdir", out, source, cwd=out)
    except AssertionError as e:
        offline = re.search(r"No matching distribution found for (setuptools|wheel)|Failed to establish|timed out", str(e))
        if offline and not os.environ.get("CI"): pytest.skip("an isolated build fetches setuptools: no network")
        raise
    return next(out.glob("*.whl"))


def closure(*names):
    "The installed distributions that `names` need on this machine, themselves included"
    found, queue = {}, list(names)
    while queue:
        name = queue.pop()
        if name in found: continue
        try: found[name] = distribution(name)
        except PackageNotFoundError: continue  # wanted on another system or by an older Python
        needs = [Requirement(r) for r in found[name].requires or []]
        queue += [r.name for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})]
    return list(found.values())


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory):
    "Python of an environment with the wheel and with what torch, numpy and pandas need, linked: nothing else"
    home = tmp_path_factory.mktemp("bare")
    run(sys.executable, "-m", "venv", "--without-pip", home / "env")
    python, links = home / "env" / "bin" / "python", home / "links"
    links.mkdir()
    for dist in closure("torch", "numpy", "pandas"):
        for top in {f.parts[0] for f in dist.files} - {"..", "__pycache__"}:
            target = dist.locate_file(top)
            if not (links / top).exists() and target.exists(): (links / top).symlink_to(target)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    with open(os.path.join(site, "linked.pth"), "w") as f: f.write(f"{links}\n")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    return python


def inside(bare, code):
    "Run code in the bare environment, away from the checkout and from every variable that could lead back to it"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV_", "VIRTUAL_ENV"))}
    return run(bare, "-I", "-c", code, cwd=bare.parents[2], env=env)


def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    info = next(n for n in names if n.endswith("/METADATA")).split("/")[0]
    assert {n.split("/")[0] for n in names} == {"avvp_nb", info}
    ours = {p.relative_to(ROOT).as_posix() for p in files() if p.is_relative_to(ROOT / "avvp_nb")}
    assert {n for n in names if n.startswith("avvp_nb/")} == ours and any("/assets/" in n for n in ours)
    assert any(n.startswith(info) and n.endswith("/LICENSE") for n in names)


def test_the_metadata_come_from_settings(wheel):
    text = zipfile.ZipFile(wheel).read(next(n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("/METADATA")))
    meta = Parser().parsestr(text.decode())
    lines = dict(line.split(" = ", 1) for line in (ROOT / "settings.ini").read_text().splitlines() if " = " in line)
    assert (meta["Name"], meta["Version"], meta["Requires-Python"]) == ("avvp_nb", lines["version"], ">=3.10")
    plain = {Requirement(r).name for r in meta.get_all("Requires-Dist") if "extra ==" not in r}
    assert plain == {Requirement(r).name for r in lines["requirements"].split()}
    assert meta["License-Expression"] == "Apache-2.0" or meta["License"] == "Apache-2.0"
    assert (ROOT / "README.md").read_text().strip() in meta.get_payload()


def test_what_it_requires_brings_no_notebook_tools(wheel):
    found = {d.name.lower() for d in closure("torch", "numpy", "pandas", "matplotlib", "safetensors", "tqdm")}
    assert "numpy" in found and not found & {"nbdev", "fastcore", "execnb", "papermill", "ipython", "ipykernel", "jupyterlab"}


def test_the_bare_environment_is_bare(bare):
    code = f"from importlib.util import find_spec; print([n for n in {NOT_NEEDED} if find_spec(n)])"
    assert inside(bare, code).strip() == "[]"


def test_every_module_imports_with_torch_numpy_and_pandas_alone(bare):
    modules = sorted(p.stem for p in (ROOT / "avvp_nb").glob("*.py") if p.stem not in ("__init__", "_modidx"))
    code = ("import importlib, avvp_nb, pathlib\n"
            f"for m in {modules}: importlib.import_module('avvp_nb.' + m)\n"
            "print(pathlib.Path(avvp_nb.__file__).parent)")
    assert str(bare.parents[1]) in inside(bare, code)


def test_the_assets_are_found_in_the_installed_wheel(bare):
    names = sorted(p.name for p in (ROOT / "avvp_nb" / "assets").iterdir() if p.is_file())
    code = f"from avvp_nb.core import asset, file_hash\nfor n in {names}: print(n, file_hash(asset(n)))"
    from avvp_nb.core import asset, file_hash
    assert inside(bare, code).splitlines() == [f"{n} {file_hash(asset(n))}" for n in names]


def test_the_commands_it_installs_can_be_loaded(bare):
    code = ("from importlib.metadata import distribution\n"
            "for e in distribution('avvp_nb').entry_points: print(e.name, callable(e.load()))")
    assert inside(bare, code).split() == ["avvp", "True"]


def test_the_example_of_the_readme_runs_bare(bare):
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[1]
    assert "segment" in inside(bare, block)
