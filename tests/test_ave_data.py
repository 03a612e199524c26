"""The annotations, files, packs and simulator of AVE: what is read, what is refused, and the floors of the real labels."""
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

h5py = pytest.importorskip("h5py", reason="h5py is not installed: pip install h5py")

from avvp_nb.core import InputError, asset, read_json, shared  # noqa: E402
from avvp_nb.data import ave, ave_files  # noqa: E402
from avvp_nb.data import ave_simulate as sim  # noqa: E402
from avvp_nb.data.ave import AVE_CLASSES, BACKGROUND  # noqa: E402
from avvp_nb.data.ave_task import located_clips  # noqa: E402
from avvp_nb.data.sim_labels import SimParams  # noqa: E402
from avvp_nb.methods import psp  # noqa: E402
from avvp_nb.methods.localisers import Localiser, LocaliserLoss, prepare  # noqa: E402
from avvp_nb.tasks import second_floors  # noqa: E402
from avvp_nb.train.learner import Learner  # noqa: E402

N = 34


def write_h5(path, x, name="avadataset", **options):
    with h5py.File(path, "w") as f: f.create_dataset(name, data=x, **options)
    return path


def lines(n=N):
    return [f"{AVE_CLASSES[i % 28]}&clip-{i:06d}&good&{i % 4}&{i % 4 + 4}" for i in range(n)]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A small copy in the released layout, and what is in it"
    root, rng = tmp_path_factory.mktemp("ave"), np.random.default_rng(0)
    (root / "Annotations.txt").write_text("\n".join(lines()) + "\n")
    for k, rows in {"train": range(26), "val": range(26, 30), "test": range(30, 34)}.items():
        write_h5(root / f"{k}_order.h5", rng.permutation(rows), "order")
    labels = ave.load_ave_labels(root)
    made = {"audio_feature": rng.normal(size=(N, 10, 128)), "visual_feature": rng.random((N, 10, 7, 7, 512)).astype(np.float32),
            "right_label": labels.labels.astype(np.float64), "mil_labels": ave.clip_targets(labels.table, "onehot"),
            "prob_label": ave.clip_targets(labels.table), "audio_feature_noisy": rng.normal(size=(3, 10, 128)),
            "visual_feature_noisy": rng.random((3, 10, 7, 7, 512)).astype(np.float32),
            "labels_noisy": np.eye(29, dtype=np.float32)[np.full((3, 10), BACKGROUND)]}
    for k, x in made.items(): write_h5(root / f"{k}.h5", x)
    return root, labels, made


@pytest.fixture
def own(copy, tmp_path):
    "The copy, linked, so that a test can exchange files"
    for p in copy[0].iterdir(): (tmp_path / p.name).symlink_to(p)

    def change(name, write):
        (tmp_path / name).unlink()
        write(tmp_path / name)
        return tmp_path
    return change


@pytest.fixture(scope="module")
def real():
    if not shared("ave").is_dir(): pytest.skip("ave/ not found: set AVVP_SHARED to the folder that holds it")
    return ave.load_ave_labels(shared("ave"))


# ---- annotations ----------------------------------------------------------------------------------------------------

def test_the_real_file(real):
    t = real.table
    assert len(real) == 4143 and t.id.nunique() == 4097 and (t.end - t.start).mean() == pytest.approx(8.29, abs=.01)
    assert {k: len(v) for k, v in real.orders.items()} == ave.SIZES
    assert sorted(np.concatenate(list(real.orders.values()))) == list(range(4143))
    summary = json.loads((shared("ave") / "summary.json").read_text())
    for k, v in summary["anchors"].items():
        if k not in real.orders: continue
        got = second_floors(real.labels[real.rows(k)])
        assert got["always background"] == pytest.approx(v["always_background"], abs=1e-3)
        assert got["right class everywhere"] == pytest.approx(v["true_class_every_second"], abs=1e-3)


def test_the_floors_of_the_test_split(real):
    "17.8 and 82.2, as printed beside every accuracy"
    got = second_floors(real.labels[real.rows("test")])
    assert [round(v, 1) for v in got.values()] == [17.8, 82.2]


def test_every_known_defect_with_its_line(real):
    summary = {d["id"]: d for d in json.loads((shared("ave") / "summary.json").read_text())["defects"]}
    d = ave.ave_defects(real)
    assert set(d.file) == {str(shared("ave") / "Annotations.txt")}
    assert d[d.defect == "no event"].line.tolist() == summary["A1"]["lines"]
    repeated = d[d.defect == "repeated id"]
    assert {k: sorted(v) for k, v in repeated.groupby("id").line} == {k: sorted(v) for k, v in summary["A2"]["lines"].items()}
    both = d[d.defect == "shared by splits"]
    for pair in ("test", "val"): assert set(both[both.detail.str.contains(pair)].id) == set(summary["A3"][f"{pair}-train" if pair == "test" else "train-val"])
    assert d[d.defect == "quality"].detail.tolist() == ["'good' on all 4143 lines"]


def test_labels_without_any_h5_file(copy, tmp_path, monkeypatch):
    (tmp_path / "Annotations.txt").write_text("\r\n".join(lines()) + "\r\n")
    monkeypatch.setattr(ave, "h5py_module", lambda where: pytest.fail("h5py was asked for"))
    alone = ave.load_ave_labels(tmp_path / "Annotations.txt", splits=False)
    assert (alone.labels == copy[1].labels).all()
    with pytest.raises(InputError, match="splits are not known"): alone.rows("test")


def test_without_h5py_one_line_names_the_command(copy):
    def gone(name): raise ImportError(name)
    with pytest.raises(InputError, match="order.h5: reading h5 files needs the package h5py.*pip install h5py"):
        ave.h5py_module("order.h5", find=gone)


@pytest.mark.parametrize("text, said", [
    (lines()[:27], "has no clip of 1 classes, such as 'Mandolin'"), ([*lines(), "Bark"], ":35: 1 fields"),
    ([*lines(), "bark&clip-000001&good&0&2"], ":35: unknown class 'bark'.*did you mean 'Bark'"),
    ([*lines(), "Bark&clip&good&0&2"], "'clip' is not a YouTube id"), ([*lines(), "Bark&clip-000001&good&3&2"], "from '3' to '2'"),
    ([*lines(), "Bark&clip-000001&good&-1&2"], "from '-1'"), ([*lines(), "", lines()[0]], ":35: 1 fields"), ([""], ":1: 1 fields")])
def test_annotations_that_are_refused(tmp_path, text, said):
    (tmp_path / "Annotations.txt").write_text("\n".join(text) + "\n")
    with pytest.raises(InputError, match=said): ave.load_ave_labels(tmp_path, splits=False)


def test_a_header_moves_lines_and_not_rows(tmp_path, copy):
    (tmp_path / "Annotations.txt").write_text("\n".join([ave.HEADER, *lines()]))
    t = ave.read_table(tmp_path)
    assert t.line.tolist() == list(range(2, N + 2)) and (ave.second_labels(t) == copy[1].labels).all()


@pytest.mark.parametrize("order, said", [
    (np.arange(3) + N - 2, f"val_order.h5: row {N} out of range"), (np.array([-1]), "row -1 out of range"), (np.array([27, 27]), "row 27 occurs 2 times"),
    (np.array([27.]), "float64 of shape"), (np.arange(5), "is in train and in val"), (np.zeros((2, 2), int), "expected at most 34 row numbers"),
    (np.zeros(0, int), "of shape \\(0,\\)")])
def test_orders_that_are_refused(own, order, said):
    root = own("val_order.h5", lambda p: write_h5(p, order, "order"))
    with pytest.raises(InputError, match=said): ave.load_ave_labels(root)


# ---- files ----------------------------------------------------------------------------------------------------------

def cut(p): p.write_bytes(write_h5(p, np.zeros((N, 10, 128))).read_bytes()[:-100])


@pytest.mark.parametrize("name, write, said", [
    ("audio_feature.h5", cut, "the file is truncated"), ("audio_feature.h5", lambda p: p.write_text("no"), "cannot be read as h5"),
    ("audio_feature.h5", lambda p: write_h5(p, np.zeros((N, 10, 128)), "data"), "holds data. expected an array 'avadataset'"),
    ("audio_feature.h5", lambda p: write_h5(p, np.zeros((N, 8, 128))), "shape \\(34, 8, 128\\)"),
    ("visual_feature.h5", lambda p: write_h5(p, np.zeros((N - 1, 10, 7, 7, 512), np.float16)), "shape \\(33, 10, 7, 7, 512\\)"),
    ("audio_feature.h5", lambda p: p.mkdir(), "no audio_feature.h5"),
    ("right_label.h5", lambda p: write_h5(p, np.full((N, 10, 29), 1 / 29)), "row 0, second 0 is not one-hot"),
    ("right_label.h5", lambda p: write_h5(p, np.eye(29)[np.zeros((N, 10), int)]), "row 0 \\(line 1\\) differs from the annotations"),
    ("mil_labels.h5", lambda p: write_h5(p, np.eye(29)[np.full(N, 28)]), "row 0 is not one-hot.*background never"),
    ("prob_label.h5", lambda p: write_h5(p, np.ones((N, 29))), "is no distribution"),
    ("labels_noisy.h5", lambda p: write_h5(p, np.eye(29)[np.zeros((3, 10), int)]), "expected background only"),
    ("visual_feature_noisy.h5", lambda p: write_h5(p, np.zeros((2, 10, 7, 7, 512))), "not of the same clips")])
def test_files_that_are_refused_and_what_the_doctor_says(own, name, write, said):
    root = own(name, write)
    with pytest.raises(InputError, match=said): ave_files.open_ave(root)
    report = ave_files.ave_doctor(root)
    if "same clips" not in said: assert len(report.serious) == 1
    with pytest.raises(InputError, match=said): ave_files.pack_ave(root, root / "pack")
    assert not (root / "pack").exists() and not list(root.glob(".pack*"))


def test_a_healthy_copy(copy):
    report = ave_files.ave_doctor(copy[0], full=True)
    assert not len(report.serious) and report.target == "fraction"
    assert repr(ave_files.open_ave(copy[0])) == "AVEFiles(34 clips, 3 of background)"


def test_the_doctor_reads_every_number_on_request(own, copy):
    x = copy[2]["visual_feature"].copy()
    x[20, 3, 1, 1, 7] = np.inf
    root = own("visual_feature.h5", lambda p: write_h5(p, x))
    assert not len(ave_files.ave_doctor(root).serious)
    assert ave_files.ave_doctor(root, full=True).serious.defect.tolist() == ["row 20 is not finite"]


def test_features_are_never_read_as_a_whole(copy, monkeypatch, tmp_path):
    most, read = [], ave_files.H5Array.read

    def noted(self, rows):
        most.append(len(rows))
        return read(self, rows)
    monkeypatch.setattr(ave_files.H5Array, "read", noted)
    monkeypatch.setattr(ave_files, "CHUNK", 8)
    files = ave_files.open_ave(copy[0])
    most.clear()                                                          # label files are small, and read whole
    ave_files.ave_clips(files, "train", background=True).batch([1, 2])
    assert most == [2, 2]
    ave_files.pack_ave(copy[0], tmp_path / "pack")
    labels = [N, N, N, 3]
    assert max(n for n in most if n not in labels) <= 8


@pytest.mark.parametrize("options", [{}, {"chunks": (1, 10, 128), "compression": "gzip"}])
def test_rows_in_any_order(tmp_path, options):
    x = np.random.default_rng(0).normal(size=(20, 10, 128))
    a = ave_files.H5Array(write_h5(tmp_path / "a.h5", x, **options), (10, 128))
    for rows in ([3], [19, 0, 7], [5, 5, 4], list(range(4, 9)), []):
        np.testing.assert_array_equal(a.read(rows), x[rows].astype(np.float32).reshape(-1, 10, 128))
    again = pickle.loads(pickle.dumps(a))                                 # for other processes
    np.testing.assert_array_equal(again.read([2]), a.read([2]))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_pack_holds_the_same_and_needs_no_h5py(copy, tmp_path, dtype, monkeypatch):
    files = ave_files.open_ave(copy[0])
    ave_files.pack_ave(copy[0], tmp_path / "pack", dtype=dtype)
    asked = [("train", dict(background=True)), ("val", dict(target="released")), ("test", dict(target="onehot"))]
    before = [ave_files.ave_clips(files, split, **kw) for split, kw in asked]
    seen = [clips.batch([0, 3]) for clips in before]
    monkeypatch.setattr(ave, "h5py_module", lambda where: pytest.fail("h5py was asked for"))
    packed = ave_files.open_ave(tmp_path / "pack")
    for (split, kw), a, x in zip(asked, before, seen):
        b = ave_files.ave_clips(packed, split, **kw)
        assert a.ids == b.ids and len(a) == {"train": 29, "val": 4, "test": 4}[split]
        np.testing.assert_array_equal(a.weak, b.weak)
        for k, v in x._asdict().items(): torch.testing.assert_close(getattr(b.batch([0, 3]), k), v, rtol=2e-3, atol=2e-3)
    assert packed.labels.fingerprint == files.labels.fingerprint


@pytest.mark.parametrize("change, said", [
    (lambda m: m.pop("orders"), "is incomplete"), (lambda m: m["table"].update(label=[30] * N), "impossible annotations"),
    (lambda m: m["orders"].update(val=[0]), "is in train and in val"), (lambda m: m.update(kind="x"), "is no pack of AVE"),
    (lambda m: m["arrays"]["audio"].update(shape=[1, 2]), "as in the manifest"), (lambda m: m.update(table={"label": [1]}), "is incomplete")])
def test_damaged_packs_are_refused(copy, tmp_path, change, said):
    out = tmp_path / "pack"
    ave_files.pack_ave(copy[0], out)
    m = json.loads((out / "manifest.json").read_text())
    change(m)
    (out / "manifest.json").write_text(json.dumps(m))
    with pytest.raises(InputError, match=said): ave_files.open_ave(out)


def test_clips_are_what_a_network_is_called_with(copy):
    root, labels, made = copy
    clips = ave_files.ave_clips(ave_files.open_ave(root), "test")
    b = clips.batch(np.array([2, 0]))
    rows = labels.rows("test")[[2, 0]]
    np.testing.assert_array_equal(b.features[1], made["visual_feature"][rows])
    np.testing.assert_array_equal(b.labels, labels.labels[rows])
    assert b.index.tolist() == [2, 0] and b.weak.dtype == torch.float32 and clips.mark == ""
    part = clips[1:3]
    assert part.ids == clips.ids[1:3] and part.source["fingerprint"] != clips.source["fingerprint"]
    with pytest.raises(InputError, match="did you mean 'fraction'"): ave_files.ave_clips(ave_files.open_ave(root), "test", "fractions")


# ---- simulated ------------------------------------------------------------------------------------------------------

def test_the_shipped_counts_are_those_of_the_real_file(real):
    assert sim.build_counts(real) == read_json(asset("ave_counts.json"))
    text = asset("ave_counts.json").read_text()
    assert not any(i in text for i in real.table.id[:200])                # counts, and no clip


def test_simulated_labels_have_the_real_floors(real):
    labels = sim.simulate_ave_labels(3)
    for k in ave.SIZES:
        assert second_floors(labels.labels[labels.rows(k)]) == second_floors(real.labels[real.rows(k)])
        a, b = (np.bincount(x.table.label.to_numpy()[x.rows(k)], minlength=28) for x in (labels, real))
        assert (a == b).all()
    assert [round(v, 1) for v in second_floors(labels.labels[labels.rows("test")]).values()] == [17.8, 82.2]


def test_floors_without_the_real_file():
    labels = sim.simulate_ave_labels()
    assert [round(v, 1) for v in second_floors(labels.labels[labels.rows("test")]).values()] == [17.8, 82.2]
    assert not len(ave.ave_defects(labels).query("defect == 'repeated id'"))


def test_a_clip_depends_on_its_number_alone():
    files = sim.simulate_ave(seed=2, side=3)
    clips = ave_files.ave_clips(files, "val")
    b, one = clips.batch([3, 1]), clips[1:2].batch([0])
    torch.testing.assert_close(b.audio[1:], one.audio, rtol=0, atol=0)
    torch.testing.assert_close(b.regions[1:], one.regions, rtol=0, atol=0)
    other = ave_files.ave_clips(sim.simulate_ave(seed=3, side=3), "val").batch([1])
    assert not torch.equal(other.audio, one.audio)


def test_an_event_is_in_some_places_and_seconds_only():
    on = (np.arange(10) >= 3) & (np.arange(10) < 7)
    params = SimParams(boundary_blur=0.)
    clip, none = (sim.simulated_clip(params, "test", 4, 9, a) for a in (on, np.zeros(10, bool)))
    box = sim.draw_clip(params, "test", 4, 7).box
    assert 4 <= box.sum() <= 16
    differ = (clip["regions"] != none["regions"]).any(-1)
    assert (differ == on[:, None, None] & box).all()
    assert ((clip["audio"] != none["audio"]).any(-1) == on).all()


def test_sound_and_picture_share_strength_and_style():
    "Where an event sounds stronger it looks stronger, and clips of a class differ alike in both"
    params, on = SimParams(background=0., jitter_audio=0., jitter_visual=0., context_leak=0., boundary_blur=0.), np.ones(10, bool)
    world, heard, seen = sim.ave_world(params), [], []
    for i in range(60):
        d = sim.draw_clip(params, "train", i, 3)
        a, v = (sim._event(params, world, m, 4, d, on) for m in ("audio", "visual"))
        np.testing.assert_allclose(np.linalg.norm(a, axis=1) / np.linalg.norm(a[0]), np.linalg.norm(v, axis=1) / np.linalg.norm(v[0]), rtol=1e-4)
        heard.append(a[0] / d.strength[0])
        seen.append(v[0] / d.strength[0])
    def distances(x): return np.linalg.norm(np.array(x)[:, None] - np.array(x), axis=-1)[np.triu_indices(60, 1)]
    assert np.corrcoef(distances(heard), distances(seen))[0, 1] > .6


@pytest.mark.parametrize("kw, said", [
    (dict(side=1), "side"), (dict(background=-1), "background"), (dict(seed=-1), "seed"), (dict(params=SimParams(missing_labels=2.)), "missing_labels: has no meaning for AVE")])
def test_impossible_simulations_are_refused(kw, said):
    with pytest.raises(InputError, match=said): sim.simulate_ave(**kw)


def test_simulation_leaves_the_callers_world_alone():
    torch.manual_seed(1)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    np_state = np.random.get_state()[1].copy()
    ave_files.ave_clips(sim.simulate_ave(side=2), "test", n=1).batch([0])
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
    assert (np.random.get_state()[1] == np_state).all()


def test_marks_say_simulated():
    a, b = sim.simulate_ave(seed=1), sim.simulate_ave(seed=1, side=3)
    assert a.source["mark"].startswith("simulated AVE ") and a.source["mark"] != b.source["mark"]
    clips = [ave_files.ave_clips(x, "train", n=2, **kw) for x in (a, b) for kw in ({}, {"target": "onehot"}, {"background": True})]
    assert len({c.source["fingerprint"] for c in clips}) == 6 and all("simulated" in c.mark for c in clips)


@pytest.mark.parametrize("weak", [True, False])
def test_psp_learns_on_it_through_the_one_loop(weak):
    torch.manual_seed(0)
    files = sim.simulate_ave(params=SimParams(audio_snr=20., visual_snr=20.), side=2, background=8)
    clips = sim.kept(ave_files.ave_clips(files, "train", background=weak, n=120))
    net = Localiser(psp.PSP(weak=weak, places=4, dim=32, hidden=32))
    train = prepare({"protocol": "weak" if weak else "full"}, None, located_clips(clips))
    learner = Learner(net, train, LocaliserLoss(True, weak), lr=3e-3, batch_size=32, epochs=10, device="cpu")
    losses = [sum(h["loss"].values()) for h in learner.fit().history]
    assert losses[-1] < .7 * losses[0] and set(learner.history[0]["loss"]) == ({"video"} if weak else {"seconds", "pairs"})


# ---- memory

BIG = """
import resource, sys
from avvp_nb.data.ave_files import pack_ave
pack_ave(sys.argv[1], sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_packing_two_gigabytes_stays_below_one_of_memory(tmp_path):
    n, root = 2048, tmp_path / "ave"
    root.mkdir()
    (root / "Annotations.txt").write_text("\n".join(lines(n)) + "\n")
    for k, rows in {"train": range(2000), "val": range(2000, 2024), "test": range(2024, n)}.items(): write_h5(root / f"{k}_order.h5", np.array(rows), "order")
    write_h5(root / "audio_feature.h5", np.zeros((n, 10, 128), np.float32))
    one = np.random.default_rng(0).random((64, 10, 7, 7, 512), dtype=np.float32)
    with h5py.File(root / "visual_feature.h5", "w") as f:
        x = f.create_dataset("avadataset", (n, 10, 7, 7, 512), "float32")
        for i in range(0, n, 64): x[i:i + 64] = one
    assert (root / "visual_feature.h5").stat().st_size > 2 * 1000**3
    done = subprocess.run([sys.executable, "-c", BIG, str(root), str(tmp_path / "pack")], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 1024**2            # kilobytes
    packed = ave_files.open_ave(tmp_path / "pack")
    np.testing.assert_array_equal(packed.regions[100], one[36].astype(np.float16))
