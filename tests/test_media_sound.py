"""Sound: the front end against the reference arrays, resamplers within their tolerance, and placement."""
from importlib.util import find_spec

import numpy as np
import pytest
from conftest import close

from avvp_nb.core import InputError
from avvp_nb.media.sound import RESAMPLERS, Placement, examples, fit, log_mel, mel_matrix, resample

AV = pytest.mark.skipif(not find_spec("av"), reason="PyAV is not installed: pip install av")
SOXR = pytest.mark.skipif(not find_spec("soxr"), reason="soxr is not installed: pip install soxr")


@pytest.fixture(scope="module")
def case(golden):
    return golden("video_frontend")


@pytest.fixture(scope="module")
def decoded(llp):
    "(2, n) float32 at 44.1 kHz of the real video"
    av = pytest.importorskip("av", reason="PyAV is not installed: pip install av")
    with av.open(str(llp / "BjCEufrlXm4.mp4")) as c:
        return np.concatenate([f.to_ndarray() for f in c.decode(audio=0)], 1)


# ---- log-mel ------------------------------------------------------------------------------------------------------

def test_mel_matrix(case):
    close(case, "mel_matrix", mel_matrix())
    assert (mel_matrix()[0] == 0).all()


def chirp():
    t = np.arange(16_000) / 16_000
    return .3 * np.sin(2 * np.pi * (200 * t + 1500 * t * t)) + .05 * np.sin(2 * np.pi * 3000 * t)


def test_synthetic(case):
    L = log_mel(chirp())[:96]
    close(case, "synthetic_logmel", L)
    assert L.sum() == pytest.approx(-22059.8138, abs=1e-4)
    assert [L[0, 0], L[0, 10], L[48, 32]] == pytest.approx([.915119, -3.032661, -2.220050], abs=1e-6)
    assert L.max() == pytest.approx(4.277837, abs=1e-6) and np.unravel_index(L.argmax(), L.shape) == (90, 41)


@pytest.mark.parametrize("framing,total", [("aligned", -108079.48), ("contiguous", -108435.51)])
def test_from_the_stored_waveform(case, framing, total):
    L = examples(case["wave16k"], framing)
    close(case, f"logmel_{framing}", L)
    assert L.sum(dtype=float) == pytest.approx(total, abs=.01) and L.dtype == np.float32


def test_the_tolerance_tells_a_symmetric_window_and_powers(case, monkeypatch):
    "The two usual mistakes err by far more than the tolerance allows"
    x, L = case["wave16k"], case["logmel_aligned"]
    frames = np.lib.stride_tricks.sliding_window_view(x[:16_000].astype(float), 400)[::160][:96]
    symmetric = np.log(np.abs(np.fft.rfft(frames * np.hanning(400), 512)) @ mel_matrix() + .01)
    periodic = .5 - .5 * np.cos(2 * np.pi * np.arange(400) / 400)
    powers = np.log(np.abs(np.fft.rfft(frames * periodic, 512)) ** 2 @ mel_matrix() + .01)
    assert np.abs(symmetric - L[0]).max() > .01 and np.abs(powers - L[0]).max() > 1


@pytest.mark.parametrize("N", [1, 2, 10, 27])
def test_rows(N):
    x = np.zeros(16_000 * N, "f4")
    assert examples(x).shape == (N, 96, 64) and len(examples(x, "contiguous")) >= N
    np.testing.assert_allclose(examples(x), np.log(.01), rtol=1e-6)
    assert len(examples(x, hop=.32)) == 1 + (16_000 * N - 15_600) // 5120


def test_a_row_depends_on_its_second_alone():
    x = np.random.default_rng(0).standard_normal(48_000).astype("f4")
    y = x.copy()
    y[16_000:32_000] += 1
    changed = np.abs(examples(x) - examples(y)).max((1, 2)) > 0
    assert changed.tolist() == [False, True, False]
    y = x.copy()
    y[15_600:16_000] += 1                                    # the last 25 ms of a second are not used
    assert np.array_equal(examples(x), examples(y))


def test_bad_framing():
    for kw, said in ((dict(framing="alinged"), "did you mean 'aligned'"), (dict(hop=0), "hop: 0 s")):
        with pytest.raises(InputError, match=said):
            examples(np.zeros(16_000), **kw)


# ---- resampling ---------------------------------------------------------------------------------------------------

def differences(case, waveform):
    d = np.abs(examples(waveform) - case["logmel_aligned"])
    return d[..., :60].max(), d[..., 60:].max(), d.mean()


@pytest.mark.parametrize("how", [pytest.param("ffmpeg", marks=AV), pytest.param("soxr", marks=[AV, SOXR])])
def test_log_mel_from_the_file(case, decoded, how):
    tol, x = case.info["values"]["resampler_tolerance"], resample(decoded, 44_100, how)
    assert abs(len(x) - case.info["values"]["samples_16k"]) <= 1
    low, high, mean = differences(case, fit(x, 10))
    assert low <= tol["max_bands_0_59"] and high <= tol["max_bands_60_63"] and mean <= tol["mean"]
    close(case, "rms_per_second_16k", np.sqrt((fit(x, 10).reshape(10, -1).astype(float) ** 2).mean(1)))


@AV
def test_ffmpeg_is_the_reference_of_its_name(case, decoded):
    close(case, "logmel_aligned_swresample", examples(fit(resample(decoded, 44_100), 10)))


@AV
def test_nearest_is_the_reference_of_its_name(case, decoded):
    "The nearest sample, limited, 16 bits; and it fails the tolerance of a resampler"
    x = fit(resample(decoded, 44_100, "nearest"), 10)
    close(case, "logmel_aligned_nearest", examples(x))
    low, high, mean = differences(case, x)
    assert low > 1 and mean > .1 and np.abs(x).max() <= .99


@pytest.mark.parametrize("how", [pytest.param("ffmpeg", marks=AV), pytest.param("soxr", marks=SOXR), "nearest"])
@pytest.mark.parametrize("rate", [8000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000, 96_000, 192_000])
def test_level_and_length(how, rate):
    "A tone of 1 kHz keeps level, frequency and place at every rate; the mean of channels is a plain mean"
    n = np.arange(3 * rate)
    x = np.stack([.6 * np.sin(2 * np.pi * 1000 * n / rate), 0 * n]).astype("f4")
    y = resample(x, rate, how)
    assert abs(len(y) - 48_000) <= 2 and y.dtype == np.float32
    middle = y[16_000:32_000]
    assert np.sqrt((middle.astype(float) ** 2).mean()) == pytest.approx(.3 / 2 ** .5, rel=.02)
    assert np.abs(np.fft.rfft(middle)).argmax() == 1000
    if how != "nearest":
        np.testing.assert_allclose(middle, .3 * np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000), atol=2e-3)   # no lag


@AV
def test_the_mean_is_not_the_downmix():
    "A resampler that is asked for mono returns sqrt(2) times the mean; this one doesn't"
    x = np.full((2, 44_100), .25, "f4")
    assert resample(x, 44_100)[8000] == pytest.approx(.25, abs=1e-3)
    assert resample(np.concatenate([x, x]), 44_100)[8000] == pytest.approx(.25, abs=1e-3)


def test_nothing_is_clipped():
    x = np.full((2, 1000), 1.5, "f4")
    assert resample(x, 16_000).max() == 1.5


def test_bad_input_to_resample():
    with pytest.raises(InputError, match="did you mean 'ffmpeg'"):
        resample(np.zeros((1, 9)), 8000, "fmpeg")
    for x, rate in ((np.zeros(9), 8000), (np.zeros((1, 9)), 0), (np.zeros((1, 9)), 10**9)):
        with pytest.raises(InputError, match=r"expected \(channels, samples\)"):
            resample(x, rate)
    for how in RESAMPLERS:
        assert len(resample(np.zeros((2, 0)), 8000, how)) == 0


# ---- placement ----------------------------------------------------------------------------------------------------

def test_jitter_of_a_real_file_inserts_nothing():
    "Blocks of 1,024 samples, stamped 1,014 to 1,059 apart, are joined end to end"
    rng, p = np.random.default_rng(0), Placement(44_100)
    for k in range(400):
        p.add((k * 1024 + rng.integers(-40, 40)) / 44_100 if k else 0, np.full((1, 1024), k + 1, "f4"))
    assert np.array_equal(p.samples()[0], np.repeat(np.arange(1, 401), 1024))


@pytest.mark.parametrize("late,zeros", [(0, 0), (.049, 0), (.06, 960), (1, 16_000)])
def test_gaps(late, zeros):
    p = Placement(16_000)
    p.add(0, np.ones((2, 1600), "f4"))
    p.add(.1 + late, np.ones((2, 1600), "f4"))
    assert p.samples().shape == (2, 3200 + zeros) and p.filled == 3200


def test_the_beginning():
    for at, first in ((0, 0), (.03, 480), (2, 32_000)):
        p = Placement(16_000)
        p.add(at, np.ones((1, 100), "f4"))
        assert np.flatnonzero(p.samples()[0])[0] == first
    p = Placement(16_000)
    for at in (-.2, -.1, 0):                                  # samples before the beginning are dropped
        p.add(at, np.full((1, 1600), at, "f4"))
    p.add(.1, np.ones((1, 10), "f4"))
    assert p.n == 1610
