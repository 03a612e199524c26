"""The line under the title of each numbered notebook: previous, index, next, and the experiment that uses it.

    python tools/nav.py            write the lines (`make clean` does it, too)

Reading order is that of the floors, and of the numbers within a floor. `tools/check.py` says when a line is missing.
"""
import json
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("", "media", "data", "train", "methods", "records", "results", "runs", "")   # folders below nbs/; "" twice: 00_ to 89_, 90_
USED_IN = {   # what a notebook's number is followed by -> the experiment that uses it; others: that of their floor
    "": {"cli": "index", "main": "index", "face": "index", "limits": "extend", "surroundings": "extend", "tasks": "imbalance"},
    "media": {},   # all of it: video
    "data": {"unav100": "coleaf", "unav_features": "coleaf", "unav_simulate": "coleaf", "pseudo": "coleaf", "sources": "extend",
             "clip_clap": "zoo", **dict.fromkeys(("ave", "ave_files", "ave_simulate", "ave_task", "ave_write"), "ave"),
             **dict.fromkeys(("cremad", "cremad_files", "cremad_pack", "cremad_simulate", "cremad_task"), "cremad"),
             **dict.fromkeys(("signals", "signals_features", "signals_bounds", "signals_task"), "signals"), "tools": "extend"},
    "train": {"graphs": "speed", "lanes": "speed", "stack": "speed", "thresholds": "coleaf", "threads": "speed"},
    "methods": {"method": "extend", "mmil": "han", "losses": "han", "han": "han", "ma_swap": "ma", "ma_refine": "ma", "ma": "ma",
                "valor": "coleaf", "cmpae": "coleaf", "coleaf_terms": "coleaf", "coleaf": "coleaf", "zoo": "extend",
                **dict.fromkeys(("valor_plus", "sound_baselines", "picture_baselines", "ave", "mm_pyramid", "noisy", "dhhn", "mgn",
                                 "cvcms", "deep", "uwav"), "zoo"),
                "psp": "ave", "localisers": "ave", "resnet": "cremad", "ogm": "cremad"},
    "results": {"figures_han": "han", "figures_ma": "ma", "figures_coleaf": "coleaf", "rates": "coleaf", "cost": "coleaf",
                "intervals": "claims", "claims": "claims", "errata": "claims", "claims_page": "claims", "speed": "speed", "events": "index",
                "scoring": "index", "field": "zoo", "systems": "zoo", "accuracies": "cremad", "imbalance": "imbalance", "timeline": "video",
                "timeline_page": "video", "gains": "dgm", "findings": "claims", "verify": "claims"},
    "runs": {"parallel": "scale", "remote": "scale", "sweep": "scale", "stacked": "speed", "measure": "speed", "parity": "speed",
             "gpu_report": "speed", "merge": "speed", "face": "extend", "parser": "video", "parse": "video", "extract": "video"}}
MARK = re.compile(r"^\[(?:←|index)[^\n]*\]\([^\n]*\)$", re.M)


def stem(path):
    "Name of a notebook without its number"
    return re.sub(r"^\d+[a-z]?_", "", path.stem)


def numbered(root=ROOT):
    "The numbered notebooks in reading order"
    nbs = root / "nbs"
    found = {f: sorted(p for p in (nbs / f).glob("[0-9]*.ipynb")) for f in dict.fromkeys(FLOORS)}
    ground, top = ([p for p in found[""] if (p.name >= "9") == late] for late in (False, True))
    return [*ground, *(p for f in FLOORS[1:-1] for p in found[f]), *top]


def line(order, i, root=ROOT):
    "The line of the i-th notebook"
    here, nbs = order[i], root / "nbs"
    floor = "" if here.parent == nbs else here.parent.name
    def link(text, target): return f"[{text}]({Path(os.path.relpath(target, here.parent)).as_posix()})"
    parts = [link(f"← {stem(order[i - 1])}", order[i - 1])] if i else []
    parts.append(link("index", nbs / "index.ipynb"))
    if i + 1 < len(order): parts.append(link(f"{stem(order[i + 1])} →", order[i + 1]))
    experiment = USED_IN.get(floor, {}).get(stem(here), "video" if floor == "media" else "dgm")
    if experiment != "index": parts.append(f"used in {link(experiment, nbs / f'{experiment}.ipynb')}")
    return " · ".join(parts)


def placed(source, nav):
    "The source of a first cell with its line under the summary"
    lines = [text for text in source.split("\n") if not MARK.match(text)]
    at = next(k for k, text in enumerate(lines) if text.startswith("> ")) + 1
    rest = "\n".join(lines[at:]).strip("\n")
    return "\n".join(lines[:at]) + f"\n\n{nav}" + (f"\n\n{rest}" if rest else "")


def write(root=ROOT):
    "Put the lines into the notebooks; returns the paths of those that changed"
    order, changed = numbered(root), []
    for i, path in enumerate(order):
        nb = json.loads(path.read_text(encoding="utf-8"))
        first = next(c for c in nb["cells"] if c["cell_type"] == "markdown")
        before = "".join(first["source"])
        after = placed(before, line(order, i, root))
        if after == before: continue
        first["source"] = after.splitlines(True)
        path.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        changed.append(path)
    return changed


def dead_links(root=ROOT):
    "Links between notebooks that lead nowhere, as `notebook: target`"
    for path in sorted((root / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts: continue
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] != "markdown": continue
            for target in re.findall(r"\]\(([^)#\s]+\.ipynb)(?:#[^)]*)?\)", "".join(cell["source"])):
                if not target.startswith("http") and not (path.parent / target).is_file():
                    yield f"{path.relative_to(root).as_posix()}: {target}"


if __name__ == "__main__":
    for p in write(): print(p.relative_to(ROOT))
    sys.exit(0)
