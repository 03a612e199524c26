"""Every option of every experiment notebook is switched once, with small runs: no cell may trip over a value it allows."""
import ast
import json
import os
import subprocess
import sys

import pytest
from tree import NOTEBOOKS, ROOT

from avvp_nb.data.annotations import load_annotations
from avvp_nb.data.ave_write import write_ave
from avvp_nb.data.clip_clap import write_clip_clap
from avvp_nb.data.cremad import cremad_split
from avvp_nb.data.cremad_simulate import write_cremad
from avvp_nb.data.pseudo import label_clips, write_pseudo_layout
from avvp_nb.data.sim_files import write_simulated
from avvp_nb.data.simulate import simulate
from avvp_nb.data.unav_simulate import write_unav

# Another value of each parameter, or several; a dictionary sets others along with it. FILES stand for those of `layout`
SWITCHES = {
    "dgm": {"gamma": [0, .5], "backbone": "han", "measure": ["score", "discrepancy"], "msdu": False, "noise": False,
            "target": "encoder", "shared": "split", "apply": "update", "msdu_gradient": False, "scale": "small",
            "seeds": [[2, 3]], "tables": [["VII"]], "findings": True, "annotations": "ANNOTATIONS",
            "features": {"features": "FEATURES", "annotations": "ANNOTATIONS"},
            "audio_table": {"audio_table": "2020", "annotations": "ANNOTATIONS"}, "device": "cpu",
            "on_missing": {"on_missing": "drop", "features": "FEATURES", "annotations": "ANNOTATIONS"}, "fresh": True},
    "han": {"tables": [["2"], []], "scale": "small", "seeds": [[2, 3]], "annotations": "ANNOTATIONS",
            "features": {"features": "FEATURES", "annotations": "ANNOTATIONS"},
            "audio_table": {"audio_table": "2020", "annotations": "ANNOTATIONS"}, "device": "cpu",
            "on_missing": {"on_missing": "drop", "features": "FEATURES", "annotations": "ANNOTATIONS"}, "fresh": True},
    "ma": {"tau": .4, "contrast": False, "refine": ["audio", "visual"], "threshold": .3, "n_partners": 2,
           "global_target": "full", "tables": [["2", "3", "4"], []], "scale": "small", "seeds": [[2, 3]],
           "annotations": "ANNOTATIONS", "features": {"features": "FEATURES", "annotations": "ANNOTATIONS"},
           "audio_table": {"audio_table": "2020", "annotations": "ANNOTATIONS"}, "device": "cpu",
           "on_missing": {"on_missing": "drop", "features": "FEATURES", "annotations": "ANNOTATIONS"}, "fresh": True},
    "coleaf": {"tables": [["1", "6", "7", "8"], []], "protocols": [["official", "paper"]], "anchors": [["jomold", "ma"]],
               "common_rule": "han", "scale": "small", "seeds": [[2, 3]], "annotations": "ANNOTATIONS",
               "features": {"features": "FEATURES", "annotations": "ANNOTATIONS"},
               "audio_table": {"audio_table": "2020", "annotations": "ANNOTATIONS"},
               "pseudo_labels": {"pseudo_labels": "PSEUDO", "annotations": "ANNOTATIONS", "features": "FEATURES",
                                 "tables": ["7"]},
               "unav_annotations": {"unav_annotations": "UNAV", "tables": ["8"]},
               "unav_features": {"unav_annotations": "UNAV", "unav_features": "UNAV_FEATURES", "tables": ["8"]},
               "device": "cpu",
               "on_missing": {"on_missing": "drop", "features": "FEATURES", "annotations": "ANNOTATIONS"}, "fresh": True},
    "claims": {"papers": [["dgm"]], "scale": "small", "claim": "H-main-ave", "annotations": "ANNOTATIONS",
               "features": {"features": "FEATURES", "annotations": "ANNOTATIONS"},
               "audio_table": {"audio_table": "2020", "annotations": "ANNOTATIONS"}, "unav_annotations": "UNAV",
               "unav_features": {"unav_annotations": "UNAV", "unav_features": "UNAV_FEATURES"},
               "on_missing": {"on_missing": "drop", "features": "FEATURES", "annotations": "ANNOTATIONS"}},
    "zoo": {"systems": [["mm_pyramid", "coteaching"]], "scale": "small", "seeds": [[2, 3]], "annotations": "ANNOTATIONS",
            "features": {"features": "FEATURES", "annotations": "ANNOTATIONS"},
            "pseudo_labels": {"systems": ["uwav", "han"], "pseudo_labels": "PSEUDO", "annotations": "ANNOTATIONS",
                              "features": "FEATURES"},
            "clip_clap": {"systems": ["valor_plus_plus"], "clip_clap": "CLIP_CLAP", "annotations": "ANNOTATIONS",
                          "features": "FEATURES", "pseudo_labels": "PSEUDO"},
            "audio_table": {"audio_table": "2020", "annotations": "ANNOTATIONS"},
            "on_missing": {"on_missing": "drop", "features": "FEATURES", "annotations": "ANNOTATIONS"}, "fresh": True,
            "device": "cpu"},
    "ave": {"modulation": ["none", "ogm", "ogm_ge"], "gamma": .5, "measure": ["score", "discrepancy"],
            "measured": ["lstm", {"measured": "msdu", "modulation": "none"}], "noise": False, "target": "both", "apply": "update",
            "protocol": "full", "labels": "onehot", "scale": "small", "seeds": [[2, 3]], "annotations": {"annotations": "AVE", "features": "AVE"},
            "features": {"features": "AVE"}, "table": True, "fresh": True, "device": "cpu"},
    "cremad": {"method": ["joint", "ogm", "dgm"], "alpha": [0, .5], "measure": {"measure": "score", "method": "dgm"}, "noise": False,
               "target": "both", "fusion": ["sum", {"fusion": "film", "method": "joint"}], "protocol": "paper", "split": "speakers", "frames": 2,
               "scale": "small", "seeds": [[2, 3]], "features": {"features": "CREMAD", "on_missing": "drop"}, "table": True,
               "on_missing": {"on_missing": "drop", "features": "CREMAD"}, "fresh": True, "device": "cpu"},
    "imbalance": {"datasets": [["ave"], ["llp"]], "scale": "small", "seeds": [[1, 2, 3]], "fresh": True, "device": "cpu"},
    "speed": {"scale": "small", "seeds": [[2, 3]], "batch_sizes": [[8]], "seconds": .2, "device": "cpu",
              "bench": "no/such/folder"},
}
# Of the new place of `out` each set of parameters is a test by itself; measurements of a second are made shorter
ALWAYS = {"ave": {"seeds": [1], "table": False}, "cremad": {"seeds": [1], "table": False}, "imbalance": {"seeds": [1]}, "zoo": {"systems": ["talnet", "han"]}, "speed": {"seconds": .05, "batch_sizes": [4], "seeds": [1]}}


def parameters(nb):
    "Names in the cell of parameters, in order"
    cell = next((c for c in nb.cells if "parameters" in c["metadata"].get("tags", [])), {"source": []})
    return [s.target.id for s in ast.parse("".join(cell["source"])).body if isinstance(s, ast.AnnAssign)]


WITH_PARAMETERS = {nb.name: nb for nb in NOTEBOOKS if parameters(nb)}


def sets(name, files):
    "The sets of parameters to play a notebook with, each with the name that is switched"
    def whole(x):
        if isinstance(x, str): return files.get(x, x)
        return {k: whole(v) for k, v in x.items()} if isinstance(x, dict) else x
    for key, values in SWITCHES[name].items():
        for value in values if isinstance(values, list) else [values]:
            given = whole(value) if isinstance(value, dict) else {key: whole(value)}
            yield key, {**ALWAYS.get(name, {}), **given}


@pytest.mark.parametrize("name", WITH_PARAMETERS)
def test_every_parameter_has_a_switch(name):
    assert sorted(SWITCHES[name]) == sorted(set(parameters(WITH_PARAMETERS[name])) - {"out"})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "Annotations, features and pseudo-labels of both data sets in the authors' layouts"
    llp, unav, labels, teachers = (tmp_path_factory.mktemp(x) for x in ("llp", "unav", "labels", "teachers"))
    write_simulated(llp, {"train": 48, "val": 16, "test": 16})
    write_unav(unav, {"train": 48, "val": 16, "test": 16})
    folder = next(llp.rglob("AVVP_train.csv")).parent
    clips = label_clips(simulate(48))
    assert clips.ids == load_annotations(folder)["train"].ids
    write_pseudo_layout(labels, clips)
    for split, n in (("train", 48), ("val", 16), ("test", 16)): write_clip_clap(teachers, simulate(n, split=split))
    ave, cremad = (tmp_path_factory.mktemp(x) for x in ("ave", "cremad"))
    write_ave(ave, (28, 4, 4))
    stems = cremad_split("validated")
    write_cremad(cremad, [s for k, n in (("train", 48), ("val", 16), ("test", 16)) for s in stems[k][:n]])
    return {"AVE": str(ave), "CREMAD": str(cremad), "CLIP_CLAP": str(teachers), "ANNOTATIONS": str(folder), "FEATURES": str(llp), "UNAV": str(next(unav.rglob("*.json"))),
            "UNAV_FEATURES": str(unav), "PSEUDO": str(labels)}


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_PARAMETERS)
def test_every_option_can_be_switched(name, files, tmp_path):
    chosen = list(sets(name, files))
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "tests/player.py", f"nbs/{name}.ipynb", str(tmp_path / "runs"),
                           json.dumps([given for _, given in chosen])], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    wrong = [f"{key} {given}\n{e}" for (key, given), e in zip(chosen, said, strict=True) if e]
    assert not wrong, "\n\n".join(wrong)
