"""Write the generated block of README.md from the committed run records: `python tools/results.py` (or `make readme`).

Every number of that block comes from figures/records/*.json; a test compares the two.
"""
import sys
from pathlib import Path

from avvp_nb.core import read_json
from avvp_nb.report import compare, reported

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- results -->", "<!-- /results -->"
PRINTED = {"HAN": ("dgm", "VII", "han"), "HAN + DGM + MSDU": ("dgm", "VII", "dgm+msdu@han")}


def records(scale, method, **options):
    "Committed records of one experiment, by seed"
    found = [read_json(p) for p in sorted((ROOT / "figures" / "records").glob("*.json"))]
    def fits(r):
        o = r["spec"]["options"]
        return r["spec"]["scale"] == scale and r["spec"]["method"] == method and all(o.get(k) == v for k, v in options.items())
    return sorted(filter(fits, found), key=lambda r: r["seed"])


def minutes(rs):
    "Mean training time of one run, in words"
    t = sum(r["wall_time"] for r in rs) / len(rs)
    return f"{t:.0f} s" if t < 90 else f"{t / 60:.1f} min"


def block():
    "The generated text"
    ours = {"HAN": records("small", "han"), "HAN + DGM + MSDU": records("small", "dgm", gamma=0.1)}
    ours = {k: [r for r in v if r["spec"]["backbone"] == "han"] for k, v in ours.items()}
    if not all(ours.values()): return "No committed records yet."
    table = compare(ours, {k: reported(*v) for k, v in PRINTED.items()}, caption="DGM, Table VII, on HAN")
    hw = ours["HAN"][0]["hardware"]
    where = f"{hw.get('gpu') or hw['processor']}, {hw['threads']} thread{'s' * (hw['threads'] > 1)}"
    times = ", ".join(f"{k} {minutes(v)}" for k, v in ours.items())
    return f"What `make dgm` gives, here over {len(ours['HAN'])} seeds; training time of one run on {where}: {times}.\n\n{table.to_markdown()}"


def readme(text):
    "README text with a fresh block"
    before, rest = text.split(START)
    return f"{before}{START}\n{block().strip()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    new = readme(path.read_text(encoding="utf-8"))
    if "--check" in sys.argv: sys.exit(path.read_text(encoding="utf-8") != new)
    path.write_text(new, encoding="utf-8")
