"""MA's control (labels removed by lot), and how far refinements agree: counts of real lists, hand examples, a short run."""
from dataclasses import replace

import micro
import numpy as np
import pandas as pd
import pytest
from test_ma import toy_clips, toy_model

from avvp_nb.core import CLASSES, InputError, asset, shared
from avvp_nb.methods import ma
from avvp_nb.methods.ma_refine import (
    COUNTS,
    PUBLIC,
    Refinement,
    agreed,
    agreement,
    drawn_by_lot,
    public_agreement,
    refine,
)
from avvp_nb.records.spec import RunSpec, run_key
from avvp_nb.records.store import Store
from avvp_nb.results.rows import system_of
from avvp_nb.runs.single import run

M = ("audio", "visual")


def random_refinement(n=200, c=4, seed=0, share=.4):
    rng = np.random.default_rng(seed)
    weak = rng.random((n, c)) < .5
    return Refinement([f"v{i}" for i in range(n)], np.arange(n), weak, *(weak & (rng.random((n, c)) < s) for s in (share, .7)))


# ---- the control ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", [0, 1, 7, 2**40])
def test_control_removes_as_many_of_each_class_within_the_labels(seed):
    ref = random_refinement()
    lot = ref.at_random(seed)
    for m in M:
        x, y = (getattr(r, f"removed_{m}") for r in (ref, lot))
        assert (x.sum(0) == y.sum(0)).all() and not (y & ~ref.weak).any() and (x != y).any() and y.dtype == bool
    assert lot.swap is None and lot.partners is None and lot.source["at random"] == seed and "at random" not in ref.source
    assert all(np.array_equal(getattr(ref.at_random(seed), f"removed_{m}"), getattr(lot, f"removed_{m}")) for m in M)


def test_control_is_uniform_and_knows_no_verdict():
    weak = np.ones((6, 1), bool)
    gone = np.zeros_like(weak)
    gone[:2] = True
    share = np.mean([drawn_by_lot(gone, weak, (s,)) for s in range(3000)], 0)[:, 0]
    assert abs(share - 1/3).max() < 5*(2/9/3000)**.5
    pairs = {tuple(np.flatnonzero(drawn_by_lot(gone, weak, (s,))[:, 0])) for s in range(300)}
    assert len(pairs) == 15                                     # all subsets of two of six


def test_one_class_does_not_move_another():
    ref = random_refinement()
    other = replace(ref, removed_audio=ref.removed_audio & (np.arange(4) != 2))
    a, b = ref.at_random(3).removed_audio, other.at_random(3).removed_audio
    assert (a[:, [0, 1, 3]] == b[:, [0, 1, 3]]).all() and not b[:, 2].any() and a[:, 2].any()


def test_control_leaves_the_callers_random_numbers_alone():
    np.random.seed(1)
    random_refinement().at_random(1)
    drawn = np.random.rand()
    np.random.seed(1)
    assert np.random.rand() == drawn


def test_control_can_be_kept_and_read_back(tmp_path):
    lot = random_refinement().at_random(5)
    lot.save(tmp_path / "lot.npz")
    back = Refinement.load(tmp_path / "lot.npz")
    assert all(np.array_equal(getattr(back, f"removed_{m}"), getattr(lot, f"removed_{m}")) for m in M)
    assert back.source == lot.source


def test_control_refuses_a_seed():
    with pytest.raises(InputError, match="seed: -1 is not possible"): random_refinement().at_random(-1)


# ---- as a run -------------------------------------------------------------------------------------------------------

def test_options_and_keys():
    "What is new has keys of its own; the base model in front of it is the one of the other rows"
    spec = {r: RunSpec("ma", {"refine": r}) for r in ma.REFINED}
    keys = {r: run_key(s, {}) for r, s in spec.items()}
    assert len(set(keys.values())) == 5 and keys["both"] == run_key(RunSpec("ma"), {})
    first = {r: [run_key(f, {}) for f in ma.ma_base(s)] for r, s in spec.items()}
    assert first["none"] == [] and first["random"] == first["both"] == first["audio"]
    assert ma.refine_options(spec["random"].plain()) == ma.refine_options(spec["both"].plain())
    assert system_of("ma", "contrastive=1;refine=random").spec() == spec["random"]
    with pytest.raises(InputError, match="did you mean 'random'"): RunSpec("ma", {"refine": "randm"})


def test_training_clips_of_the_control():
    clips = toy_clips()
    ref = refine(toy_model(), clips, threshold=1.)
    plain = {"options": ma.OPTIONS | {"refine": "random"}, "seed": 4}
    new = ma.without_refined(plain, ref, clips).labels
    for m in M: assert (new[f"removed_{m}"] == getattr(ref.at_random(4), f"removed_{m}")).all()
    with pytest.raises(InputError, match="had other labels"): ma.without_refined(plain, ref, replace(clips, weak=clips.weak[:, ::-1]))


def test_a_run(tmp_path, monkeypatch):
    "Base, refinement and control through the one loop; refining runs share base model and product"
    micro.install(monkeypatch.setitem)
    store = Store(tmp_path)
    done = {r: run(RunSpec("ma", {"refine": r}, scale="micro"), store, "cpu", "off") for r in ("random", "both")}
    assert done["random"]["first"] == done["both"]["first"] and done["random"]["key"] != done["both"]["key"]
    assert len(list((tmp_path / "products").glob("*.npz"))) == 1
    assert done["random"]["history"][0]["loss"] != done["both"]["history"][0]["loss"]


# ---- agreement ------------------------------------------------------------------------------------------------------

def counts(*rows):
    index = pd.MultiIndex.from_tuples([r[0] for r in rows], names=["modality", "class"])
    return pd.DataFrame([r[1] for r in rows], index, COUNTS)


@pytest.mark.parametrize("n, one, two, common, jaccard, kappa", [
    (10, 6, 5, 4, 4/7, .4), (4988, 3172, 3106, 2110, 2110/4168, .1158), (10, 5, 5, 5, 1, 1), (10, 5, 5, 0, 0, -1), (8, 4, 4, 2, 1/3, 0)])
def test_agreement_by_hand(n, one, two, common, jaccard, kappa):
    found = agreed(counts((("audio", "x"), [n, one, two, common]))).loc[("audio", "x")]
    assert found["by chance"] == pytest.approx(one*two/n)
    assert (found["jaccard"], found["kappa"]) == (pytest.approx(jaccard), pytest.approx(kappa, abs=5e-5))
    same = (n - one - two + 2*common)/n                                                        # the usual formula
    chance = (one*two + (n - one)*(n - two))/n**2
    assert found["kappa"] == pytest.approx((same - chance)/(1 - chance))


def test_all_takes_chance_within_classes():
    "Two classes without any agreement beyond chance have none together, although their rates differ"
    t = agreed(counts((("visual", "rare"), [100, 10, 10, 1]), (("visual", "often"), [100, 90, 90, 81])))
    assert t.loc[("visual", "all"), "kappa"] == pytest.approx(0, abs=1e-12)
    pooled = agreed(counts((("visual", "x"), [200, 100, 100, 82])))
    assert pooled.loc[("visual", "x"), "kappa"] == pytest.approx(.64)


def test_agreement_of_refinements():
    ref = random_refinement()
    t = agreement(ref, ref)
    assert (t["jaccard"] == 1).all() and (t["kappa"] == 1).all() and len(t) == 10
    mixed = agreement(ref, ref.at_random(1), classes=list("abcd"))
    for m in M:
        x, y = (getattr(r, f"removed_{m}") for r in (ref, ref.at_random(1)))
        assert mixed.loc[(m, "c"), COUNTS].tolist() == [ref.weak[:, 2].sum(), x[:, 2].sum(), y[:, 2].sum(), (x & y)[:, 2].sum()]
        assert mixed.loc[(m, "all"), "jaccard"] == pytest.approx((x & y).sum()/(x | y).sum())
    assert abs(agreement(random_refinement(20000), random_refinement(20000).at_random(1)).xs("all", level=1)["kappa"]).max() < .03
    with pytest.raises(InputError, match="different videos or labels"): agreement(ref, random_refinement(seed=1))


def test_nothing_removed_is_no_number():
    ref = random_refinement()
    none = replace(ref, removed_audio=0*ref.weak > 0, removed_visual=0*ref.weak > 0)
    t = agreement(none, none)
    assert t[["jaccard", "kappa"]].isna().all(axis=None)


def test_public_lists_are_those_of_the_shared_file():
    "Every count in the package against the two lists, row by row"
    path = shared("real", "ma_removed_labels_two_lists.csv")
    if not path.exists(): pytest.skip("no shared material")
    lists = pd.read_csv(path)
    found = public_agreement()
    for m in M:
        a, b = lists[f"{m}_removed_cmco"], lists[f"{m}_removed_dhhn"]
        for c in CLASSES:
            k = lists["class"] == c
            assert found.loc[(m, c), ["removed 1", "removed 2", "common"]].tolist() == [a[k].sum(), b[k].sum(), (a & b)[k].sum()]
    labels = pd.read_csv(shared("llp_stats", "class_frequency.csv")).query("split == 'train' and class_id >= 0").set_index("class")["n_videos"]
    for m in M: assert found.loc[m].drop("all")["labels"].tolist() == labels[list(CLASSES)].tolist()


def test_public_lists_say_what_was_reported():
    found = public_agreement()
    speech = found.xs("Speech", level=1)
    assert speech["kappa"].round(2).to_dict() == {"audio": .41, "visual": .12}
    assert found.xs("all", level=1)["jaccard"].round(3).to_dict() == {"audio": .347, "visual": .465}
    assert found.xs("Singing", level=1)["kappa"].round(2).to_dict() == {"audio": .28, "visual": .27}
    for m in M: assert found.loc[m].drop("all")[["removed 1", "removed 2"]].corr().iloc[0, 1] > .999
    assert found.attrs["source"] == PUBLIC and "DHHN" in PUBLIC


def test_no_names_of_videos_in_the_package():
    assert list(pd.read_csv(asset("ma_two_lists.csv"))) == ["modality", "class", "labels", "removed_cmco", "removed_dhhn", "common"]
