"""Windows of long videos: every second is covered, constants stay, and one window is the published rule."""
import numpy as np
import pytest

from avvp_nb.core import InputError
from avvp_nb.media.windows import joined, joined_gates, padded, position_weights, window_starts, windows_of


@pytest.mark.parametrize("stride", range(1, 11))
def test_every_second_is_covered(stride):
    for N in range(1, 60):
        starts = window_starts(N, stride)
        assert {s + k for s in starts for k in range(10)} >= set(range(N))
        assert starts[0] == 0 and starts[-1] == max(0, N - 10) and starts == sorted(set(starts))
        assert all(s % stride == 0 for s in starts[:-1])


@pytest.mark.parametrize("N", [1, 3, 10, 11, 15, 27, 100])
@pytest.mark.parametrize("stride", [1, 5, 7, 10])
def test_constants_stay(N, stride):
    starts = window_starts(N, stride)
    x = joined(np.full((len(starts), 10, 2, 3), .3), starts, N)
    np.testing.assert_allclose(x, .3, rtol=1e-12)
    np.testing.assert_allclose(joined_gates(np.full((len(starts), 2, 3), .7), starts, N), .7, rtol=1e-12)
    assert x.shape == (N, 2, 3)


def test_one_window_is_left_as_it_is():
    p, q = np.random.default_rng(0).random((1, 10, 2, 25)), np.random.default_rng(1).random((1, 2, 25))
    np.testing.assert_allclose(joined(p, [0], 10), p[0], rtol=1e-14)
    np.testing.assert_allclose(joined_gates(q, [0], 10), np.repeat(q, 10, 0), rtol=1e-14)
    assert joined(p, [0], 4).shape == (4, 2, 25)             # what belongs to the filling is removed


@pytest.mark.parametrize("N,stride", [(12, 5), (27, 5), (40, 3), (33, 10)])
def test_against_the_sum_written_out(N, stride):
    "P = sum w p / sum w over the windows that contain t, w = min(k + 1, 10 - k)"
    starts = window_starts(N, stride)
    p, q = np.random.default_rng(N).random((len(starts), 10)), np.random.default_rng(N + 1).random(len(starts))
    for t in range(N):
        inside = [(i, t - s, min(t - s + 1, 10 - (t - s))) for i, s in enumerate(starts) if s <= t < s + 10]
        total = sum(w for *_, w in inside)
        assert joined(p, starts, N)[t] == pytest.approx(sum(w * p[i, k] for i, k, w in inside) / total)
        assert joined_gates(q, starts, N)[t] == pytest.approx(sum(w * q[i] for i, _, w in inside) / total)


def test_stride_of_ten_has_no_weights_except_at_the_end():
    starts, p = window_starts(27, 10), np.random.default_rng(0).random((3, 10))
    x = joined(p, starts, 27)
    np.testing.assert_allclose(x[:17], np.concatenate([p[0], p[1, :7]]))
    np.testing.assert_allclose(x[20:], p[2, 3:])
    assert starts == [0, 10, 17] and x[18] == pytest.approx((p[1, 8] * 2 + p[2, 1] * 2) / 4)


def test_cutting_and_filling():
    x = np.arange(12 * 8)
    w = windows_of(x, window_starts(12), per=8)
    assert w.shape == (2, 80) and w[0, 0] == 0 and w[1, 0] == 16 and w[1, -1] == 95
    assert windows_of(np.arange(1, 4), [0])[0].tolist() == [1, 2, 3, 3, 3, 3, 3, 3, 3, 3]
    assert windows_of(np.arange(1, 4), [0], how="zeros")[0].tolist() == [1, 2, 3, 0, 0, 0, 0, 0, 0, 0]
    x = np.ones((5, 2), "u1")
    assert padded(x, 3) is x and padded(x, 7).dtype == np.uint8


def test_cutting_and_joining_are_inverse():
    x = np.random.default_rng(0).random((27, 3))
    starts = window_starts(27)
    np.testing.assert_allclose(joined(windows_of(x, starts), starts, 27), x)


def test_refused():
    for args, said in (((20, 11), "20 s in steps of 11 s"), ((20, 0), "a stride of 1 to 10 s"), ((0, 5), "0 s in steps")):
        with pytest.raises(InputError, match=said):
            window_starts(*args)
    for starts, N in (([0, 2], 13), ([0, 11], 21), ([0], 10)):
        with pytest.raises(InputError, match=f"expected windows that cover {N} s"):
            joined(np.zeros((2, 10)), starts, N)
    assert position_weights(4).tolist() == [1, 2, 2, 1]
