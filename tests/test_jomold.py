"""Parity of JoMoLD with the released code: forward passes, losses, gradients, noise ratios and denoising; and its callback."""
import numpy as np
import pytest
import torch
from conftest import close
from hypothesis import given, settings
from hypothesis import strategies as st
from test_han import VARIANTS, fill

from avvp_nb.core import InputError, read_json, shared
from avvp_nb.data.clips import Batch, Clips
from avvp_nb.methods.dgm import DGM, DGMNet, MSDULoss
from avvp_nb.methods.jomold import (
    ESTIMATOR_LOSS,
    LOSS,
    RECIPE,
    RELEASED_RATIOS,
    UNUSED,
    WARMUPS,
    DenoiseCB,
    JoMoLD,
    JoMoLDLoss,
    NoiseEstimator,
    class_means,
    contrastive,
    denoise_labels,
    estimate_ratios,
    jomold_keys,
    mixture_nce,
    noise_ratios,
    similarities,
    used_ratio,
)
from avvp_nb.methods.losses import GuidedLoss, bce_each, without_removed
from avvp_nb.methods.official import from_official
from avvp_nb.metrics import RULES
from avvp_nb.train.callbacks import CheckpointCB, ValidateCB
from avvp_nb.train.learner import Learner, predict

TINY = dict(classes=3, audio_dim=8, frame_dim=8, motion_dim=8, dim=16)
DENOISE = ["epoch1", "epoch2", "epoch2_warm3", "nowarm", "truncation"]


@pytest.fixture(scope="module")
def official_keys(golden):
    keys = read_json(shared("golden", "state_dict_keys.json"))["jomold"]["keys"]
    return {k["key"]: k["shape"] for k in keys}


@pytest.fixture(scope="module")
def inputs(golden):
    return {k: torch.tensor(v) for k, v in golden("inputs_b3").items()}


def build(official_keys, variant, model=JoMoLD):
    "Our network with the official tensors of the fill rule"
    given_, model = fill(official_keys, "chirp" if variant else "sine"), model()
    own = model.state_dict()
    for official, ours, rows in jomold_keys(): own[ours][rows] = given_[official]
    model.load_state_dict(own)
    return model.eval()     # switches every dropout off, as the reference runs did


def forward(model, inputs, **kwargs):
    return model(*(inputs[k] for k in ("audio", "visual", "visual_st")), **kwargs)


# ---- the network

def test_every_official_tensor_is_used_or_known_to_be_unused(official_keys):
    used = {o for o, _, _ in jomold_keys()}
    assert len(used) == 30 and used <= set(official_keys)
    assert all(k.startswith(UNUSED) for k in set(official_keys) - used)


def test_the_authors_file_is_read(golden, official_keys, inputs):
    "A dictionary with the weights under `model`, among other entries, and two norms that nobody calls"
    file = {"model": fill(official_keys, "chirp"), "epochs": 25, "optimizer": {}}
    model = from_official(file, "jomold", strict=True)
    with torch.no_grad(): close(golden("jomold_forward_ca_chirp"), "frame_prob", forward(model, inputs).segments)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ca", [True, False])
def test_forward(golden, official_keys, inputs, variant, ca):
    case = golden(f"jomold_forward_{'ca' if ca else 'noca'}{variant}")
    model = build(official_keys, variant)
    with torch.no_grad():
        out = forward(model, inputs, cross_attention=ca)
        sims = similarities(*out.extra["attended"]).flatten(0, 1)
    for key, value in {"global_prob": out.video, "a_prob": out.audio, "v_prob": out.visual, "frame_prob": out.segments,
                       "sims": sims}.items():
        close(case, key, value)
    close(case, "mask", torch.arange(10).repeat(3))     # the right column of each row, as `mixture_nce` assumes


def test_estimator_is_the_network_without_cross_attention(golden, official_keys, inputs):
    case, model = golden("jomold_forward_noca_chirp"), build(official_keys, "_chirp", NoiseEstimator)
    with torch.no_grad(): out = forward(model, inputs)
    close(case, "frame_prob", out.segments)
    assert not torch.allclose(forward(model, inputs, cross_attention=True).segments, out.segments, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stage", ["estimator", "train"])
def test_loss_and_gradients(golden, official_keys, inputs, variant, stage):
    case = golden(f"jomold_{stage}_loss{variant}")
    model, loss = build(official_keys, variant, NoiseEstimator if stage == "estimator" else JoMoLD), ESTIMATOR_LOSS if stage == "estimator" else LOSS
    terms = loss(forward(model, inputs), Batch(None, None, None, torch.tensor(case["label"]), None, {}))
    total = sum(terms.values())
    total.backward()
    for key, name, weight in [("loss_audio", "audio", loss.w_audio), ("loss_visual", "visual", 1), ("loss_global", "video", 1),
                              ("loss_nce", "contrast", 1)]:
        close(case, key, terms[name].detach() / weight)
    close(case, "loss_total", total.detach())
    own = {k: p.grad for k, p in model.named_parameters()}
    grads = {o: own[m][rows] for o, m, rows in jomold_keys() if own[m] is not None}
    for key in [k for k in case if k.startswith("grad.")]: close(case, key, grads[key[5:]])
    norms = np.array([grads[k].norm().item() if k in grads else np.nan for k in case.info["parameter_keys"]])
    untouched = np.isnan(case["grad_norms"])            # there: no gradient. Here such rows of a larger matrix have gradient 0
    assert (np.nan_to_num(norms[untouched]) == 0).all()
    close(case, "grad_norms", np.where(untouched, np.nan, norms))


def test_wrong_order_of_smoothing_is_detected(golden, official_keys, inputs):
    "The parity test has teeth: MA's form of the contrastive term is another number"
    case, model = golden("jomold_train_loss_chirp"), build(official_keys, "_chirp")
    with torch.no_grad(): sims = similarities(*forward(model, inputs).extra["attended"])
    q = torch.full((10, 10), .1 / 9).fill_diagonal_(.9)
    with pytest.raises(AssertionError): close(case, "loss_nce", -(q * sims.log_softmax(-1)).sum(-1).mean())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda(golden, official_keys, inputs):
    case, model = golden("jomold_forward_ca_chirp"), build(official_keys, "_chirp").cuda()
    with torch.no_grad(): out = forward(model, {k: v.cuda() for k, v in inputs.items()})
    close(case, "frame_prob", out.segments.cpu())
    rng = np.random.default_rng(0)
    arrays = rng.random((64, 25)), rng.random((64, 25)), (rng.random((64, 25)) > .5).astype(float)
    mine = denoise_labels(*(torch.tensor(x).cuda() for x in arrays), *RELEASED_RATIOS)
    for a, b in zip(mine, denoise_labels(*arrays, *RELEASED_RATIOS)): np.testing.assert_array_equal(a.cpu().numpy(), b)


def test_stacked_layers_feed_each_other():
    torch.manual_seed(0)
    deep, x = JoMoLD(**TINY, n_layers=3).eval(), [torch.randn(2, 4, 8) for _ in range(3)]
    e = deep.project(*x)
    for layer in deep.layers: e = layer(*e), layer(*e[::-1])
    for a, b in zip(deep(*x).extra["attended"], e): torch.testing.assert_close(a, b)
    deep.tie = lambda p, m: p                          # the path of tied copies gives the same
    for a, b in zip(deep(*x).extra["attended"], e): torch.testing.assert_close(a, b)


def test_dropout_is_on_vision_only_and_extra_is_before_it():
    torch.manual_seed(0)
    net, x = JoMoLD(**TINY, dropout=0., visual_dropout=1.), [torch.randn(2, 4, 8) for _ in range(3)]
    out, ref = net(*x), net.eval()(*x)
    assert torch.equal(out.audio, ref.audio)
    torch.testing.assert_close(out.visual, net.head(*(torch.zeros(2, 4, 16),) * 2).visual)     # everything dropped: the biases
    for a, b in zip(out.extra["attended"], ref.extra["attended"]): assert torch.equal(a, b)


@pytest.mark.parametrize("kw", [dict(msdu=True), dict(msdu=False), dict(msdu=False, shared="split"), dict(msdu=True, shared="split")])
def test_backbone_of_dgm(kw):
    torch.manual_seed(0)
    net, x = DGMNet(JoMoLD(**TINY, n_layers=2), **kw), [torch.randn(2, 4, 8) for _ in range(3)]
    batch = Batch(*x, torch.tensor([[1., 0, 0], [0, 1, 1]]), None, {})
    terms = MSDULoss(LOSS)(net(*x), batch)
    assert list(terms)[:4] == ["audio", "visual", "video", "contrast"]
    assert ("ms_audio" in terms) == kw["msdu"]
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in net.parameters())


# ---- the loss

def test_contrastive(golden):
    case = golden("jomold_nce")
    x1, x2 = (torch.tensor(case[k], requires_grad=True) for k in ("x1", "x2"))
    close(case, "sims", similarities(x1, x2).flatten(0, 1).detach())
    loss = contrastive(x1, x2)
    loss.backward()
    close(case, "loss", loss.detach())
    close(case, "grad_x1", x1.grad)
    close(case, "grad_x2", x2.grad)


@pytest.mark.parametrize("T, want", [(3, .117998), (10, .163486)])
def test_contrastive_by_hand(T, want):
    assert mixture_nce(5 * torch.eye(T)).item() == pytest.approx(want, abs=1e-6)


def test_perfect_similarity_reaches_the_floor():
    assert mixture_nce(1000 * torch.eye(10)).item() == pytest.approx(.105361, abs=1e-6)


def test_removed_labels_get_target_zero_and_video_keeps_them():
    weak = torch.tensor([[1., 1, 0]])
    gone = torch.tensor([[0., 1, 0]])
    batch = Batch(None, None, None, weak, None, {"removed_visual": gone, "removed_audio": gone})
    for loss in (LOSS, GuidedLoss()):
        audio, visual = loss.targets(batch)
        torch.testing.assert_close(audio, torch.tensor([[1., 0, 0]]))
        torch.testing.assert_close(visual, torch.tensor([[.95, 0, .05]]))
        assert visual[0, 1] == 0
    model, x = JoMoLD(**TINY).eval(), [torch.randn(1, 4, 8) for _ in range(3)]
    with_, without = LOSS(model(*x), batch), LOSS(model(*x), batch._replace(labels={}))
    assert with_["video"] == without["video"] and with_["contrast"] == without["contrast"]
    assert with_["audio"] != without["audio"] and with_["visual"] != without["visual"]


@pytest.mark.parametrize("make, said", [
    (lambda: JoMoLDLoss(temperature=0.), "temperature: 0.0 is not possible"),
    (lambda: JoMoLDLoss(smoothing=1.), "smoothing: 1.0 is not possible"),
    (lambda: JoMoLDLoss(features="MA"), "features: 'MA' is not possible"),
    (lambda: JoMoLDLoss(eps_visual=2.), "eps_visual: 2.0 is not possible"),
    (lambda: JoMoLD(n_layers=0), "n_layers: 0 is not possible"),
    (lambda: noise_ratios(np.ones((2, 3)), np.ones((2, 3)), np.ones((2, 4))), "noise_ratios: shapes (2, 3), (2, 3), (2, 4)"),
    (lambda: noise_ratios(*np.ones((3, 0, 3))), "noise_ratios: shapes (0, 3)"),
    (lambda: denoise_labels(np.ones((2, 3)), np.ones((2, 3)), np.ones((2, 4)), [0.] * 3, [0.] * 3), "denoise_labels: shapes (2, 3), (2, 3), (2, 4)"),
    (lambda: denoise_labels(np.ones((2, 3)), np.ones((2, 3)), np.ones((2, 3)), [0.] * 3, [0.] * 2), "noise ratio: has shape (2,). expected (3,)"),
    (lambda: used_ratio(np.ones(1), 0, 0, 1, "off"), "warmup: 'off' is not possible"),
    (lambda: DenoiseCB([.5, -.1], [0., 0.]), "ratio_audio: a ratio is not a share"),
    (lambda: DenoiseCB([.5, .1], [0., np.nan]), "ratio_visual: a ratio is not a share"),
    (lambda: DenoiseCB([.5], [.5], warmup="lin"), "warmup: 'lin' is not possible"),
    (lambda: DenoiseCB([.5], [.5], warm_epochs=0), "warm_epochs: 0 is not possible"),
])
def test_refusals(make, said):
    with pytest.raises(InputError) as e: make()
    assert said in str(e.value)


def test_removed_labels_of_another_shape_are_refused():
    with pytest.raises(InputError, match="removed labels: has shape"): without_removed(torch.ones(2, 3), torch.ones(3))


# ---- noise ratios

def test_noise_ratios(golden):
    case = golden("jomold_noise_ratio")
    for kw in ({}, {"batch": 32}):
        audio, visual = noise_ratios(case["a_prob"], case["v_prob"], case["label"], **kw)
        close(case, "noise_ratio_audio", audio)
        close(case, "noise_ratio_visual", visual)
    flat = [torch.tensor(case[k]).flatten(0, 1) for k in ("a_prob", "v_prob", "label")]
    close(case, "noise_ratio_visual", noise_ratios(*flat)[1])
    with pytest.raises(AssertionError): close(case, "noise_ratio_visual", noise_ratios(*flat, factor=1.)[1])


def test_batch_means_weigh_the_last_batch_like_any_other():
    p = np.arange(5.)[:, None] / 4
    assert class_means(p).item() == pytest.approx(.5)
    assert class_means(p, 4).item() == pytest.approx((.375 + 1) / 2)


def test_released_ratios_are_those_of_the_file(llp):
    with np.load(llp / "jomold_noise_ratios.npz") as z:
        for mine, key in zip(RELEASED_RATIOS, ("audio", "visual")): np.testing.assert_array_equal(mine, z[key])


def test_released_ratios_are_shares_of_the_training_labels(llp):
    from avvp_nb.data.annotations import load_annotations
    from avvp_nb.methods.jomold import POSITIVES
    np.testing.assert_array_equal(load_annotations(llp)["train"].weak.sum(0), POSITIVES)


def test_released_ratios_as_printed():
    audio = [.0646, .0561, .0208, .0407, .0677, .0496, .0440, .0229, .0736, .0465, .0161, .0444, .0435, .0398, .0343, .0205, .0539, .0446,
             .0389, .0426, .0437, .0303, .0372, .0378, .0488]
    visual = [.9940, .0353, .0909, .0815, .0833, .0787, .0286, .0550, .0769, .1179, .1720, .1416, .0481, .1620, .0687, .0959, .1416, .0759,
              .0754, .0664, .1670, .1717, .0860, .0481, .2561]
    np.testing.assert_allclose(RELEASED_RATIOS, [audio, visual], atol=5.001e-5)


# ---- denoising

@pytest.mark.parametrize("name", DENOISE)
def test_denoising(golden, name):
    case = golden(f"jomold_denoise_{name}")
    o, removed_any = case.info["options"], 0
    warm = dict(warmup=None) if o["warm_up_epoch"] is None else dict(warm_epochs=o["warm_up_epoch"])
    for i in range(len(case["Pa"])):
        pa, pv = (torch.tensor(case[k][i]) for k in ("Pa", "Pv"))
        losses = [bce_each(torch.tensor(case[k][i]), p) for k, p in (("a_prob", pa), ("v_prob", pv))]
        ratios = [used_ratio(case[f"noise_ratio_{m}"], o["epoch"] - 1, i, o["iterations_per_epoch"], **warm) for m in ("audio", "visual")]
        removed = denoise_labels(*losses, pa, *ratios)
        for m, r, p, key in zip(("audio", "visual"), removed, (pa, pv), ("Pa_out", "Pv_out")):
            np.testing.assert_array_equal(r.numpy(), case[f"zeroed_{m}"][i], err_msg=f"{m}, batch {i}")
            np.testing.assert_array_equal(without_removed(p, r).numpy(), case[key][i])
            assert r.sum().item() == case.info["values"][f"zeroed_{m}"][i]
            removed_any += r.sum().item()
        as_arrays = denoise_labels(*(x.numpy() for x in (*losses, pa)), *ratios)
        for a, b in zip(as_arrays, removed): np.testing.assert_array_equal(a, b.numpy())
    assert (removed_any > 0) == (name != "epoch1")


def test_rounded_counts_are_detected(golden):
    "The parity test has teeth: float32 ratios give other counts"
    case = golden("jomold_denoise_truncation")
    losses = [bce_each(torch.tensor(case[k][0]), torch.tensor(case[p][0])) for k, p in (("a_prob", "Pa"), ("v_prob", "Pv"))]
    almost = [case[f"noise_ratio_{m}"] + 1e-12 for m in ("audio", "visual")]
    removed = denoise_labels(*losses, torch.tensor(case["Pa"][0]), *almost)
    assert (removed[0].numpy() != case["zeroed_audio"][0]).any()


def test_denoising_by_hand():
    l_a, l_v = np.array([[.1], [.2], [.9], [.8]]), np.array([[1.], [.3], [.9], [.2]])
    audio, visual = denoise_labels(l_a, l_v, np.ones((4, 1)), [.25], [.5])
    assert visual[:, 0].tolist() == [True, False, False, False] and not audio.any()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 10**6))
def test_denoising_equals_sorting_class_by_class(B, C, seed):
    rng = np.random.default_rng(seed)
    l_a, l_v, y = rng.random((B, C)), rng.random((B, C)), rng.random((B, C)) > rng.random()
    r_a, r_v = rng.random(C), rng.random(C)
    audio, visual = denoise_labels(l_a, l_v, y.astype(np.float32), r_a, r_v)
    for c in range(C):
        who = np.flatnonzero(y[:, c])
        k_a, k_v = int(r_a[c] * len(who)), int(r_v[c] * len(who))
        by_a, by_v = list(who[l_a[who, c].argsort()]), list(who[l_v[who, c].argsort()])
        assert set(np.flatnonzero(visual[:, c])) == set(by_a[:k_v]) & set(by_v[len(who) - k_v:])
        assert set(np.flatnonzero(audio[:, c])) == set(by_a[len(who) - k_a:]) & set(by_v[:k_a])
    order = rng.permutation(B)
    shuffled = denoise_labels(l_a[order], l_v[order], y[order].astype(np.float32), r_a, r_v)
    np.testing.assert_array_equal(shuffled[0], audio[order])
    np.testing.assert_array_equal(shuffled[1], visual[order])


def test_both_labels_can_go_only_where_the_counts_overlap():
    rng = np.random.default_rng(0)
    l_a, l_v, y = rng.random((50, 2)), rng.random((50, 2)), np.ones((50, 2))
    audio, visual = denoise_labels(l_a, l_v, y, [.4, .4], [.994, .6])       # second class: 20 + 30 = 50, no overlap
    both = (audio & visual).any(0)
    assert both[0] and not both[1]


def test_official_warmup_is_never_a_ramp():
    r = np.array([.5, 1.])
    assert all((used_ratio(r, 0, i, 79) == 0).all() for i in range(79))
    assert all((used_ratio(r, e, i, 79) == r).all() for e in (1, 2, 24) for i in range(79))
    ramp = [used_ratio(r, 0, i, 79, "linear")[1] for i in range(79)]
    assert ramp == sorted(ramp) and ramp[0] == 0 and ramp[72] == 1 and 0 < ramp[1] < .02


# ---- training

def toy(n, seed=0, T=4, C=3, D=8):
    "Videos in which class 0 is heard only"
    rng = np.random.default_rng(seed)
    heard = rng.random((n, T, C)) < .09     # a class in more than half of the videos would be all noise by arithmetic
    seen = heard & (np.arange(C) > 0)
    code = np.random.default_rng(7).normal(size=(2, C, D))
    x = lambda y, c: (y @ c + .4 * rng.normal(size=(n, T, D))).astype(np.float32)
    return Clips([f"toy{i:08d}_0_4" for i in range(n)], x(heard, code[0]), x(seen, code[1]), x(seen, code[1]),
                 heard.max(1).astype(np.float32), heard.astype(np.uint8), seen.astype(np.uint8))


def fit(*callbacks, net=None, loss=LOSS, epochs=4, n=96, **kw):
    torch.manual_seed(0)
    return Learner(net or JoMoLD(**TINY), toy(n), loss, lr=5e-3, batch_size=32, epochs=epochs, device="cpu", callbacks=callbacks, **kw).fit()


def weights(learner): return [p.detach().clone() for p in learner.model.parameters()]


def same(a, b): return all(torch.equal(p, q) for p, q in zip(weights(a), weights(b)))


def test_three_stages_end_to_end():
    train, valid = toy(300), toy(100, seed=1)
    settings_ = dict(lr=5e-3, batch_size=32, epochs=8, device="cpu")
    torch.manual_seed(0)
    estimator = Learner(NoiseEstimator(**TINY), train, ESTIMATOR_LOSS, **settings_).fit().model
    ratios = estimate_ratios(estimator, train)
    assert ratios[1][0] > .8 > ratios[1][1:].max()               # class 0 is never seen
    assert ratios[0].max() < .3
    v = {}
    for name, cbs in (("plain", []), ("denoised", [DenoiseCB(*ratios)])):
        torch.manual_seed(0)
        keep = ValidateCB(valid, rule="jomold", select=RECIPE["select"])
        learner = Learner(JoMoLD(**TINY), train, LOSS, **settings_, callbacks=[keep, *cbs]).fit()
        pred = RULES["jomold"].decide(predict(learner.model, valid))[1]
        v[name] = pred[..., 0].mean(), learner.history
    assert v["denoised"][0] < .5 * v["plain"][0]                 # fewer false sightings of class 0
    assert v["denoised"][1][0]["denoise"] == {"removed_audio": 0., "removed_visual": 0.}
    assert v["denoised"][1][-1]["denoise"]["removed_visual"] > .1
    assert list(v["denoised"][1][0]["loss"]) == ["audio", "visual", "video", "contrast"]


def test_callback_writes_what_the_functions_say():
    "One batch, replayed by hand with the same random state"
    class Look(DenoiseCB):
        def before_batch(self, learner):
            state = torch.get_rng_state()
            super().before_batch(learner)
            after = torch.get_rng_state()
            torch.set_rng_state(state)
            b = learner.batch
            with torch.no_grad(): p = learner.model(b.audio, b.frames, b.motion, cross_attention=False)
            losses = bce_each(p.audio, b.weak), bce_each(p.visual, .9 * b.weak + .05)
            for mine, want in zip(denoise_labels(*losses, b.weak, *self.ratios), (b.labels["removed_audio"], b.labels["removed_visual"])):
                assert torch.equal(mine.float(), want)
            assert torch.equal(torch.get_rng_state(), after) and learner.model.training
            self.seen = b.labels["removed_visual"].sum().item()
    look = Look([.4] * 3, [.5] * 3, warmup=None)
    fit(look, epochs=1)
    assert look.seen > 0


def test_removals_of_somebody_else_stay():
    clips = toy(64)
    theirs = clips.weak * (np.arange(3) == 1)
    class Look(DenoiseCB):
        def after_loss(self, learner): self.out, self.index = learner.batch.labels["removed_visual"], learner.batch.index
    torch.manual_seed(0)
    look = Look([.3] * 3, [.5] * 3, warmup=None)
    Learner(JoMoLD(**TINY), clips.with_labels(removed_visual=theirs), LOSS, batch_size=64, epochs=1, device="cpu", callbacks=[look]).fit()
    before = torch.tensor(theirs)[look.index]
    assert (look.out >= before).all() and (look.out > before).any()


def test_no_pass_where_nothing_can_be_removed():
    "Epoch 1 of the official warm-up, and ratios of 0, train exactly as without the callback"
    assert same(fit(DenoiseCB([.3] * 3, [.9] * 3), epochs=1), fit(epochs=1))
    assert same(fit(DenoiseCB([0.] * 3, [0.] * 3, warmup=None), epochs=2), fit(epochs=2))
    assert not same(fit(DenoiseCB([.3] * 3, [.9] * 3), epochs=2), fit(epochs=2))


def test_eval_mode_draws_nothing():
    "Without dropout in the pass, and counts that truncate to 0, training is as without the callback"
    small = DenoiseCB([1e-9] * 3, [1e-9] * 3, warmup=None, denoise_eval_mode=True)
    assert same(fit(small, epochs=2), fit(epochs=2))
    assert not same(fit(DenoiseCB([1e-9] * 3, [1e-9] * 3, warmup=None), epochs=2), fit(epochs=2))


def test_wrong_number_of_classes_is_refused():
    with pytest.raises(InputError, match=r"noise ratio: has shape \(4,\). expected \(3,\)"): fit(DenoiseCB([.1] * 4, [.1] * 4, warmup=None))


@pytest.mark.parametrize("dgm", [False, True])
@pytest.mark.parametrize("warmup", WARMUPS)
def test_resumed_equals_uninterrupted(tmp_path, warmup, dgm):
    class Stop(DenoiseCB):
        def after_backward(self, learner):
            if (learner.epoch, learner.i) == (2, 1): raise KeyboardInterrupt
    def start(cb, file):
        torch.manual_seed(0)
        net = DGMNet(JoMoLD(**TINY)) if dgm else JoMoLD(**TINY)
        return fit(cb([.4] * 3, [.5] * 3, warmup=warmup, warm_epochs=3.), *([DGM(.2)] if dgm else []), CheckpointCB(file, "x"), net=net,
                   loss=MSDULoss(LOSS) if dgm else LOSS)
    with pytest.raises(KeyboardInterrupt): start(Stop, tmp_path / "a.pt")
    resumed, whole = start(DenoiseCB, tmp_path / "a.pt"), start(DenoiseCB, tmp_path / "b.pt")
    assert same(resumed, whole)
    assert [h["denoise"] for h in resumed.history] == [h["denoise"] for h in whole.history]
    assert len(resumed.history) == 4
