"""Every option of every experiment notebook is switched once, with small runs: no cell may trip over a value it allows."""
import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tree import NOTEBOOKS, ROOT

import avvp_nb
from avvp_nb.core import InputError
from avvp_nb.data.annotations import load_annotations
from avvp_nb.data.ave_write import write_ave
from avvp_nb.data.clip_clap import write_clip_clap
from avvp_nb.data.cremad import cremad_split
from avvp_nb.data.cremad_simulate import write_cremad
from avvp_nb.data.pseudo import label_clips, write_pseudo_layout
from avvp_nb.data.signals import BACKGROUND, MANIFEST, toy_bundle
from avvp_nb.data.sim_files import write_simulated
from avvp_nb.data.simulate import simulate
from avvp_nb.data.unav_simulate import write_unav
from avvp_nb.media import hear, see
from avvp_nb.media.extras import optional, version_of
from avvp_nb.methods.zoo import METHODS
from avvp_nb.records.spec import RunSpec
from avvp_nb.records.weights import save_weights

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
    "cremad": {"method": ["joint", "ogm", "dgm"], "alpha": [0, .5], "alphas": [[.2], []], "measure": {"measure": "score", "method": "dgm"}, "noise": False,
               "target": "both", "fusion": ["sum", {"fusion": "film", "method": "joint"}], "protocol": "paper", "split": ["speakers", "official", "on_test"], "frames": 2,
               "scale": "small", "seeds": [[2, 3]], "features": {"features": "CREMAD", "on_missing": "drop"}, "table": True,
               "on_missing": {"on_missing": "drop", "features": "CREMAD"}, "fresh": True, "device": "cpu"},
    "imbalance": {"datasets": [["ave"], ["llp"]], "levels": [["balanced"]], "scale": "small", "seeds": [[1, 2, 3]], "train": False, "fresh": True, "device": "cpu"},
    "realism": {"scales": [["full"]], "train": [["small"]], "seeds": [[2, 3]], "device": "cpu"},
    "signals": {"systems": [["talnet", "dgm@jomold"], []], "beside": [["ma"]], "weak": True, "scale": "small", "seeds": [[2]],
                "sound": ["yamnet-1024", {"sound": "yamnet", "pictures": "efficientnet"}], "pictures": "efficientnet",
                "bundle": "BUNDLE", "fresh": True, "device": "cpu"},
    "video": {"video": "VIDEO", "backend": {"backend": "small", "model": "MODEL"}, "heard_threshold": .6, "seen_threshold": .05,
              "model": {"model": "MODEL", "backend": "small"}, "frames": "official"},
    "speed": {"scale": "small", "seeds": [[2, 3]], "batch_sizes": [[8]], "seconds": .2, "device": "cpu",
              "bench": "no/such/folder"},
}
# Of the new place of `out` each set of parameters is a test by itself; measurements of a second are made shorter
ALWAYS = {"ave": {"seeds": [1], "table": False}, "cremad": {"seeds": [1], "table": False, "alphas": []}, "imbalance": {"seeds": [1], "datasets": ["cremad"]}, "realism": {"seeds": [1]}, "zoo": {"systems": ["talnet", "han"]}, "speed": {"seconds": .05, "batch_sizes": [4], "seeds": [1]},
          "signals": {"systems": ["ma"], "beside": [], "weak": False, "seeds": [1, 2], "sound": "log-mel", "pictures": "thumbnail",
                      "bundle": "BUNDLE"}, "video": {"video": "VIDEO"}}
NEEDED = {"signals": "BUNDLE", "video": "VIDEO"}                       # pages that need a file which optional packages write
NETS = {("signals", "sound"), ("signals", "pictures"), ("video", "backend"), ("video", "model")}   # need the small networks


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
            yield key, {**whole(ALWAYS.get(name, {})), **given}


@pytest.mark.parametrize("name", WITH_PARAMETERS)
def test_every_parameter_has_a_switch(name):
    assert sorted(SWITCHES[name]) == sorted(set(parameters(WITH_PARAMETERS[name])) - {"out"})


def clip(path):
    "Write three seconds of grey noise with a tone as a video"
    av, rng = optional("av", "writing a video"), np.random.default_rng(0)
    with av.open(str(path), "w") as c:
        v, a = c.add_stream("mpeg4", rate=8), c.add_stream("aac", rate=16_000, layout="mono")
        v.width, v.height, v.pix_fmt = 64, 48, "yuv420p"
        for _ in range(24): c.mux(v.encode(av.VideoFrame.from_ndarray(rng.integers(0, 255, (48, 64, 3), np.uint8), "rgb24")))
        block = av.AudioFrame.from_ndarray(np.sin(np.arange(48_000) / 9, dtype="f4")[None], "fltp", "mono")
        block.sample_rate = 16_000
        c.mux(a.encode(block))
        for s in (v, a): c.mux(s.encode(None))


def six_classes(root):
    "The toy bundle with every class twice, so that each timeline has others that share no label with it"
    toy_bundle(root)
    rows = [line.split(",") for line in (root / MANIFEST).read_text().splitlines()]
    for row in [r for r in rows[1:] if r[2] != BACKGROUND]:
        file, modality, name, source, recording, *rest = row
        other = file.replace(f"/{name}/", f"/{name} too/")
        (root / other).parent.mkdir(exist_ok=True)
        (root / other).write_bytes((root / file).read_bytes())
        rows.append([other, modality, f"{name} too", source, f"{recording} too", *rest])
    (root / MANIFEST).write_text("".join(",".join(r) + "\n" for r in rows))


def own_files(root):
    "A toy bundle, a video and weights of a network as small as the player's; without those whose packages are missing"
    spec, sizes = RunSpec("han").plain(), dict(classes=2, audio_dim=hear.WIDTH, frame_dim=see.WIDTH, motion_dim=512)
    header = {"spec": spec, "sizes": sizes, "classes": ["one", "two"], "features": {"backend": "small"}}
    save_weights(METHODS["han"].build(spec, {**sizes, "dim": 32})[0], root / "net.safetensors", header)
    out = {"MODEL": root / "net.safetensors"}
    for name, path, make in (("BUNDLE", root / "bundle", six_classes), ("VIDEO", root / "clip.mp4", clip)):
        try: make(path)
        except InputError: continue
        out[name] = path
    return {k: str(v) for k, v in out.items()}


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
    own = own_files(tmp_path_factory.mktemp("own"))
    return {**own, "AVE": str(ave), "CREMAD": str(cremad), "CLIP_CLAP": str(teachers), "ANNOTATIONS": str(folder), "FEATURES": str(llp), "UNAV": str(next(unav.rglob("*.json"))),
            "UNAV_FEATURES": str(unav), "PSEUDO": str(labels)}


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_PARAMETERS)
def test_every_option_can_be_switched(name, files, tmp_path):
    if NEEDED.get(name, "MODEL") not in files: pytest.skip(f"the packages that write the {NEEDED[name].lower()} are not installed")
    nets = all(version_of(p.split("==")[0]) != "not installed" for p in (hear.PACKAGE, see.PACKAGE, "onnxruntime"))
    chosen = [(key, given) for key, given in sets(name, files) if nets or (name, key) not in NETS]
    env, committed = os.environ | {"OMP_NUM_THREADS": "1"}, Path(avvp_nb.__file__).resolve().parents[1] / "figures"
    def folders(): return {p for p in committed.rglob("*") if p.is_dir()}
    before = folders()
    done = subprocess.run([sys.executable, "tests/player.py", f"nbs/{name}.ipynb", str(tmp_path / "runs"),
                           json.dumps([given for _, given in chosen])], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    wrong = [f"{key} {given}\n{e}" for (key, given), e in zip(chosen, said, strict=True) if e]
    assert not wrong, "\n\n".join(wrong)
    assert folders() == before                  # committed results are read, and nothing is packed beside them
