"""The simulator: what its specification demands of any implementation, and the promises of this one."""
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from avvp_nb.core import CLASSES, InputError, asset, read_json, write_json
from avvp_nb.data import sim_files as W
from avvp_nb.data import sim_labels as L
from avvp_nb.data import simulate as S
from avvp_nb.data.annotations import load_annotations, with_facts
from avvp_nb.data.features import layout_source, pool_frames
from avvp_nb.data.packed import load_layout, pack
from avvp_nb.data.sim_labels import C, SimParams, T, simulate_labels
from avvp_nb.data.simulate import simulate
from avvp_nb.metrics import floors

ARRAYS = ("audio", "frames", "motion")
SILENT = dict(style=0, salience=0, class_spread=0, background=0, jitter_audio=0, jitter_visual=0, frame_jitter=0, context_leak=0)


@pytest.fixture(scope="module")
def train():
    return simulate_labels()


@pytest.fixture(scope="module")
def real(llp):
    return load_annotations(llp)


def weak_only(part):
    "A split of real annotations without its dense labels, so that those are drawn"
    return SimpleNamespace(ids=part.ids, weak=part.weak, audio=None, visual=None)


def latent_pair(params=None, **changes):
    "Latents of one video with one audible, one visible and one absent class, under changed parameters"
    audio, visual = np.zeros((2, T, C), np.uint8)
    audio[2:6, 0], audio[:, 3], visual[4:9, 3] = 1, 1, 1
    hidden = audio.any(0) | visual.any(0)
    draws = S.draw_normals(0, "train", 0, int(hidden.sum()))
    return S.latents(audio, visual, hidden, draws, replace(params or SimParams(), **changes))


# ---- 1 shapes and ranges -------------------------------------------------------------------------------------

@pytest.mark.parametrize("split,frames,seed", [("train", "pooled", 0), ("val", "full", 5), ("test", None, 2**64 - 1)])
def test_shapes_and_ranges(split, frames, seed):
    c = simulate(12, seed=seed, split=split, frames=frames)
    rows = {"pooled": (T, 2048), "full": (8*T, 2048), None: (T, 0)}[frames]
    assert (c.audio.shape, c.frames.shape, c.motion.shape) == ((12, T, 128), (12, *rows), (12, T, 512))
    for k in ARRAYS:
        x = getattr(c, k)
        assert x.dtype == np.float32 and np.isfinite(x).all() and (x >= 0).all()
    hidden = c.labels["hidden"] > 0
    assert (c.dense_audio.any(1) <= hidden).all() and (c.dense_visual.any(1) <= hidden).all()
    assert (c.weak <= hidden).all()
    assert c.weak.dtype == np.float32 and c.dense_audio.dtype == np.uint8 and c.oracle == (split == "train")


@pytest.mark.parametrize("split", L.SPLITS)
@pytest.mark.parametrize("kind", L.OPTIONS["labels"])
def test_everything_has_something_audible(split, kind):
    labels = simulate_labels(None if kind == "bank" else 600, split=split, params=SimParams(labels=kind))
    assert labels.audio.any((1, 2)).all() and (labels.weak.sum(1) >= 1).all()


def test_float16_is_the_rounded_float32():
    a, b = simulate(4), simulate(4, dtype="float16")
    for k in ARRAYS:
        assert np.array_equal(getattr(a, k).astype(np.float16), getattr(b, k))


# ---- 2 a video does not depend on its neighbours ----------------------------------------------------------------

def test_video_is_independent_of_number_chunk_order_and_threads():
    a, b = simulate(40, chunk=7, workers=1), simulate(100, chunk=64, workers=3)
    for k in (*ARRAYS, "weak", "dense_audio", "dense_visual"):
        assert np.array_equal(getattr(a, k), getattr(b, k)[:40]), k
    for i in (39, 0, 17):
        one = simulate(1, start=i, chunk=1)
        assert one.ids == [a.ids[i]] and all(np.array_equal(getattr(one, k)[0], getattr(a, k)[i]) for k in ARRAYS)


def test_another_seed_or_split_is_another_video():
    a, b, c = simulate(3), simulate(3, seed=1), simulate(3, split="val")
    for other in (b, c):
        assert all(not np.array_equal(a.audio[i], other.audio[i]) for i in range(3))
    assert not set(a.ids) & set(c.ids)


def test_labels_do_not_depend_on_the_features():
    labels, without, full = simulate_labels(20), simulate(20, frames=None), simulate(20, frames="full")
    for c in (without, full):
        assert np.array_equal(labels.hidden, c.labels["hidden"]) and np.array_equal(labels.audio, c.dense_audio)
        assert np.array_equal(labels.weak, c.weak) and np.array_equal(labels.visual, c.dense_visual)
    assert np.array_equal(without.audio, full.audio) and np.array_equal(without.motion, full.motion)


def test_seed_argument_overrides_params():
    assert np.array_equal(simulate(2, seed=4).audio, simulate(2, params=SimParams(seed=4)).audio)
    assert simulate(1, seed=4).source["params"]["seed"] == 4


def test_ids_are_unique_and_cut_to_eleven_characters():
    ids = [i for s in L.SPLITS for i in simulate_labels(split=s).ids]
    assert len({i[:11] for i in ids}) == len(ids) == sum(L.SIZES.values())
    assert all(i[11:] == "_0_10" for i in ids)


# ---- 3 pooling ----------------------------------------------------------------------------------------------

def test_pooled_is_the_mean_of_the_eight_frames():
    full, pooled = simulate(5, frames="full"), simulate(5)
    np.testing.assert_allclose(full.frames.reshape(5, T, 8, -1).mean(2), pooled.frames, atol=1e-6)
    assert np.array_equal(pool_frames(full.frames), pooled.frames)


# ---- 4 statistics of the labels -------------------------------------------------------------------------------

def test_label_noise_of_the_training_split(train):
    d, weak = L.describe_labels(train), train.weak > 0
    assert d["P(audible if labelled)"] == pytest.approx(0.96, abs=0.01)
    assert d["P(visible if labelled)"] == pytest.approx(0.64, abs=0.02)
    assert d["P(visible if labelled Speech)"] == pytest.approx(0.22, abs=0.02)
    rate = (train.hidden & ~weak).sum(0) / (~weak).sum(0)  # of a class among the videos without its label
    assert rate.sum() == pytest.approx(0.29, abs=0.03)
    expected = {"Speech": .073, "Clapping": .054, "Acoustic_guitar": .035, "Singing": .030}
    assert {k: round(rate[CLASSES.index(k)], 2) for k in expected} == pytest.approx(expected, abs=0.01)


def test_hidden_classes_of_evaluation_videos(real):
    part = real["test"]
    draws = [simulate_labels(split="test", annotations=weak_only(part), seed=s) for s in range(4)]
    without = part.weak == 0
    rate = np.mean([(x.hidden & without).sum(0)/without.sum(0) for x in draws], axis=0)
    assert rate.sum() == pytest.approx(0.05, abs=0.02)


def test_missing_labels_scales_the_extra_classes():
    def extra(k): return (lambda x: (x.hidden & (x.weak == 0)).mean())(simulate_labels(3000, params=SimParams(missing_labels=k)))
    assert extra(0) == 0 and extra(2)/extra(1) == pytest.approx(2, abs=0.4)


def test_label_sets_are_those_of_the_split():
    sizes = {s: simulate_labels(split=s).weak.sum(1) for s in L.SPLITS}
    assert sizes["train"].max() == 3 and sizes["test"].max() > 3
    assert simulate_labels(split="test", params=SimParams(label_sets="train")).weak.sum(1).max() <= 3
    assert sizes["train"].mean() == pytest.approx(1.606, abs=0.03)


def test_durations(train):
    d = L.describe_labels(train)
    for k, mean, full in (("audio", 5.7, .34), ("visual", 7.3, .57), ("av", 6.0, .36)):
        assert d[f"mean {k} event (s)"] == pytest.approx(mean, abs=0.15)
        assert d[f"{k} events that fill the clip"] == pytest.approx(full, abs=0.025)
    assert d["P(second visible if audible)"] == pytest.approx(0.65, abs=0.02)
    assert d["P(second audible if visible)"] == pytest.approx(0.84, abs=0.02)


PREDICTORS = {"nothing": "nothing", "weak label, both modalities": "true weak label, all 10 s, both modalities",
              "weak label, likely modalities": "true weak label, all 10 s, modality kept if P(modality|label)>=0.5 on val",
              "true video-level label per modality": "true video-level modality label, all 10 s",
              "true segments within weak label": "true segments, restricted to weak label"}


def floor_gap(real, llp_stats, **params):
    "Simulated minus real floors of the test split, mean of four draws of dense labels for the real weak labels"
    draws = [simulate_labels(split="test", annotations=weak_only(real["test"]), seed=s, params=SimParams(**params)) for s in range(4)]
    sim = sum(floors(x.weak, x.audio, x.visual) for x in draws)/4
    t = pd.read_csv(llp_stats/"trivial_predictors.csv").query("split == 'test'")
    t = t.pivot_table("f_score", ["predictor", "level"], "metric")
    levels, metrics = ("segment", "event"), ["A", "V", "AV", "Type@AV", "Event@AV"]
    return pd.DataFrame({(k, lv): sim.loc[(k, lv), metrics] - t.loc[(PREDICTORS[k], lv), metrics] for k in PREDICTORS for lv in levels}).T


def test_floors_of_the_bank_are_within_two_points(real, llp_stats):
    gap = floor_gap(real, llp_stats)
    assert gap.shape == (10, 5) and gap.abs().max().max() < 2, gap


def test_floors_of_the_chain_miss_static_pictures(real, llp_stats):
    gap = floor_gap(real, llp_stats, labels="markov")[["A", "V", "AV"]]
    assert gap.loc["weak label, both modalities"].abs().max().max() < 2, gap
    strongest = gap.loc["true video-level label per modality"]
    assert strongest["A"].abs().max() < 2 and strongest["V"].between(-6, -2.5).all()  # why the bank is the default


def test_bank_is_rebuilt_from_the_real_files(real):
    assert L.build_bank(real) == read_json(asset("llp_label_bank.json"))


def test_bank_names_no_video(real):
    text = asset("llp_label_bank.json").read_text()
    assert not any(i in text for s in real.values() for i in s.video_ids)


def test_bank_agrees_with_the_published_statistics(llp_stats):
    bank, raw = L.load_bank(), read_json(asset("llp_label_bank.json"))
    freq = pd.read_csv(llp_stats/"class_frequency.csv").query("split == 'train'")
    np.testing.assert_allclose(bank.prior["train"], freq.n_videos/10_000)
    chain = pd.read_csv(llp_stats/"state_transitions.csv")
    states = ["none", "audio", "visual", "both"]
    for r in chain[chain.class_id >= 0].itertuples():
        row = raw["chain"][CLASSES[r.class_id]][0 if r.from_state == "START" else states.index(r.from_state) + 1]
        assert int(row.split()[states.index(r.to_state)]) == r.count
    assert raw["label_sets"]["train"]["0 3"] == 668
    assert len(bank.patterns) == 3348 and sum(len(p) for p in raw["patterns"].values()) == 1469


# ---- 5 switches of the latent signal ------------------------------------------------------------------------------

def test_without_blur_a_second_knows_nothing_of_its_neighbours():
    params, hidden = SimParams(boundary_blur=0), np.arange(C) == 3
    draws = S.draw_normals(0, "train", 0, 1)
    a = np.zeros((T, C), np.uint8); a[4, 3] = 1
    b = a.copy(); b[5, 3] = 1
    for za, zb in zip(S.latents(a, a, hidden, draws, params), S.latents(b, b, hidden, draws, params)):
        other = np.arange(T) != 5
        assert np.array_equal(za[other], zb[other]) and not np.allclose(za[5], zb[5])
    for za, zb in zip(S.latents(a, a, hidden, draws, SimParams()), S.latents(b, b, hidden, draws, SimParams())):
        assert not np.allclose(za[4], zb[4])  # with blur it does


@pytest.mark.parametrize("c", [0, 4, 24])
def test_without_noise_the_latent_is_the_prototype(c):
    p = SimParams(**SILENT)
    on = np.zeros((T, C), np.uint8); on[:, c] = 1
    za, zv = S.latents(on, on, on.any(0), S.draw_normals(0, "train", 0, 1), p)
    world = S.make_world(p)
    np.testing.assert_allclose(za, np.tile(p.audio_snr*world.audio.prototypes[c], (T, 1)), atol=1e-5)
    np.testing.assert_allclose(zv, np.tile(p.visual_snr*world.visual.prototypes[c], (T, 1)), atol=1e-5)


@pytest.mark.parametrize("m", list(S.LATENT))
@pytest.mark.parametrize("kappa", [0.2, 0.5, 0.8])
def test_prototype_cosines(m, kappa):
    sense = getattr(S.make_world(SimParams(confusability=kappa)), m)
    g, cos = S.group_of(m), sense.prototypes @ sense.prototypes.T
    inside, across = (g[:, None] == g) & ~np.eye(C, dtype=bool), g[:, None] != g
    assert abs(cos[inside].mean() - kappa) < 0.05 and abs(cos[across].mean()) < 0.03
    # single pairs may fall outside: random unit vectors of K=64 have cosines with a standard deviation of 0.125
    assert (abs(cos[inside] - kappa) < 0.2).mean() > (0.95 if kappa >= 0.5 else 0.85)
    assert (abs(cos[across]) < 0.35).mean() > 0.95


def test_world_shape_switches():
    w = S.make_world(SimParams(class_spread=0, context_overlap=1))
    assert (w.audio.gain == 1).all() and (w.visual.gain == 1).all()
    assert np.allclose(w.visual.scenes, w.visual.prototypes)
    assert S.make_world().audio.gain[0] == S.make_world(SimParams(class_spread=0.6)).visual.gain[0] == 1  # Speech
    same, other = S.make_world(SimParams(seed=9)), S.make_world(SimParams(world_seed=8))
    assert same is S.make_world() and not np.allclose(other.audio.prototypes, same.audio.prototypes)


def test_background_has_unit_variance_and_memory():
    x = S.memory_matrix(0.95) @ np.random.default_rng(0).standard_normal((T, 20_000))
    np.testing.assert_allclose(x.var(1), 1, atol=0.05)
    assert (x[1:]*x[:-1]).mean() == pytest.approx(0.95, abs=0.02)


# ---- 6 and 7 what a linear probe can find ------------------------------------------------------------------------

def ridge(x, y, x_test, penalty=100.0):
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_test = (x - mean)/std, (x_test - mean)/std
    return x_test @ np.linalg.solve(x.T @ x + penalty*np.eye(x.shape[1]), x.T @ (y - y.mean(0)))


def auc(score, positive):
    rank, n, m = score.argsort().argsort() + 1, positive.sum(), (~positive).sum()
    return (rank[positive].sum() - n*(n + 1)/2)/(n*m)


@pytest.mark.parametrize("leak,low,high", [(0.0, 0, 0.62), (1.5, 0.65, 0.80), (3.0, 0.80, 1)])
def test_context_betrays_speech_that_is_not_seen(leak, low, high):
    tr, te = (simulate(n, split=s, params=SimParams(context_leak=leak), frames=None) for n, s in ((900, "train"), (600, "test")))
    score = ridge(tr.motion.mean(1), tr.weak[:, 0], te.motion.mean(1))
    seen, heard = te.dense_visual[:, :, 0].any(1), te.dense_audio[:, :, 0].any(1)
    keep = ~seen & (heard | (te.weak[:, 0] == 0))
    assert low < auc(score[keep], heard[keep]) < high


def test_without_signal_a_probe_is_at_chance_level():
    def score(**p):
        tr, te = (simulate(n, split=s, params=SimParams(style=0, **p), frames=None) for n, s in ((1500, "train"), (1000, "test")))
        x, xt = (np.concatenate([c.audio.mean(1), c.motion.mean(1)], 1) for c in (tr, te))
        out, y = ridge(x, tr.weak, xt, 1000.0), te.weak > 0
        return np.mean([auc(out[:, c], y[:, c]) for c in range(C) if y[:, c].sum() >= 30])
    assert score(audio_snr=0, visual_snr=0, context_leak=0) == pytest.approx(0.5, abs=0.05)
    assert score() > 0.8  # the probe itself works


# ---- 8 one parameter, one term -----------------------------------------------------------------------------------

TERMS = {"style": (0, 1), "background": (0, 1), "jitter_audio": (0,), "jitter_visual": (1,), "context_leak": (1,),
         "audio_snr": (0,), "visual_snr": (1,)}


@pytest.mark.parametrize("name,other", [(a, b) for a in TERMS for b in TERMS if a != b])
def test_a_parameter_moves_its_own_term_only(name, other):
    one, two = ([b - a for a, b in zip(latent_pair(**{name: 1.0, other: v}), latent_pair(**{name: 2.0, other: v}))] for v in (0.0, 1.7))
    for k in (0, 1):
        np.testing.assert_allclose(one[k], two[k], atol=2e-5)  # the same change, whatever the other term does
        assert np.any(one[k] != 0) == (k in TERMS[name])


def test_noise_switches_leave_the_labels_alone():
    base = simulate_labels(200)
    for name in ("style", "salience", "background", "jitter_audio", "frame_jitter", "context_leak", "boundary_blur", "world_seed"):
        changed = simulate_labels(200, params=replace(SimParams(), **{name: 0}))
        assert np.array_equal(base.audio, changed.audio) and np.array_equal(base.hidden, changed.hidden), name


def test_frame_jitter_touches_picture_only():
    a, b = simulate(3, frames="full"), simulate(3, frames="full", params=SimParams(frame_jitter=0))
    assert np.array_equal(a.audio, b.audio) and not np.array_equal(a.motion, b.motion)
    frames = b.frames.reshape(3, T, 8, -1)
    assert np.array_equal(frames[:, :, 0], frames[:, :, 7])  # eight identical frames


def test_missing_labels_changes_only_videos_that_gain_or_lose_a_class():
    a, b = (simulate(60, frames=None, params=SimParams(missing_labels=k)) for k in (0, 1))
    same = (a.labels["hidden"] == b.labels["hidden"]).all(1)
    assert 0.5 < same.mean() < 1
    assert np.array_equal(a.audio[same], b.audio[same]) and np.array_equal(a.weak, b.weak)


# ---- 9 and beyond: what the marginals are, and that they stay so -------------------------------------------------------

def test_marginals():
    c, full = simulate(150), simulate(20, frames="full")
    expected = {"audio": (.28, .48, .57, 2.1), "frames": (.26, .36, .27, 1.6), "motion": (.47, .71, .50, 2.9)}
    for k, row in expected.items():
        d = S.describe_features(getattr(c, k))
        assert [d["mean"], d["std"], d["zeros"]] == pytest.approx(row[:3], abs=0.02)
        assert d["99 % quantile"] == pytest.approx(row[3], abs=0.12)
    d = S.describe_features(full.frames)
    assert [d["mean"], d["std"], d["zeros"]] == pytest.approx((.25, .41, .57), abs=0.02)


def test_the_generator_is_the_one_its_version_names():
    "Pinned values: if this fails, the output has changed and VERSION must change with it"
    assert L.VERSION == "1"
    labels = simulate_labels(50)
    assert [int(x.sum()) for x in (labels.weak, labels.hidden, labels.audio, labels.visual)] == [77, 84, 589, 454]
    a, b = simulate(1), simulate(1, split="test", start=5, seed=3, frames="full")
    pinned = [(a.audio[0, 0, :6], [0.2025431, 0, 0, 0, 0, 0.6851143]),
              (a.frames[0, 3, :6], [0.6093962, 0.2479674, 0.0906059, 0.1166367, 0.1219198, 0.0120152]),
              (a.motion[0, 9, :6], [0, 0, 0.1922579, 0.1297780, 0, 0.4511980]),
              (b.audio[0, 4, 20:26], [0, 0.0309438, 0, 0.6366018, 0, 0]),
              (b.frames[0, 77, :6], [1.0070364, 0, 0.1367422, 0, 0.6905705, 0.5750256]),
              (b.motion[0, 2, :6], [1.8026938, 0, 0.7333976, 0, 0, 0.5541162])]
    for x, want in pinned:
        np.testing.assert_allclose(x, want, atol=1e-5)


# ---- 10 real annotations and oracle labels --------------------------------------------------------------------------

def test_real_annotations_are_used(real):
    for split in ("val", "test"):
        c = simulate(20, split=split, annotations=real, frames=None)
        part = real[split]
        assert c.ids == part.ids[:20] and np.array_equal(c.dense_audio, part.audio[:20]) and np.array_equal(c.weak, part.weak[:20])
        assert c.mark == "simulated v1 seed=0 world=7 real annotations 2024" and not c.oracle
    c = simulate(20, annotations=real, frames=None, start=9_980)
    assert np.array_equal(c.weak, real["train"].weak[9_980:]) and c.rows.tolist() == list(range(9_980, 10_000)) and c.oracle
    assert simulate(5, annotations=real["train"], frames=None).ids == real["train"].ids[:5]


def test_draws_do_not_shift_with_real_dense_labels(real):
    "The 225 uniforms are drawn and ignored: a video whose classes agree has the same normals"
    part = real["test"]
    given, drawn = (simulate(40, split="test", annotations=a, frames=None, params=SimParams(audio_snr=0, style=0))
                    for a in (part, weak_only(part)))
    same = (given.labels["hidden"] == drawn.labels["hidden"]).all(1)
    assert same.sum() > 20 and np.array_equal(given.audio[same], drawn.audio[same])


def test_the_weak_set_comes_from_a_substream(real):
    "Given annotations or not, the same classes give the same hidden draws and features"
    labels = simulate_labels(30)
    again = simulate_labels(30, annotations=SimpleNamespace(ids=labels.ids, weak=labels.weak, audio=None, visual=None))
    assert np.array_equal(labels.hidden, again.hidden) and np.array_equal(labels.visual, again.visual)


def test_oracle_labels_lie_within_the_weak_label():
    c = simulate(300, frames=None)
    audio, visual = S.oracle_labels(c)
    assert (audio <= c.weak).all() and (visual <= c.weak).all() and 0.9 < audio.sum()/c.weak.sum() < 1
    assert 0.55 < visual.sum()/c.weak.sum() < 0.75


# ---- 11 the mark ----------------------------------------------------------------------------------------------------

def test_mark_and_provenance_travel():
    c = simulate(6, frames=None, params=SimParams(context_leak=0, seed=3))
    assert c.mark == c[1:3].mark == "simulated v1 seed=3 world=7 embedded labels [context_leak=0]"
    assert c.source["simulated"] is True and c.source["version"] == L.VERSION and c.source["params"]["context_leak"] == 0
    assert c.mark in repr(c)


def test_fingerprints_tell_contents_apart():
    kinds = [{}, {"seed": 1}, {"split": "val"}, {"start": 1}, {"frames": None}, {"dtype": "float16"}, {"params": SimParams(style=0)}]
    prints = [simulate(2, **k).source["fingerprint"] for k in kinds]
    assert len(set(prints)) == len(kinds)
    assert simulate(2, chunk=1, workers=2).source == simulate(2).source


# ---- files -----------------------------------------------------------------------------------------------------------

def test_authors_layout_round_trip(tmp_path):
    root = W.write_simulated(tmp_path/"llp", {"train": 9, "val": 3, "test": 4}, chunk=4, seed=2)
    read = load_annotations(root/"data")
    assert layout_source(root/"feats")["mark"] == simulate(1, seed=2).mark
    for split, n in (("train", 9), ("val", 3), ("test", 4)):
        direct, full = simulate(n, split=split, seed=2), simulate(n, split=split, seed=2, frames="full")
        assert read[split].ids == direct.ids and np.array_equal(read[split].weak, direct.weak)
        if split != "train":
            assert np.array_equal(read[split].audio, direct.dense_audio) and np.array_equal(read[split].visual, direct.dense_visual)
        store = pack(root/"feats", tmp_path/f"{split}-store", direct.ids, dtype="float32", progress=False)
        loaded = load_layout(root, direct.ids, frames="full", progress=False)
        for k in ARRAYS:
            assert np.array_equal(np.asarray(getattr(store, k)), getattr(direct, k)), k
            assert np.array_equal(getattr(loaded, k), getattr(full, k)), k
    assert np.load(root/"feats"/"res152"/f"{read['train'].ids[0][:11]}.npy").shape == (80, 2048)


def test_packing_to_float16_equals_direct_float16(tmp_path):
    root = W.write_simulated(tmp_path/"llp", {"train": 3, "test": 2})
    direct = simulate(3, dtype="float16")
    store = pack(root/"feats", tmp_path/"store", direct.ids, dtype="float16", progress=False)
    assert all(np.array_equal(np.asarray(getattr(store, k)), getattr(direct, k)) for k in ARRAYS)


def test_layout_with_real_annotations_writes_features_only(tmp_path, real):
    root = W.write_simulated(tmp_path/"x", {"val": 3}, annotations=real)
    assert sorted(p.name for p in root.iterdir()) == ["feats"]
    assert sorted(p.stem for p in (root/"feats"/"vggish").glob("*.npy")) == sorted(real["val"].video_ids[:3])


def test_annotations_that_were_not_simulated_are_never_overwritten(tmp_path):
    (tmp_path/"data").mkdir()
    (tmp_path/"data"/"AVVP_val_pd.csv").write_text("somebody's own")
    with pytest.raises(InputError, match="data: holds annotations that were not simulated. .*choose another folder; nothing was written"):
        W.write_simulated(tmp_path, {"train": 2})
    assert [p.name for p in tmp_path.rglob("*")] == ["data", "AVVP_val_pd.csv"]
    (tmp_path/"data"/"AVVP_val_pd.csv").unlink()
    W.write_simulated(tmp_path, {"train": 2})
    W.write_simulated(tmp_path, {"train": 2})                  # its own may be written again


def test_a_layout_is_not_mixed_from_two_simulations(tmp_path):
    W.write_simulated(tmp_path, {"train": 2})
    with pytest.raises(InputError, match="features of another source"):
        W.write_simulated(tmp_path, {"train": 2}, seed=1)


def test_cache(tmp_path):
    a = W.cached_simulate(tmp_path, 10, split="val", chunk=3)
    b = W.cached_simulate(tmp_path, 10, split="val")
    direct = simulate(10, split="val")
    assert len(list(tmp_path.iterdir())) == 1 and isinstance(b.audio, np.memmap)
    assert a.source == b.source == direct.source and not b.frames.flags.writeable
    assert all(np.array_equal(getattr(b, k), getattr(direct, k)) for k in ARRAYS)
    W.cached_simulate(tmp_path, 10, split="val", seed=1)
    W.cached_simulate(tmp_path, 10, split="val", frames=None)
    assert len(list(tmp_path.iterdir())) == 3


def test_interrupted_cache_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*args, **kw): raise KeyboardInterrupt
    monkeypatch.setattr(W, "fill_features", interrupted)
    with pytest.raises(KeyboardInterrupt):
        W.cached_simulate(tmp_path, 4)
    assert not list(tmp_path.iterdir())


def test_cache_of_a_faster_process_is_used(tmp_path, monkeypatch):
    finish = W.fill_features
    def slow(out, labels, **kw):
        finish(out, labels, **kw)
        monkeypatch.setattr(W, "fill_features", finish)
        assert len(W.cached_simulate(tmp_path, 4)) == 4  # somebody else publishes the same folder meanwhile
    monkeypatch.setattr(W, "fill_features", slow)
    assert len(W.cached_simulate(tmp_path, 4)) == 4
    assert len(list(tmp_path.iterdir())) == 1


def test_damaged_cache_is_named(tmp_path):
    W.cached_simulate(tmp_path, 3)
    manifest = next(tmp_path.glob("*/manifest.json"))
    write_json({**read_json(manifest), "version": "0"}, manifest)
    with pytest.raises(InputError, match="manifest does not match.*delete this folder"):
        W.cached_simulate(tmp_path, 3)


# ---- bad input -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", list(L.RANGES))
def test_every_parameter_is_checked(name):
    low, high = L.RANGES[name]
    for bad in (low - 1, high*2 + 1, "1", True, float("nan"), None):
        with pytest.raises(InputError, match=f"{name}: .*from {low} to"):
            SimParams(**{name: bad})
    assert SimParams(**{name: low}) and SimParams(**{name: high})


def test_parameters_and_ranges_name_the_same_things():
    assert {f.name for f in fields(SimParams)} == set(L.RANGES) | set(L.OPTIONS)


@pytest.mark.parametrize("call,message", [
    (lambda: SimParams(labels="chain"), "labels: 'chain'"),
    (lambda: SimParams(label_sets="val"), "label_sets: 'val'"),
    (lambda: simulate(3, split="dev"), "split: 'dev'"),
    (lambda: simulate(3, frames="raw"), "frames: 'raw'"),
    (lambda: simulate(3, dtype="int8"), "dtype: 'int8'"),
    (lambda: simulate(3, dtype="float"), "dtype: 'float'"),
    (lambda: simulate(3, chunk=0), "chunk: 0"),
    (lambda: simulate(3, workers=-1), "workers: -1"),
    (lambda: simulate(0), "n >= 1"),
    (lambda: simulate(3, start=-1), "start >= 0"),
    (lambda: simulate(2, start=L.MAX_VIDEOS - 1), "start \\+ n <= 1000000"),
    (lambda: S.simulate_splits("large"), "profile: 'large'"),
    (lambda: W.cached_simulate("x", 3, sed=1), "did you mean 'seed'"),
    (lambda: simulate(1, annotations=SimpleNamespace(ids=["a"], weak=np.zeros((1, 3)), audio=None, visual=None)), "expected \\(N,25\\)"),
    (lambda: simulate(2, annotations=SimpleNamespace(ids=["a"], weak=np.zeros((1, C)), audio=None, visual=None)), "start \\+ n <= 1"),
])
def test_refusals(call, message):
    with pytest.raises(InputError, match=message):
        call()


# ---- card and speed ----------------------------------------------------------------------------------------------------

def test_card_holds_the_generated_facts(request):
    card = (request.config.rootpath/"data_cards"/"llp_sim.md").read_text(encoding="utf-8")
    assert with_facts(card, W.sim_facts()) == card


@pytest.mark.slow
def test_full_training_split():
    c = simulate(dtype="float16")
    assert len(c) == 10_000 and c.weak.any(1).all()
    for x in (c.audio, c.frames, c.motion): assert x.dtype == np.float16 and len(x) == 10_000 and all(np.isfinite(part).all() for part in np.array_split(x, 20))
