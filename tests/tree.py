"""What the tests of the repository itself share: its files, its notebooks, and `tools/check.py`."""
import importlib.util
import json
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def load(path):
    "A Python file of the repository as a module"
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check = load(ROOT / "tools" / "check.py")


def files():
    "Every file that is in git or would be added to it"
    run = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True)
    if run.returncode == 0: names = run.stdout.decode().split("\0")
    else: names = [p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*") if not ignored(p.relative_to(ROOT))]
    return [ROOT / n for n in sorted(names) if n and (ROOT / n).is_file()]


def ignored(path):
    "In a download without git: is this path something that a command left behind?"
    made = {"__pycache__", "build", "dist", "runs", "out", ".venv", ".git", ".pytest_cache", ".ruff_cache", ".hypothesis",
            ".ipynb_checkpoints", "_site"}
    return path.name == ".coverage" or any(p in made or p.endswith(".egg-info") for p in path.parts)


class Notebook:
    "A committed notebook"
    def __init__(self, path):
        self.path, home = path, ROOT / "nbs"
        self.name = path.relative_to(home).with_suffix("").as_posix() if path.is_relative_to(home) else path.stem
        self.cells = json.loads(path.read_text(encoding="utf-8"))["cells"]

    def of(self, kind):
        "Sources of the cells of one kind"
        return ["".join(c["source"]) for c in self.cells if c["cell_type"] == kind]

    @property
    def exported(self): return [s for s in self.of("code") if EXPORT.search(s)]

    @property
    def shown(self): return [s for s in self.of("code") if not EXPORT.search(s)]

    @property
    def training(self):
        "Does its front matter keep `nbdev_test` away? Then papermill runs it."
        return any(re.search(r"^skip_exec:\s*true", s, re.M | re.I) for s in self.of("raw"))


EXPORT = re.compile(r"^#\s*\|\s*export[is]?\b", re.M)
NOTEBOOKS = [Notebook(p) for p in sorted((ROOT / "nbs").rglob("*.ipynb"))
             if not p.name.startswith("_") and ".ipynb_checkpoints" not in p.parts]
