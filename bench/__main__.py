"""`make bench`: every benchmark of this folder in one run, on one machine, in one table.

A benchmark is a module of this folder with a function `run() -> dict` of named numbers (nested, if it likes) that raises
where the results it compares differ. Names given on the command line choose among them; one that is missing or fails is
reported, and the others still run. The numbers are also left in runs/bench.json; with `--save` (`make bench ARGS=--save`)
also in figures/bench/, under the name of the machine, as JSON and as Markdown. Run it on a machine that does nothing else.
"""
import importlib
import json
import os
import platform
import sys
import traceback
from datetime import datetime, timezone
from pathlib import Path

import torch

from avvp_nb.core import atomic_write, write_json
from avvp_nb.records.provenance import commit
from avvp_nb.runs.measure import slug

BENCHMARKS = ("training", "engines", "scoring", "threads", "dropout", "affine")
MEMORY = "/proc/meminfo"


def first(path, key):
    "What follows `key:` in a file of the kernel's, or nothing where there is no such file"
    try: text = Path(path).read_text()
    except OSError: return ""
    return next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith(key)), "")


def hardware():
    "The machine in one short dictionary"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = first(MEMORY, "MemTotal").split()
    gpu = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"processor": first("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
            "cores": cores, "threads": torch.get_num_threads(),
            **({"memory": f"{int(memory[0]) / 2**20:.0f} GiB"} if memory else {}),
            **({"gpu": ", ".join(gpu)} if gpu else {}),
            "python": platform.python_version(), "torch": torch.__version__}


def flat(found, prefix=""):
    "Every single value of a nested result, by its path in words"
    for k, v in found.items() if isinstance(found, dict) else enumerate(found, 1):
        if isinstance(v, (dict, list, tuple)): yield from flat(v, f"{prefix}{k}: ")
        else: yield f"{prefix}{k}".replace("_", " "), v


def cell(value):
    "A value as text: four digits are enough"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(results):
    "Aligned text: benchmark, quantity, value; the ratios, which are what one looks for, at the end of each benchmark"
    lines = [("benchmark", "quantity", "value")]
    for name, found in results.items():
        lines += sorted([(name, k, cell(v)) for k, v in flat(found)], key=lambda line: "ratio" in line[1])
    width = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, width)).rstrip() for line in lines)


def markdown(record):
    "A saved result for readers"
    rows = [(name, k, cell(v)) for name, found in record["results"].items() for k, v in flat(found)]
    lines = ["| benchmark | quantity | value |", "|---|---|---:|", *(f"| {' | '.join(r)} |" for r in rows)]
    where = ", ".join(f"{k} {v}" for k, v in record["hardware"].items())
    return f"# Speed on {where}\n\nWritten by `make bench ARGS=--save`, {record['finished']}, commit {record['commit']}.\n\n" + "\n".join(lines) + "\n"


def save(record, folder="figures/bench"):
    "Write a result under the name of its machine, as JSON and as Markdown"
    path = Path(folder) / f"{slug(record['hardware'])}.json"
    write_json(record, path)
    with atomic_write(path.with_suffix(".md")) as f: f.write(markdown(record))
    print(f"saved as {path} and .md")


def main(names):
    "Run the benchmarks `names`, print the table, and return the exit status"
    names, keep = [n for n in names if n != "--save"], "--save" in names
    unknown = [n for n in names if n not in BENCHMARKS]
    if unknown:
        print(f"no benchmark {', '.join(unknown)}; possible: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    results, failed = {}, []
    for name in names or BENCHMARKS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        try: results[name] = importlib.import_module(f"bench.{name}").run()
        except Exception:
            traceback.print_exc()
            failed.append(name)
    print(" | ".join(f"{k} {v}" for k, v in hardware().items()))
    if results: print(table(results))
    if failed: print(f"not measured, see above: {', '.join(failed)}")
    out = Path("runs/bench.json")
    out.parent.mkdir(exist_ok=True)
    record = {"hardware": hardware(), "results": results, "failed": failed, "commit": commit(),
              "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"), "load": os.getloadavg()[0]}
    out.write_text(json.dumps(record, indent=1, default=str) + "\n")
    if keep and not failed: save(record)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
