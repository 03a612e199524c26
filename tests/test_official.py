"""Checkpoints of the authors' code: what is loaded, what is left over, what is refused, and that nothing in them runs."""
import math
import warnings
import zlib

import micro  # noqa: F401  (sets one torch thread)
import numpy as np
import pytest
import torch
from test_han import fill
from torch.nn import functional as F

from avvp_nb.core import InputError, read_json, shared
from avvp_nb.methods.han import HAN
from avvp_nb.methods.official import from_official, load_official, to_official

SMALL = dict(classes=4, audio_dim=6, frame_dim=7, motion_dim=5)


def attention(prefix, D):
    return {f"{prefix}.in_proj_weight": (3 * D, D), f"{prefix}.in_proj_bias": (3 * D,), f"{prefix}.out_proj.weight": (D, D),
            f"{prefix}.out_proj.bias": (D,)}


def keys(C=25, audio=128, frames=2048, motion=512, D=512):
    "Names and shapes of the official HAN (spec, section 8): what its forward pass uses, and the rest"
    linear = {"fc_prob": (C, D), "fc_frame_att": (C, D), "fc_av_att": (C, D), "fc_a": (D, audio), "fc_v": (D, frames),
              "fc_st": (D, motion), "fc_fusion": (D, 2 * D)}
    norms = lambda p: {f"{p}.norm{i}.{k}": (D,) for i in (1, 2) for k in ("weight", "bias")}
    def block(p, *attentions):
        out = {}
        for a in attentions: out |= attention(f"{p}.{a}", D)
        for i in (1, 2): out |= {f"{p}.linear{i}.weight": (D, D), f"{p}.linear{i}.bias": (D,)}
        return out | norms(p)
    used = {f"{k}.weight": v for k, v in linear.items()} | {f"{k}.bias": v[:1] for k, v in linear.items()}
    used |= block("hat_encoder.layers.0", "self_attn", "cm_attn")
    rest = norms("hat_encoder") | norms("cmt_encoder")
    for e in ("audio_encoder", "visual_encoder", "cmt_encoder"): rest |= block(f"{e}.layers.0", "self_attn")
    return used, rest


USED, REST = keys()


@pytest.fixture(scope="module")
def official(): return fill(USED | REST, "chirp")


def forward_by_hand(w, audio, frames, motion):
    "The official forward pass on its own state dict, in double precision: (segments, video, audio, visual)"
    w = {k: v.double() for k, v in w.items()}
    def affine(k, x): return x @ w[f"{k}.weight"].T + w[f"{k}.bias"]
    def norm(k, x):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{k}.weight"] + w[f"{k}.bias"]
    def attend(k, q, o):
        W, b = w[f"{k}.in_proj_weight"].chunk(3), w[f"{k}.in_proj_bias"].chunk(3)
        q, key, value = (x @ m.T + c for x, m, c in zip((q, o, o), W, b))
        return affine(f"{k}.out_proj", F.softmax(q @ key.mT / math.sqrt(q.shape[-1]), -1) @ value)
    def layer(q, o, p="hat_encoder.layers.0"):
        x = norm(f"{p}.norm1", q + attend(f"{p}.cm_attn", q, o) + attend(f"{p}.self_attn", q, q))
        return norm(f"{p}.norm2", x + affine(f"{p}.linear2", affine(f"{p}.linear1", x).relu()))
    B, T = audio.shape[:2]
    a = affine("fc_a", audio)
    v = affine("fc_v", frames).reshape(B, T, -1, a.shape[-1]).mean(2)
    v = affine("fc_fusion", torch.cat([v, affine("fc_st", motion)], -1))
    x = torch.stack([layer(a, v), layer(v, a)], 2)                              # (B,T,2,D)
    p, tp, av = (affine(k, x) for k in ("fc_prob", "fc_frame_att", "fc_av_att"))
    p, tp, av = p.sigmoid(), tp.softmax(1), av.softmax(2)
    return p, (tp * av * p).sum((1, 2)), *(tp * p).sum(1).unbind(1)


# --- what is in the file ---------------------------------------------------------------------------------------------

def test_the_key_list_is_the_one_of_the_published_class(golden):
    "74 tensors, 9,307,723 numbers; half of them are used"
    want = {k["key"]: tuple(k["shape"]) for k in read_json(shared("golden", "state_dict_keys.json"))["han"]["keys"]}
    assert USED | REST == want


def test_sizes():
    numbers = {k: sum(int(np.prod(s)) for s in part.values()) for k, part in (("used", USED), ("rest", REST))}
    assert len(USED) + len(REST) == 74 and sum(numbers.values()) == 9_307_723
    assert numbers["used"] == sum(p.numel() for p in HAN().parameters())


def test_outputs_are_those_of_the_official_forward_pass(official):
    torch.manual_seed(0)
    x = torch.randn(2, 10, 128), torch.rand(2, 80, 2048), torch.rand(2, 10, 512)
    model = from_official(official, "han", strict=True)
    with torch.no_grad(): got = model.double()(*(v.double() for v in x))
    for a, b in zip((got.segments, got.video, got.audio, got.visual), forward_by_hand(official, *(v.double() for v in x))):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
    assert got.segments.std() > .05                                                # the case says something


def test_there_and_back(official):
    model = from_official(official)
    assert not model.training
    back = to_official(model)
    assert set(back) == set(USED) and all(torch.equal(v, official[k]) for k, v in back.items())
    own = {k: v.clone() for k, v in model.state_dict().items()}
    for k, v in from_official(back).state_dict().items(): assert torch.equal(v, own[k])


def test_every_official_number_is_used_once():
    "Changing any one tensor of the file changes ours, and by as many numbers"
    start = {k: torch.zeros(s) for k, s in USED.items()}
    base = from_official(start).state_dict()
    for k, s in USED.items():
        changed = from_official({**start, k: torch.ones(s)}).state_dict()
        assert sum((changed[n] != v).sum().item() for n, v in base.items()) == int(np.prod(s)), k


def test_gradients_under_official_names(official):
    model = from_official(official)
    b = torch.ones(1, 10, 128), torch.ones(1, 10, 2048), torch.ones(1, 10, 512)
    model(*b).video.sum().backward()
    grads = to_official(model, of=lambda p: p.grad)
    assert set(grads) == set(USED)
    D = 512
    torch.testing.assert_close(grads["hat_encoder.layers.0.cm_attn.in_proj_weight"], model.layers[0].qkv.weight.grad[3 * D:])
    torch.testing.assert_close(grads["fc_av_att.weight"], model.head.maps[0].weight.grad[50:])


def test_the_file_is_not_changed_and_not_shared(official):
    before = {k: v.clone() for k, v in official.items()}
    model = from_official(official)
    with torch.no_grad():
        for p in model.parameters(): p.add_(1)
    assert all(torch.equal(v, official[k]) for k, v in before.items())


# --- forms of files --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("form", ["bare", "module", "model", "double"])
def test_forms_of_checkpoints(official, form):
    state = {"bare": official, "module": {f"module.{k}": v for k, v in official.items()},
             "model": {"model": {f"module.{k}": v for k, v in official.items()}, "epochs": 3},
             "double": {k: v.double() for k, v in official.items()}}[form]
    model = from_official(state, "han", strict=True)
    for k, v in to_official(model).items(): assert torch.equal(v, official[k])


def test_other_numbers_of_classes_and_features():
    used, rest = keys(4, 6, 7, 5)
    state = fill(used | rest, "sine")
    model = from_official(state, audio_dim=6, frame_dim=7, motion_dim=5)
    assert model.head.classes == 4 and set(to_official(model)) == set(used)
    with pytest.raises(InputError, match=r"has shape .*expected"): from_official(state)


def test_another_width():
    "The rows of the fused projections follow the width of the network"
    used, rest = keys(4, 6, 7, 5, D=32)
    state = fill(used | rest, "chirp")
    back = to_official(HAN(**SMALL, dim=32))
    assert {k: tuple(v.shape) for k, v in back.items()} == used
    model = from_official(state, dim=32, audio_dim=6, frame_dim=7, motion_dim=5)
    for k, v in to_official(model).items(): assert torch.equal(v, state[k])


# --- refusals --------------------------------------------------------------------------------------------------------

def test_unused_modules_are_dropped_in_silence(official):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_official(official, "han")


def test_other_left_overs_are_reported(official):
    state = {**official, "t_att.fc.bias": torch.zeros(1), "hat_encoder.layers.1.norm1.bias": torch.zeros(1)}
    with pytest.warns(UserWarning, match=r"2 tensors are not used by han: hat_encoder\.layers\.1\.norm1\.bias, t_att\.fc\.bias"):
        from_official(state)
    with pytest.raises(InputError, match=r"t_att\.fc\.bias.*is this a checkpoint of another method"): from_official(state, strict=True)


KEYS = ["fc_a.weight", "fc_prob.bias", "hat_encoder.layers.0.cm_attn.in_proj_weight", "fc_av_att.weight"]


@pytest.mark.parametrize("key, how", [(k, how) for k in KEYS for how in ("missing", "shorter", "scalar")])
def test_missing_and_misshapen_tensors_are_named(official, key, how):
    state, value = dict(official), official[key]
    if how == "missing": del state[key]
    else: state[key] = torch.zeros(()) if how == "scalar" else value[:-1]
    said = f"1 tensors are missing, such as '{key}'" if how == "missing" else r"has shape \("
    with pytest.raises(InputError, match=said): from_official(state)


@pytest.mark.parametrize("state", [[], {}, None, torch.zeros(3), {"fc_a.bias": torch.zeros(512)}, {"epoch": 3}])
def test_what_is_no_state_dict_is_refused(state):
    with pytest.raises(InputError, match="not a state dict|tensors are missing"): from_official(state)


def test_numbers_in_place_of_tensors_are_refused(official):
    with pytest.raises(InputError, match=r"fc_prob\.bias"): from_official({**official, "fc_prob.bias": 3})


def test_numbers_that_are_none_are_refused(official):
    state = {**official, "fc_a.bias": torch.full((512,), torch.nan)}
    with pytest.raises(InputError, match=r"fc_a\.bias.*(NaN|nan|finite)"): from_official(state)


def test_an_unknown_method_is_refused(official):
    for f in (from_official, lambda s, m: to_official(HAN(**SMALL), m)):
        with pytest.raises(InputError, match="method: 'hna' is not possible.*did you mean 'han'"): f(official, "hna")


# --- files -----------------------------------------------------------------------------------------------------------

def test_a_file_is_read(official, tmp_path):
    torch.save(official, tmp_path / "han.pt")
    model = load_official(tmp_path / "han.pt", strict=True)
    for k, v in to_official(model).items(): assert torch.equal(v, official[k])


class Evil:
    "Creates a file when it is unpickled"
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return open, (self.path, "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_file_is_refused_and_not_executed(official, tmp_path, form):
    path, trace = tmp_path / "han.pt", tmp_path / "executed"
    state = {"fc_a.bias": official["fc_a.bias"], "x": Evil(trace)}
    if form == "pickle":
        import pickle
        path.write_bytes(pickle.dumps({"x": Evil(trace)}))
    else: torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(InputError, match=r"han\.pt: cannot be read as weights"): load_official(path)
    assert not trace.exists()
    torch.load(path, weights_only=False) if form != "pickle" else __import__("pickle").loads(path.read_bytes())
    assert trace.exists()                                                          # the test has teeth


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 not a zip"])
def test_files_that_are_no_checkpoints_are_named(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.pt: cannot be read as weights"): load_official(tmp_path / "x.pt")


def test_a_cut_file_and_no_file(official, tmp_path):
    torch.save({k: official[k] for k in ("fc_a.bias", "fc_a.weight")}, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(data[:len(data) // 2])
    with pytest.raises(InputError, match=r"x\.pt: cannot be read as weights"): load_official(tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"none\.pt: no such file"): load_official(tmp_path / "none.pt")


def test_the_fill_rule_depends_on_names():
    "So that two exchanged tensors cannot go unnoticed"
    a, b = (fill({k: (4, 4)}, "chirp")[k] for k in ("fc_a.weight", "fc_v.weight"))
    assert not torch.equal(a, b) and zlib.crc32(b"fc_a.weight") != zlib.crc32(b"fc_v.weight")
