"""The two other data sets of DGM through the one loop: tasks, settings, runs, records, tables, commands and what is refused."""
import json
import re
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from avvp_nb import cli
from avvp_nb.core import InputError, Located, Parsing
from avvp_nb.data import sources
from avvp_nb.data.annotations import with_facts
from avvp_nb.data.ave_task import Lazy, ave_facts
from avvp_nb.data.cremad import cremad_split, official_split
from avvp_nb.data.cremad_files import cut_frames
from avvp_nb.data.cremad_pack import pack_cremad
from avvp_nb.data.cremad_simulate import write_cremad
from avvp_nb.data.cremad_task import SELECTION, cremad_facts
from avvp_nb.data.sources import DATASETS, DataSpec, load_data
from avvp_nb.methods import ogm
from avvp_nb.methods.zoo import METHODS
from avvp_nb.records.spec import RunSpec, run_key
from avvp_nb.records.store import Store, check_whole
from avvp_nb.records.weights import load_weights
from avvp_nb.results import plans
from avvp_nb.results.accuracies import accuracy_table
from avvp_nb.results.imbalance import (
    STUDIES,
    WEAKNESS,
    effects,
    findings_of,
    plot_study,
    recorded_runs,
    shown_of,
    study_specs,
    study_table,
)
from avvp_nb.runs.measure import announce
from avvp_nb.runs.single import run
from avvp_nb.runs.stacked import run_many
from avvp_nb.tasks import TASKS, task_of

OF = {"cremad": "late_fusion", "ave": "psp"}
SMALL = {"cremad": {"side": 12, "rows": 12, "columns": 10}, "ave": {"side": 2}}
OPTIONS = {"late_fusion": {"encoder": "small"}, "psp": {"dim": 16, "hidden": 8}, "ave_localiser": {"dim": 16, "hidden": 8}}


@pytest.fixture
def small(monkeypatch):
    "A scale of its own name: a few clips, two epochs"
    monkeypatch.setitem(sources.SCALES, "few", sources.Scale(48, 12, 24, 2, 2, "last", 16))
    return "few"


def spec(dataset, seed=1, method=None, **options):
    method = method or OF[dataset]
    protocol = options.pop("protocol", None)
    return RunSpec(method, {**OPTIONS[method], **options}, protocol=protocol, data=DataSpec(dataset=dataset, settings=SMALL[dataset]),
                   scale="few", seed=seed)


# ---- what a spec accepts

@pytest.mark.parametrize("make, says", [
    (lambda: RunSpec("han", data=DataSpec(dataset="ave")), "expected the data set llp or unav100"),
    (lambda: RunSpec("psp"), "expected the data set ave"),
    (lambda: RunSpec("late_fusion", data=DataSpec(dataset="ave")), "expected the data set cremad"),
    (lambda: RunSpec("psp", data=DataSpec(dataset="ave"), rule="han"), "rule: 'han' is not possible"),
    (lambda: RunSpec("psp", data=DataSpec(dataset="ave"), select="segment/AV"), "select: 'segment/AV' is not possible"),
    (lambda: RunSpec("han", rule="highest"), "rule: 'highest' is not possible"),
    (lambda: RunSpec("psp", {"modulation": "ogmge"}, data=DataSpec(dataset="ave")), "modulation: 'ogmge'"),
    (lambda: RunSpec("psp", {"measured": "lstms"}, data=DataSpec(dataset="ave")), "measured: 'lstms'"),
    (lambda: RunSpec("late_fusion", {"fusion": "film", "modulation": "ogm"}, data=DataSpec(dataset="cremad")), "needs the share of each modality"),
    (lambda: RunSpec("late_fusion", {"alpha": -1.}, data=DataSpec(dataset="cremad")), None),
    (lambda: DataSpec(dataset="cremad", settings={"loudness": 1}), "cremad.loudness: CREMA-D has no such setting"),
    (lambda: DataSpec(dataset="llp", settings={"side": 3}), "llp.side: LLP has no such setting"),
    (lambda: DataSpec(dataset="cremad", settings={"side": "wide"}), "cremad.side: 'wide' is no int"),
    (lambda: DataSpec(dataset="cremad", settings={"side": 3.5}), "cremad.side"),
])
def test_impossible_specs_are_refused_by_name(make, says):
    if says is None: make(); return             # without modulation the strength is not looked at
    with pytest.raises(InputError, match=says): make()


def test_settings_are_part_of_what_a_run_is():
    plain, other = (DataSpec(dataset="ave", settings=s) for s in ({}, {"target": "onehot"}))
    assert hash(plain) != hash(other) and DataSpec(dataset="ave", settings={"target": "fraction"}) == plain
    keys = {run_key(RunSpec("psp", data=d), DATASETS["ave"].identify(d, None)[0]) for d in (plain, other)}
    assert len(keys) == 2


@pytest.mark.parametrize("scale, want", [("full", {"lr": 1e-3, "epochs": 100, "batch_size": 64, "optimizer": "sgd", "step": 70}),
                                         ("tiny", {"lr": 2e-2, "epochs": 10, "batch_size": 32, "select": "video/accuracy"})])
def test_recipes_of_late_fusion_by_scale(scale, want):
    r = RunSpec("late_fusion", data=DataSpec(dataset="cremad"), scale=scale).recipe()
    assert {k: r[k] for k in want} == want


def test_recipes_of_psp_by_supervision():
    weak, full = (RunSpec("psp", protocol=p, data=DataSpec(dataset="ave"), scale="full").recipe() for p in ("weak", "full"))
    assert (weak["step"], full["step"], weak["drops"], weak["epochs"]) == (80, 60, 2, 300)


# ---- runs

@pytest.mark.parametrize("dataset, options", [
    ("cremad", {}), ("cremad", {"modulation": "ogm", "fusion": "sum"}), ("cremad", {"modulation": "dgm", "target": "both", "measure": "score"}),
    ("cremad", {"fusion": "gated", "augment": True}), ("ave", {}), ("ave", {"modulation": "ogm_ge", "protocol": "full"}),
    ("ave", {"modulation": "dgm", "measured": "msdu", "apply": "update"}), ("ave", {"method": "ave_localiser", "protocol": "full"}),
    ("ave", {"method": "ave_localiser"}), ("ave", {"protocol": "released_weak"}), ("ave", {"protocol": "released_full"})])
def test_a_run_is_recorded_scored_and_never_made_twice(dataset, options, small, tmp_path):
    method = options.pop("method", None)
    s = spec(dataset, method=method, **options)
    record = run(s, tmp_path, "cpu", "off")
    assert record["task"] == METHODS[s.method].task and list(record["metrics"]) == ["highest"] == [record["rule"]]
    level, head = TASKS[record["task"]].headline.split("/")
    assert 0 <= record["metrics"]["highest"][level][head] <= 100 and "only" not in record
    assert check_whole(record, "here") == record and run(s, tmp_path, "cpu", "off") == record
    store, test = Store(tmp_path), load_data(s.data, "few", tmp_path / "cache")["test"]
    p = store.probabilities(record)
    assert type(p) is TASKS[record["task"]].result and store.names(record)[0] == list(test.ids)
    again = task_of(test).score(TASKS[record["task"]].rules["highest"], [p], test)
    assert again.loc[level].to_dict() == pytest.approx(record["metrics"]["highest"][level])
    model, header = load_weights(store.weight_path(record["key"]))
    assert header["classes"] == list(test.classes) and ("shapes" in header["sizes"]) == (dataset == "cremad")
    with torch.no_grad(): assert isinstance(model.eval()(*test.batch([0, 1]).features), type(p))


@pytest.mark.parametrize("dataset, more", [("cremad", {}), ("ave", {}), ("ave", {"protocol": "released_full"})])
def test_a_killed_run_continues_bit_for_bit(dataset, more, small, tmp_path, monkeypatch):
    s = spec(dataset, modulation="dgm", **more)
    whole = run(s, tmp_path / "whole", "cpu", "off")
    from avvp_nb.train.callbacks import CheckpointCB
    save = CheckpointCB.after_epoch

    def stop(self, learner):
        save(self, learner)
        if learner.epoch == 1: raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(CheckpointCB, "after_epoch", stop)
        with pytest.raises(KeyboardInterrupt): run(s, tmp_path / "cut", "cpu", "off")
    cut = run(s, tmp_path / "cut", "cpu", "off")
    def plain(r): return [{k: v for k, v in h.items() if k != "seconds"} for h in r["history"]]
    assert plain(cut) == plain(whole) and cut["metrics"] == whole["metrics"]


def test_runs_that_cannot_be_stacked_are_made_one_by_one(small, tmp_path, capsys):
    records = run_many([spec("cremad", seed) for seed in (1, 2)], tmp_path, "cpu", "off", stack=2)
    assert [r["seed"] for r in records] == [1, 2] and records[0]["metrics"] != records[1]["metrics"]


def test_clips_of_background_serve_weak_supervision_only(small, tmp_path):
    data = load_data(DataSpec(dataset="ave", settings=SMALL["ave"]), "few", tmp_path)
    train = data["train"]
    assert (train.rows < 0).sum() == 3 and (data["test"].rows >= 0).all()        # 178 of 3,339, for 48
    full = METHODS["psp"].prepare({"protocol": "full"}, None, train)
    assert len(full) == 48 and full.labels["seconds"].sum(-1).max() == 1
    np.testing.assert_allclose(train.weak.sum(1), 1)


def test_more_clips_than_there_are_give_all_of_them(monkeypatch, tmp_path):
    monkeypatch.setitem(sources.SCALES, "many", sources.Scale(60, 500, 500))
    data = load_data(DataSpec(dataset="cremad", settings=SMALL["cremad"]), "many", tmp_path)
    assert [len(data[k]) for k in ("train", "val", "test")] == [60, 500, 500]
    monkeypatch.setitem(sources.SCALES, "more", sources.Scale(60, 5000, 50))
    assert len(load_data(DataSpec(dataset="ave", settings=SMALL["ave"]), "more", tmp_path)["val"]) == 402


# ---- scores by hand

def test_ties_go_to_the_smaller_class_and_nan_is_refused():
    rule = TASKS["classification"].rules["highest"]
    assert rule.decide([[.5, .5], [0, 1]]).tolist() == [0, 1]
    with pytest.raises(InputError, match="hold NaN"): rule.decide([[np.nan, 1]])


def test_a_network_must_return_what_the_task_asks(small, tmp_path):
    from avvp_nb.train.learner import check_model
    clips = load_data(DataSpec(dataset="ave", settings=SMALL["ave"]), "few", tmp_path)["test"]

    class Plain(torch.nn.Module):
        def forward(self, audio, frames, motion):
            B, T = audio.shape[:2]
            x = torch.zeros(B, 29)
            return Parsing(x, x, x, torch.zeros(B, T, 2, 29))

    class Short(Plain):
        def forward(self, *x):
            p = super().forward(*x)
            return Located(**p.arrays(), joint=torch.zeros(len(p), 3, 29))
    for net in (Plain(), Short()):
        with pytest.raises(InputError, match="expected a Located of video.*joint \\(B,T,C\\) = \\(2, 10, 29\\)"): check_model(net, clips)


# ---- tables, claims, commands

@pytest.mark.parametrize("table, dataset", [("II", "cremad"), ("III", "ave")])
def test_the_printed_tables(table, dataset, small, tmp_path):
    plan = plans.plan("dgm", table, "few", (1, 2), DataSpec(dataset=dataset, settings=SMALL[dataset]))
    assert len(plan.rows) == 2 and all(r.specs for r in plan.rows)
    records = run_many([replace(s, options={**OPTIONS[s.method], **s.options}) for s in plan.specs], tmp_path, "cpu", "off")
    found = {r.label: records[2 * i:2 * i + 2] for i, r in enumerate(plan.rows)}
    t = accuracy_table(found, {r.label: plan.printed(r) for r in plan.rows})
    assert [r.kind for r in t.rows] == ["ours", "printed"] * 2 + ["floor"] * 2
    level = TASKS[records[0]["task"]].headline.split("/")[0]
    printed = [r.mean[level, "accuracy"] for r in t.rows if r.kind == "printed"]
    assert printed == {"II": [61.1, 61.8], "III": [75.57, 76.14]}[table]
    for text in (t.to_markdown(), t.to_html(), t.to_csv()): assert "simulated" in text


@pytest.fixture
def shell(capsys):
    def call(*argv):
        try: status = cli.main([str(a) for a in argv])
        except SystemExit as e: status = e.code
        return status, *capsys.readouterr()
    return call


def test_the_command_finds_the_data_set_of_a_method(small, tmp_path, shell):
    status, out, err = shell("run", "late_fusion", "--set", "encoder=small", "modulation=ogm", "--scale", "few", "--out", tmp_path, "--device", "cpu",
                             *[x for k, v in SMALL["cremad"].items() for x in ("--data-option", f"cremad.{k}={v}")])
    assert status == 0 and "best constant answer" in out, err
    record = Store(tmp_path).records()[0]
    assert record["data"]["identity"]["params"]["side"] == 12


@pytest.mark.parametrize("argv, says", [
    (["run", "late_fusion", "--dataset", "llp"], "late_fusion: says which one class a clip has"),
    (["run", "han", "--ave-features", "x"], "--ave-features: has no effect with --dataset llp"),
    (["run", "psp", "--features", "x"], "--features: has no effect with --dataset ave. leave it out; use --ave-features"),
    (["run", "psp", "--rule", "han"], "rule: 'han' is not possible"),
    (["run", "psp", "--data-option", "ave.sides=3"], "ave.sides: AVE has no such setting"),
    (["run", "psp", "--data-option", "side=3"], "--data-option: 'side=3' has another form"),
    (["run", "psp", "--ave-features", "/nowhere"], "/nowhere: "),
    (["run", "late_fusion", "--cremad-features", "/nowhere"], "/nowhere: no folder AudioWAV"),
    (["run", "late_fusion", "--data-option", "cremad.split=official", "--select", "video/accuracy"], "select: there are no validation clips to select with. use select='last'"),
    (["run", "late_fusion", "--data-option", "cremad.split=released"], "split: 'released' is not possible"),
    (["doctor", "/nowhere", "--dataset", "ave"], "/nowhere"), (["doctor", "/nowhere", "--dataset", "cremad"], "no folder AudioWAV"),
    (["doctor", "x", "--dataset", "cremad", "--annotations", "y"], "--annotations: has no meaning for cremad"),
    (["pack", "x", "y", "--dataset", "cremad", "--frames", "full"], "--frames: 'full' has no meaning for CREMA-D"),
    (["pack", "x", "y", "--dataset", "ave", "--on-missing", "drop"], "--on-missing: 'drop' has no meaning for AVE"),
    (["simulate", "x", "--dataset", "ave", "--videos", "3", "0", "2"], "--videos"),
    (["simulate", "x", "--dataset", "ave", "--videos", "3", "2", "2"], "clips have"),
])
def test_one_line_says_what_is_wrong(argv, says, shell, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = shell(*argv)
    assert status == 2 and says in err and "Traceback" not in err, err
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix in (".json", ".npz", ".safetensors")]


def test_cremad_on_files_doctor_pack_and_run(shell, tmp_path, monkeypatch):
    pytest.importorskip("PIL.Image", reason="Pillow is not installed: pip install pillow")
    monkeypatch.setitem(sources.SCALES, "few", sources.Scale(6, 2, 3, 1, 1, "last", 4))
    root = tmp_path / "cremad"
    assert shell("simulate", root, "--dataset", "cremad", "--videos", 6, 2, 3)[0] == 0
    status, out, err = shell("doctor", root, "--dataset", "cremad", "--quick")
    assert status == 1 and "11 of 7442 clips usable" in out
    assert re.search(r"released split: actors of test who are in train +91\n", out)
    status, _, err = shell("run", "late_fusion", "--set", "encoder=small", "augment=True", "--cremad-features", root, "--scale", "few", "--out",
                           tmp_path / "runs", "--device", "cpu")
    assert status == 0, err
    record = Store(tmp_path / "runs").records()[0]
    assert record["data"]["mark"].startswith("simulated CREMA-D") and record["data"]["n"] == {"train": 6, "val": 2, "test": 3}
    status, _, err = shell("pack", root, tmp_path / "pack", "--dataset", "cremad", "--on-missing", "drop")
    assert status == 0, err
    status, _, err = shell("run", "late_fusion", "--set", "encoder=small", "--cremad-features", tmp_path / "pack", "--scale", "few", "--out",
                           tmp_path / "runs", "--device", "cpu")
    assert status == 0, err
    assert {r["data"]["mark"] for r in Store(tmp_path / "runs").records()} == {record["data"]["mark"]}


def test_training_cuts_the_frames_on_disk_from_files_and_from_a_pack(shell, tmp_path, monkeypatch):
    "The same cuts, so the same numbers; and other ones than without the frames"
    pytest.importorskip("PIL.Image", reason="Pillow is not installed: pip install pillow")
    monkeypatch.setitem(sources.SCALES, "few", sources.Scale(6, 2, 3, 2, 2, "last", 4))
    root = write_cremad(tmp_path / "cremad", [s for k, n in (("train", 6), ("val", 2), ("test", 3)) for s in cremad_split("validated")[k][:n]])
    pack_cremad(root, tmp_path / "pack", on_missing="drop")
    found = {}
    for k, folder in (("files", root), ("pack", tmp_path / "pack")):
        for augment in (False, True):
            s = RunSpec("late_fusion", {"encoder": "small", "augment": augment}, data=DataSpec(features=str(folder), dataset="cremad"), scale="few")
            found[k, augment] = [h["loss"] for h in run(s, tmp_path / "runs", "cpu", "off")["history"]]
    assert found["files", True] == found["pack", True] and found["files", False] == found["pack", False]
    assert found["files", True] != found["files", False]
    data = load_data(DataSpec(features=str(root), dataset="cremad"), "few", tmp_path / "runs/cache")
    seen = []
    monkeypatch.setattr(ogm, "cut_frames", lambda whole, names, rng, side: seen.append(list(names)) or cut_frames(whole, names, rng, side))
    again = run(s, tmp_path / "again", "cpu", "off")
    assert sorted(n for names in seen for n in names) == sorted(data["train"].ids * 2)              # each clip once an epoch
    assert [h["loss"] for h in again["history"]] == found["pack", True]


@pytest.mark.parametrize("split, kept", [("official", 2), ("on_test", None)])
def test_the_released_split_trains_on_all_and_says_how_the_epoch_was_chosen(split, kept, small, tmp_path):
    data = DataSpec(dataset="cremad", settings={**SMALL["cremad"], "split": split})
    s = RunSpec("late_fusion", OPTIONS["late_fusion"], data=data, scale="few", select=None if kept else "video/accuracy")
    assert s.recipe()["select"] == ("last" if kept else "video/accuracy")
    clips, record = load_data(data, "few", tmp_path / "cache"), run(s, tmp_path, "cpu", "off")
    assert [i for k in ("train", "test") for i in clips[k].ids] == official_split()["train"][:48] + official_split()["test"][:24]
    assert record["data"]["n"] == {"train": 48, "val": 0 if kept else 12, "test": 24} and record["data"]["identity"]["split"] == split
    assert record["data"]["source"]["selection"] == SELECTION[split] and check_whole(record, "here") == record
    assert record["selection"]["metric"] == s.recipe()["select"] and record["selection"]["epoch"] == (kept or max(
        (h["val"]["video/accuracy"], h["epoch"]) for h in record["history"])[1])
    if kept: assert all(h["val"] == {} for h in record["history"])
    else: assert clips["val"].ids == clips["test"].ids[:12]
    plain = run(spec("cremad"), tmp_path, "cpu", "off")
    assert "selection" not in plain["data"]["source"]


def test_ave_on_files_doctor_pack_and_run(shell, tmp_path, monkeypatch):
    pytest.importorskip("h5py", reason="h5py is not installed: pip install h5py")
    monkeypatch.setitem(sources.SCALES, "few", sources.Scale(28, 2, 3, 1, 1, "last", 8))
    root, runs = tmp_path / "ave", tmp_path / "runs"
    assert shell("simulate", root, "--dataset", "ave", "--videos", 28, 2, 3)[0] == 0
    status, out, err = shell("doctor", root, "--dataset", "ave")
    assert status == 0 and "0 serious" in out, err
    args = ["run", "psp", "--set", "dim=16", "hidden=8", "--scale", "few", "--out", runs, "--device", "cpu"]
    assert shell(*args, "--ave-features", root)[0] == 0
    assert shell("pack", root, tmp_path / "pack", "--dataset", "ave")[0] == 0
    assert shell(*args, "--ave-features", tmp_path / "pack")[0] == 0
    records = list(Store(runs).records())
    assert all(r["data"]["mark"].startswith("simulated AVE") for r in records)
    assert isinstance(load_data(DataSpec(features=str(tmp_path / "pack"), dataset="ave"), "few", runs / "cache")["train"].frames, Lazy)
    x = bytearray((root / "visual_feature.h5").read_bytes())
    (root / "visual_feature.h5").write_bytes(x[:len(x) // 2])
    status, out, err = shell("doctor", root, "--dataset", "ave")
    assert status == 1 and "visual_feature.h5" in out


def test_events_of_another_task_are_refused(small, tmp_path, shell):
    record = run(spec("cremad"), tmp_path, "cpu", "off")
    status, _, err = shell("events", Store(tmp_path).record_path(record["key"]))
    assert status == 2 and "says which one class a clip has, and has no audio and visual events" in err


def test_the_time_of_other_tasks_can_be_announced(small, tmp_path):
    assert "Training 1 run will take about" in announce([spec("ave")], tmp_path, "cpu")


# ---- the imbalance study

def test_every_system_and_level_of_the_study_is_possible():
    for d, study in STUDIES.items():
        assert tuple(study.levels) == WEAKNESS and len(WEAKNESS) == 3 and next(iter(study.systems)) == "plain"
        keys = [s.plain() for level in study.levels for part in study_specs(d, level, seeds=(1,)).values() for s in part]
        assert len({json.dumps(k, sort_keys=True) for k in keys}) == len(study.systems)      # levels differ in data alone


def test_effects_are_differences_of_equal_seeds(small, tmp_path):
    specs = {k: [replace(s, scale="few", data=DataSpec(dataset="cremad", settings=SMALL["cremad"]), options={**s.options, "encoder": "small"})
                 for s in part] for k, part in study_specs("cremad", "balanced", seeds=(1, 2), systems=("plain", "OGM")).items()}
    found = {k: run_many(part, tmp_path, "cpu", "off") for k, part in specs.items()}
    e = effects("cremad", found)["OGM"]
    by = {k: {r["seed"]: r["metrics"]["highest"]["video"] for r in rs} for k, rs in found.items()}
    assert e.gain.mean == pytest.approx(np.mean([by["OGM"][s]["accuracy"] - by["plain"][s]["accuracy"] for s in (1, 2)]))
    assert e.gap == pytest.approx(np.mean([by["OGM"][s]["audio"] - by["OGM"][s]["visual"] for s in (1, 2)]))


def timed(records, seconds): return [{**r, "wall_time": seconds} for r in records]


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_the_cost_of_runs_that_took_no_time_is_unknown(small, tmp_path):
    s = replace(study_specs("cremad", "balanced", seeds=(1,))["plain"][0], scale="few", data=DataSpec(dataset="cremad", settings=SMALL["cremad"]),
                options={"encoder": "small"})
    records = run_many([s, replace(s, seed=2)], tmp_path, "cpu", "off")
    found = {"plain": timed(records, 0.), "OGM": timed(records, 3.)}
    assert [np.isnan(e.cost) for e in effects("cremad", found).values()] == [True, True]
    assert effects("cremad", {**found, "plain": timed(records, 2.)})["OGM"].cost == 1.5
    text = study_table("cremad", "balanced", found).to_markdown()
    assert "nan" not in text and "2 seeds" in text


def test_what_has_no_record_is_said_to_be_missing(small, tmp_path):
    "A store with one of the runs of a level: the table, the picture and the sentences are made of that one"
    def few(s): return replace(s, scale="few", data=DataSpec(dataset="cremad", settings=SMALL["cremad"]), options={**s.options, "encoder": "small"})
    specs = {k: [few(s) for s in part] for k, part in study_specs("cremad", "balanced", seeds=(1, 2), systems=("plain", "OGM")).items()}
    every = [s for part in specs.values() for s in part]
    assert recorded_runs(every, tmp_path) == [None] * 4
    run_many([every[0], every[2]], tmp_path, "cpu", "off")
    flat = recorded_runs(every, tmp_path)
    assert [r and r["seed"] for r in flat] == [1, None, 1, None]
    asked = {"cremad": {"balanced": {"plain": flat[:2], "OGM": flat[2:]}, "picture weak": {"plain": [None, None]}}, "llp": {"balanced": {"plain": [None]}}}
    found, said = shown_of(asked)
    assert found == {"cremad": {"balanced": {"plain": flat[:1], "OGM": flat[2:3]}}}
    assert said == ["CREMA-D, balanced: 2 of 4 runs have no record yet.", "CREMA-D, picture weak: no records of plain training yet.",
                    "LLP, balanced: no records of plain training yet."]
    assert "1 seed:" in study_table("cremad", "balanced", found["cremad"]["balanced"]).caption
    assert findings_of(found) == ["CREMA-D (SGD, 1 seeds): undecided, fewer than three seeds."]
    plt.close(plot_study(found))
    assert shown_of({}) == ({}, []) and findings_of({}) == []


# ---- data cards

@pytest.mark.parametrize("card, facts", [("ave", ave_facts), ("cremad", cremad_facts)])
def test_the_cards_hold_what_is_counted(card, facts, request):
    text = (request.config.rootpath / "data_cards" / f"{card}.md").read_text(encoding="utf-8")
    assert with_facts(text, facts()) == text
