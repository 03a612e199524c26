"""VALOR's layer against PyTorch's own, its network step by step, and its schedule as a callback."""
import math

import micro
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from avvp_nb.core import InputError
from avvp_nb.data.pseudo import with_pseudo_labels
from avvp_nb.methods.dgm import DGMNet
from avvp_nb.methods.han import HAN, HybridAttention
from avvp_nb.methods.losses import bce
from avvp_nb.methods.valor import (
    BASE_LOSS,
    LOSS,
    PLUS,
    RECIPE,
    RULE,
    VALOR,
    MultiHeadHybrid,
    ValorCB,
    split_heads,
    warm_cosine,
)
from avvp_nb.train.callbacks import CheckpointCB, ValidateCB
from avvp_nb.train.learner import Learner, predict, predict_both

TINY = {**micro.SIZES, "heads": 4, "hidden": 24}


def build(seed=0, **kw):
    torch.manual_seed(seed)
    return VALOR(**{**TINY, **kw})


def taught(n=40, seed=0):
    clips = micro.toy_clips(n, seed)
    return with_pseudo_labels(clips, {m: clips.dense_audio for m in ("audio", "visual")})


def official_layer(layer, heads):
    "A layer of two `nn.MultiheadAttention`, in the order of the published description"
    dim = layer.norm1.normalized_shape[0]
    atts = []
    for half, out in enumerate((layer.out_self, layer.out_cross)):
        a = nn.MultiheadAttention(dim, heads, batch_first=True)
        a.load_state_dict({"in_proj_weight": layer.qkv.weight.data.chunk(2)[half], "in_proj_bias": layer.qkv.bias.data.chunk(2)[half],
                           "out_proj.weight": out.weight.data, "out_proj.bias": out.bias.data})
        atts.append(a.eval())
    def forward(own, other, ignore=None):
        x = own + atts[1](own, other, other, key_padding_mask=ignore)[0] + atts[0](own, own, own, key_padding_mask=ignore)[0]
        x = layer.norm1(x)
        return layer.norm2(x + layer.ffn2(layer.ffn1(x).relu()))
    return forward


@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("masked", [False, True])
def test_layer_equals_pytorchs_attention(heads, masked):
    torch.manual_seed(heads)
    layer = MultiHeadHybrid(16, 40, heads=heads).eval()
    nn.init.normal_(layer.qkv.bias)
    a, v = torch.randn(3, 6, 16), torch.randn(3, 6, 16)
    mask = torch.arange(6) < torch.tensor([[6], [2], [4]]) if masked else None
    want = official_layer(layer, heads)(a, v, None if mask is None else ~mask)
    torch.testing.assert_close(layer(a, v, mask=mask), want, rtol=1e-4, atol=1e-5)


def test_one_head_is_hans_layer():
    layer, plain = MultiHeadHybrid(16, 16, heads=1), HybridAttention(16, 16)
    plain.load_state_dict(layer.state_dict())
    a, v = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    for ca in (True, False): torch.testing.assert_close(layer.eval()(a, v, ca), plain.eval()(a, v, ca), rtol=1e-5, atol=1e-6)


def test_weights_of_a_row_add_up():
    for w in MultiHeadHybrid(16, heads=4).weights(torch.randn(2, 5, 16), torch.randn(2, 5, 16)):
        assert w.shape == (2, 5, 5)
        torch.testing.assert_close(w.sum(-1), torch.ones(2, 5))


def test_heads_are_slices():
    x = torch.arange(24.).reshape(1, 2, 12)
    assert torch.equal(split_heads(x, 3)[0, 1], x[0, :, 4:8])


@pytest.mark.parametrize("n_layers", [1, 2, 4])
def test_sound_is_updated_first(n_layers):
    net = build(n_layers=n_layers).eval()
    a, v = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    got = net.attend(a, v)
    for layer in net.layers:
        step = official_layer(layer, 4)
        a = step(a, v)
        v = step(v, a)                                  # the updated sound
    torch.testing.assert_close(got[0], a, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1], v, rtol=1e-4, atol=1e-5)


def test_it_is_no_han_in_other_clothes():
    net, han = build(heads=1, hidden=16).eval(), HAN(**micro.SIZES).eval()
    han.load_state_dict(net.state_dict())
    e = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    torch.testing.assert_close(net.attend(*e)[0], han.attend(*e)[0], rtol=1e-5, atol=1e-6)     # sound is the same,
    assert (net.attend(*e)[1] - han.attend(*e)[1]).abs().max() > 1e-3                          # vision is not


def test_default_sizes_are_the_papers():
    net = VALOR()
    layer = net.layers[0]
    assert len(net.layers) == 1 and (layer.heads, layer.ffn1.out_features, layer.ffn1.in_features, layer.drop.p) == (8, 1024, 512, .1)
    plus = VALOR(**PLUS)
    assert len(plus.layers) == 4 and plus.project.fusion.out_features == 256
    assert not torch.equal(plus.layers[0].qkv.weight, plus.layers[1].qkv.weight)
    assert (RECIPE["lr"], RECIPE["batch_size"], RECIPE["epochs"], RECIPE["select"], RULE) == (1e-4, 64, 60, "segment/Type@AV", "han")


def test_passes_and_padding():
    clips = micro.toy_clips(6)
    net = build()
    with_, without = predict_both(net, clips)
    np.testing.assert_allclose(with_.segments, predict(net, clips).segments, atol=1e-6)
    np.testing.assert_allclose(without.segments, predict(net, clips, cross_attention=False).segments, atol=1e-6)
    b = clips.batch([0, 1])
    mask = torch.arange(5) < torch.tensor([[3], [5]])
    got, want = net.eval()(*b.features, mask=mask), net(*(x[:1, :3] for x in b.features))
    torch.testing.assert_close(got.audio[:1], want.audio, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.segments[:1, :3], want.segments, rtol=1e-4, atol=1e-6)


def test_it_can_be_modulated():
    net = DGMNet(build(), msdu=False, shared="split")
    out = net(*micro.toy_clips(3).batch(range(3)).features)
    assert tuple(out.segments.shape) == (3, 5, 2, 3)
    plain = build().eval()
    tied = DGMNet(build(), msdu=False, shared="split").eval()
    x = micro.toy_clips(3).batch(range(3)).features
    torch.testing.assert_close(tied(*x).segments, plain(*x).segments, rtol=1e-5, atol=1e-6)


# ---- loss and schedule

def test_loss_is_three_plain_cross_entropies():
    clips, net = taught(8), build().eval()
    batch = clips.batch(range(8))
    p = net(*batch.features)
    terms = LOSS(p, batch)
    assert list(terms) == ["video", "dense_audio", "dense_visual"] and list(BASE_LOSS(p, batch)) == ["video"]
    torch.testing.assert_close(terms["video"], bce(p.video, batch.weak))
    want = nn.functional.binary_cross_entropy(p.segments[:, :, 1], batch.labels["pseudo_visual"])
    torch.testing.assert_close(terms["dense_visual"], want)


@settings(max_examples=40, deadline=None)
@given(epochs=st.integers(1, 80), share=st.floats(0, 1), lr=st.floats(1e-5, 1.))
def test_schedule(epochs, share, lr):
    rates = [warm_cosine(e, epochs, lr, share * epochs) for e in range(epochs)]
    top = int(np.argmax(rates))
    assert all(0 < r <= lr * (1 + 1e-9) for r in rates)
    assert all(a < b for a, b in zip(rates[:top], rates[1:top + 1])) and all(a > b for a, b in zip(rates[top:], rates[top + 1:]))


def test_schedule_of_the_paper():
    rates = [warm_cosine(e, 60, 1e-4, 10) for e in range(60)]
    assert rates[:10] == pytest.approx([1e-5 * k for k in range(1, 11)]) and rates[-1] == pytest.approx(1e-6)
    assert rates[19] == pytest.approx(1e-6 + .5 * 99e-6 * (1 + math.cos(math.pi / 5)))


def fit(epochs=4, path=None, until=None, **kw):
    callbacks = [ValorCB(**kw), ValidateCB(None)] + ([CheckpointCB(path, "x")] if path else [])
    learner = Learner(build(), taught(), LOSS, epochs=epochs, lr=5e-3, batch_size=16, device="cpu", callbacks=callbacks)
    if until:
        def stop(learner):
            if learner.epoch == until: raise KeyboardInterrupt
        learner.callbacks.append(type("Stop", (ValorCB,), {"before_fit": lambda *a: None, "after_backward": lambda *a: None,
                                                           "after_epoch": lambda s, l: stop(l)})())
    return learner.fit()


def test_the_learner_follows_the_schedule_and_adamw():
    learner = fit()
    assert [h["lr"] for h in learner.history] == pytest.approx([warm_cosine(e, 4, 5e-3, 4 / 6) for e in range(4)])
    group = learner.opt.param_groups[0]
    assert isinstance(learner.opt, torch.optim.AdamW) and group["betas"] == (.5, .999) and group["weight_decay"] == 1e-3
    assert sum(learner.history[-1]["loss"].values()) < sum(learner.history[0]["loss"].values())


def test_gradients_are_clipped():
    def norm(clip):
        learner = fit(1, clip=clip)
        return torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in learner.model.parameters() if p.grad is not None])).item()
    assert norm(1e-3) == pytest.approx(1e-3, rel=1e-3) and norm(0) > 1e-2


def test_weight_decay_decays():
    with_, without = (sum(p.norm() for p in fit(2, weight_decay=w).model.parameters()) for w in (1., 0.))
    assert with_ < without


def test_an_interrupted_run_continues_to_the_same_end(tmp_path):
    whole = fit()
    with pytest.raises(KeyboardInterrupt): fit(path=tmp_path / "c.pt", until=2)
    again = fit(path=tmp_path / "c.pt")
    assert micro.same_weights(whole.model, again.model)
    assert [h["lr"] for h in again.history] == [h["lr"] for h in whole.history]


@pytest.mark.parametrize("kw, message", [({"heads": 3}, "3 heads for 16 dimensions"), ({"heads": 0}, "0 heads"), ({"n_layers": 0}, "n_layers: 0")])
def test_impossible_networks_are_refused(kw, message):
    with pytest.raises(InputError, match=message): build(**kw)
