"""From a media file to pictures and sound: the real video against the reference arrays, and files with everything wrong."""
import itertools
import os
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from avvp_nb.core import InputError
from avvp_nb.media import container, decode
from avvp_nb.media.container import Blocks, Track, sample_video
from avvp_nb.media.decode import media_parts, read_media, read_media_safely
from avvp_nb.media.frames import frame_indices, official_positions, slots_of

av = pytest.importorskip("av", reason="PyAV is not installed: pip install av")

OFFICIAL = """0 1 3 7 10 14 18 22 25 29 33 37 40 44 48 51 55 59 63 66 74 78 81 85 89 93 96 100 104 108 111 115 119 123 126
130 134 137 141 145 149 152 156 160 164 167 171 175 179 182 186 190 194 197 201 205 209 212 216 220 227 231 235 238 242 246
250 253 257 261 265 268 272 276 280 283 287 291 295 298"""     # section 7 of the specification


@pytest.fixture(scope="session")
def real(llp):
    "The one real video"
    path = llp / "BjCEufrlXm4.mp4"
    if not path.exists():
        pytest.skip(f"{path.name} not found")
    return path


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    "Small files of every kind, rendered once: `made(name, **options of sample_video)`"
    folder, there = tmp_path_factory.mktemp("media"), {}

    def make(name, **kw):
        if name not in there:
            there[name] = sample_video(folder / name, **kw)
        return there[name]

    return make


def codes(media):
    return [c for c, _ in media.warnings]


def level(media):
    "Mean grey level of each picture"
    return media.pictures.mean((1, 2, 3))


def colours(path, times, size=(64, 48), codec="mpeg4", rate=1000, format=None):
    "A video whose picture i is shown at times[i] and has grey level 5 i"
    with av.open(str(path), "w", format=format) as c:
        s = c.add_stream(codec, rate=25)
        s.width, s.height, s.pix_fmt, s.bit_rate = *size, "yuv420p", 10**6
        s.codec_context.time_base = s.time_base = Fraction(1, rate)
        for i, t in enumerate(times):
            f = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), 5 * i % 256, np.uint8), "rgb24")
            f.pts, f.time_base = round(t * rate), s.codec_context.time_base
            c.mux(s.encode(f))
        c.mux(s.encode(None))
    return path


# ---- index functions ----------------------------------------------------------------------------------------------

def test_index_functions(golden):
    case = golden("video_frontend")
    times, durations = case["frame_times"], np.full(300, 384 / 11488)
    assert np.array_equal(frame_indices(times, durations, 10), case["grid_selected_source"])
    assert np.array_equal(slots_of(times, durations, 10, "official"), case["official_frame_source"])
    assert np.array_equal(official_positions(82), case["official_selected_position"])
    assert np.array_equal(frame_indices(times, durations, 10, "official"), case["official_selected_source"])
    assert frame_indices(times, durations, 10, "official").tolist() == list(map(int, OFFICIAL.split()))
    assert np.array_equal(slots_of(case["vfr_times"], case["vfr_durations"], 10, "official"), case["vfr_source"])


@pytest.mark.parametrize("fps", [5, 6, 8, 12, 24, 25, 30, 50, 60])
def test_conversion_cases(golden, fps):
    found = slots_of(np.arange(fps * 10) / fps, np.full(fps * 10, 1 / fps), 10, "official")
    assert np.array_equal(found, golden("video_frontend")[f"resample_fps{fps}_source"])


@pytest.mark.parametrize("seed", range(5))
def test_grid_is_its_definition(seed):
    "For any rising times the streaming rule gives the last picture with t <= (j + 1/2)/8 + 1e-6"
    rng = np.random.default_rng(seed)
    t = np.sort(rng.random(40)) * 6 + rng.random() - .3
    moments = (np.arange(40) + .5) / 8 + 1e-6
    assert np.array_equal(frame_indices(t, np.full(40, .1), 5), np.maximum(0, np.searchsorted(t, moments, "right") - 1))


# ---- the real video -----------------------------------------------------------------------------------------------

def test_facts(real, golden):
    said, m = golden("video_frontend").info["values"], read_media(real)
    v, a = m.facts["video"], m.facts["audio"]
    assert m.facts["container"] == said["container"] and m.facts["start"] == said["start_time_s"]
    assert m.facts["duration"] == pytest.approx(said["duration_s"], abs=1e-6)
    assert {k: v[k] for k in ("codec", "profile", "pix_fmt", "width", "height", "average_rate", "time_base", "rotation")} == \
        {k: said["video"][k] for k in ("codec", "profile", "pix_fmt", "width", "height", "average_rate", "time_base", "rotation")}
    assert v["frames"] == said["video"]["frames_decoded"] == 300
    assert (a["codec"], a["profile"], a["rate"], a["channels"]) == ("aac", "LC", 44_100, 2)
    assert a["samples"] in (said["audio"]["samples_decoded"], said["audio"]["samples_with_end_trim"])
    assert m.seconds == 10 and m.warnings == [] and m.facts["damaged"] == {}
    assert m.pictures.shape == (80, 256, 341, 3) and m.waveform.shape == (160_000,) and m.waveform.dtype == np.float32


@pytest.mark.parametrize("rule", ["grid", "official"])
def test_pictures_of_the_real_video(real, golden, rule):
    case, m = golden("video_frontend"), read_media(real, frames=rule, size=None, sound=False)
    source = case[f"{rule}_selected_source"]
    np.testing.assert_allclose(m.times, case["frame_times"][source], rtol=0, atol=1e-6)
    np.testing.assert_allclose(m.pictures.mean((1, 2)), case["frame_mean_rgb"][source], rtol=0, atol=1)
    assert m.waveform is None and m.warnings == []


def test_safely_is_the_same(real):
    a, b = read_media(real), read_media_safely(real)
    for k in ("pictures", "times", "waveform"):
        assert np.array_equal(getattr(a, k), getattr(b, k)) and getattr(a, k).dtype == getattr(b, k).dtype
    assert (a.facts, a.warnings, a.seconds) == (b.facts, b.warnings, b.seconds)


def test_flipped_bytes(real, tmp_path):
    "60 kB of damage: what lies behind it is read, and the damage is told"
    data = bytearray(real.read_bytes())
    data[200_000:260_000] = bytes(b ^ 0xff for b in data[200_000:260_000])
    (tmp_path / "bad.mp4").write_bytes(data)
    m = read_media(tmp_path / "bad.mp4")
    assert m.facts["video"]["frames"] > 270 and "W_PACKETS" in codes(m)     # a stream-level decode gives 74
    assert m.seconds == 10 and m.pictures.shape[0] == 80 and np.isfinite(m.waveform).all()
    good = read_media(real)
    assert np.array_equal(m.pictures[:16], good.pictures[:16])              # before the damage nothing changes


def test_too_much_damage(real, tmp_path):
    data = bytearray(real.read_bytes())
    data[40_000:-20_000] = np.random.default_rng(0).bytes(len(data) - 60_000)
    (tmp_path / "bad.mp4").write_bytes(data)
    with pytest.raises(InputError, match="bad.mp4: E_DAMAGED: only .* could be decoded"):
        read_media(tmp_path / "bad.mp4")
    assert "W_PACKETS" in codes(read_media(tmp_path / "bad.mp4", allow_damaged=True))


# ---- no media -----------------------------------------------------------------------------------------------------

def test_no_media(made, tmp_path):
    whole = made("whole.mp4")
    files = {"empty.mp4": b"", "text.mp4": b"hello\n" * 99, "text.txt": b"hello\n" * 99, "cut.mp4": whole.read_bytes()[:9000],
             "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{whole}\n#EXT-X-ENDLIST\n".encode(),
             "list.ffconcat": f"ffconcat version 1.0\nfile {whole}\n".encode(), "noise.mp4": np.random.default_rng(0).bytes(5000)}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        for read in (read_media, read_media_safely):
            with pytest.raises(InputError, match=f"{name}: E_NOT_MEDIA: ") as e:
                read(tmp_path / name)
            assert "\n" not in str(e.value)
    for read in (read_media, read_media_safely):
        with pytest.raises(InputError, match="none.mp4: E_NOT_FOUND: no such file"):
            read(tmp_path / "none.mp4")
        with pytest.raises(InputError, match="E_NOT_MEDIA: cannot be opened .*is a folder"):
            read(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(InputError, match="pipe.mp4: E_NOT_MEDIA: .*pipe or a device"):
        read_media(tmp_path / "pipe.mp4")


def test_neither_pictures_nor_sound(tmp_path):
    with av.open(str(tmp_path / "a.ts"), "w") as c:
        s = c.add_data_stream("klv")
        for i in range(5):
            p = av.Packet(b"hello" * 50)
            p.stream, p.time_base, p.pts, p.dts = s, Fraction(1, 90_000), 9000 * i, 9000 * i
            c.mux(p)
    with pytest.raises(InputError, match="a.ts: E_NO_STREAMS: has neither pictures nor sound"):
        read_media(tmp_path / "a.ts")


def test_pyav_missing(made, monkeypatch):
    path = made("whole.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match="reading media files needs av. expected an installed package. pip install av"):
        read_media(path)


# ---- tracks -------------------------------------------------------------------------------------------------------

def test_no_sound(made):
    m = read_media(made("deaf.mp4", sound=False))
    assert m.waveform is None and codes(m) == ["W_NO_AUDIO", "W_SHORT"] and m.pictures.shape[0] == 16


def test_no_pictures(made):
    m = read_media(made("blind.m4a", pictures=False))
    assert m.pictures is None and m.times is None and codes(m) == ["W_NO_VIDEO", "W_SHORT"] and m.seconds == 2


def test_only_what_is_wanted(made):
    m = read_media(made("whole.mp4"), pictures=False)
    assert m.pictures is None and m.waveform is not None and codes(m) == ["W_SHORT"]
    m = read_media(made("whole.mp4"), sound=False)
    assert m.waveform is None and m.pictures is not None and codes(m) == ["W_SHORT"]


def test_a_track_that_ends_early(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as c:
        v, a = c.add_stream("mpeg4", rate=8), c.add_stream("aac", rate=16_000, layout="mono")
        v.width, v.height, v.pix_fmt = 32, 32, "yuv420p"
        for i in range(16):
            c.mux(v.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 * i, np.uint8), "rgb24")))
        x = av.AudioFrame.from_ndarray(np.full((1, 64_000), .1, "f4"), "fltp", "mono")
        x.sample_rate = 16_000
        c.mux(a.encode(x))
        c.mux(a.encode(None))
        c.mux(v.encode(None))
    m = read_media(tmp_path / "a.mp4")
    assert m.seconds == 4 and ("W_SHORT", "the pictures end at 2.0 s of 4.1 s") in m.warnings
    assert (m.pictures[16:] == m.pictures[15]).all()        # the last picture stays


def test_silence_is_told(made, tmp_path):
    with av.open(str(tmp_path / "a.wav"), "w") as c:
        a = c.add_stream("pcm_s16le", rate=16_000, layout="mono")
        x = av.AudioFrame.from_ndarray(np.zeros((1, 48_000), "i2"), "s16", "mono")
        x.sample_rate = 16_000
        c.mux(a.encode(x))
        c.mux(a.encode(None))
    assert codes(read_media(tmp_path / "a.wav")) == ["W_NO_VIDEO", "W_SILENT", "W_SHORT"]


def test_a_cover_is_no_video(tmp_path):
    with av.open(str(tmp_path / "a.m4a"), "w", format="mp4") as c:
        a, v = c.add_stream("aac", rate=16_000, layout="mono"), c.add_stream("mjpeg", rate=1)
        v.width, v.height, v.pix_fmt = 32, 32, "yuvj420p"
        v.disposition = av.stream.Disposition.attached_pic
        x = av.AudioFrame.from_ndarray(np.full((1, 32_000), .1, "f4"), "fltp", "mono")
        x.sample_rate = 16_000
        c.mux(a.encode(x))
        c.mux(a.encode(None))
        c.mux(v.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24")))
        c.mux(v.encode(None))
    with av.open(str(tmp_path / "a.m4a")) as c:
        if not any(s.disposition & av.stream.Disposition.attached_pic for s in c.streams.video):
            pytest.skip("this build does not write covers")
    m = read_media(tmp_path / "a.m4a")
    assert m.pictures is None and "W_NO_VIDEO" in codes(m)


# ---- lengths and rates --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seconds,N", [(.4, 1), (3, 3), (10.2, 10), (10.4, 11), (27, 27)])
def test_lengths(made, seconds, N):
    m = read_media(made(f"{seconds}.mp4", seconds=seconds, fps=10), size=24)
    assert m.seconds == N and m.pictures.shape == (8 * N, 24, 32, 3) and m.waveform.shape == (16_000 * N,)
    assert ("W_SHORT" in codes(m)) == (N < 10)


@pytest.mark.parametrize("fps", [1, 8, 12, 25, 30, 60])
def test_rates(made, fps):
    "Slot j shows picture floor(fps (j + 1/2)/8), told by its grey level"
    m = read_media(made(f"fps{fps}.mp4", fps=fps, sound=False, seconds=4), size=None)
    shown = np.floor(fps * (np.arange(32) + .5) / 8 + 1e-6)
    np.testing.assert_allclose(m.times * fps, shown, atol=1e-3)
    assert np.abs(level(m) - 5 * shown % 256).max() < 4


def test_variable_rate(tmp_path):
    times = [0, .04, .08, .5, .52, .9, 1.5, 1.51, 1.52, 1.9]
    m = read_media(colours(tmp_path / "a.mkv", times), size=None)
    expected = [max(k for k, t in enumerate(times) if t <= (j + .5) / 8 + 1e-6) for j in range(16)]
    np.testing.assert_allclose(m.times, np.array(times)[expected], atol=1e-6)
    assert np.abs(level(m) - 5 * np.array(expected)).max() < 4


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_rotation(tmp_path, turn):
    "The one bright corner goes where np.rot90 brings it"
    x = np.zeros((48, 64, 3), np.uint8)
    x[:16, :16] = 250                                       # above on the left
    with av.open(str(tmp_path / "a.mp4"), "w") as c:
        s = c.add_stream("mpeg4", rate=8)
        s.width, s.height, s.pix_fmt, s.bit_rate = 64, 48, "yuv420p", 10**6
        s.set_display_rotation(turn)
        for _ in range(8):
            c.mux(s.encode(av.VideoFrame.from_ndarray(x, "rgb24")))
        c.mux(s.encode(None))
    with av.open(str(tmp_path / "a.mp4")) as c:
        said = next(c.decode(video=0)).rotation
    m = read_media(tmp_path / "a.mp4", size=None)
    expected = np.rot90(x, said // 90 % 4)
    assert said % 360 in (turn, 360 - turn) and m.facts["video"]["rotation"] == said
    assert m.pictures.shape[1:] == expected.shape and np.abs(m.pictures[0].astype(int) - expected).mean() < 5
    small = read_media(tmp_path / "a.mp4", size=12)
    assert small.pictures.shape[1:3] == ((16, 12) if turn != 180 else (12, 16))


def test_odd_size(tmp_path):
    m = read_media(colours(tmp_path / "a.mkv", np.arange(16) / 8, size=(65, 49), codec="ffv1"), size=None)
    assert m.pictures.shape == (16, 49, 65, 3) and np.abs(level(m) - 5 * np.arange(16)).max() < 4


def test_names(made, tmp_path):
    path = made("hündchen 犬 (1).mp4")
    assert read_media(path).seconds == read_media_safely(path).seconds == 2
    odd = tmp_path / "concat:a|b.mp4"                       # FFmpeg has a meaning for such names
    odd.write_bytes(path.read_bytes())
    assert read_media(odd).seconds == 2


# ---- forms of sound -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name,kw", [
    ("mono.m4a", dict(layout="mono")), ("51.m4a", dict(layout="5.1")), ("71.wav", dict(layout="7.1", codec="pcm_s16le")),
    ("8k.wav", dict(rate=8000, codec="pcm_s16le")), ("96k.m4a", dict(rate=96_000)), ("22k.m4a", dict(rate=22_050))])
def test_forms_of_sound(tmp_path, name, kw):
    "One second of silence, one of a tone of 1 kHz at 0.2; in all channels of mono and stereo the mean is the tone"
    rate, layout, codec = kw.get("rate", 44_100), kw.get("layout", "stereo"), kw.get("codec", "aac")
    with av.open(str(tmp_path / name), "w") as c:
        a = c.add_stream(codec, rate=rate, layout=layout)
        x = container._tone(2, rate, av.AudioLayout(layout).nb_channels)
        x = x if codec == "aac" else np.ascontiguousarray((x.T * 32767).astype("i2").reshape(1, -1))
        block = av.AudioFrame.from_ndarray(x, "fltp" if codec == "aac" else "s16", layout)
        block.sample_rate = rate
        c.mux(a.encode(block))
        c.mux(a.encode(None))
    m = read_media(tmp_path / name)
    assert m.seconds == 2 and m.facts["audio"]["rate"] == rate
    assert np.abs(m.waveform[:15_800]).max() < .01
    found = np.fft.rfft(m.waveform[16_000:])
    assert np.abs(found).argmax() == 1000
    if layout in ("mono", "stereo"):
        assert np.sqrt((m.waveform[16_500:31_500] ** 2).mean()) == pytest.approx(.2 / 2 ** .5, abs=.004)


def test_8_bit(tmp_path):
    with av.open(str(tmp_path / "a.wav"), "w") as c:
        a = c.add_stream("pcm_u8", rate=8000, layout="mono")
        x = av.AudioFrame.from_ndarray(np.tile(np.uint8([128 + 64] * 4 + [128 - 64] * 4), 1000)[None], "u8", "mono")
        x.sample_rate = 8000
        c.mux(a.encode(x))
        c.mux(a.encode(None))
    m = read_media(tmp_path / "a.wav")
    assert m.seconds == 1 and np.abs(np.fft.rfft(m.waveform)).argmax() == 1000
    assert np.sqrt((m.waveform ** 2).mean()) == pytest.approx(.5, abs=.01)


def test_sound_that_starts_later(tmp_path):
    "Sound that begins 0.7 s after the pictures has zeros in front of it"
    with av.open(str(tmp_path / "a.mkv"), "w") as c:
        v, a = c.add_stream("mpeg4", rate=8), c.add_stream("pcm_s16le", rate=16_000, layout="mono")
        v.width, v.height, v.pix_fmt = 32, 32, "yuv420p"
        for _ in range(16):
            c.mux(v.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24")))
        x = av.AudioFrame.from_ndarray(np.full((1, 16_000), 8192, "i2"), "s16", "mono")
        x.sample_rate, x.pts, x.time_base = 16_000, 11_200, Fraction(1, 16_000)
        c.mux(a.encode(x))
        c.mux(a.encode(None))
        c.mux(v.encode(None))
    m = read_media(tmp_path / "a.mkv")
    first = np.flatnonzero(m.waveform)[0]
    assert abs(first - 11_200) <= 16 and m.seconds == 2     # matroska has times of 1 ms
    assert np.allclose(m.waveform[11_300:27_000], .25)


class Sound:
    "A decoded block, without a file"
    def __new__(cls, at, n=1600, rate=16_000):
        f = av.AudioFrame.from_ndarray(np.full((1, n), .5, "f4"), "fltp", "mono")
        f.sample_rate = rate
        f.pts, f.time_base = None if at is None else round(at * rate), Fraction(1, rate)
        return f


def test_a_gap_in_sound_and_jitter():
    b = Blocks(60.)
    for at in (0, .1, .22, .5, None):
        b.add(Sound(at), 0.)
    x = b.waveform(1, "ffmpeg")
    assert np.flatnonzero(x == 0).tolist() == [*range(4800, 8000), *range(11_200, 16_000)]     # 0.02 s late is jitter
    with pytest.raises(InputError, match="sound at 3,600 s. expected 60 s at most"):
        b.add(Sound(3600), 0.)


class Picture:
    "A decoded picture, without a file"
    def __init__(self, t, level=0, rotation=0, duration=100):
        self.pts = None if t is None else round(1000 * t)
        self.time_base, self.duration, self.rotation, self.level = 1 / 1000, duration, rotation, level

    def to_ndarray(self, format):
        return np.full((4, 6, 3), self.level, np.uint8)


def test_times_that_are_missing_or_out_of_order():
    track = Track("grid", None, 10., 60.)
    for k, t in enumerate([None, None, .2, .15, .2, .4]):
        track.add(Picture(t, k), 0.)
    pictures, times = track.finish(1)
    assert sorted(set(times)) == [0, .1, .2, .4] and dict(track.told) == {"untimed": 2, "disorder": 2}
    assert pictures[:, 0, 0, 0].tolist() == [0, 1, 2, 5, 5, 5, 5, 5]
    with pytest.raises(InputError, match="E_TOO_LONG: a picture at 1,000,000,000 s. expected 60 s at most"):
        track.add(Picture(1e9), 0.)


def test_other_angles_are_left_and_told(made, monkeypatch):
    track = Track("grid", None, 10., 60.)
    track.add(Picture(0, rotation=45), 0.)
    assert track.told["angle"] == 45 and track.finish(1)[0].shape == (8, 4, 6, 3)


# ---- long files, and limits ---------------------------------------------------------------------------------------

def test_too_long_is_refused_before_any_work(made, monkeypatch):
    path = made("parts.mp4", seconds=27, fps=10, rate=16_000)
    monkeypatch.setattr(decode, "packets", lambda *a: pytest.fail("decoded"))
    with pytest.raises(InputError, match=r"E_TOO_LONG: 27 s. expected 20 s at most. cut it .* or read parts of it with start"):
        read_media(path, max_seconds=20)


def test_parts_are_the_whole(made):
    path = made("parts.mp4", seconds=27, fps=10, rate=16_000)
    whole, parts = read_media(path, size=None), list(media_parts(path, 10, size=None))
    assert [p.seconds for p in parts] == [10, 10, 7]
    assert np.array_equal(np.concatenate([p.pictures for p in parts]), whole.pictures)
    np.testing.assert_allclose(np.concatenate([p.times for p in parts]), whole.times, atol=1e-9)
    np.testing.assert_allclose(np.concatenate([p.waveform for p in parts]), whole.waveform, atol=1e-6)   # 16 kHz already
    assert read_media(path, start=25, length=10).seconds == 2
    with pytest.raises(InputError, match="parts.mp4: ends before 30 s"):
        read_media(path, start=30)


@pytest.mark.parametrize("length", [1, 3, 4])
def test_parts_of_the_real_video(real, length):
    "Key frames at 0, 39 and 289 of 300, with frames that are stored in another order than shown"
    whole, parts = read_media(real, size=48), list(media_parts(real, length, size=48))
    assert sum(p.seconds for p in parts) == 10 and all(p.facts["damaged"] == {} for p in parts)
    assert np.array_equal(np.concatenate([p.pictures for p in parts]), whole.pictures)
    np.testing.assert_allclose(np.concatenate([p.times for p in parts]), whole.times, atol=1e-9)
    np.testing.assert_allclose(np.concatenate([p.waveform for p in parts]), whole.waveform, atol=1e-5)


@pytest.mark.parametrize("seconds,expected", [(4.1, [2, 2]), (4.2, [2, 2]), (4.5, [2, 2, 1]), (4, [2, 2])])
def test_a_tail_is_no_part(made, seconds, expected):
    "What is left behind the last part does not count when it does not count in the whole"
    path = made(f"tail{seconds}.mp4", seconds=seconds, fps=10, sound=False)
    parts = list(media_parts(path, 2, size=24))
    assert [p.seconds for p in parts] == expected and sum(expected) == read_media(path).seconds
    assert [p.facts["more"] for p in parts] == [True] * (len(expected) - 1) + [False]


def test_what_lies_before_a_part_is_not_decoded(made, monkeypatch):
    path, seen = made("groups.mp4", seconds=27, fps=10, rate=16_000), []
    plain = container.decoded
    monkeypatch.setattr(decode, "decoded", lambda p, bad: seen.append(p.stream.type) or plain(p, bad))
    read_media(path, start=20, length=2, size=24)
    assert seen.count("video") < 70                           # of 270: mpeg4 has a key frame every 12


def test_options(made):
    path = made("whole.mp4")
    for kw, said in [(dict(frames="gird"), "did you mean 'grid'"), (dict(size=0), "size: 0"), (dict(size=10**6), "size: 1000000"),
                     (dict(resampler="sox"), "did you mean 'soxr'"), (dict(start=-1), "start: -1"),
                     (dict(max_seconds=float("nan")), "max_seconds: nan"), (dict(length=.5), "length: 0.5"),
                     (dict(length=900), "length: 900"), (dict(frames="official", start=1), "needs the whole file")]:
        with pytest.raises(InputError, match=said):
            read_media(path, **kw)
    with pytest.raises(TypeError):
        read_media_safely(path, sise=3)


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    "A folder for temporary files of its own, so that leftovers can be seen"
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


@pytest.mark.skipif(sys.platform == "win32", reason="no limits by the system here")
def test_limits(made, scratch):
    long = made("long.mp4", seconds=60, fps=8, sound=False)
    with pytest.raises(InputError, match="long.mp4: E_LIMITS: took more than 1 s of processor time. cut the file"):
        read_media_safely(long, seconds_limit=1, size=1000)
    with pytest.raises(InputError, match="long.mp4: .*memory"):
        read_media_safely(long, size=2000, memory_limit=5 * 10**8)
    assert read_media_safely(made("whole.mp4")).seconds == 2
    assert list(scratch.iterdir()) == []


def test_a_decoder_that_dies(made, scratch, monkeypatch):
    "A child that is killed ends in one line, and leaves nothing"
    monkeypatch.setattr(decode.subprocess, "run", lambda *a, **kw: type("Done", (), {"returncode": -11}))
    with pytest.raises(InputError, match="whole.mp4: E_DAMAGED: the process that decoded it ended .SIGSEGV."):
        read_media_safely(made("whole.mp4"))
    assert list(scratch.iterdir()) == []


def test_modules_of_the_working_folder_are_not_run(made, tmp_path, monkeypatch):
    path = made("whole.mp4")
    for name in ("numpy", "av", "json", "avvp_nb"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w').close()\nraise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    assert read_media_safely(path).seconds == 2 and not (tmp_path / "ran").exists()


def test_a_child_that_lies(made, scratch, monkeypatch):
    "Arrays of another shape or type than promised, and pickles, are not read"
    m = read_media(made("whole.mp4"), size=24)

    def child(waveform):
        def run(task):
            folder = Path(task["folder"])
            decode.write_json({"facts": {}, "seconds": 2, "warnings": []}, folder / "media.json")
            np.save(folder / "waveform.npy", waveform, allow_pickle=True)
            return 0
        return run
    for bad in (m.waveform[:-1], m.waveform.astype("f8"), np.array([{}]), m.waveform[None]):
        monkeypatch.setattr(decode, "_run_child", child(bad))
        with pytest.raises(InputError, match="waveform.npy: holds"):
            read_media_safely(made("whole.mp4"))
    assert list(scratch.iterdir()) == []


def test_nothing_of_the_callers_world_changes(made):
    before = np.random.get_state()[1].tolist(), av.logging.get_level(), os.getcwd()
    read_media(made("whole.mp4"))
    assert before == (np.random.get_state()[1].tolist(), av.logging.get_level(), os.getcwd())


def test_memory_of_pictures_is_bounded(made, monkeypatch):
    monkeypatch.setattr(container, "MOST_BYTES", 100_000)
    with pytest.raises(InputError, match="E_TOO_LONG: pictures of 64 x 48 need too much memory"):
        read_media(made("whole.mp4"), size=None)
    monkeypatch.setattr(decode, "MOST_PIXELS", 1000)
    with pytest.raises(InputError, match="E_TOO_LONG: pictures of 64 x 48"):
        read_media(made("whole.mp4"), size=24)


def test_random_damage_never_breaks_anything(made, tmp_path):
    "Whatever bytes are changed: arrays of the promised shapes, or one line"
    data, rng = made("whole.mp4").read_bytes(), np.random.default_rng(1)
    for k in range(60):
        bad = bytearray(data)
        for at in rng.integers(0, len(bad), rng.integers(1, 200)):
            bad[at] = rng.integers(256)
        (tmp_path / "a.mp4").write_bytes(bad[:len(bad) if k % 3 else rng.integers(100, len(bad))])
        try:
            m = read_media(tmp_path / "a.mp4", max_seconds=30, size=24)
        except InputError as e:
            assert str(e).startswith(str(tmp_path / "a.mp4")) and "E_" in str(e) and "\n" not in str(e)
            continue
        assert m.pictures is None or m.pictures.shape[0] == 8 * m.seconds
        assert m.waveform is None or (m.waveform.shape == (16_000 * m.seconds,) and np.isfinite(m.waveform).all())


def test_itertools_of_rules():
    "Both rules agree on a video of exactly eight pictures a second, apart from their delay"
    t, d = np.arange(80) / 8, np.full(80, 1 / 8)
    for rule, N in itertools.product(("grid", "official"), (1, 5, 10)):
        found = frame_indices(t[:8 * N], d[:8 * N], N, rule)
        assert len(found) == 8 * N and (np.diff(found) >= 0).all() and found.max() < 8 * N
