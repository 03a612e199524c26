"""Names that scripts outside this project already use: signature and behaviour of each, in one place."""
import inspect

import micro
import numpy as np
import pandas as pd
import pytest
import torch
from micro import toy_han

from avvp_nb import core, metrics, runs
from avvp_nb.core import Parsing
from avvp_nb.data import clips as data
from avvp_nb.data import simulate
from avvp_nb.methods import dgm, official
from avvp_nb.methods.han import HAN

SEGMENT = ["A", "V", "AV", "Type@AV", "Event@AV", "Ao", "Vo", "Type@AVo", "Event@AVo"]


def arrays(n=6, t=10, c=25, seed=0, dtype=np.uint8):
    "Prediction and truth of both modalities, (N,T,C)"
    rng = np.random.default_rng(seed)
    return [(rng.random((n, t, c)) < .1).astype(dtype) for _ in range(4)]


def test_core_classes():
    assert len(core.CLASSES) == len(set(core.CLASSES)) == 25
    assert core.CLASSES[0] == "Speech" and core.CLASSES[24] == "Clapping" and core.CLASSES[5] == "Frying_(food)"


@pytest.mark.parametrize("table", ["2024", "2020"])
def test_data_load_annotations(llp, table):
    a = data.load_annotations(llp, audio_table=table)
    assert [len(a[s].ids) for s in ("train", "val", "test")] == [10_000, 649, 1200]
    for split in ("train", "val", "test"):
        part = a[split]
        assert part.weak.shape == (len(part.ids), 25) and set(np.unique(part.weak)) <= {0, 1} and part.weak.sum(1).min() >= 1
        for x in (part.audio, part.visual):
            assert x is None if split == "train" else x.shape == (len(part.ids), 10, 25) and set(np.unique(x)) <= {0, 1}
        assert all(i[11] == "_" and len(i.rsplit("_", 2)) == 3 for i in part.ids)      # full filenames
    assert data.load_annotations(str(llp))["test"].ids == a["test"].ids


@pytest.mark.parametrize("convert", [np.asarray, lambda x: x.astype(bool), lambda x: torch.tensor(x), lambda x: torch.tensor(x).bool()])
def test_metrics_evaluate(convert):
    frame = metrics.evaluate(*map(convert, arrays()))
    assert isinstance(frame, pd.DataFrame) and list(frame.index) == ["segment", "event"] and list(frame.columns) == SEGMENT
    assert frame.equals(metrics.evaluate(*arrays())) and ((frame >= 0) & (frame <= 100)).to_numpy().all() and frame.to_numpy().max() > 1
    _, _, *truth = arrays()
    assert (metrics.evaluate(*truth, *truth) == 100).to_numpy().all()                         # percent
    assert list(inspect.signature(metrics.evaluate).parameters)[:4] == ["pred_audio", "pred_visual", "true_audio", "true_visual"]


def test_metrics_evaluate_videos():
    frame = metrics.evaluate_videos(*arrays())
    assert frame.shape[0] == 6 and frame.columns.nlevels == 2 and set(frame.columns.get_level_values(0)) == {"segment", "event"}
    assert ((frame >= 0) & (frame <= 1)).to_numpy().all()
    np.testing.assert_allclose(100 * frame["segment"][SEGMENT].mean(), metrics.evaluate(*arrays()).loc["segment"])


@pytest.mark.parametrize("name", ["han", "ma", "jomold", "cmpae", "coleaf"])
def test_metrics_rules(name):
    rng = np.random.default_rng(0)
    p = Parsing(*(rng.random(s) for s in ((4, 25), (4, 25), (4, 25), (4, 10, 2, 25))))
    audio, visual = metrics.RULES[name].decide(p)
    assert audio.shape == visual.shape == (4, 10, 25) and set(np.unique([audio, visual])) == {0, 1}


@pytest.mark.parametrize("build", [toy_han, lambda: dgm.DGMNet(toy_han()), lambda: dgm.DGMNet(toy_han(), msdu=False, shared="split"),
                                   lambda: toy_han(protocol="paper")])
@pytest.mark.parametrize("per_second", [1, 8])
def test_forward_of_every_model(build, per_second):
    model = build()
    assert list(inspect.signature(model.forward).parameters)[:3] == ["audio", "frames", "motion"]
    out = model(torch.randn(2, 5, 8), torch.randn(2, 5 * per_second, 8), torch.randn(2, 5, 8))
    assert isinstance(out, Parsing)
    assert [tuple(x.shape) for x in (out.video, out.audio, out.visual, out.segments)] == [(2, 3)] * 3 + [(2, 5, 2, 3)]
    for x in (out.audio, out.visual, out.segments): assert ((x >= 0) & (x <= 1)).all()


def test_official_from_official():
    model = official.from_official(official.to_official(HAN()), "han")
    assert isinstance(model, HAN) and not model.training
    assert list(inspect.signature(official.from_official).parameters)[:2] == ["state_dict", "method"]


@pytest.mark.parametrize("convert", [np.asarray, torch.tensor])
def test_dgm_imbalance_and_coefficients(convert):
    "omega_{v-a} of the worked example, and (mu_audio, mu_visual)"
    weak, s_v, s_a = [[1., 0, 0], [1., 1, 0]], [[.9, .3, .1], [.8, .6, .2]], [[.5, .4, .3], [.6, .2, .1]]
    s_audio, s_visual, weak = map(convert, (s_a, s_v, weak))
    for measure, omega in {"score": 1.769231, "discrepancy": 2.666667, "fusion": 2.}.items():
        got = dgm.imbalance(s_audio, s_visual, weak, measure)
        assert float(got) == pytest.approx(omega, abs=1e-5)
    mu_audio, mu_visual = dgm.coefficients(got, .1)
    assert float(mu_audio) == 1 and float(mu_visual) == pytest.approx(.802625, abs=1e-6)
    assert list(inspect.signature(dgm.imbalance).parameters) == ["s_audio", "s_visual", "weak", "measure"]


def test_simulate_simulate():
    clips = simulate.simulate(4, 3)
    assert isinstance(clips, data.Clips) and len(clips) == 4 and clips.audio.shape == (4, 10, 128) and clips.weak.shape == (4, 25)
    assert clips.frames.shape == (4, 10, 2048) and clips.motion.shape == (4, 10, 512) and clips.mark.startswith("simulated")
    assert np.array_equal(simulate.simulate(n=4, seed=3).audio, clips.audio) and not np.array_equal(simulate.simulate(4, 4).audio, clips.audio)


def test_runs_spec_and_run(tmp_path, monkeypatch):
    micro.install(monkeypatch.setitem)
    spec = runs.RunSpec(method="han", options={}, data=runs.DataSpec(), scale="micro", seed=2, protocol="official", epochs=1)
    record = runs.run(spec, tmp_path, progress="off")
    assert record["spec"]["method"] == "han" and record["seed"] == 2 and runs.run(spec, store=runs.Store(tmp_path)) == record
    assert hash(spec) == hash(runs.RunSpec("han", scale="micro", seed=2, epochs=1))
