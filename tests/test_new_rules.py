"""The rules of NREP, MM-CSE and LEAP: which gates open, ties, lanes, thresholds for each class, and records older than they."""
import numpy as np
import pytest
import torch

from avvp_nb.core import InputError, Parsing
from avvp_nb.data.simulate import simulate
from avvp_nb.metrics import GATES, RULES, Rule, evaluate, select_thresholds
from avvp_nb.records.invented import invented
from avvp_nb.records.scores import corrected_only, pack_probabilities, score
from avvp_nb.results import rules as L
from avvp_nb.results.compare import rules_table
from avvp_nb.results.rows import system_of

NEW = ("nrep", "mmcse", "leap")


def probabilities(seed=0, shape=(6, 5, 4), digits=1):
    "Random numbers with many ties"
    n, t, c = shape
    rng = np.random.default_rng(seed)
    return Parsing(*(rng.random(s, np.float32).round(digits) for s in ((n, c),)*3), rng.random((n, t, 2, c), np.float32).round(digits))


def one(video, audio, visual, segments=(.6, .6)):
    x = np.array([video, audio, visual], np.float32)[:, None, None]
    return Parsing(*x, np.array(segments, np.float32).reshape(1, 1, 2, 1))


def decided(name, *args, **kw): return [int(x.sum()) for x in RULES[name].decide(one(*args, **kw))]


@pytest.mark.parametrize("name, settings", [
    ("nrep", ("modality", .25, .45, .45)), ("mmcse", ("unequal", .5, .5, .5)), ("leap", ("either", .5, .5, .5))])
def test_settings(name, settings):
    r = RULES[name]
    assert (r.gate, r.segment, r.audio_gate, r.visual_gate) == settings and r.fuse is None
    assert list(RULES)[-3:] == list(NEW) and list(RULES)[:5] == ["han", "ma", "jomold", "cmpae", "coleaf"]


@pytest.mark.parametrize("q, wanted", [
    ((.6, .4, .4), dict(mmcse=[1, 0], leap=[0, 0], nrep=[0, 0])), ((.4, .6, .4), dict(mmcse=[0, 0], leap=[1, 1], nrep=[1, 0])),
    ((.4, .4, .6), dict(mmcse=[0, 1], leap=[1, 1], nrep=[0, 1])), ((.6, .4, .6), dict(mmcse=[1, 1], leap=[1, 1], nrep=[0, 1])),
    ((0, .45, .45), dict(mmcse=[0, 0], leap=[0, 0], nrep=[1, 1])), ((.5, .5, .5), dict(mmcse=[1, 1], leap=[1, 1], nrep=[1, 1])),
    ((.49, .49, .49), dict(mmcse=[0, 0], leap=[0, 0], nrep=[1, 1]))])
def test_gates_by_hand(q, wanted):
    assert {k: decided(k, *q) for k in wanted} == wanted


@pytest.mark.parametrize("name, tau", [("nrep", .25), ("mmcse", .5), ("leap", .5)])
def test_seconds(name, tau):
    assert decided(name, 1, 1, 1, segments=(tau, np.nextafter(np.float32(tau), np.float32(0)))) == [1, 0]


def by_definition(rule, p):
    "Every rule written out, one video, second, modality and class at a time"
    N, T, _, C = p.segments.shape
    out = np.zeros((2, N, T, C), np.uint8)
    f = np.float32
    for n, t, m, c in np.ndindex(N, T, 2, C):
        a, v = p.audio[n, c] >= f(rule.audio_gate), p.visual[n, c] >= f(rule.visual_gate)
        video = p.video[n, c] >= f((rule.audio_gate, rule.visual_gate)[m])
        gate = {"video": video, "modality": (a, v)[m], "either": a or v, "unequal": (video, v)[m]}[rule.gate]
        out[m, n, t, c] = gate and p.segments[n, t, m, c] >= f(rule.segment)
    return out


@pytest.mark.parametrize("name", list(RULES))
@pytest.mark.parametrize("seed", range(3))
def test_every_rule_against_its_definition(name, seed):
    p = probabilities(seed)
    assert np.array_equal(np.stack(RULES[name].decide(p)), by_definition(RULES[name], p))


def test_relations_between_rules():
    p, q = probabilities(3), probabilities(4)
    for x, y in zip(RULES["nrep"].decide(p, q), RULES["cmpae"].decide(p)): assert np.array_equal(x, y)     # one pass, even if two are there
    swapped = Parsing(p.video, p.visual, p.audio, p.segments[:, :, ::-1])
    for x, y in zip(RULES["leap"].decide(p), RULES["leap"].decide(swapped)[::-1]): assert np.array_equal(x, y)
    ma, leap, han, mmcse = (RULES[k].decide(p) for k in ("ma", "leap", "han", "mmcse"))
    assert all((x <= y).all() for x, y in zip(ma, leap))
    assert np.array_equal(mmcse[0], han[0]) and np.array_equal(mmcse[1], ma[1]) and not np.array_equal(mmcse[0], ma[0])


@pytest.mark.parametrize("name", NEW)
def test_lanes_decide_the_same(name):
    parts = [probabilities(s) for s in (5, 6, 7)]
    stacked = Parsing(**{k: torch.tensor(np.stack([getattr(p, k) for p in parts])) for k in parts[0].arrays()})
    *on, good = RULES[name].decide_lanes(stacked)
    assert good.all()
    for r, p in enumerate(parts):
        for x, y in zip(on, RULES[name].decide(p)): assert np.array_equal(x[r].numpy(), y.astype(bool))


def test_thresholds_for_each_class():
    p, gates = probabilities(8), (.2, .9, .5, .7)
    for name in NEW:
        rule = RULES[name].with_(visual_gate=gates)
        for c, tau in enumerate(gates):
            single = RULES[name].with_(visual_gate=tau).decide(p)
            for x, y in zip(rule.decide(p), single): assert np.array_equal(x[..., c], y[..., c])
        with pytest.raises(InputError, match="visual_gate: holds 3 thresholds. expected one, or 4"): rule.with_(visual_gate=gates[:3]).decide(p)
        with pytest.raises(InputError, match="audio_gate: holds 3 thresholds"): rule.with_(audio_gate=gates[:3]).decide(p)


def test_selected_thresholds_against_full_evaluations():
    p = probabilities(9, (40, 6, 3), 3)
    true = np.random.default_rng(0).random((2, 40, 6, 3)) < .4
    for name in NEW:
        found = select_thresholds(p, *true, (.3, .6), rule=RULES[name])
        for c in range(3):
            for k in (.3, .6):
                gates = np.full(3, RULES[name].visual_gate)
                gates[c] = k
                want = evaluate(*RULES[name].with_(visual_gate=gates).decide(p), *true).loc["event", "V"]
                assert found.curve.loc[c, k] == pytest.approx(want, abs=1e-9)


def test_refusals():
    with pytest.raises(InputError, match="gate: 'both' is not possible. expected one of 'video', 'modality', 'either', 'unequal'"): Rule("x", gate="both")
    with pytest.raises(InputError, match="did you mean 'leap'"): RULES["lep"]
    assert set(RULES.table()["gate"]) == set(GATES.values())
    assert RULES.table().loc["leap", "gate"] == "either modality's, for both"


# ---- in records and tables ------------------------------------------------------------------------------------------

def test_records_hold_them_and_the_others_are_as_before():
    clips = simulate(12, split="test", frames=None)
    p, q = (probabilities(s, (12, 10, 25), 3) for s in (1, 2))
    packed = pack_probabilities(p, q)
    found = score(packed, clips)
    half = [Parsing(**{k: v.astype(np.float16).astype(np.float32) for k, v in x.arrays().items()}) for x in (p, q)]
    for name, rule in RULES.items():
        assert found[name] == evaluate(*rule.decide(*half), clips.dense_audio, clips.dense_visual).T.to_dict()
    assert list(found) == list(RULES) == list(corrected_only(*half, clips)["only"])


def records(method, rules=None, seeds=(1, 2)):
    out = [invented(system_of(method).spec(s, "tiny")) for s in seeds]
    return out if rules is None else [r | {"metrics": {k: r["metrics"][k] for k in rules}} for r in out]


def test_the_cross_table_finds_new_rules_by_itself():
    t = L.cross_table({"HAN": records("han"), "MA": records("ma")})
    assert [k for _, k in t.columns] == [*RULES, *RULES] and t.provenance["parameters"]["rules"] == list(RULES)
    assert [r.name for r in rules_table(records("han")).rows] == ["han (own)", *list(RULES)[1:]]
    frame = L.gains({"HAN": records("han"), "MA": records("ma")}, "HAN")
    assert list(frame) == ["own rules", *RULES]
    legend = L.plot_gains({"HAN": records("han"), "MA": records("ma")}, "HAN").legends[0]
    assert {x.get_text() for x in legend.get_texts()} >= {f"both under {k}" for k in RULES}


def test_older_records_give_the_tables_they_gave():
    "The same columns, numbers and provenance as when there were five rules, also beside a new record"
    five = ("han", "ma", "jomold", "cmpae", "coleaf")
    old = {"HAN": records("han", five), "MA": records("ma", five)}
    t = L.cross_table(old)
    assert [k for _, k in t.columns] == [*five, *five] and t.provenance["parameters"]["rules"] == list(five)
    mixed = L.cross_table({"HAN": old["HAN"], "MA": records("ma")})
    assert mixed.columns == t.columns and mixed.rows[1].mean == t.rows[1].mean
    assert [r.name for r in rules_table(old["HAN"]).rows] == ["han (own)", *five[1:]]
    with pytest.raises(InputError, match="rule of run"): L.cross_table(old, rules=("leap",))
