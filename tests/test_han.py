"""Parity of HAN, its pooling and its loss with the official code, values and gradients."""
import zlib

import numpy as np
import pytest
import torch
from conftest import close

from avvp_nb.core import read_json, shared
from avvp_nb.data.clips import Batch
from avvp_nb.methods.han import HAN, HybridAttention, pooled_frames
from avvp_nb.methods.losses import GuidedLoss
from avvp_nb.methods.official import from_official, to_official

VARIANTS = ["", "_chirp"]


def fill(keys, rule):
    "Official state dict computed from key names and shapes (the fill rule of the reference cases)"
    out = {}
    for key, shape in keys.items():
        i = np.arange(int(np.prod(shape)), dtype=np.int64)
        phase = (zlib.crc32(key.encode()) % 1000) / 1000 * 2 * np.pi
        s = np.sin(0.7 * i + phase + (0.001 * ((i * i) % 6007) if rule == "chirp" else 0))
        norm = "norm" in key and key.endswith("weight")
        x = 0.05 * s if len(shape) > 1 else 1 + 0.1 * s if norm else 0.02 * s
        out[key] = torch.tensor(x.reshape(shape).astype(np.float32))
    return out


@pytest.fixture(scope="module")
def official_keys(golden):
    from avvp_nb.core import read_json, shared
    keys = read_json(shared("golden", "state_dict_keys.json"))["han"]["keys"]
    return {k["key"]: k["shape"] for k in keys}


@pytest.fixture(scope="module")
def inputs(golden):
    return {k: torch.tensor(v) for k, v in golden("inputs_b3").items()}


def build(official_keys, variant):
    return from_official(fill(official_keys, "chirp" if variant else "sine"), "han", strict=True)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pooled", [False, True])
def test_forward(golden, official_keys, inputs, variant, pooled):
    case, model = golden("han_forward" + variant), build(official_keys, variant)
    frames = pooled_frames(inputs["visual"], 10) if pooled else inputs["visual"]
    with torch.no_grad():
        e_a, e_v = model.project(inputs["audio"], frames, inputs["visual_st"])
        x_a, x_v = model.attend(e_a, e_v)
        out = model(inputs["audio"], frames, inputs["visual_st"])
        maps = {m: model.layers[0].weights(*pair) for m, pair in {"a": (e_a, e_v), "v": (e_v, e_a)}.items()}
    for key, value in {"global_prob": out.video, "a_prob": out.audio, "v_prob": out.visual, "frame_prob": out.segments,
                       "enc_in_a": e_a, "enc_in_v": e_v, "hat_a": x_a, "hat_v": x_v}.items():
        close(case, key, value)
    for m, (self_att, cross_att) in maps.items():
        close(case, f"self_attn_weights_{m}", self_att)
        close(case, f"cross_attn_weights_{m}", cross_att)


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients(golden, official_keys, inputs, variant):
    case, model = golden("han_loss" + variant), build(official_keys, variant)
    # evaluation mode switches every dropout off, as the reference run did; there is nothing else that depends on it
    parsing = model(inputs["audio"], inputs["visual"], inputs["visual_st"])
    terms = GuidedLoss()(parsing, Batch(None, None, None, torch.tensor(case["label"]), None, {}))
    total = sum(terms.values())
    total.backward()
    for key, value in {"loss_audio": terms["audio"], "loss_visual": terms["visual"], "loss_global": terms["video"],
                       "loss_total": total}.items():
        close(case, key, value.detach())
    grads = to_official(model, of=lambda p: p.grad)
    for key in [k for k in case if k.startswith("grad.")]:
        close(case, key, grads[key[5:]])
    norms = np.array([grads[k].norm().item() if k in grads else np.nan for k in case.info["parameter_keys"]])
    close(case, "grad_norms", norms)


def test_wrong_scale_is_detected(golden, official_keys, inputs, monkeypatch):
    "The parity test has teeth: without the 1/sqrt(D) of the attention the chirp case fails"
    from torch.nn import functional as F
    case, model = golden("han_forward_chirp"), build(official_keys, "_chirp")
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: (q @ k.mT).softmax(-1) @ v)
    with torch.no_grad():
        out = model(inputs["audio"], inputs["visual"], inputs["visual_st"])
    with pytest.raises(AssertionError):
        close(case, "frame_prob", out.segments)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_cuda(golden, official_keys, inputs, variant):
    case, model = golden("han_forward" + variant), build(official_keys, variant).cuda()
    with torch.no_grad():
        out = model(*(inputs[k].cuda() for k in ("audio", "visual", "visual_st")))
    close(case, "frame_prob", out.segments.cpu())


def test_paper_protocol_trains():
    torch.manual_seed(0)
    model = HAN(protocol="paper", classes=4, audio_dim=8, frame_dim=8, motion_dim=8, dim=16)
    x = torch.randn(6, 5, 8)
    y = (torch.rand(6, 4) > .5).float()
    opt, first = torch.optim.Adam(model.parameters(), 1e-2), None
    for _ in range(30):
        loss = sum(GuidedLoss()(model(x, x, x), Batch(None, None, None, y, None, {})).values())
        first = first or loss.item()
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert loss.item() < .8 * first


# --- maps multiplied out --------------------------------------------------------------------------------------------


def layer(merge, dim=16, dropout=0.):
    torch.manual_seed(0)
    layer = HybridAttention(dim, dim, dropout, merge=merge).double()
    for p in layer.parameters(): torch.nn.init.normal_(p, std=.2)           # biases too
    return layer


@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_merged_maps_are_exact(cross, masked):
    "Values, and gradients of every parameter and of both inputs"
    mask = torch.arange(7) < torch.tensor([7, 3, 5])[:, None] if masked else None
    def result(merge):
        m, x = layer(merge), torch.randn(2, 3, 7, 16, dtype=torch.double, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = m(x[0], x[1], cross, mask)
        (y * torch.sin(torch.arange(y.numel()).view_as(y))).sum().backward()
        return y, x.grad, {k: p.grad for k, p in m.named_parameters() if p.grad is not None}
    (y, gx, g), (y1, gx1, g1) = result(False), result(True)
    torch.testing.assert_close(y1, y, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gx1, gx, rtol=1e-9, atol=1e-10)
    for k, v in g.items():
        if k in g1: torch.testing.assert_close(g1[k], v, rtol=1e-9, atol=1e-10, msg=k)
        else: assert not cross and not v.any(), k
    assert set(g1) <= set(g)


def test_merged_maps_leave_dropout_alone():
    "The same seed drops the same attention weights and features"
    def result(merge):
        torch.manual_seed(3)
        return layer(merge, dropout=.3).train()(*torch.randn(2, 3, 7, 16, dtype=torch.double, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(result(True), result(False), rtol=1e-11, atol=1e-12)


def test_key_biases_get_no_gradient_at_all():
    m = layer(True)
    m(*torch.randn(2, 3, 7, 16, dtype=torch.double)).sin().sum().backward()
    for half in m.qkv.bias.grad.chunk(2): assert not half[16:32].any() and half[:16].any()


def test_when_maps_are_merged():
    "From twice as many rows as the maps are wide; not in lower precision"
    m = HybridAttention(16, 16)
    assert m.merges(torch.zeros(8, 4, 16)) and not m.merges(torch.zeros(7, 4, 16))
    with torch.autocast("cpu", torch.bfloat16): assert not m.merges(torch.zeros(8, 4, 16))
    assert not HybridAttention(16, 16, merge=False).merges(torch.zeros(8, 4, 16))


@pytest.mark.parametrize("variant", ["", "_chirp"])
def test_reference_cases_with_merged_maps(golden, variant):
    keys = {k["key"]: k["shape"] for k in read_json(shared("golden", "state_dict_keys.json"))["han"]["keys"]}
    model = from_official(fill(keys, "chirp" if variant else "sine"), "han", strict=True)
    model.layers[0].merge = True
    x = [torch.tensor(golden("inputs_b3")[k]) for k in ("audio", "visual", "visual_st")]
    with torch.no_grad(): out = model(*x)
    case = golden("han_forward" + variant)
    for key, value in {"global_prob": out.video, "a_prob": out.audio, "v_prob": out.visual, "frame_prob": out.segments}.items(): close(case, key, value)


def test_a_large_batch_of_the_whole_network():
    "In single precision, beyond the threshold"
    torch.manual_seed(0)
    model = HAN(dim=32, audio_dim=8, frame_dim=8, motion_dim=8).eval()
    x = torch.randn(3, 16, 10, 8)
    with torch.no_grad(): merged = model(*x).segments
    assert model.layers[0].merges(torch.zeros(32, 10, 32))
    model.layers[0].merge = False
    with torch.no_grad(): torch.testing.assert_close(merged, model(*x).segments, rtol=1e-5, atol=1e-6)
