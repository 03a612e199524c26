"""The back end without weights: its numbers against slow definitions, the tests of its specification, and what it is refused for."""
import argparse
import json
import math

import numpy as np
import pytest

pytest.importorskip("PIL", reason="Pillow isn't installed")

from avvp_nb.core import InputError, shared
from avvp_nb.data.features import layout_source
from avvp_nb.media import descriptor as D
from avvp_nb.media.backend import FPS, RATE, backend, look
from avvp_nb.media.decode import Media, read_media
from avvp_nb.media.sound import log_mel
from avvp_nb.methods.zoo import METHODS
from avvp_nb.records.spec import RunSpec
from avvp_nb.records.weights import release_weights, save_weights
from avvp_nb.runs import extract as E
from avvp_nb.runs import parse as P
from avvp_nb.runs import parser as R

SIZES = dict(classes=2, audio_dim=128, frame_dim=2048, motion_dim=512, dim=8)


def scene(seed, n=1):
    "(n,96,128,3) uint8: colours that change smoothly, and some noise, so that all kinds of edges occur"
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (n, 12, 16, 3)).repeat(8, 1).repeat(8, 2)
    return (small*.9 + rng.integers(0, 26, small.shape)).astype(np.uint8)


# slow definitions, a pixel after the other

def grey(x): return [[(299*int(r) + 587*int(g) + 114*int(b))/1000 for r, g, b in row] for row in x.tolist()]


def slopes(g):
    out = {}
    for y in range(96):
        for x in range(128):
            gx = (g[y][x + 1] - g[y][x - 1])/2 if 0 < x < 127 else 0.
            gy = (g[y + 1][x] - g[y - 1][x])/2 if 0 < y < 95 else 0.
            out[y, x] = gx, gy, math.hypot(gx, gy)
    return out


def angle(x, y, K): return int(math.floor((math.atan2(y, x) + math.pi)/(2*math.pi)*K)) % K


def four(h):
    "Means of the quadrants of a dictionary (row, column) -> list"
    out = []
    for rows in (range(3), range(3, 6)):
        for columns in (range(4), range(4, 8)):
            out += [sum(h[r, c][i] for r in rows for c in columns)/12 for i in range(len(h[0, 0]))]
    return out


def slow_picture(x):
    s, n = slopes(grey(x)), 96*128
    A, B, weights = [0]*512, [0.]*512, 0.
    h = {(r, c): [0.]*128 for r in range(6) for c in range(8)}
    for (y, i), (gx, gy, m) in s.items():
        r, g, b = map(int, x[y, i])
        A[r//32*64 + g//32*8 + b//32] += 1
        low = r//64*16 + g//64*4 + b//64
        h[y//16, i//16][low] += 1/256
        if m >= 4:
            B[low*8 + angle(gx, gy, 8)] += min(m, 64)
            weights += min(m, 64)
        if m >= 2:
            size = 0 if m < 4 else 1 if m < 12 else 2 if m < 30 else 3
            h[y//16, i//16][64 + size*16 + angle(gx, gy, 16)] += 1/256
    h = {k: [math.sqrt(v) for v in row] for k, row in h.items()}
    cells = list(h)
    border = [k for k in cells if k[0] in (0, 5) or k[1] in (0, 7)]
    C = [[], [], [], []]
    for i in range(128):
        own = [h[k][i] for k in cells]
        mean, edge = sum(own)/48, sum(h[k][i] for k in border)/24
        C[0].append(max(own)); C[1].append(mean); C[2].append(math.sqrt(sum((v - mean)**2 for v in own)/48))
        C[3].append(max(max(v - edge, 0) for v in own))
    return [math.sqrt(v/n) for v in A] + [math.sqrt(v/(weights + n/4)) for v in B] + sum(C, []) + four(h)


def slow_motion(x):
    g = [grey(p) for p in x]
    h = {(r, c): [0.]*32 for r in range(6) for c in range(8)}
    F, moving, G, centres = [0.]*256, 0, [[], [], [], []], []
    for k in range(7):
        s = slopes([[(a + b)/2 for a, b in zip(p, q)] for p, q in zip(g[k], g[k + 1])])
        all_d, at = [], [0., 0., 0.]
        for (y, i), (gx, gy, m) in s.items():
            d = g[k + 1][y][i] - g[k][y][i]
            v, cell = -d/(m + 1e-3), h[y//16, i//16]
            cell[sum(abs(d) >= e for e in (4, 8, 16, 32, 64, 96, 128))] += 1/256/7
            cell[24 + k] += abs(d)/64/256
            all_d.append(d)
            if abs(d) > 8: at = [at[0] + abs(d), at[1] + abs(d)*(i + .5)/128, at[2] + abs(d)*(y + .5)/96]
            if m > 4 and abs(d) > 8:
                sign = (v > 0) - (v < 0)
                to, speed = angle(sign*gx, sign*gy, 8), abs(v)
                cell[8 + (speed >= 1.5)*8 + to] += 1/256/7
                r, gr, b = x[k + 1, y, i] >= 128
                F[((r*4 + gr*2 + b)*4 + sum(speed >= e for e in (.75, 1.5, 3)))*8 + to] += 1
                moving += 1
        n = len(all_d)
        for own, value in zip(G, (sum(map(abs, all_d))/n/16, abs(sum(all_d)/n)/16, sum(abs(d) > 8 for d in all_d)/n,
                                  max(map(abs, all_d))/255)): own.append(math.sqrt(value))
        centres.append((at[1]/at[0], at[2]/at[0]) if at[0] else (.5, .5))
    for y in range(96):
        for i in range(128): h[y//16, i//16][31] += np.std([p[y][i] for p in g])/64/256
    h = {k: [math.sqrt(v) for v in row] for k, row in h.items()}
    own = np.array(list(h.values()))
    c = np.array(centres)
    return [*own.max(0), *own.mean(0), *own.std(0), *four(h), *(math.sqrt(v/(moving + .02*7*96*128)) for v in F),
            *sum(G, []), *c.std(0), *np.abs(np.diff(c, axis=0)).mean(0)]


@pytest.mark.parametrize("seed", (0, 1))
def test_picture_is_its_definition(seed):
    x = scene(seed)[0]
    np.testing.assert_allclose(D.picture_features(x), slow_picture(x), atol=1e-6)


def test_motion_is_its_definition():
    x = np.stack([np.roll(scene(2)[0], (k, 2*k), (0, 1)) for k in range(8)])
    x[5:] = scene(3)[0]//2 + 20                                     # a cut, then nothing moves
    np.testing.assert_allclose(D.motion_features(x), slow_motion(x), atol=1e-6)


def test_sound_is_its_definition():
    wave = np.random.default_rng(0).normal(0, .1, 3*RATE).astype(np.float32)
    x = D.sound_features(wave)
    for k in range(3):
        L = log_mel(wave[k*RATE:(k + 1)*RATE])[:96]
        np.testing.assert_allclose(x[k], [*((L.mean(0) + 4.60517)/4), *(L.std(0)/2)], atol=1e-5)


# the specification's tests

STRANGE = {"black": np.zeros((16, 120, 160, 3), np.uint8), "white": np.full((16, 120, 160, 3), 255, np.uint8),
           "one frame": np.repeat(np.random.default_rng(1).integers(0, 256, (1, 120, 160, 3), np.uint8), 16, 0),
           "noise": np.random.default_rng(2).integers(0, 256, (16, 120, 160, 3), np.uint8),
           "one pixel": np.full((16, 1, 1, 3), 9, np.uint8), "tall": np.full((16, 300, 20, 3), 77, np.uint8),
           "flicker": np.repeat(np.uint8([0, 255]*8), 96*128*3).reshape(16, 96, 128, 3)}


@pytest.mark.parametrize("kind", STRANGE)
def test_widths_range_and_finiteness(kind):
    frames, motion, scores = look(D.Descriptor(), STRANGE[kind], 2)
    assert frames.shape == (16, 2048) and motion.shape == (2, 512) and scores is None
    assert frames.dtype == motion.dtype == np.float32
    for x in (frames, motion): assert np.isfinite(x).all() and x.min() >= 0 and x.max() <= (4 if kind == "flicker" else 2)
    assert frames.any()


@pytest.mark.parametrize("wave", (np.zeros(2*RATE), np.ones(2*RATE), np.sin(np.arange(2*RATE)), np.random.default_rng(0).uniform(-1, 1, 2*RATE)))
def test_sound_width_range_and_finiteness(wave):
    x, scores = D.Descriptor().sound(wave.astype(np.float32))
    assert x.shape == (2, 128) and x.dtype == np.float32 and scores is None
    # a tone at full scale adds up to 200 in one band, (ln 200 + 4.605)/4 = 2.476
    assert np.isfinite(x).all() and x.min() > -1e-5 and x.max() < 2.476


def test_repeatable_to_the_bit_and_independent_of_company():
    state = np.random.get_state()[1].tolist()
    x, of = STRANGE["noise"], D.Descriptor()
    frames, motion, _ = of.pictures(x)
    for again in (of.pictures(x.copy()), D.Descriptor().pictures(np.asfortranarray(x)), of.pictures(np.concatenate([x, x]))):
        assert again[0][:16].tobytes() == frames.tobytes() and again[1][:2].tobytes() == motion.tobytes()
    assert of.pictures(x[8:])[0].tobytes() == frames[8:].tobytes() and of.pictures(x[8:])[1].tobytes() == motion[1:].tobytes()
    assert np.random.get_state()[1].tolist() == state
    wave = np.random.default_rng(3).normal(0, .1, 2*RATE).astype(np.float32)
    assert of.sound(wave)[0][1:].tobytes() == of.sound(wave[RATE:])[0].tobytes()


def test_decoder_size_is_exact_for_four_to_three():
    "Pictures of 4:3 that were decoded at 96 pixels are those that a full picture is squeezed to"
    path = shared("llp/BjCEufrlXm4.mp4")
    if path is None or not path.exists(): pytest.skip("the shared video BjCEufrlXm4.mp4 is not there")
    pytest.importorskip("av", reason="PyAV isn't installed")
    of = D.Descriptor()
    small, full = (read_media(path, size=s).pictures for s in (of.size, None))
    assert full.shape[1:3] == (240, 320) and (small == D.squeezed(full)).all()


def test_it_needs_no_file_and_no_torch():
    import subprocess
    import sys
    said = subprocess.run([sys.executable, "-c", "import sys; from avvp_nb.media import descriptor; print('torch' in sys.modules)"],
                          capture_output=True, text=True, check=True).stdout
    assert said.strip() == "False" and D.Descriptor().about()["weights"] == []


# features of files, and networks on them

def media(path, **options):
    "Two seconds of a scene that moves, and a hum"
    assert options.get("size") == 96
    x = np.stack([np.roll(scene(0)[0], k, 1) for k in range(16)])
    return Media(path, {"duration": 2.}, 2, x, None, np.sin(np.arange(2*RATE)/5).astype(np.float32), [])


def test_extract_keeps_it_apart_from_the_papers(tmp_path):
    (tmp_path/"clip.mp4").write_bytes(b"x")
    done = E.extract([tmp_path/"clip.mp4"], tmp_path/"out", "descriptor", seconds=2, progress=False, read=media)
    assert [d.status for d in done] == ["done"]
    folders = {p.name: np.load(p/"clip.npy").shape for p in (tmp_path/"out").iterdir() if p.is_dir()}
    assert folders == {"descriptor_sound": (2, 128), "descriptor_pictures": (16, 2048), "descriptor_motion": (2, 512)}
    assert layout_source(tmp_path/"out")["mark"] == "own videos, back end descriptor, 2 s, frames grid"


def weights(path, **header):
    spec = RunSpec("han").plain()
    save_weights(METHODS["han"].build(spec, SIZES)[0], path, {"spec": spec, "sizes": SIZES, "classes": ["Loud", "Bright"], **header})
    return path


def test_network_on_it_parses(tmp_path):
    (tmp_path/"clip.mp4").write_bytes(b"x")
    net = tmp_path/"net.safetensors"
    release_weights(weights(tmp_path/"own.safetensors"), net, {"backend": "descriptor"})
    for model in (net, weights(tmp_path/"mark.safetensors", mark="own videos, back end descriptor, 10 s, frames grid")):
        done = P.parse_files([tmp_path/"clip.mp4"], tmp_path/model.stem, "descriptor", model=model, read=media, progress=False)
        assert done[0].error is None
        told = json.loads((tmp_path/model.stem/"clip.json").read_text())
        assert told["backend"] == "descriptor" and len(told["seconds"]) == 2 and "features of descriptor" in told["statement"]


def test_mixed_back_ends_are_refused(tmp_path):
    of, other = D.Descriptor(), D.Descriptor()
    other.name, other.alone = "paper", False
    silent, named = weights(tmp_path/"a.safetensors"), weights(tmp_path/"b.safetensors", mark="own videos, back end descriptor, 10 s")
    with pytest.raises(InputError, match="does not say which features it was trained on"): R.load_net(silent, of)
    R.load_net(silent, other)                                             # as before: the widths are all there is
    with pytest.raises(InputError, match="trained on features of 'descriptor'. expected features of 'paper'"): R.load_net(named, other)
    with pytest.raises(InputError, match="'descriptor' does not give"): R.load_released(tmp_path/"x.pt", "han", of)


def test_it_has_no_classes(tmp_path):
    with pytest.raises(InputError, match="'descriptor' has features and no classes"): R.Parser("descriptor")
    with pytest.raises(InputError, match="no such option of the back end 'descriptor'"): backend("descriptor", weights="x")


def test_help_names_it(capsys):
    for add in (P.add_parse_arguments, E.add_extract_arguments):
        p = argparse.ArgumentParser()
        add(p)
        with pytest.raises(SystemExit): p.parse_args(["--help"])
        assert "descriptor" in capsys.readouterr().out


def test_blocks_tell_directions_apart():
    "The same pictures backwards have the same colours and the opposite motion"
    x = np.stack([np.roll(scene(4)[0], 3*k, 1) for k in range(FPS)])
    there, back = D.motion_features(x), D.motion_features(x[::-1])
    F = [(v[224:480].reshape(8, 4, 8)**2).sum((0, 1)) for v in (there, back)]
    assert F[0].argmax() == 4 and F[1].argmax() == 0
