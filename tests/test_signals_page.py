"""Three provenances that never mix; the released network of real signals: its file, its card, and what it does with a video."""
import json
import re
import subprocess
import sys
from importlib import metadata

import numpy as np
import pytest
import torch
from tree import ROOT

from avvp_nb.core import InputError, file_hash
from avvp_nb.data.signals import toy_bundle
from avvp_nb.data.signals_features import signals_mark
from avvp_nb.media import hear, see
from avvp_nb.media.backend import Backend
from avvp_nb.records.provenance import PROVENANCES, mark_facts
from avvp_nb.records.weights import MAP, load_map, load_weights, save_weights
from avvp_nb.results import compare as C
from avvp_nb.results import groups as G
from avvp_nb.results.claims import tier_of
from avvp_nb.results.findings import Findings, Found
from avvp_nb.results.gains import over
from avvp_nb.results.plots import plot_losses, save_figure
from avvp_nb.runs.parser import load_net

MARK = "real signals, composed timelines v1 seed=0"
FOLDER = ROOT / "figures" / "weights"
FILE = FOLDER / "han_signals.safetensors"


def of_signals(method="han", seeds=(1, 2, 3), **kw):
    data = {"simulated": False, "mark": MARK, "identity": {"dataset": "signals"}}
    return [G.invented_record(s, method=method, data=data, **kw) for s in seeds]


# ---- three provenances

def test_every_form_of_a_result_says_real_signals_and_none_says_simulated(tmp_path):
    records = {"HAN": of_signals(), "JoMoLD": of_signals("jomold", gain=1.)}
    for name, table in (("ours", C.ours(records)), ("compare", C.compare(records)), ("gains", over(records, "HAN")),
                        ("rules", C.rules_table(records["HAN"])), ("stacked", C.stacked(C.compare(records)))):
        table.save(tmp_path / name)
        assert all("real signals" in r.source for r in table.rows if r.kind != "printed gain"), name
    save_figure(plot_losses(records["HAN"], records["JoMoLD"]), tmp_path / "figure", G.provenance(records["HAN"]))
    for path in tmp_path.iterdir():
        if path.suffix == ".png": continue
        text = path.read_text().lower()
        if path.suffix != ".svg": assert "real signals" in text, path.name
        if path.suffix == ".json":
            told = json.loads(text)
            assert (told["tier"], told["simulated"], told["mark"]) == ("real signals", False, MARK)
        else: assert "simulated" not in text, path.name
    assert tier_of(MARK) == "real signals"
    found = Findings("x", [Found("a sentence", "yes", 2, tuple(records["HAN"]))], "small")
    assert "real signals" in found.to_markdown() and "imulated" not in found.to_markdown()


@pytest.mark.parametrize("simulated, mark", [(True, "simulated v1"), (False, ""), (True, "invented numbers")])
def test_the_three_never_share_a_table(simulated, mark):
    other = [r | {"data": {"simulated": simulated, "mark": mark, "identity": {}}} for r in of_signals("jomold")]
    for mixed in (False, True):
        with pytest.raises(InputError, match="different data|mixes"): C.ours({"a": of_signals(), "b": other}, mixed=mixed)
    with pytest.raises(InputError, match="mixes"): C.stack([C.ours(of_signals()), C.ours(other)])


def test_the_weakest_evidence_names_a_mixture():
    marks = ["", MARK, "simulated v1", "invented numbers"]
    for i, a in enumerate(marks):
        for j, b in enumerate(marks):
            joined = "; ".join(filter(None, (a, b)))
            if a and b: assert G.marked_as(joined) == PROVENANCES[max(i, j)]
    assert mark_facts("") == {"mark": "", "simulated": False}


def test_a_toy_bundle_is_simulated(tmp_path):
    pytest.importorskip("soundfile")
    pytest.importorskip("PIL.Image")
    assert G.marked_as(signals_mark(toy_bundle(tmp_path))) == "simulated"


# ---- the released network

class Small(Backend):
    "The widths and the name of the back end that the network was trained on, without its networks"
    name, audio_dim, frame_dim, motion_dim = "small", hear.WIDTH, see.WIDTH, 512
    def about(self): return {"name": "small", "sound": {"sha256": hear.SHA256}, "pictures": {"sha256": see.SHA256}}


def test_the_file_and_its_card_agree():
    told, card = json.loads((FOLDER / "han_signals.json").read_text()), (FOLDER / "README.md").read_text()
    assert FILE.stat().st_size <= 20_000_000 and told["file"]["sha256"] == file_hash(FILE) and file_hash(FILE) in card
    assert (told["tier"], told["mark"], told["simulated"]) == ("real signals", MARK, False)
    keys = [f"{level} {k}" for level in ("segment", "event") for k in ("A", "V", "AV", "Type@AV", "Event@AV")] + ["segment+event AVG"]
    lines = {m[0]: [float(x) for x in m[1].split("|")] for m in re.findall(r"^\| \**([^|*]+?)\**(?: \(run [^|]*\))? \|((?: [\d.]+ \|){10} [\d.]+) \|$",
                                                                         card, re.M)}
    seeds = np.array([[told["scores"][s][k] for k in keys] for s in "123"])
    for name, want in {"this file": seeds[0], "the recipe, seeds 1 to 3, mean": seeds.mean(0), "standard deviation over seeds": seeds.std(0, ddof=1),
                       "nothing": [told["floors"]["nothing"][k] for k in keys],
                       "weak label in every second, both modalities": [told["floors"]["weak label, both modalities"][k] for k in keys],
                       "true tags of each modality in every second": [told["floors"]["true video-level label per modality"][k] for k in keys]}.items():
        digits = np.array([1] * 10 + [2])
        assert (np.abs(np.array(lines[name]) - want) <= .5001 * 10. ** -digits).all(), name


def test_the_released_network_is_read_without_touching_random_numbers():
    before = torch.get_rng_state()
    net = load_net(FILE, Small())
    assert torch.equal(before, torch.get_rng_state())
    assert net.classes[:2] == ("Speech", "Dog") and len(net.classes) == 10 and net.facts["mark"] == MARK
    mean, directions = load_map(FILE)
    assert (mean.shape, directions.shape) == ((1024,), (1024, 128))
    np.testing.assert_allclose(directions.T @ directions, np.eye(128), atol=1e-4)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in net.model.parameters())


def test_features_and_classes_that_do_not_fit_are_refused(tmp_path):
    class Other(Small): name = "paper"
    class Narrow(Small): audio_dim = 128
    class Ear(Small):
        def about(self): return {"sound": {"sha256": "ab" * 32}}
    for of, said in ((Other(), "was trained on features of 'small'. expected features of 'paper'"),
                     (Narrow(), "takes 1,024 features of sound a second. expected 128"),
                     (Ear(), "was trained on features of another network for sound")):
        with pytest.raises(InputError, match=re.escape(said)): load_net(FILE, of)
    model, header = load_weights(FILE)
    with pytest.raises(InputError, match="was trained on other classes: its class 0 is 'Speech'"):
        load_weights(FILE, [*header["classes"][1:], "Speech"])
    maps = {k: torch.from_numpy(x) for k, x in zip(MAP, load_map(FILE))}
    path = tmp_path / "x.safetensors"
    for state, head, said in (
            (model.state_dict(), {**header, "classes": header["classes"][:9]}, "is not one of 10 names"),
            (model.state_dict(), header, "its map of features is missing"),
            ({**model.state_dict(), **maps, MAP[1]: maps[MAP[1]][:, :64].contiguous()}, header, "not (D,) and (D, 128)"),
            ({**model.state_dict(), **maps, MAP[0]: maps[MAP[0]] * np.nan}, header, "is not finite float32"),
            ({**model.state_dict(), **maps}, {k: v for k, v in header.items() if k != "features"}, "have other names")):
        save_weights(state, path, head)
        with pytest.raises(InputError, match=re.escape(said)): load_net(path, Small())


def test_the_real_video_is_parsed_with_the_released_network(llp, tmp_path):
    for package in (hear.PACKAGE, see.PACKAGE, "onnxruntime", "av"):
        try: metadata.distribution(package.split("==")[0])
        except metadata.PackageNotFoundError: pytest.skip(f"{package} is not installed")
    done = subprocess.run([sys.executable, "-m", "avvp_nb", "parse", str(llp / "BjCEufrlXm4.mp4"), "--model", str(FILE), "--out", str(tmp_path)],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "BjCEufrlXm4.json").read_text())
    heard, seen = ([s[k] for s in told["seconds"]] for k in ("heard", "seen"))
    assert len(heard) == 10 and sum("Dog" in x for x in heard) >= 7 and sum("Dog" in x for x in seen) >= 8
    assert MARK in told["statement"] and told["model"]["file"] == FILE.name and len(told["classes"]) == 10
    done = subprocess.run([sys.executable, "-m", "avvp_nb", "parse", str(llp / "BjCEufrlXm4.mp4"), "--model", str(FILE), "--backend", "zeroshot",
                           "--out", str(tmp_path / "no")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "was trained on features of 'small'" in done.stderr and len(done.stderr.strip().splitlines()) == 1
