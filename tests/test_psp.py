"""Parity of PSP's two networks, losses, loaders and score with the official code, and DGM's measures on it."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import close
from test_han import fill
from torch import nn
from torch.nn import functional as F

import avvp_nb.methods.official as official
from avvp_nb.core import InputError, read_json, shared
from avvp_nb.data.sources import DataSpec
from avvp_nb.methods import psp
from avvp_nb.methods.ave import AVELocaliser, Localised
from avvp_nb.methods.dgm import coefficients, imbalance, modulate
from avvp_nb.records.spec import RunSpec
from avvp_nb.tasks import RULE
from avvp_nb.train.lanes import why_not
from avvp_nb.train.learner import Step

VARIANTS = ["", "_chirp", "_gain_chirp"]


def accuracy(scores, labels):
    "Share of seconds whose class is right"
    right = RULE["highest"].decide(scores) == RULE["highest"].decide(labels)
    return float(right.mean())


SMALL = dict(classes=4, audio_dim=8, place_dim=8, places=4, dim=8, hidden=4)


@pytest.fixture(scope="module")
def keys(golden):
    known = read_json(shared("golden", "state_dict_keys_others.json"))
    return {k: {e["key"]: e["shape"] for e in known[f"psp_{k}"]["keys"]} for k in ("weak", "full")}


@pytest.fixture(scope="module")
def inputs(golden):
    return {k: torch.tensor(v) for k, v in golden("inputs_ave_b2").items()}


def weights(keys, kind, case):
    state = fill(keys[kind], case.info["options"]["fill_rule"])
    for k, gain in case.info["options"].get("gain", {}).items(): state[k] = state[k] * gain
    return state


def build(keys, kind, case, **kwargs):
    return official.from_official(weights(keys, kind, case), f"psp_{kind}", strict=True, **kwargs)


def arrays(net, audio, regions):
    "All arrays of a forward case"
    with torch.no_grad():
        x, out, sound = net.inside(audio, regions), net(audio, regions), net.sound(audio)
        picked = net.attention(sound, regions.flatten(2, 3))[0]
        found = {"spatial_attention": x.weights, "attended_visual": picked, "visual_proj": net.picture(picked),
                 "lstm_audio": x.heard, "lstm_visual": x.seen, "fusion": x.fused, "gamma_va": x.to_visual,
                 "gamma_av": x.to_audio, "segment_pred": RULE["highest"].decide(out.scores)}
    if net.weak: return {**found, "video_prob": out.video, "score": out.scores}
    return {**found, "logits": out.scores, "cos_sim": out.cosine, "audio_proj": sound, "a_psp": x.audio, "v_psp": x.visual}


# ---- the networks ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, tensors, numbers", [("weak", 37, 1_254_251), ("full", 47, 1_667_251)])
def test_keys_cover_the_official_file(keys, kind, tensors, numbers):
    layout = psp.LAYOUTS[f"psp_{kind}"]
    assert len(keys[kind]) == tensors and sum(np.prod(s) for s in keys[kind].values()) == numbers
    net = layout.build()
    table = layout.keys(*layout.sizes(net))
    left = set(keys[kind]) - {o for o, *_ in table}
    assert left and all(k.startswith(layout.unused) for k in left)
    assert {m: tuple(keys[kind][o]) for o, m, _ in table} == {k: tuple(v.shape) for k, v in net.state_dict().items()}


@pytest.mark.parametrize("kind", ["weak", "full"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward(golden, keys, inputs, kind, variant):
    case = golden(f"psp_{kind}_forward{variant}")
    got = arrays(build(keys, kind, case), inputs["audio"], inputs["visual"])
    assert set(got) == set(case)
    for k, v in got.items(): close(case, k, v)


@pytest.mark.parametrize("kind", ["weak", "full"])
@pytest.mark.parametrize("change", ["tau", "rows", "branches", "directions", "norm", "attention", "weights"])
def test_parity_has_teeth(golden, keys, inputs, kind, change, monkeypatch):
    "Each of these mistakes is seen in the case with gains"
    case = golden(f"psp_{kind}_forward_gain_chirp")
    net = build(keys, kind, case, **({"attention": "paper"} if change == "attention" else {}))
    p = net.propagate
    if change == "tau": p.tau = 0.
    if change == "rows":
        tables, again = psp.pruned, not p.full
        monkeypatch.setattr(psp, "pruned", lambda beta, tau, _: tables(beta, tau, again))
    if change == "branches": p.visual[0], p.visual[1] = p.visual[1], p.visual[0]
    if change == "directions":
        for k in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            a, b = (getattr(net.audio.lstm, f"{k}_l0{d}") for d in ("", "_reverse"))
            a.data, b.data = b.data.clone(), a.data.clone()
    if change == "norm": p.norm = nn.Identity()
    if change == "weights":
        if not net.weak: pytest.skip("the fully supervised network has no weights of seconds")
        nn.init.zeros_(net.weigh.weight)
    got = arrays(net, inputs["audio"], inputs["visual"])
    with pytest.raises(AssertionError):
        for k in got: close(case, k, got[k])


def check_gradients(case, net, kind):
    grads = official.to_official(net, f"psp_{kind}", of=lambda p: p.grad)
    for k in [k for k in case if k.startswith("grad.")]: close(case, k, grads[k[5:]])
    for k, norm in zip(case.info["parameter_keys"], case["grad_norms"]):
        assert np.isnan(norm) == (k not in grads), k
    used = ~np.isnan(case["grad_norms"])
    got = [grads[k].norm().item() for k, u in zip(case.info["parameter_keys"], used) if u]
    np.testing.assert_allclose(got, case["grad_norms"][used], **case.info["tolerance_by_array"]["grad_norms"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_weak_loss(golden, keys, inputs, variant):
    case = golden("psp_weak_loss" + variant)
    net = build(keys, "weak", case, dropout=0.).train()
    out = net(inputs["audio"], inputs["visual"])
    for k, target in [("loss_total", "prob_label"), ("loss_with_mil_label", "mil_label")]:
        loss = psp.weak_terms(out, inputs[target])["video"]
        close(case, k, loss.detach())
        if k == "loss_total": loss.backward(retain_graph=True)
    check_gradients(case, net, "weak")


@pytest.mark.parametrize("variant", VARIANTS)
def test_full_loss(golden, keys, inputs, variant):
    case = golden("psp_full_loss" + variant)
    net = build(keys, "full", case, dropout=0.).train()
    labels = inputs["segment_label_onehot"]
    target = psp.pair_targets(labels)
    close(golden("inputs_ave_b2"), "avps_target", target)
    terms = psp.full_terms(net(inputs["audio"], inputs["visual"]), labels, target)
    sum(terms.values()).backward()
    for k, v in [("loss_cls", terms["seconds"]), ("loss_avps", terms["pairs"] / 100), ("loss_total", sum(terms.values()))]:
        close(case, k, v.detach())
    check_gradients(case, net, "full")


@pytest.mark.parametrize("official", [False, True])
def test_targets_of_one_batch_after_another(golden, official):
    case, targets = golden("psp_full_targets"), psp.PairTargets(official)
    p = Localised(torch.zeros(8, 10, 29), None, torch.rand(8, 10))
    for k, labels in enumerate(torch.tensor(case["labels"])):
        terms = psp.full_terms(p, labels, targets(labels))
        target = torch.tensor(case["avps_target"][k]) if official else psp.pair_targets(labels)
        torch.testing.assert_close(terms["pairs"], 100 * psp.pair_loss(p.cosine, target))
    assert set(terms) == {"seconds", "pairs"}


def test_pair_loss(golden):
    case = golden("psp_avps_loss")
    c = torch.tensor(case["cos_sim"], requires_grad=True)
    loss = psp.pair_loss(c, torch.tensor(case["target"]))
    loss.backward()
    close(case, "loss", loss.detach())
    close(case, "grad", c.grad)


# ---- loaders and score ----------------------------------------------------------------------------------------------

def test_accuracy(golden):
    case = golden("psp_accuracy")
    for x in (case["scores"], torch.tensor(case["scores"])): assert RULE["highest"].decide(x).tolist() == case["pred"].tolist()
    close(case, "accuracy", accuracy(case["scores"], case["labels"]))
    close(case, "accuracy_first20", accuracy(case["scores"][:20], case["labels"][:20]))


def test_official_batches_of_the_weak_loader(golden):
    case = golden("psp_weak_batches")
    data = np.r_[case["order"], 1000 + np.arange(5)]
    b = psp.Batches(24, 8, 123, official=True)
    assert [[data[x].tolist() for x in b.epoch()] for _ in range(4)] == case["rows"].tolist()
    b = psp.Batches(24, 8, 123)
    for _ in range(3): assert sorted(np.concatenate(b.epoch())) == list(range(24))       # the default delivers all


def test_official_targets_of_the_full_loader(golden):
    case = golden("psp_full_targets")
    b, targets, fresh = psp.Batches(19, 8, 123), psp.PairTargets(official=True), psp.PairTargets()
    rows = [x for _ in range(3) for x in b.epoch()]
    assert [case["order"][x].tolist() for x in rows] == case["rows"].tolist()
    labels = torch.tensor(case["labels"])
    close(case, "segment_class", labels.argmax(-1))
    close(case, "avps_target", torch.stack([targets(x) for x in labels]))
    clean = torch.stack([fresh(x) for x in labels])
    torch.testing.assert_close(clean.sum(-1), torch.ones(6, 8))
    assert (clean[0].numpy() == case["avps_target"][0]).all() and not np.allclose(clean, case["avps_target"])


def test_batches_do_not_touch_the_callers_random_numbers():
    import random
    random.seed(5)
    state = random.getstate()
    psp.Batches(9, 3).epoch()
    assert random.getstate() == state


# ---- the parts, against formulas written out ------------------------------------------------------------------------

@pytest.mark.parametrize("again", [False, True])
def test_pruning_by_loops(again):
    torch.manual_seed(0)
    beta = F.relu(torch.randn(2, 5, 5))
    beta[0, 1] = 0
    got = psp.pruned(beta, .2, again)
    for b in range(2):
        for i in range(5):
            total = beta[b, i].sum()
            row = [(x / total).item() if total and x / total > .2 else 0. for x in beta[b, i]]
            if again and sum(row): row = [x / sum(row) for x in row]
            np.testing.assert_allclose(got[b, i], row, atol=1e-6)


def test_start_is_that_of_the_release():
    "Xavier-uniform weights in the attention, the propagation and the head, PyTorch's own in the rest"
    torch.manual_seed(0)
    for weak in (True, False):
        net = psp.PSP(weak=weak)
        maps = [net.attention.place, net.attention.score, net.head[0], net.head[2], *net.propagate.visual, *net.propagate.audio]
        for lin in maps:
            bound = (6 / sum(lin.weight.shape)) ** .5
            assert .85 * bound < lin.weight.abs().max() <= bound
        plain = [net.weigh, net.picture] if weak else [*net.sound, *net.picture]
        for lin in plain: assert lin.weight.abs().max() <= lin.in_features ** -.5
        assert net.audio.lstm.weight_hh_l0.abs().max() <= 128 ** -.5


def test_weights_of_seconds_never_change_the_decision():
    torch.manual_seed(0)
    net = psp.PSP(**SMALL).eval()
    nn.init.normal_(net.weigh.weight, std=20.)
    x = net.inside(torch.randn(5, 10, 8), torch.rand(5, 10, 2, 2, 8))
    raw, out = net.head(x.fused), net.outcome(x)
    assert (raw.argmax(-1) == out.scores.argmax(-1)).all() and not torch.allclose(raw, out.scores)


def test_dropout_is_the_only_chance():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 8), torch.rand(2, 6, 2, 2, 8)
    for weak in (True, False):
        net = psp.PSP(**SMALL, weak=weak)
        assert not torch.equal(net(*x).scores, net(*x).scores)
        assert torch.equal(net.eval()(*x).scores, net(*x).scores)
        quiet = psp.PSP(**SMALL, weak=weak, dropout=0.)
        assert torch.equal(quiet(*x).scores, quiet(*x).scores)


def test_there_and_back(golden, keys):
    for kind in ("weak", "full"):
        case = golden(f"psp_{kind}_forward_chirp")
        state = weights(keys, kind, case)
        net = build(keys, kind, case)
        assert net.weak == (kind == "weak") and not net.training
        back = official.to_official(net, f"psp_{kind}")
        unused = psp.UNUSED[net.weak]
        assert set(back) == {k for k in state if not k.startswith(unused)}
        assert all(torch.equal(v, state[k]) for k, v in back.items())


@pytest.mark.parametrize("drop, kwargs, said", [
    ("L2.weight", {}, "1 tensors are missing, such as 'L2.weight'"),
    (None, {"classes": 28}, "L2.weight: has shape \\(29, 64\\)"),
    (None, {"tau": -1.}, "tau: -1.0 is not possible")])
def test_files_that_do_not_fit_are_refused(golden, keys, drop, kwargs, said):
    state = weights(keys, "weak", golden("psp_weak_forward"))
    state.pop(drop, None)
    with pytest.raises(InputError, match=said): official.from_official(state, "psp_weak", **kwargs)


def test_the_file_of_the_other_network_is_refused(golden, keys):
    state = weights(keys, "weak", golden("psp_weak_forward"))
    with pytest.raises(InputError, match="tensors are missing"): official.from_official(state, "psp_full")


def test_it_cannot_be_stacked_and_says_so():
    assert why_not(psp.PSP(**SMALL)) == "recurrent layers (LSTM) have no batched form"


# ---- learning -------------------------------------------------------------------------------------------------------

def planted(n, seed):
    "Two classes in three to five of eight seconds, background elsewhere"
    g = torch.Generator().manual_seed(seed)
    y, long = torch.randint(2, (n,), generator=g), torch.randint(3, 6, (n,), generator=g)
    start = (torch.rand(n, generator=g) * (9 - long)).long()
    on = (torch.arange(8) >= start[:, None]) & (torch.arange(8) < (start + long)[:, None])
    audio, regions = .3 * torch.randn(n, 8, 8, generator=g), .3 * torch.randn(n, 8, 4, 8, generator=g)
    audio[torch.arange(n), :, y] += 2. * on
    regions[torch.arange(n), :, 1, y + 3] += 2. * on
    return audio, regions.view(n, 8, 2, 2, 8), F.one_hot(torch.where(on, y[:, None], 3), 4).float()


@pytest.mark.parametrize("name", ["weak", "full", "ave_weak", "ave_full"])
def test_networks_learn(name):
    "A start from which all four learn: labels of clips alone leave small networks at a wrong answer at times"
    torch.manual_seed(1)
    audio, regions, labels = planted(96, 0)
    weak, target = name.endswith("weak"), labels.mean(1)
    net = (AVELocaliser if name.startswith("ave") else psp.PSP)(**{**SMALL, "hidden": 16, "dim": 16}, weak=weak)
    losses = {"weak": lambda p: psp.weak_terms(p, target), "full": lambda p: psp.full_terms(p, labels, psp.pair_targets(labels)),
              "ave_weak": lambda p: psp.ave_weak_terms(p, target), "ave_full": lambda p: psp.ave_full_terms(p, labels)}
    opt = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(80):
        loss = sum(losses[name](net(audio, regions)).values())
        opt.zero_grad()
        loss.backward()
        opt.step()
    test = planted(64, 1)
    with torch.no_grad(): out = net.eval()(*test[:2])
    if weak:                                                              # clips alone say little about seconds
        happens = test[2][..., :3].sum(1).argmax(1)
        assert (out.video[:, :3].argmax(1) == happens).float().mean() > .9
    else: assert accuracy(out.scores, test[2]) > .85


@pytest.mark.parametrize("weak, drops", [(True, {80, 160}), (False, {60, 120})])
def test_rate_drops_twice_and_stays(weak, drops):
    recipe = RunSpec("psp", protocol="weak" if weak else "full", data=DataSpec(dataset="ave"), scale="full").recipe()
    rates = [Step.rate(SimpleNamespace(**recipe), e) for e in range(300)]
    assert {e for e in range(1, 300) if rates[e] != rates[e - 1]} == drops
    assert rates[0] == 1e-3 and rates[-1] == pytest.approx(6.4e-4)


# ---- which modality is ahead ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("measure", ["score", "discrepancy", "fusion"])
def test_imbalance_of_a_softmax_in_closed_form(measure):
    torch.manual_seed(0)
    logits, y = 3 * torch.randn(2, 6, 10, 29), torch.eye(29)[torch.randint(29, (6, 10))]
    logits = logits + 4 * y                                                # right enough that no floor is reached
    (a, truth), (v, _) = (psp.second_evidence(s, y) for s in logits)
    Sa, Sv = ((p * truth).sum() for p in (a, v))
    k = {"score": (1, 0), "discrepancy": (29, 1), "fusion": (57, 1)}[measure]
    expected = (k[0] * Sv - k[1] * 60) / (k[0] * Sa - k[1] * 60)
    assert imbalance(a, v, truth, measure).item() == pytest.approx(expected.item(), rel=1e-4)


def test_measures_have_no_gradient_and_options_are_checked():
    net = psp.PSP(**SMALL)
    audio, regions, labels = planted(4, 0)
    x, heads = net.inside(audio, regions), psp.SeparateHeads(8, 4)
    for m in psp.MEASURED:
        for s in psp.separate(net, x, m, heads):
            assert s.requires_grad
            assert not psp.clip_evidence(s, labels[:, 0])[0].requires_grad and not psp.second_evidence(s, labels)[0].requires_grad
    events, truth = psp.second_evidence(s, labels, events=True)
    assert len(events) == (labels[..., -1] == 0).sum() and not truth[:, -1].any()
    with pytest.raises(InputError, match="possible|one of"): psp.separate(net, x, "heads")
    with pytest.raises(InputError, match="no heads"): psp.separate(net, x, "msdu")
    terms = psp.separate_terms(psp.separate(net, x, "msdu", heads), labels=labels)
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in heads.parameters())
    assert net.audio.lstm.weight_ih_l0.grad.abs().sum() > 0               # the loss of the heads reaches the encoders
    assert net.propagate.visual[0].weight.grad is None                    # ... and nothing behind them


@pytest.mark.parametrize("weak", [True, False])
@pytest.mark.parametrize("target", ["encoder", "both"])
def test_groups_are_a_partition(weak, target):
    net = psp.PSP(**SMALL, weak=weak)
    own = psp.psp_groups(net, target)
    names = [k for part in own.values() for k in part]
    assert sorted(names) == sorted(k for k, _ in net.named_parameters())
    assert all(k.startswith(("sound", "audio", "propagate.audio")) for k in own["audio"])
    assert all(k.startswith(("attention", "picture", "visual", "propagate.visual")) for k in own["visual"])
    inner = [k for k in (*own["audio"], *own["visual"]) if k.startswith("propagate")]
    assert len(inner) == (0 if target == "encoder" else 4 if weak else 6)


def test_modulation_of_a_batch():
    "The modality that is ahead learns with smaller gradients; biases get no noise"
    torch.manual_seed(0)
    net = psp.PSP(**SMALL, weak=False)
    audio, regions, labels = planted(16, 0)
    x = net.inside(audio, regions)
    sum(psp.full_terms(net.outcome(x), labels, psp.pair_targets(labels)).values()).backward()
    (a, truth), (v, _) = (psp.second_evidence(s, labels) for s in psp.separate(net, x, "lstm"))
    mu = coefficients(imbalance(a, v, truth), .5)
    own = psp.psp_groups(net)
    before = {k: p.grad.clone() for k, p in net.named_parameters()}
    modulate([list(own[k].values()) for k in ("audio", "visual")], mu, True, True, "added", torch.Generator().manual_seed(0))
    assert min(mu) < 1 and max(mu) == 1
    for who, m in zip(("audio", "visual"), mu):
        for k, p in own[who].items():
            if p.ndim == 1: torch.testing.assert_close(p.grad, m * before[k])
            else: assert not torch.allclose(p.grad, m * before[k], atol=0) or not before[k].any()
    assert all(torch.equal(p.grad, before[k]) for k, p in own["shared"].items())


def test_localised_is_what_ave_uses():
    assert psp.Localised is Localised
