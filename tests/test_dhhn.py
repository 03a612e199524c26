"""DHHN: parity of its three networks, its loss and its targets with the released code; the states of each modality; runs."""
import os
import signal
from dataclasses import replace
from functools import partial

import micro
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import close
from test_han import VARIANTS
from test_han import fill as fill_others
from torch import nn

from avvp_nb import runs
from avvp_nb.core import MODALITIES, InputError, Parsing, read_json, shared
from avvp_nb.data.clips import Batch
from avvp_nb.methods.dhhn import (
    DHHN,
    HCMN,
    LAYOUTS,
    RATES,
    RECIPE,
    UNUSED,
    ByModalityCB,
    DHHNLoss,
    Teacher,
    build_dhhn,
    dhhn_keys,
    refining,
    square,
    stretched,
    teacher_keys,
)
from avvp_nb.methods.han import HybridAttention
from avvp_nb.methods.losses import GuidedLoss, bce
from avvp_nb.methods.method import METHODS
from avvp_nb.methods.official import from_official, to_official
from avvp_nb.metrics import RULES
from avvp_nb.records.spec import RunSpec
from avvp_nb.records.weights import load_weights
from avvp_nb.results.reported import method_name
from avvp_nb.runs.stacked import look, plan_stacks
from avvp_nb.train.callbacks import CheckpointCB, ValidateCB
from avvp_nb.train.lanes import Lane, why_not
from avvp_nb.train.learner import Callback, Learner, predict, predict_both
from avvp_nb.train.stack import StackedLearner

NETWORKS = {"dhhn": "dhhn_main", "dhhn_audio": "dhhn_audio", "dhhn_video": "dhhn_video"}
TRAIN, VALID = micro.toy_clips(48, T=10), micro.toy_clips(16, seed=1, T=10)


def fill(keys, rule):
    "The fill rule with its additions for batch norm"
    out = fill_others({k["key"]: k["shape"] for k in keys}, rule)
    for k in keys:
        name, kind = k["key"], k["kind"]
        if kind in ("batchnorm_weight", "running_var"): out[name] = (1 + .1 * out[name].double() / .02).float()
        if kind == "counter": out[name] = torch.zeros((), dtype=torch.long)
    return out


@pytest.fixture(scope="module")
def keys(golden):
    found = read_json(shared("golden", "state_dict_keys_baselines.json"))
    return {name: found[network]["keys"] for name, network in NETWORKS.items()}


@pytest.fixture(scope="module")
def networks(keys):
    "Our networks with the official tensors of each fill rule, in eval mode"
    return {v: {name: from_official(fill(k, "chirp" if v else "sine"), name, strict=True) for name, k in keys.items()} for v in VARIANTS}


@pytest.fixture(scope="module")
def features(golden):
    case = golden("inputs_b3")
    return [torch.tensor(case[k]) for k in ("audio", "visual", "visual_st")]


# ---- parity

def test_the_fill_rule_is_understood(keys):
    for name, table in keys.items():
        for rule in ("sine", "chirp"):
            for k, x in zip(table, fill(table, rule).values()):
                if rule not in k or "first" not in k[rule]: continue
                np.testing.assert_allclose(x.flatten()[:3].numpy(), k[rule]["first"][:x.numel()], rtol=1e-6, err_msg=f"{name} {k['key']}")


def test_every_official_tensor_is_used_or_known_to_be_unused(keys):
    tables = {"dhhn": dhhn_keys(), "dhhn_audio": teacher_keys("audio"), "dhhn_video": teacher_keys("visual")}
    for name, table in tables.items():
        used, there = {o for o, _, _ in table}, {k["key"] for k in keys[name]}
        assert used <= there and len(used) == len(table)
        assert {k for k in there - used} == {k for k in there if name == "dhhn" and k.startswith(UNUSED)}
    assert [len(keys[n]) for n in NETWORKS] == [70, 18, 34]


def test_there_and_back(keys, networks):
    for name, table in keys.items():
        given, model = fill(table, "chirp"), networks["_chirp"][name]
        back = to_official(model, name)
        assert all(torch.equal(v, given[k]) for k, v in back.items())
        own = model.state_dict()
        for official, ours, rows in LAYOUTS[name].keys(*LAYOUTS[name].sizes(model)): assert torch.equal(own[ours][rows], given[official]), official
        assert not model.training
        assert micro.same_weights(model, from_official({f"module.{k}": v for k, v in given.items()}, name))
        lacking = {k: v for k, v in given.items() if k != "fc_frame_att.bias"}
        with pytest.raises(InputError, match="1 tensors are missing"): from_official(lacking, name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_main_network(golden, networks, features, variant):
    case, net = golden("dhhn_forward" + variant), networks[variant]["dhhn"]
    with torch.no_grad():
        e = net.project(*features)
        scales = [s(x) for s, x in zip(net.scales, e)]
        streams, levels = net.streams(*e), [x.unflatten(0, (3, 3)) for x in net.attend(*e)]
        out = net(*features)
    got = {"global_prob": out.video, "a_prob": out.audio, "v_prob": out.visual, "frame_prob": out.segments}
    for m, letter in enumerate("av"):
        got[f"proj_{letter}"] = e[m]
        for k in range(3):
            got |= {f"scale{k + 1}_{letter}": scales[m][k], f"han{k + 1}_{letter}": streams[k][m]}
    for k in range(3):
        got |= {f"level{k + 1}": torch.stack([x[k] for x in levels], 2), f"level{k + 1}_frame_prob": out.extra["levels"][k]}
    missing = {k for k in case if k not in got}
    assert not missing, missing
    for key in case: close(case, key, got[key])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("file", ["audio", "video"])
def test_teachers(golden, networks, features, variant, file):
    case, net = golden(f"dhhn_{file}_net_forward{variant}"), networks[variant][f"dhhn_{file}"]
    with torch.no_grad():
        h, encoded = net.embed(*features), []
        proj = h
        for _ in range(net.times):
            encoded.append(net.encoder(h))
            h = h + encoded[-1]
        out = net(*features)
    assert len(encoded) == case.info["options"]["iterations"]
    got = {"prob": out.probs, "frame_prob": out.segments, "proj": proj, "enc1": encoded[0], "enc_last": encoded[-1]}
    assert set(case) == set(got)
    for key, value in got.items(): close(case, key, value)


def test_a_mistake_is_detected(golden, networks, features, monkeypatch):
    "The parity test has teeth: bilinear for nearest"
    from avvp_nb.methods import dhhn
    case, net = golden("dhhn_forward_chirp"), networks["_chirp"]["dhhn"]
    monkeypatch.setattr(dhhn, "stretched", lambda x, T: nn.functional.interpolate(x.mT, size=T, mode="linear").mT)
    with torch.no_grad(): out = net(*features)
    with pytest.raises(AssertionError): close(case, "frame_prob", out.segments)


TERMS = {"loss_audio": "audio", "loss_visual": "visual", "loss_global": "video", "loss_distil_audio": "distil_audio",
         "loss_distil_visual": "distil_visual", "loss_adversarial": "apart", "loss_teacher_audio": "teacher_audio",
         "loss_teacher_visual": "teacher_visual", "loss_teacher_adversarial": "teachers_apart"}


def trained(keys, rule):
    "A DHHN with the official tensors, in training mode without any dropout"
    model = DHHN(dropout=0., dual=False)
    parts = {"dhhn": model.main, "dhhn_audio": model.teachers[0], "dhhn_video": model.teachers[1]}
    for name, part in parts.items(): part.load_state_dict(from_official(fill(keys[name], rule), name).state_dict())
    return model.train(), parts


@pytest.mark.parametrize("case_name", ["dhhn_loss", "dhhn_loss_chirp", "dhhn_loss_refined_chirp"])
def test_loss_and_gradients(golden, keys, features, case_name):
    case = golden(case_name)
    model, parts = trained(keys, "chirp" if "chirp" in case_name else "sine")
    refined, weak = "refined" in case_name, torch.tensor(golden("inputs_b3")["label"])
    labels = {}
    if refined:
        labels = {"removed_audio": (weak > torch.tensor(case["pa"])).float(), "removed_visual": ((weak > 0) & (torch.tensor(case["pv"]) == 0)).float()}
        assert [x.sum() for x in labels.values()] == [1, 1]
    loss, batch = DHHNLoss(refined, alias_bug=refined), Batch(None, None, None, weak, None, labels)
    for key, y in zip(("pa", "pv"), loss.targets(batch)): np.testing.assert_allclose(y, case[key], atol=1e-6)
    np.testing.assert_allclose(loss.video_target(batch), case["label"], atol=1e-6)
    parsing = model(*features)
    said = {"global_prob": parsing.video, "a_prob": parsing.audio, "v_prob": parsing.visual,
            "teacher_a_prob": parsing.extra["teachers"][0], "teacher_v_prob": parsing.extra["teachers"][1]}
    for key, value in said.items(): close(case, key, value.detach())
    terms = loss(parsing, batch)
    assert set(terms) == set(TERMS.values())
    for key, name in TERMS.items(): close(case, key, terms[name].detach())
    teachers = [k for k in terms if k.startswith("teacher")]
    close(case, "loss_teachers_total", sum(terms[k] for k in teachers).detach())
    close(case, "loss_main_total", sum(v for k, v in terms.items() if k not in teachers).detach())
    sum(terms.values()).backward()
    check_gradients(case, parts)
    own, table = model.main.state_dict(), {o: (m, r) for o, m, r in dhhn_keys()}
    for key in [k for k in case if k.startswith("after.")]:
        ours, rows = table[key[6:]]
        close(case, key, own[ours][rows])


def check_gradients(case, parts):
    "Gradients and their norms, by network"
    for name, part in parts.items():
        grads = to_official(part, name, of=lambda p: p.grad)
        short = NETWORKS[name].split("_")[1]
        for key in [k for k in case if k.startswith(f"grad.{short}.")]: close(case, key, grads[key.split(".", 2)[2]])
        if f"grad_norms_{short}" not in case: continue
        names = case.info[f"parameter_keys_{short}"]
        norms = np.array([grads[k].norm().item() if k in grads else np.nan for k in names])
        assert {k for k, n in zip(names, norms) if np.isnan(n)} == {k for k in names if name == "dhhn" and k.startswith(UNUSED)}
        close(case, f"grad_norms_{short}", norms)


def test_targets_are_those_of_the_released_data_set(golden):
    case = golden("dhhn_labels")
    y, removed = torch.tensor(case["label"]), {f"removed_{m}": torch.tensor(case[f"removed_{m}"]).float() for m in MODALITIES}
    plain, struck = (Batch(None, None, None, y, None, labels) for labels in ({}, removed))
    for name, loss, batch in (("train", DHHNLoss(), plain), ("retrain", DHHNLoss(True, True), struck)):
        got = dict(zip(("pa", "pv"), loss.targets(batch))) | {"label": loss.video_target(batch)}
        for k, v in got.items(): close(case, f"{name}_{k}", v)
    assert torch.equal(DHHNLoss(True).video_target(struck), y)                     # without the mistake the video keeps its label


# ---- formulas once more

def test_nearest_seconds():
    for T, n in ((10, 5), (10, 2), (7, 4), (5, 3), (1, 1)):
        x = torch.arange(float(n))[None, :, None]
        assert stretched(x, T).flatten().tolist() == [t * n // T for t in range(T)]


def drawn(seed=0, B=4, C=3):
    g = torch.Generator().manual_seed(seed)
    p = Parsing(*torch.rand(3, B, C, generator=g).requires_grad_().unbind(0), None)
    p.extra["teachers"] = list(torch.rand(2, B, C, generator=g).requires_grad_().unbind(0))
    weak = (torch.rand(B, C, generator=g) > .5).float()
    return p, weak, {f"removed_{m}": ((torch.rand(B, C, generator=g) > .5) & (weak > 0)).float() for m in MODALITIES}


def test_teachers_learn_from_refined_labels_when_they_are_told_to():
    p, weak, removed = drawn()
    batch = Batch(None, None, None, weak, None, removed)
    plain, refined = DHHNLoss()(p, batch), DHHNLoss(True)(p, batch)
    y_a, y_v = GuidedLoss().targets(batch)
    torch.testing.assert_close(plain["teacher_visual"], bce(p.extra["teachers"][1], weak))
    torch.testing.assert_close(refined["teacher_visual"], bce(p.extra["teachers"][1], y_v))
    torch.testing.assert_close(refined["teacher_audio"], bce(p.extra["teachers"][0], y_a))
    for k in ("audio", "visual", "video", "distil_audio", "apart"): torch.testing.assert_close(plain[k], refined[k])
    fixed = DHHNLoss(True, True)(p, batch)
    torch.testing.assert_close(fixed["video"], bce(p.video, y_a))
    assert not torch.isclose(fixed["video"], refined["video"])


def test_no_term_of_the_main_network_reaches_the_teachers():
    p, weak, _ = drawn()
    terms = DHHNLoss()(p, Batch(None, None, None, weak, None, {}))
    main = sum(v for k, v in terms.items() if not k.startswith("teacher"))
    assert all(g is None for g in torch.autograd.grad(main, p.extra["teachers"], allow_unused=True, retain_graph=True))
    rest = sum(v for k, v in terms.items() if k.startswith("teacher"))
    assert all(g is None for g in torch.autograd.grad(rest, [p.audio, p.visual, p.video], allow_unused=True))
    torch.testing.assert_close(terms["apart"], -nn.functional.mse_loss(p.audio, p.visual))
    torch.testing.assert_close(square(p.audio, p.visual), -terms["apart"])


def test_teachers_are_unimodal():
    x = [torch.randn(3, 10, 8) for _ in range(3)]
    for m, foreign in (("audio", (1, 2)), ("visual", (0,))):
        teacher = Teacher(m, **micro.SIZES).eval()
        other = [torch.randn_like(f) if i in foreign else f for i, f in enumerate(x)]
        assert torch.equal(teacher(*x).probs, teacher(*other).probs)


def test_scales_by_the_layers_of_torch():
    "One layer for both modalities and all scales, each scale by itself"
    net = HCMN(**micro.SIZES).eval()
    x = [torch.randn(3, 10, 8) for _ in range(3)]
    with torch.no_grad():
        e_a, e_v = net.project(*x)
        assert len(net.layers) == 1 and isinstance(net.layers[0], HybridAttention)
        total = [0., 0.]
        for k, (kernel, stride) in enumerate(((1, 1), (3, 2), (5, 5))):
            s = []
            for scales, e in zip(net.scales, (e_a, e_v)):
                y = nn.functional.conv1d(e.mT, scales.convs[k].weight, stride=stride, padding=kernel // 2)
                norm = scales.norms[k]
                y = (y - norm.running_mean[:, None]) / (norm.running_var[:, None] + 1e-5).sqrt() * norm.weight[:, None] + norm.bias[:, None]
                s.append(y.relu().mT)
            h = net.layers[0](s[0], s[1]), net.layers[0](s[1], s[0])
            total = [t + nn.functional.interpolate(y.mT, size=10, mode="nearest").mT for t, y in zip(total, h)]
            level = net.head(*total)
            torch.testing.assert_close(net(*x).extra["levels"][k], level.segments, rtol=1e-4, atol=1e-5)


# ---- the loop

class Scored(ValidateCB):
    "Scores from a table"
    def __init__(self, table, *args):
        super().__init__(VALID, *args)
        self.table = table
    def score(self, learner): return self.table[learner.epoch - 1]


def scores(*rows):
    "Flat scores from (A, V) of each epoch, the same at both levels"
    return [{f"{level}/{k}": v for level in ("segment", "event") for k, v in (("A", a), ("V", b), ("Type@AV", (a + b) / 2))} for a, b in rows]


class Stop(Callback):
    "The power fails"
    order = 200
    def __init__(self, epoch): self.epoch = epoch
    def after_epoch(self, learner):
        if learner.epoch == self.epoch: raise KeyboardInterrupt


class States(Callback):
    "Main networks after each epoch"
    order = 5
    def __init__(self): self.found = []
    def after_epoch(self, learner): self.found.append({k: v.clone() for k, v in learner.model.main.state_dict().items()})


def make(*callbacks, kind=Learner, dual=True, epochs=4, lr=2e-3, rates=RATES["plain"], seed=1, **kw):
    torch.manual_seed(seed)
    model = DHHN(**micro.SIZES, dual=dual, rates=rates, **kw)
    return kind(model, TRAIN, DHHNLoss(), lr=lr, epochs=epochs, step=3, batch_size=16, seed=seed, device="cpu", callbacks=[ByModalityCB(), *callbacks])


def log(learner): return [{k: v for k, v in h.items() if k != "seconds"} for h in learner.history]


TABLE = scores((10., 5.), (20., 50.), (30., 20.), (30., 50.))


def test_each_modality_gets_its_best_epoch():
    states, keep = States(), Scored(TABLE, "ma", "segment/Type@AV")
    learner = make(states, keep).fit()
    assert learner.history[-1]["kept"] == {"audio": 3, "visual": 2} and keep.best_epoch == 4
    assert [h["kept"]["visual"] for h in learner.history] == [1, 2, 2, 2]
    same = lambda net, state: all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert same(learner.model.main, states.found[2]) and same(learner.model.seen, states.found[1]) and learner.model.parted
    p, halves = predict(learner.model, VALID), [predict(n, VALID) for n in (learner.model.main, learner.model.seen)]
    assert np.array_equal(p.audio, halves[0].audio) and np.array_equal(p.visual, halves[1].visual)
    for m in range(2): assert np.array_equal(p.segments[:, :, m], halves[m].segments[:, :, m])
    assert all(np.array_equal(x.segments, p.segments) for x in predict_both(learner.model, VALID))


def test_ties_go_to_the_earlier_epoch():
    flat = scores(*[(40., 40.)] * 3)
    states, keep = States(), Scored(flat, "ma", "segment/Type@AV")
    learner = make(states, keep, epochs=3, dual=False).fit()
    assert keep.best_epoch == 1 and all(torch.equal(v, states.found[0][k]) for k, v in learner.model.main.state_dict().items())
    keep = Scored(scores((40., 40.), (50., 50.), (50., 50.), (50., 50.)), "ma", "segment/Type@AV")
    learner = make(keep).fit()
    assert keep.best_epoch == 2 and learner.history[-1]["kept"] == {"audio": 2, "visual": 2}


@pytest.mark.parametrize("dual, select", [(True, "last"), (False, "segment/Type@AV"), (False, "last")])
def test_one_state_where_there_is_nothing_to_choose(dual, select):
    states, keep = States(), Scored(TABLE, "ma", select)
    learner = make(states, keep, dual=dual).fit()
    assert not learner.model.parted and "kept" not in learner.history[-1]
    assert all(torch.equal(v, states.found[-1][k]) for k, v in learner.model.main.state_dict().items())


def test_it_trains_without_validation():
    learner = make(ValidateCB(None), epochs=6).fit()
    assert sum(learner.history[-1]["loss"].values()) < .9 * sum(learner.history[0]["loss"].values())
    assert not make(epochs=1).fit().model.parted


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_interrupted_run_continues_to_the_last_bit(tmp_path, at):
    def fitted(*more): return make(Scored(TABLE, "ma", "segment/Type@AV"), CheckpointCB(tmp_path / "c.pt", "x"), *more).fit()
    whole = make(Scored(TABLE, "ma", "segment/Type@AV")).fit()
    with pytest.raises(KeyboardInterrupt): fitted(Stop(at))
    again = fitted()
    assert micro.same_weights(whole.model, again.model) and log(again) == log(whole)
    assert [g["scale"] for g in again.opt.param_groups] == [1., 2., .2]
    finished = fitted()
    assert micro.same_weights(whole.model, finished.model)


def test_a_checkpoint_with_states_of_another_network_is_refused(tmp_path):
    path = tmp_path / "c.pt"
    make(Scored(TABLE, "ma", "segment/Type@AV"), CheckpointCB(path, "x")).fit()
    saved = torch.load(path, weights_only=True)
    state = saved["callbacks"]["ByModalityCB"]["states"]["visual"]
    state["head.maps.0.bias"] = state["head.maps.0.bias"][:-1].clone()
    torch.save(saved, path)
    with pytest.raises(InputError, match="best visual state has the shape"): make(Scored(TABLE, "ma", "segment/Type@AV"), CheckpointCB(path, "x")).fit()


def test_three_optimisers_are_one_with_three_rates():
    learner = make(epochs=2, dropout=0.)
    model = make(dropout=0.).model.train()
    nets = [model.main, *model.teachers]
    opts = [torch.optim.Adam(n.parameters(), 2e-3 * s, fused=True) for n, s in zip(nets, (1., 2., .2))]
    from avvp_nb.train.learner import batches
    for epoch in range(2):
        for idx in batches(48, 16, 1, epoch):
            b = TRAIN.batch(idx)
            terms = DHHNLoss()(model(*b.features), b)
            for opt in opts: opt.zero_grad()
            # as the release does: separately, into accumulated gradients
            for group in (("audio", "visual", "video", "distil_audio", "distil_visual", "apart"), ("teacher_audio", "teacher_visual", "teachers_apart")):
                sum(terms[k] for k in group).backward(retain_graph=True)
            for opt in opts: opt.step()
    learner.fit()
    for a, b in zip(learner.model.parameters(), model.parameters()): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_rates_are_logged_for_the_main_network_and_fall_together():
    learner = make().fit()
    assert [h["lr"] for h in learner.history] == pytest.approx([2e-3] * 3 + [2e-4])
    assert [g["lr"] for g in learner.opt.param_groups] == pytest.approx([2e-4, 4e-4, 4e-5])


def test_it_is_not_stacked_and_says_why():
    lanes = [make(kind=Lane, seed=s) for s in (1, 2)]
    assert "several rates" in why_not(lanes[0].model, lanes[0].callbacks) and "batch norm" in why_not(lanes[0].model.main)
    with pytest.raises(InputError, match="several rates"): StackedLearner(lanes)
    a, b = make(kind=Lane, epochs=2).fit(), make(epochs=2).fit()
    assert micro.same_weights(a.model, b.model)


def test_videos_of_different_lengths_are_refused():
    short = replace(TRAIN, lengths=np.arange(48) % 10 + 1)
    with pytest.raises(InputError, match="videos differ in length"):
        Learner(DHHN(**micro.SIZES), short, DHHNLoss(), epochs=1, device="cpu").fit()
    with pytest.raises(InputError, match="videos differ in length"): METHODS["dhhn"].prepare({}, None, short)


def test_a_loss_without_teachers_is_refused():
    with pytest.raises(InputError, match="there are no teachers"): Learner(HCMN(**micro.SIZES), TRAIN, DHHNLoss(), epochs=1, device="cpu").fit()


def test_impossible_networks_are_refused():
    with pytest.raises(InputError, match="8 heads for 12 dimensions"): DHHN(**{**micro.SIZES, "dim": 12})
    with pytest.raises(InputError, match="modality"): Teacher("sound")


# ---- runs

@pytest.fixture
def small(monkeypatch):
    micro.install(monkeypatch.setitem)


def test_the_entry():
    m = METHODS["dhhn"]
    assert (m.faith, m.builds_on, m.year, m.rule, m.rows, m.modalities) == ("code", ("han", "ma"), 2022, "ma", {"dhhn": {}}, "av")
    assert RULES[m.rule].gate == "modality" and method_name("dhhn") == "DHHN"
    plain, refined = (RunSpec("dhhn", protocol=p, scale="full") for p in ("plain", "refined"))
    assert plain.recipe() == RECIPE and refined.recipe() == RECIPE | {"epochs": 5}
    assert [build_dhhn(s.plain(), micro.SIZES)[0].rates for s in (plain, refined)] == [(1., 2., .2), (1., 1., 1.)]
    assert refining(plain) == [] and refining(refined) == [RunSpec("ma", {"refine": "none"}, scale="full")]
    assert build_dhhn(RunSpec("dhhn", {"dual": False}).plain(), micro.SIZES)[0].seen is None


@pytest.mark.parametrize("kw, message", [
    (dict(options={"alias_bug": True}), "alias_bug: no label is removed"), (dict(protocol="refined", labels="clip+clap"), "need no refinement"),
    (dict(options={"refine": "both"}), "dhhn has no such option"), (dict(protocol="official"), "protocol"), (dict(options={"dual": 1.5}), "dual")])
def test_impossible_options_are_refused(kw, message):
    with pytest.raises(InputError, match=message): RunSpec("dhhn", **kw)


def test_runs_are_planned_alone(small):
    specs = [RunSpec("dhhn", scale="micro", seed=s) for s in (1, 2)]
    plan = plan_stacks(specs)
    assert plan.stacks == [] and "several rates" in plan.alone[0][1] and "several rates" in look(specs[0]).reason


def test_refined_labels_come_from_ma_and_are_shared(tmp_path, small):
    record = runs.run(RunSpec("dhhn", {"alias_bug": True}, protocol="refined", scale="micro"), tmp_path, device="cpu", progress="off")
    base = runs.Store(tmp_path).record(record["first"][0])
    assert base["spec"]["method"] == "ma" and base["spec"]["options"]["refine"] == "none"
    assert list(runs.Store(tmp_path).root.glob("products/*"))
    assert set(record["history"][0]["kept"]) == set(MODALITIES)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("die", [2, 3, 5, 7])
def test_a_killed_run_continues_to_the_last_bit(tmp_path, small, die):
    spec = RunSpec("dhhn", scale="micro")
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
    assert model.parted and whole["selection"]["metric"] == "segment/Type@AV"
    assert pd.Series(whole["history"][-1]["kept"]).between(1, 3).all()
    assert isinstance(partial(METHODS["dhhn"].build, whole["spec"])(micro.SIZES)[0], DHHN)
