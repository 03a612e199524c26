"""Parity of the AVE network with the official code, and the reconstructions of AVE and AVSDN for LLP."""
from dataclasses import replace

import micro
import numpy as np
import pytest
import torch
from conftest import close
from test_han import fill
from torch.nn import functional as F

import avvp_nb.methods.ave as ave
from avvp_nb.core import InputError, read_json, shared
from avvp_nb.data import sources
from avvp_nb.methods.losses import GuidedLoss, bce
from avvp_nb.methods.method import METHODS, network_sizes
from avvp_nb.methods.official import from_official, to_official
from avvp_nb.metrics import RULES
from avvp_nb.records.spec import RunSpec
from avvp_nb.records.weights import load_weights
from avvp_nb.runs.single import run
from avvp_nb.train.lanes import why_not
from avvp_nb.train.learner import Learner, predict

VARIANTS = ["", "_chirp"]
SIZES = dict(classes=3, audio_dim=8, frame_dim=8, motion_dim=8, dim=16)
NETWORKS = {"ave": lambda **kw: ave.AVE(**{**SIZES, **kw}), "avsdn": lambda **kw: ave.AVSDN(**{**SIZES, **kw})}


# ---- parity with the official network for the AVE data set ----------------------------------------------------------

@pytest.fixture(scope="module")
def official_keys(golden):
    keys = read_json(shared("golden", "state_dict_keys_baselines.json"))["ave_weak"]["keys"]
    return {k["key"]: k["shape"] for k in keys}


@pytest.fixture(scope="module")
def inputs(golden):
    "Audio and the map of the picture, which is computed and not stored"
    rule = golden("ave_weak_forward").info["inputs_by_rule"]["visual_map"]
    x = np.abs(np.sin(0.0037 * np.arange(3 * 10 * 49 * 512, dtype=np.float64) + 0.4))
    assert x[:3].tolist() == pytest.approx(rule["first"]) and x[-1] == pytest.approx(rule["last"])
    assert x.sum() == pytest.approx(rule["sum_float64"])
    return torch.tensor(golden("inputs_b3")["audio"]), torch.tensor(x.astype(np.float32)).view(3, 10, 7, 7, 512)


def weights(official_keys, name):
    return fill(official_keys, "chirp" if name.endswith("_chirp") else "sine")


def build(official_keys, name, gains=None, **kwargs):
    state = weights(official_keys, name)
    for k, gain in (gains or {}).items(): state[k] = state[k] * gain
    return from_official(state, "ave", strict=True, **{"attention": "release", **kwargs})


def seen_inside(model, audio, regions):
    "All arrays of a forward case"
    with torch.no_grad():
        out = model(audio, regions)
        attended, attention = model.attention(audio, regions.flatten(2, 3))
        return {"video_prob": out.video, "score": out.scores, "attention": attention, "attended": attended,
                "lstm_audio": model.audio(audio), "lstm_video": model.visual(attended)}


def test_keys_cover_the_official_file(official_keys):
    assert len(official_keys) == 27 and {o for o, _, _ in ave.ave_keys()} == set(official_keys)
    own = {k: tuple(v.shape) for k, v in ave.AVELocaliser().state_dict().items()}
    assert {ours: tuple(official_keys[o]) for o, ours, _ in ave.ave_keys()} == own


@pytest.mark.parametrize("name", ["ave_weak_forward", "ave_weak_forward_chirp", "ave_weak_forward_sharp_chirp"])
def test_forward(golden, official_keys, inputs, name):
    case = golden(name)
    got = seen_inside(build(official_keys, name, case.info["options"].get("weight_gain")), *inputs)
    assert set(got) == set(case)
    for key, value in got.items(): close(case, key, value)


def test_only_the_released_form_passes_the_sharp_case(golden, official_keys, inputs):
    "The two forms share all weights, so that a file does not tell which one it was trained with"
    case = golden("ave_weak_forward_sharp_chirp")
    got = seen_inside(build(official_keys, "_chirp", case.info["options"]["weight_gain"], attention="paper"), *inputs)
    for key in ("attention", "attended"):
        with pytest.raises(AssertionError): close(case, key, got[key])
    assert (got["attended"] - torch.tensor(case["attended"])).abs().max() > .1


@pytest.mark.parametrize("change", ["directions", "modalities", "no relu", "mean over time"])
def test_parity_has_teeth(golden, official_keys, inputs, change, monkeypatch):
    case = golden("ave_weak_forward_chirp")
    model = build(official_keys, "_chirp")
    if change == "directions":
        own = model.audio.lstm
        for k in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            a, b = getattr(own, f"{k}_l0"), getattr(own, f"{k}_l0_reverse")
            a.data, b.data = b.data.clone(), a.data.clone()
    if change == "modalities": model.head[0].weight.data = model.head[0].weight.data.roll(256, 1)
    if change == "no relu": monkeypatch.setattr(F, "relu", lambda x, inplace=False: x)
    got = seen_inside(model, *inputs)
    video = got["score"].mean(1).softmax(-1) if change == "mean over time" else got["video_prob"]
    with pytest.raises(AssertionError):
        close(case, "video_prob", video)
        close(case, "score", got["score"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients(golden, official_keys, inputs, variant):
    case, model = golden("ave_weak_loss" + variant), build(official_keys, variant)
    loss = ave.soft_margin(model(*inputs).video, torch.tensor(case["label"]))
    loss.backward()
    close(case, "loss", loss.detach())
    grads = to_official(model, "ave", of=lambda p: p.grad)
    for key in [k for k in case if k.startswith("grad.")]: close(case, key, grads[key[5:]])
    close(case, "grad_norms", [grads[k].norm().item() for k in case.info["parameter_keys"]])


def test_there_and_back(official_keys):
    state = weights(official_keys, "_chirp")
    model = from_official(state, "ave", strict=True)
    assert model.attention.form == "release" and not model.training
    back = to_official(model, "ave")
    assert set(back) == set(state) and all(torch.equal(v, state[k]) for k, v in back.items())
    own = from_official(back, "ave").state_dict()
    assert all(torch.equal(v, own[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("drop, kwargs, said", [
    ("affine_h.weight", {}, "1 tensors are missing, such as 'affine_h.weight'"),
    (None, {"classes": 28}, "L2.weight: has shape \\(29, 64\\)"),
    (None, {"attention": "relase"}, "did you mean 'release'")])
def test_files_that_do_not_fit_are_refused(official_keys, drop, kwargs, said):
    state = weights(official_keys, "")
    state.pop(drop, None)
    with pytest.raises(InputError, match=said): from_official(state, "ave", **kwargs)


# ---- the parts, against formulas written out ------------------------------------------------------------------------

@pytest.mark.parametrize("form", ave.FORMS)
def test_attention_by_loops(form):
    torch.manual_seed(1)
    att, B, T, N = ave.GuidedAttention(3, 4, dim=5, hidden=6, form=form), 2, 3, 6
    audio, places = torch.randn(B, T, 3), torch.randn(B, T, N, 4)
    picked, weights = att(audio, places)
    for b in range(B):
        for t in range(T):
            g = att.heard.weight @ F.relu(att.sound.weight @ audio[b, t] + att.sound.bias)
            e = []
            for i in range(N):
                u = att.seen.weight @ F.relu(att.place.weight @ places[b, t, i] + att.place.bias)
                e.append(sum(att.score.weight[0, j] * torch.tanh(u[j] + g[j if form == "paper" else i]) for j in range(6)))
            alpha = torch.stack(e).softmax(0)
            torch.testing.assert_close(weights[b, t], alpha)
            torch.testing.assert_close(picked[b, t], sum(a * f for a, f in zip(alpha, places[b, t])))


def test_start_is_that_of_the_release():
    "Xavier-uniform weights in seven maps, PyTorch's own in the rest"
    torch.manual_seed(0)
    m = ave.AVELocaliser()
    maps = [m.attention.place, m.attention.sound, m.attention.seen, m.attention.heard, m.attention.score, m.head[0], m.head[2]]
    for lin in maps:
        bound = (6 / sum(lin.weight.shape)) ** .5
        assert .9 * bound < lin.weight.abs().max() <= bound
    assert m.audio.lstm.weight_hh_l0.abs().max() <= 128 ** -.5


def test_soft_margin_is_pytorchs():
    torch.manual_seed(0)
    x, y = torch.randn(5, 7), (torch.rand(5, 7) > .5).float()
    torch.testing.assert_close(ave.soft_margin(x, y), F.multilabel_soft_margin_loss(x, y))


def test_the_localiser_learns_from_labels_of_clips():
    "Sound and picture of two classes at some second of each clip"
    torch.manual_seed(0)
    net = ave.AVELocaliser(classes=3, audio_dim=4, place_dim=5, places=6, dim=8, hidden=8)
    audio, regions, y = .1 * torch.randn(24, 5, 4), .1 * torch.randn(24, 5, 2, 3, 5), torch.arange(24) % 2
    when = torch.arange(24) % 5
    audio[torch.arange(24), when, y] += 2
    regions[torch.arange(24), when, 0, 1, y] += 2
    label, opt = F.one_hot(y, 3).float(), torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        loss = ave.soft_margin(net(audio, regions).video, label)
        opt.zero_grad()
        loss.backward()
        opt.step()
    with torch.no_grad(): out = net(audio, regions)
    assert (out.video.argmax(1) == y).all() and out.cosine is None
    assert (out.scores[torch.arange(24), when].argmax(1) == y).float().mean() > .9


# ---- AVE and AVSDN-like for LLP -------------------------------------------------------------------------------------

def test_ave_by_hand():
    "Both branches and the joint one from their parts"
    torch.manual_seed(0)
    net, (a, f, m) = NETWORKS["ave"](), torch.randn(3, 2, 5, 8)
    p = net(a, f, m)
    x = net.fuse.fusion(torch.cat([net.fuse.frames(f), net.fuse.motion(m)], -1))
    heard, seen = net.audio.lstm(a)[0], net.visual.lstm(x)[0]
    for got, head, v in zip((p.video, p.audio, p.visual), net.heads, (torch.cat([heard, seen], -1).relu(), heard, seen)):
        torch.testing.assert_close(got, head[2](head[0](v).relu()).sigmoid().amax(1))
    torch.testing.assert_close(p.segments[:, :, 1].amax(1), p.visual)
    assert [head[0].in_features for head in net.heads] == [16, 8, 8]
    whole = ave.AVE()
    assert [(h[0].in_features, h[0].out_features, h[2].out_features) for h in whole.heads] == [(512, 64, 25), (256, 64, 25), (256, 64, 25)]


def test_avsdn_by_hand():
    torch.manual_seed(0)
    net, (a, f, m) = NETWORKS["avsdn"](), torch.randn(3, 2, 5, 8)
    p, x = net(a, f, m), net.fuse(f, m)
    (la, (ha, ca)), (lv, (hv, cv)) = net.hear(a), net.see(x)
    h, c = net.state(torch.cat([ha[0], hv[0]], -1)), net.memory(torch.cat([ca[0], cv[0]], -1))
    d, out = net.local(torch.cat([a, x], -1)).tanh(), []
    for t in range(5):                                                          # the decoder, second by second
        o, (h, c) = net.decode(d[:, t:t + 1], (h.view(1, 2, -1), c.view(1, 2, -1)))
        out.append(o)
    out = torch.cat(out, 1)
    for got, head, v in zip((p.video, p.audio, p.visual), net.heads, (out, torch.cat([la, out], -1), torch.cat([lv, out], -1))):
        torch.testing.assert_close(got, head(v).sigmoid().mean(1))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("prior", [.05, .5])
def test_outputs_start_at_the_prior(name, prior):
    "In the middle: what the maps add to the biases differs from second to second and class to class"
    torch.manual_seed(0)
    p = NETWORKS[name](dim=64, prior=prior, classes=25)(*torch.randn(3, 8, 10, 8)).segments
    assert p.logit().mean().item() == pytest.approx(np.log(prior / (1 - prior)), abs=.1)
    assert METHODS[name].build(RunSpec(name, options={"prior": prior}).plain(), SIZES)[0](*torch.zeros(3, 1, 2, 8)).video.mean().item() == pytest.approx(prior, abs=.1)


@pytest.mark.parametrize("name", NETWORKS)
def test_loss_is_three_cross_entropies(name):
    torch.manual_seed(0)
    net, x, y = NETWORKS[name](), torch.randn(3, 4, 5, 8), (torch.rand(4, 3) > .5).float()
    p = net(*x)
    plain = RunSpec(name).plain()
    loss = METHODS[name].build(plain, SIZES)[1]
    batch = micro.toy_clips(4).batch(range(4))._replace(weak=y)
    terms = loss(p, batch)
    assert list(terms) == ["audio", "visual", "video"]
    for k, v in terms.items(): torch.testing.assert_close(v, bce(getattr(p, k), y))
    sum(terms.values()).backward()
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in net.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_videos_of_different_length(name):
    "Each video of a padded batch gets what it gets alone, in training with gradients as well"
    torch.manual_seed(0)
    net, x, lengths = NETWORKS[name](), torch.randn(3, 3, 7, 8), [7, 3, 5]
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    p = net(*x, mask=mask)
    for b, n in enumerate(lengths):
        alone = net(*x[:, b:b + 1, :n])
        for k in ("video", "audio", "visual"): torch.testing.assert_close(getattr(p, k)[b], getattr(alone, k)[0])
        torch.testing.assert_close(p.segments[b, :n], alone.segments[0])
    anything = x.clone()
    anything[:, ~mask] = 1e3
    torch.testing.assert_close(net(*anything, mask=mask).video, p.video)
    p.video.sum().backward()
    assert all(w.grad is None or w.grad.isfinite().all() for w in net.parameters())


def test_attention_over_frames_needs_frames():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8), torch.randn(2, 40, 8), torch.randn(2, 5, 8)
    for form in ave.FORMS:
        net = NETWORKS["ave"](attention=form)
        weights = net(*x).extra["frames"]
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5))
        with pytest.raises(InputError, match="5 frames for 5 seconds of sound"): net(x[0], x[1][:, :5], x[2])
    three = x[0], x[1][:, :15], x[2]
    assert NETWORKS["ave"](attention="paper")(*three).extra["frames"].shape == (2, 5, 3)     # another frame rate
    with pytest.raises(InputError, match="3 places for 8 hidden features"): NETWORKS["ave"](attention="release")(*three)


@pytest.mark.parametrize("name", NETWORKS)
def test_it_cannot_be_stacked_and_says_so(name):
    assert why_not(NETWORKS[name]()) == "recurrent layers (LSTM) have no batched form"


# ---- the entries ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, options, said", [
    ("ave", {"smoothing": 1.}, "smoothing: 1.0 is not possible"), ("ave", {"smoothing": -.1}, "smoothing"),
    ("ave", {"prior": 0.}, "prior: 0.0 is not possible"), ("avsdn", {"prior": 1.}, "prior: 1.0"),
    ("ave", {"attention": "paper"}, "attention: ave has no such option"),
    ("ave_frames", {"attention": "papr"}, "did you mean 'paper'"), ("avsdn", {"pooling": "sum"}, "pooling"),
    ("avsdn", {"smoothing": "a"}, "smoothing")])
def test_impossible_options_are_refused(name, options, said):
    with pytest.raises(InputError, match=said): RunSpec(name, options=options)


def test_what_the_entries_say():
    assert [METHODS[k].faith for k in ("ave", "ave_frames", "avsdn")] == ["reconstruction", "reconstruction", "stand-in"]
    assert METHODS["avsdn"].names == {"avsdn": "AVSDN"}
    assert METHODS["ave"].rule in RULES and METHODS["avsdn"].rule in RULES
    assert RunSpec("ave").recipe()["lr"] == 3e-4 and RunSpec("ave_frames").base.frames == "full"


def test_the_joint_branch_is_the_gate():
    "Nothing is found where the joint branch does not believe in the class, whatever the others say"
    def logits(*p): return torch.tensor(p).logit().view(1, -1, 1)
    for joint, found in [((.2, .6), 1), ((.2, .4), 0)]:
        p = ave.three_branches(logits(*joint), logits(.9, .9), logits(.1, .9)).numpy()
        heard, seen = RULES[METHODS["ave"].rule].decide(p)
        assert heard.tolist() == [[[found], [found]]] and seen.tolist() == [[[0], [found]]]


def planted(n, seed):
    "Toy clips in which each class occurs in half of the videos, for one or two of five seconds, heard and seen"
    clips, rng = micro.toy_clips(n, seed, noise=(.1, .1)), np.random.default_rng(seed)
    start, long = rng.integers(0, 4, (n, 1, 3)), rng.integers(1, 3, (n, 1, 3))
    t = np.arange(5)[None, :, None]
    dense = ((t >= start) & (t < start + long) & (rng.random((n, 1, 3)) < .5)).astype(np.uint8)
    code = np.random.default_rng(7).normal(size=(3, 8))
    def x(): return (dense @ code + .1 * rng.normal(size=(n, 5, 8))).astype(np.float32)
    return replace(clips, audio=x(), frames=x(), motion=x(), weak=dense.max(1).astype(np.float32), dense_audio=dense, dense_visual=dense)


@pytest.mark.parametrize("name, kw, when", [("ave", {}, True), ("avsdn", {"pooling": "max"}, True), ("avsdn", {}, False)])
def test_training_tells_what_happens_and_with_the_maximum_also_when(name, kw, when):
    "Through the one loop, from labels of videos; a mean over the seconds is largest when all of them agree"
    torch.manual_seed(1)
    clips, test = planted(160, 0), planted(80, 1)
    learner = Learner(NETWORKS[name](dim=64, **kw), clips, GuidedLoss(eps_visual=0.), lr=1e-2, epochs=16, step=16, device="cpu").fit()
    total = [sum(h["loss"].values()) for h in learner.history]
    assert total[-1] < .3 * total[0]
    p = predict(learner.model, test)
    for k in ("video", "audio", "visual"): assert ((getattr(p, k) >= .5) == test.weak).mean() > .9, k
    for m in (0, 1):
        there = test.weak[:, None] * np.ones((1, 5, 1)) > 0                     # what the labels of videos say
        on, off = (p.segments[:, :, m][there & (test.dense_audio == k)].mean() for k in (1, 0))
        assert (on > off + .2) == when, (m, on, off)                            # ... and what they don't


@pytest.mark.parametrize("name", ["ave", "ave_frames", "avsdn"])
def test_a_run_from_spec_to_record(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sources.SCALES, "micro", micro.SCALE)
    monkeypatch.setitem(METHODS, name, micro._small(METHODS[name]))
    spec = RunSpec(name, scale="micro")
    record = run(spec, tmp_path, device="cpu", progress="off")
    assert record["metrics"] and len(record["history"]) == 3 and set(record["history"][0]["loss"]) == {"audio", "visual", "video"}
    again = run(replace(spec), tmp_path, device="cpu", progress="off")
    assert again["key"] == record["key"] and again["finished"] == record["finished"]
    header_sizes = {**network_sizes(sources.load_data(spec.data, "micro", tmp_path / "cache", spec.base.frames)["test"])}
    assert load_weights(next((tmp_path / "weights").glob("*.safetensors")))[1]["sizes"] == header_sizes
