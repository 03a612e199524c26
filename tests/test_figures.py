"""Figures of the four papers: what they show, that they say what they show, and what they refuse."""
import json
import xml.etree.ElementTree as ET
from dataclasses import replace

import matplotlib.text
import numpy as np
import pandas as pd
import pytest
import torch
from micro import toy_clips, toy_han

from avvp_nb.core import PALETTE, InputError
from avvp_nb.methods.cmpae import CMPAE
from avvp_nb.methods.coleaf import Reference
from avvp_nb.methods.dgm import DGMNet
from avvp_nb.methods.jomold import JoMoLD
from avvp_nb.methods.ma_refine import Refinement, refine
from avvp_nb.results import diagram as B
from avvp_nb.results import figures_coleaf as L
from avvp_nb.results import figures_dgm as G
from avvp_nb.results import figures_han as H
from avvp_nb.results import figures_ma as M
from avvp_nb.results import plots as P
from avvp_nb.results.groups import provenance
from avvp_nb.results.plots import drawn_text, save_figure
from avvp_nb.train.learner import predict

MARK = "simulated toy"
NAMES = ("Dog", "Frying_(food)", "Speech")  # of the toy classes


def texts(fig):
    "Text and box of whatever is printed on a figure; tick labels beyond the limits of their axis are not"
    fig.draw_without_rendering()
    axes = [(ax.xaxis, ax.get_xlim()) for ax in fig.axes] + [(ax.yaxis, sorted(ax.get_ylim())) for ax in fig.axes]
    unseen = {id(t.label1) for axis, (lo, hi) in axes for t in axis.get_major_ticks() if not lo <= t.get_loc() <= hi}
    found = [t for t in fig.findobj(matplotlib.text.Text) if t.get_text().strip() and t.get_visible() and id(t) not in unseen]
    return [(t.get_text(), t.get_window_extent()) for t in found]


def overlaps(fig):
    "Pairs of texts of a figure that lie on each other"
    def covered(a, b):
        wide, high = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        return wide > 2 and high > 2

    boxes = texts(fig)
    return [(s, u) for i, (s, a) in enumerate(boxes) for u, b in boxes[i + 1:] if covered(a, b)]


def outside(fig):
    "Texts that leave the figure"
    w, h = fig.canvas.get_width_height()
    return [s for s, b in texts(fig) if b.x0 < -1 or b.y0 < -1 or b.x1 > w + 1 or b.y1 > h + 1]


@pytest.fixture(scope="module")
def clips():
    "Toy clips with an event in both modalities, whose visual labels differ from the audible ones"
    c = toy_clips(60, seed=1)
    dense_visual = np.roll(c.dense_visual, 1, axis=1); dense_visual[::3, :, 0] = 0
    return replace(c, dense_visual=dense_visual, source={"simulated": True, "mark": MARK, "fingerprint": "abc"}, oracle=True)


@pytest.fixture(scope="module")
def truth(clips): return clips.dense_audio, clips.dense_visual


@pytest.fixture(scope="module")
def model(): return toy_han(3)


@pytest.fixture(scope="module")
def ref(model):
    "A refinement in which some labels went and some stayed"
    rng = np.random.default_rng(0)
    weak = np.zeros((60, 3), bool); weak[np.arange(60), np.arange(60) % 3] = True; weak[::2, 0] = True; weak[:4] = [True, True, False]
    weak[:4, 2] = False
    train = replace(toy_clips(60, seed=1), weak=weak.astype(np.float32), source={"simulated": True, "mark": MARK})
    r = refine(model, train)
    probs = {k: rng.random((60, 3)).astype(np.float32) for k in r.swap._fields}
    swap = r.swap._replace(**probs)
    out = replace(r, swap=swap)
    e = M.evidence(out); bars = M.bars_of(out)
    return replace(out, removed_audio=weak & (e[0] < bars[0]), removed_visual=weak & (e[1] < bars[1])), replace(train, oracle=True)


def history(n=4, **terms):
    "Epochs of a record"
    return [{"epoch": e, "loss": {k: v / e for k, v in terms.items()}, "scores": {"audio": 0.2 * e, "visual": 0.1 * e}} for e in range(1, n + 1)]


def record(n=4, method="ma", seed=1):
    "The least that a record has to hold"
    return {"key": f"{method}-{seed}", "spec": {"method": method, "scale": "tiny", "seed": seed}, "rule": "ma", "metrics": {},
            "data": {"simulated": True, "mark": MARK, "identity": {}}, "history": history(n, audio=.2, visual=.3, video=.1, contrast=2.)}


def coleaf_record(seed=1, n=4, **loss):
    "A record of CoLeaF with what References and Anchor exchanged"
    r = record(n, "coleaf", seed)
    loss = loss or dict(event_audio=.1, event_visual=.2 * seed, cooccurrence_audio=1e-4, cooccurrence_visual=2e-4)
    return r | {"history": [h | {"loss": loss, "reference": dict(audio=9., visual=8., share_audio=.5, share_visual=.2)} for h in r["history"]]}


def all_figures(clips, truth, model, ref):
    "Every figure of data, by name"
    r, train = ref
    audio, visual = truth
    swapped = [np.roll(x, 1, axis=1) for x in truth]
    videos = H.asynchronous(*truth, clips.ids, NAMES).drop_duplicates("index")[:3]
    picked, i, kw = M.pick_refined(r), videos["index"].iloc[0], dict(classes=NAMES, mark=MARK)
    return {
        "task": H.plot_task(audio[i], visual[i], "Dog", features=(clips.audio[i], clips.frames[i]), **kw),
        "task without features": H.plot_task(audio[i], visual[i], 1, **kw),
        "event counts": H.plot_event_counts(H.event_counts(truth, truth, classes=NAMES), MARK),
        "samples": H.plot_samples(*truth, videos, clips.ids, **kw),
        "pooling": H.plot_pooling(H.pooling_parts(model, clips, 2), "Speech", **kw),
        "asynchronous": H.plot_asynchronous([audio[i], visual[i]], [x[i] for x in swapped], "Dog", **kw),
        "swap": M.plot_swap(r, 0, NAMES), "refined": M.plot_refined(r, picked, NAMES), "one refined": M.plot_refined(r, [0], NAMES),
        "removed": M.plot_removed(r, None, NAMES), "removed, truth known": M.plot_removed(r, train, NAMES),
        "parsing": M.plot_parsing(truth, swapped, videos, clips.ids, **kw),
        "scores": G.plot_scores({"a": G.score_curves([record(), record(seed=2)]), "b": G.score_curves(record())}, MARK),
        "terms": P.plot_terms({"stage 1": record(), "stage 3": [record(seed=2), record(seed=3)]}),
        "one video": M.plot_parsing(truth, swapped, [i], clips.ids, **kw), "one sample": H.plot_samples(*truth, [i], clips.ids, **kw),
        "event types": L.plot_event_types(truth, {"JoMoLD": swapped, "CMPAE": truth, "CoLeaF": [audio, audio]}, i, clips.ids, **kw),
        "exchange": L.plot_exchange([coleaf_record(), coleaf_record(2)]), "exchange in one epoch": L.plot_exchange(coleaf_record(n=1)),
        "one epoch": P.plot_terms(record(1)), "scores of one epoch": G.plot_scores({"a": G.score_curves(record(1))}, MARK)}


def all_diagrams():
    "Every diagram, by name"
    return {"han": H.diagram_han(), "two layers": H.diagram_han(toy_han(share_layer=False)), "dgm": G.diagram_dgm(), "pipelines": G.diagram_pipelines(),
            "dgm on jomold": G.diagram_dgm(DGMNet(JoMoLD(classes=7))), "jomold": H.diagram_han(JoMoLD(n_layers=2)),
            "coleaf": L.diagram_coleaf(), "coleaf on han": L.diagram_coleaf(toy_han(), toy_references(tokens=False))}


def toy_references(**kw):
    "References of the sizes of `toy_han`"
    return [Reference(m, classes=3, audio_dim=8, frame_dim=8, motion_dim=8, dim=16, **kw) for m in ("audio", "visual")]


@pytest.fixture(scope="module")
def drawn(clips, truth, model, ref): return all_figures(clips, truth, model, ref)


@pytest.fixture(scope="module")
def diagrams(): return all_diagrams()


# ---------------------------------------------------------------- every figure

def test_every_figure_says_that_it_is_simulated_and_what_it_shows(drawn):
    for name, fig in drawn.items():
        assert "simulated" in drawn_text(fig), name
        assert len(fig.get_label()) > 40 and fig.get_label().endswith("."), name
        assert "nan" not in fig.get_label(), (name, fig.get_label())


def test_no_text_overlaps_another_or_leaves_the_figure(drawn, diagrams):
    found = {name: (overlaps(fig), outside(fig)) for name, fig in {**drawn, **diagrams}.items()}
    assert {k: v for k, v in found.items() if v != ([], [])} == {}


def test_the_overlap_test_is_no_rubber_stamp():
    import matplotlib.pyplot as plt
    fig = plt.figure()
    for _ in range(2): fig.text(.5, .5, "the same place")
    fig.text(.99, .1, "leaves the figure")
    assert overlaps(fig) and outside(fig) == ["leaves the figure"]
    plt.close(fig)


def test_figures_are_saved_with_their_description(drawn, tmp_path):
    paths = save_figure(drawn["removed"], tmp_path / "removed", provenance(record()))
    assert [p.suffix for p in paths] == [".svg", ".png", ".json"]
    ET.parse(paths[0])
    said = json.loads(paths[2].read_text())
    assert said["caption"] == drawn["removed"].get_label() and said["simulated"]


def test_the_same_input_gives_the_same_bytes(tmp_path):
    a, b = (save_figure(H.diagram_han(), tmp_path / n / "han", P.data_provenance(None)) for n in "ab")
    assert a[0].read_bytes() == b[0].read_bytes()


def test_nothing_is_left_open(drawn, diagrams):
    import matplotlib.pyplot as plt
    assert plt.get_fignums() == []


# ---------------------------------------------------------------- diagrams

def test_boxes_of_a_diagram_are_disjoint_and_hold_their_text(diagrams):
    from matplotlib.patches import FancyBboxPatch
    for name, fig in diagrams.items():
        boxes = [p.get_window_extent() for p in fig.findobj(FancyBboxPatch)]
        assert len(boxes) > 4, name
        for i, a in enumerate(boxes):
            assert not any(min(a.x1, b.x1) > max(a.x0, b.x0) and min(a.y1, b.y1) > max(a.y0, b.y0) for b in boxes[i + 1:]), name
        for t in fig.axes[0].texts:
            if t.get_text().strip() and t.get_ha() == "center" and t.get_va() == "center":
                e = t.get_window_extent()
                assert any(b.x0 - 1 <= e.x0 and e.x1 <= b.x1 + 1 and b.y0 - 1 <= e.y0 and e.y1 <= b.y1 + 1 for b in boxes), (name, t.get_text())


def test_diagrams_show_the_numbers_of_the_given_network():
    model = toy_han(dim=20)
    text = drawn_text(H.diagram_han(model))
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in text and "(B,T,20)" in text and "(B,3)" in text and "2048" not in text
    anchor, refs = CMPAE(classes=7, dim=20), [Reference(m, classes=7, dim=20) for m in ("audio", "visual")]
    text = drawn_text(L.diagram_coleaf(anchor, refs))
    for nets in ([anchor], refs, [refs[0].layer], [anchor.layers], [refs[1].project]):
        assert f"{sum(p.numel() for n in nets for p in n.parameters()):,} parameters" in text
    assert "(B,T+7,20)" in text and "(B,T,20) each" in text and "(7,20) class tokens" in text and "25" not in text
    net = DGMNet(toy_han())
    text = drawn_text(G.diagram_dgm(net))
    assert f"{sum(p.numel() for p in net.msdu.parameters()) // 2:,} parameters" in text


def test_parameters_of_a_diagram_add_up():
    assert sum(B.network_facts(CMPAE(dim=16)).loc[k, "parameters"] for k in ("features", "early", "layers", "head")) == sum(p.numel() for p in CMPAE(dim=16).parameters())
    for model in (toy_han(), DGMNet(toy_han()), DGMNet(JoMoLD())):
        own = B.network_facts(model)["parameters"]
        inside = "backbone." if isinstance(model, DGMNet) else ""
        parts = sum(own[inside + k] for k in ("project", "layers", "head")) + own.get("msdu", 0)
        assert parts == sum(p.numel() for p in model.parameters())


def test_measuring_leaves_the_network_as_it_was():
    for mode in (True, False):
        model = DGMNet(toy_han()).train(mode)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        B.network_facts(model)
        assert model.training is mode and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert not any(m._forward_hooks for m in model.modules()) and all(p.grad is None for p in model.parameters())


def test_shapes_are_named_by_letters():
    assert B.shape_text(torch.zeros(B.B, 8 * B.T, 5)) == "(B,8T,5)" and B.shape_text(torch.zeros(2 * B.B, B.T, 2, 4)) == "(2B,T,2,4)"
    assert B.shape_text(torch.zeros(B.B, 25)) == "(B,25)"


@pytest.mark.parametrize("blocks, arrows, said", [
    ([B.Block("a", "x", 0, 0)] * 2, [], "block 'a': occurs twice"),
    ([B.Block("a", "x", 0, 0)], [B.Arrow("a", "b")], "arrow: 'b' is not possible"),
    ([B.Block("a", "x", 0, 0, kind="wood")], [], "kind of block 'a': 'wood' is not possible")])
def test_impossible_diagrams_are_refused(blocks, arrows, said):
    with pytest.raises(InputError, match=said): B.block_diagram(("", blocks, arrows))


def test_networks_that_cannot_be_drawn_are_refused():
    with pytest.raises(InputError, match="Linear has no `project` and `head`"): H.diagram_han(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="has no measurement heads"): G.diagram_dgm(DGMNet(toy_han(), msdu=False))


def test_arrows_end_at_their_boxes():
    left, right = (0., 0., 1., 1.), (3., 4., 1., 1.)
    for p, q in ((left, right), (right, left)):
        path = B.route(p, q)
        assert path[0][0] == (p[0] + p[2] if q[0] > p[0] else p[0]) and path[-1][0] == (q[0] if q[0] > p[0] else q[0] + q[2])
        assert all(a[0] == b[0] or a[1] == b[1] for a, b in zip(path, path[1:])), "arrows run along the axes"


# ---------------------------------------------------------------- HAN

def test_events_are_counted_as_unbroken_runs():
    a, v = np.zeros((2, 2, 6, 2), int)
    a[0, [0, 1, 3], 0] = 1; a[1, :, 0] = 1; v[0, 1:3, 0] = 1; v[1, 5, 1] = 1
    n = H.event_counts((a, v), classes="ab")
    assert n.loc["a"].tolist() == [3, 1, 1] and n.loc["b"].tolist() == [0, 1, 0]
    assert H.event_counts((a, v), (a, v), classes="ab").equals(2 * n)


def test_event_counts_agree_with_the_papers_totals(llp):
    from avvp_nb.data.annotations import load_annotations
    splits = load_annotations(llp, "2020")
    n = H.event_counts(*((splits[s].audio, splits[s].visual) for s in ("val", "test"))).sum()
    assert abs(n["audio"] - 4131) < .02 * 4131 and abs(n["visual"] - 2495) < .02 * 2495


def test_asynchronous_pairs_are_those_with_parts_of_their_own(truth):
    found = H.asynchronous(*truth, classes=NAMES)
    a, v = (x != 0 for x in truth)
    expected = ((a & ~v).any(1) & (v & ~a).any(1)).sum()
    assert len(found) == expected
    for _, r in found.iterrows():
        c = NAMES.index(r["class"])
        assert r["heard only"] == (a & ~v)[r["index"], :, c].sum() and r["seen only"] == (v & ~a)[r["index"], :, c].sum()
    shortest = found[["heard only", "seen only"]].min(axis=1)
    assert shortest.is_monotonic_decreasing
    with pytest.raises(InputError, match=r"two arrays \(N,T,C\)"): H.asynchronous(a, v[:3])
    with pytest.raises(InputError, match="25 names for 3 classes"): H.asynchronous(a, v)


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: DGMNet(m, msdu=False), lambda m: DGMNet(m, msdu=True)])
def test_pooling_parts_add_up_to_the_models_own_probability(clips, wrap):
    model = wrap(toy_han(4)).train()
    p = predict(model, clips)
    for i in (0, 59):
        parts = H.pooling_parts(model, clips, i)
        np.testing.assert_allclose(parts["video"], p.video[i], atol=1e-5)
        np.testing.assert_allclose(parts["probability"], p.segments[i], atol=1e-5)
        np.testing.assert_allclose((parts["probability"] * parts["temporal"]).sum(0)[0], p.audio[i], atol=1e-5)
        np.testing.assert_allclose(parts["modality"].sum(1), 1, atol=1e-5)
    assert model.training, "the mode is as before"


def test_pooling_of_other_kinds_is_refused(clips):
    for m in (toy_han(pooling="max"), torch.nn.Linear(2, 2)):
        with pytest.raises(InputError, match="no attentive pooling"): H.pooling_parts(m, clips, 0)


def test_the_pooling_figure_prints_every_weight(clips, model):
    parts = H.pooling_parts(model, clips, 1)
    fig = H.plot_pooling(parts, "Speech", NAMES, MARK)
    text = drawn_text(fig)
    assert f"{parts['modality'][0, 0, 2]:.2f}" in text and f"probability {parts['video'][2]:.2f}" in fig.get_label()
    long = {k: np.repeat(v, 8, axis=0) if v.ndim == 3 else v for k, v in parts.items()}
    assert len(H.plot_pooling(long, 0, NAMES, MARK).axes[0].texts) == 0, "forty seconds have no room for numbers"
    with pytest.raises(InputError, match="class: 'Cat' is not possible"): H.plot_pooling(parts, "Cat", NAMES)


def test_boxes_mark_what_is_heard_unseen_and_where_it_is_seen():
    from matplotlib.patches import Rectangle
    a, v = np.zeros((2, 8, 1), int)
    a[2:6] = 1; v[0:3] = 1
    fig = H.plot_asynchronous((a, v), (a, v), 0, ["x"], MARK)
    boxes = [(round(p.get_x(), 1), round(p.get_width(), 1)) for p in fig.axes[0].patches if isinstance(p, Rectangle)]
    assert boxes == [(3.0, 2.9), (0.0, 2.9)] and "not seen 3–6 s" in fig.get_label()
    assert not [p for p in H.plot_asynchronous((a, v), (v, v), 0, ["x"]).axes[0].patches], "nothing unseen, nothing to help"


def test_task_figure_reads_classes_in_both_forms():
    a, v = np.zeros((2, 10), int); a[4:8] = 1; v[2:5] = 1
    one, many = H.plot_task(a, v, "Dog"), H.plot_task(a[:, None].repeat(3, 1), v[:, None].repeat(3, 1), "Dog", NAMES)
    assert one.get_label() == many.get_label() == "Dog in 10 seconds: heard 4–8 s, seen 2–5 s, both 4–5 s."
    with pytest.raises(InputError, match="no class 3"): H.plot_task(a[:, None].repeat(3, 1), v[:, None].repeat(3, 1), 3, NAMES)


def test_constant_features_are_drawn_as_nothing():
    assert np.isfinite(H.feature_strip(np.ones((10, 40)))).all() and H.feature_strip(np.ones((10, 5))).shape == (5, 10)


# ---------------------------------------------------------------- MA

def test_evidence_below_the_bar_is_exactly_what_was_removed(model):
    clips = toy_clips(60, seed=5)
    r = refine(model, replace(clips, weak=np.eye(3, dtype=np.float32)[np.arange(60) % 3]))
    for e, bar, removed in zip(M.evidence(r), M.bars_of(r), (r.removed_audio, r.removed_visual)):
        assert (removed == (r.weak & (e < bar))).all()


def test_picked_videos_lost_a_label_and_follow_the_quantiles(ref):
    r, _ = ref
    picked = M.pick_refined(r, "visual")
    assert picked["shortfall"].is_monotonic_increasing and (picked["shortfall"] > 0).all() and len(picked) == 3
    assert picked["id"].tolist() == [r.ids[i] for i in picked["index"]]
    assert all(r.removed_visual[i].any() for i in picked["index"])
    only = replace(r, removed_visual=r.removed_visual & (np.arange(60)[:, None] == picked["index"].iloc[0]))
    assert len(M.pick_refined(only)) == 1
    with pytest.raises(InputError, match="no video lost a label"): M.pick_refined(replace(r, removed_visual=r.removed_visual & False))
    with pytest.raises(InputError, match="modality: 'both' is not possible"): M.pick_refined(r, "both")


def test_shares_and_rates_follow_from_the_truth(ref):
    r, train = ref
    shares = M.removal_shares(r, train, NAMES)
    a, v = (np.asarray(x) > 0 for x in train.modality_labels())
    for m, removed, there in (("audio", r.removed_audio, a), ("visual", r.removed_visual, v)):
        n = r.weak.sum(0)
        np.testing.assert_allclose(shares[m, "right"], (removed & r.weak & ~there).sum(0) / n)
        np.testing.assert_allclose(shares[m, "right"] + shares[m, "wrong"], shares[m, "removed"])
        np.testing.assert_allclose(shares[m, "false"], (r.weak & ~there).sum(0) / n)
    nobody = replace(r, removed_audio=r.removed_audio & False)
    assert np.isnan(M.rates(nobody, train)["audio"][0])


def test_classes_without_labels_have_no_bar(ref):
    r, _ = ref
    weak = r.weak.copy(); weak[:, 1] = False
    less = replace(r, weak=weak, removed_audio=r.removed_audio & weak, removed_visual=r.removed_visual & weak)
    assert list(M.removal_shares(less, classes=NAMES).index) == ["Dog", "Speech"] and M.plot_removed(less, classes=NAMES)


def test_a_list_without_probabilities_has_shares_but_no_evidence(ref):
    r, _ = ref
    listed = Refinement(r.ids, r.rows, r.weak, r.removed_audio, r.removed_visual, source=r.source)
    assert M.plot_removed(listed, classes=NAMES)
    for f in (lambda: M.plot_swap(listed, 0), lambda: M.plot_refined(listed, [0]), lambda: M.pick_refined(listed)):
        with pytest.raises(InputError, match="a list without probabilities"): f()


def test_swap_figure_names_verdicts_and_refuses_strangers(ref):
    r, _ = ref
    i = int(np.flatnonzero(r.removed_visual.any(1))[0])
    c = int(np.flatnonzero(r.removed_visual[i])[0])
    fig = M.plot_swap(r, r.ids[i], NAMES)
    assert "visual label removed" in fig.get_label() and P.class_name(NAMES[c]) in drawn_text(fig) and "removed" in drawn_text(fig)
    assert M.plot_swap(replace(r, partners=None), i, NAMES)
    with pytest.raises(InputError, match="video: 'nobody' is not possible"): M.plot_swap(r, "nobody")
    with pytest.raises(InputError, match="no video 60"): M.plot_swap(r, 60)
    with pytest.raises(InputError, match="no videos"): M.plot_refined(r, [])


def test_removed_labels_are_hollow(ref):
    r, _ = ref
    i = int(np.flatnonzero(r.removed_visual.any(1))[0])
    bars = M.plot_refined(r, [i], NAMES).axes[0].patches
    own = np.flatnonzero(r.weak[i])
    hollow = [bool(b.get_hatch()) for b in bars]
    assert hollow == [*r.removed_audio[i, own], *r.removed_visual[i, own]]


def test_arrays_of_several_videos_have_to_fit(truth):
    a, v = truth
    for f in (lambda: H.plot_samples(a, v[:3], [0], classes=NAMES), lambda: H.plot_samples(a, v, [], classes=NAMES),
              lambda: M.plot_parsing(truth, (a, v[:, :2]), [0], classes=NAMES)):
        with pytest.raises(InputError, match="arrays of shapes"): f()
    with pytest.raises(InputError, match="25 names for 3 classes"): H.plot_samples(a, v, [0])
    empty = M.plot_parsing((0 * a, 0 * v), (0 * a, 0 * v), [0], classes=NAMES, mark=MARK)
    assert "video 0: nothing." in empty.get_label()


# ---------------------------------------------------------------- CoLeaF

def test_the_exchange_shows_what_a_run_has():
    fig = L.plot_exchange([coleaf_record(), coleaf_record(2)])
    assert [a.get_title() for a in fig.axes] == list(L.EXCHANGE)
    assert fig.axes[2].lines[1].get_ydata().tolist() == pytest.approx([.3] * 4), "the mean over seeds"
    assert [a.get_title() for a in L.plot_exchange(coleaf_record(event_audio=1., event_visual=1.)).axes] == list(L.EXCHANGE)[:3]
    with pytest.raises(InputError, match="expected a run of CoLeaF"): L.plot_exchange(record())


def test_event_types_part_what_is_active():
    rng = np.random.default_rng(0)
    a, v = rng.random((2, 5, 8, 3)) < .4
    kinds = L.event_types(a, v)
    assert tuple(kinds) == L.TYPES and (sum(x.astype(int) for x in kinds.values()) == (a | v)).all()
    assert (kinds["audible only"] | kinds["audible-visible"] == a).all() and (kinds["visible only"] == (v & ~a)).all()


def test_the_video_of_figure_3_is_chosen_by_its_rule():
    a, v = np.zeros((2, 40, 6, 3), int)
    a[:30, :, 0] = 1; a[10:35, 2:, 1] = 1; v[10:35, 2:, 1] = 1; v[5, 1:, 0] = 1      # 10..29 have both; in 5 both are one class
    found = L.mixed_videos(a, v)
    assert found.tolist() == list(range(10, 30))
    change = np.random.default_rng(1).permutation(40).astype(float)
    frame = {"x": np.zeros(40), "y": np.full(40, -1.), "CoLeaF": change}
    row = L.pick_mixed((a, v), frame, [f"v{i}" for i in range(40)]).iloc[0]
    assert row["difference"] == np.sort(change[10:30])[round(.5 * 19)] and row["id"] == f"v{row['index']}" and row["mixed"] == 20
    with pytest.raises(InputError, match="1 methods"): L.pick_mixed((a, v), {"CoLeaF": change})
    with pytest.raises(InputError, match="no video with an event"): L.pick_mixed((a[30:], v[30:]), {k: x[30:] for k, x in frame.items()})


def test_events_stand_in_the_group_of_their_type():
    a, v = np.zeros((2, 1, 10, 3), int)
    a[0, 2:8, 0] = 1; v[0, 5:10, 0] = 1
    fig = L.plot_event_types((a, v), {"wrong": (a, a)}, 0, ["x"], NAMES, MARK)
    assert fig.get_label() == ("Events by type. annotated: Dog audible only 2–5 s, Dog audible-visible 5–8 s, Dog visible only 8–10 s; "
                               "wrong: Dog audible-visible 2–8 s.")
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ["annotated", "wrong"] * 3
    many = np.ones((1, 10, 12), int)
    crowded = L.plot_event_types((many, many), {"wrong": (many, 0 * many)}, 0, classes=[f"class {i}" for i in range(12)], mark=MARK)
    assert "4 other classes" in drawn_text(crowded) and overlaps(crowded) == outside(crowded) == []
    empty = L.plot_event_types((0 * a, 0 * v), {"wrong": (0 * a, 0 * a)}, 0, classes=NAMES, mark=MARK)
    assert "annotated: nothing; wrong: nothing." in empty.get_label()
    with pytest.raises(InputError, match="arrays of shapes"): L.plot_event_types((a, v), {"x": (a, v[:, :2])}, 0, classes=NAMES)


# ---------------------------------------------------------------- DGM and the training notebooks

def test_scores_are_means_over_the_labels():
    from avvp_nb.core import Parsing
    p = Parsing(None, torch.tensor([[.5, .1], [.3, .9]]), torch.tensor([[1., 0.], [0., .5]]), None)
    assert G.correct_class_score(p, torch.tensor([[1., 0.], [1., 1.]])) == pytest.approx(((.5 + .3 + .9) / 3, 1.5 / 3))
    assert G.correct_class_score(p, torch.zeros(2, 2)) == (0., 0.)


def test_curves_come_from_the_history_or_are_refused():
    assert G.score_curves([record(), record(seed=2)])["visual"].shape == (2, 4)
    with pytest.raises(InputError, match="no scores 'audio'"): G.score_curves({"key": "k", "history": [{"loss": {}}]})
    with pytest.raises(InputError, match="runs of different length"): G.score_curves([record(), record(2)])
    with pytest.raises(InputError, match="0 experiments"): G.plot_scores({})
    with pytest.raises(InputError, match="4 experiments"): P.plot_terms({k: record(seed=i) for i, k in enumerate("abcd")})
    with pytest.raises(InputError, match="no loss 'sound'"): P.plot_terms(record(), ["sound"])


def test_lines_have_the_colours_of_their_modality():
    fig = P.plot_terms(record())
    assert {ax.get_title(): ax.lines[0].get_color() for ax in fig.axes} == {
        "audio": PALETTE["audio"], "visual": PALETTE["visual"], "video": PALETTE["av"], "contrast": PALETTE["truth"]}


def test_an_unmarked_figure_of_simulated_data_is_refused(clips, truth, tmp_path):
    fig = H.plot_samples(*truth, [0], classes=NAMES)
    with pytest.raises(InputError, match="does not say so"): save_figure(fig, tmp_path / "x", P.data_provenance(clips))
    assert not list(tmp_path.iterdir())


def test_provenance_of_data_has_no_paths(clips):
    said = P.data_provenance(clips, "nbs/han.ipynb", seed=1)
    assert said == {"runs": [], "mark": MARK, "simulated": True, "data": "abc", "notebook": "nbs/han.ipynb", "parameters": {"seed": 1}}


def test_every_figure_of_the_three_papers_has_a_function():
    from avvp_nb.core import asset
    rows = pd.read_csv(asset("figures.csv"))
    there = " ".join(f.__doc__ or "" for m in (H, M, L, G, P, B) for f in vars(m).values() if callable(f))
    for paper, figure in rows.loc[rows["paper"].isin(["han", "ma", "dgm"]), ["paper", "figure"]].itertuples(index=False):
        if (paper, figure) == ("ma", 1): continue  # `strip_plot`, as said in the notebook
        assert f"{paper.upper()}, Fig. {figure}" in there, (paper, figure)
