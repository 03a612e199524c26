"""Runs: their addresses, records and files, what interrupts them, and what the simulator's profiles reach."""
import csv
import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import micro
import numpy as np
import oracle
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from avvp_nb import cli
from avvp_nb.core import InputError, file_hash, read_json, write_json
from avvp_nb.counts import LEVELS, METRICS
from avvp_nb.data import sources
from avvp_nb.data.annotations import load_annotations
from avvp_nb.data.packed import pack
from avvp_nb.data.sim_files import write_simulated
from avvp_nb.data.sim_labels import SimParams
from avvp_nb.data.simulate import oracle_labels, simulate
from avvp_nb.data.sources import DataSpec, identify, load_data
from avvp_nb.methods.han import RECIPE
from avvp_nb.methods.zoo import METHODS
from avvp_nb.metrics import RULES, evaluate
from avvp_nb.records import weights
from avvp_nb.records.spec import RunSpec, run_key
from avvp_nb.records.store import Store
from avvp_nb.records.weights import load_weights
from avvp_nb.results.intervals import VideoScores
from avvp_nb.runs import single
from avvp_nb.runs.merge import merge
from avvp_nb.runs.single import run
from avvp_nb.runs.stacked import run_many
from avvp_nb.train.learner import predict

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
EMBEDDED = {"annotations": "embedded"}


@pytest.fixture(autouse=True)
def small_networks(request, monkeypatch):
    "The scale `micro` and networks of 32 dimensions, except in tests of the real sizes"
    if "full_size" in request.fixturenames: return
    micro.install(monkeypatch.setitem)


@pytest.fixture
def full_size():
    "Networks as they are"


def spec_of(method="dgm", options=None, **kw): return RunSpec(method, options or {}, **{"scale": "micro", "backbone": "han", **kw})
def go(spec, store): return run(spec, store, device="cpu", progress="off")


def files(folder):
    "Every file below a folder with its content"
    return {p.relative_to(folder).as_posix(): file_hash(p) for p in sorted(folder.rglob("*")) if p.is_file() and p.parent.name != "locks"}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "A finished run: (store, record, spec)"
    with pytest.MonkeyPatch.context() as m:
        micro.install(m.setitem)
        store, spec = Store(tmp_path_factory.mktemp("done")), spec_of("dgm", {"gamma": .3})
        return store, go(spec, store), spec


@pytest.fixture
def copied(done, tmp_path):
    "A copy of that store which may be spoilt"
    shutil.copytree(done[0].root, tmp_path / "store")
    return Store(tmp_path / "store"), done[1], done[2]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    "Simulated videos in the authors' layout, with their annotations"
    return write_simulated(tmp_path_factory.mktemp("written"), {"train": 48, "val": 16, "test": 16})


# --- what a spec accepts ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make, message", [
    (lambda: RunSpec("hna"), "method: 'hna' is not possible.*did you mean 'han'"),
    (lambda: RunSpec(scale="medium"), "scale: 'medium'.*'tiny', 'small'"),
    (lambda: RunSpec("dgm", {"gama": .2}), "gama: dgm has no such option. did you mean 'gamma'"),
    (lambda: RunSpec("dgm", {"gamma": "high"}), "gamma: 'high' is a str"),
    (lambda: RunSpec("dgm", {"gamma": -1.}), "gamma: -1.0"),
    (lambda: RunSpec("dgm", {"msdu": 1}), "msdu: 1 is a int. expected bool"),
    (lambda: RunSpec("dgm", {"measure": "sum"}), "measure: 'sum'"),
    (lambda: RunSpec("dgm", {"target": "all"}), "target: 'all'"),
    (lambda: RunSpec("dgm", {"shared": "both"}), "shared: 'both'"),
    (lambda: RunSpec("dgm", {"apply": "updates"}), "did you mean 'update'"),
    (lambda: RunSpec("dgm", {"shared": "split", "apply": "update"}), "tied copies share one Adam update"),
    (lambda: RunSpec("dgm", {"shared": "split"}, protocol="paper"), "tied copies share one Adam update"),
    (lambda: RunSpec("dgm", {"apply": "gradient"}, protocol="paper"), "expected apply='update'"),
    (lambda: RunSpec("dgm", protocol="official"), "protocol: 'official'"),
    (lambda: RunSpec("dgm", backbone="resnet"), "backbone: 'resnet'"),
    (lambda: RunSpec("han", {"pooling": "sum"}), "pooling: 'sum'"),
    (lambda: RunSpec("han", protocol="ogm_ge"), "protocol: 'ogm_ge'"),
    (lambda: RunSpec(epochs=0), "epochs: 0 is not possible"),
    (lambda: RunSpec(epochs=2.5), "epochs: 2.5"),
    (lambda: RunSpec(seed="1"), "seed: '1' is a str"),
    (lambda: RunSpec(rule="hna"), "rule: 'hna'"),
    (lambda: DataSpec(features="feats"), "features: features without annotations"),
    (lambda: SimParams(audio_snr=-1.), "audio_snr")])
def test_what_means_nothing_is_refused_when_it_is_said(make, message):
    with pytest.raises(InputError, match=message): make()


@pytest.mark.parametrize("make, name", [
    (lambda: RunSpec(seed=-1), "seed"),
    (lambda: RunSpec(precision="fp8"), "precision"),
    (lambda: RunSpec(select="segment/Typ@AV"), "select"),
    (lambda: RunSpec("dgm", {"gamma": math.inf}), "gamma"),
    (lambda: DataSpec(audio_table="2023"), "audio_table")])
def test_what_would_fail_later_is_refused_at_once(make, name):
    with pytest.raises(InputError, match=f"{name}: "): make()


def test_an_int_is_a_number_and_options_are_complete():
    spec = RunSpec("dgm", {"gamma": 1})
    assert spec.options == {"gamma": 1.} and type(spec.options["gamma"]) is float
    assert spec.full_options == {**METHODS["dgm"].options, "gamma": 1.} and spec.protocol == "ogm_ge" and RunSpec().protocol == "official"
    assert RunSpec("dgm", protocol="paper").full_options["apply"] == "update"
    assert hash(spec) == hash(RunSpec("dgm", {"gamma": 1.})) and spec == RunSpec("dgm", {"gamma": 1.})


def test_scales_and_recipes():
    assert RunSpec(scale="full").recipe() == RECIPE == {"lr": 3e-4, "batch_size": 16, "epochs": 40, "step": 10, "factor": .1,
                                                        "select": "segment/Type@AV"}
    assert [sources.SCALES["full"].train, sources.SCALES["full"].val, sources.SCALES["full"].test] == [10_000, 649, 1200]
    assert (sources.SCALES["tiny"].train, sources.SCALES["tiny"].test, RunSpec(scale="tiny").recipe()["epochs"]) == (600, 300, 4)
    assert (sources.SCALES["small"].train, RunSpec(scale="small").recipe()["step"]) == (4000, 6)
    own = RunSpec("dgm", backbone="han", scale="tiny", epochs=2, select="segment/A").recipe()
    assert (own["epochs"], own["select"], own["step"], own["lr"]) == (2, "segment/A", 3, 3e-4)


# --- addresses -------------------------------------------------------------------------------------------------------

OTHER = {"han": {"temporal": "none", "pooling": "max", "loss": "guided", "noisy": "none", "share_layer": False},
         "dgm": {"gamma": .2, "measure": "score", "msdu": False, "modulate": False, "noise": False, "target": "encoder", "shared": "split",
                 "apply": "update", "msdu_gradient": False}}


@pytest.mark.parametrize("method", OTHER)
def test_every_option_is_part_of_the_address(method):
    assert set(OTHER[method]) == set(METHODS[method].options), "a new option: give it another value here"
    keys = [run_key(RunSpec(method, {k: v}), EMBEDDED) for k, v in OTHER[method].items()]
    assert len({*keys, run_key(RunSpec(method), EMBEDDED)}) == len(keys) + 1 and all(k.startswith(f"{method}-") for k in keys)


def test_everything_else_of_a_spec_is_part_of_the_address():
    base = RunSpec("dgm", scale="full")
    others = [{"seed": 2}, {"scale": "tiny"}, {"epochs": 3}, {"select": "last"}, {"rule": "cmpae"}, {"precision": "bf16"}]
    specs = [base, RunSpec("han", scale="full"), RunSpec("dgm", protocol="paper", scale="full")]
    specs += [dataclasses.replace(base, **kw) for kw in others]
    specs += [RunSpec("dgm", backbone=b, scale="full") for b in METHODS["dgm"].backbones if b != base.backbone]
    assert len({run_key(s, EMBEDDED) for s in specs}) == len(specs)


def test_the_sizes_of_a_scale_are_part_of_the_address(monkeypatch):
    before = run_key(spec_of(), EMBEDDED)
    monkeypatch.setitem(sources.SCALES, "micro", dataclasses.replace(micro.SCALE, train=64))
    assert run_key(spec_of(), EMBEDDED) != before


def test_order_and_defaults_are_not_part_of_the_address():
    a = RunSpec("dgm", {"gamma": .2, "noise": False})
    b = RunSpec("dgm", {"noise": False, "gamma": .2, "msdu": True}, protocol="ogm_ge", backbone=a.backbone)
    assert run_key(a, {"x": 1, "y": 2}) == run_key(b, {"y": 2, "x": 1})


OTHER_SIM = {"labels": "markov", "label_sets": "train"}


def test_every_parameter_of_the_simulator_is_part_of_the_address(tmp_path):
    "And a run that was done with other parameters isn't taken for this one"
    def key(params): return run_key(RunSpec(), identify(DataSpec(sim=params), tmp_path)[0])
    keys, base = [key(SimParams())], SimParams()
    for f in dataclasses.fields(SimParams):
        v = getattr(base, f.name)
        value = OTHER_SIM.get(f.name) or (v + 1 if isinstance(v, int) else v * .9)
        keys.append(key(dataclasses.replace(base, **{f.name: value})))
    assert len(set(keys)) == len(keys) > 15


def test_the_address_is_made_of_contents_not_of_paths(written, tmp_path):
    spec = spec_of("han", data=DataSpec(str(written / "data"), str(written)))
    first = go(spec, tmp_path / "runs")
    shutil.copytree(written, tmp_path / "moved")
    moved = dataclasses.replace(spec, data=DataSpec(str(tmp_path / "moved" / "data"), str(tmp_path / "moved" / "feats")))
    packed = pack(written, tmp_path / "packed", load_annotations(written / "data"), dtype="float32", progress=False).path
    stored = dataclasses.replace(spec, data=DataSpec(str(written / "data"), str(packed)))
    for other in (moved, stored): assert go(other, tmp_path / "runs") == first
    assert str(tmp_path) not in json.dumps(first["spec"]) + json.dumps(first["data"]["identity"])


def edit_label(folder):
    path = folder / "data" / "AVVP_train.csv"
    lines = path.read_text().splitlines()
    name, label = lines[1].split("\t")
    lines[1] = f"{name}\t{'Dog' if label != 'Dog' else 'Cat'}"
    path.write_text("\n".join(lines) + "\n")


def edit_feature(folder):
    path = sorted((folder / "feats" / "vggish").glob("*.npy"))[3]
    np.save(path, np.load(path) + np.float32(.5))


@pytest.mark.parametrize("edit", [edit_label, edit_feature])
def test_a_change_of_the_data_changes_the_address(written, tmp_path, edit):
    "Also after the features have been packed for an earlier run"
    folder = tmp_path / "data"
    shutil.copytree(written, folder)
    data = DataSpec(str(folder / "data"), str(folder))
    before = identify(data, tmp_path / "cache")[0]
    assert identify(data, tmp_path / "cache")[0] == before
    edit(folder)
    try: after = identify(data, tmp_path / "cache")[0]
    except InputError: return                                                      # refused by name is fine as well
    assert after != before


def test_the_two_copies_of_the_audio_table_are_two_data_sets(llp, tmp_path):
    a, b = (identify(DataSpec(str(llp), audio_table=t), tmp_path)[0] for t in ("2024", "2020"))
    assert a != b and a["audio_table"] == "2024"


# --- records ---------------------------------------------------------------------------------------------------------

def test_a_record_is_complete(done):
    store, r, spec = done
    assert {"format", "key", "spec", "seed", "data", "commit", "versions", "hardware", "wall_time", "finished", "rule", "selection", "history",
            "metrics", "floors", "probabilities"} <= set(r)
    assert r["format"] == 1 and r["key"] == run_key(spec, r["data"]["identity"]) and r == read_json(store.record_path(r["key"]))
    assert {"method", "backbone", "options", "scale", "seed", "protocol", "recipe", "rule", "precision"} <= set(r["spec"])
    assert r["spec"]["options"] == {**METHODS["dgm"].options, "gamma": .3} and r["seed"] == r["spec"]["seed"] == 1
    assert r["data"]["simulated"] is True and r["data"]["mark"].startswith("simulated")
    assert r["data"]["n"] == {"train": 48, "val": 16, "test": 16}
    assert r["data"]["source"]["fingerprint"] and r["data"]["identity"]["annotations"] == "embedded"
    assert {"avvp_nb", "python", "torch", "numpy"} <= set(r["versions"]) and r["versions"]["torch"] == torch.__version__
    assert r["hardware"]["device"] == "cpu" and r["hardware"]["processor"] and r["hardware"]["cores"] == os.cpu_count()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", r["finished"]) and r["wall_time"] >= 0
    assert r["commit"] is None or re.fullmatch(r"[0-9a-f]{40}\+?", r["commit"])


def test_a_record_has_its_history(done):
    r = done[1]
    assert [h["epoch"] for h in r["history"]] == [1, 2, 3] and [h["lr"] for h in r["history"]] == pytest.approx([3e-4, 3e-4, 3e-5])
    for h in r["history"]:
        assert set(h["loss"]) == {"audio", "visual", "video", "ms_audio", "ms_visual"} and all(x > 0 for x in h["loss"].values())
        assert set(h["dgm"]) == {"omega", "mu_audio", "mu_visual", "damped_audio", "damped_visual"}
        assert len(h["val"]) >= 10 and h["seconds"] >= 0
    curve = [h["val"]["segment/Type@AV"] for h in r["history"]]
    assert r["selection"] == {"metric": "segment/Type@AV", "epoch": 3 - int(np.argmax(curve[::-1]))} and r["rule"] == "han"


def test_metrics_under_every_rule_and_floors(done):
    r = done[1]
    names = {"A", "V", "AV", "Type@AV", "Event@AV", "Ao", "Vo", "Type@AVo", "Event@AVo"}
    assert set(r["metrics"]) == set(RULES)
    for table in (*r["metrics"].values(), *r["floors"].values()):
        assert set(table) == {"segment", "event"}
        assert all(set(x) >= names and all(0 <= v <= 100 for v in x.values()) for x in table.values())
    assert "nothing" in r["floors"] and r["floors"]["nothing"]["segment"]["A"] < 5 < r["floors"]["nothing"]["segment"]["Vo"]


def by_hand(z, rule):
    "Decisions of the rules `han` and `ma` on stored arrays, with nothing but comparisons"
    out = []
    for m, own in enumerate(("audio", "visual")):
        gate = z["video" if rule == "han" else own] >= .5
        out.append(((z["segments"][:, :, m] >= .5) & gate[:, None]).astype(np.uint8))
    return out


@pytest.mark.parametrize("rule", ["han", "ma"])
def test_stored_probabilities_reproduce_the_metrics(done, rule):
    "With the brute-force scorer, from the file as it lies there"
    store, r, _ = done
    path = store.probability_path(r["key"])
    assert r["probabilities"] == {"file": path.relative_to(store.root).as_posix(), "sha256": file_hash(path)}
    with np.load(path, allow_pickle=False) as z: arrays = {k: z[k] for k in z.files}
    assert all(v.dtype == np.float16 for k, v in arrays.items() if k not in ("ids", "classes")) and arrays["segments"].shape == (16, 10, 2, 25)
    test = simulate(16, split="test")
    rows = oracle.score(*by_hand(arrays, rule), test.dense_audio, test.dense_visual)
    for level in ("segment", "event"):
        for name in rows[0][level]:
            want = 100 * float(np.mean([x[level][name] for x in rows]))
            assert r["metrics"][rule][level][name] == pytest.approx(want, abs=1e-9), (level, name)


def test_rules_that_fuse_use_both_passes(done):
    store, r, _ = done
    full, without = store.probabilities(r), store.probabilities(r, without=True)
    assert not np.allclose(full.segments, without.segments)
    for rule in ("coleaf", "cmpae"):
        a, b = RULES[rule].decide(full, without)
        test = simulate(16, split="test")
        rows = oracle.score(a, b, test.dense_audio, test.dense_visual)
        assert r["metrics"][rule]["segment"]["AV"] == pytest.approx(100 * np.mean([x["segment"]["AV"] for x in rows]), abs=1e-9)


def test_weights_reproduce_the_probabilities(done):
    store, r, _ = done
    model, header = load_weights(store.weight_path(r["key"]))
    assert not model.training and header["spec"] == r["spec"] and header["key"] == r["key"] and header["mark"] == r["data"]["mark"]
    test = simulate(16, split="test")
    for without in (False, True):
        got = predict(model, test, cross_attention=not without)
        for k, x in store.probabilities(r, without).arrays().items():
            np.testing.assert_allclose(getattr(got, k), x, rtol=1e-3, atol=1e-3)
    with safe_open(store.weight_path(r["key"]), "pt") as f: assert json.loads(f.metadata()["avvp_nb"])["spec"]["options"]["gamma"] == .3


def test_the_best_epoch_is_what_is_stored(done):
    "Scoring the stored weights on the validation clips gives the best score of the history"
    store, r, _ = done
    valid = simulate(16, split="val")
    p = predict(load_weights(store.weight_path(r["key"]))[0], valid)
    rows = oracle.score(*by_hand(p.arrays(), "han"), valid.dense_audio, valid.dense_visual)
    best = max(h["val"]["segment/Type@AV"] for h in r["history"])
    assert 100 * np.mean([x["segment"]["Type@AV"] for x in rows]) == pytest.approx(best, abs=.5)


def test_what_is_left_behind(done):
    store, r, _ = done
    key = r["key"]
    assert set(files(store.root)) == {f"records/{key}.json", f"probabilities/{key}.npz", f"videos/{key}.npz", f"weights/{key}.safetensors"}
    assert repr(store).endswith("1 records)")


def test_what_is_kept_of_each_video_is_enough_for_a_clone(done, tmp_path):
    store, r, _ = done
    kept, n, clone = store.kept_videos(r), len(store.probabilities(r).video), Store(tmp_path / "clone")
    assert {k: x.shape for k, x in kept.items()} == {"own": (n, 18), "selected": (n, 18), "cells_unimodal": (3, 4, n), "cells_unimodal+cross": (3, 4, n)}
    for name, scores in {"own": r["metrics"][r["rule"]], "selected": r["selected"]["kept"]["metrics"]}.items():
        assert 100 * kept[name].astype(float).mean(0) == pytest.approx([scores[l][m] for l in LEVELS for m in METRICS], abs=.03)
    merge(store, clone, parts=("records", "videos"))
    assert set(files(clone.root)) == {f"records/{r['key']}.json", f"videos/{r['key']}.npz"}
    again, here = (VideoScores(x, "micro") for x in (clone, store))
    assert again.has(r) and again(r).equals(here(r)) and np.array_equal(again.rates(r, "unimodal"), here.rates(r, "unimodal"))


def test_what_another_run_kept_is_refused(done, tmp_path):
    store, r, _ = done
    merge(store, tmp_path, parts=("records", "videos"))
    clone = Store(tmp_path)
    clone.video_path(r["key"]).write_bytes(b"another")
    for reads in (lambda: VideoScores(clone, "micro")(r), lambda: merge(clone, tmp_path / "b", parts=("records", "videos"))):
        with pytest.raises(InputError, match="is not the file of this record"): reads()
    clone.video_path(r["key"]).unlink()
    assert not VideoScores(clone, "micro").has(r)
    with pytest.raises(InputError, match="is missing or not the file of this record"): VideoScores(clone, "micro")(r)


def test_a_second_call_reads(done, monkeypatch):
    store, r, spec = done
    monkeypatch.setattr(single, "train", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(single, "load_data", lambda *_, **__: pytest.fail("loaded again"))
    before = files(store.root)
    assert go(spec, store) == r and go(spec, str(store.root)) == r and run_many([spec, spec], store, progress="off") == [r, r]
    assert files(store.root) == before


def test_records_are_found_by_what_they_are(done):
    store, r, _ = done
    assert store.records(method="dgm", gamma=.3, scale="micro", seed=1) == [r] == store.records()
    assert store.records(gamma=.1) == [] and store.records(method="han") == [] and store.records(nonsense=1) == []


def test_baseline_and_modulated_run_see_the_same(tmp_path):
    "gamma = 0 without noise and MSDU is the baseline, through the whole of `run`"
    base = go(spec_of("han"), tmp_path)
    ours = go(spec_of("dgm", {"gamma": 0., "noise": False, "msdu": False}), tmp_path)
    assert [h["loss"] for h in base["history"]] == [h["loss"] for h in ours["history"]] and base["metrics"] == ours["metrics"]
    a, b = (Store(tmp_path).probabilities(r) for r in (base, ours))
    assert all(np.array_equal(x, getattr(b, k)) for k, x in a.arrays().items())


def test_seeds_and_precision_change_the_numbers(tmp_path):
    rs = [go(spec_of("han", epochs=1, **kw), tmp_path) for kw in ({}, {"seed": 2}, {"precision": "bf16"})]
    assert len({r["key"] for r in rs}) == 3 and len({json.dumps(r["history"][0]["loss"]) for r in rs}) == 3
    assert sum(rs[2]["history"][0]["loss"].values()) == pytest.approx(sum(rs[0]["history"][0]["loss"].values()), rel=.02)


def test_several_runs_say_where_they_are(tmp_path, capsys):
    specs = [spec_of("han", epochs=1), spec_of("dgm", {"gamma": .2}, epochs=1)]
    assert [r["spec"]["method"] for r in run_many(specs, tmp_path, "cpu", "lines")] == ["han", "dgm"]
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("[1/2] han, micro, seed 1")
    assert any(x.startswith("[2/2] dgm on han (gamma=0.2), micro, seed 1") for x in out)


def test_data_are_shared_in_memory():
    a = load_data(DataSpec(), "micro")
    assert load_data(DataSpec(), "micro") is a and {k: len(v) for k, v in a.items()} == {"train": 48, "val": 16, "test": 16}
    summary = a.summary()
    assert summary.loc["train", "second-by-second labels"] == "hidden from training"
    assert 80 < summary.loc["test", "% of labels heard"] <= 100
    with pytest.raises(InputError, match="scale: 'medium'"): load_data(DataSpec(), "medium")


# --- real annotations, real layout -----------------------------------------------------------------------------------

def test_real_annotations_with_simulated_features(llp, tmp_path):
    spec = spec_of("dgm", data=DataSpec(annotations=str(llp)), epochs=2)
    r = go(spec, tmp_path / "runs")
    assert r["data"]["simulated"] and "real annotations" in r["data"]["mark"] and str(llp) not in json.dumps(r["data"]["identity"])
    with open(llp / "AVVP_test_pd.csv", encoding="utf-8") as f: ids = [row["filename"] for row in csv.DictReader(f, delimiter="\t")]
    data = load_data(spec.data, "micro")
    assert data["test"].ids == ids[:16] and data["train"].mark == r["data"]["mark"]
    shutil.copytree(llp, tmp_path / "llp")
    assert go(dataclasses.replace(spec, data=DataSpec(annotations=str(tmp_path / "llp"))), tmp_path / "runs") == r


@pytest.mark.parametrize("method", ["han", "dgm"])
def test_features_from_files_train_like_the_simulator_itself(written, tmp_path, method):
    "Written in the authors' layout, packed and read back: the same losses, probabilities and weights to the last bit"
    direct = go(spec_of(method), tmp_path / "direct")
    read = go(spec_of(method, data=DataSpec(str(written / "data"), str(written))), tmp_path / "read")
    assert direct["key"] != read["key"] and direct["metrics"] == read["metrics"] and direct["selection"] == read["selection"]
    for a, b in zip(direct["history"], read["history"]): assert {**a, "seconds": 0} == {**b, "seconds": 0}
    a, b = (Store(tmp_path / k).probabilities(r) for k, r in (("direct", direct), ("read", read)))
    assert all(np.array_equal(x, getattr(b, k)) for k, x in a.arrays().items())
    m, n = (load_weights(Store(tmp_path / k).weight_path(r["key"]))[0] for k, r in (("direct", direct), ("read", read)))
    assert micro.same_weights(m, n)
    assert read["data"]["simulated"] and read["data"]["mark"].startswith("simulated")


def test_a_missing_feature_file_is_refused_before_training(written, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    shutil.copytree(written, folder)
    gone = sorted((folder / "feats" / "res152").glob("*.npy"))[7]
    gone.unlink()
    monkeypatch.setattr(single, "train", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(InputError, match=f"{gone.name}: missing.*fetch it"):
        go(spec_of("han", data=DataSpec(str(folder / "data"), str(folder))), tmp_path / "runs")
    assert not list((tmp_path / "runs").glob("records/*"))


def bad_shape(x): return x[:, :100]
def bad_number(x): return np.where(np.arange(x.size).reshape(x.shape) == 5, np.nan, x).astype(np.float32)


@pytest.mark.parametrize("spoil, said", [(bad_shape, "shape"), (bad_number, "NaN|non-finite")])
def test_a_wrong_feature_file_is_refused_before_training(written, tmp_path, monkeypatch, spoil, said):
    folder = tmp_path / "data"
    shutil.copytree(written, folder)
    path = sorted((folder / "feats" / "vggish").glob("*.npy"))[2]
    np.save(path, spoil(np.load(path)))
    monkeypatch.setattr(single, "train", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(InputError, match=rf"{path.name}.*({said})"):
        go(spec_of("han", data=DataSpec(str(folder / "data"), str(folder))), tmp_path / "runs")


@pytest.mark.parametrize("data", [DataSpec("no/such/folder"), DataSpec("no/such/folder", "nor/this")])
def test_a_missing_folder_is_named(tmp_path, data):
    with pytest.raises(InputError, match="no/such/folder"): go(spec_of(data=data), tmp_path / "runs")
    assert not (tmp_path / "runs").exists() or not files(tmp_path / "runs")


def test_a_folder_without_features_is_named(written, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: no feature folders"):
        go(spec_of(data=DataSpec(str(written / "data"), str(tmp_path / "empty"))), tmp_path / "runs")


# --- damaged and unwritable stores -----------------------------------------------------------------------------------

@pytest.mark.parametrize("content, said", [
    ("{", "is not valid JSON"), ("[]", "is not a whole run record"), ('{"key": "dgm-0", "metrics": {}}', "is not a whole run record"),
    (None, "is the record of another run")])
def test_a_damaged_record_is_refused_and_left_alone(copied, content, said):
    store, r, spec = copied
    path = store.record_path(r["key"])
    content = content or json.dumps({**r, "key": "dgm-0"})
    path.write_text(content)
    with pytest.raises(InputError, match=rf"{path.name}: {said}.*delete it"): go(spec, store)
    assert path.read_text() == content
    path.unlink()
    again = go(spec, store)
    assert again["metrics"] == r["metrics"] and again["probabilities"] == r["probabilities"]


def test_a_record_that_is_not_whole_is_refused(copied):
    store, r, spec = copied
    path = store.record_path(r["key"])
    write_json({k: r[k] for k in ("key", "metrics")}, path)
    with pytest.raises(InputError, match=f"{path.name}: "): go(spec, store)


def test_a_damaged_record_does_not_break_a_listing_silently(copied):
    store, r, _ = copied
    (store.root / "records" / "other.json").write_text("[1, 2]")
    with pytest.raises(InputError, match=r"other\.json"): store.records(method="dgm")


@pytest.mark.parametrize("how", ["changed", "missing", "empty"])
def test_damaged_probabilities_are_refused(copied, how):
    store, r, _ = copied
    path = store.probability_path(r["key"])
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if how == "missing": path.unlink()
    else: path.write_bytes(bytes(data) if how == "changed" else b"")
    with pytest.raises(InputError, match=f"{path.name}: is missing or not the file of this record.*delete the record"): store.probabilities(r)


@pytest.mark.parametrize("content", ["cut", "text", "foreign", "none"])
def test_damaged_weights_are_refused(copied, content):
    store, r, _ = copied
    path = store.weight_path(r["key"])
    if content == "cut": path.write_bytes(path.read_bytes()[:-1000])
    elif content == "text": path.write_text("weights")
    elif content == "foreign": save_file({"a": torch.zeros(2)}, path, metadata={"format": "pt"})
    else: path.unlink()
    said = "there is no such file" if content == "none" else "is not a weights file of this library"
    with pytest.raises(InputError, match=f"{path.name}: {said}"): load_weights(path)


def test_weights_for_other_classes_are_refused(done):
    "By the first class that differs; a file of an older version can only be too short or too long"
    store, record, spec = done
    path, names = store.weight_path(record["key"]), weights.class_names(load_data(spec.data, spec.scale)["test"])
    assert load_weights(path, names)[1]["classes"] == names
    for classes, message in [(names[1:] + names[:1], f"its class 0 is {names[0]!r}"), (names + ["Rain"], "its class"), (names[:-1], "its class")]:
        with pytest.raises(InputError, match=message) as e: load_weights(path, classes)
        assert str(path) in str(e.value) and "use weights of these classes" in str(e.value)


def test_weights_with_an_incomplete_header_are_refused(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "w.safetensors", metadata={"avvp_nb": "{}"})
    with pytest.raises(InputError, match=r"w\.safetensors: "): load_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize("content", [b"not a checkpoint", b""])
def test_a_corrupt_checkpoint_is_named_and_left_alone(tmp_path, content):
    store, spec = Store(tmp_path), spec_of()
    path = store.checkpoint_path(run_key(spec, identify(spec.data, tmp_path)[0]))
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{path.name}: is damaged.*delete it to start this run again"): go(spec, store)
    assert files(tmp_path) == {f"checkpoints/{path.name}": file_hash(path)}


def test_the_checkpoint_of_another_run_is_refused(tmp_path):
    class Stop(Exception): pass
    def stop(*_): raise Stop
    store, spec = Store(tmp_path), spec_of("han")
    with pytest.MonkeyPatch.context() as m, pytest.raises(Stop):
        m.setattr(single, "finish", stop)
        go(spec, store)
    left = next(tmp_path.glob("checkpoints/*.pt"))
    other = spec_of("han", seed=2)
    shutil.copy(left, store.checkpoint_path(run_key(other, identify(other.data, tmp_path)[0])))
    with pytest.raises(InputError, match="is the checkpoint of another run"): go(other, store)
    assert go(spec, store)["selection"] and not left.exists()


@pytest.mark.parametrize("where", ["out", "out/deeper"])
def test_an_output_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch, where):
    (tmp_path / "out").write_text("a file")
    for name in ("load_data", "train"): monkeypatch.setattr(single, name, lambda *_, **__: pytest.fail("worked"))
    with pytest.raises(InputError, match=r"out.*could not be written.*choose another output folder"): go(spec_of(), tmp_path / where)
    assert (tmp_path / "out").read_text() == "a file" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["checkpoints", "probabilities", "weights", "records"])
def test_a_part_of_the_store_that_cannot_be_written(copied, name):
    "A file where a folder should be stands for a folder without permission"
    store, r, _ = copied
    shutil.rmtree(store.root / name, ignore_errors=True)
    (store.root / name).write_text("a file")
    before = files(store.root)
    with pytest.raises(InputError, match=f"{name}/dgm-.*could not be written"): go(spec_of("dgm", {"gamma": .4}), store)
    after = files(store.root)
    assert {k: after[k] for k in before} == before and not [k for k in after if k.endswith(".part")]


def test_a_device_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="device: 'gpu0' cannot be used"): run(spec_of(), tmp_path, device="gpu0", progress="off")
    assert not files(tmp_path)


# --- from a shell ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("args, said", [
    (["hna"], "did you mean 'han'"),
    (["dgm", "--set", "gama=0.2"], "gama: dgm has no such option. did you mean 'gamma'"),
    (["dgm", "--set", "gamma"], "no '='"),
    (["dgm", "--set", "gamma=high"], "gamma: 'high' is a str"),
    (["han", "--scale", "huge"], "scale: 'huge'"),
    (["han", "--device", "gpu0"], "device: 'gpu0'"),
    (["han", "--annotations", "no/such/folder"], "no/such/folder"),
    (["han", "--features", "feats"], "features without annotations"),
    (["han", "--epochs", "0"], "epochs: 0")])
def test_bad_input_has_a_message_and_a_status(tmp_path, capsys, args, said):
    assert cli.main(["run", *args, "--out", str(tmp_path / "runs")]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and said in err and not list((tmp_path / "runs").glob("records/*"))


def test_an_output_that_cannot_be_written_has_a_status(tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    assert cli.main(["run", "han", "--scale", "micro", "--out", str(tmp_path / "out")]) == 2
    assert "could not be written" in capsys.readouterr().err and (tmp_path / "out").read_text() == "a file"


def test_a_run_from_a_shell(tmp_path, capsys):
    args = ["run", "dgm", "--set", "gamma=0.2", "noise=False", "--backbone", "han", "--scale", "micro", "--epochs", "1", "--seeds", "3", "4"]
    assert cli.main([*args, "--out", str(tmp_path)]) == 0
    identity, options = identify(DataSpec(), tmp_path)[0], {"gamma": .2, "noise": False}
    want = {run_key(spec_of("dgm", options, epochs=1, seed=s), identity) for s in (3, 4)}
    assert {r["key"] for r in Store(tmp_path).records()} == want
    assert "simulated" in capsys.readouterr().out


# --- processes -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def server(tmp_path_factory):
    s = micro.Server(tmp_path_factory.mktemp("server"))
    yield s
    s.close()


SPECS = {"dgm": dict(method="dgm", options={"gamma": .2}, backbone="han"), "han": dict(method="han")}


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    "The uninterrupted run of each spec, in a process of its own: (essence, seconds)"
    out = {}
    for name, spec in SPECS.items():
        store, t0 = tmp_path_factory.mktemp(f"whole-{name}"), time.monotonic()
        answer = server.run(store, epochs=8, **spec)
        assert answer["end"] == "done", answer["said"]
        out[name] = micro.essence(store, answer["record"]), time.monotonic() - t0
    return out


def no_rests(store):
    "No temporary file and no checkpoint"
    return not [p for p in store.rglob("*") if p.suffix == ".part" or p.parent.name == "checkpoints"]


@needs_fork
@pytest.mark.parametrize("name", SPECS)
def test_kill_9_at_random_moments(server, whole, tmp_path, name):
    "The same command again and again until it is done: the same numbers, files and weights as if nothing had happened"
    want, seconds = whole[name]
    rng, kills, interrupted = random.Random(name), 0, False
    for i in range(12):                                                          # a store for each run that got through
        store = tmp_path / str(i)
        while (answer := server.run(store, after=rng.uniform(.2, .9) * seconds, epochs=8, **SPECS[name]))["end"] == "killed":
            kills, interrupted = kills + 1, True
            if kills % 4 == 0: answer = server.run(store, epochs=8, **SPECS[name])
            if answer["end"] == "done": break
        assert answer["end"] == "done", answer["said"]
        assert micro.essence(store, answer["record"]) == want
        if kills >= 5: break
        if not interrupted: seconds /= 2
        interrupted = False
    assert kills >= 2


@needs_fork
@pytest.mark.parametrize("spec", [SPECS["dgm"], *(pytest.param(x, marks=pytest.mark.slow) for x in (SPECS["han"], {"method": "dgm"}))],
                         ids=["dgm on han", "han", "dgm, in stages"])
def test_kill_9_around_every_write(server, tmp_path, spec):
    """A process that dies before or after each file it renames into place, checkpoints, probabilities, weights and record included
    (and those of the runs that must come first), and is then started again"""
    spec = dict(spec, epochs=2)
    answer = server.run(tmp_path / "whole", **spec)
    want, moment = micro.essence(tmp_path / "whole", answer["record"]), 0
    for moment in range(1, 40):
        store = tmp_path / str(moment)
        first = server.run(store, die=moment, **spec)
        if first["end"] == "done": break
        assert first["end"] == "killed", first["said"]
        assert all(micro.records(store).values())                                # a record is whole or absent
        second = server.run(store, **spec)
        assert second["end"] == "done", (moment, second["said"])
        assert micro.essence(store, second["record"]) == want, moment
    assert moment > 10                                                           # 2 checkpoints, 3 results, twice each


@needs_fork
def test_kill_9_leaves_no_rests_behind(server, tmp_path):
    "What a killed process had half written is removed by the one that finishes its run"
    spec = dict(SPECS["dgm"], epochs=2)
    for moment in (3, 5): assert server.run(tmp_path, die=moment, **spec)["end"] == "killed"
    assert server.run(tmp_path, **spec)["end"] == "done" and no_rests(tmp_path)


@needs_fork
def test_several_processes_on_one_store(server, tmp_path):
    "One trains, the others wait for it; all get the same record"
    jobs = [{"store": str(tmp_path), "spec": {"scale": "micro", "epochs": 8, **SPECS[n]}} for n in ("dgm", "dgm", "dgm", "han")]
    answers = server.ask(jobs)
    assert [a["end"] for a in answers] == ["done"] * 4, [a["said"] for a in answers]
    same = [json.dumps(a["record"], sort_keys=True) for a in answers[:3]]
    assert len(set(same)) == 1 and answers[3]["record"]["key"] != answers[0]["record"]["key"]
    assert [sum("epoch 1/8" in a["said"] for a in part) for part in (answers[:3], answers[3:])] == [1, 1]
    assert len(micro.records(tmp_path)) == 2 and no_rests(tmp_path)
    for r in micro.records(tmp_path).values(): Store(tmp_path).probabilities(r)


@needs_fork
def test_a_killed_trainer_lets_the_waiting_one_take_over(server, whole, tmp_path):
    "The lock dies with its process"
    job = {"store": str(tmp_path), "spec": {"scale": "micro", "epochs": 8, **SPECS["dgm"]}}
    assert server.ask([{**job, "die": 7}])[0]["end"] == "killed"
    a, b = server.ask([{**job, "die": 9}, job])
    assert {a["end"], b["end"]} <= {"killed", "done"} and b["end"] == "done"
    assert micro.essence(tmp_path, b["record"]) == whole["dgm"][0]


@needs_fork
def test_a_full_disk_stops_the_run_and_leaves_everything_intact(server, whole, tmp_path):
    "No file may grow beyond 100 kB: the checkpoint cannot be written; with room again the run goes on"
    assert server.run(tmp_path, **dict(SPECS["han"], epochs=1))["end"] == "done"
    before = files(tmp_path)
    answer = server.run(tmp_path, limit=100_000, epochs=8, **SPECS["dgm"])
    assert answer["end"] == "failed"
    assert re.search(r"InputError: .*checkpoints/dgm-\w+\.pt: could not be written \(File too large\)", answer["said"])
    after = files(tmp_path)
    assert after == before
    answer = server.run(tmp_path, epochs=8, **SPECS["dgm"])
    assert answer["end"] == "done" and micro.essence(tmp_path, answer["record"]) == whole["dgm"][0]


def fresh(store, **spec):
    "A run in a fresh interpreter"
    return micro.command("train", json.dumps({"store": str(store), "spec": {"scale": "micro", "epochs": 8, **spec}}))


def test_kill_9_of_a_fresh_interpreter(whole, tmp_path):
    "The command as a user starts it, killed after its second epoch and started again"
    process = fresh(tmp_path, **SPECS["dgm"])
    for line in process.stdout:
        if line.startswith("epoch 2/8"): break
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL and not micro.records(tmp_path)
    again = fresh(tmp_path, **SPECS["dgm"])
    said = again.communicate(timeout=120)[0]
    assert again.returncode == 0 and "epoch 1/8" not in said and "epoch 8/8" in said
    assert micro.essence(tmp_path, json.loads(said.splitlines()[-1])) == whole["dgm"][0]


@pytest.mark.slow
def test_kill_9_of_networks_of_the_real_size(full_size, tmp_path):
    "Checkpoints of 60 MB; each process is killed at some moment of the epoch after its first one"
    code = (f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import micro\n"
            "micro.runs.SCALES['micro'] = micro.SCALE\n"
            "micro.train(sys.argv[1], {'method': 'dgm', 'backbone': 'han', 'scale': 'micro', 'epochs': 4})")

    def start(store):
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.Popen([sys.executable, "-c", code, str(store)], env=env, text=True, stdout=subprocess.PIPE)
    def essence(store): return micro.essence(store, next(iter(micro.records(store).values())))
    whole, rng, kills = start(tmp_path / "whole"), random.Random(0), 0
    assert whole.stdout.readline()                                                  # the first of four epochs
    t0 = time.monotonic()
    assert whole.communicate(timeout=300) and whole.returncode == 0
    epoch, want = (time.monotonic() - t0) / 3, essence(tmp_path / "whole")
    for i in range(8):
        store = tmp_path / str(i)
        for _ in range(4):
            process = start(store)
            if not process.stdout.readline(): break                                 # nothing left to train
            time.sleep(rng.uniform(0, epoch))
            kills += process.poll() is None
            process.kill()
            process.communicate()
        last = start(store)
        assert last.communicate(timeout=300) and last.returncode == 0
        assert essence(store) == want
        if kills >= 2: break
        epoch /= 2
    assert kills >= 2


# --- what the profiles of the simulator reach ------------------------------------------------------------------------

def segment(record, *names): return [record["metrics"]["han"]["segment"][k] for k in names]


@pytest.mark.slow
def test_tiny_profile(full_size, tmp_path):
    "Simulator, section 8 item 9: an empty prediction scores 0.5 and 10.1"
    a, v = segment(go(RunSpec("han", scale="tiny"), tmp_path), "A", "V")
    assert a >= 22 and v >= 28


def train_small(data):
    "HAN at the small scale on given clips; segment-level metrics of its test clips"
    def scores(checkpoint):
        done, _ = single.train(RunSpec("han", scale="small"), data, checkpoint, "x", device="cpu", progress="off")
        decided = RULES["han"].decide(predict(done.model, data["test"]))
        return evaluate(*decided, data["test"].dense_audio, data["test"].dense_visual).loc["segment"]
    return scores


@pytest.fixture(scope="module")
def small_data(): return load_data(DataSpec(), "small")


@pytest.fixture(scope="module")
def weak(small_data, tmp_path_factory): return train_small(small_data)(tmp_path_factory.mktemp("weak") / "c.pt")


@pytest.mark.slow
def test_small_profile(full_size, weak):
    "Simulator, section 8 item 9"
    assert weak["A"] >= 54 and weak["V"] >= 50 and weak["AV"] >= 45


@pytest.mark.slow
def test_oracle_labels_beat_weak_ones(full_size, small_data, weak, tmp_path):
    "Simulator, section 8 item 10: knowing what is really seen is worth five points in V"
    audio, visual = oracle_labels(small_data["train"])
    informed = sources.Data({**small_data, "train": small_data["train"].with_labels(audio=audio, visual=visual)})
    informed.identity = small_data.identity
    assert train_small(informed)(tmp_path / "c.pt")["V"] >= weak["V"] + 5
