"""What we found: every question can be asked, every answer has its form, nothing is decided on too little, negative results come first."""
import math
import re

import numpy as np
import pytest
from test_reproduce import record_of

from avvp_nb.core import InputError, write_json
from avvp_nb.records.store import Store
from avvp_nb.results import findings as F
from avvp_nb.results.claims import judge_claims
from avvp_nb.results.gains import Gained, gained
from avvp_nb.results.plans import by_experiment
from avvp_nb.results.reported import AVG
from avvp_nb.results.rows import system_of

NAN = float("nan")


def runs(system, gain=0.0, seeds=(1, 2, 3), scale="small", noise=0.05):
    return [record_of(system.spec(s, scale), gain=gain, noise=noise) for s in seeds]


def systems(experiment):
    "Every system that an experiment asks about, each once"
    asked = [q for q in F.EXPERIMENTS[experiment]() if isinstance(q, F.Question)]
    return list({str(s): s for q in asked for c in q.contrasts for s in (c.left, c.right)}.values())


QUESTIONS = [(e, i) for e in F.EXPERIMENTS for i, q in enumerate(F.EXPERIMENTS[e]()) if isinstance(q, F.Question)]


@pytest.mark.parametrize("experiment, i", QUESTIONS)
def test_every_question_has_three_forms_and_can_be_run(experiment, i):
    q = F.EXPERIMENTS[experiment]()[i]
    assert len({q.yes, q.no, q.open}) == 3 and q.asked.endswith("?") and not re.search(r"\d\.\d", q.yes + q.no + q.open + q.asked), "no number is typed"
    for c in q.contrasts:
        assert c.left.spec() and c.right.spec() and str(c.left) != str(c.right)
        assert len(c.printed) in (0, 2) and (not c.printed or not math.isnan(c.printed_gain())), c.words
    n = len(q.contrasts)
    up, down, wide = Gained(2.0, 1.0, 3.0, 3), Gained(-2.0, -3.0, -1.0, 3), Gained(0.1, -3.0, 3.2, 3)
    answers = {q.answer(*x) for x in ([up] * n, [down] * n, [wide] * n, [up, down][:n], [up, wide][:n])}
    assert None in answers or q.answer(*[wide] * n) is None
    assert answers >= {None} and len(answers) > 1


@pytest.mark.parametrize("experiment", F.EXPERIMENTS)
def test_without_records_every_sentence_is_undecided(experiment):
    got = F.findings(experiment, [])
    assert {f.answer for f in got.found} == {"undecided"} and 0 < len(got.found) <= 6
    assert all(f.sentence.startswith("undecided: ") for f in got.found) and "no runs" in got.about


@pytest.mark.parametrize("seeds, scale, reason", [((1,), "small", "1 seed"), ((1, 2), "small", "2 seeds"), ((1, 2, 3), "tiny", "scale tiny")])
def test_too_little_is_undecided_and_shown_all_the_same(seeds, scale, reason):
    records = [r for i, s in enumerate(systems("dgm")) for r in runs(s, i, seeds, scale)]
    got = F.findings("dgm", records, scale)
    assert all(f.sentence.startswith(f"undecided: {reason}. ") for f in got.found)
    assert all(re.search(r"[+−]\d+\.\d", f.sentence) for f in got.found)


@pytest.mark.parametrize("experiment", ["han", "ma", "dgm", "coleaf"])
def test_three_to_six_sentences_with_interval_and_seeds_negative_ones_first(experiment):
    rng = np.random.default_rng(len(experiment))
    records = [r for s in systems(experiment) for r in runs(s, rng.normal(0, 2))]
    got = F.findings(experiment, list({r["key"]: r for r in records}.values()))
    assert 3 <= len(got.found) <= 6 and [f.rank for f in got.found] == sorted(f.rank for f in got.found)
    assert not [f for f in got.found if f.answer == "undecided"]
    for f in got.found: assert re.search(r"[+−]\d+\.\d \[[+−]\d+\.\d, [+−]\d+\.\d\]", f.sentence) and f.sentence.endswith("(3 seeds).")
    text = got.to_markdown()
    assert text.startswith("**What we found** (simulated, scale small") and all(f"- {f.sentence}" in text for f in got.found)


def test_a_sentence_says_what_the_gain_says():
    whole, base = F._dgm("han"), system_of("han")
    for more, said in ((3.0, "DGM with MSDU improves HAN: "), (-3.0, "DGM with MSDU makes HAN worse: ")):
        a, b = runs(whole, more), runs(base, 0.0)
        f = F.answer(F._dgm_questions("han")[0], by_experiment(a + b), "small")
        assert f.sentence.startswith(said) and str(gained(a, b, AVG)) in f.sentence and ", printed +1.9 (3 seeds)." in f.sentence
        assert {r["key"] for r in f.records} == {r["key"] for r in a + b}
    f = F.answer(F._dgm_questions("han")[0], by_experiment(runs(whole, 0.0, noise=5.0) + runs(base, 0.0, noise=5.0)), "small")
    assert f.sentence.startswith("Whether DGM with MSDU improves HAN is not certain: ") and f.rank == 1


@pytest.mark.parametrize("heads, whole, answer", [(2.0, 2.0, "yes"), (2.0, -1.0, "yes"), (2.0, 4.0, "no"), (0.0, 0.0, "open"), (-2.0, -2.0, "no"), (0.0, 2.0, "no")])
def test_heads_and_modulation_are_told_apart(heads, whole, answer):
    records = runs(system_of("han")) + runs(F._dgm("han", modulate=False), heads, noise=0.01 if heads else 1.0) + runs(F._dgm("han"), whole, noise=0.01 if heads else 1.0)
    if (heads, whole) == (0.0, 0.0): records = runs(system_of("han"), noise=1.0) + runs(F._dgm("han", modulate=False), noise=1.0) + runs(F._dgm("han"), noise=1.0)
    if (heads, whole) == (0.0, 2.0): records = runs(system_of("han")) + runs(F._dgm("han", modulate=False), 0.0) + runs(F._dgm("han"), 2.0)
    assert F.answer(F._dgm_questions("han")[1], by_experiment(records), "small").answer == answer


def test_scaling_under_adam_is_nothing_only_within_half_a_point():
    quiet, heads = F._dgm("han", noise=False), F._dgm("han", modulate=False)
    for more, noise, answer, rank in ((0.0, 0.02, "yes", 0), (2.0, 0.02, "no", 2), (0.0, 3.0, "open", 1)):
        f = F.answer(F._scaling("han"), by_experiment(runs(quiet, more, noise=noise) + runs(heads, 0.0, noise=noise)), "small")
        assert (f.answer, f.rank) == (answer, rank), f.sentence


def test_silence_is_compared_with_the_floor_of_the_same_videos():
    leaf = runs(system_of("coleaf"), 5.0, noise=0)
    assert F.silence(by_experiment(leaf), "small").answer == "no"
    for r in leaf: r["floors"]["nothing"] = {lv: dict.fromkeys(r["floors"]["nothing"][lv], 90.0) for lv in ("segment", "event")}
    f = F.silence(by_experiment(leaf), "small")
    assert f.answer == "yes" and f.rank == 0 and "nothing scores 90.0 % in event Vo" in f.sentence


def test_the_part_of_the_rule_is_that_of_rules():
    def rules(more): return {"han": 0.0, "jomold": more, "ma": more, "cmpae": more, "coleaf": more}
    found = [record_of(system_of(m).spec(s, "small"), gain=g, noise=0, rules=rules(1.5)) for m, g in (("han", 0.0), ("jomold", 4.0)) for s in (1, 2, 3)]
    text = F.rule_part(by_experiment(found), "small").sentence
    assert "makes +1.5 [+1.5, +1.5] of +5.5 [+5.5, +5.5] for JoMoLD" in text


def test_the_order_of_systems_counts_and_correlates():
    found = [r for m, g in (("han", 0.0), ("ma", 2.0), ("jomold", 3.0), ("cmpae", -1.0)) for r in runs(system_of(m), g)]
    text = F.order(by_experiment(found), "small").sentence
    assert text.startswith("Of 3 systems 2 are ahead of HAN with certainty and 1 behind")


def test_from_a_store_of_one_scale(tmp_path):
    store = Store(tmp_path)
    for r in runs(F._dgm("han"), 1.0) + runs(system_of("han")) + runs(F._dgm("han"), 9.0, scale="tiny"): write_json(r, store.record_path(r["key"]))
    got = F.findings("dgm", store)
    assert [f.answer for f in got.found][:1] == ["yes"] and len(got.records) == 6
    with pytest.raises(InputError, match="experiment: 'dmg' is not possible"): F.findings("dmg", store)


def test_the_table_of_findings_has_provenance_and_formats(tmp_path):
    records = runs(F._dgm("han"), 1.0) + runs(system_of("han"))
    t = F.findings("dgm", records).table(notebook="nbs/dgm.ipynb")
    assert set(t.provenance["runs"]) == {r["key"] for r in records} and t.provenance["notebook"] == "nbs/dgm.ipynb"
    assert len(t.save(tmp_path / "found")) == 5 and "DGM with MSDU improves HAN" in (tmp_path / "found.csv").read_text()


def test_claims_in_a_sentence():
    text = F.claims_found(judge_claims([], "ma"))
    n = [int(x) for x in re.findall(r"\d+", text)]
    assert text.startswith("Of 17 claims: 0 reproduced, 0 partly, 0 not reproduced") and n[4] == 14


def restricted(record, seed):
    "The same run as if its training videos had been chosen; the test videos and their mark are those of the others"
    data = record["data"] | {"identity": record["data"]["identity"] | {"train_with": "Speech", "train_most": 1272}}
    return record | {"key": f"{record['key']}-spoken-{seed}", "data": data}


def test_runs_on_chosen_training_videos_are_not_taken_for_the_usual_ones():
    usual = [r for i, s in enumerate(systems("ma")) for r in runs(s, i)]
    other = [restricted(r, i) for i, r in enumerate([r for s in systems("ma") for r in runs(s, -9.0)])]
    assert F.findings("ma", usual + other).to_markdown() == F.findings("ma", usual).to_markdown()
    assert F.main_findings(usual + other) == F.main_findings(usual)
    a, b = judge_claims(usual + other, "ma"), judge_claims(usual, "ma")
    assert a["ours"].equals(b["ours"]) and a["verdict"].equals(b["verdict"])
    with pytest.raises(InputError, match="different training videos"): by_experiment(usual + other)


def test_heads_that_cost_points_are_said_to():
    whole, heads, base = F._dgm("jomold"), F._dgm("jomold", modulate=False), F.System("jomold")
    said = F.findings("dgm", [*runs(whole, -2.0), *runs(heads, -2.0), *runs(base)]).found
    assert any(f.rank == 0 and f.answer == "no" and f.sentence.startswith("On JoMoLD, MSDU's heads cost points") for f in said)
