"""Thread counts on a busy machine, the competitor of the benchmark, and the time that a job is said to take."""
import os
import subprocess
from dataclasses import replace

import pytest
import torch
from tree import ROOT

from avvp_nb.core import InputError
from avvp_nb.data.clips import random_clips
from avvp_nb.data.sources import DataSpec, identify
from avvp_nb.records.spec import run_key
from avvp_nb.records.store import as_store, product_name
from avvp_nb.runs import measure
from avvp_nb.runs.measure import RunSpec
from avvp_nb.train import threads as T
from avvp_nb.train.learner import Callback, Learner

CLIPS = random_clips(18, 4, 5, (8, 12, 6))


@pytest.fixture
def machine():
    "A clock that only steps move, as long as `took` says; the threads are put back"
    before, at, took = torch.get_num_threads(), [0.0], {1: 1.0, 2: 3.0}

    class Steps(Callback):
        def after_step(self, learner): at[0] += took[torch.get_num_threads()]
    torch.set_num_threads(2)
    yield Steps, took, lambda: T.ThreadsCB((1, 2), T.Rules(steps=1, least=9), lambda: at[0])
    torch.set_num_threads(before)


def learner(*callbacks, epochs=4, kind=Learner):
    made = measure.bench_learner(CLIPS, batch_size=4, dim=16, callbacks=callbacks, learner=kind)
    made.epochs = epochs
    return made


def played(steps, seconds, rules=T.Rules(), kept=2):
    "Numbers of threads of a run in which step `i` with `n` threads takes `seconds(i, n)`"
    chooser = T.Chooser((1, 2), kept, rules)
    chooser.begin()
    counts = [chooser.count]
    for i in range(steps): counts.append(chooser.took(seconds(i, counts[-1])))
    return counts, chooser.history


# --- choosing --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("took, expected", [({1: 1.0, 2: 3.0}, 1), ({1: 3.0, 2: 1.0}, 2), ({1: 0.95, 2: 1.0}, 2)],
                         ids=["one is better", "two are better", "about the same: the caller's"])
def test_the_better_number_is_kept_and_logged(machine, took, expected):
    Steps, costs, callback = machine
    costs.update(took)
    done = T.fit(learner(Steps()), "auto", callback)
    assert done.history[-1]["threads"] == {str(expected): 5}
    assert sum(sum(h["threads"].values()) for h in done.history) == 20
    assert torch.get_num_threads() == 2


def test_a_neighbour_that_comes_and_goes():
    counts, past = played(2000, lambda i, n: 1.0 if n == 1 else 10.0 if 300 <= i < 900 else 0.5)
    assert set(counts[20:300]) == {2} and counts[340:900].count(1) > 530 and counts[1990:] == [2] * 11
    assert past.lost < 0.05 * past.total


def test_single_slow_steps_change_nothing():
    counts, _ = played(490, lambda i, n: 50.0 if i % 40 == 39 else 1.0)
    assert set(counts[20:]) == {2}


def test_a_machine_that_stays_slow_is_asked_ever_more_rarely():
    counts, past = played(3000, lambda i, n: 1.0 if i < 100 else 5.0)
    comparisons = sum(a == 2 and b == 1 for a, b in zip(counts, counts[1:]))
    assert 2 <= comparisons <= 9 and counts[-1] == 2 and past.lost < 0.05 * past.total


def test_short_runs_are_left_alone(machine):
    Steps, _, _ = machine
    done = T.fit(learner(Steps()), "auto")
    assert [h["threads"] for h in done.history] == [{"2": 5}] * 4


# --- afterwards it is as before --------------------------------------------------------------------------------------

@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_threads_come_back_after_an_error(machine, error):
    Steps, _, callback = machine

    class Break(Callback):
        def after_step(self, learner):
            if (learner.epoch, learner.i) == (2, 1):
                assert torch.get_num_threads() == 1
                raise error
    made = learner(Steps(), Break())
    own = made.callbacks
    with pytest.raises(error): T.fit(made, "auto", callback)
    assert torch.get_num_threads() == 2 and made.callbacks is own


def test_nothing_happens_unless_it_is_asked_for(monkeypatch):
    monkeypatch.delenv(T.VARIABLE, raising=False)
    plain, kept = learner().fit(), T.fit(learner())
    assert not any("threads" in h for h in kept.history)
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), kept.model.parameters()))
    monkeypatch.setenv(T.VARIABLE, "auto")
    assert all("threads" in h for h in T.fit(learner()).history) == (torch.get_num_threads() > 1)
    monkeypatch.setenv(T.VARIABLE, "yes")
    with pytest.raises(InputError, match=T.VARIABLE): T.fit(learner())


def test_a_stack_and_a_gpu_are_left_alone(machine):
    _, _, callback = machine
    for fake in ({"device": torch.device("cuda")}, {"device": torch.device("cpu"), "stack": None}):
        cb, log = callback(), {}
        like = type("Like", (), {**fake, "train": CLIPS, "batch_size": 4, "epochs": 9, "epoch": 0, "log": log})()
        cb.before_fit(like), cb.before_epoch(like), cb.after_batch(like), cb.after_fit(like)
        assert cb.chooser is None and log == {} and torch.get_num_threads() == 2


# --- sleeping threads, and the competitor ----------------------------------------------------------------------------

@pytest.mark.parametrize("given, expected", [(None, "passive"), ("active", "active")])
def test_make_lets_threads_sleep_unless_told_otherwise(tmp_path, given, expected):
    text = (ROOT / "Makefile").read_text()
    line = next(x for x in text.splitlines() if "OMP_WAIT_POLICY" in x)
    (tmp_path / "Makefile").write_text(f"{line}\ndgm:\n\t@echo \"$$OMP_WAIT_POLICY\"\n")
    env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY" and not k.startswith("MAKE")}
    env |= {"OMP_WAIT_POLICY": given} if given else {}
    done = subprocess.run(["make", "-s", "dgm"], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def test_the_competitor_ends_with_its_block_and_with_an_error(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import threads as B
    with B.competitor() as process: assert process.poll() is None
    assert process.poll() is not None
    with pytest.raises(ValueError), B.competitor() as process: raise ValueError
    assert process.poll() is not None


def test_the_benchmark_tells_ratios(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import threads as B
    out = B.ratios({"one thread": {"quiet": 2.0, "busy": 2.2}, "chosen": {"quiet": 1.0, "busy": 3.0}})
    assert out["chosen"] == {"quiet epoch, s": 1.0, "ratio, quiet to one quiet thread": 0.5,
                             "ratio, busy to one quiet thread": 1.5, "ratio, busy to its own quiet": 3.0}
    assert B.environment("all threads, sleeping")["OMP_WAIT_POLICY"] == "passive"
    assert not {"OMP_WAIT_POLICY", "OMP_NUM_THREADS"} & set(B.environment("chosen"))


# --- how long will it take? ------------------------------------------------------------------------------------------

def test_the_estimate_is_extrapolated_from_few_steps(monkeypatch):
    asked = []

    def rates(spec, device, **kwargs):
        asked.append(spec.method)
        return {"han": (0.1, 0.01), "jomold": (0.2, 0.02)}[spec.method]
    monkeypatch.setattr(measure, "kind_seconds", rates)
    han, jomold = RunSpec("han", scale="tiny"), RunSpec("jomold", scale="tiny")
    one, more = (measure.estimate_seconds(s) for s in ([han], [han, replace(han, seed=2), jomold]))
    assert asked == ["han", "han", "jomold"]
    assert one == pytest.approx(measure.run_seconds(han, 0.1, 0.01))
    assert more == pytest.approx(2 * one + measure.run_seconds(jomold, 0.2, 0.02))
    full = measure.run_seconds(RunSpec("han", scale="full"), 0.1, 0.0)
    assert full == pytest.approx(40 * 625 * 0.1)


@pytest.mark.parametrize("spec", [RunSpec("dgm", {}, "jomold"), RunSpec("ma"), RunSpec("cmpae", scale="tiny")], ids=lambda s: s.method)
def test_every_kind_of_run_can_be_timed_without_touching_random_numbers(spec):
    ticks = iter(range(1000))
    clips = random_clips(2, 4, 5, (8, 12, 6), frames=spec.base.frames)
    before = torch.get_rng_state()
    step, parsing = measure.kind_seconds(spec, steps=1, now=lambda: next(ticks), clips=clips, dim=16)
    assert step == 1 and parsing == 0.5 and torch.equal(torch.get_rng_state(), before)


def test_what_comes_first_is_counted_once_and_what_is_recorded_not_at_all(tmp_path, monkeypatch):
    specs = [RunSpec("ma", scale="tiny"), RunSpec("jomold", scale="tiny")]
    todo = measure.missing(specs * 2, tmp_path)
    assert len(todo) == len(set(todo)) > 2 and set(specs) <= set(todo)
    monkeypatch.setattr(measure.as_store(tmp_path).__class__, "record_path", lambda self, key: ROOT / "LICENSE")
    assert measure.missing(specs, tmp_path) == []
    assert measure.announce(specs, tmp_path, "cpu") == "All runs are recorded: nothing to train."


def test_a_first_run_without_weights_is_announced_where_its_product_is_not_there_either(tmp_path):
    ma, base = RunSpec("ma", scale="tiny"), RunSpec("ma", {"refine": "none"}, scale="tiny")
    store = as_store(tmp_path)
    key = run_key(base, identify(base.data, store.root / "cache")[0])
    for path in (store.record_path(key), store.weight_path(key)): path.parent.mkdir(exist_ok=True)
    store.record_path(key).write_text("{}")
    assert measure.missing([base], store) == []
    assert measure.missing([ma], store) == [base, ma]
    store.weight_path(key).write_bytes(b"")
    assert measure.missing([ma], store) == [ma]
    store.weight_path(key).unlink()
    made = store.product_path(product_name("ma", [key], ma.base.product_key(ma.base_plain)))
    made.parent.mkdir(exist_ok=True); made.write_bytes(b"")
    assert measure.missing([ma], store) == [ma]


def test_steps_are_timed_in_the_shapes_of_the_data_set(tmp_path):
    def clips(name, data): return measure.example_clips(RunSpec(name, data=data, scale="tiny"), 3, tmp_path)
    unav = DataSpec(dataset="unav100")
    assert clips("han", DataSpec()).audio.shape == (3, 10, 128)
    for name in ("han", "cmpae"):                    # videos of up to a minute, padded to the longest one
        c = clips(name, unav)
        assert c.weak.shape == (3, 100) and 10 < c.audio.shape[1] <= 60
    ticks = iter(range(1000))
    step, parsing = measure.kind_seconds(RunSpec("ma", data=unav, scale="tiny"), steps=1, now=lambda: next(ticks), cache=tmp_path)
    assert (step, parsing) == (1, 1 / 16)
