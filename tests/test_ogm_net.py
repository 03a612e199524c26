"""OGM-GE on CREMA-D: parity of network, loss, gradients, coefficients and modulation with the released code; DGM's measures; runs."""
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import close
from torch import nn
from torch.nn import functional as F

from avvp_nb.core import InputError, Parsing, read_json, shared
from avvp_nb.data.clips import Clips
from avvp_nb.methods.official import from_official, load_official, to_official
from avvp_nb.methods.ogm import (
    FUSIONS,
    PROTOCOLS,
    RECIPE,
    InLoop,
    Modulate,
    OGMLoss,
    OGMNet,
    balance,
    closed_form,
    encoder_weights,
    lead,
    modulation,
)
from avvp_nb.methods.resnet import ResNet18, encoder
from avvp_nb.tasks import Highest, task_of
from avvp_nb.train.callbacks import CheckpointCB, ValidateCB
from avvp_nb.train.learner import Callback, Learner

ENCODERS_FIRST = "ogm_concat"      # its list of keys holds both encoders; those of other fusions hold only the fusion


def fill(keys, rule):
    "The fill rule with its additions: `kind` decides"
    out = {}
    for k in keys:
        i = np.arange(int(np.prod(k["shape"])), dtype=np.int64)
        phase = (zlib.crc32(k["key"].encode()) % 1000) / 1000 * 2 * np.pi
        s = np.sin(.7 * i + phase + (.001 * ((i * i) % 6007) if rule == "chirp" else 0))
        x = {"weight": .05 * s, "norm_weight": 1 + .1 * s, "running_mean": .02 * s, "running_var": 1 + .1 * s, "vector": .02 * s}
        made = x[k["kind"]].astype(np.float32) if k["kind"] != "counter" else np.zeros(1, np.int64)
        out[k["key"]] = torch.tensor(made.reshape(k["shape"]))
    return out


@pytest.fixture(scope="module")
def keys(golden):
    found = read_json(shared("golden", "state_dict_keys_others.json"))
    encoders = [k for k in found[ENCODERS_FIRST]["keys"] if not k["key"].startswith("fusion")]
    own = {f: [k for k in found[f"ogm_{f}"]["keys"] if k["key"].startswith("fusion")] for f in FUSIONS}
    return {f: own[f] + encoders for f in FUSIONS}


@pytest.fixture(scope="module")
def clips(golden):
    case = golden("inputs_cremad_b2")
    return torch.tensor(case["spec"]), torch.tensor(case["image"]), torch.tensor(case["label"])


def network(keys, fusion, rule):
    return from_official(fill(keys[fusion], rule), "ogm", strict=True, fusion=fusion)


# ---- parity

def test_the_fill_rule_is_understood(keys):
    for f, table in keys.items():
        if f != "concat": table = [k for k in table if k["key"].startswith("fusion")]
        for rule in ("sine", "chirp"):
            for k, x in zip(table, fill(table, rule).values()):
                if rule not in k or k["kind"] == "counter": continue
                np.testing.assert_allclose(x.flatten()[:3].numpy(), k[rule]["first"][:x.numel()], rtol=1e-6, err_msg=f"{f} {k['key']}")
                np.testing.assert_allclose(x.double().sum(), k[rule]["sum_float64"], rtol=1e-4, atol=2e-3, err_msg=f"{f} {k['key']}")


def test_the_stored_inputs_are_those_of_the_rule(golden, clips):
    i = np.arange(clips[0].numel(), dtype=np.float64)
    np.testing.assert_allclose(clips[0].flatten(), -6 + 3 * np.sin(.0091 * i + .3) + 2 * np.sin(.83 * i), atol=2e-6)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_forward(golden, keys, clips, fusion):
    case, net = golden(f"ogm_{fusion}_forward_chirp"), network(keys, fusion, "chirp")
    with torch.no_grad():
        out = net(*clips[:2])
        for k, x in (("logits", out.logits), ("a", out.audio), ("v", out.visual)):
            if k in case: close(case, k, x)
        if "audio_map_channel_mean" in case:
            close(case, "audio_map_channel_mean", net.audio_net(clips[0][:, None]).mean(1))
            close(case, "visual_map_channel_mean", net.visual_net(clips[1].transpose(1, 2).flatten(0, 1)).mean(1))


def one_step(net, clips, alpha=.8):
    "What one training step of the release computes before its optimiser, by name"
    S, I, label = clips
    net.train()
    out = net(S, I)
    loss = F.cross_entropy(out.logits, label)
    found = {"logits": out.logits, "loss_total": loss}
    if net.fusion_module.separable:
        z_a, z_v = net.parts(out)
        rho = lead(z_a, z_v, label)
        k_a, k_v = balance(rho, alpha)
        found |= {"logits_a": z_a, "logits_v": z_v, "loss_a": F.cross_entropy(z_a, label), "loss_v": F.cross_entropy(z_v, label),
                  "ratio_v": rho, "coeff_a": k_a, "coeff_v": k_v}
    loss.backward()
    found |= {f"grad.{k}": p.grad for k, p in net.named_parameters()}
    found["grad_norms"] = torch.stack([p.grad.norm() for p in net.parameters()])
    found |= {f"buffer.{k}": b for k, b in net.named_buffers()}
    return {k: v.detach() for k, v in found.items()}


CASES = ["ogm_concat_loss", "ogm_concat_loss_chirp", "ogm_sum_loss", "ogm_sum_loss_chirp", "ogm_film_loss_chirp", "ogm_gated_loss_chirp"]


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.slow]*x.endswith("chirp")) for x in CASES])
def test_loss_and_gradients(golden, keys, clips, name):
    "In float64 tightly; in float32, where single decisions of ReLU flip, within the recorded tolerances"
    case, fusion = golden(name), name.split("_")[1]
    rule = case.info["options"]["fill_rule"]
    net = network(keys, fusion, rule)
    assert case.info["parameter_keys"] == [k for k, _ in net.named_parameters()]
    found = one_step(net, clips)
    for k in case:
        if not k.startswith("float64."): close(case, k, found[k])
    double = one_step(network(keys, fusion, rule).double(), [x.double() if x.is_floating_point() else x for x in clips])
    checked = [k for k in case if k.startswith("float64.")]
    for k in checked: close(case, k, double[k.removeprefix("float64.")])
    assert len(checked) >= 5


def test_coefficients(golden):
    case = golden("ogm_coefficients")
    for i in range(12):
        fusion = FUSIONS["concat"](8, 6)
        fusion.load_state_dict({"fc_out.weight": torch.tensor(case["weight"][i]), "fc_out.bias": torch.tensor(case["bias"][i])})
        a, v, label = (torch.tensor(case[k][i]) for k in ("a", "v", "label"))
        with torch.no_grad():
            z_a, z_v = fusion.parts(a, v)
            rho = lead(z_a, z_v, label)
            k_a, k_v = balance(rho, float(case["alpha"][i]))
            found = {"logits_a": z_a, "logits_v": z_v, "ratio_v": rho, "coeff_a": k_a, "coeff_v": k_v,
                     "loss": F.cross_entropy(fusion(a, v).logits, label), "loss_a": F.cross_entropy(z_a, label),
                     "loss_v": F.cross_entropy(z_v, label)}
        for k, x in found.items():
            np.testing.assert_allclose(np.asarray(x), case[k][i], err_msg=f"{k} of batch {i}", **case.info["tolerance"])
        if i == 0:                         # equal: the code damps sound, the equation nobody
            assert rho == 1 and k_a < 1 and k_v == 1
            assert [k.item() for k in balance(rho, float(case["alpha"][i]), "nobody")] == [1, 1]


class Tiny(nn.Module):
    "The encoder of the case `ogm_modulation`"
    dim = 8

    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 8, 3, 2, 1)

    def forward(self, x): return F.relu(self.conv2(F.relu(self.bn1(self.conv1(x)))))


def fake_learner(net, epoch, n=6):
    return SimpleNamespace(model=net, device="cpu", seed=0, epoch=epoch, train=range(n), batch_size=n)


def modulated_step(net, cb, S, I, label, epoch, seed=None):
    "Gradients after one step at which `cb` acts. The case was recorded with the network built after the seed: its weights were drawn first"
    learner = fake_learner(net.train(), epoch, len(label))
    net.zero_grad()
    cb.before_fit(learner)
    cb.before_epoch(learner)
    if seed is not None:
        drawn = sum(m.weight.numel() + (0 if m.bias is None else len(m.bias)) for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
        torch.rand(drawn, generator=cb.generator.manual_seed(seed))
    out = net(S, I)
    learner.parsing = SimpleNamespace(extra={"parts": net.parts(out)})
    learner.batch = SimpleNamespace(weak=F.one_hot(label, 6).float())
    cb.after_loss(learner)
    F.cross_entropy(out.logits, label).backward()
    cb.after_backward(learner)
    return {k: p.grad.clone() for k, p in net.named_parameters()}


MODES = {"Normal": None, "OGM": False, "OGM_GE": True}


def test_modulated_gradients(golden):
    "All twenty runs: fusion, alpha, mode and epoch; the noise is that of the generator"
    case = golden("ogm_modulation")
    S, I, label = (torch.tensor(case[k]) for k in ("spec", "image", "label"))
    for run in case.info["options"]["runs"]:
        fusion, alpha, *mode, epoch = run.split("_")
        net = OGMNet(fusion, kind=Tiny)
        net.load_state_dict({k.split(".param.")[1]: torch.tensor(x) for k, x in case.items() if k.startswith(f"{fusion}.param.")})
        noise, mode = MODES["_".join(mode)], "_".join(mode)
        alpha = float(alpha.removeprefix("alpha"))
        cb = Modulate(alpha if mode != "Normal" else 0., noise=bool(noise))
        found = modulated_step(net, cb, S, I, label, int(epoch.removeprefix("epoch")), seed=5)
        checked = [k for k in case if k.startswith(f"{run}.grad.")]
        for k in checked: close(case, k, found[k.split(".grad.")[1]])
        assert len(checked) >= 4
        if mode != "Normal":
            want = case.info["values"][run]
            np.testing.assert_allclose([m.item() for m in cb.mu], [want["coefficient a"], want["coefficient v"]], rtol=1e-4)


def test_validation_accuracies(golden):
    case = golden("ogm_valid")
    a, v, label = (torch.tensor(case[k]) for k in ("a", "v", "label"))
    for name in ("concat", "sum"):
        fusion = FUSIONS[name](512, 6)
        fusion.load_state_dict({k.removeprefix(f"{name}."): torch.tensor(x) for k, x in case.items() if k.startswith(f"{name}.fc")})
        with torch.no_grad(): scores = (fusion(a, v).logits, *fusion.parts(a, v))
        clips = SimpleNamespace(task="classification", weak=np.eye(6)[label])
        found = task_of(clips).score(Highest(), [Parsing(*scores, None)], clips).loc["video", ["accuracy", "audio", "visual"]]
        close(case, f"{name}.accuracy", found.to_numpy() / 100)


# ---- what the cases do not say

def test_frames_of_a_clip_are_averaged_and_not_mixed_with_those_of_another():
    torch.manual_seed(0)
    net = OGMNet(kind="small").eval()
    S, I = torch.randn(2, 20, 16), torch.randn(2, 3, 3, 16, 16)
    with torch.no_grad():
        whole, turned = net(S, I), net(S, I[:, :, [2, 0, 1]])
        torch.testing.assert_close(whole.visual, turned.visual)
        other = I.clone()
        other[1] = 0
        torch.testing.assert_close(net(S, other).visual[0], whole.visual[0])


@pytest.mark.parametrize("measure", ["score", "discrepancy", "fusion"])
def test_the_measures_are_functions_of_two_sums(measure):
    torch.manual_seed(1)
    for C in (2, 6, 25):
        y = torch.randint(0, C, (40,))
        z = [torch.randn(40, C, dtype=torch.float64) + 3 * k * F.one_hot(y, C) for k in (1, .7)]
        s = [x.softmax(1)[torch.arange(40), y].sum().item() for x in z]
        w = lead(*z, y, measure).item()
        assert w == pytest.approx(closed_form(*s, 40, C, measure), rel=1e-9)
        assert (w > 1) == (s[1] > s[0]) and abs(np.log(w)) >= abs(np.log(s[1] / s[0])) - 1e-12


def test_noise_is_added_where_nothing_is_damped_and_only_to_convolutions():
    torch.manual_seed(0)
    net = OGMNet("concat", kind=lambda c: encoder("small", c))
    S, I, label = torch.randn(8, 33, 24), torch.randn(8, 3, 1, 32, 32), torch.arange(8) % 6
    plain = modulated_step(net, Modulate(0., noise=False), S, I, label, 0)
    loud = modulated_step(net, cb := Modulate(.5), S, I, label, 0)
    own = {p for ps in encoder_weights(net) for p in ps}
    for (k, p), g in zip(net.named_parameters(), loud.values()): assert g.equal(plain[k]) != (p in own), k
    undamped = ("audio_net", "visual_net")[int(cb.mu[1] == 1)]
    for k in (k for k in plain if k.startswith(undamped) and plain[k].ndim == 4):
        n = loud[k] - plain[k]
        assert .7 < n.std() / plain[k].std() < 1.3


def test_paper_and_code_differ_where_the_notebook_says():
    torch.manual_seed(0)
    net = OGMNet(kind="small")
    S, I, label = torch.randn(8, 33, 24), torch.randn(8, 3, 1, 32, 32), torch.arange(8) % 6
    plain = modulated_step(net, Modulate(0., noise=False), S, I, label, 80)
    code, paper = (modulated_step(net, cb := Modulate(.5, noise=False, **kw), S, I, label, 80) for kw in PROTOCOLS.values())
    for k, g in plain.items(): assert code[k].equal(g)                     # the code has stopped after epoch 50
    m = ("audio_net", "visual_net")[int(cb.mu[1] < 1)]
    for k in (k for k in plain if k.startswith(m)): torch.testing.assert_close(paper[k], min(cb.mu) * plain[k])


@pytest.mark.parametrize("fusion", ["film", "gated"])
def test_fusions_that_cannot_be_taken_apart_are_refused_before_any_work(fusion):
    net = OGMNet(fusion, kind="small")
    with pytest.raises(InputError, match="multiplies the modalities"): Modulate().before_fit(fake_learner(net, 0))
    with pytest.raises(InputError, match="expected 'concat' or 'sum'"): net.parts(net(torch.randn(2, 16, 16), torch.randn(2, 3, 1, 16, 16)))


@pytest.mark.parametrize("make, says", [
    (lambda: OGMNet("mean"), "one of 'concat', 'sum', 'film', 'gated'"),
    (lambda: OGMNet(kind="vgg"), "one of 'resnet18', 'small'"),
    (lambda: Modulate(-1.), "gamma: -1.0 is not possible"),
    (lambda: Modulate(float("nan")), "gamma: nan is not possible"),
    (lambda: Modulate(measure="gap"), "measure"),
    (lambda: Modulate(ties="visual"), "ties"),
    (lambda: Modulate(which="bias"), "which"),
    (lambda: Modulate(target="heads"), "target"),
    (lambda: OGMNet(kind="small")(torch.randn(2, 1, 16, 16), torch.randn(2, 3, 1, 16, 16)), r"spectrogram: shape \(2, 1, 16, 16\)"),
    (lambda: OGMNet(kind="small")(torch.randn(2, 16, 16), torch.randn(2, 1, 3, 16, 16)), "colours before frames"),
])
def test_impossible_options(make, says):
    with pytest.raises(InputError, match=says): make()


def test_a_checkpoint_of_the_release_is_opened(tmp_path, keys):
    "Its dictionary, its prefix, and what it holds besides; nothing of another fusion is accepted"
    state = {f"module.{k}": x for k, x in fill(keys["sum"], "chirp").items()}
    torch.save({"saved_epoch": 3, "modulation": "OGM_GE", "alpha": .8, "fusion": "sum", "acc": .5, "model": state,
                "optimizer": {"state": {}, "param_groups": []}, "scheduler": {"last_epoch": 3}}, tmp_path / "best.pth")
    net = load_official(tmp_path / "best.pth", "ogm", strict=True, fusion="sum")
    back = to_official(net, "ogm")
    assert len(back) == 124
    for k, x in back.items(): assert x.equal(state[f"module.{k}"]), k
    assert net.audio_net.bn1.running_var.equal(state["module.audio_net.bn1.running_var"]) and not net.training
    with pytest.raises(InputError, match=r"2 tensors are missing, such as 'fusion_module.fc_out.weight'"):
        load_official(tmp_path / "best.pth", "ogm", fusion="concat")


def test_the_names_of_the_encoders_are_those_of_torchvision():
    tv = pytest.importorskip("torchvision")
    theirs = tv.models.resnet18().state_dict()
    ours = ResNet18(3).state_dict()
    assert {k: tuple(v.shape) for k, v in ours.items()} == {k: tuple(v.shape) for k, v in theirs.items() if not k.startswith("fc.")}


# ---- in the loop

def toy(n, seed, loud=(1., .3)):
    rng = np.random.default_rng(0)
    patterns = [rng.normal(size=(6, d)) for d in (20 * 16, 3 * 16 * 16)]
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 6, n)
    audio, frames = ((rng.normal(size=(n, p.shape[1])) + k * p[y]).astype(np.float32)[:, None] for p, k in zip(patterns, loud))
    return Clips([f"clip{i}" for i in range(n)], audio, 124 + 57 * frames, np.zeros((n, 1, 1), np.float32), np.eye(6, dtype=np.float32)[y],
                 task="classification")


def fitted(*callbacks, fusion="concat", **kwargs):
    torch.manual_seed(3)
    model = InLoop(OGMNet(fusion, kind="small"), (20, 16), (1, 16, 16, 3))
    valid = toy(48, 2)
    settings = RECIPE | dict(lr=2e-2, batch_size=32, epochs=3, device="cpu") | kwargs
    settings.pop("select")
    return Learner(model, toy(128, 1), OGMLoss(), callbacks=[ValidateCB(valid), *callbacks], **settings).fit()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_it_trains(fusion):
    cb = [Modulate(.8)] * FUSIONS[fusion].separable
    learner = fitted(*cb, fusion=fusion, epochs=3 if cb else 12)            # products of modalities learn later
    first, last = learner.history[0], learner.history[-1]
    assert last["loss"]["joint"] < first["loss"]["joint"] and last["val"]["video/accuracy"] > 40   # chance 17
    assert (last["val"]["video/audio"] == last["val"]["video/visual"] == last["val"]["video/accuracy"]) == (not cb)
    assert ("dgm" in last) == bool(cb)
    assert isinstance(learner.opt, torch.optim.SGD)


def test_equal_seeds_equal_runs_and_noise_of_its_own():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    a, b = fitted(Modulate(.8)), fitted(Modulate(.8))
    for p, q in zip(a.model.parameters(), b.model.parameters()): assert p.equal(q)
    torch.manual_seed(11)
    assert torch.get_rng_state().equal(before)
    assert not next(a.model.parameters()).equal(next(fitted(Modulate(.8, noise=False)).model.parameters()))


def test_the_louder_modality_is_damped():
    logs = {m: fitted(Modulate(.8, noise=False, measure=m)).history[-1]["dgm"] for m in ("score", "fusion")}
    for log in logs.values(): assert log["omega"] < 1 and log["damped_audio"] > .5 > log["damped_visual"]
    assert logs["fusion"]["omega"] < logs["score"]["omega"]                  # the sharper ratio


def test_the_schedule_is_that_of_the_release():
    learner = fitted(epochs=1)
    rates = [RECIPE["lr"] * RECIPE["factor"] ** (e // RECIPE["step"]) for e in (0, 69, 70, 99)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])
    group = learner.opt.param_groups[0]
    assert (group["momentum"], group["weight_decay"]) == (.9, 1e-4)
    assert sum(len(g["params"]) for g in learner.opt.param_groups) == len(list(learner.model.parameters()))


class Stop(Callback):
    "Ends a run as a kill would, after its second epoch"
    order = 200

    def after_epoch(self, learner):
        if learner.epoch == 2: raise KeyboardInterrupt


def test_a_killed_run_continues_with_its_noise(tmp_path):
    "With the momentum of SGD, too"
    whole = fitted(*modulation("dgm"), CheckpointCB(tmp_path / "a.pt", "run"), epochs=4)
    with pytest.raises(KeyboardInterrupt): fitted(*modulation("dgm"), CheckpointCB(tmp_path / "b.pt", "run"), Stop(), epochs=4)
    again = fitted(*modulation("dgm"), CheckpointCB(tmp_path / "b.pt", "run"), epochs=4)
    assert len(again.history) == 4
    for a, b in zip(whole.history, again.history): assert a["loss"] == b["loss"] and a["dgm"] == b["dgm"]
    for p, q in zip(whole.model.parameters(), again.model.parameters()): assert p.equal(q)


def test_a_checkpoint_of_another_optimiser_is_refused(tmp_path):
    fitted(CheckpointCB(tmp_path / "a.pt", "run"), epochs=1)
    with pytest.raises(InputError, match="its optimiser has betas None"): fitted(CheckpointCB(tmp_path / "a.pt", "run"), epochs=1, optimizer="adam")
    with pytest.raises(InputError, match="optimizer: 'sdg' is not possible"): fitted(optimizer="sdg")


@pytest.mark.parametrize("make, says", [(lambda: modulation("msdu"), "one of 'joint', 'ogm', 'ogm_ge', 'dgm'"),
                                        (lambda: modulation("ogm", protocol="official"), "one of 'code', 'paper'"),
                                        (lambda: modulation("dgm", measure="gap"), "measure")])
def test_impossible_systems(make, says):
    with pytest.raises(InputError, match=says): make()


def test_target_both_scales_the_columns_and_maps_of_the_fusion_but_no_bias():
    for fusion, blocks in (("concat", lambda g: g["fusion_module.fc_out.weight"].chunk(2, 1)),
                           ("sum", lambda g: (g["fusion_module.fc_x.weight"], g["fusion_module.fc_y.weight"]))):
        torch.manual_seed(0)
        net = OGMNet(fusion, kind="small")
        S, I, label = torch.randn(8, 33, 24), torch.randn(8, 3, 1, 32, 32), torch.arange(8) % 6
        plain = modulated_step(net, Modulate(0., noise=False), S, I, label, 0)
        both = modulated_step(net, cb := Modulate(.5, noise=False, target="both"), S, I, label, 0)
        assert min(cb.mu) < 1
        for x, y, m in zip(blocks(plain), blocks(both), cb.mu): torch.testing.assert_close(y, m * x)
        for k in (k for k in plain if "fusion" in k and "bias" in k): assert plain[k].equal(both[k])
