"""Co-teaching, Co-teaching+ and JoCoR: parity of selection, losses and schedules with the released code, then the pair in the one loop."""
import os
import signal
from dataclasses import replace

import micro
import numpy as np
import pytest
import torch
from conftest import close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from avvp_nb import runs
from avvp_nb.core import InputError, Parsing
from avvp_nb.data.clips import Batch
from avvp_nb.methods.han import HAN
from avvp_nb.methods.losses import GuidedLoss, bce
from avvp_nb.methods.method import METHODS
from avvp_nb.methods.noisy import (
    OPTIONS,
    CoteachingLoss,
    ForgetCB,
    JoCoRLoss,
    Pair,
    bernoulli_divergence,
    build_noisy,
    coteaching_loss,
    dropped,
    forget_rate,
    jocor_each,
    jocor_loss,
    kept_mean,
    kl,
    origin_adam,
    small_loss,
)
from avvp_nb.records.spec import RunSpec
from avvp_nb.records.weights import load_weights
from avvp_nb.results.reported import method_name
from avvp_nb.runs.stacked import plan_stacks
from avvp_nb.train import learner as loop
from avvp_nb.train.callbacks import CheckpointCB, ValidateCB
from avvp_nb.train.graphs import Tape
from avvp_nb.train.lanes import Lane, why_not
from avvp_nb.train.learner import Callback, Learner, predict
from avvp_nb.train.stack import StackedLearner

LOSSES = {"coteaching": CoteachingLoss, "scaled": lambda: CoteachingLoss(official_scaling=True),
          "coteaching_plus": lambda: CoteachingLoss(), "jocor": JoCoRLoss}
WARMUP = {"coteaching_plus": .5}
TRAIN, VALID = micro.toy_clips(48), micro.toy_clips(16, seed=1)


# ---- parity

def logits(case, i): return [torch.tensor(case[f"logits_{k}"][i], requires_grad=True) for k in (1, 2)]


@pytest.mark.parametrize("i", range(4))
def test_coteaching_is_the_released_loss(golden, i):
    case = golden("coteaching_loss")
    z, y, rate = logits(case, i), torch.tensor(case["target"][i]), float(case["forget_rate"][i])
    c = [F.cross_entropy(x, y, reduction="none") for x in z]
    kept = [small_loss(x, rate) for x in c]
    found = coteaching_loss(*c, rate, official_scaling=True)
    sum(found).backward()
    clean = case["clean"][case["index"][i]]
    got = {"pure_ratio_1": clean[kept[0].numpy()].mean(), "pure_ratio_2": clean[kept[1].numpy()].mean(),
           "kept_by_1": kept[0], "kept_by_2": kept[1], "loss_1": found[0].detach(), "loss_2": found[1].detach(),
           "grad_logits_1": z[0].grad, "grad_logits_2": z[1].grad}
    for key, value in got.items(): close_row(case, key, i, value)
    assert kept[0].sum() == case.info["values"]["number_kept"][i] == kept[1].sum()


def close_row(case, key, i, value):
    "As `close`, for one row of the array"
    row = type(case)({key: case[key][i]})
    row.info = case.info
    close(row, key, value)


@pytest.mark.parametrize("i", range(4))
def test_jocor_is_the_released_loss(golden, i):
    case = golden("jocor_loss")
    z, y, rate, lam = logits(case, i), torch.tensor(case["target"][i]), float(case["forget_rate"][i]), float(case["co_lambda"][i])
    c, p = [F.cross_entropy(x, y, reduction="none") for x in z], [x.log_softmax(-1) for x in z]
    towards = kl(p[1], p[0]), kl(p[0], p[1])
    loss = jocor_loss(*c, sum(towards), rate, lam)
    loss.backward()
    kept = small_loss(jocor_each(*c, sum(towards), lam), rate)
    got = {"loss": loss.detach(), "kept": kept, "kl_2_to_1": towards[0].detach(), "kl_1_to_2": towards[1].detach(),
           "pure_ratio": case["clean"][case["index"][i]][kept.numpy()].mean(), "grad_logits_1": z[0].grad, "grad_logits_2": z[1].grad}
    for key, value in got.items(): close_row(case, key, i, value)


def test_schedules_are_the_released_ones(golden):
    case = golden("noisy_schedules")
    rows = {k: [] for k in ("forget_rate", "learning_rate", "beta1")}
    for s in case.info["options"]["settings"]:
        f = s["forget_rate"] or s["noise_rate"] / (2 if s["noise_type"] == "asymmetric" else 1)
        rows["forget_rate"].append([forget_rate(e, f, s["num_gradual"], s["exponent"]) for e in range(40)])
        adam = [origin_adam(e, case.info["options"]["lr"], s["n_epoch"], s["epoch_decay_start"]) for e in range(40)]
        for k, column in zip(("learning_rate", "beta1"), zip(*adam)): rows[k].append(column)
    for k, v in rows.items(): close(case, k, v)


# ---- selection

@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 9), st.booleans()), min_size=1, max_size=30), st.floats(0, .99))
def test_small_losses_by_sorting(entries, rate):
    loss, among = (torch.tensor(x) for x in zip(*entries))
    kept = small_loss(loss, rate, among)
    ranked = sorted((v, i) for i, (v, a) in enumerate(zip(loss.tolist(), among.tolist())) if a)
    want = {i for _, i in ranked[:int((1 - rate) * len(ranked))]}
    assert {i for i, k in enumerate(kept.tolist()) if k} == want


def test_selection_takes_shapes_and_carries_no_gradient():
    x = torch.rand(4, 5, requires_grad=True)
    kept = small_loss(x, .5)
    assert kept.shape == (4, 5) and kept.sum() == 10 and not kept.requires_grad
    kept_mean(x, kept).backward()
    assert torch.equal(x.grad != 0, kept)
    assert kept_mean(x, torch.zeros(4, 5, dtype=torch.bool)).item() == 0


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1))
def test_divergence_of_two_values(p, q):
    p, q = torch.tensor([p]), torch.tensor([q])
    def pair(x): return torch.stack([x, 1 - x], -1).clamp(1e-7, 1 - 1e-7).double().log()
    torch.testing.assert_close(bernoulli_divergence(p, q).double(), kl(pair(p), pair(q)) + kl(pair(q), pair(p)), rtol=2e-2, atol=1e-5)


def drawn(B=6, C=4, seed=0, labels=None):
    "A parsing of a pair, and its batch"
    g = torch.Generator().manual_seed(seed)
    def one():
        x = torch.rand(3, B, C, generator=g)
        return Parsing(*x.requires_grad_().unbind(0), None)
    p, q = one(), one()
    p.extra["second"] = q
    weak = (torch.rand(B, C, generator=g) > .4).float()
    return p, q, Batch(None, None, None, weak, None, labels or {})


def by_loops(p, q, y, rate, plus=False):
    "Entries that network 1 learns from in Co-teaching: chosen by network 2"
    positive = [(i, c) for i in range(len(y)) for c in range(y.shape[1]) if y[i, c] == 1]
    ranked = positive
    if plus: ranked = [e for e in positive if (p[e] >= .5) != (q[e] >= .5)] or positive
    best = sorted(ranked, key=lambda e: -q[e].item())[:int((1 - rate) * len(ranked))]
    return {(i, c) for i in range(len(y)) for c in range(y.shape[1]) if y[i, c] == 0} | set(best)


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_terms_of_coteaching_by_loops(seed, plus):
    p, q, batch = drawn(seed=seed)
    loss = CoteachingLoss((.1, .45), disagree=plus)
    terms = loss(p, batch)
    for k, rate in (("audio", .1), ("visual", .45)):
        for name, own, other in ((k, p, q), (f"{k}_2", q, p)):
            x, y = getattr(own, k).detach(), batch.weak
            kept = by_loops(x, getattr(other, k).detach(), y, rate, plus)
            want = np.mean([-np.log(x[e].item() if y[e] == 1 else 1 - x[e].item()) for e in kept])
            assert terms[name].item() == pytest.approx(want, rel=1e-5)
    assert terms["video"].item() == pytest.approx(bce(p.video, batch.weak).item())
    assert terms["video_2"].item() == pytest.approx(bce(q.video, batch.weak).item())


def test_nothing_is_forgotten_at_rate_zero():
    p, q, batch = drawn()
    terms, plain = CoteachingLoss()(p, batch), GuidedLoss(eps_visual=0.)
    for suffix, x in (("", p), ("_2", q)):
        for k, v in plain(x, batch).items(): torch.testing.assert_close(terms[k + suffix], v)


def test_no_gradient_crosses_the_networks_of_coteaching():
    p, q, batch = drawn()
    terms = CoteachingLoss((.2, .2))(p, batch)
    first = [terms[k] for k in ("audio", "visual", "video")]
    grads = torch.autograd.grad(sum(first), [q.audio, q.visual, q.video], allow_unused=True, retain_graph=True)
    assert all(g is None for g in grads)
    assert all(g is not None for g in torch.autograd.grad(sum(first), [p.audio, p.visual, p.video]))


def test_both_networks_of_jocor_learn_from_one_term():
    p, q, batch = drawn()
    loss = JoCoRLoss((.2, .2))
    term = loss(p, batch)["audio"]
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(term, [p.audio, q.audio]))
    swapped = replace(q, extra={"second": p})
    torch.testing.assert_close(loss(swapped, batch)["audio"], term)               # nobody is first


def test_labels_of_a_modality_are_honoured():
    given_ = torch.zeros(6, 4)
    given_[0, 0] = 1
    p, q, batch = drawn(labels={"audio": given_})
    assert CoteachingLoss((.5, 0.))(p, batch)["audio"].item() == pytest.approx(bce(p.audio, given_)[None].item() * 24 / 23 + np.log(p.audio[0, 0].item()) / 23)


# ---- the loop

def make(name, seed=1, kind=Learner, clips=TRAIN, callbacks=(), epochs=4, dropout=.1, lr=5e-3, **kw):
    torch.manual_seed(seed)
    model, loss = Pair(lambda: HAN(**micro.SIZES, dropout=dropout)), LOSSES[name]()
    return kind(model, clips, loss, lr=lr, epochs=epochs, step=3, batch_size=16, seed=seed, device="cpu",
                callbacks=[ForgetCB(loss, warmup=WARMUP.get(name, 1.)), *callbacks], **kw)


def log(learner): return [{k: v for k, v in h.items() if k != "seconds"} for h in learner.history]


@pytest.mark.parametrize("name", LOSSES)
def test_training_lowers_the_loss(name):
    learner = make(name, epochs=6).fit()
    assert sum(learner.history[-1]["loss"].values()) < .9 * sum(learner.history[0]["loss"].values())
    assert [h["forget"]["visual"] for h in learner.history] == pytest.approx([.35 * min(1, e / 5) for e in range(1, 7)])


def test_two_optimisers_over_two_networks_are_one():
    learner = make("coteaching", epochs=2, dropout=0.)
    nets = make("coteaching", dropout=0.).model.nets
    opts = [torch.optim.Adam(n.parameters(), 5e-3, fused=True) for n in nets]
    for epoch in range(2):
        loss = CoteachingLoss(tuple(forget_rate(epoch + 1, f, 2) for f in (.05, .35)))
        for idx in loop.batches(48, 16, 1, epoch):
            b = TRAIN.batch(idx)
            p, q = (n(*b.features) for n in nets)
            p.extra["second"] = q
            terms = loss(p, b)
            for opt, suffix in zip(opts, ("", "_2")):
                opt.zero_grad()
                sum(v for k, v in terms.items() if k.endswith("_2") == bool(suffix)).backward()
            for opt in opts: opt.step()
    learner.fit()
    for a, b in zip(learner.model.nets.parameters(), nets.parameters()): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class Stop(Callback):
    "The power fails"
    order = 200
    def __init__(self, epoch): self.epoch = epoch
    def after_epoch(self, learner):
        if learner.epoch == self.epoch: raise KeyboardInterrupt


@pytest.mark.parametrize("name", LOSSES)
def test_an_interrupted_run_continues_to_the_last_bit(tmp_path, name):
    def fitted(*more): return make(name, callbacks=[ValidateCB(VALID, "han", "segment/Type@AV"), CheckpointCB(tmp_path / "c.pt", "x"), *more]).fit()
    whole = make(name, callbacks=[ValidateCB(VALID, "han", "segment/Type@AV")]).fit()
    with pytest.raises(KeyboardInterrupt): fitted(Stop(3))
    again = fitted()
    assert micro.same_weights(whole.model, again.model) and log(again) == log(whole)


@pytest.mark.parametrize("name", LOSSES)
def test_runs_stack(name):
    alone, lanes = [make(name, s).fit() for s in (1, 2, 3)], [make(name, s, Lane) for s in (1, 2, 3)]
    assert why_not(lanes[0].model, lanes[0].callbacks) is None
    stack = StackedLearner(lanes).fit()
    assert not stack.failed and not stack.apart                    # the losses of all lanes were computed together
    for a, b in zip(alone, lanes):
        for h, g in zip(a.history, b.history):
            assert g["forget"] == h["forget"] and list(g["loss"].values()) == pytest.approx(list(h["loss"].values()), rel=2e-4)
        np.testing.assert_allclose(predict(a.model, VALID).segments, predict(b.model, VALID).segments, atol=2e-3)


@pytest.mark.parametrize("name", LOSSES)
def test_a_recorded_run_is_the_run(name, monkeypatch):
    monkeypatch.setattr(loop, "tape_for", lambda device: Tape)
    clips = TRAIN.to("cpu")
    plain, recorded = (make(name, clips=clips, engine=e).fit() for e in ("eager", "graphs"))
    assert log(plain) == log(recorded) and micro.same_weights(plain.model, recorded.model)
    assert recorded.recorded.replays == 1 and recorded.recorded.failure is None


def test_the_first_network_answers_and_padding_changes_nothing():
    model = make("jocor").model
    assert np.array_equal(predict(model, VALID).segments, predict(model.nets[0], VALID).segments)
    short = replace(VALID, lengths=np.arange(16) % 5 + 1)
    b = short.batch([2])
    want = model.eval()(*(x[:, :3] for x in b.features))
    np.testing.assert_allclose(predict(model, short).audio[2], want.audio[0].detach(), atol=1e-6)
    learner = make("coteaching", clips=replace(TRAIN, lengths=np.arange(48) % 5 + 1), epochs=1).fit()
    assert all(np.isfinite(v) for v in learner.history[0]["loss"].values())


@pytest.mark.parametrize("name", ["coteaching", "jocor"])
def test_dropped_labels_are_labels_and_as_many_as_the_rate_says(name):
    learner = make(name).fit()
    n = int(TRAIN.weak.sum())
    for removed, rate in zip(dropped(learner.model, TRAIN, learner.loss), learner.loss.forget):
        assert removed.sum() == n - int((1 - rate) * n) and not (removed & (TRAIN.weak == 0)).any()


def test_a_single_network_is_refused():
    with pytest.raises(InputError, match="there is no second network"):
        Learner(micro.toy_han(), TRAIN, CoteachingLoss(), epochs=1, device="cpu").fit()


# ---- runs

@pytest.fixture
def small(monkeypatch):
    micro.install(monkeypatch.setitem)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_entry(name):
    m = METHODS[name]
    assert (m.faith, m.builds_on, m.recipe["epochs"], m.rule, bool(m.idea), m.modalities) == ("stand-in", ("han",), 40, "han", True, "av")
    model, loss, (cb,) = build_noisy(RunSpec(name).plain(), micro.SIZES)
    assert isinstance(model, Pair) and cb.loss is loss and cb.rates == (.05, .35) and cb.ramp == 10
    assert not micro.same_weights(*model.nets)


def test_printed_rows_and_names():
    assert {row: n for n, m in METHODS.items() for row in m.rows if n in OPTIONS} == {"han+coteaching": "coteaching", "han+jocor": "jocor"}
    assert [method_name(m) for m in ("han+coteaching", "han+jocor", "coteaching_plus")] == ["HAN+Co-teaching", "HAN+JoCoR", "Co-teaching+"]


@pytest.mark.parametrize("name, options, message", [
    ("coteaching", {"forget_audio": 1.}, "forget_audio: 1.0 is not possible"), ("jocor", {"forget_visual": -.1}, "forget_visual: -0.1"),
    ("jocor", {"co_lambda": 1.1}, "co_lambda: 1.1"), ("coteaching", {"ramp": 0}, "ramp: 0"), ("coteaching", {"exponent": float("nan")}, "exponent"),
    ("coteaching_plus", {"warmup": 2.}, "warmup: 2.0"), ("coteaching", {"warmup": .5}, "coteaching has no such option"),
    ("jocor", {"official_scaling": True}, "jocor has no such option"), ("coteaching", {"ramp": 1.5}, "ramp")])
def test_impossible_options_are_refused(name, options, message):
    with pytest.raises(InputError, match=message): RunSpec(name, options)


def test_labels_of_each_second_are_refused():
    with pytest.raises(InputError, match="one network only"): RunSpec("coteaching", labels="clip+clap")


def test_all_of_them_share_a_stack(small):
    specs = [RunSpec(n, scale="micro", seed=s) for n in OPTIONS for s in (1, 2)]
    plan = plan_stacks(specs)
    assert plan.stacks == [specs] and not plan.alone              # one network, one kind of callback; losses are told apart


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("name, die", [("coteaching", 3), ("coteaching_plus", 4), ("jocor", 5)])
def test_a_killed_run_continues_to_the_last_bit(tmp_path, small, name, die):
    spec = RunSpec(name, scale="micro")
    pid = os.fork()
    if not pid:
        try:
            micro.die_at(die)
            runs.run(spec, tmp_path / "b", device="cpu", progress="off")
        finally: os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    whole, again = (runs.run(spec, tmp_path / k, device="cpu", progress="off") for k in "ab")
    assert micro.essence(tmp_path / "a", whole) == micro.essence(tmp_path / "b", again)
    model, _ = load_weights(runs.Store(tmp_path / "b").weight_path(whole["key"]))
    assert isinstance(model, Pair)
