"""The scorer, the decision rules, the threshold search and the floors, against the official outputs and a second scorer."""
import csv
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import close
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from oracle import score

from avvp_nb.core import CLASSES, InputError, Parsing
from avvp_nb.counts import LEVELS, METRICS, ONLY, STANDARD, count
from avvp_nb.metrics import (
    CMPAE_SELECTED,
    FLOORS,
    RULES,
    Rule,
    average10,
    evaluate,
    evaluate_lanes,
    evaluate_videos,
    flat,
    floors,
    llp_floors,
    modality_prior,
    only_scores,
    select_thresholds,
    unflat,
)

PER_SAMPLE = ["A", "V", "Event@AV", "AV"]                 # column order of the reference cases
PER_SAMPLE_ONLY = ["Ao", "Vo", "Event@AVo", "AV"]
SUMMARY = ["A", "V", "AV", "Type@AV", "Event@AV"]
SUMMARY_ONLY = ["Ao", "Vo", "AV", "Type@AVo", "Event@AVo"]


def summary(scores, columns):
    return scores.loc[["segment", "event"], columns].to_numpy().ravel()


def swap(x):
    return x.transpose(0, 2, 1)                           # the references are (N,C,T)


# --- the official implementations


def check_case(case, arrays, prefix=""):
    videos, scores = evaluate_videos(*arrays), evaluate(*arrays)
    for level in LEVELS:
        close(case, f"{prefix}{level}", videos[level][PER_SAMPLE])
        close(case, f"{prefix}coleaf_{level}", videos[level][PER_SAMPLE_ONLY])
    close(case, f"{prefix}summary", summary(scores, SUMMARY))
    close(case, f"{prefix}coleaf_summary", summary(scores, SUMMARY_ONLY))


def test_reference_pairs(golden):
    case = golden("metrics_pairs")
    check_case(case, [swap(case[k]) for k in ("pred_a", "pred_v", "gt_a", "gt_v")])


@pytest.mark.parametrize("prefix", ["", "common_"])
def test_reference_llp_test_set(golden, prefix):
    case = golden("metrics_llp_test")
    grids = [np.unpackbits(case[k], axis=1)[:, :500].reshape(-1, 2, 25, 10).transpose(1, 0, 3, 2)
             for k in ("pred_packed", f"{prefix}gt_packed")]
    check_case(case, [*grids[0], *grids[1]], prefix)


@pytest.mark.parametrize("rule", ["han", "ma", "jomold", "coleaf"])
def test_reference_rules(golden, rule):
    case = golden("eval_rules")
    parsing = Parsing(case["global_prob"], case["a_prob"], case["v_prob"], case["frame_prob"])
    for second in (None, parsing):                        # both official passes return the same values in this case
        pred = RULES[rule].decide(parsing, second)
        close(case, f"pred_a_{rule}", swap(pred[0]))
        close(case, f"pred_v_{rule}", swap(pred[1]))
    close(case, f"summary_{rule}", summary(evaluate(*pred, swap(case["gt_a"]), swap(case["gt_v"])), SUMMARY))


def cmpae_passes(case):
    return [Parsing(case[f"a_prob_{k}"], case[f"a_prob_{k}"], case[f"v_prob_{k}"], case[f"frame_prob_{k}"])
            for k in ("ca", "noca")]


@pytest.mark.parametrize("name", ["default", "thresholds"])
def test_reference_cmpae_rule(golden, name):
    case = golden("cmpae_eval")
    rule = RULES["cmpae"] if name == "default" else RULES["cmpae"].with_(visual_gate=case["visual_thresholds"])
    pred = rule.decide(*cmpae_passes(case))
    close(case, f"pred_a_{name}", swap(pred[0]))
    close(case, f"pred_v_{name}", swap(pred[1]))
    close(case, f"summary_{name}", summary(evaluate(*pred, swap(case["gt_a"]), swap(case["gt_v"])), SUMMARY))


def test_reference_threshold_search(golden):
    case = golden("cmpae_eval")
    ca, noca = cmpae_passes(case)
    search = select_thresholds(ca, swap(case["gt_a"]), swap(case["gt_v"]), without=noca)
    close(case, "selection_curve_visual_event", search.curve)
    close(case, "selected_thresholds", search.thresholds)
    assert list(search.curve.columns) == case.info["options"]["candidates"]
    assert search.rule.visual_gate == tuple(case["selected_thresholds"])
    assert len(CMPAE_SELECTED) == len(CLASSES) and set(CMPAE_SELECTED) <= set(search.curve.columns)


# --- worked by hand


def strip(**intervals):
    x = np.zeros((1, 10, 3), np.uint8)
    for name, pairs in intervals.items():
        for start, stop in pairs:
            x[0, start:stop, int(name[1:])] = 1
    return x


PRED = strip(c0=[(0, 3), (5, 6)], c2=[(9, 10)]), strip(c0=[(2, 7)])
TRUE = strip(c0=[(0, 4)], c1=[(2, 6)]), strip(c0=[(2, 6)])
BY_HAND = {"A": (.25, 2/9), "V": (8/9, 1), "AV": (.5, 2/3), "Event@AV": (14/51, .8/3), "Ao": (1/3, 1/3), "Vo": (.4, 0),
           "Event@AVo": (2/9, .4/3)}


@pytest.mark.parametrize("metric", BY_HAND)
def test_strip_by_hand(metric):
    np.testing.assert_allclose(evaluate(*PRED, *TRUE)[metric], 100*np.array(BY_HAND[metric]), rtol=1e-12)


def test_types_of_the_strip_are_means():
    s = evaluate(*PRED, *TRUE)
    np.testing.assert_allclose(s["Type@AV"], s[["A", "V", "AV"]].mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(s["Type@AVo"], s[["Ao", "Vo", "AV"]].mean(axis=1), rtol=1e-12)
    assert s.loc["segment", ["Type@AV", "Type@AVo"]].round(4).tolist() == [54.6296, 41.1111]


def test_nothing_and_nothing_is_one():
    x = strip()
    assert (evaluate(x, x, x, x) == 100).all(axis=None)


def test_heard_only_but_predicted_in_both():
    on, off = strip(c0=[(0, 10)]), strip()
    s = evaluate(on, on, on, off)
    for level in LEVELS:
        assert s.loc[level, ["A", "V", "AV", "Ao", "Vo", "Event@AVo"]].tolist() == [100, 0, 0, 0, 100, 0]
        assert s.loc[level, "Event@AV"] == pytest.approx(200/3)


@pytest.mark.parametrize("pred, true, hits", [((0, 1), (0, 2), 1), ((0, 2), (1, 3), 0), ((0, 4), (2, 4), 1), ((0, 5), (3, 5), 0)])
def test_half_is_enough(pred, true, hits):
    off = strip()
    assert evaluate(strip(c0=[pred]), off, strip(c0=[true]), off).loc["event", "A"] == 100*hits


@pytest.mark.parametrize("iou, hits", [(.5, 1), (.7, 1), (.71, 0), (1, 0)])
def test_other_iou_thresholds_are_inclusive_too(iou, hits):
    off = strip()
    assert evaluate(strip(c0=[(0, 7)]), off, strip(c0=[(0, 10)]), off, iou=iou).loc["event", "A"] == 100*hits


def test_micro_pools_all_events_of_a_video():
    s = evaluate(*PRED, *TRUE, event_average="micro")
    assert s["Event@AV"].tolist() == pytest.approx([100*2*7/22, 100*2*2/7])
    assert s["Event@AVo"].tolist() == pytest.approx([100*2*3/(3 + 6 + 3 + 2), 100*2*1/(2 + 2 + 2 + 1)])
    assert s.drop(columns=["Event@AV", "Event@AVo"]).equals(evaluate(*PRED, *TRUE).drop(columns=["Event@AV", "Event@AVo"]))


# --- properties, on random videos of any length and number of classes


@st.composite
def videos(draw, max_t=12):
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, max_t), st.integers(1, 4)))
    grid = lambda: draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 1)))
    return [grid() for _ in range(4)]


def same(a, b):
    np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=0, atol=1e-11)


@settings(deadline=None)
@given(videos())
def test_equals_the_loops(x):
    ours = evaluate_videos(*x)
    for level in LEVELS:
        same(ours[level], pd.DataFrame([v[level] for v in score(*x)])[list(METRICS)])


# --- many runs at once


def lanes_and_truth(R, n, t, c, density, seed=0):
    "Predictions (2,R,N,T,C), truth (2,N,T,C) and a mask (N,T)"
    rng = np.random.default_rng(seed)
    return rng.random((2, R, n, t, c)) < density, rng.random((2, n, t, c)) < density, np.arange(t) < rng.integers(1, t + 1, (n, 1))


def check_lanes(preds, truth, **kw):
    "Equal to `evaluate` lane by lane, to the last bit, however the arrays come"
    single = [evaluate(*p, *truth, **kw) for p in preds.swapaxes(0, 1)]
    tensors = torch.from_numpy(preds)
    for p, t in ((preds, truth), (tensors, truth), (tensors.byte(), torch.from_numpy(truth)), (tensors.mT.contiguous().mT, truth)):
        tables = evaluate_lanes(*p, *t, **kw)
        assert [x.to_numpy().tobytes() for x in tables] == [x.to_numpy().tobytes() for x in single]
        assert all(x.equals(y) for x, y in zip(tables, single, strict=True))


@pytest.mark.parametrize("R", [1, 5])
@pytest.mark.parametrize("n, t, c, density", [(1, 1, 1, .5), (30, 9, 7, .1), (30, 9, 7, .9), (12, 17, 3, .5), (9001, 2, 1, .5), (649, 10, 25, .02),
                                              (20, 10, 25, 0), (20, 10, 25, 1), (3, 300, 2, .5)])
def test_lanes_are_scored_like_single_runs(R, n, t, c, density):
    preds, truth, mask = lanes_and_truth(R, n, t, c, density)
    for kw in ({}, {"mask": mask}, {"iou": .7}, {"event_average": "micro"}, {"mask": mask.astype(np.uint8), "iou": 1, "event_average": "micro"}):
        check_lanes(preds, truth, **kw)


def test_lanes_may_be_empty_full_or_anything():
    preds, truth, mask = lanes_and_truth(5, 20, 7, 3, .4)
    preds[:, 1], preds[:, 2], preds[0, 3], preds[1, 4] = 0, 1, 0, 1
    for t in (truth, 0*truth, truth | True): check_lanes(preds, t, mask=mask)
    off = evaluate_lanes(*torch.zeros(2, 2, 3, 4, 5, dtype=torch.bool), *np.zeros((2, 3, 4, 5)))
    assert all((table == 100).all(axis=None) for table in off)


@settings(deadline=None)
@given(videos(), st.data())
def test_lanes_of_any_videos(x, data):
    other = [data.draw(hnp.arrays(np.uint8, x[0].shape, elements=st.integers(0, 1))) for _ in range(2)]
    check_lanes(np.stack([x[:2], other], 1).astype(bool), np.stack(x[2:]).astype(bool))


def test_tensors_are_counted_like_arrays_and_reproducibly():
    preds, truth, _ = lanes_and_truth(1, 40, 11, 5, .4)
    arrays = [x.astype(np.uint8) for x in (*preds[:, 0], *truth)]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours = count(*map(torch.from_numpy, arrays))
    finally: torch.use_deterministic_algorithms(False)
    for a, b in zip(ours, count(*arrays), strict=True):
        assert type(a) is type(b) and np.asarray(a).dtype == np.asarray(b).dtype and np.array_equal(a, b)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_lanes_are_scored_and_decided_on_a_gpu():
    preds, truth, mask = lanes_and_truth(5, 649, 10, 25, .05)
    single = [evaluate(*p, *truth, mask=mask) for p in preds.swapaxes(0, 1)]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for t in (truth, torch.from_numpy(truth).cuda()):
            assert all(x.equals(y) for x, y in zip(evaluate_lanes(*torch.from_numpy(preds).cuda(), *t, mask=mask), single, strict=True))
    finally: torch.use_deterministic_algorithms(False)
    passes = lane_passes()
    for rule in RULES.values():
        for x, y in zip(rule.decide_lanes(*(p.map(torch.Tensor.cuda) for p in passes)), rule.decide_lanes(*passes)): assert torch.equal(x.cpu(), y)


GRID = np.zeros((2, 3, 4, 5), np.uint8)       # (R,N,T,C)


@pytest.mark.parametrize("change, message", [
    (dict(pred_audio=GRID[0]), r"pred_audio: has shape \(3, 4, 5\). expected \(R, N, T, C\)"), (dict(pred_audio=GRID[:, :0]), "pred_audio: has shape"),
    (dict(pred_visual=GRID[:1]), r"pred_visual: has shape \(1, 3, 4, 5\). expected \(2, 3, 4, 5\)"), (dict(pred_visual=GRID*1.), "pred_visual: holds values of type float64"),
    (dict(pred_audio=torch.zeros(2, 3, 4, 5)), "pred_audio: holds values of type torch.float32"), (dict(true_visual=None), "true_visual: is None"),
    (dict(true_audio=GRID[0, :2]), r"true_audio: has shape \(2, 4, 5\)"), (dict(true_visual=GRID[0] + .5), "true_visual: video 0 holds 0.5"),
    (dict(mask=np.ones((3, 5))), "mask: has shape"), (dict(iou=.3), "iou: 0.3"), (dict(event_average="mean"), "event_average: 'mean'"),
    (dict(pred_visual=np.where(np.arange(3)[:, None, None] == 2, np.arange(2).reshape(2, 1, 1, 1)*7, GRID).astype(np.uint8)),
     "pred_visual: video 2 of run 1 holds 7. expected only 0 and 1")])
def test_bad_lanes_are_refused(change, message):
    good = dict(pred_audio=GRID, pred_visual=GRID, true_audio=GRID[0], true_visual=GRID[0])
    with pytest.raises(InputError, match=message): evaluate_lanes(**{**good, **change})


@pytest.mark.parametrize("n, t, c", [(60, 10, 25), (3, 60, 100), (5, 1, 1), (4, 64, 2), (3, 130, 3)])
@pytest.mark.parametrize("density", [.02, .5, .98])
def test_equals_the_loops_at_other_sizes(n, t, c, density):
    rng = np.random.default_rng(t)
    x = [(rng.random((n, t, c)) < density) & (rng.random((n, 1, c)) < .3) for _ in range(4)]
    ours = evaluate_videos(*x)
    for level in LEVELS:
        same(ours[level], pd.DataFrame([v[level] for v in score(*x)])[list(METRICS)])


@settings(deadline=None)
@given(videos())
def test_a_perfect_prediction_scores_one(x):
    assert (evaluate(*x[:2], *x[:2]) == 100).all(axis=None)


@settings(deadline=None)
@given(videos(), st.randoms())
def test_order_of_classes_and_videos_is_irrelevant(x, random):
    n, _, c = x[0].shape
    classes, order = random.sample(range(c), c), random.sample(range(n), n)
    same(evaluate(*[y[..., classes] for y in x]), evaluate(*x))
    same(evaluate_videos(*[y[order] for y in x]), evaluate_videos(*x).iloc[order])


@settings(deadline=None)
@given(videos())
def test_exchanging_the_modalities_exchanges_their_columns(x):
    pa, pv, ta, tv = x
    swapped = evaluate(pv, pa, tv, ta).rename(columns={"A": "V", "V": "A", "Ao": "Vo", "Vo": "Ao"})
    same(swapped[list(METRICS)], evaluate(*x))


@settings(deadline=None)
@given(videos())
def test_reversed_time_scores_the_same(x):
    same(evaluate(*[y[:, ::-1] for y in x]), evaluate(*x))


@settings(deadline=None)
@given(videos())
def test_exchanging_prediction_and_truth_scores_the_same(x):
    same(evaluate(*x[2:], *x[:2]), evaluate(*x))


@settings(deadline=None)
@given(videos())
def test_videos_do_not_influence_each_other(x):
    whole = evaluate_videos(*x)
    same(pd.concat([evaluate_videos(*[y[[i]] for y in x]) for i in range(len(x[0]))]), whole)
    same(evaluate(*x), 100*whole.mean().unstack("level").T.loc[list(LEVELS), list(METRICS)])


@settings(deadline=None)
@given(videos(), st.data())
def test_padding_is_ignored(x, data):
    n, t, c = x[0].shape
    lengths = np.array(data.draw(st.lists(st.integers(1, t), min_size=n, max_size=n)))
    mask = np.arange(t) < lengths[:, None]
    alone = pd.concat([evaluate_videos(*[y[[i], :k] for y in x]) for i, k in enumerate(lengths)])
    same(evaluate_videos(*x, mask=mask), alone)
    same(evaluate_videos(*x, mask=torch.tensor(mask)), alone)


@settings(deadline=None)
@given(videos())
def test_av_does_not_depend_on_the_family(x):
    both = only_scores(*x, empty="one")
    same(both["AV"], evaluate(*x)["AV"])
    pa, pv, ta, tv = x
    same(both["AV"], evaluate(pa*pv, 0*pa, ta*tv, 0*ta)["A"])


@settings(deadline=None)
@given(videos())
def test_any_kind_of_array(x):
    expected = evaluate(*x)
    for f in (lambda y: y.astype(bool), lambda y: y.astype(np.float64), lambda y: y.astype(np.int64), torch.tensor,
              lambda y: torch.tensor(y).bool(), lambda y: torch.tensor(y).to(torch.bfloat16).requires_grad_(),
              lambda y: y.tolist(), lambda y: np.asfortranarray(y)):
        assert evaluate(*map(f, x)).equals(expected)


def test_inputs_are_left_alone():
    x = [np.random.default_rng(0).integers(0, 2, (3, 10, 2)).astype(np.uint8) for _ in range(4)]
    before = [y.copy() for y in x]
    evaluate(*x, mask=np.ones((3, 10)))
    floors(x[0][:, 0], x[2], x[3])
    assert all((a == b).all() for a, b in zip(x, before))


def test_form_of_the_answers():
    s, v = evaluate(*PRED, *TRUE), evaluate_videos(*PRED, *TRUE, ids=["a"])
    assert list(s.index) == list(LEVELS) and list(s.columns) == list(METRICS)
    assert v.index.tolist() == ["a"] and v.columns.names == ["level", "metric"] and v.shape == (1, 18)
    assert v["segment"]["A"].item() == .25
    assert flat(s)["event/Event@AVo"] == s.loc["event", "Event@AVo"] and len(flat(s)) == 18
    assert unflat(flat(s)).equals(s)
    assert average10(s) == pytest.approx(summary(s, list(STANDARD)).mean())
    assert average10(s, "only") == pytest.approx(summary(s, list(ONLY)).mean())


# --- bad input

X = np.zeros((3, 10, 2), np.uint8)


def put(value, dtype=float):
    x = X.astype(dtype)
    x[1, 2, 0] = value
    return x


@pytest.mark.parametrize("where, bad, message", [
    ("pred_audio", put(.7), "pred_audio: video 1 holds 0.7. expected only 0 and 1. turn probabilities into decisions"),
    ("pred_visual", put(np.nan), "pred_visual: video 1 holds nan"),
    ("true_audio", put(2, int), "true_audio: video 1 holds 2. expected only 0 and 1"),
    ("true_visual", put(255, np.uint8), "true_visual: video 1 holds 255"),
    ("true_visual", put(-1, np.int8), "true_visual: video 1 holds -1"),
    ("pred_visual", torch.tensor(put(np.inf)), "pred_visual: video 1 holds inf"),
    ("pred_audio", X.astype(str), "pred_audio: holds values of type <U"),
    ("pred_audio", X[0], r"has shape \(10, 2\). expected \(N,T,C\).*x\[None\]"),
    ("pred_audio", X[:0], r"has shape \(0, 10, 2\)"),
    ("pred_visual", X[:2], r"pred_visual: has shape \(2, 10, 2\). expected \(3, 10, 2\)"),
    ("true_audio", X.transpose(0, 2, 1), r"true_audio: has shape \(3, 2, 10\).*transpose\(0, 2, 1\)"),
    ("true_audio", None, "true_audio: is None. a training split"),
])
@pytest.mark.parametrize("f", [evaluate, evaluate_videos, only_scores])
def test_bad_arrays_are_refused(f, where, bad, message):
    arguments = dict.fromkeys(("pred_audio", "pred_visual", "true_audio", "true_visual"), X) | {where: bad}
    with pytest.raises(InputError, match=message):
        f(**arguments)


@pytest.mark.parametrize("options, message", [
    ({"iou": .4}, "iou: 0.4 is not possible.*match two annotated ones"),
    ({"iou": float("nan")}, "iou: nan is not possible"),
    ({"event_average": "macros"}, "did you mean 'macro'"),
    ({"mask": np.ones((3, 9))}, r"mask: has shape \(3, 9\). expected \(N,T\) = \(3, 10\)"),
    ({"mask": put(3)[..., 0]}, "mask: video 1 holds 3"),
    ({"mask": X[..., 0]}, "mask: video 0 has no segment"),
    ({"mask": np.array([[1]*10, [1]*10, [1] + [0]*8 + [1]])}, "mask: video 2 has no segment, or one after its padding"),
])
def test_bad_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        evaluate(X, X, X, X, **options)


def test_bad_names_are_refused():
    with pytest.raises(InputError, match="ids: holds 2 names"):
        evaluate_videos(X, X, X, X, ids=["a", "b"])
    with pytest.raises(InputError, match="one of 'standard', 'only'"):
        average10(evaluate(X, X, X, X), "both")
    with pytest.raises(InputError, match="metric: 'segment/B' is not possible"):
        unflat({"segment/B": 1})
    with pytest.raises(InputError, match="one of 'one', 'skip', 'pooled'"):
        only_scores(X, X, X, X, empty="none")
    with pytest.raises(InputError, match="one of 'val', 'test'"):
        llp_floors("train")


# --- rules


def parsing(video=.6, audio=.6, visual=.6, segments=.6, shape=(1, 4, 2), dtype=np.float32):
    n, t, c = shape
    return Parsing(*(np.full((n, c), v, dtype) for v in (video, audio, visual)), np.full((n, t, 2, c), segments, dtype))


def decided(rule, *passes):
    return [int(x.sum()) for x in rule.decide(*passes)]


def test_han_gates_both_modalities_with_one_probability():
    assert decided(RULES["han"], parsing(video=.6, audio=.1, visual=.1)) == [8, 8]
    assert decided(RULES["han"], parsing(video=.4, audio=.9, visual=.9)) == [0, 0]


@pytest.mark.parametrize("name", ["ma", "jomold", "cmpae", "coleaf"])
def test_the_others_gate_each_modality_by_itself(name):
    assert decided(RULES[name], parsing(video=0, audio=.6, visual=.4)) == [8, 0]
    assert decided(RULES[name], parsing(video=0, audio=.4, visual=.6)) == [0, 8]


@pytest.mark.parametrize("name, segment, gate", [("han", .5, .5), ("ma", .5, .5), ("jomold", .5, .5), ("cmpae", .25, .45),
                                                 ("coleaf", .25, .52)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_thresholds_are_inclusive(name, segment, gate, dtype):
    below = lambda x: x - 1e-6
    assert decided(RULES[name], parsing(gate, gate, gate, segment, dtype=dtype)) == [8, 8]
    assert decided(RULES[name], parsing(*[below(gate)]*3, segment, dtype=dtype)) == [0, 0]
    assert decided(RULES[name], parsing(gate, gate, gate, below(segment), dtype=dtype)) == [0, 0]


def test_per_class_thresholds_tie_like_a_single_one():
    assert decided(RULES["cmpae"].with_(visual_gate=[.45, .45]), parsing(visual=.45)) == [8, 8]
    assert decided(RULES["cmpae"].with_(audio_gate=torch.tensor([.3, .7]), visual_gate=(.7, .9)), parsing()) == [4, 0]


def test_two_passes_are_fused_only_by_rules_that_fuse():
    first, second = parsing(audio=.7, visual=.7), parsing(audio=.1, visual=0.)
    assert decided(RULES["coleaf"], first, second) == [8, 0]           # .7*.7 + .3*.1 = .52 and .49
    assert decided(RULES["coleaf"], first) == [8, 8]
    assert decided(RULES["jomold"], first, second) == [8, 8]


def test_a_video_probability_may_exceed_one_but_no_other():
    assert decided(RULES["han"], parsing(video=1.9)) == [8, 8]     # attentive pooling over two axes is bounded by M = 2
    for bad in ({"video": 2.1}, {"audio": 1.1}, {"visual": 1.1}, {"segments": 1.1}, {"segments": -.1}):
        with pytest.raises(InputError, match=f"{next(iter(bad))} of video 0 holds .* expected probabilities in"):
            RULES["han"].decide(parsing(**bad))


def test_torch_and_numpy_decide_alike():
    rng = np.random.default_rng(0)
    p = Parsing(*rng.random((3, 5, 7)), rng.random((5, 9, 2, 7)))
    for rule in RULES.values():
        for x, y in zip(rule.decide(p), rule.decide(p.map(torch.tensor))):
            assert x.dtype == np.uint8 and x.shape == (5, 9, 7) and (x == y).all()


def lane_passes(R=3, shape=(6, 9, 7), seed=0):
    "Two passes of R networks, with many probabilities that are exactly a threshold"
    (n, t, c), rng = shape, np.random.default_rng(seed)
    def x(*s): return torch.from_numpy((rng.integers(0, 101, s)/np.float32(100)).astype(np.float32))
    return [Parsing(*(x(R, n, c) for _ in range(3)), x(R, n, t, 2, c)) for _ in range(2)]


@pytest.mark.parametrize("rule", [*RULES.values(), RULES["cmpae"].with_(visual_gate=(.1, .3, .45, .5, .52, .7, .9)), RULES["ma"].with_(fuse=.5, segment=0)])
def test_lanes_are_decided_like_single_runs(rule):
    passes = lane_passes()
    for those in (passes, passes[:1]):
        *on, possible = rule.decide_lanes(*those)
        assert possible.tolist() == [True]*3 and all(x.dtype == torch.bool for x in on)
        for r in range(3):
            for x, y in zip(on, rule.decide(*(p[r] for p in those))): assert np.array_equal(x[r].numpy(), y)


@pytest.mark.parametrize("value", [np.nan, np.inf, -.1, 1.1, 2.1, -5e-5, 1.00005])
@pytest.mark.parametrize("name", ["video", "audio", "visual", "segments"])
@pytest.mark.parametrize("second", [False, True])
def test_impossible_probabilities_are_those_of_their_lane(value, name, second):
    passes = lane_passes()
    getattr(passes[second], name)[1, 2] = value
    def refuses(rule, r):
        try: rule.decide(*(p[r] for p in passes))
        except InputError: return True
        return False
    for rule in (RULES["ma"], RULES["cmpae"]):
        *on, possible = rule.decide_lanes(*passes)
        assert possible.tolist() == [not refuses(rule, r) for r in range(3)]
        for r in (0, 2):
            for x, y in zip(on, rule.decide(*(p[r] for p in passes))): assert np.array_equal(x[r].numpy(), y)


def test_lanes_with_wrong_thresholds_or_passes_are_refused():
    first, _ = lane_passes()
    with pytest.raises(InputError, match="visual_gate: holds 25 thresholds. expected one, or 7"): RULES["ma"].with_(visual_gate=CMPAE_SELECTED).decide_lanes(first)
    with pytest.raises(InputError, match=r"without: segments has shape \(3, 2, 9, 2, 7\). expected \(3, 6, 9, 2, 7\)"):
        RULES["cmpae"].decide_lanes(first, lane_passes(shape=(2, 9, 7))[1])


def test_rules_are_values():
    rule = RULES["cmpae"].with_(visual_gate=np.array(CMPAE_SELECTED), name="selected")
    assert rule == RULES["cmpae"].with_(visual_gate=CMPAE_SELECTED, name="selected") and hash(rule) is not None
    assert rule != RULES["cmpae"] and RULES["cmpae"].visual_gate == .45
    assert RULES["ma"].with_(segment=.4).name == "ma*"
    assert list(RULES.table().index) == ["han", "ma", "jomold", "cmpae", "coleaf", "nrep", "mmcse", "leap"]
    assert "0.3…0.7 (25 classes)" in type(RULES)(selected=rule)._repr_html_()


@pytest.mark.parametrize("f, message", [
    (lambda: RULES["jomuld"], "did you mean 'jomold'"),
    (lambda: Rule("x", gate="audio"), "gate: 'audio' is not possible"),
    (lambda: Rule("x", segment=-.1), "segment: -0.1 is not possible"),
    (lambda: Rule("x", audio_gate=[.5, 2]), r"audio_gate: \[0.5, 2\] is not possible"),
    (lambda: Rule("x", fuse=(.5, .5)), "fuse: "),
    (lambda: RULES["ma"].with_(segments=.4), "did you mean 'segment'"),
    (lambda: RULES["ma"].with_(visual_gate=CMPAE_SELECTED).decide(parsing()), "visual_gate: holds 25 thresholds. expected one, or 2"),
    (lambda: RULES["ma"].decide(parsing(segments=np.nan)), "parsing: segments of video 0 holds nan"),
    (lambda: RULES["ma"].decide(parsing(audio=3.5)), "parsing: audio of video 0 holds 3.5.*sigmoid"),
    (lambda: RULES["ma"].decide(Parsing(*np.zeros((3, 2)), np.zeros((4, 2, 2)))), "video has shape|segments has shape"),
    (lambda: RULES["cmpae"].decide(parsing(), parsing(shape=(2, 4, 2))), r"without: segments has shape \(2, 4, 2, 2\)"),
    (lambda: RULES["cmpae"].decide(parsing(), parsing(visual=7)), "without: visual of video 0 holds 7"),
])
def test_bad_rules_and_parsings_are_refused(f, message):
    with pytest.raises(InputError, match=message):
        f()


# --- threshold search


@pytest.mark.parametrize("modality, level, rule", [("visual", "event", "cmpae"), ("audio", "segment", "ma"), ("visual", "segment", "han")])
def test_threshold_search_equals_trying_everything(modality, level, rule):
    rng, rule, candidates = np.random.default_rng(5), RULES[rule], (.6, .3, .45)
    p = Parsing(*rng.random((3, 12, 3)), rng.random((12, 6, 2, 3)))
    true = (rng.random((2, 12, 1, 3)) < .4) & (rng.random((2, 12, 6, 3)) < .7)
    gate, column = f"{modality}_gate", {"audio": "A", "visual": "V"}[modality]
    search = select_thresholds(p, *true, candidates, rule=rule, modality=modality, level=level)
    assert list(search.curve.columns) == sorted(candidates)
    for c in range(3):
        for k in candidates:
            gates = np.full(3, getattr(rule, gate))
            gates[c] = k
            expected = evaluate(*rule.with_(**{gate: gates}).decide(p), *true).loc[level, column]
            assert search.curve.loc[c, k] == pytest.approx(expected, abs=1e-9)
        best = search.curve.loc[c].round(9)
        assert search.thresholds[c] == max(k for k in candidates if best[k] == best.max())
    assert getattr(search.rule, gate) == tuple(search.thresholds)


def test_threshold_ties_go_to_the_higher_candidate():
    p, off = parsing(visual=0.), np.zeros((1, 4, 2), int)
    assert select_thresholds(p, off, off).thresholds.tolist() == [.7, .7]


@pytest.mark.parametrize("options, message", [({"modality": "video"}, "one of 'audio', 'visual'"), ({"level": "video"}, "one of 'segment', 'event'")])
def test_bad_searches_are_refused(options, message):
    off = np.zeros((1, 4, 2), int)
    with pytest.raises(InputError, match=message):
        select_thresholds(parsing(), off, off, **options)
    with pytest.raises(InputError, match="true_audio: has shape"):
        select_thresholds(parsing(), off[:, :3], off)


# --- floors and corrected scores


def read_split(folder, name):
    "Weak labels and dense grids of a split, read with nothing but the csv module"
    def rows(file):
        with open(folder / file, newline="") as f:
            return list(csv.reader(f, delimiter="\t"))[1:]
    weak_rows = rows(f"AVVP_{name}_pd.csv")
    at = {r[0]: i for i, r in enumerate(weak_rows)}
    weak = np.array([[c in r[1].split(",") for c in CLASSES] for r in weak_rows])
    grids = np.zeros((2, len(at), 10, 25), np.uint8)
    for m, table in enumerate(("audio", "visual")):
        for video, onset, offset, label in rows(f"AVVP_eval_{table}.csv"):
            if video in at:
                grids[m, at[video], int(onset):int(offset), CLASSES.index(label)] = 1
    return weak, *grids


@pytest.fixture(scope="module")
def real_floors(llp):
    splits = {k: read_split(llp, k) for k in ("val", "test")}
    prior = modality_prior(*splits["val"])
    return {k: floors(*x, prior=prior) for k, x in splits.items()}


NAMES = {"nothing": "nothing", "true segments": "true segments",
         "true weak label, all 10 s, audio only": "weak label, audio only",
         "true weak label, all 10 s, visual only": "weak label, visual only",
         "true weak label, all 10 s, both modalities": "weak label, both modalities",
         "true weak label, all 10 s, modality kept if P(modality|label)>=0.5 on val": "weak label, likely modalities",
         "true video-level modality label, all 10 s": "true video-level label per modality",
         "true segments, restricted to weak label": "true segments within weak label"}


def test_floors_of_the_real_data(real_floors, llp_stats):
    table = pd.read_csv(llp_stats / "trivial_predictors.csv")
    assert set(NAMES.values()) == set(FLOORS) and set(table.predictor) == set(NAMES)
    ours = [real_floors[r.split].loc[(NAMES[r.predictor], r.level), r.metric] for r in table.itertuples()]
    np.testing.assert_allclose(ours, table.f_score, rtol=0, atol=.005 + 1e-9)      # printed with two decimals


@pytest.mark.parametrize("split", ["val", "test"])
def test_packaged_floors_are_those_of_the_real_data(real_floors, split):
    packaged = llp_floors(split)
    assert packaged.index.equals(real_floors[split].index)
    np.testing.assert_allclose(packaged, real_floors[split], rtol=0, atol=5.1e-5)   # stored with four decimals


def test_floors_on_other_sizes():
    rng = np.random.default_rng(0)
    true = [rng.random((6, 17, 4)) < .3 for _ in range(2)]
    weak, mask = (true[0] | true[1]).any(1), np.arange(17) < rng.integers(3, 18, (6, 1))
    table = floors(torch.tensor(weak), *true, mask=mask)
    assert table.index.names == ["predictor", "level"] and list(table.index.unique("predictor")) == list(FLOORS)
    assert (table.loc["true segments"] == 100).all(axis=None)
    same(table.loc["nothing"], evaluate(0*true[0], 0*true[0], *true, mask=mask))
    with pytest.raises(InputError, match=r"weak: has shape \(5, 4\). expected \(N,C\) = \(6, 4\)"):
        floors(weak[:5], *true)
    with pytest.raises(InputError, match="weak: video 0 holds 0.95. expected only 0 and 1$"):
        floors(weak*.9 + .05, *true)


def test_the_prior_decides_which_modalities_are_likely():
    true = np.ones((2, 3, 4, 2), np.uint8)
    weak = np.ones((3, 2))
    assert modality_prior(weak, *true).tolist() == [[1, 1], [1, 1]]
    assert modality_prior(0*weak, *true).tolist() == [[1, 1], [1, 1]]      # unknown classes are kept
    audio, visual = FLOORS["weak label, likely modalities"](weak.astype(np.uint8), *true, [[.5, .4], [.1, 1]])
    assert audio[0, 0].tolist() == [1, 0] and visual[0, 0].tolist() == [0, 1]


def test_corrected_only_scores():
    off = strip()
    seen = np.concatenate([strip(c1=[(3, 6)]), off, off, off])
    off, alarm = np.zeros_like(seen), strip(c1=[(3, 6)]).repeat(4, 0)
    vo = lambda pred, empty: only_scores(off, pred, off, seen, empty=empty).loc["segment", "Vo"]
    assert [vo(off, k) for k in ("one", "skip", "pooled")] == [75, 0, 0]
    assert [vo(alarm, k) for k in ("one", "skip", "pooled")] == pytest.approx([25, 100, 40])
    assert only_scores(off, alarm, off, seen, empty="skip")[["Ao", "AV", "Type@AVo"]].isna().all(axis=None)
    assert only_scores(off, alarm, off, seen, empty="pooled").loc["event", "Event@AVo"] == pytest.approx(40)


@settings(deadline=None)
@given(videos())
def test_only_scores_by_definition(x):
    per_video, pa, pv, ta, tv = evaluate_videos(*x), *x
    has = {"Ao": (ta > tv).any((1, 2)), "Vo": (tv > ta).any((1, 2)), "AV": (ta & tv).any((1, 2)), "Event@AVo": (ta != tv).any((1, 2))}
    skip, pooled = only_scores(*x, empty="skip"), only_scores(*x, empty="pooled")
    assert list(skip.columns) == list(pooled.columns) == list(ONLY)
    same(only_scores(*x, empty="one"), evaluate(*x)[list(ONLY)])
    for level in LEVELS:
        for k, rows in has.items():
            same(skip.loc[level, k], 100*per_video[level][k][rows].mean())
        same(skip.loc[level, "Type@AVo"], skip.loc[level, ["Ao", "Vo", "AV"]].to_numpy().mean())
    p, g = pa > pv, ta > tv
    same(pooled.loc["segment", "Ao"], 200*(p & g).sum()/(p.sum() + g.sum()) if (p | g).any() else np.nan)


def test_only_numpy_and_pandas_are_imported():
    code = "import sys, avvp_nb.metrics; print(*[m for m in ('torch', 'matplotlib', 'fastcore', 'nbdev') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ""
