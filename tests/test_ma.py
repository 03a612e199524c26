"""Parity of MA with the official code, its hand examples, its refusals, and its three stages end to end."""
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import close
from test_han import fill

from avvp_nb.core import InputError, read_json, shared
from avvp_nb.data.annotations import load_annotations
from avvp_nb.data.clips import Batch, Clips
from avvp_nb.methods import ma, ma_swap
from avvp_nb.methods.dgm import DGMNet, MSDULoss
from avvp_nb.methods.han import HAN
from avvp_nb.methods.losses import GuidedLoss
from avvp_nb.methods.ma import MALoss, contrast, contrastive, ma_keys, recipe, similarity
from avvp_nb.methods.ma_refine import (
    Refinement,
    error_rates,
    hamming_error,
    read_removed,
    refine,
    refine_labels,
)
from avvp_nb.methods.ma_swap import assembled, draw_partners, swap_test
from avvp_nb.methods.official import from_official, to_official
from avvp_nb.metrics import RULES
from avvp_nb.train.learner import Learner, predict

VARIANTS = ["", "_chirp"]
TINY = dict(classes=3, audio_dim=8, frame_dim=8, motion_dim=8, dim=16)


# ---- parity ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def official_keys(golden):
    keys = read_json(shared("golden", "state_dict_keys.json"))["ma_step3"]["keys"]
    return {k["key"]: k["shape"] for k in keys}


@pytest.fixture(scope="module")
def inputs(golden):
    return {k: torch.tensor(v) for k, v in golden("inputs_b3").items()}


def build(official_keys, variant):
    return from_official(fill(official_keys, "chirp" if variant else "sine"), "ma", strict=True)


def test_keys_cover_the_official_file(official_keys):
    used = {o for o, _, _ in ma_keys()}
    unused = {k for k in official_keys if k.startswith(ma.UNUSED)}
    assert len(official_keys) == 98 and used | unused == set(official_keys) and not used & unused


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward(golden, official_keys, inputs, variant):
    case, model = golden("ma_forward" + variant), build(official_keys, variant)
    with torch.no_grad():
        out = model(inputs["audio"], inputs["visual"], inputs["visual_st"])
        sims = similarity(out.extra["attended"][0], out.extra["projected"][1], case.info["options"]["temperature"])
    for key, value in {"global_prob": out.video, "a_prob": out.audio, "v_prob": out.visual, "frame_prob": out.segments,
                       "sims": sims.flatten(0, 1)}.items():
        close(case, key, value)


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients(golden, official_keys, inputs, variant):
    case, model = golden("ma_loss" + variant), build(official_keys, variant)
    # evaluation mode switches every dropout off, as the reference run did; there is nothing else that depends on it
    parsing = model(inputs["audio"], inputs["visual"], inputs["visual_st"])
    terms = MALoss()(parsing, Batch(None, None, None, torch.tensor(case["label"]), None, {}))
    total = sum(terms.values())
    total.backward()
    for key, value in {"loss_audio": terms["audio"], "loss_visual": terms["visual"], "loss_global": terms["video"],
                       "loss_contrastive": terms["contrast"], "loss_total": total}.items():
        close(case, key, value.detach())
    grads = to_official(model, "ma", of=lambda p: p.grad)
    for key in [k for k in case if k.startswith("grad.")]:
        close(case, key, grads[key[5:]])
    close(case, "grad_norms", [grads[k].norm().item() if k in grads else np.nan for k in case.info["parameter_keys"]])


def test_contrastive(golden):
    case = golden("ma_contrastive")
    x1, x2 = (torch.tensor(case[k], requires_grad=True) for k in ("x1", "x2"))
    loss = contrastive(x1, x2)
    loss.backward()
    close(case, "sims", similarity(x1, x2).flatten(0, 1).detach())
    close(case, "loss", loss.detach())
    close(case, "grad_x1", x1.grad)
    close(case, "grad_x2", x2.grad)
    with pytest.raises(AssertionError):      # the paper's target is another number
        close(case, "loss", contrastive(x1, x2, protocol="paper").detach())


def normalise(e):
    return e / e.max()


@pytest.mark.parametrize("prepare", [lambda e: e, normalise], ids=["error rates", "normalised"])
@pytest.mark.parametrize("kind", [lambda x: x, torch.tensor], ids=["numpy", "torch"])
def test_refine(golden, prepare, kind):
    case = golden("ma_refine")
    removed_audio, removed_visual = refine_labels(
        *(kind(case[k]) for k in ("v_a", "a_a", "a_v", "v_v", "label")), kind(prepare(1 - case["v_acc"])), kind(prepare(1 - case["a_acc"])))
    close(case, "removed_audio", removed_audio)
    close(case, "removed_visual", removed_visual)
    assert removed_audio.dtype == bool and (removed_audio.sum(), removed_visual.sum()) == (43, 34)


def test_refine_full(golden):
    case = golden("ma_refine_full")
    for m in "av":
        close(case, f"{m}_acc", 1 - hamming_error(case[m], case["label"]))
    e = error_rates(case["a"], case["v"], case["label"])
    removed_audio, removed_visual = refine_labels(*(case[k] for k in ("v_a", "a_a", "a_v", "v_v", "label")), e.visual, e.audio)
    close(case, "removed_audio", removed_audio)
    close(case, "removed_visual", removed_visual)


@pytest.mark.parametrize("order", [("a_a", "v_a", "v_v", "a_v"), ("a_v", "v_v", "v_a", "a_a")])
def test_refine_arguments_matter(golden, order):
    "Streams of one assembled video may change places (both must fail), the two assembled videos may not"
    case = golden("ma_refine")
    found = refine_labels(*(case[k] for k in (*order, "label")), 1 - case["v_acc"], 1 - case["a_acc"])
    same = order[0] == "a_a"
    assert np.array_equal(found[0], case["removed_audio"]) == np.array_equal(found[1], case["removed_visual"]) == same


def test_labels(golden):
    case = golden("ma_labels")
    removed = {k: torch.tensor(case[k]).float() for k in ("removed_audio", "removed_visual")}
    batch = Batch(None, None, None, torch.tensor(case["weak_label"]).double(), None, removed)
    pa, pv = MALoss().targets(batch)
    close(case, "pa", pa)
    close(case, "pv", pv)
    close(case, "label", MALoss().video_target(batch))
    full = MALoss(global_target="full").video_target(batch)
    assert torch.equal(full, batch.weak)
    assert (full != MALoss().video_target(batch)).sum() == case.info["values"]["labels_removed_from_video_target"]


# ---- loss -----------------------------------------------------------------------------------------------------------

def toy_parsing():
    torch.manual_seed(0)
    model = HAN(**TINY).eval()
    return model(*torch.randn(3, 4, 10, 8))


def test_video_target_leaves_the_visual_term_alone():
    "A label removed for audio leaves the video target (official), but the visual target keeps its .95"
    parsing, weak = toy_parsing(), torch.ones(4, 3)
    batch = Batch(None, None, None, weak, None, {"removed_audio": torch.ones(4, 3)})
    plain = GuidedLoss()(parsing, batch._replace(labels={}))
    official, full = MALoss()(parsing, batch), MALoss(global_target="full")(parsing, batch)
    assert official["visual"] == full["visual"] == plain["visual"]
    assert official["audio"] == full["audio"] != plain["audio"]
    assert full["video"] == plain["video"]
    assert official["video"] == GuidedLoss()(parsing, batch._replace(weak=0 * weak, labels={}))["video"]


def test_oracle_labels_do_not_reach_the_video_target():
    parsing, weak = toy_parsing(), torch.ones(4, 3)
    batch = Batch(None, None, None, weak, None, {"audio": 0 * weak, "visual": 0 * weak})
    terms, plain = MALoss()(parsing, batch), GuidedLoss()(parsing, batch)
    assert all(terms[k] == plain[k] for k in plain)


def test_contrast_weight_tau_and_protocol():
    parsing, batch = toy_parsing(), Batch(None, None, None, torch.ones(4, 3), None, {})
    assert list(MALoss(weight=0)(parsing, batch)) == ["audio", "visual", "video"]
    one, two = (MALoss(weight=w)(parsing, batch)["contrast"] for w in (1, 2))
    torch.testing.assert_close(two, 2 * one)
    assert len({MALoss(tau=t, protocol=p)(parsing, batch)["contrast"].item() for t in (.1, .2) for p in ma.PROTOCOLS}) == 4


@pytest.mark.parametrize("seconds,smoothing,value", [(3, 0, .013386), (3, .1, .513386), (10, 0, .058874), (10, .1, .558874)])
def test_contrast_by_hand(seconds, smoothing, value):
    assert contrast(5 * torch.eye(seconds)[None], smoothing).item() == pytest.approx(value, abs=1e-6)


def test_contrast_in_half_precision_is_computed_in_float32():
    x, e = torch.randn(2, 10, 16), torch.randn(2, 10, 16)
    half = contrastive(x.bfloat16(), e.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, contrastive(x.bfloat16().float(), e.bfloat16().float()))


def test_under_msdu():
    "DGM's MSDU can use it as its baseline"
    net, batch = DGMNet(HAN(**TINY)), Batch(None, None, None, torch.ones(4, 3), None, {})
    terms = MSDULoss(MALoss(GuidedLoss(w_audio=2)))(net(*torch.randn(3, 4, 10, 8)), batch)
    assert list(terms) == ["audio", "visual", "video", "contrast", "ms_audio", "ms_visual"]


@pytest.mark.parametrize("options,message", [
    (dict(tau=0), "tau: 0 is not possible"), (dict(tau=float("nan")), "tau: nan"), (dict(weight=-1), "weight: -1"),
    (dict(protocol="papre"), "did you mean 'paper'?"), (dict(global_target="half"), "expected one of 'official', 'full'")])
def test_loss_refuses(options, message):
    with pytest.raises(InputError) as e:
        MALoss(**options)
    assert message in str(e.value)


def test_similarity_refuses_tau():
    with pytest.raises(InputError, match="tau: -1"):
        similarity(torch.eye(3)[None], torch.eye(3)[None], -1)


def test_recipe():
    assert recipe() == dict(lr=3e-4, batch_size=16, epochs=12, step=10, factor=.1, select="last")
    assert recipe("paper")["epochs"] == 40 and ma.RECIPE["epochs"] == 12
    assert RULES[ma.RULE].gate == "modality"


# ---- partners -------------------------------------------------------------------------------------------------------

def random_weak(n, c=6, p=.3, seed=0):
    return (np.random.default_rng(seed).random((n, c)) < p).astype(np.float32)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("n", [51, 200])
def test_partners_are_disjoint_and_repeatable(symmetric, n):
    weak = random_weak(n)
    weak[weak.sum(1) > 3] = 0                       # some without any label: their partner must still be another video
    j = draw_partners(weak, 5, symmetric=symmetric)
    assert j.shape == (n, 1) and not (weak * weak[j[:, 0]]).any() and (j[:, 0] != np.arange(n)).all()
    assert np.array_equal(j, draw_partners(torch.tensor(weak), 5, symmetric=symmetric))
    assert not np.array_equal(j, draw_partners(weak, 6, symmetric=symmetric))


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_video_without_labels_is_not_its_own_partner(symmetric):
    for seed in range(20):
        assert (draw_partners(np.zeros((4, 2)), seed, symmetric=symmetric)[:, 0] != np.arange(4)).all()


def test_partners_are_uniform():
    "Four videos: the first can be paired with the other three, equally often"
    weak = np.eye(4)
    first = np.array([draw_partners(weak, s)[0, 0] for s in range(600)])
    assert set(first) == {1, 2, 3} and np.bincount(first)[1:].min() > 150


def test_rare_partner_is_found_by_search():
    "2,000 videos of one class and a single other one: rejection would need luck"
    weak = np.zeros((2001, 2))
    weak[:2000, 0], weak[2000, 1] = 1, 1
    j = draw_partners(weak)
    assert (j[:2000] == 2000).all() and j[2000, 0] < 2000


def test_several_partners_are_different():
    j = draw_partners(random_weak(100), n_partners=4)
    assert all(len(set(row)) == 4 for row in j)


def test_symmetric_pairs_are_worked_in():
    "Half the videos share a class and must all marry the other half"
    weak = np.zeros((400, 3))
    weak[:200, 0], weak[200:300, 1], weak[300:, 2] = 1, 1, 1
    j = draw_partners(weak, symmetric=True)[:, 0]
    assert (j[j] == np.arange(400)).mean() > .98


def test_lonely_when_paired():
    "An odd number: one video is left, and gets an ordinary partner"
    j = draw_partners(np.eye(5), symmetric=True)[:, 0]
    assert (j[j] == np.arange(5)).sum() == 4 and (j != np.arange(5)).all()


@pytest.mark.parametrize("weak,options,message", [
    (np.ones((3, 2)), dict(ids=["x", "y", "z"]), "video x: 0 videos share no label with it. expected at least 1"),
    (np.eye(3), dict(n_partners=3), "video 0: 2 videos share no label"),
    (np.ones((3, 2)), dict(symmetric=True), "video 0: 0 videos"),
    (np.eye(3), dict(n_partners=0), "n_partners: 0"), (np.eye(3), dict(n_partners=2, symmetric=True), "pairs have one partner"),
    (.5 * np.eye(3), {}, "weak: values other than 0 and 1"), (np.zeros((0, 3)), {}, "weak: shape (0, 3)"), (np.ones(3), {}, "weak: shape (3,)")])
def test_partners_refuse(weak, options, message):
    with pytest.raises(InputError) as e:
        draw_partners(weak, **options)
    assert message in str(e.value)


# ---- swapping -------------------------------------------------------------------------------------------------------

def toy_clips(n=60, seed=0, per_second=1, T=5, C=3, D=8):
    "Class 0 is only heard, class 1 only seen, and one in five of their labels is missing, so that they are hard to learn"
    rng = np.random.default_rng(seed)
    events = (rng.random((n, T, C)) < .35).astype(np.uint8)
    events[np.arange(n), :, rng.integers(C, size=n)] = 0                     # leaves everybody a disjoint partner
    heard, seen = events * np.array([1, 0, 1], np.uint8), events * np.array([0, 1, 1], np.uint8)
    weak = events.max(1).astype(np.float32)
    weak[:, :2] *= rng.random((n, 2)) > .2
    code = 2 * np.random.default_rng(7).normal(size=(C, D))

    def x(dense):
        return (dense @ code + .3 * rng.normal(size=(n, T, D))).astype(np.float32)
    return Clips([f"toy{i:08d}_0_5" for i in range(n)], x(heard), np.repeat(x(seen), per_second, 1), x(seen), weak,
                 heard, seen, source={"simulated": True, "mark": "toy", "fingerprint": f"toy{seed}"})


def toy_model(seed=0, **options):
    torch.manual_seed(seed)
    return HAN(**TINY, **options)


def by_hand(model, clips, partners):
    "The six arrays, one video and one partner at a time, straight from the model"
    model.eval()
    out = np.zeros((6, len(clips), partners.shape[1], 3))
    for i in range(len(clips)):
        for k, j in enumerate(partners[i]):
            bi, bj = clips.batch([i]), clips.batch([j])
            with torch.no_grad():
                own, sound, picture = (model(a.audio, v.frames, v.motion) for a, v in ((bi, bi), (bj, bi), (bi, bj)))
            out[:, i, k] = np.concatenate([own.audio, own.visual, sound.visual, sound.audio, picture.audio, picture.visual])
    return out.mean(2)


@pytest.mark.parametrize("per_second", [1, 8])
@pytest.mark.parametrize("options", [{}, {"share_layer": False}, {"protocol": "paper"}, {"pooling": "mean"}], ids=str)
def test_swap_test_equals_recomputation(options, per_second):
    clips, model = toy_clips(12, per_second=per_second), toy_model(**options)
    assert ma.reusable(model) == (options in ({}, {"share_layer": False}))
    partners = draw_partners(clips.weak, n_partners=2)
    expected = by_hand(model, clips, partners)
    for reuse in (True, False):
        for x, y in zip(swap_test(model, clips, partners, batch_size=5, reuse=reuse), expected):
            np.testing.assert_allclose(x, y, atol=1e-5)


def test_tracks_of_a_model_with_separate_heads():
    clips, model = toy_clips(12), DGMNet(toy_model()).backbone
    assert not model.head.shared and ma.reusable(model)
    partners = draw_partners(clips.weak)
    for x, y in zip(swap_test(model, clips, partners), by_hand(model, clips, partners)):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_swap_test_leaves_the_model_as_it_was():
    clips, model = toy_clips(12), toy_model().train()
    partners = draw_partners(clips.weak)
    first, second = swap_test(model, clips, partners), swap_test(model, clips, partners)      # no dropout inside
    assert model.training and all(np.array_equal(x, y) for x, y in zip(first, second))
    assert all(not m.training for m in model.eval().modules()) and swap_test(model, clips, partners) and not model.training


@pytest.mark.parametrize("symmetric,passes", [(False, 3), (True, 2)])
def test_symmetric_pairs_halve_the_swapped_passes(symmetric, passes, monkeypatch):
    "Every assembled video is computed once: N own pairs and 2N, or N, exchanged ones"
    clips, asked = toy_clips(60), []
    weak = np.eye(3)[np.arange(60) % 3]
    partners = draw_partners(weak, symmetric=symmetric)
    if symmetric:
        assert (partners[partners[:, 0], 0] == np.arange(60)).all()
    real = ma_swap.assembled_from_tracks
    monkeypatch.setattr(ma_swap, "assembled_from_tracks", lambda m, c, a, v, b: (asked.append(len(a)), real(m, c, a, v, b))[1])
    found = swap_test(toy_model(), clips, partners)
    shared_draws = sum(partners[j, 0] == i for i, j in enumerate(partners[:, 0])) if not symmetric else 0
    assert asked == [passes * 60 - shared_draws]
    for x, y in zip(found, swap_test(toy_model(), clips, partners, reuse=False)):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_swap_test_refuses_foreign_positions():
    with pytest.raises(InputError, match="partners: not positions"):
        swap_test(toy_model(), toy_clips(6), np.full(6, 6))
    with pytest.raises(InputError, match="partners: not positions"):
        swap_test(toy_model(), toy_clips(6), np.zeros((6, 1)))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_swap_test_cuda():
    clips, model = toy_clips(60), toy_model()
    partners = draw_partners(clips.weak)
    here = swap_test(model, clips, partners)
    for x, y in zip(swap_test(model.cuda(), clips.to("cuda"), partners), here):
        np.testing.assert_allclose(x, y, atol=1e-4)


# ---- refinement -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("u_v,u_a,expected", [(.2, .1, [False, True]), (.1, .05, [True, True]), (.6, .1, [False, False]), (.125, .1, [False, True])])
def test_refine_by_hand(u_v, u_a, expected):
    "Accuracies (.9,.6): E = (.25,1); a quotient of exactly .5 keeps the label"
    x, sure, weak = np.full((1, 2), u_v), np.ones((1, 2)), np.ones((1, 2))
    audio, visual = refine_labels(x, 0 * x + u_a, sure, sure, weak, [.1, .4], [.1, .4])
    assert visual[0].tolist() == expected and not audio.any()
    audio, visual = refine_labels(sure, sure, x, 0 * x + u_a, weak, [.1, .4], [.1, .4])      # the same for the sound
    assert audio[0].tolist() == expected and not visual.any()


def test_each_modality_has_its_own_error():
    p, one = np.full((1, 2), .3), np.ones((1, 2))
    audio, visual = refine_labels(p, p, p, p, one, visual_error=[1, .1], audio_error=[.1, 1])
    assert visual[0].tolist() == [True, False] and audio[0].tolist() == [False, True]


def test_never_wrong_keeps_everything():
    audio, visual = refine_labels(*np.zeros((4, 2, 2)), np.ones((2, 2)), [0, 1], [0, 0])
    assert not audio.any() and visual.tolist() == [[False, True]] * 2


def test_only_given_labels_are_removed():
    weak = random_weak(50)
    audio, visual = refine_labels(*np.zeros((4, 50, 6)), weak, np.ones(6), np.ones(6))
    assert np.array_equal(audio, weak > 0) and np.array_equal(visual, weak > 0)


GOOD = dict(v_a=np.full((2, 2), .5), a_a=np.full((2, 2), .5), a_v=np.full((2, 2), .5), v_v=np.full((2, 2), .5), weak=np.eye(2),
            visual_error=np.ones(2), audio_error=np.ones(2))


@pytest.mark.parametrize("name,value,message", [
    ("a_a", np.zeros((2, 3)), "a_a: shape (2, 3). expected (2, 2)"), ("v_v", np.full((2, 2), 1.5), "v_v: values outside [0,1]"),
    ("a_v", np.full((2, 2), np.nan), "a_v: values outside [0,1], or NaN"), ("weak", np.full((2, 2), .05), "weak: values other than 0 and 1"),
    ("visual_error", np.ones(3), "visual_error: shape (3,). expected 2 error rates"), ("audio_error", -np.ones(2), "audio_error: values outside [0,1]"),
    ("threshold", float("nan"), "threshold: nan is not possible")])
def test_refine_labels_refuses(name, value, message):
    refine_labels(**GOOD)
    with pytest.raises(InputError) as e:
        refine_labels(**{**GOOD, name: value})
    assert message in str(e.value)


@pytest.fixture(scope="module")
def base():
    "A base model of the toy problem"
    clips = toy_clips(200)
    return clips, Learner(toy_model(), clips, MALoss(), lr=1e-2, epochs=8, device="cpu").fit().model


@pytest.fixture(scope="module")
def found(base):
    return refine(base[1], base[0])


def test_three_stages(base):
    "Class 0 loses its visual labels, and the retrained model sees it less"
    clips, model = base
    found = refine(model, clips)
    score = found.score(clips).set_index(["modality", "class"])
    visual = score.loc[("visual", "class 0")]
    assert visual["share_false"] == 1 and visual["removed"] > 10
    assert score.loc[("visual", "all"), "precision"] > score.loc[("visual", "all"), "share_false"]
    stage3 = found.apply(clips)
    assert set(stage3.labels) == {"removed_audio", "removed_visual"} and clips.labels == {}
    final, plain = (Learner(toy_model(), c, MALoss(), lr=1e-2, epochs=8, device="cpu").fit().model for c in (stage3, clips))
    gone = found.removed_visual[:, 0]
    assert predict(final, clips).visual[gone, 0].mean() < .8 * predict(plain, clips).visual[gone, 0].mean()


@pytest.mark.parametrize("which,keys", [("audio", {"removed_audio"}), ("visual", {"removed_visual"}), ("both", {"removed_audio", "removed_visual"})])
def test_apply_carries_labels_into_batches(base, found, which, keys):
    batch = found.apply(base[0], which).batch([3, 1])
    assert set(batch.labels) == keys
    for k, x in batch.labels.items():
        assert torch.equal(x, torch.tensor(getattr(found, k)[[3, 1]]).float())


def test_refine_is_repeatable_and_keeps_what_led_to_it(base, found):
    clips, model = base
    again = refine(model, clips)
    assert np.array_equal(again.removed_visual, found.removed_visual) and np.array_equal(again.partners, found.partners)
    audio, visual = refine_labels(*found.swap[2:], clips.weak, found.errors.visual, found.errors.audio, found.threshold)
    assert np.array_equal(audio, found.removed_audio) and np.array_equal(visual, found.removed_visual)
    assert not np.array_equal(refine(model, clips, seed=9).partners, found.partners)
    assert refine(model, clips, n_partners=3).partners.shape == (200, 3)
    assert found.source == {"mark": "toy", "fingerprint": "toy0", "seed": 2, "symmetric": False}


def test_table_and_score_count(base, found):
    t, s = found.table(["x", "y", "z"]), found.score(base[0], ["x", "y", "z"]).set_index(["modality", "class"])
    assert t.loc["x", "labels"] == base[0].weak[:, 0].sum() and t.loc["all", "removed_visual"] == found.removed_visual.sum()
    assert t.loc["all", "removed_both"] == (found.removed_visual & found.removed_audio).sum()
    seen = base[0].modality_labels()[1]
    right = (found.removed_visual & (seen == 0)).sum()
    false = ((base[0].weak > 0) & (seen == 0)).sum()
    assert s.loc[("visual", "all"), "precision"] == pytest.approx(right / found.removed_visual.sum())
    assert s.loc[("visual", "all"), "recall"] == pytest.approx(right / false)
    none = Refinement(found.ids, found.rows, found.weak, 0 * found.removed_audio > 0, 0 * found.removed_visual > 0)
    assert none.score(base[0])["precision"].isna().all()
    with pytest.raises(InputError, match="classes: 2 names"):
        found.table(["x", "y"])


def test_score_needs_the_truth(base, found):
    clips = base[0]
    blind = Clips(clips.ids, clips.audio, clips.frames, clips.motion, clips.weak)
    with pytest.raises(InputError, match="no dense labels"):
        found.score(blind)


def test_why_names_both_confidences(found):
    i, c = np.argwhere(found.removed_visual)[0]
    text = found.why(int(i))
    assert text == found.why(found.ids[i]) and found.ids[found.partners[i, 0]] in text
    line = [x for x in text.splitlines() if "visual label REMOVED" in x][0]
    e = found.errors.visual[c]
    for x in (found.swap.a_a[i, c], found.swap.v_a[i, c], found.swap.a_a[i, c] / e, found.swap.v_a[i, c] / e):
        assert f"{x:.2f}" in line
    for wrong in ("toy", 200, -201):
        with pytest.raises(InputError):
            found.why(wrong)


def test_save_and_load(base, found, tmp_path):
    found.save(tmp_path / "deep" / "r.npz")
    back = Refinement.load(tmp_path / "deep" / "r.npz")
    for k in ("rows", "weak", "removed_audio", "removed_visual", "partners"):
        assert np.array_equal(getattr(back, k), getattr(found, k))
    assert all(np.array_equal(x, y) for x, y in zip(back.swap, found.swap))
    assert (back.ids, back.threshold, back.source, back.fingerprint) == (found.ids, found.threshold, found.source, found.fingerprint)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["r.npz"]
    assert len(back.apply(base[0])) == 200


def test_a_list_survives_saving(base, found, tmp_path):
    found.removals().to_csv(tmp_path / "l.csv", index=False)
    read_removed(tmp_path / "l.csv", base[0]).save(tmp_path / "l.npz")
    back = Refinement.load(tmp_path / "l.npz")
    assert back.swap is None and back.partners is None and np.array_equal(back.removed_audio, found.removed_audio)
    assert back.errors is None and "from a list" in back.why(int(np.argwhere(found.removed_visual)[0][0]))


def test_load_refuses(found, tmp_path):
    path = tmp_path / "r.npz"
    with pytest.raises(InputError, match="no such file"):
        Refinement.load(path)
    found.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(InputError, match="cannot be read as a refinement"):
        Refinement.load(path)
    np.savez(path, ids=np.array(["x"], dtype=object))
    with pytest.raises(InputError, match="cannot be read as a refinement"):
        Refinement.load(path)
    path.write_bytes(whole)
    with np.load(path) as z:
        arrays = {k: z[k] for k in z.files}
    np.savez(path, **{**arrays, "ids": arrays["ids"][::-1]})
    with pytest.raises(InputError, match="fingerprint do not fit"):
        Refinement.load(path)


def test_apply_refuses_other_clips(base, found):
    clips = base[0]
    for other, message in [(clips[:10], "refinement of 200 videos. expected 10"), (clips[::-1], "expected toy00000199_0_5"),
                           (toy_clips(200, seed=1), "had other labels")]:
        with pytest.raises(InputError) as e:
            found.apply(other)
        assert message in str(e.value)
        with pytest.raises(InputError):
            found.score(other)
    with pytest.raises(InputError, match="expected one of 'audio', 'visual', 'both'"):
        found.apply(clips, "sound")


# ---- published lists ------------------------------------------------------------------------------------------------

def test_list_roundtrip_and_part(base, found, tmp_path):
    found.removals().to_csv(tmp_path / "l.csv", index=False)
    assert list(pd.read_csv(tmp_path / "l.csv").columns[:6]) == list(ma.LIST_COLUMNS)
    back = read_removed(tmp_path / "l.csv", base[0])
    assert np.array_equal(back.removed_audio, found.removed_audio) and np.array_equal(back.removed_visual, found.removed_visual)
    part = read_removed(tmp_path / "l.csv", base[0][50:], on_missing="drop")
    assert np.array_equal(part.removed_visual, found.removed_visual[50:])


@pytest.mark.parametrize("change,message", [
    ({"filename": "nobody_0_5"}, "l.csv:2: video 'nobody_0_5' is not among the clips"), ({"class_id": 7}, "l.csv:2: class 7"),
    ({"class_id": .5}, "l.csv:2: class 0.5"), ({"removed_audio": 2}, "l.csv:2: class")])
def test_list_refuses(base, found, tmp_path, change, message):
    found.removals().assign(**change).to_csv(tmp_path / "l.csv", index=False)
    with pytest.raises(InputError) as e:
        read_removed(tmp_path / "l.csv", base[0])
    assert message in str(e.value)


def test_list_refuses_labels_the_video_never_had(base, tmp_path):
    clips = base[0]
    i, c = np.argwhere(clips.weak == 0)[0]
    row = dict(zip(ma.LIST_COLUMNS, (i, clips.ids[i], c, "x", 1, 0)))
    pd.DataFrame([row]).to_csv(tmp_path / "l.csv", index=False)
    with pytest.raises(InputError, match="expected a class on the video's weak label"):
        read_removed(tmp_path / "l.csv", clips)


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2,3\n4,5,6,7\n", b"\xff\xfe\x00"])
def test_list_refuses_what_is_no_table(base, tmp_path, content):
    (tmp_path / "l.csv").write_bytes(content)
    with pytest.raises(InputError, match="l.csv"):
        read_removed(tmp_path / "l.csv", base[0])


def test_the_published_list(llp, llp_stats):
    "Its counts per class, and what the notebook says about it"
    train = load_annotations(llp)["train"]
    nothing = np.broadcast_to(np.zeros((1, 1, 1), np.float32), (len(train.ids), 10, 1))
    clips = Clips(list(train.ids), nothing, nothing, nothing, train.weak)
    ref = read_removed(llp_stats / "ma_removed_labels.csv", clips)
    ours = ref.removals().sort_values(["train_index", "class_id"]).reset_index(drop=True)
    theirs = pd.read_csv(llp_stats / "ma_removed_labels.csv").sort_values(["train_index", "class_id"]).reset_index(drop=True)
    assert (ours[list(ma.LIST_COLUMNS)].to_numpy() == theirs[list(ma.LIST_COLUMNS)].to_numpy()).all()
    noise, table = pd.read_csv(llp_stats / "label_noise_ma_jomold_true.csv").set_index("class"), ref.table()
    for m in ("audio", "visual", "both"):
        assert (table.drop("all")[f"removed_{m}"] == noise[f"ma_removed_{m}"]).all()
    speech, labels = noise.loc["Speech"], noise.loc["Speech", "n_train_label"]
    assert 8 < speech["ma_removed_audio"] / (speech["true_rate_audio_valtest"] * labels) < 15
    assert speech["ma_removed_visual"] < speech["true_rate_visual_valtest"] * labels



def test_assembled_orders_its_arguments():
    "First whose sound, then whose picture"
    clips, model = toy_clips(6), toy_model().eval()
    a, v = clips.batch([4]), clips.batch([2])
    with torch.no_grad():
        out = model(a.audio, v.frames, v.motion)
    np.testing.assert_allclose(assembled(model, clips, np.array([4]), np.array([2]))[0], np.concatenate([out.audio, out.visual]), atol=1e-6)
