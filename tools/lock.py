"""Write `requirements.lock`: exact versions of everything `make` installs, for every supported Python.

    .venv/bin/python tools/lock.py python3.10 python3.12 python3.13

The versions of the running environment are taken as they are; each interpreter named is asked what its pip would
install for the same requirements, and where the answers differ the pin carries a marker. torch is pinned but never
resolved: its CUDA companions follow from torch itself and differ from machine to machine.
"""
import json
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from importlib.metadata import distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
HEADER = """\
# Exact versions of the whole environment, used as a constraints file (`pip install -c requirements.lock -e '.[dev]'`).
# A pin counts only where the package is needed at all, so one file serves every supported Python and system.
# Written by `tools/lock.py`; the ranges that pip needs are in settings.ini.
"""


def wanted():
    "The requirements of settings.ini without torch, and torch's own without those for a GPU"
    cfg = ConfigParser(delimiters=["="], interpolation=None)
    cfg.read(ROOT / "settings.ini", encoding="utf-8")
    ours = " ".join(cfg["DEFAULT"][k] for k in ("requirements", "dev_requirements")).split()
    torch = [Requirement(r) for r in distribution("torch").requires or []]
    small = [str(r) for r in torch if r.marker is None]
    return [r for r in ours if Requirement(r).name != "torch"] + small


def installed():
    "Version by name in the running environment, without this project, the installer, and builds' local suffixes"
    found = {canonicalize_name(d.name): d.version.split("+")[0] for d in distributions()}
    return {k: v for k, v in found.items() if k not in ("avvp-nb", "pip", "wheel")}


def resolved(python):
    "Python version and version by name that the pip of interpreter `python` would install"
    with tempfile.TemporaryDirectory() as tmp:
        report = Path(tmp) / "report.json"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--only-binary=:all:",
                        "--report", report, *wanted()], check=True)
        found = json.loads(report.read_text())
    pins = {canonicalize_name(p["metadata"]["name"]): p["metadata"]["version"] for p in found["install"]}
    return ".".join(found["environment"]["python_full_version"].split(".")[:2]), pins


def marker(pythons, every):
    "The shortest marker that selects `pythons`, a run at one end of the sorted list `every`"
    if pythons == every: return ""
    if pythons == every[:len(pythons)]: return f' ; python_version < "{every[len(pythons)]}"'
    if pythons == every[-len(pythons):]: return f' ; python_version >= "{pythons[0]}"'
    return " ; " + " or ".join(f'python_version == "{p}"' for p in pythons)


def lines(answers):
    "One line per name and version; `answers` maps a Python version to its pins"
    every = sorted(answers, key=Version)
    for name in sorted(set().union(*answers.values())):
        having = [p for p in every if name in answers[p]]
        for version in sorted({answers[p][name] for p in having}, key=Version):
            pythons = [p for p in having if answers[p][name] == version]
            yield f"{name}=={version}" + marker(every if pythons == having else pythons, every)


if __name__ == "__main__":
    here = "{}.{}".format(*sys.version_info[:2])
    answers = {here: installed()} | dict(map(resolved, sys.argv[1:]))
    for p in answers.values(): p.setdefault("torch", answers[here]["torch"])
    (ROOT / "requirements.lock").write_text(HEADER + "\n".join(lines(answers)) + "\n")
    print(f"requirements.lock: {len(answers[here])} pins on Python {', '.join(sorted(answers, key=Version))}")
