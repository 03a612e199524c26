"""The repository keeps its promises: notebooks and modules in step, clean, readable, and nothing in it that may not be."""
import ast
import base64
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import types
from configparser import ConfigParser
from importlib.metadata import distribution, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from tree import NOTEBOOKS, ROOT, check, files, load

from avvp_nb.core import shared

each_notebook = pytest.mark.parametrize("nb", NOTEBOOKS, ids=lambda nb: nb.name)


def settings():
    "The section of settings.ini"
    cfg = ConfigParser(delimiters=["="], interpolation=None)
    cfg.read(ROOT / "settings.ini", encoding="utf-8")
    return cfg["DEFAULT"]


# --- notebooks and modules -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", check.CHECKS)
def test_make_check(name):
    look, fix = check.CHECKS[name]
    found = look()
    assert not found, "\n".join([*found, f"to mend it: {fix}"])


@pytest.fixture
def project(tmp_path):
    "A copy of the project that tests may spoil"
    with check.copied() as copy:
        check.nbdev("clean", copy)
        shutil.copytree(copy, tmp_path / "project")
    return tmp_path / "project"


def spoil(path, change):
    "Rewrite a notebook after `change(cells)`"
    nb = json.loads(path.read_text(encoding="utf-8"))
    change(nb["cells"])
    path.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@pytest.mark.slow
def test_a_module_edited_by_hand_is_noticed_and_mended(project):
    check.export(project)
    assert check.out_of_step(project) == []
    core = project / "avvp_nb" / "core.py"
    core.write_text(core.read_text() + "\nEXTRA = 1\n")
    (project / "avvp_nb" / "stale.py").write_text(check.MARK + "\n")
    (project / "avvp_nb" / "_modidx.py").unlink()
    assert check.out_of_step(project) == ["avvp_nb/_modidx.py: missing", "avvp_nb/core.py: differs",
                                          f"avvp_nb/stale.py: {check.GONE}"]
    check.export(project)
    assert check.out_of_step(project) == []


def test_cleaning_keeps_the_parameters_tag_and_removes_noise(project):
    "Without `allowed_cell_metadata_keys = tags` papermill would inject its values at the wrong place"
    assert "tags" in settings()["allowed_cell_metadata_keys"].split()
    path = project / "nbs" / "00_core.ipynb"
    def tagged(cells): cells[1]["metadata"] = {"tags": ["parameters"], "collapsed": True}
    spoil(path, tagged)
    assert check.unclean(project) == ["nbs/00_core.ipynb: differs"]
    check.nbdev("clean", project)
    assert json.loads(path.read_text())["cells"][1]["metadata"] == {"tags": ["parameters"]}
    assert check.unclean(project) == []


# --- style of the notebooks ------------------------------------------------------------------------------------------

@each_notebook
def test_notebook_has_a_title_and_a_summary(nb):
    lines = [line for line in nb.of("markdown")[0].splitlines() if line.strip()]
    assert re.match(r"# \S", lines[0]), f"{nb.path.name}: the first line of prose is not a title: {lines[0]!r}"
    assert re.match(r"> \S", lines[1]), f"{nb.path.name}: the title is not followed by a `> summary`: {lines[1]!r}"


@each_notebook
def test_notebook_is_committed_without_errors(nb):
    errors = [o for c in nb.cells for o in c.get("outputs", []) if o["output_type"] == "error"]
    assert not errors, f"{nb.path.name}: {errors[0]['ename']}: {errors[0]['evalue']}"


@each_notebook
def test_the_pictures_of_a_notebook_are_whole(nb):
    for c in nb.cells:
        for o in c.get("outputs", []):
            picture = "".join(o.get("data", {}).get("image/png", []))
            assert not picture or base64.b64decode(picture).startswith(b"\x89PNG\r\n"), nb.path.name


@each_notebook
def test_imports_stand_in_cells_of_their_own(nb):
    for source in nb.exported:
        body = ast.parse(source).body
        imports = [isinstance(s, (ast.Import, ast.ImportFrom)) for s in body]
        assert all(imports) or not any(imports), f"{nb.path.name}: imports mixed with code in\n{source}"


@each_notebook
def test_exported_cells_are_short(nb):
    "At most 30 lines, blank ones and the directive apart"
    sizes = {s[:200]: len([line for line in s.splitlines() if line.strip()]) - 1 for s in nb.exported}
    long = {begin: n for begin, n in sizes.items() if n > 30}
    assert not long, f"{nb.name}: {long}"


def names(source):
    "What a cell defines or assigns at its top level"
    body = ast.parse(source).body
    return {n.name for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef))} | \
           {t.id for n in body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}


def words(source): return set(re.findall(r"\w+", source))


@each_notebook
def test_every_exported_cell_is_demonstrated(nb):
    "Some name it defines is used in a cell that is not exported, or by something that is"
    defined = [(names(s), words(s)) for s in nb.exported]
    seen, waiting = words("\n".join(nb.shown)), defined
    while reached := [d for d in waiting if d[0] & seen]:
        waiting = [d for d in waiting if not d[0] & seen]
        seen = seen.union(*(used for _, used in reached))
    undemonstrated = [sorted(own) for own, _ in waiting if any(not n.startswith("_") for n in own)]
    assert not undemonstrated, f"{nb.path.name}: nothing shows {undemonstrated}"


@each_notebook
def test_a_training_notebook_has_parameters_and_defines_nothing(nb):
    if not nb.training:
        assert not any("parameters" in c["metadata"].get("tags", []) for c in nb.cells)
        return
    tagged = [c for c in nb.cells if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1, f"{nb.path.name}: {len(tagged)} cells are tagged `parameters`"
    defined = [n.name for s in nb.of("code") if not s.lstrip().startswith("%") for n in ast.parse(s).body
               if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    assert not defined, f"{nb.path.name} defines {defined}: the library is missing something"


def functions():
    "(module, name, lines) of every exported function and method"
    for path in sorted((ROOT / "avvp_nb").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield path.name, node.name, node.end_lineno - node.lineno + 1


def test_no_function_is_longer_than_thirty_lines():
    assert [f for f in functions() if f[2] > 30] == []


def test_no_module_is_longer_than_fits_a_head():
    lines = {p.relative_to(ROOT).as_posix(): len(p.read_text(encoding="utf-8").splitlines())
             for p in (ROOT / "avvp_nb").rglob("*.py") if p.name != "_modidx.py"}
    assert {name: n for name, n in lines.items() if n > 460} == {}


def test_no_line_is_longer_than_a_screen():
    "What ruff's E501 says, once more without ruff's exceptions (a line that is one long word)"
    for path in (ROOT / "avvp_nb").rglob("*.py"):
        if path.name == "_modidx.py": continue
        long = [line for line in path.read_text(encoding="utf-8").splitlines() if len(line) > check.WIDTH]
        assert not long, (path.name, long)


METHOD_WORDS = re.compile(r"(?<![a-z])(han|ma|jomold|dgm|msdu|ogm|cmpae|coleaf|valor|denoise)(?![a-z])", re.I)


@pytest.mark.parametrize("folder", ["train", "runs"])
def test_the_loop_and_the_runs_name_no_method(folder):
    "Neither in code nor in strings that decide something; prose, docstrings and comments may give examples"
    found = []
    for path in sorted((ROOT / "avvp_nb" / folder).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        prose = {id(n.body[0].value) for n in ast.walk(tree)
                 if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef)) and n.body and isinstance(n.body[0], ast.Expr)}
        for n in ast.walk(tree):
            name = {ast.Name: "id", ast.Attribute: "attr", ast.alias: "name", ast.ClassDef: "name",
                    ast.FunctionDef: "name", ast.Constant: "value", ast.ImportFrom: "module"}.get(type(n))
            text = getattr(n, name) if name else None
            if isinstance(text, str) and id(n) not in prose and METHOD_WORDS.search(text.replace("_", " ")):
                found.append((path.name, n.lineno if hasattr(n, "lineno") else 0, text))
    assert found == []


# --- what may not be in the tree -------------------------------------------------------------------------------------

def text_of(path):
    "A file's text, the inline pictures of notebooks taken out; empty for binary files"
    try: text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError: return ""
    return re.sub(r'"image/png": "[^"]*"', "", text) if path.suffix == ".ipynb" else text


def machine_words():
    "What would betray the machine a file was made on; put together here so that this file does not betray itself"
    slash = "/"
    folders = [slash + p + slash for p in ("root", "home", "Users", "work", "private", "opt", "tmp")]
    hosts = [".".join(p) for p in (("pypi", "org"), ("pythonhosted", "org"), ("download", "pytorch", "org"))]
    own = [str(ROOT), str(Path.home()), socket.gethostname()]
    return folders, hosts + [w for w in own if len(w) > 7 and w != "localhost"]


def betrayed(text):
    "The lines that name an absolute folder of some machine, or a host"
    folders, words = machine_words()
    pattern = "|".join([rf"(?<![\w.$}}~*)/-]){re.escape(f)}\w" for f in folders] + [re.escape(w) for w in words])
    return [line.strip()[:160] for line in text.splitlines() if re.search(pattern, line)]


def test_no_machine_is_named():
    for bad in ("see " + "/ro" + "ot/x", "'" + "/ho" + "me/ada/llp'", "https://py" + "pi.org/simple"): assert betrayed(bad)
    for good in ("avvp_nb/work/x", "https://example.org/home/x", "a/tmp/b", "tmp_path / 'x'"): assert not betrayed(good)
    found = {p.relative_to(ROOT).as_posix(): lines for p in files() if (lines := betrayed(text_of(p)))}
    assert not found, json.dumps(found, indent=1)


def test_no_file_is_large():
    "Notebooks carry small figures; data, records and weights stay outside, but for the one small network of real signals"
    weights = ROOT / "figures" / "weights"
    assert [(p.name, p.stat().st_size) for p in files() if p.stat().st_size > (20_000_000 if p.parent == weights else 2_000_000)] == []


def digest(path): return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["llp", "golden"])
def test_no_borrowed_file_is_in_the_tree(name):
    folder = shared(name)
    if not folder.is_dir(): pytest.skip(f"{name}/ not found: set AVVP_SHARED to the folder that holds it")
    sizes = {p.stat().st_size: [] for p in files() if p.stat().st_size}
    for p in files(): sizes.setdefault(p.stat().st_size, []).append(p)
    borrowed = [(p, q) for q in folder.rglob("*") if q.is_file() and q.stat().st_size
                for p in sizes.get(q.stat().st_size, []) if digest(p) == digest(q)]
    assert not borrowed


def test_no_list_of_real_videos_is_in_the_tree(llp):
    "Facts about the annotations may be committed, the annotations may not, in whatever form"
    word = re.compile(r"(?<![\w-])[\w-]{11}_\d+_\d+(?![\w-])")
    real = {v for p in llp.glob("*.csv") for v in word.findall(p.read_text(encoding="utf-8", errors="replace"))}
    assert len(real) > 11_000
    found = {p.name: n for p in files() if (n := len(real & set(word.findall(text_of(p))))) > 15}
    assert not found, f"real videos named by file: {found}"


# --- requirements ----------------------------------------------------------------------------------------------------

def locked():
    "The pins of requirements.lock, as requirements"
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_every_requirement_is_pinned_within_its_range():
    pins = locked()
    assert all(re.fullmatch(r"==[\w.]+", str(p.specifier)) for p in pins), "only exact public versions"
    for text in f"{settings()['requirements']} {settings()['dev_requirements']}".split():
        want = Requirement(text)
        for python in ("3.10", "3.11", "3.12", "3.13"):
            env = {"python_version": python, "python_full_version": f"{python}.0"}
            pin = [p for p in pins if p.name == want.name and (p.marker is None or p.marker.evaluate(env))]
            assert len(pin) == 1, f"{want.name} has {len(pin)} pins on Python {python}"
            assert want.specifier.contains(str(pin[0].specifier)[2:]), f"{pin[0]} is outside {want}"


def test_the_environment_is_the_locked_one():
    if Path(sys.prefix).resolve() != (ROOT / ".venv").resolve(): pytest.skip("not running in the project's own .venv")
    wrong = {}
    for pin in locked():
        if pin.marker and not pin.marker.evaluate(): continue
        try: have = version(pin.name).split("+")[0]
        except ModuleNotFoundError: continue  # a pin counts only where the package is needed
        if not pin.specifier.contains(have, prereleases=True): wrong[str(pin)] = have
    assert not wrong, f"{wrong}: run `make env`"


def test_the_library_itself_needs_no_notebook_tools():
    names = {Requirement(r).name for r in settings()["requirements"].split()}
    assert names == {"torch", "numpy", "pandas", "matplotlib", "safetensors", "tqdm"}
    installed = {Requirement(r).name for r in distribution("avvp_nb").requires if "extra" not in r}
    assert installed == names and version("avvp_nb") == settings()["version"]


# --- commands --------------------------------------------------------------------------------------------------------

def targets():
    "Name and description of every command of the Makefile"
    return dict(re.findall(r"^([a-z]+):.*?## (.+)$", (ROOT / "Makefile").read_text(), re.M))


def test_make_help_lists_every_command():
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert set(targets()) == set(phony) >= {"dgm", "test", "export", "clean", "check", "bench", "smoke", "lab", "help"}
    "Also when the tests themselves were started by make, which then would print the folder that it enters"
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    shown = subprocess.run(["make", "help"], cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in shown.splitlines()] == list(targets())


def readme(): return (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_commands_of_the_readme_exist():
    text = readme()
    used = set(re.findall(r"(?:^|`)make ([a-z]+)", text, re.M))
    assert {"dgm", "test"} <= used <= set(targets()), used - set(targets())
    for nb in set(re.findall(r"\bnbs/[\w.]+\.ipynb", text)): assert (ROOT / nb).is_file(), nb
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text): assert (ROOT / link).exists(), link


def test_no_number_of_the_readme_is_typed():
    "Scores stand only inside the generated block, which is there, once"
    text = readme()
    parts = re.split(r"<!-- (/?results) -->", text)
    assert parts[1::2] == ["results", "/results"], "README.md needs one pair of results markers"
    outside = parts[0] + parts[-1]
    assert not re.search(r"(?<![\w.=-])\d{2}\.\d+(?![\w.])", outside), "a score outside the generated block"


def test_the_example_of_the_readme_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", readme(), re.S)
    assert len(blocks) == 1 and len([b for b in blocks[0].splitlines() if b.strip()]) <= 15
    done = subprocess.run([sys.executable, "-c", blocks[0]], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "segment" in done.stdout and "event" in done.stdout


def test_ci_types_what_the_readme_says():
    "The very command of the README, then the tests that take minutes: no option may hide what a user would see"
    script = ROOT / ".ci" / "run"
    typed = re.findall(r"^\s*(make\b[^|;&#\n]*?)\s*(?:2>&1)?\s*(?:[|;&#].*)?$", script.read_text(), re.M)
    said = re.search(r"^(make test)\s+#", readme(), re.M)
    assert os.access(script, os.X_OK) and said and typed == [said[1], "make slow"]
    subprocess.run(["bash", "-n", script], check=True)
    overrides = re.findall(r"^export (.*)$", script.read_text(), re.M)
    assert overrides == ["CI=true"], "CI sets nothing that a user would not have"


FAKE = """#!/usr/bin/env bash
# Stands in for Python: makes an environment whose pip succeeds unless the file `broken` is there
echo "$*" >> "{log}"
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m pip") if [ "$3" = --version ]; then exit 0; fi; [ ! -e "{broken}" ] ;;
  *) exit 0 ;;
esac
"""


def test_a_failed_install_is_tried_again_and_a_good_one_is_reused(tmp_path):
    "In a folder with a space, with an interpreter that only pretends"
    home = tmp_path / "my checkout"
    home.mkdir()
    for name in ("Makefile", "settings.ini", "setup.py", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, home)
    log, broken, python = tmp_path / "log", tmp_path / "broken", tmp_path / "python3.12"
    python.write_text(FAKE.format(log=log, broken=broken))
    python.chmod(0o755)
    def make(*args):
        log.write_text("")
        env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k not in ("ARGS", "VENV")}
        done = subprocess.run(["make", f"PYTHON={python}", *args], cwd=home, env=env, capture_output=True, text=True)
        return done.returncode, log.read_text()
    broken.touch()
    status, ran = make("test")
    assert status != 0 and "-m pip install" in ran and "pytest" not in ran
    assert list((home / ".venv").glob(".ready-*")) == []
    broken.unlink()
    status, ran = make("dgm", "ARGS=-p gamma 0.2 -y '{annotations: ../x}'")
    assert status == 0 and "-c requirements.lock -e .[dev]" in ran and "ipykernel install --sys-prefix" in ran
    assert "papermill nbs/dgm.ipynb runs/dgm/dgm_gamma_0.2_annotations_.._x.ipynb -p out runs/dgm" in ran
    assert ran.rstrip().endswith("-p gamma 0.2 -y {annotations: ../x}")
    status, ran = make("smoke", 'ARGS=-y "{seeds: 1}"')
    assert status == 0 and "pip install" not in ran and ran.rstrip().endswith("-p scale tiny -y {seeds: 1}")
    os.utime(home / "requirements.lock", (2e9, 2e9))
    status, ran = make("test", "ARGS=-k core")
    assert status == 0 and "-m pip install" in ran and "-m venv" not in ran and "-m pytest" in ran


def test_no_usable_python_is_said(tmp_path):
    for name in ("Makefile", "settings.ini", "setup.py", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run(["make", "PYTHON=", "test"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "No Python 3.10 to 3.13" in done.stderr


def test_make_bench_measures_what_is_there(tmp_path, monkeypatch, capsys):
    bench = load(ROOT / "bench" / "__main__.py")
    good, broken = types.ModuleType("bench.scoring"), types.ModuleType("bench.training")
    good.run = lambda: {"ratio_to_loops": 123.456, "videos": 7, "large": [{"equal": True}]}
    def fail(): raise OSError("no disk")
    broken.run = fail
    monkeypatch.setitem(sys.modules, "bench.scoring", good)
    monkeypatch.setitem(sys.modules, "bench.training", broken)
    monkeypatch.setitem(sys.modules, "bench.engines", broken)
    monkeypatch.setitem(sys.modules, "bench.threads", broken)
    monkeypatch.chdir(tmp_path)
    assert bench.main([]) == 1
    out, err = capsys.readouterr()
    assert "no disk" in err and "not measured, see above: training, engines, threads" in out and "torch" in out
    assert [line.split() for line in out.splitlines()[1:5]] == [
        ["benchmark", "quantity", "value"], ["scoring", "videos", "7"], ["scoring", "large:", "1:", "equal", "True"],
        ["scoring", "ratio", "to", "loops", "123.5"]]
    assert json.loads((tmp_path / "runs" / "bench.json").read_text())["results"]["scoring"]["videos"] == 7
    assert bench.main(["scoring"]) == 0 and bench.main(["scorin"]) == 2


def test_the_licence_is_whole():
    text = (ROOT / "LICENSE").read_text()
    assert all(part in text for part in ("Apache License", "END OF TERMS AND CONDITIONS", "APPENDIX: How to apply"))
