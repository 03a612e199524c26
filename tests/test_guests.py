"""The library is a guest: it leaves the caller's settings alone, and its numbers do not depend on them. Checkpoints that
other people have wrapped, and a processor that only imitates bfloat16. Started as a script this file prints what has changed."""
import gc
import importlib
import json
import locale
import logging
import os
import pkgutil
import random
import signal
import subprocess
import sys
import threading
import warnings
from argparse import Namespace
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch

if __name__ != "__main__":   # as a script nothing of the library is imported before the first look
    import micro  # also sets one torch thread
    from safetensors.torch import save_file

    from avvp_nb import metrics, runs, surroundings
    from avvp_nb.core import InputError
    from avvp_nb.data.simulate import simulate
    from avvp_nb.methods.losses import GuidedLoss
    from avvp_nb.methods.official import from_official, load_official, to_official
    from avvp_nb.train import learner as learners
    from avvp_nb.train.learner import Callback, Learner, check_precision, pick_device, predict, predict_both

# --- what a caller may have set --------------------------------------------------------------------------------------


def switches():
    b = torch.backends
    return [s.fp32_precision for s in (b, b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv, b.mkldnn.rnn)]


def snapshot():
    "Everything global that a library could change, as text by name"
    import matplotlib
    import pandas as pd
    flags = torch.backends.cudnn
    out = {
        "torch's random state": torch.get_rng_state().numpy().tobytes(), "torch's seed": torch.initial_seed(),
        "NumPy's random state": repr(np.random.get_state(legacy=False)), "Python's random state": random.getstate(),
        "dtype": torch.get_default_dtype(), "device": torch.get_default_device(), "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(), "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        "cudnn": (flags.deterministic, flags.benchmark, flags.enabled), "products": switches(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()), "anomaly": torch.is_anomaly_enabled(),
        "torch's printing": repr(vars(torch._tensor_str.PRINT_OPTS)), "NumPy's printing": np.get_printoptions(),
        "NumPy's errors": np.geterr(), "pandas' width": pd.get_option("display.width"),
        "pandas' precision": pd.get_option("display.precision"), "rcParams": dict(matplotlib.rcParams),
        "filters of warnings": [repr(f) for f in warnings.filters], "folder": os.getcwd(), "environment": dict(os.environ),
        "signals": {s: signal.getsignal(s) for s in signal.valid_signals()}, "path": list(sys.path), "locale": locale.setlocale(locale.LC_ALL),
        "log": (logging.root.level, list(logging.root.handlers)), "hooks": (sys.excepthook, threading.excepthook),
        "limits": (sys.getrecursionlimit(), gc.isenabled(), gc.get_threshold()), "streams": (sys.stdout, sys.stderr, sys.stdin)}
    return {k: repr(v) for k, v in out.items()}


def set_all():
    "Settings that are not the usual ones, where a run can be told from its surroundings"
    torch.manual_seed(5), np.random.seed(6), random.seed(7)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.benchmark = True
    import matplotlib
    matplotlib.rcParams["font.size"] = 7.5
    warnings.simplefilter("always", BytesWarning)


def calls(folder):
    "The library as a script uses it, one call after the other"
    import micro

    from avvp_nb import core, metrics, runs
    from avvp_nb.data.simulate import simulate
    from avvp_nb.methods.official import from_official, to_official
    from avvp_nb.results.plots import plot_losses, save_figure
    from avvp_nb.train.learner import predict
    micro.install()
    clips = simulate(8, split="val")
    x = clips.dense_audio
    spec = runs.RunSpec("han", scale="micro")
    record = {}
    def run(): record["it"] = runs.run(spec, folder, device="cpu", progress="off")
    def run_stacked(): runs.run_stacked([runs.RunSpec("han", scale="micro", seed=s, epochs=1) for s in (2, 3)], folder, device="cpu", progress="off")
    def fails():
        from avvp_nb.train.learner import Learner
        with torch.random.fork_rng(): model, toys = micro.toy_han(), micro.toy_clips(8)
        toys.audio[3] = np.nan
        try: Learner(model, toys, lambda p, b: {"video": p.video.mean()}, device="cpu", deterministic=True).fit()
        except FloatingPointError: return
        raise AssertionError("trained on NaN")
    def figure():
        fig = plot_losses([record["it"]], [record["it"]])
        save_figure(fig, Path(folder) / "losses", {})
    def refused():
        try: runs.run(runs.RunSpec("han", scale="micro", precision="fp8"), folder)
        except core.InputError: return
        raise AssertionError("fp8 was taken")
    def official():
        with torch.random.fork_rng(): from_official(to_official(micro.HAN()))
    def own(f):
        "What the test itself draws is not the library's doing"
        def call():
            with torch.random.fork_rng(): torch.manual_seed(0); model = micro.HAN()
            f(model)
        return call
    return {"evaluate": lambda: metrics.evaluate(x, x, x, x), "simulate": lambda: simulate(8), "run": run, "run_stacked": run_stacked,
            "predict": own(lambda model: predict(model, clips)), "from_official": official, "a plot": figure, "a refusal": refused, "a failure": fails}


def changes(folder):
    "{what: names of what it has changed} in this process"
    for name in ("filelock", "matplotlib.pyplot", "pandas", "safetensors.torch", "tqdm", "yaml"):   # what they change is theirs
        with suppress(ImportError): importlib.import_module(name)
    set_all()
    out, before = {}, snapshot()
    def look(name):
        nonlocal before
        after = snapshot()
        out[name] = [k for k in before if before[k] != after[k]]
        before = after
    import avvp_nb
    for m in pkgutil.walk_packages(avvp_nb.__path__, "avvp_nb."):
        if m.name != "avvp_nb.__main__": importlib.import_module(m.name)
    look("imports")
    todo = calls(folder)
    look("preparation of the test")
    for name, f in todo.items():
        f()
        look(name)
    out.pop("preparation of the test")
    return out


if __name__ == "__main__":
    print("\n" + json.dumps(changes(sys.argv[1])))
    sys.exit()

@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    env = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, __file__, str(tmp_path_factory.mktemp("guest"))], env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("what", ["imports", "evaluate", "simulate", "run", "run_stacked", "predict", "from_official", "a plot", "a refusal",
                                  "a failure"])
def test_the_callers_world_is_as_it_was(changed, what): assert changed[what] == []


# --- and the other way round: the caller's settings make no difference -----------------------------------------------

@contextmanager
def default(dtype):
    torch.set_default_dtype(dtype)
    try: yield
    finally: torch.set_default_dtype(torch.float32)


@contextmanager
def matmul(precision):
    kept = [s.fp32_precision for s in surroundings._switches()]
    torch.set_float32_matmul_precision(precision)
    try: yield
    finally:
        torch.set_float32_matmul_precision("highest")
        for s, k in zip(surroundings._switches(), kept): s.fp32_precision = k


SETTINGS = {"float64": lambda: default(torch.float64), "bfloat16": lambda: default(torch.bfloat16), "meta": lambda: torch.device("meta"),
            "no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
            "medium": lambda: matmul("medium")}
settings = pytest.mark.parametrize("setting", SETTINGS)
CLIPS = micro.toy_clips(12)
MODEL = micro.toy_han()
OFFICIAL = to_official(micro.toy_han(3))


def fitted(model, train=CLIPS, **kw):
    fit = Learner(model, train, GuidedLoss(), **{"epochs": 2, "device": "cpu", **kw}).fit()
    return [h["loss"] for h in fit.history], [p.detach().numpy().tobytes() for p in fit.model.parameters()]


def ran(folder, method="han", **kw):
    record = runs.run(runs.RunSpec(method, scale="micro", epochs=1, **kw), folder, device="cpu", progress="off")
    return micro.essence(folder, record)


CALLS = {"evaluate": lambda: metrics.evaluate(*[CLIPS.dense_audio] * 4).to_string(), "simulate": lambda: simulate(4).frames.tobytes(),
         "predict": lambda: predict(MODEL, CLIPS).segments.tobytes(), "both": lambda: predict_both(MODEL, CLIPS)[1].segments.tobytes(),
         "official": lambda: [(v.dtype, v.tolist()) for v in from_official(OFFICIAL, audio_dim=8, frame_dim=8, motion_dim=8).state_dict().values()]}


@settings
@pytest.mark.parametrize("call", CALLS)
def test_calls_give_the_same_numbers(setting, call):
    usual = CALLS[call]()
    with SETTINGS[setting](): assert CALLS[call]() == usual


@settings
def test_a_fit_gives_the_same_numbers(setting):
    usual, model = fitted(micro.toy_han()), micro.toy_han()
    if setting == "inference_mode":   # copies that are made inside are refused, see below
        learner = Learner(model, CLIPS, GuidedLoss(), epochs=2, device="cpu")
        with torch.inference_mode(): learner.fit()
        got = [h["loss"] for h in learner.history], [p.detach().numpy().tobytes() for p in model.parameters()]
    else:
        with SETTINGS[setting](): got = fitted(model)
    assert got == usual


@settings
def test_a_run_gives_the_same_record(setting, tmp_path, monkeypatch):
    micro.install(monkeypatch.setitem)
    with SETTINGS[setting](): got = ran(tmp_path / "here")
    assert got == ran(tmp_path / "usual")


@pytest.mark.parametrize("setting", ["float64", "meta", "inference_mode"])
def test_a_stack_gives_the_same_records(setting, tmp_path, monkeypatch):
    micro.install(monkeypatch.setitem)
    specs = [runs.RunSpec("han", scale="micro", epochs=1, seed=s) for s in (1, 2)]
    def stacked(folder): return [micro.essence(folder, r) for r in runs.run_stacked(specs, folder, device="cpu", progress="off")]
    with SETTINGS[setting](): got = stacked(tmp_path / "here")
    assert got == stacked(tmp_path / "usual")


@pytest.mark.parametrize("setting, said", [("float64", "is float64. expected float32 weights. call the network's method float"),
                                           ("bfloat16", "is bfloat16. expected float32 weights"), ("meta", "is on the device 'meta', and holds no numbers"),
                                           ("inference_mode", "was made inside inference_mode, and cannot be trained")])
def test_networks_made_under_other_settings_are_refused_in_one_line(setting, said):
    with SETTINGS[setting](): model = micro.HAN(**micro.SIZES)
    with pytest.raises(InputError, match=f"^HAN: 'project.audio.weight' {said}[^\n]*$"): fitted(model)
    if setting == "inference_mode": predict(model, CLIPS)      # no gradient is needed
    else:
        with pytest.raises(InputError, match=f"HAN: 'project.audio.weight' {said}"): predict(model, CLIPS)


def test_other_errors_of_a_network_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"): predict(micro.toy_han(audio_dim=9), CLIPS)


def test_a_fit_does_not_move_the_callers_random_numbers():
    torch.manual_seed(11); want = torch.rand(3)
    torch.manual_seed(11); model = deepcopy(MODEL); fitted(model)
    assert torch.equal(torch.rand(3), want)
    class Fails(Callback):
        def after_epoch(self, learner): raise KeyError("mine")
    torch.manual_seed(11)
    with pytest.raises(KeyError, match="mine"): fitted(model, callbacks=[Fails()])
    assert torch.equal(torch.rand(3), want)


def test_a_fit_gives_the_switches_of_determinism_back():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        fitted(deepcopy(MODEL), deterministic=True)
        assert torch.is_deterministic_algorithms_warn_only_enabled() and torch.are_deterministic_algorithms_enabled()
    finally: torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", ["highest", "high", "medium", "newer"])
def test_products_are_exact_inside_and_the_callers_outside(precision):
    "The older switches cannot be read when the newer ones differ, so both families must come back"
    with matmul("highest" if precision == "newer" else precision):
        if precision == "newer": torch.backends.cuda.matmul.fp32_precision = "tf32"
        before = switches()
        for p in learners.PRECISIONS:
            with learners.products(p): assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
            assert switches() == before
            if precision != "newer": assert torch.get_float32_matmul_precision() == precision


def test_a_model_comes_back_in_its_modes():
    "Also when it fails, and when only a part of it was in training mode"
    model = micro.toy_han().train()
    model.project.eval()
    modes = [m.training for m in model.modules()]
    predict(model, CLIPS)
    assert [m.training for m in model.modules()] == modes
    with pytest.raises(TypeError): predict(model, CLIPS, no_such_argument=1)
    assert [m.training for m in model.modules()] == modes


def test_the_meta_device_is_refused():
    with pytest.raises(InputError, match="device: 'meta' cannot be used .*expected 'auto', 'cpu' or 'cuda'"): pick_device("meta")


# --- checkpoints that somebody else has wrapped ----------------------------------------------------------------------

def loaded(path, **kw): return load_official(path, audio_dim=8, frame_dim=8, motion_dim=8, strict=True, **kw)
def same(model): return all(torch.equal(v, OFFICIAL[k]) for k, v in to_official(model).items())
def under(prefix): return {prefix + k: v for k, v in OFFICIAL.items()}


FORMS = {k: (lambda k=k: {k: OFFICIAL, "epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": [{"lr": 1e-3}]}})
         for k in ("state_dict", "model_state_dict", "net", "model", "module", "weights")}
FORMS |= {f"{a}/{b}": (lambda a=a, b=b: {a: {b: OFFICIAL, "ema": 0}}) for a, b in (("model", "state_dict"), ("state_dict", "net"), ("net", "model"))}
FORMS |= {p: (lambda p=p: {"state_dict": under(p)})
          for p in ("module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.", "model.module._orig_mod.", "model.model.", "net.")}
FORMS |= {"settings beside": lambda: {"model": {"dim": 512, "layers": {"n": 1}}, "state_dict": OFFICIAL},
          "the same twice": lambda: {"model": OFFICIAL, "state_dict": OFFICIAL},
          "a part compiled": lambda: {k.replace("hat_encoder.", "hat_encoder._orig_mod."): v for k, v in OFFICIAL.items()},
          "parameters": lambda: {k: torch.nn.Parameter(v) for k, v in OFFICIAL.items()}}


@pytest.mark.parametrize("form", FORMS)
def test_a_wrapped_checkpoint_is_read(tmp_path, form):
    torch.save(FORMS[form](), tmp_path / "han.pth")
    model = loaded(tmp_path / "han.pth")
    assert same(model) and not any(p.grad_fn for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_numbers_of_other_types_become_float32(tmp_path, dtype):
    torch.save({k: v.to(dtype) for k, v in OFFICIAL.items()}, tmp_path / "x.pt")
    model = loaded(tmp_path / "x.pt")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(v, OFFICIAL[k].to(dtype).float()) for k, v in to_official(model).items())


@pytest.mark.parametrize("name", ["han.safetensors", "han.pt", "han"])
def test_safetensors_are_known_by_suffix_or_content(tmp_path, name):
    save_file({k: v.contiguous() for k, v in under("module.").items()}, tmp_path / name, metadata={"format": "pt"})
    assert same(loaded(tmp_path / name))
    (tmp_path / "x.safetensors").write_bytes((tmp_path / name).read_bytes()[:-9])
    with pytest.raises(InputError, match="x.safetensors: cannot be read as weights"): loaded(tmp_path / "x.safetensors")


PICKLED = {"network": lambda: torch.nn.Linear(1, 1), "wrapped": lambda: {"model": torch.nn.Linear(1, 1)}, "settings": lambda: {"args": Namespace(a=1), "net": OFFICIAL},
           "function": lambda: {"act": torch.nn.functional.relu}}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", PICKLED)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_network_is_refused_with_the_line_that_helps(tmp_path, form, zipped):
    torch.save(PICKLED[form](), tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    said = r"x\.pt: cannot be read as weights \(it holds (torch\.nn|argparse\.Namespace)[\w.]*, .*torch\.save\(model\.state_dict\(\), 'weights\.pt'\)$"
    with pytest.raises(InputError, match=said): loaded(tmp_path / "x.pt")


@pytest.mark.parametrize("state, said", [
    (lambda: {"model": OFFICIAL, "net": under("module.")}, r"holds several networks: 'model', 'net'. give one of them, such as checkpoint\['model'\]"),
    (lambda: {**OFFICIAL, **under("module.")}, "occurs twice, with different prefixes"), (micro.toy_han, r"a HAN is not a state dict.* give its state_dict\(\)"),
    (lambda: {0: torch.ones(1), "x": 1}, "tensors are missing"), (lambda: {**OFFICIAL, "fc_prob.bias": OFFICIAL["fc_prob.bias"].int()}, "fc_prob.bias: is a tensor of int32"),
    (lambda: {**OFFICIAL, "fc_a.weight": OFFICIAL["fc_a.weight"].to_sparse()}, "fc_a.weight: is a tensor of float32 .sparse_coo"),
    (lambda: {**OFFICIAL, "fc_a.weight": OFFICIAL["fc_a.weight"].to("meta")}, "fc_a.weight: is a tensor of float32 .strided, meta"),
    (lambda: {**OFFICIAL, "fc_a.bias": torch.full((16,), 1e300, dtype=torch.float64)}, "fc_a.bias: holds NaN or infinity")])
def test_what_cannot_be_told_apart_or_converted_is_refused(state, said):
    with pytest.raises(InputError, match=said): from_official(state(), audio_dim=8, frame_dim=8, motion_dim=8)


def test_a_checkpoint_that_holds_itself_ends():
    state = {"epoch": 1}
    state["model"] = state["net"] = state
    with pytest.raises(InputError, match="tensors are missing"): from_official(state)
    state["x"] = torch.ones(1)
    with pytest.raises(InputError, match="tensors are missing"): from_official(state)


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match="cannot be read as weights"): load_official(tmp_path)


# --- a processor that only imitates bfloat16 -------------------------------------------------------------------------

class Clock:
    "A clock for a processor whose products in bfloat16, the first twelve, take `slow` seconds and others one"
    def __init__(self, slow): self.slow, self.read, self.now = slow, 0, 0.
    def __call__(self):
        self.read += 1
        self.now += self.slow if self.read <= 12 else 1.
        return self.now


@pytest.fixture
def no_override(monkeypatch): monkeypatch.delenv("AVVP_SLOW_BF16", raising=False)


def test_imitated_products_are_refused(no_override, monkeypatch):
    for slow in (33., 3.):
        with pytest.raises(InputError, match=f"^precision: 'bf16' takes {slow:.0f} times as long as 'fp32' on this processor.* expected 'fp32' here. set AVVP_SLOW_BF16=1 to do it anyway$"):
            check_precision("bf16", "cpu", Clock(slow))
    for slow in (.5, 1., 2.9): assert check_precision("bf16", "cpu", Clock(slow)) == "bf16"
    for p in ("fp32", "tf32"): assert check_precision(p, "cpu", None) == p             # nothing is measured
    assert check_precision("bf16", "cuda", None) == "bf16"
    monkeypatch.setenv("AVVP_SLOW_BF16", "1")
    assert check_precision("bf16", "cpu", None) == "bf16"


def test_a_product_is_measured_once(no_override):
    clock = Clock(1.)
    for _ in range(3): check_precision("bf16", "cpu", clock)
    assert clock.read == 24


def test_a_learner_and_a_run_are_refused_and_told_how(no_override, monkeypatch, tmp_path):
    micro.install(monkeypatch.setitem)
    monkeypatch.setattr(learners, "bf16_slowdown", lambda clock: 33.)
    for f in (lambda: fitted(micro.toy_han(), precision="bf16"), lambda: ran(tmp_path, precision="bf16")):
        with pytest.raises(InputError, match="'bf16' takes 33 times as long"): f()
    assert not list(tmp_path.glob("records/*.json")) and not list(tmp_path.glob("checkpoints/*.pt"))
    monkeypatch.setenv("AVVP_SLOW_BF16", "yes")
    assert fitted(micro.toy_han(), precision="bf16")[0] != fitted(micro.toy_han())[0]


def test_the_real_clock_says_something(): assert surroundings.bf16_slowdown() > 0
