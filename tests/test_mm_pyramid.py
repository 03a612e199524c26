"""Parity of MM-Pyramid with the official code in both orders of its streams, and how it is trained here."""
from dataclasses import replace

import micro
import numpy as np
import pytest
import torch
from conftest import close
from test_han import fill

import avvp_nb.methods.mm_pyramid as mm
from avvp_nb.core import InputError, read_json, shared
from avvp_nb.data import sources
from avvp_nb.data.clips import Batch
from avvp_nb.methods.losses import GuidedLoss
from avvp_nb.methods.ma import Refinement
from avvp_nb.methods.method import METHODS
from avvp_nb.methods.official import from_official, to_official
from avvp_nb.records.spec import RunSpec
from avvp_nb.records.store import Store
from avvp_nb.runs.single import product_of, run
from avvp_nb.train.lanes import Lane, why_not
from avvp_nb.train.learner import Learner, predict
from avvp_nb.train.stack import StackedLearner

VARIANTS = ["", "_chirp"]
SIZES = dict(classes=3, audio_dim=8, frame_dim=8, motion_dim=8, dim=16)


def tiny(seed=0, **kw):
    torch.manual_seed(seed)
    return mm.MMPyramid(**{**SIZES, "heads": 4, **kw})


# ---- parity ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def file_keys(golden):
    return read_json(shared("golden", "state_dict_keys_baselines.json"))["mmpyramid"]["keys"]


@pytest.fixture(scope="module")
def networks(file_keys):
    "Our network with the weights of each fill rule, as released; second names of a tensor hold the same tensor"
    out = {}
    for variant in VARIANTS:
        state = fill({k["key"]: k["shape"] for k in file_keys if "alias_of" not in k}, "chirp" if variant else "sine")
        out[variant] = from_official({k["key"]: state[k.get("alias_of", k["key"])] for k in file_keys}, "mm_pyramid", strict=True)
    return out


@pytest.fixture(scope="module")
def inputs(golden):
    return [torch.tensor(golden("inputs_b3")[k]) for k in ("audio", "visual", "visual_st")]


@pytest.fixture
def swap(networks):
    "Set the order of the streams of both networks, and the released one again afterwards"
    def set_to(on):
        for m in networks.values(): m.swap = on
    yield set_to
    set_to(True)


def seen_inside(model, inputs, chirp):
    "All arrays of a forward case, under the official names"
    with torch.no_grad():
        p, e = model(*inputs), model.project(*inputs)
        levels, x = model.pyramid(*e), e
        out = {"global_prob": p.video, "a_prob": p.audio, "v_prob": p.visual, "frame_prob": p.segments}
        for m, k in enumerate("av"):
            h, out[f"level_weight_{k}"] = model.fusion[m].weigh(levels[m])
            out |= {f"enc_in_{k}": e[m], f"pyramid_{k}": p.extra["attended"][m]}
            z = levels[m].flatten(0, 1)
            out[f"attn_level_{k}"] = model.fusion[m].layer.weights(z, z).unflatten(0, (3, 10))
            if chirp: out[f"level_{k}"] = levels[m]
        maps = {f"attn_{which}_{k}": [] for which in ("self", "cross") for k in "av"}
        for u in model.units:
            pairs = mm.band(10, u.reach)
            for m, k in enumerate("av"):
                maps[f"attn_self_{k}"].append(u.itself[m].weights(x[m], x[m], pairs))
                maps[f"attn_cross_{k}"].append(u.cross.weights(x[m], x[1 - m], pairs))
            x = u(*x)
        out |= {k: torch.stack(v) for k, v in maps.items()}
        if chirp:
            (itself, other), gated = model.units[0].looks(*e), model.units[0].gated(*e)
            for m, k in enumerate("av"):
                out |= {f"unit1_self_{k}": itself[m], f"unit1_cross_{k}": other[m], f"unit1_gated_{k}": gated[m]}
    return out


def test_keys_cover_the_official_file(file_keys):
    used, shapes = {o for o, _, _ in mm.pyramid_keys()}, {k["key"]: k["shape"] for k in file_keys}
    unused = {k for k in shapes if k.startswith(mm.UNUSED)}
    assert len(shapes) == 394 and used | unused == set(shapes) and not used & unused
    assert {k["key"] for k in file_keys if "alias_of" in k} | {k["key"] for k in file_keys if not k["receives_gradient"]} == unused
    own = [k for k in unused if not any(k == q["key"] and "alias_of" in q for q in file_keys)]
    assert len(own) == 56 and sum(int(np.prod(shapes[k])) for k in own) == 3_168_256


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward(golden, networks, inputs, variant):
    case, got = golden("mmpyramid_forward" + variant), seen_inside(networks[variant], inputs, bool(variant))
    assert set(got) == set(case)
    for key, value in got.items(): close(case, key, value)


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_in_the_intended_order(golden, networks, inputs, swap, variant):
    "Sound and picture change places, the video's probability stays; and that is seen by the reference"
    case = golden("mmpyramid_forward" + variant)
    swap(False)
    with torch.no_grad(): p = networks[variant](*inputs)
    close(case, "a_prob", p.visual), close(case, "v_prob", p.audio), close(case, "global_prob", p.video)
    close(case, "frame_prob", p.segments.flip(2))
    with pytest.raises(AssertionError): close(case, "frame_prob", p.segments)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("order", ["", "_ordered"])
def test_loss_and_gradients(golden, networks, inputs, swap, order, variant):
    case, model = golden(f"mmpyramid_loss{order}{variant}"), networks[variant]
    swap(not order)
    assert case.info["options"]["swap_modalities"] is model.swap
    # evaluation mode switches every dropout off, as the reference run did; there is nothing else that depends on it
    model.zero_grad()
    terms = mm.LOSS(model(*inputs), Batch(None, None, None, torch.tensor(case["label"]), None, {}))
    total = sum(terms.values())
    total.backward()
    for key, value in {"loss_audio": terms["audio"], "loss_visual": terms["visual"], "loss_global": terms["video"],
                       "loss_total": total}.items():
        close(case, key, value.detach())
    grads = to_official(model, "mm_pyramid", of=lambda p: p.grad)
    for key in [k for k in case if k.startswith("grad.")]: close(case, key, grads[key[5:]])
    close(case, "grad_norms", [grads[k].norm().item() if k in grads else np.nan for k in case.info["parameter_keys"]])
    model.zero_grad()


def test_band(golden):
    case = golden("mmpyramid_band")
    for T in case.info["options"]["lengths"]:
        for d in case.info["options"]["dilations"]:
            scores = torch.zeros(T, T).masked_fill(~mm.band(T, d), -torch.inf)
            close(case, f"T{T}_d{d}", scores.softmax(-1))
    with pytest.raises(AssertionError): close(case, "T10_d1", mm.band(10, 2).float() / mm.band(10, 2).sum(1, keepdim=True))


def no_scale(model):
    for layer in all_layers(model): layer.query.weight.data *= 8; layer.query.bias.data *= 8

def no_band(model):
    for u in model.units: u.reach = 99

def wider(model):
    for u in model.units: u.reach += 1

def gates_exchanged(model):
    for u in model.units:
        for g in u.gates: g.maps.weight.data = g.maps.weight.data.roll(512, 0); g.maps.bias.data = g.maps.bias.data.roll(512)

def itself_exchanged(model):
    for u in model.units: u.itself = torch.nn.ModuleList(reversed(u.itself))

def all_normalised(model):
    for layer in all_layers(model):
        layer.asked = torch.nn.Sequential(layer.norm1, layer.asked)

def raw_levels(model):
    for f in model.fusion:
        f.forward = lambda z, f=f: (f.weigh(z)[1].unsqueeze(-1) * z).sum(2)

def all_layers(model):
    return [layer for u in model.units for layer in (*u.itself, u.cross)] + [f.layer for f in model.fusion]


@pytest.mark.parametrize("change", [no_scale, no_band, wider, gates_exchanged, itself_exchanged, all_normalised, raw_levels])
def test_parity_has_teeth(golden, networks, inputs, change):
    "What the chirp case is said to find, it finds: differences of .15 and more in a probability"
    from copy import deepcopy
    case, model = golden("mmpyramid_forward_chirp"), deepcopy(networks["_chirp"])
    change(model)
    with torch.no_grad(): p = model(*inputs)
    assert np.abs(p.segments.numpy() - case["frame_prob"]).max() > .1


def test_there_and_back(file_keys, networks):
    model = networks["_chirp"]
    back = to_official(model, "mm_pyramid")
    assert set(back) == {k["key"] for k in file_keys if not k["key"].startswith(mm.UNUSED)}
    again = from_official(back, "mm_pyramid", swap=False)
    assert not again.training and not again.swap and model.swap
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_files_that_do_not_fit_are_refused(networks):
    state = to_official(networks[""], "mm_pyramid")
    with pytest.raises(InputError, match="tensors are not used by mm_pyramid: MMP.capture.msa.4.lv1.bias"):
        from_official({**state, "MMP.capture.msa.4.lv1.bias": torch.zeros(512)}, "mm_pyramid", strict=True)
    del state["MMP.capture.anetwork.2.conv2.bias"]
    with pytest.raises(InputError, match="1 tensors are missing, such as 'MMP.capture.anetwork.2.conv2.bias'"):
        from_official(state, "mm_pyramid")


# ---- the network ----------------------------------------------------------------------------------------------------

def test_what_starts_alike():
    m = tiny()
    layers = all_layers(m)
    pyramid, (fa, fv) = layers[:12], layers[12:]
    for layer in layers:
        k, v = layer.asked.weight.chunk(2)
        assert all(torch.equal(layer.query.weight, w) for w in (k, v, layer.out.weight))
        assert all(torch.equal(layer.query.bias, b) for b in (*layer.asked.bias.chunk(2), layer.out.bias))
    for layer in pyramid[1:]:
        assert torch.equal(layer.ffn1.weight, pyramid[0].ffn1.weight) and torch.equal(layer.ffn2.bias, pyramid[0].ffn2.bias)
        assert not torch.equal(layer.query.weight, pyramid[0].query.weight)
    assert micro.same_weights(fa, fv) and not torch.equal(fa.ffn1.weight, pyramid[0].ffn1.weight)
    assert not micro.same_weights(m.fusion[0], m.fusion[1])                                  # the level weights differ
    tensors = [p for p in m.parameters()]
    assert len({p.data_ptr() for p in tensors}) == len(tensors)                              # copies, not ties


def test_start_without_copies_differs_only_in_the_copies():
    "The same draws, so that the option changes nothing else"
    a, b = tiny(clone_init=True), tiny(clone_init=False)
    for k in ("units.1.itself.0.query.weight", "units.2.gates.1.maps.weight", "head.maps.0.bias", "fusion.1.weight.weight"):
        assert torch.equal(a.state_dict()[k], b.state_dict()[k])
    assert not torch.equal(a.units[0].cross.out.weight, b.units[0].cross.out.weight)


def test_videos_of_different_length():
    "Each video of a padded batch gets what it gets alone, and padding has finite gradients"
    net, x, lengths = tiny().eval(), torch.randn(3, 3, 13, 8), [13, 4, 1]
    mask = torch.arange(13) < torch.tensor(lengths)[:, None]
    p = net(*x, mask=mask)
    for b, n in enumerate(lengths):
        alone = net(*x[:, b:b + 1, :n])
        for k in ("video", "audio", "visual"): torch.testing.assert_close(getattr(p, k)[b], getattr(alone, k)[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(p.segments[b, :n], alone.segments[0], rtol=1e-4, atol=1e-5)
    p.video.sum().backward()
    assert all(w.grad is not None and w.grad.isfinite().all() for w in net.parameters())


def test_every_parameter_learns_and_dropout_acts_where_it_should():
    net, batch = tiny(), micro.toy_clips(6).batch(range(6))
    sum(mm.LOSS(net(*batch.features), batch).values()).backward()
    assert all(p.grad.abs().sum() > 0 for k, p in net.named_parameters() if k.split(".")[-2] != "asked" or not k.endswith("bias"))
    rates = {m.p for m in net.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {.1, .2}
    for m in net.modules():
        if isinstance(m, torch.nn.Dropout): m.p = 0.
    with torch.no_grad(): torch.testing.assert_close(net(*batch.features).segments, net.eval()(*batch.features).segments)


def test_all_frames_or_their_mean():
    net, (a, m) = tiny().eval(), torch.randn(2, 2, 5, 8)
    frames = torch.randn(2, 40, 8)
    torch.testing.assert_close(net(a, frames, m).segments, net(a, frames.unflatten(1, (5, 8)).mean(2), m).segments, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kw, said", [({"heads": 3}, "3 heads for 16 dimensions"), ({"levels": 0}, "levels: 0")])
def test_impossible_networks_are_refused(kw, said):
    with pytest.raises(InputError, match=said): tiny(**kw)


# ---- training -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("swap", [False, True])
def test_the_release_learns_as_well_but_calls_sound_what_it_sees(swap):
    "Events that are heard only: in the intended order the audio output finds when, in the released order the visual one"
    rng = np.random.default_rng(3)
    def heard_only(n):
        "One event of one second in half of the videos and classes"
        clips, when = micro.toy_clips(n), rng.integers(0, 5, (n, 1, 3))
        dense = (np.arange(5)[None, :, None] == when) & (rng.random((n, 1, 3)) < .5)
        x = dense @ np.random.default_rng(7).normal(size=(3, 8)) + .1 * rng.normal(size=(n, 5, 8))
        return replace(clips, audio=x.astype(np.float32), frames=0 * clips.frames, motion=0 * clips.motion,
                       weak=dense.max(1).astype(np.float32), dense_audio=dense.astype(np.uint8))
    clips, test = heard_only(200), heard_only(60)
    learner = Learner(tiny(dim=32, swap=swap, levels=2), clips, mm.LOSS, lr=3e-3, epochs=8, step=20, device="cpu").fit()
    loss = [h["loss"]["video"] for h in learner.history]
    assert loss[-1] < .6 * loss[0]
    p, there = predict(learner.model, test), test.weak[:, None] * np.ones((1, 5, 1)) > 0
    def finds(m):
        on, off = (p.segments[:, :, m][there & (test.dense_audio == k)].mean() for k in (1, 0))
        return on - off
    hears, sees = finds(int(swap)), finds(1 - int(swap))                       # the picture's stream listens in as well
    assert hears > .4 and hears > 1.4 * sees, (hears, sees)


def test_runs_of_a_stack_are_the_runs_alone():
    assert why_not(tiny()) is None
    clips = micro.toy_clips(32)
    fit = dict(lr=3e-3, batch_size=16, epochs=2, step=3, device="cpu")
    def still(seed):
        net = tiny(seed, levels=2)
        for m in net.modules():
            if isinstance(m, torch.nn.Dropout): m.p = 0.
        return net
    alone = [Learner(still(r), clips, mm.LOSS, seed=r, **fit).fit() for r in range(2)]
    lanes = [Lane(still(r), clips, mm.LOSS, seed=r, **fit) for r in range(2)]
    StackedLearner(lanes).fit()
    for a, b in zip(alone, lanes):
        for x, y in zip(a.history, b.history): assert y["loss"] == pytest.approx(x["loss"], rel=1e-4)
        pa, pb = predict(a.model, clips), predict(b.model, clips)
        np.testing.assert_allclose(pb.segments, pa.segments, atol=2e-3)


def test_dropout_in_a_stack_is_drawn_by_the_stack():
    clips = micro.toy_clips(32)
    lanes = [Lane(tiny(0, levels=1), clips, mm.LOSS, seed=s, lr=0., batch_size=16, epochs=1, device="cpu") for s in (1, 2)]
    StackedLearner(lanes).fit()
    a, b = (lane.history[0]["loss"]["video"] for lane in lanes)
    assert a != b                                                              # the same weights, other masks


# ---- the entry ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, said", [
    ({"refine": "all"}, "refine: 'all' is not possible"), ({"dim": 12}, "dim: 12 is not possible"), ({"dim": 0}, "dim: 0"),
    ({"clone_init": 1.5}, "clone_init"), ({"levels": 3}, "levels: mm_pyramid has no such option")])
def test_impossible_options_are_refused(options, said):
    with pytest.raises(InputError, match=said): RunSpec("mm_pyramid", options=options)


def test_refinement_and_pseudo_labels_exclude_each_other():
    with pytest.raises(InputError, match="refine: MA refines weak labels"):
        RunSpec("mm_pyramid", options={"refine": "both"}, labels="clip+clap")
    assert RunSpec("mm_pyramid", labels="clip+clap").full_options["refine"] == "none"


def test_protocols_are_orders_of_the_streams():
    def built(protocol): return METHODS["mm_pyramid"].build(RunSpec("mm_pyramid", protocol=protocol).plain(), SIZES)[0]
    assert [built(p).swap for p in (None, "intended", "official")] == [False, False, True]
    with pytest.raises(InputError, match="did you mean 'official'"): RunSpec("mm_pyramid", protocol="oficial")
    r = RunSpec("mm_pyramid", scale="full").recipe()
    assert (r["lr"], r["batch_size"], r["epochs"], r["step"], r["factor"]) == (1e-4, 16, 40, 10, .1)
    assert isinstance(mm.LOSS, GuidedLoss) and (mm.LOSS.eps_audio, mm.LOSS.eps_visual) == (0., .1)


@pytest.fixture
def small(monkeypatch):
    "The scale `micro`, and networks of 32 dimensions"
    monkeypatch.setitem(sources.SCALES, "micro", micro.SCALE)
    for name in ("ma", "mm_pyramid"): monkeypatch.setitem(METHODS, name, micro._small(METHODS[name]))


def test_a_run_with_refined_labels(small, tmp_path):
    "MA's base model comes first, as a run that MA itself would find; its product is what MA would remove"
    spec = RunSpec("mm_pyramid", scale="micro", options={"refine": "both"})
    record = run(spec, tmp_path, device="cpu", progress="off")
    first, = METHODS["mm_pyramid"].first(spec)
    ma_first, = METHODS["ma"].first(RunSpec("ma", scale="micro", options={"refine": "both"}))
    assert first == ma_first and record["first"] == [run(ma_first, tmp_path, device="cpu", progress="off")["key"]]
    ours, _ = product_of(spec, Store(tmp_path), "cpu", "off")
    theirs, _ = product_of(RunSpec("ma", scale="micro", options={"refine": "both"}), Store(tmp_path), "cpu", "off")
    assert isinstance(ours, Refinement)
    for k in ("removed_audio", "removed_visual"): np.testing.assert_array_equal(getattr(ours, k), getattr(theirs, k))
    clips = sources.load_data(spec.data, "micro", tmp_path / "cache")["train"]
    for which in ("audio", "visual"):
        got = METHODS["mm_pyramid"].prepare(replace(spec, options={"refine": which}).plain(), ours, clips).labels
        assert [k for k in got if k.startswith("removed")] == [f"removed_{which}"]


def test_a_first_run_that_lost_its_weights_is_repeated(small, tmp_path, capsys):
    "A store that holds records only, as the committed ones, can be continued; nothing is repeated that isn't needed"
    spec, store = RunSpec("ma", scale="micro", options={"refine": "both"}), Store(tmp_path)
    first, = METHODS["ma"].first(spec)
    before = run(first, store, device="cpu", progress="off")
    store.weight_path(before["key"]).unlink()
    record = run(spec, store, device="cpu", progress="bar")
    assert f"{before['key']}: its weights are gone, so it is repeated" in capsys.readouterr().out
    after = store.record(before["key"])
    assert record["first"] == [before["key"]] and store.weight_path(before["key"]).exists()
    assert after["metrics"] == before["metrics"]             # the same numbers again
    store.weight_path(before["key"]).unlink()
    product_of(spec, store, "cpu", "off")                    # the product is there: its weights are not asked for
    assert not store.weight_path(before["key"]).exists()


def test_a_plain_run(small, tmp_path):
    a = run(RunSpec("mm_pyramid", scale="micro"), tmp_path, device="cpu", progress="off")
    b = run(RunSpec("mm_pyramid", scale="micro", protocol="official"), tmp_path, device="cpu", progress="off")
    assert a["first"] == [] and set(a["history"][0]["loss"]) == {"audio", "visual", "video"} and a["key"] != b["key"]
