"""Rates by event type: against plain Python, on padded videos, and what the printed ones can and cannot be."""
import math

import micro
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avvp_nb import runs
from avvp_nb.core import InputError
from avvp_nb.data.annotations import load_annotations
from avvp_nb.methods.zoo import METHODS
from avvp_nb.metrics import RULES, evaluate
from avvp_nb.results.rates import (
    AVERAGES,
    EVENTS,
    RATES,
    cell_counts,
    context_rates,
    doubtful_rates,
    event_counts,
    event_grids,
    event_rates,
    explained_sums,
    plot_printed_rates,
    printed_rates,
    printed_recall,
    rates_table,
    without_event,
)


def arrays(seed, n=5, t=4, c=3, p=.4):
    rng = np.random.default_rng(seed)
    return [(rng.random((n, t, c)) < p).astype(np.uint8) for _ in range(4)]


def kind(a, v): return {(1, 0): "A", (0, 1): "V", (1, 1): "AV"}.get((int(a), int(v)))


def by_hand(pa, pv, ta, tv, lengths):
    "Counts {event: {rate: [number of each video]}} cell by cell"
    n, t, c = pa.shape
    out = {e: {r: [0] * n for r in RATES} for e in EVENTS}
    for i in range(n):
        for s in range(lengths[i]):
            for k in range(c):
                p, g = kind(pa[i, s, k], pv[i, s, k]), kind(ta[i, s, k], tv[i, s, k])
                for e in EVENTS: out[e][("T" if (p == e) == (g == e) else "F") + ("P" if p == e else "N")][i] += 1
    return out


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), p=st.sampled_from([.05, .3, .8]), average=st.sampled_from(AVERAGES), padded=st.booleans())
def test_rates_equal_plain_python(seed, p, average, padded):
    x = arrays(seed, p=p)
    lengths = [1, 4, 2, 3, 4] if padded else [4] * 5
    mask = (np.arange(4) < np.array(lengths)[:, None]).astype(np.uint8) if padded else None
    got, n = event_rates(*x, mask, average), by_hand(*x, lengths)
    np.testing.assert_array_equal(event_counts(*x, mask), [[n[e][r] for r in RATES] for e in EVENTS])
    for e in EVENTS:
        for r, other in (("TP", "FN"), ("FN", "TP"), ("TN", "FP"), ("FP", "TN")):
            pairs = list(zip(n[e][r], n[e][other]))
            if average == "cells": pairs = [tuple(map(sum, zip(*pairs)))]
            empty = math.nan if average == "cells" else 1
            want = np.mean([a / (a + b) if a + b else empty for a, b in pairs])
            assert got.loc[e, r] == pytest.approx(100 * want, nan_ok=True)


@pytest.mark.parametrize("average", AVERAGES)
def test_perfect_and_empty_predictions(average):
    _, _, a, v = arrays(1, p=.5)
    r = event_rates(a, v, a, v, average=average)
    assert (r[["TP", "TN"]] == 100).all(axis=None) and (average == "videos" or not r[["FP", "FN"]].any(axis=None))
    r = event_rates(0 * a, 0 * v, a, v)
    assert not r[["TP", "FP"]].any(axis=None) and (r[["TN", "FN"]] == 100).all(axis=None)


def test_complements_add_up():
    x = arrays(3)
    r = event_rates(*x)
    np.testing.assert_allclose(r.TP + r.FN, 100)
    np.testing.assert_allclose(r.TN + r.FP, 100)


@pytest.mark.parametrize("seed", range(4))
def test_averaging_over_videos_counts_empty_videos_twice(seed):
    "The identity that explains the printed sums"
    x = arrays(seed, p=.12)
    r = event_rates(*x, average="videos")
    empty = [100 * np.mean([not g[i].any() for i in range(5)]) for g in event_grids(*x[2:])]
    np.testing.assert_allclose(r.TP + r.FN, 100 + np.array(empty))
    np.testing.assert_allclose(r.TN + r.FP, 100)


def test_event_types_are_disjoint():
    _, _, a, v = arrays(2)
    grids = event_grids(a, v)
    assert grids.sum(0).max() == 1 and (grids.any(0) == (a | v)).all()
    np.testing.assert_array_equal(event_grids(torch.tensor(a), torch.tensor(v)), grids)


def test_rates_agree_with_the_f_score_of_the_only_metrics():
    "One video, one class: F = 2TP/(2TP+FP+FN) is CoLeaF's Ao and Vo"
    x = [y[:1, :, :1] for y in arrays(8, t=30)]
    tp, _, fp, fn = event_counts(*x)[:, :, 0].T
    f = 200 * tp / (2 * tp + fp + fn)
    np.testing.assert_allclose(f, evaluate(*x).loc["segment", ["Ao", "Vo", "AV"]].astype(float))


@pytest.mark.parametrize("spoil, message", [
    (lambda x: [x[0], x[1][:, :2], *x[2:]], "pred_visual: has shape"), (lambda x: [x[0] * .5, *x[1:]], "pred_audio: video 0 holds 0.5"),
    (lambda x: [*x[:2], None, x[3]], "true_audio: is None")])
def test_bad_input_is_refused(spoil, message):
    with pytest.raises(InputError, match=message): event_rates(*spoil(arrays(0, p=.9)))


def test_bad_options_are_refused():
    with pytest.raises(InputError, match="average: 'mean'"): event_rates(*arrays(0), average="mean")
    with pytest.raises(InputError, match="mask"): event_rates(*arrays(0), mask=np.zeros((5, 4)))


# ---- the printed numbers

def test_printed_table():
    p = printed_rates()
    assert p.shape == (4, 6) and list(p.index) == list(RATES) and p["AV", "U+C"].tolist() == [84.6, 95.6, 3.8, 29.9]
    assert doubtful_rates() == {("FP", e, c) for e in ("V", "AV") for c in ("U", "U+C")}


def test_simple_definitions_are_excluded():
    p = printed_rates()
    assert ((p.loc["TP"] + p.loc["FN"]) > 113).all()                     # no pair of complementary rates
    assert (p.sum() > 200).all()                                         # no shares of all cells
    assert ((p.loc["TP"] + p.loc["FP"]) < 95).all()                      # no shares of predicted cells


def test_share_of_videos_without_event_is_that_of_the_annotations(llp):
    part = load_annotations(llp)["test"]
    empty = 100 * (~event_grids(part.audio, part.visual).any((2, 3))).mean(1)
    np.testing.assert_allclose(without_event(), empty, atol=.01)


def test_sums_are_explained_by_averaging_over_videos():
    s = explained_sums()
    off = (s["printed TP+FN"] - s["100 + videos without event"]).abs()
    assert (off < .15).sum() == 5 and off.max() < .55 and off.idxmax() == ("AV", "U")
    r = printed_recall()
    assert (r["recall from TP"] - r["recall from FN"]).abs().max() < 1
    assert (r["recall from TP"][["A", "V"]] < 10).all() and (r["recall from TP"]["AV"] > 75).all()


def test_figure_says_it_in_words():
    fig = plot_printed_rates()
    assert "visible only U+C: 66.4, of which 65.6 without any prediction" in str(vars(fig))


# ---- runs

@pytest.fixture(scope="module")
def micro_runs(tmp_path_factory):
    before = [(d, dict(d)) for d in (runs.SCALES, METHODS)]
    micro.install()
    store = runs.Store(tmp_path_factory.mktemp("runs"))
    records = [runs.run(runs.RunSpec("jomold", scale="micro", seed=s, options={"denoise": False}, epochs=1), store, progress="off") for s in (1, 2)]
    test = runs.load_data(runs.DataSpec(), "micro", store.root / "cache")["test"]
    yield store, records, test
    for d, held in before: d.clear(); d.update(held)


def test_contexts_are_the_two_stored_passes(micro_runs):
    store, records, test = micro_runs
    got = context_rates(records[0], store, test, rule="jomold")
    for context, without in (("U", True), ("U+C", False)):
        pred = RULES["jomold"].decide(store.probabilities(records[0], without=without))
        want = event_rates(*pred, test.dense_audio, test.dense_visual)
        np.testing.assert_allclose(got[context], want)
    assert not np.allclose(store.probabilities(records[0]).segments, store.probabilities(records[0], without=True).segments)


def test_a_clone_without_probabilities_has_the_same_rates(micro_runs, tmp_path):
    store, records, test = micro_runs
    clone = runs.Store(tmp_path)
    for r in records:
        for path in (store.record_path(r["key"]), store.video_path(r["key"])):
            to = tmp_path / path.relative_to(store.root)
            to.parent.mkdir(exist_ok=True)
            to.write_bytes(path.read_bytes())
        for average in ("cells", "videos"):
            pd.testing.assert_frame_equal(context_rates(r, clone, test, average=average), context_rates(r, store, test, average=average))
            decided = context_rates(r, store, test, rule=r["rule"], average=average)        # a named rule asks the probabilities
            pd.testing.assert_frame_equal(context_rates(r, clone, test, average=average), decided)
        with pytest.raises(InputError, match="is missing or not the file"): context_rates(r, clone, test, rule="cmpae")
        with pytest.raises(InputError, match="16 videos for 4 clips"): context_rates(r, clone, test[:4])
    assert rates_table(records, clone, test).to_markdown() == rates_table(records, store, test).to_markdown()


def test_a_rule_that_fuses_takes_one_pass_here(micro_runs):
    store, records, test = micro_runs
    got = context_rates(records[0], store, test, rule="cmpae", average="videos")
    pred = RULES["cmpae"].with_(fuse=None).decide(store.probabilities(records[0], without=True))
    np.testing.assert_allclose(got["U"], event_rates(*pred, test.dense_audio, test.dense_visual, average="videos"))


def test_table_of_two_seeds(micro_runs, tmp_path):
    store, records, test = micro_runs
    table = rates_table(records, store, test, notebook="x")
    assert len(table) == 12 and table.mark == test.mark and table.provenance["runs"] == [r["key"] for r in records]
    own = [context_rates(r, store, test).loc["AV", ("U+C", "FP")] for r in records]
    row = next(r for r in table.rows if r.name == "FP" and "per cell" in r.source)
    assert row.mean["AV", "U+C"] == pytest.approx(np.mean(own)) and row.sd["AV", "U+C"] == pytest.approx(np.std(own, ddof=1))
    assert "simulated" in row.source and str(cell_counts(test)["A"]) in " ".join(table.notes)
    assert [r.kind for r in table.rows].count("printed") == 4 and "†" in table.to_markdown()
    table.save(tmp_path / "t")
    assert (tmp_path / "t.json").exists()


def test_clips_of_another_run_are_refused(micro_runs):
    store, records, test = micro_runs
    with pytest.raises(InputError, match="16 videos for 4 clips"): context_rates(records[0], store, test[:4])
    with pytest.raises(InputError, match="no run records"): rates_table([], store, test)
