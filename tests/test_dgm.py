"""DGM and MSDU: the formulas against plain Python, and what really happens to gradients and parameters in training."""
import copy
import math

import micro
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from micro import SIZES, same_weights, toy_clips, toy_han
from torch import nn

from avvp_nb.core import InputError
from avvp_nb.methods.dgm import (
    DGM,
    MEASURES,
    MSDU,
    PROTOCOLS,
    DGMNet,
    MSDULoss,
    coefficients,
    evidence,
    groups,
    imbalance,
    noisy,
)
from avvp_nb.methods.han import HAN
from avvp_nb.methods.losses import GuidedLoss
from avvp_nb.methods.method import METHODS
from avvp_nb.metrics import RULES
from avvp_nb.records.spec import RunSpec
from avvp_nb.train.callbacks import CheckpointCB
from avvp_nb.train.learner import Callback, Learner, batches, predict

LOSS = MSDULoss(GuidedLoss())
CLIPS = toy_clips(48, noise=(3., .2))                       # vision is easy, sound is noisy


# --- formulas --------------------------------------------------------------------------------------------------------

def r_by_hand(s, weak, measure):
    "R of Eq. 6, one video and one class at a time"
    total = 0.
    for row, y in zip(s, weak):
        right = [x for x, c in zip(row, y) if c]
        wrong = [x for x, c in zip(row, y) if not c]
        gap = (sum(right) / len(right) if right else 0.) - (sum(wrong) / len(wrong) if wrong else 0.)
        total += {"score": sum(right), "discrepancy": gap, "fusion": sum(right) + gap}[measure]
    return total


def omega_by_hand(s_a, s_v, weak, measure):
    r_a, r_v = (max(r_by_hand(s, weak, measure), 1e-6) for s in (s_a, s_v))
    return min(max(r_v / r_a, 1e-3), 1e3)


def mu_by_hand(omega, gamma):
    return (1 - math.tanh(gamma / omega) if 1 / omega > 1 else 1., 1 - math.tanh(gamma * omega) if omega > 1 else 1.)


@st.composite
def scored(draw):
    "Scores of both modalities and weak labels of a batch"
    B, C = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    s = rng.random((2, B, C))
    return s[0] * draw(st.sampled_from([1., .01])), s[1], (rng.random((B, C)) < draw(st.sampled_from([0., .3, 1.]))).astype(float)


@settings(max_examples=100, deadline=None)
@given(scored(), st.sampled_from(MEASURES))
def test_imbalance_equals_plain_python(x, measure):
    want = omega_by_hand(*(a.tolist() for a in x), measure)
    assert imbalance(*x, measure) == pytest.approx(want, rel=1e-9)
    got = imbalance(*(torch.tensor(a) for a in x), measure)
    assert isinstance(got, torch.Tensor) and got.shape == () and got.item() == pytest.approx(want, rel=1e-9)
    assert imbalance(x[1], x[0], x[2], measure) == pytest.approx(min(max(1 / want, 1e-3), 1e3), rel=1e-6)
    assert imbalance(x[0], x[1], x[2].astype(bool), measure) == pytest.approx(want, rel=1e-9)
    single = imbalance(*(torch.tensor(a, dtype=torch.float32) for a in x), measure).item()
    if all(abs(r_by_hand(s.tolist(), x[2].tolist(), measure)) > .01 for s in x[:2]): assert single == pytest.approx(want, rel=1e-3)


@settings(max_examples=100, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(0, 5))
def test_coefficients_equal_plain_python(omega, gamma):
    got = coefficients(omega, gamma)
    assert got == pytest.approx(mu_by_hand(omega, gamma), rel=1e-12) and max(got) == 1 and min(got) >= 0
    tensors = coefficients(torch.tensor(omega, dtype=torch.float64), gamma)
    assert [x.item() for x in tensors] == pytest.approx(got, rel=1e-9)
    assert coefficients(1 / omega, gamma) == pytest.approx(got[::-1], rel=1e-6, abs=1e-9)


def test_worked_example_a():
    "spec 11 (a): three classes, two videos"
    weak, s_v, s_a = [[1, 0, 0], [1, 1, 0]], [[.9, .3, .1], [.8, .6, .2]], [[.5, .4, .3], [.6, .2, .1]]
    weak, s_v, s_a = (np.array(x, dtype=float) for x in (weak, s_v, s_a))
    rows = {"score": (1.769231, .824900), "discrepancy": (2.666667, .739480), "fusion": (2., .802625)}
    for measure, (omega, mu) in rows.items():
        assert imbalance(s_a, s_v, weak, measure) == pytest.approx(omega, abs=1e-6)
        assert coefficients(imbalance(s_a, s_v, weak, measure), .1) == pytest.approx((1, mu), abs=1e-6)
    assert [evidence(torch.tensor(s_v), torch.tensor(weak), m).item() for m in MEASURES] == pytest.approx([2.3, 1.2, 3.5])
    assert [evidence(torch.tensor(s_a), torch.tensor(weak), m).item() for m in MEASURES] == pytest.approx([1.3, .45, 1.75])
    assert imbalance(s_v, s_a, weak) == pytest.approx(.5) and coefficients(.5, .1) == pytest.approx((.802625, 1), abs=1e-6)
    assert coefficients(2., .5)[1] == pytest.approx(.238406, abs=1e-6)


def test_worked_example_b_and_the_guard():
    "spec 11 (b): a modality that is wrong is floored; two of them are balanced"
    weak, bad, good = (np.array([x]) for x in ([1., 0, 0], [.2, .6, .6], [.9, .1, .1]))
    assert evidence(torch.tensor(bad), torch.tensor(weak)).item() == pytest.approx(-.2)
    assert imbalance(bad, good, weak) == 1e3 and imbalance(good, bad, weak) == 1e-3 and imbalance(bad, bad, weak) == 1


def test_no_damping_at_balance_and_a_jump_beyond_it():
    assert coefficients(1., .1) == (1, 1)
    assert coefficients(np.nextafter(1., 2), .1)[1] == pytest.approx(1 - math.tanh(.1))
    assert coefficients(1e3, .9)[1] == pytest.approx(0) and coefficients(1e3, 0.) == (1, 1)


def test_a_ratio_of_sums_is_not_a_mean_of_ratios():
    s_a, s_v, weak = np.array([[.1], [.8]]), np.array([[.8], [.8]]), np.ones((2, 1))
    assert imbalance(s_a, s_v, weak, "score") == pytest.approx(1.6 / .9)


@pytest.mark.parametrize("f, message", [
    (lambda: imbalance(np.ones((2, 3)), np.ones((2, 3)), np.ones((2, 3)), "sum"), "measure: 'sum' is not possible. expected one of 'score'"),
    (lambda: imbalance(np.ones((2, 3)), np.ones((1, 3)), np.ones((2, 3))), r"imbalance: shapes .*expected three arrays \(B,C\)"),
    (lambda: coefficients(1., -.1), "gamma: -0.1 is not possible"), (lambda: coefficients(1., float("nan")), "gamma: nan"),
    (lambda: DGM(-1.), "gamma: -1.0"), (lambda: DGM(measure="sum"), "measure"), (lambda: DGM(target="heads"), "target: 'heads'"),
    (lambda: DGM(apply="updates"), "did you mean 'update'"), (lambda: DGM(variance="literally"), "did you mean 'literal'"),
    (lambda: DGMNet(HAN(**SIZES), shared="both"), "expected one of 'skip', 'split'"), (lambda: groups(HAN(**SIZES), "x"), "target: 'x'"),
    (lambda: DGMNet(nn.Linear(2, 2)), "backbone: Linear has no `project` and `head`")])
def test_impossible_arguments_are_refused(f, message):
    with pytest.raises(InputError, match=message): f()


# --- noise -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mu", [1., .8, .1])
@pytest.mark.parametrize("variance", ["added", "literal"])
def test_worked_example_e_variance_of_the_noise(mu, variance):
    "spec 11 (e): total variance 1.64 (added) and 2.28 (literal) at mu = .8, sigma = 1"
    g = torch.randn(1000, 400, generator=torch.Generator().manual_seed(0)) * 3e-5 + 7e-5
    out = noisy(g, torch.tensor(mu), variance, torch.Generator().manual_seed(1))
    total = {"added": mu**2 + 1, "literal": 2 * mu**2 + 1}[variance]
    assert (out.var() / g.var()).item() == pytest.approx(total, rel=.02) and out.mean().item() == pytest.approx(mu * 7e-5, rel=.02)
    h = ((out - mu * g) / (out - mu * g).std()).double()
    assert h.mean().abs() < .01 and (h**3).mean().abs() < .03 and (h**4).mean().item() == pytest.approx(3, abs=.1)
    assert abs(torch.corrcoef(torch.stack([h.flatten(), g.flatten().double()]))[0, 1]) < .01


def test_the_generator_decides_the_noise():
    g = torch.randn(5, 5)
    draw = lambda s: noisy(g, torch.tensor(.5), generator=torch.Generator().manual_seed(s))
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_a_tensor_without_gradient_gets_no_noise():
    "Adam would turn even a spread of 1e-8 into a random walk, so such tensors are skipped"
    assert (noisy(torch.zeros(4, 4), torch.tensor(1.)) == 0).all()


def test_a_tensor_of_one_element_stays_a_number():
    assert noisy(torch.ones(1, 1), torch.tensor(.5)).isfinite().all()


# --- what a step does ------------------------------------------------------------------------------------------------

class Grads(Callback):
    "Gradients and parameters at this place of the list of callbacks, batch by batch"
    def __init__(self): self.grads, self.params, self.parsings, self.batches = [], [], [], []
    def before_batch(self, ln): self.params.append({k: p.detach().clone() for k, p in ln.model.named_parameters()})
    def after_loss(self, ln):
        self.batches.append(ln.batch)
        self.parsings.append(ln.parsing)
    def after_backward(self, ln):
        self.grads.append({k: None if p.grad is None else p.grad.clone() for k, p in ln.model.named_parameters()})


class Mus(DGM):
    "DGM that remembers its coefficients"
    def after_loss(self, ln):
        super().after_loss(ln)
        self.all = [*getattr(self, "all", []), tuple(x.item() for x in self.mu)]


def net(seed=0, msdu=True, **kw):
    "A DGMNet of 16 dimensions without dropout"
    options = {k: kw.pop(k) for k in ("shared", "msdu_gradient") if k in kw}
    back = toy_han(seed, **{"dropout": 0., **kw})
    return DGMNet(back, msdu=msdu, **options)


def fit(model, *callbacks, clips=CLIPS, loss=LOSS, epochs=1, **kw):
    return Learner(model, clips, loss, epochs=epochs, device="cpu", callbacks=callbacks, **{"lr": 5e-3, **kw}).fit()


def before_and_after(model, dgm, **kw):
    "Gradients before and after DGM, and its coefficients, in the first batch"
    before, after = Grads(), Grads()
    fit(model, before, dgm, after, **kw)
    return before, after, dgm.all


@pytest.mark.parametrize("msdu", [True, False])
@pytest.mark.parametrize("target", ["both", "encoder"])
@pytest.mark.parametrize("clips", [CLIPS, toy_clips(48, noise=(.2, 3.))], ids=["vision ahead", "audio ahead"])
def test_only_the_right_gradients_are_scaled(msdu, target, clips):
    before, after, mus = before_and_after(net(msdu=msdu), Mus(.5, noise=False, target=target), clips=clips, epochs=6, lr=2e-2)
    owner = {}
    for name in before.grads[0]:
        short = name.removeprefix("backbone.")
        if short.startswith("project.audio"): owner[name] = 0
        elif short.startswith("project."): owner[name] = 1
        elif short.startswith("head.maps.") and msdu and target == "both": owner[name] = int(short.split(".")[2])
    assert set(owner.values()) == {0, 1} and len({m for m in mus}) > 3
    assert [np.mean([m[i] < 1 for m in mus]) > .5 for i in (0, 1)] in ([True, False], [False, True])
    for b, a, mu in zip(before.grads, after.grads, mus):
        assert max(mu) == 1
        for k, g in b.items(): torch.testing.assert_close(a[k], g * (mu[owner[k]] if k in owner else 1), rtol=1e-6, atol=0)


def test_which_modality_is_damped():
    "Vision leads in one problem and sound in the other; the leader is held back in most batches"
    for noise, leader in [((3., .2), "visual"), ((.2, 3.), "audio")]:
        log = fit(net(), DGM(.1, noise=False), clips=toy_clips(300, noise=noise), epochs=5).history[-1]["dgm"]
        follower = {"audio": "visual", "visual": "audio"}[leader]
        assert log[f"damped_{leader}"] > .5 > log[f"damped_{follower}"] and log[f"mu_{leader}"] < log[f"mu_{follower}"]
        assert (log["omega"] > 1) == (leader == "visual")


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("msdu", [True, False])
def test_coefficients_come_from_the_scores_of_the_batch(msdu, measure):
    "With MSDU from its heads, without it from the pooled probabilities of each modality; logged as means over batches"
    before, _, mus = before_and_after(net(msdu=msdu), dgm := Mus(.3, measure=measure, noise=False), epochs=1)
    omegas = []
    for parsing, batch, mu in zip(before.parsings, before.batches, mus):
        scores = parsing.extra["measured"] if msdu else (parsing.audio, parsing.visual)
        omegas.append(omega_by_hand(*(s.tolist() for s in scores), batch.weak.tolist(), measure))
        assert mu == pytest.approx(mu_by_hand(omegas[-1], .3), rel=1e-4)
    log = fit(net(msdu=msdu), dgm, epochs=1).history[0]["dgm"]
    want = {"omega": np.mean(omegas), "mu_audio": np.mean([m[0] for m in mus]), "mu_visual": np.mean([m[1] for m in mus]),
            "damped_audio": np.mean([m[0] < 1 for m in mus]), "damped_visual": np.mean([m[1] < 1 for m in mus])}
    assert log == pytest.approx(want, rel=1e-4)


def test_measurement_does_not_enter_the_graph():
    "The gradient of a modulated run before modulation is that of the plain one"
    (before, _, _), plain = before_and_after(net(), Mus(.9), epochs=1), Grads()
    fit(net(), plain)
    for k, g in plain.grads[0].items(): assert torch.equal(g, before.grads[0][k])


@pytest.mark.parametrize("variance", ["added", "literal"])
def test_noise_of_a_real_backward_pass(variance):
    "In every modulated weight, for both modalities: N(0, s^2) around mu g; biases scaled; the rest untouched"
    model = net(frame_dim=300, motion_dim=300, audio_dim=300, dim=64)
    x = np.random.default_rng(0).normal(size=(3, 32, 5, 300)).astype(np.float32)
    clips = toy_clips(32)
    clips.audio, clips.frames, clips.motion = x
    before, after, mus = before_and_after(model, Mus(2., variance=variance), clips=clips, batch_size=32)
    mu, by, seen = mus[0], groups(model), []
    assert min(mu) < .95
    for m, who in enumerate(("audio", "visual")):
        for k in by[who]:
            g, new = before.grads[0][k], after.grads[0][k]
            if g.ndim == 1: torch.testing.assert_close(new, mu[m] * g, rtol=1e-5, atol=0); continue
            h = (new - mu[m] * g) / g.std()
            want = 1. if variance == "added" else math.sqrt(mu[m]**2 + 1)
            n = h.numel()
            assert h.std().item() == pytest.approx(want, rel=4 / math.sqrt(2 * n)) and abs(h.mean().item()) < 4 * want / math.sqrt(n)
            seen.append(h.flatten()[:500].double())
    assert len(seen) == 6
    assert (torch.corrcoef(torch.stack(seen)) - torch.eye(6)).abs().max() < .2          # every tensor its own noise
    for k in [*by["shared"], *by["measure"]]: assert torch.equal(before.grads[0][k], after.grads[0][k])


def test_literal_noise_follows_mu_when_updates_are_scaled_as_well():
    "Eq. 9 draws with variance (mu^2+1) s^2 whichever way mu is applied: the protocol `paper` is `literal` and `update`"
    model = net(frame_dim=600, dim=64)
    clips = toy_clips(32)
    clips.frames = np.random.default_rng(0).normal(size=(32, 5, 600)).astype(np.float32)
    before, after, mus = before_and_after(model, Mus(5., **PROTOCOLS["paper"]), clips=clips, batch_size=32)
    k, m = "backbone.project.frames.weight", int(mus[0][1] < 1)
    if not m: k = "backbone.project.audio.weight"
    g, mu = before.grads[0][k], mus[0][m]
    assert mu < .7 and ((after.grads[0][k] - g) / g.std()).std().item() == pytest.approx(math.sqrt(mu**2 + 1), rel=.1)


def test_noise_is_reproducible_and_leaves_everything_else_as_it_was():
    def grads(seed=1, epochs=2, **kw):
        keep = Grads()
        model = net(dropout=.1)
        out = fit(model, DGM(.1, **kw), keep, seed=seed, epochs=epochs)
        return out, keep
    (a, ka), (b, _), (c, kc), (_, kd) = grads(), grads(), grads(noise=False), grads(seed=2)
    assert same_weights(a.model, b.model) and not same_weights(a.model, c.model)
    assert [x.index.tolist() for x in ka.batches] == [x.index.tolist() for x in kc.batches]
    assert torch.equal(ka.parsings[0].video, kc.parsings[0].video)                       # same dropout
    noise = lambda kept, clean, i: kept.grads[i]["backbone.project.audio.weight"] - clean.grads[i]["backbone.project.audio.weight"]
    still = [Grads(), Grads()]                                                            # lr 0: the clean gradient of any batch
    for keep, seed in zip(still, (1, 2)): fit(net(dropout=.1), DGM(.1, noise=False), keep, seed=seed, epochs=2, lr=0.)
    frozen = [Grads(), Grads()]
    for keep, seed in zip(frozen, (1, 2)): fit(net(dropout=.1), DGM(.1), keep, seed=seed, epochs=2, lr=0.)
    unit = [[noise(f, s, i) for i in range(6)] for f, s in zip(frozen, still)]
    unit = [(h / h.std()).flatten() for run in unit for h in run]
    assert len(unit) == 12 and (torch.corrcoef(torch.stack(unit)) - torch.eye(12)).abs().max() < .5
    assert kd.batches[0].index.tolist() != ka.batches[0].index.tolist()


def test_a_resumed_run_draws_the_same_noise(tmp_path):
    class Stop(Callback):
        def after_backward(self, ln):
            if (ln.epoch, ln.i) == (1, 1): raise KeyboardInterrupt
    whole = fit(net(dropout=.1), DGM(.2), epochs=3)
    with pytest.raises(KeyboardInterrupt): fit(net(dropout=.1), DGM(.2), CheckpointCB(tmp_path / "c.pt"), Stop(), epochs=3)
    resumed = fit(net(dropout=.1, seed=9), DGM(.2), CheckpointCB(tmp_path / "c.pt"), epochs=3)
    assert same_weights(whole.model, resumed.model)
    assert [h["dgm"] for h in whole.history] == [h["dgm"] for h in resumed.history]


def blank(clips):
    "The same clips without motion: its weight has a gradient of exactly zero"
    clips = copy.copy(clips)
    clips.motion = np.zeros_like(clips.motion)
    return clips


@pytest.mark.parametrize("apply", ["gradient", "update"])
def test_a_weight_without_gradient_stays_where_it_is(apply):
    model, keep = net(), Grads()
    start = model.backbone.project.motion.weight.detach().clone()
    fit(model, keep, DGM(.1, apply=apply), clips=blank(CLIPS), epochs=2)
    assert all((g["backbone.project.motion.weight"] == 0).all() for g in keep.grads)
    assert torch.equal(model.backbone.project.motion.weight, start)


@pytest.mark.parametrize("apply", ["gradient", "update"])
def test_frozen_parameters_are_skipped(apply):
    model = net()
    model.backbone.project.motion.weight.requires_grad_(False)
    start = model.backbone.project.motion.weight.clone()
    fit(model, DGM(.1, apply=apply))
    assert torch.equal(model.backbone.project.motion.weight, start)


def adam_by_hand(grads, start, rate, scales):
    "Adam in double precision, each update multiplied by its own scale"
    w, m, v = start.double(), 0., 0.
    for t, (g, scale) in enumerate(zip(grads, scales), 1):
        g = g.double()
        m, v = .9 * m + .1 * g, .999 * v + .001 * g * g
        w = w - scale * rate * (m / (1 - .9**t)) / ((v / (1 - .999**t)).sqrt() + 1e-8)
    return w


@pytest.mark.parametrize("noise", [False, True])
def test_update_scales_what_adam_makes_of_the_gradient(noise):
    model, clean, keep, dgm = net(), Grads(), Grads(), Mus(1., apply="update", noise=noise)
    start = {k: p.detach().clone() for k, p in model.named_parameters()}
    fit(model, clean, dgm, keep, epochs=3)
    if not noise: assert all(torch.equal(a[k], b[k]) for a, b in zip(clean.grads, keep.grads) for k in a)   # gradients are left alone
    owner = {k: m for m, who in enumerate(("audio", "visual")) for k in groups(model)[who]}
    assert min(min(m) for m in dgm.all) < .5
    for k, p in model.named_parameters():
        scales = [mu[owner[k]] if k in owner else 1. for mu in dgm.all]
        want = adam_by_hand([g[k] for g in keep.grads], start[k], 5e-3, scales)
        torch.testing.assert_close(p.detach().double(), want, rtol=1e-3, atol=2e-5, msg=k)


def test_worked_example_f_adam_cancels_constants():
    "spec 11 (f)"
    g = [torch.tensor([x], dtype=torch.float64) for x in (.3, -.1, .2, .4)]
    def walk(scales): return adam_by_hand([s * x for s, x in zip(scales, g)], torch.zeros(1), 5e-4, [1] * 4).item()
    assert walk([1] * 4) == pytest.approx(-.0013825983, abs=1e-10) and walk([.9] * 4) == pytest.approx(walk([1] * 4), abs=1e-10)
    assert walk([.9, 1, .85, 1]) == pytest.approx(-.0013433555, abs=1e-10)
    w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    opt = torch.optim.Adam([w], 5e-4, fused=True)
    for x in g:
        w.grad = x.clone()
        opt.step()
    assert w.item() == pytest.approx(walk([1] * 4), abs=1e-12)


def test_gradient_and_update_differ_under_adam():
    runs = {a: fit(net(), DGM(.5, noise=False, apply=a), epochs=2) for a in ("gradient", "update")}
    assert not same_weights(runs["gradient"].model, runs["update"].model)


@pytest.mark.parametrize("kw", [{}, {"apply": "update"}, {"variance": "literal"}, {"target": "encoder"}])
def test_gamma_zero_without_noise_is_the_plain_network(kw):
    assert same_weights(fit(net(), DGM(0., noise=False, **kw), epochs=2).model, fit(net(), epochs=2).model)


# --- split -----------------------------------------------------------------------------------------------------------

def two_copies(model):
    "The same network with a copy of every shared weight for each modality"
    out = toy_han(3, dropout=0., share_layer=False)
    out.head = DGMNet(toy_han(3), msdu=True).backbone.head                                # two sets of maps
    state = model.backbone.state_dict()
    out.project.load_state_dict({k.removeprefix("project."): v for k, v in state.items() if k.startswith("project.")})
    for m in (0, 1):
        out.layers[m].load_state_dict({k.removeprefix("layers.0."): v for k, v in state.items() if k.startswith("layers.0.")})
        out.head.maps[m].load_state_dict({k.removeprefix("head.maps.0."): v for k, v in state.items() if k.startswith("head.maps.0.")})
    return out


@pytest.mark.parametrize("gamma", [0., .7])
def test_split_equals_a_network_with_two_copies(gamma):
    "g' = mu_a g_a + mu_v g_v for every shared tensor; encoders get their own mu and nothing of the other's"
    model, keep, dgm = net(msdu=False, shared="split"), Grads(), Mus(gamma, noise=False)
    copies = two_copies(model)
    fit(model, dgm, keep, clips=CLIPS[:16], batch_size=16)
    b = keep.batches[0]
    parsing = copies(b.audio, b.frames, b.motion)
    for k, x in parsing.arrays().items(): torch.testing.assert_close(x, getattr(keep.parsings[0], k))
    sum(GuidedLoss()(parsing, b).values()).backward()
    g, mu = {k: p.grad for k, p in copies.named_parameters()}, dgm.all[0]
    assert gamma == 0 or min(mu) < .9
    for k, got in keep.grads[0].items():
        k = k.removeprefix("backbone.")
        if k.startswith("project."): want = mu[0 if k.startswith("project.audio") else 1] * g[k]
        else: want = sum(mu[m] * g[k.replace("layers.0.", f"layers.{m}.").replace("maps.0.", f"maps.{m}.")] for m in (0, 1))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7, msg=k)


def test_split_with_msdu_leaves_the_separate_heads_to_their_modality():
    model, keep, dgm, clean = net(shared="split"), Grads(), Mus(.7, noise=False), Grads()
    fit(model, dgm, keep, clips=CLIPS[:16])
    fit(net(), clean, clips=CLIPS[:16])
    for m in (0, 1):
        k = f"backbone.head.maps.{m}.weight"
        torch.testing.assert_close(keep.grads[0][k], dgm.all[0][m] * clean.grads[0][k], rtol=1e-4, atol=1e-8)
    for k in groups(model)["measure"]: torch.testing.assert_close(keep.grads[0][k], clean.grads[0][k])


def test_split_does_not_change_what_the_network_says():
    plain, split = net(msdu=False), net(msdu=False, shared="split")
    a, b = predict(plain, CLIPS), predict(split, CLIPS)
    for k, x in a.arrays().items(): np.testing.assert_allclose(x, getattr(b, k), rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="tied copies share one Adam update"): fit(split, DGM(apply="update"))


def test_worked_example_d_split():
    "spec 11 (d): loss = w 2 (audio) + w 3 (visual)"
    from avvp_nb.methods.dgm import scale_gradient
    w, coef = torch.ones(1, requires_grad=True), torch.ones(2)
    loss = scale_gradient(w, coef[0]) * 2 + scale_gradient(w, coef[1]) * 3
    coef[1] = .802625
    loss.sum().backward()
    assert w.grad.item() == pytest.approx(4.407874, abs=1e-5)


# --- MSDU ------------------------------------------------------------------------------------------------------------

def count(module): return sum(p.numel() for p in module.parameters())


def test_number_of_parameters():
    plain, ours = HAN(), DGMNet(HAN())
    assert count(ours.msdu) == 51_300 and count(ours.backbone) - count(plain) == 38_475 and count(ours) - count(plain) == 89_775
    assert count(DGMNet(HAN(), msdu=False)) == count(plain)


def test_worked_example_c_pooling():
    "spec 11 (c): attention (.75,.25) on (.9,.1), and (.5,.5) on (.6,.2)"
    unit, logit = MSDU(2, 1), lambda p: math.log(p / (1 - p))
    for lin, a, p in zip(unit.maps, ((.75, .25), (.5, .5)), ((.9, .1), (.6, .2))):
        lin.weight.data = torch.tensor([[logit(x) for x in p], [math.log(x) for x in a]])
        lin.bias.data.zero_()
    e = torch.eye(2)[None]                                                                # second t has feature t
    assert [x.item() for x in unit(e, e)] == pytest.approx([.7, .4])


def test_msdu_by_hand_and_padding():
    torch.manual_seed(2)
    unit, e = MSDU(6, 4), torch.randn(2, 3, 5, 6)
    for m, got in enumerate(unit(*e)):
        logits = e[m] @ unit.maps[m].weight.T + unit.maps[m].bias
        want = (logits[..., 4:].softmax(1) * logits[..., :4].sigmoid()).sum(1)
        torch.testing.assert_close(got, want)
    mask = (torch.arange(5) < 3).expand(3, 5)
    for a, b in zip(unit(*e, mask), unit(*e[:, :, :3])): torch.testing.assert_close(a, b)


def test_msdu_measures_before_cross_attention_and_not_in_evaluation():
    model = net().train()
    b = CLIPS.batch(slice(0, 4))
    first = model(b.audio, b.frames, b.motion).extra["measured"]
    other = model(b.audio, 5 * b.frames, b.motion - 3).extra["measured"]
    assert torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])         # sound has not seen the picture
    model.eval()
    calls = []
    model.msdu.register_forward_hook(lambda *_: calls.append(1))
    assert "measured" not in model(b.audio, b.frames, b.motion).extra and not calls
    assert RULES["han"].decide(predict(model, CLIPS))[0].shape == (48, 5, 3)


def test_the_final_heads_are_separate_and_their_softmax_runs_across():
    model = net().eval()
    b = CLIPS.batch(slice(0, 4))
    with torch.no_grad():
        before = model(b.audio, b.frames, b.motion)
        model.backbone.head.maps[0].bias[6:] += 3.                                        # audio's modality attention
        after = model(b.audio, b.frames, b.motion)
    assert torch.equal(before.audio, after.audio) and torch.equal(before.visual, after.visual)
    assert not torch.allclose(before.video, after.video)


def test_the_loss_adds_the_modality_terms_of_the_baseline():
    base = GuidedLoss(eps_audio=.2, w_audio=2., w_visual=.5)
    model, b = net().train(), CLIPS.batch(slice(0, 8))
    parsing = model(b.audio, b.frames, b.motion)
    terms, plain = MSDULoss(base, weight=3.)(parsing, b), base(parsing, b)
    assert list(terms) == ["audio", "visual", "video", "ms_audio", "ms_visual"]
    assert all(torch.equal(terms[k], plain[k]) for k in plain)
    weak = b.weak.flatten().tolist()
    for k, p, eps, w in zip(("ms_audio", "ms_visual"), parsing.extra["measured"], (.2, .1), (2., .5)):
        y = [(1 - eps) * t + eps / 2 for t in weak]
        want = sum(-(t * math.log(x) + (1 - t) * math.log(1 - x)) for t, x in zip(y, p.flatten().tolist())) / len(y)
        assert terms[k].item() == pytest.approx(3 * w * want, rel=1e-4)
    with torch.no_grad(): assert list(MSDULoss(base)(model.eval()(b.audio, b.frames, b.motion), b)) == ["audio", "visual", "video"]


@pytest.mark.parametrize("flows", [True, False])
def test_gradient_from_the_measurement_into_the_encoders(flows):
    model, b = net(msdu_gradient=flows).train(), CLIPS.batch(slice(0, 8))
    terms = LOSS(model(b.audio, b.frames, b.motion), b)
    (terms["ms_audio"] + terms["ms_visual"]).backward()
    moved = {k for k, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    heads = {k for k in groups(model)["measure"]}
    assert moved == (heads | {k for k, _ in model.named_parameters() if "project." in k} if flows else heads)


def test_every_parameter_has_one_owner():
    for model in (net(), net(msdu=False), toy_han(), toy_han(share_layer=False)):
        for target in ("both", "encoder"):
            by = groups(model, target)
            names = [k for g in by.values() for k in g]
            assert sorted(names) == sorted(k for k, _ in model.named_parameters())
    by = groups(net())
    assert {k: len(v) for k, v in by.items()} == {"audio": 4, "visual": 8, "shared": 14, "measure": 4}
    assert {k: len(v) for k, v in groups(net(), "encoder").items()} == {"audio": 2, "visual": 6, "shared": 18, "measure": 4}


# --- protocols -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("protocol, want", [("ogm_ge", ("gradient", "added")), ("paper", ("update", "literal"))])
def test_protocols(protocol, want):
    spec = RunSpec("dgm", {"gamma": .3, "measure": "score", "target": "encoder"}, protocol=protocol)
    model, loss, (dgm,) = METHODS["dgm"].build(spec.plain(), SIZES)
    assert (dgm.apply, dgm.variance) == want and (dgm.gamma, dgm.measure, dgm.target, dgm.noise) == (.3, "score", "encoder", True)
    assert isinstance(model, DGMNet) and isinstance(loss, MSDULoss) and dgm.apply == spec.full_options["apply"]
    assert METHODS["dgm"].protocols[0] == "ogm_ge"


def test_msdu_without_modulation():
    spec = RunSpec("dgm", {"modulate": False})
    model, _, callbacks = METHODS["dgm"].build(spec.plain(), SIZES)
    assert callbacks == [] and model.msdu is not None


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kw", [{}, {"apply": "update", "variance": "literal"}])
def test_on_a_gpu(kw):
    dgm = DGM(.3, **kw)
    out = Learner(net(), CLIPS.to("cuda"), LOSS, epochs=2, device="cuda", callbacks=[dgm]).fit()
    assert all(math.isfinite(x) for h in out.history for x in h["loss"].values()) and out.history[0]["dgm"]["omega"] > 0
    quiet = [Learner(net(), CLIPS, LOSS, epochs=2, device=d, callbacks=[DGM(.3, noise=False)]).fit() for d in ("cpu", "cuda")]
    for a, b in zip(*(q.history for q in quiet)): assert a["dgm"] == pytest.approx(b["dgm"], rel=.05, abs=.3)


def test_batches_of_baseline_and_modulated_run_are_the_same():
    keep = Grads()
    fit(net(), DGM(.1), keep, seed=4)
    assert [b.index.tolist() for b in keep.batches] == [b.tolist() for b in batches(48, 16, 4, 0)]
    assert micro.SIZES == SIZES
