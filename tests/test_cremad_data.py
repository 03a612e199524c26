"""CREMA-D: lists, splits and their defects, spectrograms against the released code, frames, files that are wrong; the simulator."""
import json
import shutil
import subprocess
import sys
import wave
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from conftest import close

from avvp_nb.cli import main
from avvp_nb.core import InputError, asset, shared
from avvp_nb.data import cremad_files
from avvp_nb.data.cremad import (
    CREMAD_CLASSES,
    SILENT,
    VARIANTS,
    CremadClips,
    constant_answers,
    cremad_split,
    defects,
    hold_out,
    labels_of,
    official_split,
    parse_stem,
    read_split,
    speaker_split,
    stem_at,
)
from avvp_nb.data.cremad_files import (
    FRAMES,
    SOUND,
    choose_frames,
    chosen_files,
    cut_frames,
    evaluation_picture,
    extract_frames,
    find_clips,
    load_cremad,
    random_box,
    read_picture,
    read_sound,
    resample,
    silent_clips,
    spectrogram,
    training_picture,
)
from avvp_nb.data.cremad_pack import FORMAT, extract_all, open_cremad_pack, pack_cremad, pack_note
from avvp_nb.data.cremad_simulate import (
    CremadParams,
    ceilings,
    cremad_mark,
    patterns,
    shown,
    sim_parts,
    simulate_cremad,
    write_cremad,
)
from avvp_nb.data.cremad_task import FrameClips, one_second
from avvp_nb.data.sources import DataSpec, identify
from avvp_nb.media.extras import optional


@pytest.fixture(scope="module")
def lists():
    folder = shared("cremad")
    if not folder.is_dir(): pytest.skip("cremad/ not found")
    return folder


# ---- lists

def test_the_split_in_the_package_is_the_released_one_row_by_row(lists):
    assert official_split() == read_split(lists)


def test_counts_of_the_released_lists(lists):
    summary = json.loads((lists / "summary.json").read_text())
    split = official_split()
    assert {k: len(v) for k, v in split.items()} == {k: summary["counts"][k] for k in ("train", "test")}
    everything = split["train"] + split["test"]
    assert Counter(parse_stem(s).intensity for s in everything) == summary["intensity"]
    table = defects(split)["count"]
    assert table.iloc[1] == summary["test_clips_whose_actor_and_sentence_are_in_train"]
    assert table.iloc[2] == summary["test_clips_whose_actor_sentence_emotion_is_also_in_train"]
    assert split["train"].index(SILENT) == 4295 - 1
    missing = {stem_at(n) for n in range(91 * len(VARIANTS))} - set(everything)
    assert Counter(s[:4] for s in missing) == summary["defects"][1]["detail"]
    for row in (lists / "class_stats.csv").read_text().split()[1:]:
        index, code, train, test, _ = row.split(",")
        assert CREMAD_CLASSES[int(index)] == code
        assert [(labels_of(split[k]) == int(index)).sum() for k in ("train", "test")] == [int(train), int(test)]
    assert constant_answers(split) == pytest.approx((105 / 744, 140 / 744))


def test_the_asset_says_where_it_is_from():
    held = json.loads(asset("cremad_split.json").read_text())
    assert "GeWu-Lab/OGM-GE_CVPR2022" in held["source"] and "Open Database License" in held["source"]
    assert sorted(held) == ["source", "test", "train"]


@pytest.mark.parametrize("seed", range(4))
def test_splits_of_our_own(seed):
    own, everything = speaker_split(seed), {s for v in official_split().values() for s in v}
    actors = {k: {s[:4] for s in v} for k, v in own.items()}
    assert not actors["train"] & (actors["val"] | actors["test"]) and not actors["val"] & actors["test"]
    assert set().union(*map(set, own.values())) == everything and sum(map(len, own.values())) == len(everything)
    held = hold_out(official_split(), seed=seed)
    assert not set(held["train"]) & set(held["val"]) and held["test"] == official_split()["test"]
    assert cremad_split("speakers", seed) == own
    released, looked_at = (cremad_split(k, seed) for k in ("official", "on_test"))
    assert released == {**official_split(), "val": []} and looked_at == {**official_split(), "val": official_split()["test"]}
    for part in own.values(): assert set(labels_of(part)) == set(range(6))


@pytest.mark.parametrize("stem", ["", "1001", "1001_IEO_NEU_LO", "1001_DFA_HAP_HI", "1000_DFA_HAP_XX", "1001_dfa_HAP_XX", "1001_DFA_HAP_XX\n",
                                  "../../../etc/passwd", "1001_DFA_HAP_XX/..", "１００１_DFA_HAP_XX"])
def test_what_no_clip_is_called(stem):
    with pytest.raises(InputError, match="is no clip of CREMA-D"): parse_stem(stem)


@pytest.mark.parametrize("text, says", [
    (b"", "lists no clips"), (b"\xff\xfe\x00", "cannot be read"), (b"1001_DFA_HAP_XX,SAD\n", "whose name says HAP"),
    (b"1001_DFA_HAP_XX,HAP,1\n", "3 fields"), (b"1001_DFA_HAP_XX,HAP\n\n", r"train.csv:2: 0 fields"), (b"a,HAP\n", "train.csv:1: 'a' is no clip"),
])
def test_lists_that_are_wrong(tmp_path, text, says):
    (tmp_path / "train.csv").write_bytes(text)
    (tmp_path / "test.csv").write_bytes(b"1002_DFA_HAP_XX,HAP\n")
    with pytest.raises(InputError, match=says): read_split(tmp_path)


def test_a_list_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="train.csv: no such file"): read_split(tmp_path)


# ---- sound

def test_spectrograms_are_the_released_ones(golden):
    case = golden("ogm_spectrogram")
    names = [k.removesuffix(".wave") for k in case if k.endswith(".wave")]
    assert len(names) == 4
    for name in names:
        x = case.get(f"{name}.resampled", case[f"{name}.wave"])
        close(case, f"{name}.spec", spectrogram(x))
        changed = case.info["values"][name]["columns_that_differ_with_reflect_padding"]
        close(case, f"{name}.spec_reflect_changed", spectrogram(x, "reflect")[:, changed])
        same = np.delete(np.arange(case[f"{name}.spec"].shape[1]), changed)
        np.testing.assert_array_equal(spectrogram(x, "reflect")[:, same], spectrogram(x)[:, same])


def test_resampling_is_that_of_soxr_but_for_the_first_two_samples(golden):
    case, k = golden("ogm_spectrogram"), "speech_rate_16000.resampled"
    ours = resample(case["speech_rate_16000.wave"], 16000)
    np.testing.assert_allclose(ours[2:], case[k][2:], **case.info["tolerance_by_array"][k])
    assert ours.shape == case[k].shape and np.abs(ours - case[k])[:2].max() < .011      # five times the tolerance


def wav(path, x, rate=16000, width=2, channels=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as f:
        f.setnchannels(channels)
        f.setsampwidth(width)
        f.setframerate(rate)
        raw = np.round(np.asarray(x) * (2 ** (8 * width - 1) - 1)).astype("<i8")
        if width == 1: raw = raw + 128
        f.writeframes(np.ascontiguousarray(raw.reshape(-1, 1)).view(np.uint8).reshape(-1, 8)[:, :width].tobytes())
    return path


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_sound_of_any_width_and_two_channels(tmp_path, width):
    x = np.random.default_rng(0).uniform(-1, 1, (900, 2))
    found, rate = read_sound(wav(tmp_path / "a.wav", x.reshape(-1), width=width, channels=2))
    assert rate == 16000 and found.shape == (900,)
    np.testing.assert_allclose(found, x.mean(1), atol=1.5 * 2. ** (1 - 8 * width) + 1e-6)


@pytest.mark.parametrize("make, says", [
    (lambda p: wav(p, []), "has no samples"), (lambda p: wav(p, np.zeros(9), 44100), "has 44,100 samples a second. expected 16,000"),
    (lambda p: p.write_bytes(b""), "a.wav: is empty"), (lambda p: p.mkdir(), "is a folder"), (lambda p: None, "no such file"),
])
def test_sound_that_is_wrong(tmp_path, make, says):
    make(tmp_path / "a.wav")
    with pytest.raises(InputError, match=says): read_sound(tmp_path / "a.wav")


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch):
    for module, package in (("soundfile", "soundfile"), ("av", "av"), ("PIL", "pillow")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(InputError, match=f"needs {package}.*pip install {package}"): optional(module, "this")
    (tmp_path / "a.wav").write_bytes(b"fLaC" + bytes(40))
    with pytest.raises(InputError, match="pip install soundfile"): read_sound(tmp_path / "a.wav")
    with pytest.raises(InputError, match="pip install av"): extract_frames("a.flv", tmp_path / "a")


def test_other_forms_of_sound(tmp_path):
    sf = pytest.importorskip("soundfile")
    x = np.random.default_rng(0).uniform(-1, 1, 900).astype(np.float32)
    for name, kind in (("a.wav", "FLOAT"), ("b.flac", "PCM_16")):
        sf.write(tmp_path / name, x, 16000, kind)
        np.testing.assert_allclose(read_sound(tmp_path / name)[0], x, atol=1e-4)
    (tmp_path / "c.wav").write_bytes(b"nothing that is sound")
    with pytest.raises(InputError, match="c.wav: cannot be read"): read_sound(tmp_path / "c.wav")


def test_the_room_needs_none_of_them():
    code = ("import sys; [sys.modules.__setitem__(k, None) for k in ('soundfile', 'av', 'PIL')]; "
            "import avvp_nb.data.cremad_files")
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("rate, to", [(16000, 22050), (44100, 22050), (22050, 16000), (8000, 22050)])
def test_resampling_keeps_what_both_rates_can_hold(rate, to):
    n, top = rate, min(rate, to) / 2
    t, s = np.arange(n) / rate, np.arange(to) / to
    for hertz in (50, .3 * top, .8 * top):
        y = resample(np.sin(2 * np.pi * hertz * t), rate, to)
        assert len(y) == to
        np.testing.assert_allclose(y[800:-800], np.sin(2 * np.pi * hertz * s)[800:-800], atol=2e-3)
    if to < rate: assert np.abs(resample(np.sin(2 * np.pi * 1.2 * top * t), rate, to)[800:-800]).max() < 1e-3
    assert len(resample(np.zeros(7), rate, to)) == -(-7 * to // rate)


# ---- files

STEMS = ["1001_IEO_NEU_XX", "1001_IEO_HAP_LO", SILENT]


@pytest.fixture
def root(tmp_path):
    "OGM-GE's folders with three clips of three frames"
    Image = pytest.importorskip("PIL.Image")
    for i, s in enumerate(STEMS):
        wav(tmp_path / SOUND / f"{s}.wav", .5 * np.sin(np.arange(20000) / (i + 2)) * (s != SILENT))
        (tmp_path / FRAMES / s).mkdir(parents=True)
        for k in (2, 0, 1): Image.new("RGB", (48, 36), (40 * k, 80 * i, 9)).save(tmp_path / FRAMES / s / f"{29 * k:05d}.jpg", quality=95)
    return tmp_path


def loaded(root, **kwargs): return load_cremad(root, STEMS, root / "cache", side=16, **kwargs)


def test_clips_are_what_the_files_hold(root):
    clips = loaded(root, frames=3)
    assert clips.ids == STEMS and clips.label.tolist() == [0, 1, 2] and silent_clips(clips) == [SILENT]
    np.testing.assert_allclose(clips.pictures[..., 0, 0, :].reshape(9, 3), [[40 * k, 80 * i, 9] for i in range(3) for k in range(3)], atol=4)
    x, _ = read_sound(root / SOUND / f"{STEMS[1]}.wav")
    np.testing.assert_array_equal(clips.spectrogram[1], spectrogram(resample(x, 16000)))
    assert {s: [p.name for p in files] for s, files in clips.whole.items()} == dict.fromkeys(STEMS, ["00000.jpg", "00029.jpg", "00058.jpg"])
    some = clips[[2, 0]]
    assert some.pictures.shape == (2, 3, 16, 16, 3) and some.label.tolist() == [2, 0] and some.whole is clips.whole


def test_the_cache_is_used_and_a_changed_file_is_read_again(root, monkeypatch):
    first, reads = loaded(root), []
    real = cremad_files.read_sound
    monkeypatch.setattr(cremad_files, "read_sound", lambda *a, **k: reads.append(a) or real(*a, **k))
    again = loaded(root)
    assert not reads and again.source == first.source
    assert isinstance(again.pictures, np.memmap)
    wav(root / SOUND / f"{STEMS[0]}.wav", .1 * np.ones(18000))
    changed = loaded(root)
    assert len(reads) == 3 and changed.source["fingerprint"] != first.source["fingerprint"]
    assert not list((root / "cache").glob("*.part"))
    for kwargs in (dict(frames=2), dict(frame_choice="middle"), dict(pad="reflect")):
        assert loaded(root, **kwargs).source["fingerprint"] != changed.source["fingerprint"]


def test_frames_do_not_depend_on_the_order_of_the_file_system(root):
    assert choose_frames(sorted(p.name for p in (root / FRAMES / STEMS[0]).iterdir()), 2) == ["00000.jpg", "00029.jpg"]
    assert loaded(root).pictures[0, 0, 0, 0, 0] < 5 and 36 < loaded(root, frame_choice="middle").pictures[0, 0, 0, 0, 0] < 44
    a, b = (loaded(root, frame_choice="random", seed=s).pictures[:, 0, 0, 0, 0] for s in (0, 0))
    assert a.tolist() == b.tolist()
    alone = load_cremad(root, STEMS[2:], root / "cache", frame_choice="random", side=16)
    assert alone.pictures[0, 0, 0, 0, 0] == a[2]


def break_sound(root): (root / SOUND / f"{STEMS[1]}.wav").unlink()
def break_folder(root): shutil.rmtree(root / FRAMES / STEMS[1])
def empty_folder(root): [p.unlink() for p in (root / FRAMES / STEMS[1]).iterdir()]
def no_samples(root): wav(root / SOUND / f"{STEMS[1]}.wav", [])
def other_rate(root): wav(root / SOUND / f"{STEMS[1]}.wav", np.zeros(9000), 8000)
def too_short(root): wav(root / SOUND / f"{STEMS[1]}.wav", np.zeros(9000))
def no_picture(root): (root / FRAMES / STEMS[1] / "00000.jpg").write_bytes(b"no picture")


@pytest.mark.parametrize("spoil, says", [
    (break_sound, r"HAP_LO.wav: no such file of sound, one of 1 clips that are missing.*skip_missing=True"),
    (break_folder, "1001_IEO_HAP_LO: no such folder of frames, one of 1"), (empty_folder, "1001_IEO_HAP_LO: holds no frames, one of 1"),
    (no_samples, "HAP_LO.wav: has no samples"), (other_rate, "HAP_LO.wav: has 8,000 samples a second"), (too_short, r"HAP_LO.wav: lasts 0.56 s"),
    (no_picture, "00000.jpg: cannot be read as a picture"),
])
def test_files_that_are_missing_or_wrong_are_named(root, spoil, says):
    spoil(root)
    with pytest.raises(InputError, match=says): loaded(root)
    assert not (root / "cache").exists() or not list((root / "cache").iterdir())


def test_missing_clips_can_be_left_out_and_are_counted(root):
    break_sound(root)
    clips = loaded(root, skip_missing=True)
    assert clips.ids == [STEMS[0], STEMS[2]] and clips.source["missing"] == 1
    with pytest.raises(InputError, match="one of 1 clips that are missing"): find_clips(root, STEMS[1:2], skip_missing=True)
    with pytest.raises(InputError, match=f"no folder {SOUND}"): find_clips(root / "cache", STEMS)


@pytest.mark.parametrize("kwargs, says", [
    (dict(frame_choice="last"), "frame_choice"), (dict(pad="mirror"), "pad"), (dict(frames=0), "frames: 0 is not possible"),
    (dict(frames=4), "3 frames. expected 4 or more"),
])
def test_impossible_options(root, kwargs, says):
    with pytest.raises(InputError, match=says): loaded(root, **kwargs)


# ---- cuts of whole frames

def noise_frames(root):
    "Three frames of noise a clip, of 48 x 36"
    Image = pytest.importorskip("PIL.Image")
    for i, p in enumerate(sorted((root / FRAMES).rglob("*.jpg"))):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (36, 48, 3), np.uint8)).save(p, quality=95)


def test_a_cut_is_a_part_of_the_frame_on_disk_then_resized(root):
    "As the release does it: crop, bilinear resize, and a mirror; nothing comes from outside of the part"
    noise_frames(root)
    frame = read_picture(root / FRAMES / STEMS[0] / "00000.jpg")
    for seed in range(20):
        box = random_box(48, 36, rng := np.random.default_rng(seed))
        want = np.asarray(frame.crop(box).resize((16, 16), 2))
        found = training_picture(frame, np.random.default_rng(seed), 16)
        np.testing.assert_array_equal(found, want[:, ::-1] if rng.random() < .5 else want)
    alone = np.asarray(frame)[box[1]:box[3], box[0]:box[2]]
    np.testing.assert_array_equal(np.asarray(frame.crop(box)), alone)


@pytest.mark.parametrize("size", [(480, 360), (360, 480), (900, 300), (100, 1000)])
def test_boxes_are_drawn_as_the_release_draws_them(size):
    "torchvision's rule: ten tries, then the middle as wide or high as the aspect allows"
    (w, h), rng = size, np.random.default_rng(0)
    boxes = np.array([random_box(w, h, rng) for _ in range(500)])
    wide, high = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes >= 0).all() and (boxes[:, 2] <= w).all() and (boxes[:, 3] <= h).all()
    assert (wide * high >= .078 * w * h).all() and (np.abs(np.log(wide / high)) <= np.log(4 / 3) + .02).all()
    assert len(np.unique(boxes, axis=0)) > (250 if w < 2 * h < 4 * w else 50)
    if size == (100, 1000): assert [0, 433, 100, 566] in boxes.tolist()          # too narrow for most draws: the middle


def test_cuts_differ_by_frame_and_draw_and_are_of_the_chosen_frames(root):
    noise_frames(root)
    clips = loaded(root, frames=2)
    a, b, c = (cut_frames(clips.whole, STEMS, np.random.default_rng(s), 16) for s in (0, 0, 1))
    assert a.shape == (3, 2, 16, 16, 3) and np.array_equal(a, b) and not np.array_equal(a, c)
    assert not np.array_equal(a[0, 0], a[0, 1])                        # each frame is cut on its own
    for choice in ("first", "middle", "random"):
        own = loaded(root, frames=1, frame_choice=choice)
        shown = np.stack([evaluation_picture(read_picture(own.whole[s][0]), 16) for s in STEMS])
        np.testing.assert_array_equal(own.pictures[:, 0], shown)       # what is evaluated on is what is cut


# ---- the pack

@pytest.fixture
def packed(root):
    noise_frames(root)
    return pack_cremad(root, root / "pack", frames=2, stems=STEMS)


def test_a_pack_holds_pictures_to_the_bit_and_the_frames_as_they_are(root, packed):
    clips, direct = open_cremad_pack(packed, STEMS[::-1]), load_cremad(root, STEMS[::-1], root / "cache", 2)
    for k in ("spectrogram", "pictures", "label"): np.testing.assert_array_equal(getattr(clips, k), getattr(direct, k))
    assert {s: clips.whole[s] for s in STEMS} == {s: [p.read_bytes() for p in direct.whole[s]] for s in STEMS}
    a, b = (cut_frames(c.whole, c.ids, np.random.default_rng(3)) for c in (clips, direct))
    np.testing.assert_array_equal(a, b)
    note, size = pack_note(packed), {p.stem: p.stat().st_size for p in packed.glob("*.npy")}
    assert note["version"] == FORMAT == 2 and note["bytes"] == sum(p.stat().st_size for f in direct.whole.values() for p in f)
    head = 128                                                         # bytes of the header of each array
    assert size == {"spectrogram": head + 3 * 193_264, "pictures": head + 3 * 2 * 150_528, "frames": head + note["bytes"], "ends": head + 7 * 8}


def spoil_note(**change):
    def spoil(pack):
        note = json.loads((pack / "manifest.json").read_text())
        (pack / "manifest.json").write_text(json.dumps({k: v for k, v in {**note, **change}.items() if v is not None}))
    return spoil


def spoil_ends(pack): np.save(pack / "ends.npy", np.load(pack / "ends.npy")[::-1].copy())
def cut_off(pack): (pack / "frames.npy").write_bytes((pack / "frames.npy").read_bytes()[:-3])
def no_frames(pack): (pack / "frames.npy").unlink()
def other_kind(pack): np.save(pack / "pictures.npy", np.load(pack / "pictures.npy").astype(np.float32))


@pytest.mark.parametrize("spoil, says", [
    (spoil_note(version=None), "is a pack of format 1. expected format 2, which holds the whole frames that training cuts. pack again into another"),
    (spoil_note(version=3), "is a pack of format 3. expected format 2"), (spoil_note(ids=None), "manifest.json: lacks ids"),
    (spoil_note(bytes=None), "manifest.json: lacks bytes"), (spoil_note(options={}), "manifest.json: lacks n"),
    (spoil_ends, "ends.npy: does not fit frames.npy"), (cut_off, "frames.npy: truncated"), (no_frames, "frames.npy: cannot be read"),
    (other_kind, r"pictures.npy: float32 \(3, 2, 224, 224, 3\). expected uint8"),
])
def test_an_earlier_pack_and_a_damaged_one_are_refused_in_one_line(packed, spoil, says):
    spoil(packed)
    with pytest.raises(InputError, match=says) as e: open_cremad_pack(packed, STEMS)
    assert "\n" not in str(e.value)


def test_a_run_on_an_earlier_pack_is_refused_and_the_pack_is_not_written_over(root, packed):
    spoil_note(version=None)(packed)
    before = {p.name: p.read_bytes() for p in packed.iterdir()}
    data = DataSpec(features=str(packed), dataset="cremad")
    for make in (lambda: identify(data, root / "runs"), lambda: pack_cremad(root, packed, frames=2, stems=STEMS)):
        with pytest.raises(InputError, match="is a pack of format 1"): make()
    assert {p.name: p.read_bytes() for p in packed.iterdir()} == before


def test_a_frame_that_changes_while_it_is_packed_is_named(root, monkeypatch):
    "A file that is longer than it was when it was measured leaves nothing behind"
    noise_frames(root)
    real = cremad_files._copy_files

    def grown(files, out, ends):
        with open(files[1], "ab") as f: f.write(b"more")
        real(files, out, ends)
    monkeypatch.setattr(cremad_files, "_copy_files", grown)
    with pytest.raises(InputError, match="00000.jpg: has changed while it was read"): pack_cremad(root, root / "pack", stems=STEMS)
    assert not list(root.glob("*pack*.part")) and not (root / "pack").exists()


def test_names_of_frames_follow_the_choice(root):
    found = find_clips(root, STEMS)
    assert [p.name for p in chosen_files(found, 1, "middle", 0)[STEMS[0]]] == ["00029.jpg"]
    assert chosen_files(found, 2, "random", 5) == chosen_files(found, 2, "random", 5)


def test_frames_of_a_real_video(tmp_path, llp):
    pytest.importorskip("av")
    found = extract_frames(llp / "BjCEufrlXm4.mp4", tmp_path / "frames")
    assert [p.name for p in found] == [f"{i:05d}.jpg" for i in range(0, 300, 29)] and all(p.is_file() for p in found)
    (tmp_path / "b.flv").write_bytes(b"no video")
    with pytest.raises(InputError, match="b.flv: cannot be decoded"): extract_frames(tmp_path / "b.flv", tmp_path / "b")
    assert not (tmp_path / "b").exists() and not list(tmp_path.glob("*.part"))


def test_all_videos_are_extracted_and_a_bad_one_stops_nothing(llp, tmp_path, capsys):
    pytest.importorskip("av", reason="PyAV is not installed: pip install av")
    root, videos = tmp_path / "cremad", tmp_path / "cremad" / "VideoFlash"
    videos.mkdir(parents=True)
    if not (llp / "BjCEufrlXm4.mp4").is_file(): pytest.skip("the shared video is not there")
    for name in ("1001_DFA_ANG_XX", "1001_DFA_DIS_XX"): (videos / f"{name}.mp4").write_bytes((llp / "BjCEufrlXm4.mp4").read_bytes())
    (videos / "1001_DFA_FEA_XX.flv").write_bytes(b"no video")
    assert main(["cremad-frames", str(root)]) == 1
    said = capsys.readouterr().out
    assert said.startswith("2 videos extracted below") and "1 failed" in said and "1001_DFA_FEA_XX.flv: cannot be decoded" in said
    made = {p.relative_to(root): p.stat().st_mtime_ns for p in root.rglob("*.jpg")}
    assert len(made) > 10 and {p.parts[1] for p in made} == {"1001_DFA_ANG_XX", "1001_DFA_DIS_XX"}
    (videos / "1001_DFA_FEA_XX.flv").unlink()
    assert main(["cremad-frames", str(root)]) == 0 and "0 videos" in capsys.readouterr().out      # what is there stays
    assert {p.relative_to(root): p.stat().st_mtime_ns for p in root.rglob("*.jpg")} == made and not list(root.rglob("*.part"))
    with pytest.raises(InputError, match="holds no .flv or .mp4"): extract_all(root, tmp_path)


# ---- clips

def clips_of(n=4):
    rng = np.random.default_rng(0)
    return CremadClips(STEMS[:1] * n, rng.normal(size=(n, 5, 4)).astype(np.float32), rng.integers(0, 256, (n, 2, 3, 3, 3), np.uint8), np.arange(n) % 6)


def test_clips_of_one_second_hold_the_same_numbers():
    clips = clips_of()
    flat = one_second(clips)
    np.testing.assert_array_equal(flat.audio.reshape(clips.spectrogram.shape), clips.spectrogram)
    np.testing.assert_array_equal(flat.frames.reshape(clips.pictures.shape), clips.pictures)
    assert flat.frames.dtype == np.uint8 and flat.source["shapes"] == {"spectrogram": [5, 4], "pictures": [2, 3, 3, 3]}
    assert flat.weak.argmax(1).tolist() == clips.label.tolist() and flat.classes == list(CREMAD_CLASSES) and flat.task == "classification"
    assert not isinstance(flat, FrameClips)
    framed = one_second(replace(clips, whole={STEMS[0]: [b"a frame"]}))
    for some in (framed, framed[:2], framed.to("cpu"), framed.with_labels(x=flat.weak)): assert some.whole == {STEMS[0]: [b"a frame"]}


@pytest.mark.parametrize("k, x, says", [
    ("spectrogram", np.zeros((3, 5, 4)), "spectrogram: shape"), ("pictures", np.zeros((4, 2, 3, 3, 1)), "pictures: shape"),
    ("label", np.full(4, 6), "label: is no class"), ("label", np.full(4, -1), "label: is no class"),
])
def test_clips_whose_arrays_disagree(k, x, says):
    with pytest.raises(InputError, match=says): CremadClips(**{**{f: getattr(clips_of(), f) for f in ("ids", "spectrogram", "pictures", "label")}, k: x})


# ---- the simulator

P = CremadParams(rows=16, columns=12, side=12)


def test_a_clip_depends_on_its_name_the_knobs_and_the_seed_alone():
    stems = official_split()["test"][:6]
    a, b = simulate_cremad(stems, P), simulate_cremad(stems[::-1], P)
    np.testing.assert_array_equal(a.spectrogram, b.spectrogram[::-1])
    np.testing.assert_array_equal(a.pictures, b.pictures[::-1])
    assert a.source["fingerprint"] != b.source["fingerprint"]
    assert not np.array_equal(a.spectrogram, simulate_cremad(stems, replace(P, seed=1)).spectrogram)


def test_everything_carries_the_mark(tmp_path):
    clips = simulate_cremad(STEMS, replace(P, loud_audio=2.))
    assert clips.mark == "simulated CREMA-D v1 seed=0 [loud_audio=2 rows=16 columns=12 side=12]"
    assert one_second(clips).mark == clips[1:].mark == clips.mark and clips.source["simulated"] is True
    root = write_cremad(tmp_path / "data", STEMS, P)
    assert load_cremad(root, STEMS, tmp_path / "cache", side=8).mark == cremad_mark(P)
    (root / "SOURCE.json").write_text(json.dumps({"simulated": False, "mark": cremad_mark(P)}))
    with pytest.raises(InputError, match="SOURCE.json"): load_cremad(root, STEMS, tmp_path / "cache", side=8)


def test_real_files_are_not_written_over(root):
    with pytest.raises(InputError, match="holds other clips"): write_cremad(root, STEMS, P)
    assert not (root / "SOURCE.json").exists()


@pytest.mark.parametrize("modality", ["audio", "visual"])
@pytest.mark.parametrize("knows", [0., .3, 1.])
def test_the_share_of_clips_that_show_the_emotion(modality, knows):
    p = replace(P, **{f"knows_{modality}": knows})
    stems = official_split()["train"][:1500]
    seen = np.array([shown(s, p) for s in stems])
    assert seen[:, ("audio", "visual").index(modality)].mean() == pytest.approx(knows, abs=.04)
    other = seen[:, ("visual", "audio").index(modality)]
    assert other.mean() == pytest.approx(.9, abs=.03)                       # untouched
    if 0 < knows < 1: assert abs(np.corrcoef(seen.T)[0, 1]) < .08           # independent


def nearest(x, y, new):
    "Class whose mean is nearest, after the mean of all is taken away"
    means = np.stack([x[y == c].mean(0) for c in range(6)])
    return ((new[:, None] - means[None]) ** 2).sum(2).argmin(1)


@pytest.mark.parametrize("knows", [.2, .6, 1.])
def test_no_classifier_beats_the_ceiling_and_a_simple_one_comes_near(knows):
    p = replace(P, knows_audio=knows, knows_visual=knows, loud_audio=3., loud_visual=3., actor=0., sentence=0.)
    clips = simulate_cremad(official_split()["train"][:1800], p)
    best = ceilings(p)
    for k, x in (("audio", clips.spectrogram), ("visual", clips.pictures.astype(float))):
        x = x.reshape(len(clips), -1)
        right = (nearest(x[:1200], clips.label[:1200], x[1200:]) == clips.label[1200:]).mean()
        assert best[k] - .08 < right < best[k] + .05, (k, right)


def test_loudness_is_the_size_of_the_pattern():
    stems = official_split()["train"][:300]
    p = replace(P, knows_audio=1., actor=0., sentence=0.)
    for loud in (0., .5, 2.):
        clips = simulate_cremad(stems, replace(p, loud_audio=loud))
        own = patterns(replace(p, loud_audio=loud))["sound"][clips.label]
        assert ((clips.spectrogram + 6) * own).mean() == pytest.approx(loud, abs=.02)


def test_profiles_and_splits():
    assert {k: len(v) for k, v in sim_parts((5, 4, 3), P).items()} == {"train": 5, "val": 4, "test": 3}
    parts = sim_parts((200, 60, 60), P, "speakers")
    actors = [{s[:4] for s in v.ids} for v in parts.values()]
    assert not actors[0] & actors[1] and not actors[0] & actors[2] and len(actors[0]) > 40


@pytest.mark.parametrize("make, says", [
    (lambda: CremadParams(knows_audio=-.1), "knows_audio"), (lambda: CremadParams(loud_audio=float("inf")), "loud_audio"),
    (lambda: CremadParams(frames=0), "frames"), (lambda: CremadParams(seed=True), "seed"), (lambda: CremadParams(side=1000), "side"),
    (lambda: CremadParams(actor="much"), "actor"), (lambda: simulate_cremad([]), "no clips"), (lambda: simulate_cremad(["a"]), "is no clip"),
    (lambda: sim_parts("huge"), "profile"), (lambda: sim_parts((1, 1)), "profile"), (lambda: sim_parts((9999, 1, 1)), "9999 clips of train"),
    (lambda: sim_parts(split="official"), "has no part 'val'"),
])
def test_impossible_simulations(make, says):
    with pytest.raises(InputError, match=says): make()
