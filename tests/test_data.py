"""Clips and batches: gathering, selecting, joining labels with features."""
import dataclasses
import shutil
import timeit
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avvp_nb.core import InputError
from avvp_nb.data import clips as D
from avvp_nb.data import features as F
from avvp_nb.data import packed as K
from avvp_nb.data.annotations import load_annotations, modality_shares

TINY = Path(__file__).parent / "data" / "llp_tiny"
SMALL = {"audio": F.FeatureSet("vggish", 4), "frames": F.FeatureSet("res152", 6, 8), "motion": F.FeatureSet("r2plus1d_18", 5)}


def random_clips(n=9, t=10, c=25, per=1, dtype=np.float32, dims=(4, 6, 5), **kw):
    rng = np.random.default_rng(0)
    def x(rows, d): return rng.standard_normal((n, rows, d)).astype(dtype)
    return D.Clips([f"toyVideo_{i:02d}_0_10" for i in range(n)], x(t, dims[0]), x(t * per, dims[1]), x(t, dims[2]),
                   rng.integers(0, 2, (n, c)).astype(np.float32), **{"source": {"mark": "random numbers", "fingerprint": "f"}, **kw})


@pytest.fixture
def tiny(tmp_path):
    "The tiny annotations, random features for all of them in the authors' layout, and a store"
    a = load_annotations(TINY)
    rng = np.random.default_rng(0)
    arrays = {k: rng.random((len(a.video_ids), 10 * s.per_second, s.dim), dtype=np.float32) for k, s in F.FEATURE_SETS.items()}
    F.write_layout(arrays, tmp_path / "feats", ids=a.video_ids, source={"simulated": True, "mark": "random numbers"})
    return a, arrays, tmp_path, K.pack(tmp_path, tmp_path / "store", a, dtype="float32")


# ---------------------------------------------------------------- batches

@settings(max_examples=40, deadline=None)
@given(idx=st.lists(st.integers(-9, 8), max_size=20), resident=st.booleans(), half=st.booleans())
def test_batch_gathers_exactly_the_asked_rows(idx, resident, half):
    clips = random_clips(dtype=np.float16 if half else np.float32)
    held = clips.to("cpu") if resident else clips
    b = held.batch(idx)
    at = np.array(idx, dtype=int)
    for name in D.FEATURES:
        x = getattr(b, name)
        assert x.dtype == torch.float32 and (x.numpy() == getattr(clips, name)[at].astype(np.float32)).all()
    assert (b.weak.numpy() == clips.weak[at]).all()
    assert b.index.tolist() == [i % 9 for i in idx] and b.index.dtype == torch.int64


@pytest.mark.parametrize("idx,want", [
    (slice(2, 5), [2, 3, 4]), (slice(None, None, -4), [8, 4, 0]), (3, [3]), (-1, [8]), (torch.tensor([4, 4]), [4, 4]),
    (np.arange(9) % 2 == 1, [1, 3, 5, 7]), ([], []), (range(2), [0, 1])])
def test_all_kinds_of_index(idx, want):
    clips = random_clips()
    assert clips.batch(idx).index.tolist() == want
    assert clips[idx].ids == [clips.ids[i] for i in want]
    assert (clips[idx].audio == clips.audio[want]).all()
    assert clips[idx].rows.tolist() == want


@pytest.mark.parametrize("idx", [[0.5], [[1]], ["a"], [True, False]])
def test_bad_index(idx):
    with pytest.raises(InputError, match="index"):
        random_clips().batch(idx)


def test_index_out_of_range():
    for bad in (9, [-10]):
        with pytest.raises(IndexError):
            random_clips()[bad]


def test_batch_dtype_full_frames_and_labels():
    clips = random_clips(per=8, dtype=np.float16).with_labels(visual=np.ones((9, 25)))
    assert not clips.pooled and "full" in repr(clips) and random_clips().pooled
    b = clips.batch([1, 2], dtype=torch.float16)
    assert b.frames.shape == (2, 80, 6) and b.frames.dtype == torch.float16
    assert b.labels["visual"].shape == (2, 25) and b.labels["visual"].dtype == b.weak.dtype == torch.float32
    assert clips.to("cpu").batch(0).labels["visual"].sum() == 25


def test_batches_are_copies():
    clips = random_clips()
    before = clips.audio.copy()
    clips.batch(slice(None)).audio.zero_()
    clips[:].to("cpu").batch([0]).audio.zero_()
    assert (clips.audio == before).all()


def test_selection_of_arrays_that_are_not_contiguous():
    clips = random_clips()
    odd = dataclasses.replace(clips, audio=np.asfortranarray(clips.audio))
    assert (odd.batch([5, 1]).audio.numpy() == clips.audio[[5, 1]]).all()


def test_gather_is_fast():
    "A wide margin over the usual tenth of a millisecond, for busy machines"
    clips = random_clips(n=300, dims=(128, 2048, 512))
    idx = np.random.default_rng(0).permutation(300)[:16]
    assert min(timeit.repeat(lambda: clips.batch(idx), number=10, repeat=5)) / 10 < 5e-3


# ---------------------------------------------------------------- clips

def test_selection_keeps_rows_labels_and_source():
    clips = random_clips(rows=np.arange(100, 109)).with_labels(audio=np.eye(9, 25))
    some = clips[[7, 2]]
    assert some.rows.tolist() == [107, 102] and (some.labels["audio"] == np.eye(9, 25)[[7, 2]]).all()
    assert some.mark == "random numbers" and some.source["fingerprint"] != "f"
    assert clips[:].source["fingerprint"] == "f" and clips[[7, 2]].source == some.source != clips[[2, 7]].source
    assert some[[1]].rows.tolist() == [102]
    assert len(list(clips)) == 9


def test_resident_clips_behave_the_same():
    clips = random_clips().with_labels(audio=np.ones((9, 25)))
    held = clips.to("cpu", torch.float16)
    assert isinstance(held.audio, torch.Tensor) and held.audio.dtype == torch.float16 and held.weak.dtype == torch.float32
    assert held[3:5].batch(0).audio.dtype == torch.float32
    assert (held[[4, 1]].weak.numpy() == clips.weak[[4, 1]]).all()
    assert held.nbytes < clips.nbytes and "float16" in repr(held) and held.mark == clips.mark


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_resident_on_a_gpu():
    clips = random_clips()
    held = clips.to("cuda")
    b = held.batch([5, 2])
    assert b.audio.is_cuda and b.index.is_cuda and (b.audio.cpu().numpy() == clips.audio[[5, 2]]).all()
    assert (held[[5, 2]].batch(0, device="cpu").audio.numpy() == clips.audio[[5]]).all()
    assert clips.batch([1], device="cuda").weak.is_cuda


@pytest.mark.parametrize("name,value,message", [
    ("audio", np.zeros((8, 10, 4)), "audio: shape .8, 10, 4."), ("motion", np.zeros((9, 9, 5)), "motion: shape .9, 9, 5."),
    ("frames", np.zeros((9, 40, 6)), "frames: shape .9, 40, 6.. expected .9, 10, D. or .9, 80, D."),
    ("weak", np.zeros((8, 25)), "weak: shape .8, 25."), ("dense_audio", np.zeros((9, 25, 10)), "dense_audio: shape .9, 25, 10.. expected .9, 10, 25."),
    ("audio", np.zeros((9, 10)), "audio: 2 dimensions. expected 3"), ("motion", np.zeros((9, 10)), "motion: shape .9, 10.. expected .9, 10, D."),
    ("weak", np.zeros(9), "weak: 1 dimensions. expected 2"), ("labels", {"audio": np.zeros((9, 24))}, r"labels\[audio\]: shape .9, 24."), ("rows", [0], "rows: 1 row numbers")])
def test_wrong_shapes_are_named(name, value, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(random_clips(), **{name: value})


def test_repr_and_sizes():
    clips = random_clips()
    assert repr(clips) == f"Clips(9 videos, T=10, C=25, 4+6+5 float32 pooled, {clips.nbytes / 1e6:.1f} MB, weak labels only, random numbers)"
    assert clips.nbytes == clips.audio.nbytes + clips.frames.nbytes + clips.motion.nbytes + clips.weak.nbytes
    z = np.zeros((9, 10, 25), np.uint8)
    assert "real features" in repr(random_clips(source={})) and "oracle" in repr(random_clips(dense_audio=z, dense_visual=z, oracle=True))


def test_modality_labels():
    z = np.zeros((9, 10, 25), np.uint8)
    heard, seen = z.copy(), z.copy()
    heard[2, 3, 4] = seen[1, :, 0] = 1
    audio, visual = random_clips(dense_audio=heard, dense_visual=seen).modality_labels()
    assert np.argwhere(audio).tolist() == [[2, 4]] and np.argwhere(visual).tolist() == [[1, 0]] and audio.dtype == np.float32
    with pytest.raises(InputError, match="no dense labels"):
        random_clips().modality_labels()


# ---------------------------------------------------------------- joining

@pytest.mark.parametrize("how", ["store", "store path", "layout path"])
def test_join_follows_the_split_file(tiny, how):
    a, arrays, root, store = tiny
    features = {"store": store, "store path": root / "store", "layout path": root}[how]
    offset = 0
    for split in a:
        clips = D.load_clips(a, features, split)
        n = len(a[split])
        assert clips.ids == a[split].ids and clips.rows.tolist() == list(range(n))
        assert (np.asarray(clips.audio) == arrays["audio"][offset:offset + n]).all()
        assert (np.asarray(clips.frames) == F.pool_frames(arrays["frames"][offset:offset + n])).all()
        assert (clips.weak == a[split].weak).all() and clips.mark == "random numbers" and clips.source["simulated"]
        assert (clips.dense_audio is None) == (split == "train")
        offset += n
    assert (clips.dense_visual == a["test"].visual).all()


def test_join_stays_mapped_and_any_order_works(tiny):
    a, arrays, root, store = tiny
    assert isinstance(D.load_clips(a, store, "val").audio, np.memmap)
    train, val, test = (a[s].video_ids for s in a)
    woven = [test[0], val[0], *test[1:], *train, val[1]]  # rows of a split in order, with others between them
    shuffled, woven = (K.pack(root, root / n, ids, dtype="float32") for n, ids in (("shuffled", a.video_ids[::-1]), ("woven", woven)))
    for split, other in [(s, o) for s in a for o in (shuffled, woven)]:
        one, two = (D.load_clips(a, s, split) for s in (store, other))
        assert (one.frames == two.frames).all() and one.ids == two.ids
        assert one.source["fingerprint"] != two.source["fingerprint"]
    clips = D.load_clips(a, store, "test")
    assert (clips.to("cpu").batch([2, 0]).motion.numpy() == clips.batch([2, 0]).motion.numpy()).all()


def test_join_missing_videos(tiny):
    a, _, root, _ = tiny
    partial = K.pack(root, root / "partial", [i for i in a.video_ids if i != "hTinyTest_2"])
    with pytest.raises(InputError, match="no features for 1 of 3 test videos .hTinyTest_2_10_20."):
        D.load_clips(a, partial, "test")
    clips = D.load_clips(a, partial, "test", on_missing="drop")
    assert clips.rows.tolist() == [0, 2] and (clips.dense_audio == a["test"].audio[[0, 2]]).all()
    assert (clips.weak == a["test"].weak[[0, 2]]).all()
    (root / "feats" / "vggish" / "gTinyTest_1.npy").unlink()
    with pytest.raises(InputError, match="missing"):
        D.load_clips(a, root, "test")
    assert D.load_clips(a, root, "test", on_missing="drop").rows.tolist() == [1, 2]
    none = K.pack(root, root / "none", a["train"].video_ids)
    with pytest.raises(InputError, match="no features for 3 of 3"):
        D.load_clips(a, none, "test", on_missing="drop")


def test_join_refusals(tiny, tmp_path):
    a, _, root, store = tiny
    with pytest.raises(InputError, match="did you mean 'test'"):
        D.load_clips(a, store, "tset")
    with pytest.raises(InputError, match="on_missing"):
        D.load_clips(a, store, "test", on_missing="ignore")
    with pytest.raises(InputError, match="no feature folders"):
        D.load_clips(a, tmp_path / "nothing", "test")
    short = {k: np.zeros((3, 7 * s.per_second, s.dim), np.float32) for k, s in F.FEATURE_SETS.items()}
    F.write_layout(short, tmp_path / "short", ids=a["test"].video_ids)
    with pytest.raises(InputError, match="features of 7 s for labels of 10 s"):
        D.load_clips(a, tmp_path / "short", "test")


def test_join_does_not_follow_a_shared_id(tiny):
    "Defect D4: the stray row fTinyValid2_8_300 has the id of fTinyValid2_8_30"
    a, _, _, store = tiny
    clips = D.load_clips(a, store, "val")
    audio, _ = clips.modality_labels()
    assert [a.classes[c] for c in np.flatnonzero(audio[1])] == ["Cat"]


def test_fingerprint_tells_labels_and_features_apart(tiny, tmp_path):
    a, _, root, store = tiny
    shutil.copytree(TINY, tmp_path / "llp")
    path = tmp_path / "llp" / "AVVP_train.csv"
    path.write_text(path.read_text().replace("Singing,Banjo", "Banjo"))
    other = load_annotations(tmp_path / "llp")
    prints = {D.load_clips(x, f, "train").source["fingerprint"] for x in (a, other) for f in (store, K.pack(root, root / "half", a))}
    assert len(prints) == 4
    assert D.load_clips(a, store, "train").source["fingerprint"] == D.load_clips(a, root / "store", "train").source["fingerprint"]


def test_round_trip_through_the_layout(tiny, tmp_path):
    "Clips written as files and read again are the same, mark included"
    a, _, _, store = tiny
    clips = D.load_clips(a, store, "test")
    F.write_layout(clips, tmp_path / "again")
    back = D.load_clips(a, tmp_path / "again", "test")
    assert (back.frames == clips.frames).all() and back.mark == clips.mark


def test_real_modality_labels(llp):
    "Without features: the helper agrees with the shares that were counted on the real labels"
    a = load_annotations(llp)
    shares, heard = modality_shares(a), 0
    for split in ("val", "test"):
        s = a[split]
        x = np.zeros((len(s), 10, 1), np.float16)
        clips = D.Clips(s.ids, x, x, x, s.weak, s.audio, s.visual)
        heard += (clips.modality_labels()[0] * s.weak).sum()
    assert heard == round(shares.audible["all"] * shares.videos["all"])


def test_reexports():
    from avvp_nb.data import annotations
    assert D.load_annotations is annotations.load_annotations
    assert (D.doctor, D.pack, K.open_store, K.load_layout) == (F.doctor, K.pack, K.open_store, K.load_layout)
    assert {"load_annotations", "doctor", "pack", "open_store", "load_clips", "Clips", "Batch"} <= set(D.__all__)
