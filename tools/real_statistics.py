"""Statistics of public training runs on the real features, as the package carries them: avvp_nb/assets/real_runs.json.

    python tools/real_statistics.py             write the file from the folder `real` beside the checkout (`AVVP_SHARED`)
    python tools/real_statistics.py --check     change nothing, and fail if the file is another one

Only numbers go into the file: no names of videos, and no row of the reports themselves. Every part says where it comes from.
The reports are third parties' and were not checked by training anything.

Which logs are plain HAN is not written in them. `PLAIN` are the four of 40 epochs whose means are those that `real/README.md`
gives for plain HAN (segment Type@AV 51.2 after the first epoch and 55.3 at the best one, 62.0 54.1 49.9 55.3 57.1 there).
"""
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from avvp_nb.core import InputError, read_json, shared, to_plain, write_json
from avvp_nb.counts import LEVELS, STANDARD
from avvp_nb.limits import read_npz
from avvp_nb.results.realism import DROP, decline, first_share, jump, vector_statistics

PATH = Path(__file__).resolve().parent.parent / "avvp_nb" / "assets" / "real_runs.json"
PLAIN = ("logtrain-2021-05-17-12:56:52.txt", "logtrain-2021-05-17.txt", "logtrain-2021-05-24-11:41:54.txt", "logtrain.txt")
HAN_LIKE = "catherine-qian/AVVP-ECCV20"
SOURCES = {
    "han": f"public training logs of github.com/{HAN_LIKE}, log/ (2021), four distinct runs of plain HAN; validation",
    "many": "public training logs of github.com/catherine-qian/AVVP-ECCV20 and github.com/LONZARK/mamba_cross_modal; validation",
    "pooling": "results of github.com/Ramanathi/CS753, an independent replication; test",
    "speech": "outputs of VS_base_ASR_Project.ipynb in github.com/Piyush-Pasi/ASR-Hacker-Role-Clued-AVVP (2022)",
    "vectors": "VGGish vectors of 178 AudioSet background clips, data/audio_feature_noisy.h5 of github.com/YapengTian/AVE-ECCV18"}
COLUMNS = {(level, m): f"{short}_{m.split('@')[0]}" for level, short in zip(LEVELS, ("seg", "ev")) for m in STANDARD}
TYPE = COLUMNS["segment", "Type@AV"]


def ten(row):
    "Level: metric: percent, of a row with the columns of the logs"
    return {level: {m: round(float(row[COLUMNS[level, m]]), 2) for m in STANDARD} for level in LEVELS}


def plain_runs(logs):
    "The frames of the four runs of plain HAN, by epoch"
    mine = logs[logs.repo == HAN_LIKE]
    return [mine[mine.log == name].set_index("epoch") for name in PLAIN]


def han(logs):
    "Curves of plain HAN, and scores at the best and the last epoch with their deviations over runs"
    runs = plain_runs(logs)
    at = {"best": [r.loc[r[TYPE].idxmax()] for r in runs], "last": [r.iloc[-1] for r in runs]}
    rows = {k: pd.DataFrame(v)[list(COLUMNS.values())].astype(float) for k, v in at.items()}
    scores = {k: {"mean": ten(x.mean()), "sd": ten(x.std(ddof=1))} for k, x in rows.items()}
    return {"val": [r[TYPE].tolist() for r in runs], "loss": [r.mean_train_loss.round(4).tolist() for r in runs],
            "best_epoch": [int(r[TYPE].idxmax()) for r in runs], "by_epoch": by_epoch(runs), **scores}


def by_epoch(runs):
    "Mean and deviation over runs, epoch by epoch: validation score and training loss"
    out = {}
    for name, column, digits in (("val", TYPE, 2), ("loss", "mean_train_loss", 4)):
        x = np.array([r[column] for r in runs])
        out[name] = {"mean": x.mean(0).round(digits).tolist(), "sd": x.std(0, ddof=1).round(digits).tolist()}
    return out


def many(logs):
    "The same statistics over all runs of at least 20 epochs: quartiles"
    curves = [g[TYPE].to_numpy() for _, g in logs.groupby(["repo", "log"], sort=True) if len(g) >= 20 and g.epoch.iloc[0] == 1]
    found = {"first_share": [first_share(c) for c in curves], "jump": [jump(c) for c in curves if len(c) > DROP],
             "decline": [decline(c) for c in curves], "best_epoch": [float(np.argmax(c) + 1) for c in curves]}
    return {"runs": len(curves), **{k: np.percentile(v, [25, 50, 75]).round(2).tolist() for k, v in found.items()}}


def pooling(text):
    "Test scores by pooling, from the line of `sota.md` that quotes them"
    line = next(x for x in text.splitlines() if "Pooling ablation" in x)
    number = r"((?:\d+\.\d+ ){4}\d+\.\d+) ‖ ((?:\d+\.\d+ ){4}\d+\.\d+)"
    found = dict((m[1], m[2].split() + m[3].split()) for m in re.finditer(rf"(attentive|mean|max) {number}", line))
    cells = [(level, m) for level in LEVELS for m in STANDARD]
    return {k: ten({COLUMNS[c]: v for c, v in zip(cells, row)}) for k, row in found.items()}


def speech(table, listed):
    "HAN and MA's retraining where every training video has Speech: curves, and test scores of the last epoch"
    out = {"videos": len(listed), "share_of_speech": float(listed.event_labels.str.split(",").map(lambda x: "Speech" in x).mean())}
    for (variant, phase), g in table.groupby(["variant", "phase"], sort=False):
        val, test = g[g.split == "val"], g[g.split == "test"]
        curves = {"val": val[TYPE].tolist(), "loss": val.loss_terms_mean_total.tolist(), "test": ten(test.iloc[0])}
        out.setdefault("variants", {}).setdefault(variant, {})[{"step1": "base", "step3": "retrained"}[phase]] = curves
    return out


def statistics(folder):
    "Everything, from the folder of reports"
    logs, listed = pd.read_csv(folder / "real_logs.csv"), pd.read_csv(folder / "speech_subset_AVVP_train.csv", sep="\t")
    vectors = read_npz(folder / "real_vectors.npz")["vggish_background"]
    return {"format": 1, "sources": SOURCES, "han": han(logs), "many": many(logs),
            "pooling": pooling((folder / "sota.md").read_text(encoding="utf-8")),
            "speech": speech(pd.read_csv(folder / "real_logs_ma.csv"), listed), "vectors": vector_statistics(vectors)}


def main(args):
    "Write, or only look"
    folder = shared("real")
    if not folder.is_dir(): raise InputError("not found", where=folder, fix="set AVVP_SHARED to the folder that holds it")
    made, path = to_plain(statistics(folder)), PATH
    if "--check" in args: return int(read_json(path) != made)
    write_json(made, path)
    return 0


if __name__ == "__main__":
    try: sys.exit(main(sys.argv[1:]))
    except InputError as e: sys.exit(str(e))
