"""The engine `quick-dropout`: its distribution, its stream, stacks, killed runs, refusals and its benchmark."""
import micro
import pytest
import torch
from test_stack import RUNS, same, together
from torch.nn import functional as F
from tree import ROOT, load

from avvp_nb.core import InputError
from avvp_nb.methods.losses import GuidedLoss
from avvp_nb.train import learner
from avvp_nb.train.dropout import QuickDropout, word_mask
from avvp_nb.train.learner import Learner, check_engine

FIT = dict(lr=5e-3, batch_size=16, epochs=3, device="cpu")


def fitted(engine="quick-dropout", **kw):
    return Learner(micro.toy_han(), micro.toy_clips(40), GuidedLoss(), **{**FIT, **kw}, engine=engine).fit()


@pytest.mark.parametrize("p", [1e-3, .1, .5, .9])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 400_001])
def test_masks_have_their_shape_share_and_mean(p, n):
    torch.manual_seed(0)
    draws = torch.cat([word_mask((n,), p) for _ in range(max(1, 200_000 // n // 10))])
    assert set(draws.unique().tolist()) <= {0., torch.tensor(1 / (1 - round(p * 65536) / 65536)).item()}
    m = len(draws)
    assert abs((draws == 0).double().mean() - p) < 5 * (p * (1 - p) / m)**.5 + 1e-5
    assert abs(draws.double().mean() - 1) < 5 * (p / (1 - p) / m)**.5 + 1e-5


def test_no_decision_tells_another():
    torch.manual_seed(0)
    kept = (word_mask((500_000, 4), .3) > 0).double()
    assert (torch.corrcoef(kept.T) - torch.eye(4)).abs().max() < 5 / 500_000**.5
    assert abs(torch.corrcoef(torch.stack([kept[1:, 0], kept[:-1, 3]]))[0, 1]) < 5 / 500_000**.5


def test_the_stream_belongs_to_the_seed_and_not_to_the_threads():
    before, masks = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            torch.manual_seed(5)
            masks.append(word_mask((64, 10, 2, 512), .1))
    finally: torch.set_num_threads(before)
    assert torch.equal(*masks)


def test_it_trains_with_other_masks_and_repeats_to_the_last_bit():
    a, b, usual = fitted(), fitted(), fitted("eager")
    for x, y in zip(a.model.parameters(), b.model.parameters()): assert torch.equal(x, y)
    assert [h["loss"] for h in a.history] != [h["loss"] for h in usual.history]
    assert a.history[-1]["loss"]["video"] < a.history[0]["loss"]["video"]


def test_outside_of_the_steps_dropout_is_pytorchs():
    fitted()
    torch.manual_seed(1)
    a = F.dropout(torch.ones(1000), .5)
    torch.manual_seed(1)
    b = F.dropout(torch.ones(1000), .5)
    torch.manual_seed(1)
    with QuickDropout(): c = F.dropout(torch.ones(1000), .5)
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("name", ["han", "dgm", "jomold", "cmpae"])
def test_a_run_of_a_stack_draws_what_it_draws_alone(name):
    alone, lanes, _ = together(RUNS[name], engine="quick-dropout")
    same(alone, lanes)


def test_a_record_names_it_and_a_killed_run_continues(tmp_path, monkeypatch):
    whole, again = micro.killed_and_continued(tmp_path, monkeypatch, "quick-dropout")
    assert whole["hardware"]["engine"] == "quick-dropout"
    assert again["probabilities"] == whole["probabilities"]


def test_it_is_refused_off_the_cpu(monkeypatch):
    monkeypatch.setattr(learner, "pick_device", torch.device)
    with pytest.raises(InputError, match="engine: 'quick-dropout' is for the CPU. expected 'eager' or 'compile' on meta"):
        check_engine("quick-dropout", "meta")


def test_its_benchmark_holds_masks_to_their_distribution(monkeypatch):
    bench = load(ROOT / "bench" / "dropout.py")
    found = bench.run(rounds=1, sizes=(4,), n_batches=1, numel=4096)
    assert found["ratio, masks"] > 0 and found["ratio, epochs at batch 4"] > 0
    monkeypatch.setitem(bench.WAYS, "quick-dropout", lambda x, p: F.dropout(x, p + .01))
    with pytest.raises(AssertionError, match="masks of quick-dropout are .* standard errors"): bench.run(rounds=1, sizes=(), numel=4096)
