"""Plays an experiment notebook cell by cell in this process, with small runs and other values of its parameters:

    python tests/player.py nbs/dgm.ipynb FOLDER '[{"gamma": 0}, {"msdu": false}]'

prints, as its last line, what went wrong for each set of parameters (null: nothing)."""
import ast
import json
import os
import sys
import traceback
import warnings
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")

import matplotlib.pyplot as plt
import micro

from avvp_nb.data import sources


def shrink():
    "Runs of a second: few videos, one epoch, narrow networks"
    micro.install()
    for name, scale in sources.SCALES.items():
        if name != "micro": sources.SCALES[name] = replace(scale, train=48, val=16, test=16, epochs=1)


def assigned(cells):
    "Names in the cell of parameters"
    of = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])]
    return {s.target.id for source in of for s in ast.parse(source).body if isinstance(s, ast.AnnAssign)}


def play(cells, given: dict):
    "Execute code cells in one namespace, and the assignments of `given` after the cell of parameters, as papermill does"
    names = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] != "code": continue
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
        if "parameters" in cell["metadata"].get("tags", []): names.update(given)
    plt.close("all")


def main(path, out, sets):
    "What went wrong, by set of parameters"
    shrink()
    warnings.simplefilter("ignore")
    cells, said = json.loads(Path(path).read_text())["cells"], []
    usual = {k: v for k, v in (("scale", "tiny"), ("out", out)) if k in assigned(cells)}
    for given in sets:
        try: play(cells, {**usual, **given})
        except Exception: said.append(traceback.format_exc()[-2000:])
        else: said.append(None)
    print("\n" + json.dumps(said))


if __name__ == "__main__": main(*sys.argv[1:3], json.loads(sys.argv[3]))
