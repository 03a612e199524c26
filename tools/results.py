"""Write the generated block of README.md from the committed run records: `python tools/results.py` (or `make readme`).

Every number of that block comes from figures/records/*.json; a test compares the two.
"""
import sys
from pathlib import Path
from statistics import median

from avvp_nb.core import InputError, read_json
from avvp_nb.methods.method import METHODS
from avvp_nb.results.compare import compare
from avvp_nb.results.plans import plan, recorded, render
from avvp_nb.results.reported import reported

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- results -->", "<!-- /results -->"
NAMES = {"han": "HAN", "jomold": "JoMoLD"}
PRINTED = {"han": ("VII", "dgm+msdu@han"), "jomold": ("VI", "dgm+msdu")}


def committed():
    "All committed run records"
    return [read_json(p) for p in sorted((ROOT / "figures" / "records").glob("*.json"))]


def experiment(backbone, scale="small", gamma=0.1):
    "Records of a backbone and of DGM + MSDU on it with the defaults, by name"
    def fits(r, method, options):
        spec = r["spec"]
        ours = METHODS[method].options | options
        return spec["method"] == method and spec["backbone"] == backbone and spec["scale"] == scale and spec["options"] == ours
    wanted = {NAMES[backbone]: (backbone, {}), f"{NAMES[backbone]} + DGM + MSDU": ("dgm", {"gamma": gamma})}
    return {k: sorted((r for r in committed() if fits(r, *v)), key=lambda r: r["seed"]) for k, v in wanted.items()}


def minutes(rs):
    "Median training time of one run, in words"
    t = median(r["wall_time"] for r in rs)
    return f"{t:.0f} s" if t < 90 else f"{t / 60:.1f} min"


def section(backbone, floors):
    "One table with what it took, or nothing without records"
    ours = experiment(backbone)
    if not all(ours.values()): return ""
    table, method = PRINTED[backbone]
    variant = "gamma=0.1;measure=fusion;msdu=1" if table == "VI" else None
    names = list(ours)
    printed = {names[0]: reported("dgm", "VII", backbone), names[1]: reported("dgm", table, method, variant=variant)}
    text = compare(ours, printed, floors=floors, caption=f"DGM on {NAMES[backbone]}").to_markdown()
    return f"{took(ours)}\n\n{text}"


def took(ours):
    "How long the runs took, and on what"
    hw = next(iter(ours.values()))[0]["hardware"]
    where = f"{hw.get('gpu') or hw['processor']}, {hw['threads']} thread{'s' * (hw['threads'] > 1)}"
    return f"Median training time of one run ({where}, busy with other work): {', '.join(f'{k} {minutes(v)}' for k, v in ours.items())}."


def coleaf(table="5", scale="small"):
    "A table of CoLeaF with the floor that its measures need beside them, or nothing without records"
    wanted = plan("coleaf", table, scale, (1,))
    records = [r for r in committed() if r["spec"]["scale"] == scale and r["data"]["identity"].get("annotations") == "embedded"]
    try: ours = recorded(wanted, records)
    except InputError: return ""
    found = render(wanted, records)
    found.rows = [row for row in found.rows if row.kind != "floor" or row.name == "nothing"]
    return f"{took(ours)}\n\n{found.to_markdown()}"


def calibration():
    "HAN on 10,000 videos for four epochs, where the simulator was calibrated on HAN's printed row"
    rs = [r for r in committed() if r["spec"]["scale"] == "calibration" and r["spec"]["method"] == "han"]
    if not rs: return ""
    table = compare({"HAN": rs}, {"HAN": reported("dgm", "VII", "han")}, floors=False, caption="HAN, calibration of the simulator (10,000 videos, 4 epochs)")
    return table.to_markdown()


def block():
    "The generated text"
    parts = [s for s in (section("jomold", True), section("han", False), coleaf(), calibration()) if s]
    return "\n\n".join(parts) or "No committed records yet."


def readme(text):
    "README text with a fresh block"
    before, rest = text.split(START)
    return f"{before}{START}\n{block().strip()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    new = readme(path.read_text(encoding="utf-8"))
    if "--check" in sys.argv: sys.exit(path.read_text(encoding="utf-8") != new)
    path.write_text(new, encoding="utf-8")
