"""The engine `onednn`: its products, what it leaves to PyTorch, killed runs, refusals and its benchmark."""
import micro
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from tree import ROOT, load

from avvp_nb import runs
from avvp_nb.core import InputError
from avvp_nb.methods.losses import GuidedLoss
from avvp_nb.records.spec import RunSpec
from avvp_nb.train import affine, learner
from avvp_nb.train.affine import Affine, ByOneDNN, affine_of, has_onednn, suits
from avvp_nb.train.lanes import Lane
from avvp_nb.train.learner import Learner, check_engine
from avvp_nb.train.stack import StackedLearner

FIT = dict(lr=5e-3, batch_size=16, epochs=3, device="cpu")
needs = pytest.mark.skipif(not has_onednn(), reason="this PyTorch has no oneDNN")


def fitted(engine="onednn", **kw):
    return Learner(micro.toy_han(), micro.toy_clips(40), GuidedLoss(), **{**FIT, **kw}, engine=engine).fit()


def seen_by(monkeypatch):
    "Counts the layers that oneDNN computes"
    calls, real = [], ByOneDNN.linear
    monkeypatch.setattr(ByOneDNN, "linear", lambda self, input, weight, bias=None: calls.append(tuple(input.shape)) or real(self, input, weight, bias))
    return calls


def both(f, g, inputs, grad):
    "Results and gradients of two functions of the same tensors"
    out = []
    for one in (f, g):
        given = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
        y = one(*given)
        out.append([y, *torch.autograd.grad(y, [t for t in given if t is not None], grad)])
    return zip(*out)


@needs
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 10, 33), (2, 3, 5, 16)])
@pytest.mark.parametrize("outputs", [1, 25])
def test_a_layer_and_its_gradients_are_pytorchs(shape, outputs, biased):
    torch.manual_seed(0)
    x, w, b = torch.randn(shape), torch.randn(outputs, shape[-1]), torch.randn(outputs) if biased else None
    for a, c in both(Affine.apply, F.linear, (x, w, b), torch.randn(*shape[:-1], outputs)): torch.testing.assert_close(a, c)


@needs
def test_tensors_that_do_not_lie_in_rows():
    torch.manual_seed(0)
    x, w, b = torch.randn(6, 4, 10).mT, torch.randn(6, 9).T, torch.randn(9)
    for g in (torch.randn(6, 9, 10).mT, torch.ones(()).expand(6, 10, 9), torch.randn(12, 10, 9)[::2], torch.randn(6, 1, 9).expand(6, 10, 9)):
        inputs = torch.randn(6, 6, 10).mT, w, b
        for a, c in both(Affine.apply, F.linear, inputs, g): torch.testing.assert_close(a, c)
    for a, c in both(Affine.apply, F.linear, (x, torch.randn(9, 8)[:, ::2], b), torch.randn(6, 10, 9)): torch.testing.assert_close(a, c)


@needs
def test_only_the_gradients_that_are_needed():
    w = torch.randn(3, 4, requires_grad=True)
    Affine.apply(torch.randn(2, 4), w, None).sum().backward()
    x = torch.randn(2, 4, requires_grad=True)
    Affine.apply(x, w.detach(), torch.zeros(3)).sum().backward()
    assert w.grad.shape == (3, 4) and x.grad.shape == (2, 4)


def test_what_is_left_to_pytorch():
    w = torch.randn(3, 4)
    assert suits(torch.randn(2, 4), w)
    with affine_of("onednn"), pytest.raises(RuntimeError, match="cannot be multiplied"): F.linear(torch.randn(2, 5), w)
    assert not any([suits(torch.randn(2, 4).double(), w.double()), suits(torch.randn(4), w), suits(torch.randn(0, 4), w),
                    suits(torch.randn(2, 4, device="meta"), w.to("meta"))])
    with torch.autocast("cpu", torch.bfloat16): assert not suits(torch.randn(2, 4), w)


@needs
def test_layers_are_found_by_whatever_way_they_are_called(monkeypatch):
    calls, x, w = seen_by(monkeypatch), torch.randn(2, 4), torch.randn(3, 4)
    with affine_of("onednn"): torch.testing.assert_close(F.linear(input=x, weight=w), x @ w.T)
    assert calls == [(2, 4)]


@needs
def test_only_the_steps_of_this_engine_use_it(monkeypatch):
    calls = seen_by(monkeypatch)
    fitted("eager", epochs=1)
    assert not calls
    fitted(epochs=1)
    inside = len(calls)
    nn.Linear(2, 2)(torch.randn(2, 2))
    assert inside and len(calls) == inside
    with affine_of("onednn"): nn.Linear(2, 2)(torch.randn(2, 2))
    assert len(calls) == inside + 1


@needs
def test_it_trains_as_eager_up_to_rounding_and_repeats_to_the_last_bit():
    a, b, usual = fitted(), fitted(), fitted("eager")
    for x, y in zip(a.model.parameters(), b.model.parameters()): assert torch.equal(x, y)
    for h, u in zip(a.history, usual.history): assert h["loss"] == pytest.approx(u["loss"], rel=1e-4)


@needs
def test_a_record_names_it_and_a_killed_run_continues(tmp_path, monkeypatch):
    whole, again = micro.killed_and_continued(tmp_path, monkeypatch, "onednn")
    assert whole["hardware"]["engine"] == "onednn"
    assert again["probabilities"] == whole["probabilities"]


@needs
def test_several_runs_are_trained_alone(tmp_path, monkeypatch):
    micro.install(monkeypatch.setitem)
    specs = [RunSpec("han", scale="micro", epochs=1, seed=s) for s in (1, 2)]
    found = runs.run_many(specs, tmp_path, "cpu", "off", stack=2, engine="onednn")
    assert [r["hardware"]["engine"] for r in found] == ["onednn"] * 2
    lanes = [Lane(micro.toy_han(r), micro.toy_clips(20), GuidedLoss(), **FIT, seed=r, engine="onednn") for r in range(2)]
    with pytest.raises(InputError, match="engine: 'onednn' knows single runs only"): StackedLearner(lanes)


def test_it_is_refused_where_it_is_not(monkeypatch):
    monkeypatch.setattr(affine, "has_onednn", lambda: False)
    with pytest.raises(InputError, match="engine: 'onednn' needs a PyTorch with oneDNN. expected 'eager' or .* on cpu"): check_engine("onednn", "cpu")
    monkeypatch.setattr(learner, "pick_device", torch.device)
    with pytest.raises(InputError, match="engine: 'onednn' is for the CPU"): check_engine("onednn", "meta")


@needs
def test_its_benchmark_holds_products_to_the_exact_result(monkeypatch):
    bench = load(ROOT / "bench" / "affine.py")
    found = bench.run(rounds=1, shapes=[(4, 8, 8)], methods=["han"], size=4, n_batches=1, dim=16)
    assert found["layer 4 x 8 to 8: ratio"] > 0 and found["ratio, epochs of han at batch 4"] > 0
    monkeypatch.setitem(bench.WAYS, "onednn", lambda x, w, b: F.linear(x, w, b) * 1.001)
    with pytest.raises(AssertionError, match="a layer of onednn is .* from the exact result"): bench.run(rounds=1, shapes=[(4, 8, 8)], methods=[])
