"""VALOR+ and VALOR++: sizes, recipe and entries; CLIP and CLAP features, simulated and in VALOR's layout; and that nothing else changes."""
import hashlib
import math
from dataclasses import replace

import micro
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from avvp_nb.core import InputError, read_json, write_json
from avvp_nb.data import clip_clap as cc
from avvp_nb.data import packed as store_files
from avvp_nb.data.annotations import load_annotations
from avvp_nb.data.features import write_layout
from avvp_nb.data.packed import open_store, pack
from avvp_nb.data.pseudo import label_clips, write_pseudo_layout
from avvp_nb.data.sim_files import write_labels
from avvp_nb.data.sim_labels import SimParams, simulate_labels, stream
from avvp_nb.data.simulate import simulate
from avvp_nb.data.sources import DataSpec, identify, llp_clips, load_data
from avvp_nb.methods import valor_plus
from avvp_nb.methods.method import METHODS
from avvp_nb.methods.valor import LOSS, PLUS, VALOR, ValorCB
from avvp_nb.methods.valor import RECIPE as VALOR_RECIPE
from avvp_nb.records.spec import RunSpec, run_key
from avvp_nb.runs.single import run
from avvp_nb.train.learner import Learner

BOTH = ["valor_plus", "valor_plus_plus"]


# ---- the network and its entries

def test_sizes():
    "Four layers of 256 with 8 heads and 1024 between, by hand"
    model, loss, (cb,) = METHODS["valor_plus"].build({}, dict(classes=25, audio_dim=128, frame_dim=2048, motion_dim=512))
    layer = 2 * (4 * 256**2 + 4 * 256) + 2 * 256 * 1024 + 1024 + 256 + 4 * 256
    project = 256 * (128 + 2048 + 512 + 512) + 4 * 256
    assert sum(p.numel() for p in model.parameters()) == 4 * layer + project + 3 * 25 * 257
    assert [(x.heads, x.ffn1.out_features) for x in model.layers] == [(8, 1024)] * 4
    assert list(LOSS.base.__dict__) == list(loss.__dict__) and isinstance(cb, ValorCB)


def test_recipe_is_valors_with_another_rate():
    assert valor_plus.RECIPE == {**VALOR_RECIPE, "lr": 3e-4} and PLUS == dict(dim=256, n_layers=4)
    for name in BOTH:
        r = RunSpec(name, labels="clip+clap", scale="full").recipe()
        assert (r["lr"], r["batch_size"], r["epochs"], r["select"]) == (3e-4, 64, 60, "segment/Type@AV")


def test_entries():
    a, b, valor = (METHODS[k] for k in (*BOTH, "valor"))
    assert (a.frames, b.frames, valor.frames) == ("pooled", "clip+clap", "pooled")
    assert a.rows == b.rows == {} and a.rule == b.rule == valor.rule == "han" and a.builds_on == ("valor",)
    assert valor.options == {} and RunSpec("valor", labels="clip+clap").plain()["options"] == {}      # its address is what it was


@pytest.mark.parametrize("name", BOTH)
def test_no_training_without_pseudo_labels(name):
    with pytest.raises(InputError, match="VALOR learns from pseudo-labels"): RunSpec(name)
    with pytest.raises(InputError, match="has no such option"): RunSpec(name, {"plus": True}, labels="clip+clap")


@pytest.mark.parametrize("wide", [8, 768])
def test_it_learns(wide):
    clips = micro.toy_clips(60)
    if wide == 768: clips = replace(clips, audio=np.tile(clips.audio, 96), frames=np.tile(clips.frames, 96))
    clips = label_clips(clips)
    torch.manual_seed(0)
    net = VALOR(classes=3, audio_dim=wide, frame_dim=wide, motion_dim=8, dim=16, n_layers=4, heads=4, hidden=24)
    learner = Learner(net, clips, LOSS, epochs=5, lr=5e-3, batch_size=16, device="cpu", callbacks=[ValorCB()]).fit()
    assert sum(learner.history[-1]["loss"].values()) < .9 * sum(learner.history[0]["loss"].values())


# ---- from 32 steps to seconds

@pytest.mark.parametrize("seconds", [1, 7, 10, 20])
def test_seconds_before_or_after_the_projection(seconds):
    "VALOR++ projects 2 x 1024 columns and averages them; one matrix before the projection gives the same"
    torch.manual_seed(seconds)
    maps, affine = torch.randn(64, 768), nn.Linear(768, 12).double()
    fine = F.interpolate(maps.double().view(1, 2, 32, 768).permute(0, 3, 1, 2), size=(2, 1024), mode="bicubic")
    theirs = F.adaptive_avg_pool1d(affine(fine[0].permute(1, 2, 0)).mean(0).T[None], seconds)[0].T
    torch.testing.assert_close(affine(torch.tensor(cc.per_second(maps, seconds)).double()), theirs, rtol=1e-4, atol=1e-5)


def test_rows_of_the_matrix_are_weights_of_their_second():
    R = cc.seconds_matrix()
    np.testing.assert_allclose(R.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(R, R[::-1, ::-1], atol=1e-6)                    # time runs both ways alike
    near = np.abs((np.arange(32) + .5) / 3.2 - np.arange(10)[:, None] - .5)
    assert np.abs(R[near > 1.2]).max() == 0 and R[near < .15].min() > .25


@settings(max_examples=30, deadline=None)
@given(seconds=st.integers(1, 40))
def test_step_shares(seconds):
    S = cc.step_shares(seconds)
    np.testing.assert_allclose(S.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(S.sum(0), 32 / seconds, rtol=1e-4)
    assert (S >= 0).all()


# ---- simulated teachers

def digest(x): return hashlib.sha256(np.ascontiguousarray(x)).hexdigest()[:16]


def test_no_other_number_of_the_simulator_changes():
    "Whether teachers are simulated before, after or not at all"
    before = [digest(getattr(simulate(12), k)) for k in ("audio", "frames", "motion", "weak", "dense_audio", "dense_visual")]
    taught = cc.simulate_clip_clap(12)
    after = simulate(12)
    assert before == [digest(getattr(after, k)) for k in ("audio", "frames", "motion", "weak", "dense_audio", "dense_visual")]
    for k in ("motion", "weak", "dense_audio", "dense_visual", "rows"): np.testing.assert_array_equal(getattr(taught, k), getattr(after, k))
    assert taught.ids == after.ids and taught.mark == after.mark


def test_teachers_draw_from_a_stream_of_their_own():
    clips = simulate(3)
    j, T = 2, 10
    n = stream(0, "train", 2, cc.TEACHERS).standard_normal(10, dtype=np.float32)
    for other in (0, 1, 2): assert not np.array_equal(n, stream(0, "train", 2, other).standard_normal(10, dtype=np.float32))
    a, b = (cc.teacher_video(clips, j, SimParams()) for _ in range(2))
    for x, y in zip(a, b): np.testing.assert_array_equal(x, y)
    assert a[0].shape == (T, 768) and a[1].shape == (64, 768)


def test_a_video_does_not_depend_on_its_neighbours():
    whole, part = cc.simulate_clip_clap(9), cc.simulate_clip_clap(3, start=5)
    np.testing.assert_array_equal(whole.audio[5:8], part.audio)
    np.testing.assert_array_equal(whole.frames[5:8], part.frames)
    np.testing.assert_array_equal(cc.with_clip_clap(simulate(9)[[7, 2]]).frames, whole.frames[[7, 2]])
    for other in (cc.simulate_clip_clap(9, seed=1), cc.simulate_clip_clap(9, params=SimParams(world_seed=8))):
        assert np.abs(other.audio - whole.audio).max() > .1


def test_vectors_of_clip_have_length_one_and_all_is_finite():
    c = cc.simulate_clip_clap(20, split="test")
    np.testing.assert_allclose((c.frames**2).sum(-1), 1, atol=1e-5)
    assert c.audio.dtype == c.frames.dtype == np.float32 and np.isfinite(c.audio).all() and c.audio.min() < 0
    assert c.source["clip_clap"] == f"simulated CLIP and CLAP v{cc.TEACHER_VERSION}" and "simulated" in c.mark


def test_teachers_see_events_better():
    "One event, one second at a time: cosine with and without it"
    clips = simulate(300)
    taught = cc.with_clip_clap(clips)
    def gap(c, feature, truth):
        x = getattr(c, feature).reshape(3000, -1)
        x = x - x.mean(0)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        there = getattr(c, truth)[..., 0].reshape(-1) > 0                       # Speech
        return (x[there] @ x[there].T).mean() - (x[there] @ x[~there].T).mean()
    assert gap(taught, "audio", "dense_audio") > 1.2 * gap(clips, "audio", "dense_audio")


def test_only_the_simulators_own_clips_can_be_taught():
    for source in ({"simulated": False, "mark": ""}, {"simulated": True, "mark": "simulated toy"}):
        with pytest.raises(InputError, match="were not simulated here"): cc.with_clip_clap(replace(simulate(2), source=source))


def test_real_labels_with_simulated_teachers(tmp_path):
    write_labels(tmp_path, {k: simulate_labels(4, split=k, seed=3) for k in ("train", "val", "test")})
    spec = DataSpec(str(tmp_path))
    data = load_data(spec, "tiny", tmp_path / "cache", "clip+clap")
    assert [len(c) for c in data.values()] == [4, 4, 4] and data["test"].audio.shape[2] == 768
    want = simulate(4, split="test", annotations=load_annotations(tmp_path))
    np.testing.assert_array_equal(data["test"].motion, want.motion)


# ---- files

@pytest.fixture()
def files(tmp_path):
    "Annotations, the authors' features and VALOR's archives of 4 + 3 + 3 simulated videos; the clips by split"
    n = {"train": 4, "val": 3, "test": 3}
    clips = {k: simulate(v, split=k) for k, v in n.items()}
    for c in clips.values():
        write_layout(c, tmp_path / "feats")
        cc.write_clip_clap(tmp_path / "valor", c)
    write_labels(tmp_path / "data", {k: simulate_labels(v, split=k) for k, v in n.items()})
    return tmp_path, clips


def spec_of(root, **kw): return DataSpec(str(root / "data"), str(root / "feats"), clip_clap=str(root / "valor"), **kw)


def test_layout_is_the_described_one(files):
    root, clips = files
    i = clips["val"].ids[1][:11]
    clip, clap = (np.load(root / "valor" / k / "features" / f"{i}.npy") for k in ("CLIP", "CLAP"))
    assert clip.shape == (10, 768) and clap.shape == (64, 768) and clip.dtype == clap.dtype == np.float32
    assert all(read_json(root / "valor" / k / "SOURCE.json")["simulated"] for k in ("CLIP", "CLAP"))
    label_folder = write_pseudo_layout(root / "valor", label_clips(clips["train"]))                  # both in one folder
    assert cc.find_clip_clap(root) == label_folder == root / "valor"


@pytest.mark.parametrize("packed", [False, True])
def test_files_and_memory_hold_the_same(files, packed):
    root, clips = files
    spec = spec_of(root)
    if packed:
        ids = [i for c in clips.values() for i in c.ids]
        spec = replace(spec, features=str(pack(root / "feats", root / "packed", ids, "float32", progress=False).path))
    data = load_data(spec, "tiny", root / "cache", "clip+clap")
    for k, c in clips.items():
        want = cc.with_clip_clap(c)
        np.testing.assert_allclose(data[k].audio, want.audio, atol=1e-6)
        np.testing.assert_array_equal(data[k].frames, want.frames)
        np.testing.assert_array_equal(data[k].motion, want.motion)
        assert data[k].source["simulated"] and data[k].mark == c.mark


def test_identity(files):
    "Contents decide, not paths nor which features a method wants; other teachers are other data; no teachers is what it was"
    root, clips = files
    a = identify(spec_of(root), root / "cache")[0]
    assert a == identify(spec_of(root), root / "cache", "clip+clap")[0] == identify(spec_of(root), root / "cache", "full")[0]
    plain = identify(replace(spec_of(root), clip_clap=None), root / "cache")[0]
    assert {k: v for k, v in a.items() if k != "clip_clap"} == plain
    (root / "valor").rename(root / "moved")
    moved = replace(spec_of(root), clip_clap=str(root / "moved"))
    assert identify(moved, root / "cache")[0] == a
    path = root / "moved/CLIP/features" / f"{clips['test'].ids[0][:11]}.npy"
    np.save(path, np.load(path)[::-1].copy())
    assert identify(moved, root / "cache")[0] != a
    spec = RunSpec("valor_plus_plus", labels="clip+clap")
    assert run_key(spec, a) != run_key(spec, plain)


def test_simulated_data_keep_their_identity():
    assert identify(DataSpec(), None)[0] == identify(DataSpec(), None, "clip+clap")[0] == {
        "annotations": "embedded", "simulator": "1", "params": identify(DataSpec(), None)[0]["params"]}


def test_a_real_store_is_called_real(files):
    "Without the notes that simulated files carry; one note of three is enough to mark the whole"
    root, clips = files
    def source(cache):
        found = identify(spec_of(root), root / cache, "clip+clap")[1:]
        return llp_clips(spec_of(root), "train", 4, *found, root / cache, "clip+clap").source
    for f in ("feats", "valor/CLIP", "valor/CLAP"): (root / f / "SOURCE.json").unlink()
    assert (source("one")["mark"], source("one")["simulated"]) == ("", False)
    write_json({"simulated": True, "mark": "simulated CLAP"}, root / "valor/CLAP/SOURCE.json")
    assert (source("two")["mark"], source("two")["simulated"]) == ("simulated CLAP", True)
    assert (source("one")["mark"], source("one")["simulated"]) == ("simulated CLAP", True)            # made again


def broken(what, root, clips):
    i = clips["train"].ids[1][:11]
    path = root / "valor/CLAP/features" / f"{i}.npy"
    if what == "missing": path.unlink()
    if what == "shape": np.save(path, np.zeros((63, 768), np.float32))
    if what == "width": np.save(path, np.zeros((64, 512), np.float32))
    if what == "dtype": np.save(path, np.zeros((64, 768), np.int64))
    if what == "garbage": path.write_bytes(b"no array")
    if what == "nan": np.save(path, np.full((64, 768), np.nan, np.float32))
    return path


@pytest.mark.parametrize("what, message", [
    ("missing", r"missing \(1 missing; 9 of 10 videos can be used\)"), ("shape", r"shape: \(63, 768\)"), ("width", r"shape: \(64, 512\)"),
    ("dtype", "dtype: int64"), ("garbage", "unreadable"), ("nan", "contains NaN or infinity")])
def test_damaged_files_are_named(files, what, message):
    root, clips = files
    path = broken(what, root, clips)
    with pytest.raises(InputError, match=message) as e: identify(spec_of(root), root / "cache")
    assert path.name in str(e.value)


def test_videos_without_files_can_be_left_out(files):
    root, clips = files
    broken("missing", root, clips)
    data = load_data(spec_of(root, on_missing="drop"), "tiny", root / "cache", "clip+clap")
    assert [len(c) for c in data.values()] == [3, 3, 3] and clips["train"].ids[1] not in data["train"].ids
    with pytest.raises(InputError, match="missing"): identify(spec_of(root), root / "cache")


@pytest.mark.parametrize("call, message", [
    (lambda root: DataSpec(clip_clap="valor"), "clip_clap: CLIP and CLAP features without those of motion"),
    (lambda root: identify(replace(spec_of(root), clip_clap=None), root / "cache", "clip+clap"), "clip_clap: no CLIP and CLAP features beside real"),
    (lambda root: identify(replace(spec_of(root), clip_clap=str(root / "no")), root / "cache"), "no such folder"),
    (lambda root: identify(replace(spec_of(root), clip_clap=str(root / "data")), root / "cache"), "no CLIP and CLAP features"),
    (lambda root: load_data(DataSpec(dataset="unav100"), "tiny", root / "cache", "clip+clap"), "unav100: has no features of CLIP and CLAP"),
    (lambda root: load_data(DataSpec(), "tiny", root / "cache", "clip"), "frames: 'clip' is not possible"),
    (lambda root: cc.pack_clip_clap(root, None, root / "x", [], dtype="float64"), "dtype: 'float64' is not possible")])
def test_impossible_data_are_refused(files, call, message):
    with pytest.raises(InputError, match=message): call(files[0])


def test_half_a_release_is_refused(files):
    root, _ = files
    (root / "valor/CLAP").rename(root / "elsewhere")
    with pytest.raises(InputError, match="only CLIP/features is there. expected features of both teachers"): cc.find_clip_clap(root / "valor")


def test_other_features_are_not_overwritten(files):
    root, clips = files
    with pytest.raises(InputError, match="holds features of another source"): cc.write_clip_clap(root / "valor", simulate(2, seed=9))
    cc.write_clip_clap(root / "valor", clips["train"])                          # the same again


def test_an_interrupted_pack_goes_on(files, monkeypatch):
    root, clips = files
    base = pack(root / "feats", root / "base", [i for c in clips.values() for i in c.ids], "float32", progress=False)
    monkeypatch.setattr(store_files, "CHUNK", 4)
    original, calls = store_files._write_chunk, []
    def stop(*args):
        if len(calls) == 1: raise KeyboardInterrupt
        calls.append(args[2])
        return original(*args)
    monkeypatch.setattr(store_files, "_write_chunk", stop)
    with pytest.raises(KeyboardInterrupt): cc.pack_clip_clap(root, base, root / "out", base.ids)
    with pytest.raises(InputError, match="packing was not finished"): open_store(root / "out")
    monkeypatch.setattr(store_files, "_write_chunk", lambda *a: calls.append(a[2]) or original(*a))
    store = cc.pack_clip_clap(root, base, root / "out", base.ids)
    assert calls == [0, 4, 8] and len(store.verify()) == 10
    np.testing.assert_array_equal(store.motion, base.motion)
    with pytest.raises(InputError, match="holds a different pack"): cc.pack_clip_clap(root, base, root / "out", base.ids[:5])
    assert len(cc.pack_clip_clap(root, base, root / "out", base.ids[:5], overwrite=True)) == 5


# ---- whole runs

@pytest.mark.parametrize("name", BOTH)
def test_a_run_from_the_spec_to_the_record(tmp_path, monkeypatch, name):
    micro.install(monkeypatch.setitem)
    record = run(RunSpec(name, labels="clip+clap", scale="micro"), tmp_path, "cpu", "off")
    assert record["data"]["simulated"] and "simulated pseudo-labels" in record["data"]["mark"]
    assert record["spec"]["options"] == {} and math.isfinite(record["metrics"]["han"]["segment"]["Type@AV"])
    again = run(RunSpec(name, labels="clip+clap", scale="micro"), tmp_path, "cpu", "off")
    assert again["finished"] == record["finished"]
