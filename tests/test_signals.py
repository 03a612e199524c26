"""Composed timelines of real signals: bundle, recipe, truth, features, marks; and the reference values of the bundle."""
import io
import math
import multiprocessing
import os
from dataclasses import replace
from importlib import metadata

import numpy as np
import pytest
import torch

from avvp_nb.cli import main
from avvp_nb.core import InputError, shared
from avvp_nb.data import signals, signals_features
from avvp_nb.data.annotations import with_facts
from avvp_nb.data.signals import Recipe, compose, open_bundle, render_sound, seen_truth, toy_bundle
from avvp_nb.data.signals_bounds import labels_only, signals_facts, signals_floors
from avvp_nb.data.signals_features import signals_clips
from avvp_nb.data.sim_files import check_mark
from avvp_nb.data.sources import check_splits
from avvp_nb.media import hear, see
from avvp_nb.metrics import evaluate_videos

pytest.importorskip("soundfile")
pytest.importorskip("PIL.Image")
WEAK = {"sound": "log-mel", "pictures": "thumbnail"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory): return toy_bundle(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def real():
    folder = shared("real_signals")
    if not folder.is_dir(): pytest.skip(f"{folder.name}/ not found: set AVVP_SHARED to the folder that holds it")
    return open_bundle(folder)


def _nets():
    for package in (hear.PACKAGE, see.PACKAGE, "onnxruntime"):
        try: metadata.distribution(package.split("==")[0])
        except metadata.PackageNotFoundError: pytest.skip(f"{package} is not installed")


# ---- the bundle

def test_a_manifest_with_changed_bytes_is_refused_or_says_the_same(toy, tmp_path):
    good = (toy.root / signals.MANIFEST).read_bytes()
    for name in ("audio", "visual"): (tmp_path / name).symlink_to(toy.root / name)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        data = bytearray(good)
        for k in rng.integers(len(data), size=3): data[k] = rng.integers(256)
        (tmp_path / signals.MANIFEST).write_bytes(data)
        try: b = open_bundle(tmp_path)
        except InputError as e:
            refused += 1
            assert "\n" not in str(e) and str(tmp_path) in str(e)
        else: assert len(b.items) == len(toy.items)      # a source, an attribution, a length
    assert refused > 30


def test_a_file_that_changes_after_opening_is_noticed(tmp_path):
    b = toy_bundle(tmp_path)
    item = b.of("visual", "beep", "train")[0]
    (tmp_path / item.file).write_bytes(b"other")
    with pytest.raises(InputError, match="is not the file that the manifest names"): signals.view_pictures(b, item.file)


def test_the_doctor_names_every_damaged_file_and_ends_with_status_1(tmp_path, capsys):
    b = toy_bundle(tmp_path / "toy")
    assert main(["doctor", str(b.root), "--dataset", "signals"]) == 0
    for x in b.items[:3]: (b.root / x.file).write_bytes(b"")
    (b.root / b.items[3].file).unlink()
    assert main(["doctor", str(b.root), "--dataset", "signals"]) == 1
    out = capsys.readouterr().out
    assert "3 is not the file that the manifest names" in out and "1 no such file" in out, out
    assert main(["doctor", str(b.root), "--dataset", "signals", "--quick"]) == 1
    for args in (["pack", str(b.root), str(tmp_path / "p"), "--dataset", "signals"],
                 ["simulate", str(tmp_path / "q"), "--dataset", "signals", "--videos", "1", "1", "1"]):
        assert main(args) == 2 and not (tmp_path / args[2][-1]).exists()
    assert main(["simulate", str(tmp_path / "q"), "--dataset", "signals"]) == 0


# ---- the recipe

@pytest.mark.parametrize("recipe", [Recipe(), Recipe(7), Recipe(seconds=5), Recipe(seconds=23, counts=(.5, .5)),
                                    Recipe(classes=("hiss", "beep"), counts=(0., 1.))])
def test_timelines_keep_the_recipe(toy, recipe):
    names = recipe.of(toy)
    for i in range(60):
        t = compose(toy, "train", i, recipe)
        assert t.seconds == recipe.seconds and t.classes == names and compose(toy, "train", i, recipe) == t
        wave, heard = render_sound(toy, t)
        seen = seen_truth(t)
        assert wave.shape == (16_000 * recipe.seconds,) and np.isfinite(wave).all() and wave.dtype == np.float32
        assert heard.shape == seen.shape == (recipe.seconds, len(names)) and seen.sum(1).max() <= 1
        assert 1 <= (heard | seen).any(0).sum() <= len(recipe.counts)
        for h in t.heard:
            assert 0 <= h.start < h.end <= recipe.seconds and recipe.loud[0] <= h.level <= recipe.loud[1]
            for p in h.pieces: assert 0 <= p.at and p.at + p.length <= 16_000 * (h.end - h.start) and p.length > 0
        spans = np.zeros_like(heard)
        for h in t.heard: spans[h.start:h.end, h.label] = 1
        assert (heard <= spans).all()                     # nothing is heard where nothing was put


def test_splits_share_no_recording(real):
    used = {s: set().union(*(signals.recordings_of(real, compose(real, s, i)) for i in range(200))) for s in ("train", "val", "test")}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")): assert not used[a] & used[b]
    assert {k[2] for k in used["test"] if k[:2] == ("audio", "Speech")} <= {"speaker:lucas", "speaker:yweweler"}


def test_silent_seconds_of_a_span_are_not_heard(toy):
    h = signals.Heard(0, 0, 3, (signals.Piece(toy.of("audio", "beep", "train")[0].file, 0, 0, 16_000),), 0.)
    t = replace(compose(toy, "train", 0), heard=(h,))
    assert render_sound(toy, t)[1][:, 0].tolist() == [1, 0, 0] + [0] * 7


def test_real_timelines_have_the_seconds_that_the_bundle_measured(real):
    plans = [compose(real, "test", i) for i in range(1000)]
    heard, seen = (np.array(x) for x in zip(*((render_sound(real, t)[1], seen_truth(t)) for t in plans)))
    for x, printed in ((heard, 7.1), (seen, 5.5), (heard & seen, 3.8)):
        each = x.sum((1, 2)).astype(float)
        error = each.std() * math.sqrt(1 / 300 + 1 / 1000)          # theirs are 300 other timelines
        assert abs(each.mean() - printed) < 3 * error, (each.mean(), printed, error)
    assert abs((heard | seen).max(1).sum(1).mean() - 1.8) < .1


def test_real_floors_are_those_of_the_bundle(real):
    "Rows of labels alone, within three standard errors of the difference of two draws of 300 timelines"
    clips = labels_only(real, "test", 300)
    table = signals_floors(clips)
    printed = {"nothing": 9.69, "weak label, audio only": 27.21, "weak label, visual only": 23.43,
               "weak label, both modalities": 37.77, "true tags per modality, all seconds": 53.68}
    weak, a, v = np.uint8(clips.weak), clips.dense_audio, clips.dense_visual
    throughout = lambda x: np.repeat(x[:, None], 10, 1)
    predicted = {"nothing": (0 * a, 0 * v), "weak label, audio only": (throughout(weak), 0 * v),
                 "weak label, visual only": (0 * a, throughout(weak)), "weak label, both modalities": (throughout(weak),) * 2,
                 "true tags per modality, all seconds": (throughout(a.max(1)), throughout(v.max(1)))}
    for name, p in predicted.items():
        each = 100 * evaluate_videos(*p, a, v)
        columns = [(level, k) for level in ("segment", "event") for k in ("A", "V", "AV", "Type@AV", "Event@AV")]
        own = each[columns].mean(axis=1)
        assert own.mean() == pytest.approx(table.loc[name, "AVG"])
        assert abs(table.loc[name, "AVG"] - printed[name]) < 3 * own.std() * math.sqrt(2 / 300), name


# ---- features and clips

def test_smaller_sets_are_the_beginning_of_larger_ones(toy, tmp_path):
    a = signals_clips(25, "val", toy, cache=tmp_path / "a", **WEAK)
    b = signals_clips(3, "val", toy, cache=tmp_path / "b", **WEAK)
    for k in ("audio", "frames", "motion", "weak", "dense_audio", "dense_visual"):
        np.testing.assert_array_equal(getattr(a, k)[:3], getattr(b, k))
    assert a.source["fingerprint"] != b.source["fingerprint"]
    again = signals_clips(25, "val", toy, cache=tmp_path / "a", **WEAK)
    np.testing.assert_array_equal(again.audio, a.audio)


def _compute(root, cache, queue):
    c = signals_clips(45, "train", root, cache=cache, **WEAK)
    queue.put(float(np.abs(c.audio).sum()))


def test_two_processes_share_a_cache(toy, tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    both = [context.Process(target=_compute, args=(toy.root, tmp_path, queue)) for _ in range(2)]
    for p in both: p.start()
    found = [queue.get(timeout=120) for _ in both]
    for p in both: p.join()
    assert found[0] == found[1]
    parts = [p for p in tmp_path.rglob("*") if p.is_file() and "locks" not in p.parts]
    assert len(parts) == 3 + 2 and not any(p.suffix == ".part" for p in parts)     # 45 timelines, 24 pictures


def test_what_a_killed_process_leaves_is_swept(toy, tmp_path):
    signals_clips(5, "train", toy, cache=tmp_path, **WEAK)
    folder = next(p.parent for p in tmp_path.rglob("log-mel-train-*.npz"))
    dead = folder / f".log-mel-train-000020.npz.{2**22 + 5}.0123abcd.part"
    dead.write_bytes(b"half")
    os.utime(dead, (1, 1))
    signals_clips(25, "train", toy, cache=tmp_path, **WEAK)
    assert not dead.exists()


def _part(bundle):
    "Two files of each class, modality and split"
    kept = [x for s in ("train", "val", "test") for c in (*bundle.classes, signals.BACKGROUND) for m in ("audio", "visual")
            for x in bundle.of(m, c, s)[:2]]
    return signals.Bundle(bundle.root, tuple(sorted(kept)), bundle.classes, "part of " + bundle.fingerprint)


def test_the_mark_is_of_a_provenance_of_its_own(toy, real, tmp_path):
    c = signals_clips(4, "train", _part(real), cache=tmp_path, **WEAK)
    assert c.mark.startswith("real signals, composed timelines") and "simulated" not in c.mark and c.mark
    assert c.source["provenance"] == "real signals, composed timelines" and c.source["simulated"] is False
    check_mark(c.source, "x")
    made = signals_clips(4, "train", toy, cache=tmp_path, **WEAK)
    assert made.source["simulated"] is True and "simulated" in made.mark      # nothing real is in the toy
    check_mark(made.source, "x")


def test_splits_can_be_registered_and_scored(toy, tmp_path):
    splits = {s: signals_clips(6, s, toy, cache=tmp_path, **WEAK) for s in ("train", "val", "test")}
    check_splits("toy", splits)
    assert splits["train"].oracle and not splits["test"].oracle
    assert len({c.source["fingerprint"] for c in splits.values()}) == 3


def test_identity_knows_what_changes_the_data(toy, tmp_path):
    other = toy_bundle(tmp_path, seed=1)
    of = signals_features.signals_identity
    made = [of(toy), of(other), of(toy, Recipe(1)), of(toy, sound="log-mel"), of(toy, pictures="thumbnail"), of(toy, sound="yamnet-1024")]
    assert len({str(sorted(x.items())) for x in made}) == len(made)
    assert str(tmp_path) not in str(made)


def test_features_are_those_of_the_back_end(toy, tmp_path):
    _nets()
    from avvp_nb.media.zeroshot import Small
    of = Small()
    for frames in ("pooled", "full"):
        c = signals_clips(2, "test", toy, sound="yamnet-1024", cache=tmp_path, frames=frames)
        t = compose(toy, "test", 1)
        x, motion, _ = of.pictures(signals.render_pictures(toy, t))
        if frames == "pooled": x = x.reshape(10, 8, -1).mean(1)
        np.testing.assert_allclose(c.frames[1], x, atol=4e-3)            # half precision in the cache
        np.testing.assert_allclose(c.motion[1], motion, atol=.02)
        np.testing.assert_allclose(c.audio[1], of.sound(render_sound(toy, t)[0])[0], atol=4e-3)


# ---- redrawing recordings

def test_redraws_have_mean_one_and_move_whole_recordings(real):
    used = [signals.recordings_of(real, compose(real, "test", i)) for i in range(200)]
    rng = np.random.default_rng(0)
    w = np.array([signals.redrawn(real, "test", used, rng) for _ in range(300)])
    assert w.min() >= 0 and abs(w.mean() - 1) < .15
    same = [i for i, s in enumerate(used) if s == used[0]]
    for i in same: np.testing.assert_array_equal(w[:, i], w[:, 0])


# ---- the data card

def test_the_card_holds_what_is_counted(real, request):
    card = (request.config.rootpath / "data_cards" / "real_signals.md").read_text(encoding="utf-8")
    assert with_facts(card, signals_facts(real)) == card


# ---- reference values of the bundle's README

def _fit(x, y, penalty, C):
    "Multinomial logistic regression, classes weighted evenly"
    x, y = torch.from_numpy(x).float(), torch.from_numpy(y)
    w, c = torch.zeros(x.shape[1], C, requires_grad=True), torch.zeros(C, requires_grad=True)
    balance = 1 / torch.bincount(y, minlength=C).float()
    balance = balance / balance.mean()
    o = torch.optim.LBFGS([w, c], max_iter=200, line_search_fn="strong_wolfe")
    def loss():
        o.zero_grad()
        value = torch.nn.functional.cross_entropy(x @ w + c, y, weight=balance) + penalty * (w**2).sum() / 2
        value.backward()
        return value
    o.step(loss)
    return w.detach().numpy(), c.detach().numpy()


def _recall(p, y): return 100 * np.mean([(p[y == c] == c).mean() for c in np.unique(y)])


def _probe(train, val, test):
    "Mean recall on test of a linear probe; the strongest penalty among those that are best on val"
    m, s = train[0].mean(0), train[0].std(0) + 1e-6
    rows = []
    for penalty in (10., 1., .1, 1e-2, 1e-3):
        w, c = _fit((train[0] - m) / s, train[1], penalty, 10)
        rows.append([_recall(((x - m) / s @ w + c).argmax(1), y) for x, y in (val, test)])
    return max(rows, key=lambda r: r[0])[1]


def _whole_sounds(bundle, ear):
    "{split: (embeddings, log-mel, classes)}; five digits of one speaker in a row, all others alone"
    from avvp_nb.media.sound import log_mel
    out = {}
    for split in ("train", "val", "test"):
        rows = []
        for c, name in enumerate(bundle.classes):
            items = bundle.of("audio", name, split)
            groups = [[x] for x in items]
            if name == "Speech":
                groups = []
                for r in sorted({x.recording for x in items}):
                    own = [x for x in items if x.recording == r]
                    groups += [own[k:k + 5] for k in range(0, len(own) // 5 * 5, 5)]
            for g in groups:
                x = np.concatenate([signals._decoded(bundle, i.file) for i in g])
                x = np.pad(x, (0, max(0, hear.NEEDED - len(x))))
                L = log_mel(x)
                rows.append((ear.patches(x)[1].mean(0), np.concatenate([L.mean(0), L.std(0)]), c))
        out[split] = tuple(np.array(x) for x in zip(*rows))
    return out


@pytest.mark.slow
def test_reference_values_of_whole_sounds(real):
    _nets()
    parts = _whole_sounds(real, hear.Yamnet())
    assert len(parts["test"][2]) == 105
    for k, (low, high) in enumerate(((85.3, 95.6), (69.8, 84.1))):
        found = _probe(*[(parts[s][k].astype(float), parts[s][2]) for s in ("train", "val", "test")])
        print(f"{('YAMNet', 'log-mel')[k]}: {found:.1f} in [{low}, {high}]")
        assert low <= found <= high


@pytest.mark.slow
def test_reference_values_of_whole_pictures(real):
    """The probe on EfficientNet's features, and on thumbnails.

    Penalties that are equal on val give 97.2 to 98.1 on test. The README's 99.0 was met once with ImageNet's colour scale (mean
    .485 ..., deviation .229 ...), where such penalties give 97.6 to 99.0. The network was made for (x - 127)/128, which this
    library uses: on the seven classes of ImageNet the right kinds get 0.69 of the probability with it and 0.65 with the other.
    """
    _nets()
    from PIL import Image
    eye, parts = see.LiteNet(), {}
    for split in ("train", "val", "test"):
        items = [(c, x) for c, name in enumerate(real.classes) for x in real.of("visual", name, split)]
        images = [np.asarray(Image.open(io.BytesIO(real.read(x.file))).convert("RGB")) for _, x in items]
        small = np.array([np.asarray(Image.fromarray(x).resize((256, 256))) for x in images])
        parts[split] = eye.look(images)[0], signals_features.thumbnails(small), np.array([c for c, _ in items])
    assert len(parts["test"][2]) == 189
    for k, (low, high) in enumerate(((97.6, 100), (54.2, 68.1))):
        found = _probe(*[(parts[s][k].astype(float), parts[s][2]) for s in ("train", "val", "test")])
        print(f"{('EfficientNet-lite0', 'thumbnail')[k]}: {found:.1f} in [{low}, {high}]")
        assert low <= found <= high
