"""Pseudo-labels: VALOR's files and everything that can be wrong with them, stated error rates, and the dense terms."""
import copy
import math
import pickle
from dataclasses import replace

import micro
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avvp_nb.core import CLASSES, InputError, Parsing
from avvp_nb.data.annotations import load_annotations
from avvp_nb.data.clips import Batch, Clips
from avvp_nb.data.pseudo import (
    FOLDERS,
    PseudoParams,
    draw_uniforms,
    find_pseudo,
    label_clips,
    labels_hash,
    lasting,
    load_pseudo_labels,
    pseudo_doctor,
    pseudo_quality,
    read_pseudo,
    simulate_pseudo_labels,
    with_pseudo_labels,
    write_pseudo_layout,
)
from avvp_nb.data.simulate import simulate
from avvp_nb.data.tables import video_id
from avvp_nb.methods.dgm import DGMNet, MSDULoss
from avvp_nb.methods.jomold import JoMoLDLoss
from avvp_nb.methods.losses import DenseLoss, GuidedLoss, dense_bce
from avvp_nb.train.learner import Learner


@pytest.fixture(scope="module")
def clips():
    return simulate(400, seed=3, frames=None)


@pytest.fixture
def layout(tmp_path, clips):
    "Labels of 20 simulated videos as files"
    return write_pseudo_layout(tmp_path / "valor", label_clips(clips[:20]))


def by_hand(n=2, t=3, c=2, **kw):
    "Clips whose truth is chosen by the caller"
    arrays = [np.zeros((n, t, 4), np.float32)] * 3
    return Clips([f"byhand{i:05d}_0_{t}" for i in range(n)], *arrays, **{"weak": np.ones((n, c), np.float32), **kw})


# ---- files

def test_files_are_read_as_they_are(layout, clips):
    labels = load_pseudo_labels(layout, clips.ids[:20])
    for m, folder in FOLDERS.items():
        assert labels[m].shape == (20, 10, 25) and labels[m].dtype == np.uint8
        for i, x in zip(clips.ids, labels[m]): np.testing.assert_array_equal(x, np.load(layout / folder / f"{video_id(i)}.npy"))
    assert str(FOLDERS["audio"]).startswith("CLAP") and str(FOLDERS["visual"]).startswith("CLIP")   # who hears, who sees


def test_order_and_form_of_the_ids_do_not_matter(layout, clips):
    ids = clips.ids[:20]
    a, b = load_pseudo_labels(layout, ids), load_pseudo_labels(layout, [video_id(i) for i in ids[::-1]], workers=1)
    for m in a: np.testing.assert_array_equal(a[m], b[m][::-1])


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int32, np.int64, np.float32])
def test_any_numbers_that_are_zero_or_one(tmp_path, dtype):
    np.save(tmp_path / "x.npy", np.eye(4, 3, dtype=dtype))
    x = read_pseudo(tmp_path / "x.npy", (4, 3))
    assert x.dtype == np.uint8 and x.sum() == 3


@pytest.mark.parametrize("wrap", ["", "pseudo"])
def test_one_wrapping_folder(tmp_path, clips, wrap):
    write_pseudo_layout(tmp_path / wrap, label_clips(clips[:2]))
    assert find_pseudo(tmp_path) == tmp_path / wrap
    assert load_pseudo_labels(tmp_path, clips.ids[:2])["audio"].shape == (2, 10, 25)


def test_missing_files_are_counted_before_any_is_read(layout, clips, monkeypatch):
    monkeypatch.setattr("avvp_nb.data.pseudo.read_pseudo", lambda *a: pytest.fail("read something"))
    with pytest.raises(InputError, match=r"380 of 400 audio files are missing \(simtr000020, (simtr\d+, ){3}simtr000024, \.\.\.\)") as e:
        load_pseudo_labels(layout, clips.ids)
    assert str(layout / FOLDERS["audio"]) in str(e.value)
    (layout / FOLDERS["visual"] / "simtr000004.npy").unlink()
    with pytest.raises(InputError, match=r"1 of 20 visual files are missing \(simtr000004\)"): load_pseudo_labels(layout, clips.ids[:20])


def broken(path, how):
    "Spoil a good file in one way"
    x = np.load(path)
    if how == "truncated": path.write_bytes(path.read_bytes()[:-16])
    if how == "cut header": path.write_bytes(path.read_bytes()[:20])
    if how == "empty": path.write_bytes(b"")
    if how == "text": path.write_text("not found")
    if how == "objects": np.save(path, x.astype(object), allow_pickle=True)
    if how == "shape": np.save(path, x[:9])
    if how == "turned": np.save(path, x.T)
    if how == "strings": np.save(path, x.astype(str))
    if how == "nan": np.save(path, np.where(np.arange(25) == 4, np.nan, x))
    if how in ("two", "negative", "half"):
        x = x.astype(float)
        x[6, 11] = {"two": 2, "negative": -1, "half": .5}[how]
        np.save(path, x)


BROKEN = {"truncated": "could not be read", "cut header": "could not be read", "empty": "could not be read", "text": "could not be read",
          "objects": "pickled objects, which are never loaded", "shape": r"has shape \(9, 25\)", "turned": r"it is \(C,T\): transpose it",
          "strings": "holds <U", "nan": r"row 0, column 4 \(Cat\) holds nan", "two": r"row 6, column 11 \(Singing\) holds 2",
          "negative": r"row 6, column 11 \(Singing\) holds -1", "half": "holds 0.5"}


@pytest.mark.parametrize("how", BROKEN)
def test_a_bad_file_is_refused_by_name(layout, clips, how):
    path = layout / FOLDERS["visual"] / "simtr000013.npy"
    broken(path, how)
    with pytest.raises(InputError, match=BROKEN[how]) as e: load_pseudo_labels(layout, clips.ids[:20])
    assert str(path) in str(e.value) and "1 of 40 files cannot be used" in str(e.value) and e.value.fix


KINDS = {"truncated": "unreadable", "cut header": "unreadable", "empty": "unreadable", "text": "unreadable", "objects": "objects", "shape": "shape",
         "turned": "shape", "strings": "dtype", "nan": "values", "two": "values", "negative": "values", "half": "values"}


@pytest.mark.parametrize("how", BROKEN)
def test_the_doctor_names_every_bad_file(layout, clips, how):
    paths = [layout / FOLDERS[m] / f"simtr{k:06d}.npy" for m, k in (("audio", 3), ("audio", 4), ("visual", 4))]
    for p in paths: broken(p, how)
    report = pseudo_doctor(layout, clips.ids[:20])
    assert report.problems.file.tolist() == [str(p) for p in paths] and set(report.problems.problem) == {KINDS[how]}
    assert not report.ok and report.usable == [video_id(i) for i in clips.ids[:20] if i[:11] not in ("simtr000003", "simtr000004")]
    with pytest.raises(InputError) as e: load_pseudo_labels(layout, clips.ids[:20])
    r = report.problems.iloc[0]
    assert str(e.value).replace(" (3 of 40 files cannot be used)", "") == str(InputError(r.found, r.file, r.expected, r.fix))     # as the loader says it


def test_the_doctor_counts_classes_and_missing_and_extra_files(layout, clips):
    want = load_pseudo_labels(layout, clips.ids[:20])
    report = pseudo_doctor(layout, clips.ids[:20])
    assert report.ok and not len(report.problems) and list(report.counts.index) == list(CLASSES) and report.counts.to_numpy().sum()
    for m in FOLDERS:
        np.testing.assert_array_equal(report.counts[f"{m} seconds"], want[m].sum((0, 1)))
        np.testing.assert_array_equal(report.counts[f"{m} videos"], want[m].any(1).sum(0))
    assert pseudo_doctor(layout.parent).ids == report.ids                                     # a wrapping folder, and its own list
    (layout / FOLDERS["visual"] / "simtr000004.npy").unlink()
    (layout / FOLDERS["visual"] / "README.txt").write_text("x")
    part = pseudo_doctor(layout)
    assert part.problems[["modality", "id", "problem"]].values.tolist() == [["visual", "simtr000004", "missing"], ["visual", "README", "extra"]]
    assert len(part.usable) == 19 and "19 of 20 videos usable" in repr(part)
    fewer = pseudo_doctor(layout, clips.ids[5:9])
    assert fewer.ok and fewer.problems.problem.value_counts().to_dict() == {"extra": 15 + 16 + 1}
    for f in FOLDERS.values():
        for p in (layout / f).glob("*.npy"): p.unlink()
    with pytest.raises(InputError, match="no label files"): pseudo_doctor(layout)


def test_bad_files_are_counted(layout, clips):
    for i in (2, 5): broken(layout / FOLDERS["audio"] / f"simtr{i:06d}.npy", "two")
    broken(layout / FOLDERS["visual"] / "simtr000001.npy", "empty")
    with pytest.raises(InputError, match=r"simtr000002.npy: .*3 of 40 files cannot be used"): load_pseudo_labels(layout, clips.ids[:20])


def test_nothing_is_unpickled(layout, clips, tmp_path):
    class Trap:
        def __reduce__(self): return (open, (str(tmp_path / "sprung"), "w"))
    np.save(layout / FOLDERS["audio"] / "simtr000000.npy", np.array([Trap()], object), allow_pickle=True)
    with pytest.raises(InputError, match="never loaded"): load_pseudo_labels(layout, clips.ids[:20])
    assert not (tmp_path / "sprung").exists()


def test_a_file_of_other_classes_names_no_class_of_llp(tmp_path):
    np.save(tmp_path / "x.npy", np.full((2, 3), 7))
    with pytest.raises(InputError, match="row 0, column 0 holds 7"): read_pseudo(tmp_path / "x.npy", (2, 3))


def test_where_nothing_lies(tmp_path):
    with pytest.raises(InputError, match="no such folder"): find_pseudo(tmp_path / "nowhere")
    (tmp_path / "feats").mkdir()
    with pytest.raises(InputError, match=r"no pseudo-labels \(feats\)"): find_pseudo(tmp_path)
    (tmp_path / FOLDERS["audio"]).mkdir(parents=True)
    with pytest.raises(InputError, match="CLIP.segment_pseudo_labels is not there"): find_pseudo(tmp_path)
    with pytest.raises(InputError, match="no ids"):
        (tmp_path / FOLDERS["visual"]).mkdir(parents=True)
        load_pseudo_labels(tmp_path, [])


def test_two_kinds_of_labels_do_not_mix(layout, clips):
    with pytest.raises(InputError, match="of another kind.*false alarm 0.05, seed 1"):
        write_pseudo_layout(layout, label_clips(clips[:3], params=PseudoParams(seed=1)))
    with pytest.raises(InputError, match="carry no pseudo-labels"): write_pseudo_layout(layout, clips)
    write_pseudo_layout(layout, label_clips(clips[20:22]))                    # more of the same
    assert len(list((layout / FOLDERS["audio"]).glob("*.npy"))) == 22


def test_files_keep_their_mark(layout, clips):
    from_files, drawn = label_clips(clips[:20], layout), label_clips(clips[:20])
    assert from_files.mark == drawn.mark and from_files.source == drawn.source
    for k, x in drawn.labels.items(): np.testing.assert_array_equal(from_files.labels[k], x)


# ---- simulated labels

@settings(max_examples=25, deadline=None)
@given(miss=st.floats(0, 1), false_alarm=st.floats(0, 1), memory=st.sampled_from([0., .5, .9]), seed=st.integers(0, 5))
def test_rates_are_the_stated_ones(miss, false_alarm, memory, seed):
    "400 x 10 x 2 x 4 cells, of which half are present"
    dense = np.zeros((400, 10, 4), np.uint8)
    dense[..., ::2] = 1
    some = by_hand(400, 10, 4, dense_audio=dense, dense_visual=dense)
    labels = simulate_pseudo_labels(some, miss=miss, false_alarm=false_alarm, memory=memory, seed=seed)
    draws = 400 * 2 * (1 + 9 * (1 - memory))                                   # independent ones
    for x in labels.values():
        for got, want in ((1 - x[..., ::2].mean(), miss), (x[..., 1::2].mean(), false_alarm)):
            assert abs(got - want) < 6 * math.sqrt(want * (1 - want) / draws) * 1.6 + 1e-3


def test_errors_last():
    dense = np.ones((300, 10, 4), np.uint8)
    some = by_hand(300, 10, 4, dense_audio=dense, dense_visual=dense)
    def same(memory):
        x = simulate_pseudo_labels(some, miss=.5, memory=memory)["audio"]
        return (x[:, 1:] == x[:, :-1]).mean()
    assert same(0) == pytest.approx(.5, abs=.03) and same(.8) == pytest.approx(.9, abs=.02) and same(1) == 1


def test_the_weak_label_is_the_limit(clips):
    labels = simulate_pseudo_labels(clips, false_alarm=1.)
    for m, d in (("audio", clips.dense_audio), ("visual", clips.dense_visual)):
        assert not (labels[m].any(1) & (clips.weak == 0)).any() and (d.any(1) & (clips.weak == 0)).any()


def test_without_errors_it_is_the_truth(clips):
    labels = simulate_pseudo_labels(clips, miss=0, false_alarm=0)
    quality = pseudo_quality(labels, clips)
    assert (quality[["precision", "recall", "precision, video", "recall, video"]] == 100).all(axis=None)
    assert (quality["recall of all"] < 100).all()
    for m, y in zip(FOLDERS, clips.modality_labels()): np.testing.assert_array_equal(labels[m].any(1), y * clips.weak)


def test_labels_depend_on_seed_and_video_only(clips):
    whole = simulate_pseudo_labels(clips, seed=5)
    some = simulate_pseudo_labels(clips[[77, 3, 20]], PseudoParams(seed=5))
    for m in whole: np.testing.assert_array_equal(some[m], whole[m][[77, 3, 20]])
    assert labels_hash(whole) != labels_hash(simulate_pseudo_labels(clips, seed=6))
    assert labels_hash(whole) == labels_hash(simulate_pseudo_labels(clips, seed=5))
    assert labels_hash(whole) != labels_hash(dict(audio=whole["visual"], visual=whole["audio"]))


def test_more_misses_only_take_away(clips):
    few, many = simulate_pseudo_labels(clips, miss=.1), simulate_pseudo_labels(clips, miss=.4)
    for m in few: assert (many[m] <= few[m]).all() and many[m].sum() < few[m].sum()


def test_the_two_modalities_err_apart():
    dense = np.ones((200, 5, 3), np.uint8)
    x = simulate_pseudo_labels(by_hand(200, 5, 3, dense_audio=dense, dense_visual=dense), miss=.5)
    assert abs((x["audio"] == x["visual"]).mean() - .5) < .05


def test_draws_are_uniform_and_of_the_video():
    u = draw_uniforms(["a" * 11 + "_0_10", "b" * 11], 0, (2, 2, 10, 25))
    assert u.shape == (2, 2, 2, 10, 25) and not np.array_equal(u[0], u[1]) and 0 <= u.min() and u.max() < 1
    np.testing.assert_array_equal(u[0], draw_uniforms(["a" * 11], 0, (2, 2, 10, 25))[0])
    np.testing.assert_array_equal(lasting(u, 0.), u[:, 0])


def test_nothing_is_reported_where_a_video_has_ended():
    dense = np.ones((2, 5, 3), np.uint8)
    some = by_hand(2, 5, 3, dense_audio=dense, dense_visual=dense, lengths=[2, 5])
    x = simulate_pseudo_labels(some, miss=0, false_alarm=1)["audio"]
    assert x[0, :2].all() and not x[0, 2:].any() and x[1].all()


def test_real_videos_need_files():
    with pytest.raises(InputError, match="nothing is known second by second.*VALOR's files"): simulate_pseudo_labels(by_hand())


def test_real_labels_and_simulated_features(llp):
    "Training clips made from real annotations carry the simulator's hidden truth"
    clips = simulate(12, annotations=load_annotations(llp), frames=None)
    taught = label_clips(clips)
    assert taught.mark == f"{clips.mark}; {PseudoParams().mark}" and "real annotations 2024" in taught.mark
    assert (taught.labels["audio"] <= clips.weak).all() and taught.labels["pseudo_audio"].any()


@pytest.mark.parametrize("kw, message", [
    ({"miss": -.1}, "miss: -0.1 is not possible. expected a number from 0 to 1"), ({"miss": "0.1"}, "miss: '0.1'"),
    ({"false_alarm": math.nan}, "false_alarm: nan"), ({"memory": 2}, "memory: 2"), ({"memory": True}, "memory: True"),
    ({"seed": -1}, "seed: -1 is not possible"), ({"seed": .5}, "seed: 0.5"), ({"seed": True}, "seed: True")])
def test_impossible_parameters_are_refused(kw, message):
    with pytest.raises(InputError, match=message): PseudoParams(**kw)


def test_parameters_are_plain_hashable_and_marked():
    p = PseudoParams(np.float32(.5), 0, seed=np.int64(2))
    assert type(p.miss) is type(p.false_alarm) is float and type(p.seed) is int and hash(p) == hash(PseudoParams(.5, 0., seed=2))
    assert p.mark == "simulated pseudo-labels miss 0.5, false alarm 0, seed 2"
    assert replace(p, memory=.1).mark.endswith("memory 0.1")


def test_quality_by_hand():
    "Two weak classes of two, three seconds; sound: 3 of 4 found and 1 wrong of 2 absent"
    audio = np.array([[[1, 0], [1, 1], [1, 0]]], np.uint8)
    reported = np.array([[[1, 0], [0, 1], [1, 1]]], np.uint8)
    some = by_hand(1, dense_audio=audio, dense_visual=0 * audio)
    q = pseudo_quality({"audio": reported, "visual": 0 * reported}, some)
    assert q.loc["audio"].tolist() == [75, 75, 25, 50, 100, 100, 75]
    assert q.loc["visual"].isna().sum() == 6 and q.loc["visual", "false alarms"] == 0


# ---- on the clips

def test_targets_are_the_maximum_over_seconds(clips):
    taught = label_clips(clips)
    for m in FOLDERS:
        np.testing.assert_array_equal(taught.labels[m], taught.labels[f"pseudo_{m}"].max(1))
        assert taught.labels[m].dtype == taught.labels[f"pseudo_{m}"].dtype == np.float32
    assert taught.weak is clips.weak and set(clips.labels) == {"hidden"} and "hidden" in taught.labels


def test_the_source_says_what_the_clips_were_taught(clips):
    labels = simulate_pseudo_labels(clips)
    real = replace(clips, source={"simulated": False, "mark": "", "fingerprint": "f"})
    a, b = with_pseudo_labels(real, labels, "simulated pseudo-labels"), with_pseudo_labels(real, labels)
    assert a.source["simulated"] and a.mark == "simulated pseudo-labels"       # simulated labels on real features
    assert not b.source["simulated"] and b.mark == ""                          # real ones on real ones
    assert with_pseudo_labels(clips, labels).mark == clips.mark                # real ones on simulated features
    assert b.source["fingerprint"] != "f" and b.source["pseudo_labels"]["fingerprint"] == labels_hash(labels)
    other = simulate_pseudo_labels(clips, seed=1)
    assert with_pseudo_labels(real, other).source["fingerprint"] != b.source["fingerprint"]


@pytest.mark.parametrize("change, message", [
    (lambda x: {"audio": x["audio"]}, "no visual labels"), (lambda x: {**x, "audio": x["audio"][:3]}, r"labels\['audio'\]: has shape \(3, 10, 25\)"),
    (lambda x: {**x, "visual": 2 * x["visual"]}, r"labels\['visual'\]: holds other values"), (lambda x: {**x, "visual": x["visual"].max(1)}, "N,T,C")])
def test_labels_that_do_not_fit_are_refused(clips, change, message):
    with pytest.raises(InputError, match=message): with_pseudo_labels(clips, change(simulate_pseudo_labels(clips)))


# ---- the loss

def toy_batch(clips, n=6):
    torch.manual_seed(0)
    batch = label_clips(clips).batch(range(n))
    p = torch.rand(n, 10, 2, 25)
    return Parsing(p.amax((1, 2)), p[:, :, 0].mean(1), p[:, :, 1].mean(1), p.requires_grad_()), batch


def test_dense_terms_equal_plain_python(clips):
    parsing, batch = toy_batch(clips)
    terms = DenseLoss(GuidedLoss(), w_visual=3.)(parsing, batch)
    for m, (k, w) in enumerate((("audio", 1), ("visual", 3))):
        pairs = zip(parsing.segments[:, :, m].flatten().tolist(), batch.labels[f"pseudo_{k}"].flatten().tolist())
        want = [-math.log(p if y else 1 - p) for p, y in pairs]
        assert terms[f"dense_{k}"].item() == pytest.approx(w * sum(want) / len(want), rel=1e-5)


def test_own_terms_of_the_method_stay(clips):
    parsing, batch = toy_batch(clips)
    base = GuidedLoss(w_audio=2.)
    terms = DenseLoss(base)(parsing, batch)
    assert list(terms) == ["audio", "visual", "video", "dense_audio", "dense_visual"]
    for k, x in base(parsing, batch).items(): assert torch.equal(terms[k], x)
    assert list(DenseLoss(base, w_audio=0)(parsing, batch)) == ["audio", "visual", "video", "dense_visual"]


def test_each_dense_term_moves_its_own_modality(clips):
    parsing, batch = toy_batch(clips)
    terms = DenseLoss(GuidedLoss())(parsing, batch)
    for m, k in enumerate(("dense_audio", "dense_visual")):
        g = torch.autograd.grad(terms[k], parsing.segments, retain_graph=True)[0]
        assert g[:, :, m].abs().min() > 0 and not g[:, :, 1 - m].any()


def test_padded_seconds_do_not_count():
    p, y = torch.rand(2, 5, 3), (torch.rand(2, 5, 3) < .5).float()
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    want = torch.cat([dense_bce(p[0, :2][None], y[0, :2][None])[None].expand(2), dense_bce(p[1:], y[1:])[None].expand(5)]).mean()
    assert dense_bce(p, y, mask).item() == pytest.approx(want.item(), rel=1e-5)
    assert dense_bce(p, y, torch.ones_like(mask)).item() == pytest.approx(dense_bce(p, y).item(), rel=1e-5)
    batch = Batch(None, None, None, torch.ones(2, 3), None, {"pseudo_audio": y, "pseudo_visual": y}, mask)
    parsing = Parsing(*(torch.full((2, 3), .5),) * 3, torch.stack([p, p], 2))
    assert DenseLoss(GuidedLoss())(parsing, batch)["dense_audio"].item() == pytest.approx(want.item(), rel=1e-5)


def test_the_wrapped_loss_answers_for_itself(clips):
    loss = DenseLoss(JoMoLDLoss(w_audio=2.), w_audio=.5)
    assert loss.w_audio == 2 and loss.w_contrast == 1 and loss.w_dense["audio"] == .5
    with pytest.raises(AttributeError): loss.nothing        # noqa: B018
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))): assert twin.w_audio == 2 and twin.w_dense == loss.w_dense
    batch = label_clips(clips).batch(range(3))
    assert torch.equal(loss.targets(batch)[0], batch.labels["audio"])


def test_it_carries_msdu_and_is_carried_by_it():
    some = micro.toy_clips(12)
    taught = with_pseudo_labels(some, {m: some.dense_audio for m in FOLDERS})
    base = dict(epochs=1, batch_size=6, device="cpu")
    for make in (lambda: MSDULoss(DenseLoss(GuidedLoss())), lambda: DenseLoss(MSDULoss(GuidedLoss()))):
        log = Learner(DGMNet(micro.toy_han()), taught, make(), **base).fit().history[0]["loss"]
        assert set(log) == {"audio", "visual", "video", "ms_audio", "ms_visual", "dense_audio", "dense_visual"}


def test_training_follows_the_dense_labels():
    "Labels that say 'second 0 only' are learned although the weak label covers the whole video"
    some = micro.toy_clips(60, seed=1)
    labels = {m: some.dense_audio.copy() for m in FOLDERS}
    labels["visual"][:] = 0
    loss = {}
    for name, (clips, criterion) in {"weak": (some, GuidedLoss()), "dense": (with_pseudo_labels(some, labels), DenseLoss(GuidedLoss()))}.items():
        model = Learner(micro.toy_han(), clips, criterion, epochs=6, lr=5e-3, device="cpu").fit().model.eval()
        loss[name] = model(*some.batch(range(60)).features).segments[:, :, 1].mean().item()
    assert loss["dense"] < .5 * loss["weak"]


def test_training_without_labels_is_refused(clips):
    parsing, _ = toy_batch(clips)
    with pytest.raises(InputError, match="no pseudo-labels in the batch.*with_pseudo_labels"): DenseLoss(GuidedLoss())(parsing, clips.batch(range(6)))


@pytest.mark.parametrize("kw", [{"w_audio": -1}, {"w_visual": math.inf}, {"w_audio": math.nan}])
def test_impossible_weights_are_refused(kw):
    with pytest.raises(InputError, match=next(iter(kw))): DenseLoss(GuidedLoss(), **kw)


