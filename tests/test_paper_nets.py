"""The papers' extractors: VGGish under both namings, torchvision's two networks where it can be imported, and the interface."""
import hashlib
import os
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from avvp_nb.core import InputError
from avvp_nb.media import paper_nets
from avvp_nb.media.backend import BACKENDS, Backend, backend, look, observe
from avvp_nb.media.decode import Media
from avvp_nb.media.extras import optional, read_tensors
from avvp_nb.media.paper_nets import (
    NETS,
    PaperNets,
    find_weights,
    for_motion,
    for_resnet,
    in_batches,
    torchvision_net,
)
from avvp_nb.media.sound import examples
from avvp_nb.media.vggish import TF_NAMES, VGGish, embed, vggish

PARAMETERS = [640, 73_856, 295_168, 590_080, 1_180_160, 2_359_808, 50_335_744, 16_781_312, 524_416]


@pytest.fixture(scope="session")
def torchvision():
    "torchvision; where its compiled operators don't fit, their schemas are defined first, as the specification says"
    try:
        import torchvision
        return torchvision
    except ModuleNotFoundError:
        pytest.skip("torchvision is not installed: pip install torchvision")
    except Exception:
        pass
    import sys
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    try:
        kept = torch.library.Library("torchvision", "DEF")
        for op in ("nms", "qnms"):
            kept.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    except Exception as e:
        pytest.skip(f"torchvision cannot be imported ({e})")
    torchvision.kept_by_the_tests = kept
    return torchvision


def numbers(net, seed=0, scale=.05):
    "Random weights of a network that is on the device meta; running variances are positive"
    g = torch.Generator().manual_seed(seed)
    out = {}
    for k, v in net.state_dict().items():
        if not v.dtype.is_floating_point:
            out[k] = torch.zeros(v.shape, dtype=v.dtype)
        elif v.ndim > 1:
            out[k] = torch.randn(v.shape, generator=g) * (2 / v[0].numel()) ** .5
        else:
            out[k] = torch.rand(v.shape, generator=g) * scale + (.9 if k.endswith(("weight", "var")) else 0)
    return out


@pytest.fixture(scope="module")
def weights():
    with torch.device("meta"):
        net = VGGish()
    return numbers(net)


def tensorflow(state):
    "The same weights under TensorFlow's names, in its order"
    names, out = {v: k for k, v in TF_NAMES.items()}, {}
    for k, v in state.items():
        layer, kind = k.rsplit(".", 1)
        x = v if kind == "bias" else v.permute(2, 3, 1, 0) if v.ndim == 4 else v.T
        out[f"vggish/{names[layer]}/{'biases' if kind == 'bias' else 'weights'}"] = x
    return out


# ---- VGGish -------------------------------------------------------------------------------------------------------

def test_parameters():
    with torch.device("meta"):
        net = VGGish()
    found = [sum(p.numel() for p in m.parameters()) for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert found == PARAMETERS and sum(found) == 72_141_184
    names = [f"features.{i}" for i in (0, 3, 6, 8, 11, 13)] + [f"embeddings.{i}" for i in (0, 2, 4)]
    assert [k for k in net.state_dict() if k.endswith("weight")] == [f"{n}.weight" for n in names]


@pytest.mark.parametrize("t,f,c", [(0, 0, 0), (2, 1, 7), (5, 3, 511), (0, 3, 1)])
def test_flatten_order(t, f, c):
    "A first linear layer that reads one place reads time t, frequency f, channel c at (4 t + f) 512 + c"
    with torch.device("meta"):
        net = VGGish()
    w = {k: torch.zeros(v.shape) for k, v in net.state_dict().items()}
    for i, out in ((0, 0), (3, 0), (6, 0), (8, 0), (11, 0), (13, c)):
        w[f"features.{i}.weight"][out, 0, 1, 1] = 1
    w["embeddings.0.weight"][0, (4 * t + f) * 512 + c] = w["embeddings.2.weight"][0, 0] = w["embeddings.4.weight"][0, 0] = 1
    x = torch.rand(1, 1, 96, 64, generator=torch.Generator().manual_seed(t))
    found = vggish(w)(x)[0]
    assert found[0] == x[0, 0, 16 * t:16 * t + 16, 16 * f:16 * f + 16].max() and (found[1:] == 0).all()


def test_both_namings_are_equal(weights, tmp_path):
    from safetensors.torch import save_file
    torch.save({**weights, "pproc.pca_eigen_vectors": torch.zeros(128, 128)}, tmp_path / "a.pth")
    save_file(weights, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", **{k: v.contiguous().numpy() for k, v in tensorflow(weights).items()})
    states = [read_tensors(tmp_path / n) for n in ("a.pth", "a.safetensors", "a.npz")]
    states.append({k.removeprefix("vggish/") + ":0": v for k, v in states[2].items()})
    L = examples(np.random.default_rng(0).standard_normal(32_000) * .1)
    found = [embed(vggish(w), L) for w in states]
    assert found[0].shape == (2, 128) and found[0].any() and all(np.array_equal(found[0], x) for x in found[1:])


def test_the_last_relu(weights):
    L = np.random.default_rng(0).standard_normal((3, 96, 64))
    after, before = (embed(vggish(weights, final_relu=r), L) for r in (True, False))
    assert before.min() < 0 and np.array_equal(after, np.maximum(before, 0))


def test_batches_do_not_matter(weights):
    net, L = vggish(weights), np.random.default_rng(0).standard_normal((5, 96, 64))
    np.testing.assert_allclose(embed(net, L, batch=2), embed(net, L), rtol=1e-4, atol=1e-5)
    assert embed(net, L[:0]).shape == (0, 128) and not net.training


def test_other_weights_are_refused(weights):
    for change, said in ((lambda w: w.pop("features.3.bias"), "1 tensors are missing, such as features.3.bias"),
                         (lambda w: w.update({"fc.bias": torch.zeros(9)}), "1 are unknown, such as fc.bias"),
                         (lambda w: w.update({"features.0.bias": torch.zeros(65)}), r"features.0.bias has shape \(65,\)")):
        w = dict(weights)
        change(w)
        with pytest.raises(InputError, match=f"v.pth: E_WEIGHTS: .*{said}"):
            vggish(w, "v.pth")
    with pytest.raises(InputError, match="18 tensors"):
        vggish({"conv1.weight": torch.zeros(3)})


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_weight_files_are_never_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"a": Bomb()}, protocol=2))
    torch.save({"a": Bomb()}, tmp_path / "b.pt")
    np.savez("c.npz", a=np.array([Bomb()]))
    (tmp_path / "d.safetensors").write_bytes(b"\xff" * 100)
    torch.save({"a": torch.tensor([1., float("nan")])}, tmp_path / "e.pth")
    torch.save([torch.zeros(1)], tmp_path / "f.pth")
    for name in ("a.pth", "b.pt", "c.npz", "d.safetensors", "e.pth", "f.pth", "none.pth"):
        with pytest.raises(InputError, match=name) as e:
            read_tensors(tmp_path / name)
        assert "\n" not in str(e.value)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(InputError, match="'.bin' is not possible"):
        read_tensors(tmp_path / "a.bin")


def test_world_is_left_alone(weights):
    "Random states, default dtype and gradients of the caller stay; results don't depend on them"
    L = np.random.default_rng(0).standard_normal((1, 96, 64))
    usual = embed(vggish(weights), L)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            found = embed(vggish(weights), L)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert np.array_equal(found, usual) and torch.equal(torch.get_rng_state(), state)


# ---- preprocessing ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("h,w", [(240, 320), (320, 240), (256, 256), (97, 333), (224, 400)])
def test_preprocessing_against_pillow_by_hand(h, w):
    from PIL import Image
    x = np.random.default_rng(h).integers(0, 256, (8, h, w, 3), np.uint8)
    H, W = (256, int(256 * w / h)) if h <= w else (int(256 * h / w), 256)
    a, b = for_resnet(x).numpy(), for_motion(x).numpy()
    assert a.shape == (8, 3, 224, 224) and b.shape == (1, 3, 8, 112, 112) and a.dtype == b.dtype == np.float32
    for k in (0, 5):
        big = Image.fromarray(x[k]).resize((W, H), Image.BILINEAR)
        top, left = round((H - 224) / 2), round((W - 224) / 2)
        whole = np.asarray(big.crop((left, top, left + 224, top + 224)), float) / 255
        small = np.asarray(Image.fromarray(x[k]).resize((112, 112), Image.BILINEAR), float) / 255
        for c in range(3):
            m, s = (.485, .456, .406)[c], (.229, .224, .225)[c]
            np.testing.assert_allclose(a[k, c], (whole[..., c] - m) / s, atol=1e-5)
            m, s = (.43216, .394666, .37645)[c], (.22803, .22145, .216989)[c]
            np.testing.assert_allclose(b[0, c, k], (small[..., c] - m) / s, atol=1e-5)


# ---- torchvision's networks ---------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def states(torchvision):
    with torch.device("meta"):
        nets = {"resnet152": torchvision.models.resnet152(weights=None),
                "r2plus1d_18": torchvision.models.video.r2plus1d_18(weights=None)}
    assert {k: sum(p.numel() for p in n.parameters()) for k, n in nets.items()} == \
        {"resnet152": 60_192_808, "r2plus1d_18": 31_505_325}
    out = {k: numbers(n) for k, n in nets.items()}
    for w in out.values():                       # a residual network of random weights grows with its depth
        for k, v in w.items():
            if k.endswith("bn3.weight"):
                v *= .1
    return out


def test_networks_of_torchvision(states):
    x = np.random.default_rng(0).integers(0, 256, (8, 60, 80, 3), np.uint8)
    net = torchvision_net("resnet152", states["resnet152"])
    a, one = in_batches(net, x[:3], for_resnet, 1, 3), in_batches(net, x[:3], for_resnet, 1, 1)
    assert a.shape == (3, 2048) and a.min() >= 0 and a.any() and np.isfinite(a).all() and not net.training
    np.testing.assert_allclose(a, one, atol=1e-5 * max(1, np.abs(a).max()), rtol=1e-5)
    net = torchvision_net("r2plus1d_18", states["r2plus1d_18"])
    b = in_batches(net, np.concatenate([x, x[::-1]]), for_motion, 8, 2)
    one = in_batches(net, x, for_motion, 8, 1)
    assert b.shape == (2, 512) and one.shape == (1, 512) and b.min() >= 0 and np.isfinite(b).all()
    np.testing.assert_allclose(b[:1], one, atol=1e-5 * max(1, np.abs(b).max()), rtol=1e-5)
    assert np.abs(b[0] - b[1]).max() > 1e-4      # the order of time matters


def test_old_files_and_wrong_files(states):
    w = {k: v for k, v in states["r2plus1d_18"].items() if not k.endswith("num_batches_tracked")}
    torchvision_net("r2plus1d_18", w)
    with pytest.raises(InputError, match="r.pth: E_WEIGHTS: .*tensors are missing"):
        torchvision_net("resnet152", w, "r.pth")


@pytest.fixture(scope="session")
def folder(states, tmp_path_factory):
    "Three weight files with random numbers, as a user would name them"
    path = tmp_path_factory.mktemp("weights")
    with torch.device("meta"):
        net = VGGish()
    for name, w in {**states, "vggish": numbers(net)}.items():
        torch.save(w, path / f"{name}-0000.pth")
    return path


def test_the_back_end(folder, states):
    "One second through all three networks, by the common interface"
    of = backend("paper", weights=folder)
    rng = np.random.default_rng(0)
    m = Media("a.mp4", {}, 1, rng.integers(0, 256, (8, 60, 80, 3), np.uint8), np.arange(8) / 8,
              (rng.standard_normal(16_000) * .1).astype("f4"))
    x = observe(of, m)
    assert (x.audio.shape, x.frames.shape, x.motion.shape, x.heard, x.seen) == ((1, 128), (8, 2048), (1, 512), None, None)
    assert x.audio.any() and x.frames.any() and x.motion.any() and of.size is None
    net = torchvision_net("resnet152", states["resnet152"])
    np.testing.assert_allclose(x.frames, in_batches(net, m.pictures, for_resnet, 1, 16), rtol=1e-5)
    about = of.about()
    assert [w["network"] for w in about["weights"]] == list(NETS) and about["name"] == "paper"
    for w in about["weights"]:
        assert w["sha256"] == hashlib.sha256((folder / w["file"]).read_bytes()).hexdigest() and "licence" in w
        assert w["known_as"] == paper_nets.NEW
    deaf = observe(of, Media("a.mp4", {}, 1, None, None, m.waveform))
    assert not deaf.frames.any() and not deaf.motion.any() and np.array_equal(deaf.audio, x.audio)


# ---- files and interface, without torchvision -----------------------------------------------------------------------

def test_missing_files_are_named_together(tmp_path):
    (tmp_path / "vggish-10086976.pth").touch()
    with pytest.raises(InputError, match="E_WEIGHTS: no file for resnet152, r2plus1d_18. expected such as resnet152.pth"):
        backend("paper", weights=tmp_path)
    with pytest.raises(InputError, match="E_WEIGHTS: no such folder"):
        PaperNets(tmp_path / "none")
    with pytest.raises(InputError, match="no file for resnet152, r2plus1d_18"):
        find_weights({"vggish": tmp_path / "vggish-10086976.pth", "resnet152": tmp_path / "gone.pth"})
    (tmp_path / "vggish.npz").touch()
    with pytest.raises(InputError, match="2 files for vggish"):
        find_weights(tmp_path)


def test_the_second_weights_of_imagenet_are_refused(tmp_path, monkeypatch):
    (tmp_path / "resnet152.pth").write_bytes(b"x")
    monkeypatch.setattr(paper_nets, "KNOWN", {hashlib.sha256(b"x").hexdigest()[:8]: "IMAGENET1K_V2"})
    with pytest.raises(InputError, match="resnet152.pth: E_WEIGHTS: are IMAGENET1K_V2.*expected IMAGENET1K_V1"):
        paper_nets.known_file("resnet152", tmp_path / "resnet152.pth")


def test_torchvision_missing(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.delitem(sys.modules, "torchvision.models", raising=False)
    with pytest.raises(InputError, match="the network resnet152 of the back end 'paper' needs torchvision.*pip install torchvision"):
        torchvision_net("resnet152", {})


def test_a_package_that_fails_is_told(tmp_path, monkeypatch):
    "A package that is there and cannot be imported, as torchvision beside another PyTorch"
    (tmp_path / "broken_package.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="seeing needs broken_package, which cannot be imported .operator torchvision::nms"):
        optional("broken_package", "seeing")


class Plain(Backend):
    name, audio_dim, frame_dim, motion_dim, classes, cannot_see = "plain", 2, 3, 4, ("Dog", "Speech"), ("Speech",)

    def sound(self, waveform):
        n = len(waveform) // 16_000
        return np.ones((n, 2)), np.full((n, 2), .5)

    def pictures(self, pictures):
        n = len(pictures) // 8
        return np.ones((8 * n, 3)), np.ones((n, 4)), np.full((n, 2), .25)


def test_interface():
    m = Media("a.mp4", {}, 3, np.zeros((24, 4, 4, 3), np.uint8), np.arange(24) / 8, np.zeros(48_000, "f4"))
    x = observe(Plain(), m)
    assert [a.shape for a in (x.audio, x.frames, x.motion, x.heard, x.seen)] == [(3, 2), (24, 3), (3, 4), (3, 2), (3, 2)]
    assert all(a.dtype == np.float32 for a in vars(x).values())
    m.waveform = None
    x = observe(Plain(), m)
    assert not x.heard.any() and x.audio.any() and x.seen.any()       # silence has features, and is not heard
    m.pictures, m.waveform = None, np.zeros(48_000, "f4")
    x = observe(Plain(), m)
    assert not (x.seen.any() or x.frames.any() or x.motion.any()) and x.heard.any()


@pytest.mark.parametrize("what,said", [
    (dict(sound=lambda w: (np.ones((2, 2)), None)), "features of sound of shape .2, 2.. expected .3, 2."),
    (dict(sound=lambda w: (np.ones((3, 2)), np.ones((3, 5)))), "scores of sound of shape"),
    (dict(pictures=lambda p: (np.full((24, 3), np.nan), None, None)), "NaN or infinity as features of pictures"),
    (dict(pictures=lambda p: (np.ones((24, 3)), np.ones((3, 9)), None)), "motion of shape .3, 9.")])
def test_broken_promises(what, said):
    of = Plain()
    vars(of).update(what)
    m = Media("a.mp4", {}, 3, np.zeros((24, 4, 4, 3), np.uint8), np.arange(24) / 8, np.zeros(48_000, "f4"))
    with pytest.raises(InputError, match=f"back end plain: returned {said}"):
        observe(of, m)
    with pytest.raises(InputError, match="pictures: 23 of them. expected 24 for 3 seconds"):
        look(Plain(), m.pictures[1:], 3)


def test_registry():
    assert BACKENDS["paper"] is PaperNets
    with pytest.raises(InputError, match="backend: 'papre' is not possible.*did you mean 'paper'"):
        backend("papre")
    with pytest.raises(InputError, match="wieghts: no such option of the back end 'paper'. did you mean 'weights'"):
        backend("paper", wieghts="x")
