"""Records, checkpoints, weights and products that were changed, and stores that others use: refused or borne, by name."""
import json
import math
import os
import stat
import time

import micro
import numpy as np
import pytest
import torch
from micro import toy_clips, toy_han

from avvp_nb import core
from avvp_nb.core import InputError, atomic_write, file_hash, read_json, write_json
from avvp_nb.methods.jomold import Ratios
from avvp_nb.methods.losses import GuidedLoss
from avvp_nb.methods.ma_refine import Refinement, error_rates, refine_labels
from avvp_nb.methods.ma_swap import SwapTest
from avvp_nb.records.scores import pack_probabilities, passes_of
from avvp_nb.records.spec import RunSpec, run_key
from avvp_nb.records.store import RECORD, Folder, Store, bare_record, check_whole, whole_record
from avvp_nb.records.weights import load_weights, save_weights
from avvp_nb.results.groups import check_record, group, invented_record, provenance, versions_note
from avvp_nb.runs.merge import merge
from avvp_nb.runs.single import run
from avvp_nb.train.callbacks import CheckpointCB, ValidateCB
from avvp_nb.train.learner import Learner

HUGE = 10**12


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "A finished run: (store, record)"
    with pytest.MonkeyPatch.context() as m:
        micro.install(m.setitem)
        store = Store(tmp_path_factory.mktemp("done"))
        return store, run(RunSpec("ma", {"refine": "none"}, scale="micro"), store, device="cpu", progress="off")


@pytest.fixture
def micro_scale(monkeypatch): micro.install(monkeypatch.setitem)


# --- B11, B12: one function knows what a whole record is -------------------------------------------------------------

def changed(record, path, value):
    "The record with another value at a path such as `metrics.han`"
    record = json.loads(json.dumps(record))
    *way, last = path.split(".")
    at = record
    for k in way: at = at[int(k) if isinstance(at, list) else k]
    at[int(last) if isinstance(at, list) else last] = value
    return record


WRONG = [("metrics", None), ("spec", None), ("probabilities", None), ("data", None), ("history", None), ("floors", None), ("format", 99),
         ("format", True), ("format", "1"), ("seed", "1"), ("seed", True), ("key", 3), ("key", "../../PLANTED"), ("rule", "other"),
         ("rule", []), ("metrics", {}), ("metrics.ma", None), ("metrics.ma.event", []), ("metrics.ma.event.A", "12"),
         ("metrics.ma.segment.Type@AV", None), ("metrics.ma.segment.V", math.nan), ("metrics.ma.segment.V", math.inf),
         ("metrics.ma.segment.V", True), ("spec.method", None), ("spec.method", "a/b"), ("spec.options", []), ("spec.backbone", "../x"),
         ("data.mark", None), ("data.mark", "simulated \x1b[31m"), ("data.simulated", "no"), ("data.identity", "x"),
         ("history.0", None), ("history.0.loss", [1]), ("history.0.loss.audio", "0.1"), ("history.1.seconds", "long"),
         ("floors.nothing.segment.A", math.nan), ("probabilities.sha256", 5), ("first", ["/etc/x"]), ("first", "han-1"),
         ("selected.kept", None), ("selected.kept.metrics.event", 1), ("only.ma.skip.event.Ao", "x"), ("versions", 3), ("wall_time", "1 h")]
each_wrong = pytest.mark.parametrize("path, value", WRONG, ids=[f"{p}={v!r}"[:50] for p, v in WRONG])


@each_wrong
def test_a_record_with_a_wrong_part_is_refused_by_the_name_of_its_file(done, tmp_path, path, value):
    store, key = Store(tmp_path), done[1]["key"]
    store.record_path(key).parent.mkdir()
    store.record_path(key).write_text(json.dumps(changed(done[1], path, value)))
    before = file_hash(store.record_path(key))
    for read in (lambda: whole_record(store.record_path(key)), lambda: store.record(key), store.records, lambda: store.records(method="han")):
        with pytest.raises(InputError, match=rf"{key}\.json: .*delete it and run again") as e: read()
        assert len(str(e.value)) < 600 and str(e.value).isprintable()
    assert file_hash(store.record_path(key)) == before


@each_wrong
def test_such_a_record_gets_into_no_store_and_into_no_table(done, tmp_path, path, value):
    src, record = Store(tmp_path/"src"), changed(done[1], path, value)
    src.record_path(done[1]["key"]).parent.mkdir(parents=True)
    src.record_path(done[1]["key"]).write_text(json.dumps(record))
    with pytest.raises(InputError, match=rf"{done[1]['key']}\.json: "): merge(src, tmp_path/"mine", parts=("records",))
    assert not list(tmp_path.glob("mine/**/*.json"))
    if path == "rule" or value == {}: return     # a table may be made of records that hold no more than it shows
    if path.split(".")[0] in ("metrics", "spec", "history", "rule", "format"):
        with pytest.raises(InputError, match=rf"^{done[1]['key']}: "): group([record])


@pytest.mark.parametrize("kind", ["folder", "list", "null", "text", "bytes"])
def test_a_file_that_is_no_record_is_refused_by_name(tmp_path, kind):
    store = Store(tmp_path)
    path = store.record_path("han-1")
    path.parent.mkdir()
    if kind == "folder": path.mkdir()
    else: path.write_bytes({"list": b"[]", "null": b"null", "text": b"3", "bytes": b"\xff\x00"}[kind])
    for read in (lambda: store.record("han-1"), store.records, lambda: merge(store, tmp_path/"mine")):
        with pytest.raises(InputError, match=r"han-1\.json: "): read()


def test_every_part_is_needed_and_whole_records_pass(done):
    record = done[1]
    assert check_whole(record, "x") is record and check_record(record) is record
    assert check_whole(invented_record(), "x", needed=("key",)) and check_whole(bare_record("han-1"), "x")
    for k in RECORD:
        with pytest.raises(InputError, match=rf"^x: is not a whole run record \(no {k}\)"):
            check_whole({n: v for n, v in record.items() if n != k}, "x")


# --- B13: checkpoints ------------------------------------------------------------------------------------------------

TRAIN, VALID = toy_clips(40), toy_clips(16, seed=1)


def fitted(path, epochs=3):
    learner = Learner(toy_han(), TRAIN, GuidedLoss(), lr=1e-2, epochs=epochs, batch_size=16, device="cpu",
                      callbacks=[ValidateCB(VALID, select="segment/A"), CheckpointCB(path, "toy")])
    return learner.fit()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "A checkpoint after two of three epochs"
    path = tmp_path_factory.mktemp("c")/"c.pt"
    fitted(path, 2)
    return torch.load(path, weights_only=True)


def first(tensors): return next(iter(tensors))


SPOILED = {
    "negative": lambda s: s | {"epoch": -1}, "text": lambda s: s | {"epoch": "2"}, "true": lambda s: s | {"epoch": True},
    "beyond": lambda s: s | {"epoch": 99}, "beyond, with a history": lambda s: s | {
        "epoch": 99, "history": [{**s["history"][0], "epoch": e} for e in range(1, 100)]},
    "fraction": lambda s: s | {"epoch": 1.5}, "no history": lambda s: s | {"history": None}, "empty history": lambda s: s | {"history": []},
    "short history": lambda s: s | {"history": s["history"][:1]}, "other epochs": lambda s: s | {"history": s["history"][::-1]},
    "a history of numbers": lambda s: s | {"history": [1, 2]}, "NaN in the history": lambda s: s | {
        "history": [{**h, "loss": {"audio": math.nan}} for h in s["history"]]},
    "no seconds": lambda s: s | {"history": [{k: v for k, v in h.items() if k != "seconds"} for h in s["history"]]},
    "no model": lambda s: s | {"model": {}}, "a list as model": lambda s: s | {"model": [1]},
    "another shape": lambda s: s | {"model": {**s["model"], first(s["model"]): torch.zeros(2)}},
    "one tensor more": lambda s: s | {"model": {**s["model"], "more": torch.zeros(2)}},
    "text as tensor": lambda s: s | {"model": {**s["model"], first(s["model"]): "x"}},
    "NaN weights": lambda s: s | {"model": {k: x*math.nan for k, x in s["model"].items()}},
    "no opt": lambda s: s | {"opt": {}}, "opt without state": lambda s: s | {"opt": {**s["opt"], "state": {}}},
    "opt with other groups": lambda s: s | {"opt": {**s["opt"], "param_groups": []}},
    "opt with other settings": lambda s: s | {"opt": {**s["opt"], "param_groups": [{**g, "betas": "x"} for g in s["opt"]["param_groups"]]}},
    "opt of another shape": lambda s: s | {"opt": {**s["opt"], "state": {i: {**x, "exp_avg": torch.zeros(1)} for i, x in s["opt"]["state"].items()}}},
    "kept a list": lambda s: s | {"kept": [1]}, "kept nothing": lambda s: s | {"kept": {}}, "another best": lambda s: s | {
        "kept": {**s["kept"], "best": "x"}}, "a later best": lambda s: s | {"kept": {**s["kept"], "best_epoch": 7}},
    "a best state of nothing": lambda s: s | {"kept": {**s["kept"], "state": {}}}, "callbacks a list": lambda s: s | {"callbacks": [1]},
    "a seed that is text": lambda s: s | {"seed": "1"}}


@pytest.mark.parametrize("how", SPOILED)
def test_a_checkpoint_with_wrong_contents_is_refused_and_left_alone(tmp_path, saved, how):
    path = tmp_path/"c.pt"
    torch.save(SPOILED[how](dict(saved)), path)
    before = file_hash(path)
    with pytest.raises(InputError, match=r"c\.pt: is damaged \(.*delete it to start this run again"): fitted(path)
    assert file_hash(path) == before and [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_what_a_callback_kept_is_tried_and_an_unspoiled_file_continues(tmp_path, saved):
    path = tmp_path/"c.pt"
    torch.save(saved, path)
    whole = fitted(tmp_path/"whole.pt")
    assert micro.same_weights(fitted(path).model, whole.model)

    class Keeps(ValidateCB):
        def state_dict(self): return {"n": 1}
        def load_state_dict(self, state): self.n = state["n"]
    torch.save({**saved, "callbacks": {"Keeps": {"m": 1}}}, path)
    with pytest.raises(InputError, match=r"c\.pt: is damaged \(KeyError in what a callback kept"):
        Learner(toy_han(), TRAIN, GuidedLoss(), epochs=3, batch_size=16, device="cpu", callbacks=[Keeps(VALID), CheckpointCB(path, "toy")]).fit()


# --- B14: weights ----------------------------------------------------------------------------------------------------

SPEC = RunSpec("han").plain()
SIZES = {**micro.SIZES}


class Tensors:
    "What `save_weights` asks of a model"
    def __init__(self, tensors): self.tensors = tensors
    def state_dict(self): return self.tensors


def weights(path, sizes=None, spec=None, tensors=None, **header):
    tensors = toy_han().state_dict() if tensors is None else tensors
    save_weights(Tensors(tensors), path, {"spec": SPEC if spec is None else spec, "sizes": SIZES if sizes is None else sizes, **header})
    return path


@pytest.mark.parametrize("n", [HUGE, 10**30, 2**22, 9, 0, -8, "8", True, None, 8.0, [8]], ids=str)
@pytest.mark.parametrize("k", ["audio_dim", "motion_dim", "classes", "dim"])
def test_sizes_that_do_not_fit_are_refused_before_memory_is_taken(tmp_path, k, n):
    path = weights(tmp_path/"w.safetensors", {**SIZES, k: n})
    start = time.process_time()
    with pytest.raises(InputError, match=r"w\.safetensors: is not a weights file of this library: "): load_weights(path)
    assert time.process_time() - start < 20


@pytest.mark.parametrize("sizes", [{}, 3, [], {**SIZES, "n_layers": 10**9}, {**SIZES, "more": 1}, {k: v for k, v in SIZES.items() if k != "classes"}])
def test_sizes_of_another_form_are_refused(tmp_path, sizes):
    with pytest.raises(InputError, match=r"w\.safetensors: "): load_weights(weights(tmp_path/"w.safetensors", sizes))


SPOILED_TENSORS = {"more": lambda t: t | {"more": torch.zeros(1)}, "fewer": lambda t: {k: t[k] for k in list(t)[1:]}, "none": lambda t: {},
                   "another shape": lambda t: t | {first(t): torch.zeros(1)}, "another kind": lambda t: t | {first(t): t[first(t)].to(torch.int32)},
                   "NaN": lambda t: t | {first(t): t[first(t)]*math.nan}, "endless": lambda t: t | {first(t): t[first(t)] + math.inf}}


@pytest.mark.parametrize("how", SPOILED_TENSORS)
def test_other_tensors_are_refused(tmp_path, how):
    path = weights(tmp_path/"w.safetensors", tensors=SPOILED_TENSORS[how](dict(toy_han().state_dict())))
    with pytest.raises(InputError, match=r"w\.safetensors: is not a weights file of this library: .*of its network"): load_weights(path)


@pytest.mark.parametrize("spec", [3, {}, {"method": "hna"}, {"method": ["han"]}, {**SPEC, "options": {}}, {**SPEC, "options": None}])
def test_other_specs_are_refused_with_the_file(tmp_path, spec):
    with pytest.raises(InputError, match=r"w\.safetensors: "): load_weights(weights(tmp_path/"w.safetensors", spec=spec))


@pytest.mark.parametrize("names", ["abc", ["a"], [1, 2, 3], {"a": 1}])
def test_other_lists_of_classes_are_refused(tmp_path, names):
    with pytest.raises(InputError, match=r"w\.safetensors: .*classes"): load_weights(weights(tmp_path/"w.safetensors", classes=names))


def test_whole_weights_are_read_and_draw_no_random_numbers(tmp_path):
    path, net = weights(tmp_path/"w.safetensors", classes=["a", "b", "c"]), toy_han()
    assert micro.same_weights(load_weights(path, ["a", "b", "c"])[0], net)


# --- B15: products ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def refinement():
    "One of made-up probabilities"
    rng, weak = np.random.default_rng(0), TRAIN.weak > 0
    swap = SwapTest(*rng.random((6, *weak.shape)).astype(np.float32))
    errors = error_rates(swap.a, swap.v, weak)
    removed = refine_labels(*swap[2:], weak, errors.visual, errors.audio)
    return Refinement(TRAIN.ids, TRAIN.rows, weak, *removed, swap, rng.integers(0, 40, (40, 1)), source={"mark": "toy", "seed": 2})


def without_content(arrays):
    "The head as earlier versions wrote it"
    head = json.loads(str(arrays["head"]))
    del head["content"]
    return {"head": np.array(json.dumps(head))}


@pytest.mark.parametrize("old", [False, True], ids=["now", "an earlier version's"])
@pytest.mark.parametrize("how", ["removed_audio", "removed_visual", "one label", "nothing removed", "threshold"])
def test_a_changed_refinement_is_refused(tmp_path, refinement, how, old):
    refinement.save(tmp_path/"r.npz")
    with np.load(tmp_path/"r.npz") as z: arrays = {k: z[k] for k in z.files}
    if old: arrays |= without_content(arrays)
    weak, audio = arrays["weak"], arrays["removed_audio"].copy()
    assert audio.any()
    audio[tuple(np.argwhere(weak)[0])] ^= True
    head = json.loads(str(arrays["head"])) | {"threshold": 1e-9}
    new = {"removed_audio": {"removed_audio": weak}, "removed_visual": {"removed_visual": weak}, "one label": {"removed_audio": audio},
           "nothing removed": {"removed_audio": weak & False}, "threshold": {"head": np.array(json.dumps(head))}}[how]
    np.savez(tmp_path/"r.npz", **arrays)
    assert np.array_equal(Refinement.load(tmp_path/"r.npz").removed_audio, refinement.removed_audio)
    np.savez(tmp_path/"r.npz", **{**arrays, **new})
    with pytest.raises(InputError, match=r"r\.npz: arrays and fingerprint do not fit together.*delete it and refine again"):
        Refinement.load(tmp_path/"r.npz")


@pytest.mark.parametrize("new", [{"removed_audio": np.ones((40, 3), bool)}, {"rows": np.zeros(3)}, {"weak": np.ones(3)}, {"removed_audio": np.zeros((40, 3))},
                                 {"swap_v_a": np.zeros((40, 3), int)}, {"ids": np.arange(40)}, {"partners": None}, {"rows": None}, {"swap_a": None}])
def test_a_refinement_whose_arrays_do_not_fit_is_refused_by_name(tmp_path, refinement, new):
    refinement.save(tmp_path/"r.npz")
    with np.load(tmp_path/"r.npz") as z: arrays = {**{k: z[k] for k in z.files}, **new}
    np.savez(tmp_path/"r.npz", **{k: x for k, x in arrays.items() if x is not None})
    with pytest.raises(InputError, match=r"r\.npz: "): Refinement.load(tmp_path/"r.npz")


def terabyte(path):
    "An archive with the header of an array of ten terabytes"
    import io
    import zipfile
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)})
    with zipfile.ZipFile(path, "w") as z: z.writestr("audio.npy", header.getvalue())


@pytest.mark.parametrize("how", ["folder", "text", "terabyte", "objects", "lengths", "NaN", "above 1", "negative", "whole numbers", "table",
                                 "one missing", "changed", "missing"])
def test_ratios_that_are_none_are_refused_by_name(tmp_path, how):
    path, x = tmp_path/"r.npz", np.full(3, .25)
    arrays = {"objects": {"audio": np.array([{}])}, "lengths": {"audio": np.ones(2)}, "NaN": {"audio": x*math.nan}, "above 1": {"visual": x + 1},
              "negative": {"visual": -x}, "whole numbers": {"audio": np.ones(3, int)}, "table": {"audio": np.ones((3, 1))}}
    if how == "folder": path.mkdir()
    elif how == "text": path.write_text("ratios")
    elif how == "terabyte": terabyte(path)
    elif how == "one missing": np.savez(path, audio=x)
    elif how == "changed":
        Ratios(x, x).save(path)
        with np.load(path) as z: np.savez(path, **{**{k: z[k] for k in z.files}, "audio": x + .1})
    elif how != "missing": np.savez(path, **{"audio": x, "visual": x, **arrays[how]})
    with pytest.raises(InputError, match=r"r\.npz: "): Ratios.load(path)


def test_ratios_of_earlier_versions_are_read(tmp_path):
    x = np.array([.1, .25, 1/3])
    np.savez(tmp_path/"old.npz", audio=x, visual=x)
    Ratios(x, x).save(tmp_path/"new.npz")
    for p in tmp_path.iterdir(): assert np.array_equal(Ratios.load(p).audio, x)


def test_a_run_with_a_changed_product_trains_nothing(tmp_path, micro_scale):
    store, spec = Store(tmp_path), RunSpec("ma", scale="micro")
    record = run(spec, store, device="cpu", progress="off")
    (path,) = (tmp_path/"products").glob("ma-*.npz")
    with np.load(path) as z: arrays = {k: z[k] for k in z.files}
    whole = path.read_bytes()
    np.savez(path, **{**arrays, "removed_audio": arrays["weak"]})
    store.record_path(record["key"]).unlink()
    with pytest.raises(InputError, match=rf"{path.name}: arrays and fingerprint"): run(spec, store, device="cpu", progress="off")
    assert not list(tmp_path.glob("checkpoints/*.pt"))
    path.write_bytes(whole)
    again = run(spec, store, device="cpu", progress="off")
    assert (again["key"], again["metrics"]) == (record["key"], record["metrics"])


# --- B10: numbers of a spec ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("value", [2**63, 2**64, 10**30, 10**5000, -2**63 - 1, True, math.nan, math.inf, 1.0, "1"], ids=lambda x: f"{x!r}"[:20] if x != 10**5000 else "long")
@pytest.mark.parametrize("name", ["seed", "epochs"])
def test_a_spec_with_an_impossible_number_is_refused_by_name(name, value):
    with pytest.raises(InputError, match=rf"^{name}: ") as e: RunSpec(**{name: value})
    assert len(str(e.value)) < 400


@pytest.mark.parametrize("method, option, value", [("dgm", "gamma", math.nan), ("dgm", "gamma", math.inf), ("ma", "n_partners", 2**63),
                                                   ("ma", "n_partners", True), ("ma", "threshold", math.nan), ("ma", "tau", 10**400)])
def test_options_are_numbers_that_can_be_computed_with(method, option, value):
    with pytest.raises(InputError, match=rf"^{option}: "): RunSpec(method, {option: value})


def test_run_keys_stay():
    identity = {"annotations": "embedded"}
    assert [run_key(s, identity) for s in (RunSpec(), RunSpec("dgm", {"gamma": .2}, "han", scale="tiny", seed=3))] == KEYS
    assert RunSpec(seed=2**63 - 1).seed == 2**63 - 1


KEYS = ["han-4423daf4941d9e72", "dgm-9cdd71faf6881f41"]


# --- L2, L3, C2, C3: stores that were killed, or are shared ----------------------------------------------------------

def test_a_left_checkpoint_goes_when_the_record_is_found(done, tmp_path):
    store, record = Store(tmp_path), done[1]
    write_json(record, store.record_path(record["key"]))
    path, other = store.checkpoint_path(record["key"]), store.checkpoint_path("han-unfinished")
    path.parent.mkdir()
    for p in (path, other): p.write_bytes(b"x")
    with store.lock(record["key"]): assert store.record(record["key"]) == record and path.exists()          # somebody is at work
    assert store.record(record["key"]) == record and not path.exists() and other.exists()
    assert store.record("han-unfinished") is None and other.exists()


def test_a_killed_look_at_the_folder_leaves_nothing(tmp_path, monkeypatch):
    "The file that is tried has no name, or loses it at once"
    class Killed(BaseException): pass
    def killed(*args): raise Killed
    for name in ("fsync", "replace"): monkeypatch.setattr(core.os, name, killed)
    Folder(tmp_path/"runs").prepare()
    assert not list((tmp_path/"runs").iterdir())


def test_what_earlier_versions_left_of_it_goes_when_it_is_old(tmp_path):
    left, fresh = tmp_path/"..writable.123.abcd.part", tmp_path/"..writable.124.abcd.part"
    for p in (left, fresh, tmp_path/".writable", tmp_path/"mine.part"): p.write_text("")
    for p in (left, tmp_path/".writable", tmp_path/"mine.part"): os.utime(p, (1e9, 1e9))
    Folder(tmp_path).prepare()
    assert sorted(p.name for p in tmp_path.iterdir()) == [fresh.name, "mine.part"]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("mode", [0o777, 0o775, 0o755, 0o700])
def test_locks_have_the_permissions_of_their_folder(tmp_path, mode):
    (tmp_path/"locks").mkdir()
    (tmp_path/"locks").chmod(mode)
    old = os.umask(0o022)
    try:
        with Store(tmp_path).lock("han-1"): pass
    finally: os.umask(old)
    assert stat.S_IMODE((tmp_path/"locks"/"han-1.lock").stat().st_mode) == mode & 0o666


def test_a_lock_that_cannot_be_taken_is_named(tmp_path):
    store = Store(tmp_path)
    (tmp_path/"locks"/"han-1.lock").mkdir(parents=True)
    with pytest.raises(InputError, match=r"han-1\.lock: cannot be locked \(.*another store"): store.lock("han-1").acquire()
    with store.lock("han-2"), pytest.raises(TimeoutError): Store(tmp_path).lock("han-2").acquire(timeout=0)
    (tmp_path/"file").write_text("")
    with pytest.raises(InputError, match="locks: could not be written"): Store(tmp_path/"file").lock("han-1")


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_lock_that_another_user_forbids_is_named(tmp_path, monkeypatch):
    store, real = Store(tmp_path), os.open
    def forbidden(path, *args, **kw):
        if str(path).endswith(".lock"): raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kw)
    monkeypatch.setattr(os, "open", forbidden)
    with pytest.raises(InputError, match=r"han-1\.lock: cannot be locked \(Permission denied\).*chmod"): store.lock("han-1").acquire(timeout=1)


def test_a_recorded_run_is_read_without_writing(done, monkeypatch):
    "Whatever would write fails, as in a store that is read-only; nothing is tried"
    store, record = done
    before = {p: p.stat().st_mtime_ns for p in store.root.rglob("*")}
    def refuse(*args, **kw): raise OSError(30, "Read-only file system")
    for name in ("replace", "unlink", "mkdir"): monkeypatch.setattr(os, name, refuse)
    fresh = Store(store.root)
    assert fresh.record(record["key"]) == record and fresh.records() == [record] and len(fresh.probabilities(record))
    assert {p: p.stat().st_mtime_ns for p in store.root.rglob("*")} == before


def test_a_left_checkpoint_in_a_read_only_store_is_borne(done, tmp_path, monkeypatch):
    store, record = Store(tmp_path), done[1]
    write_json(record, store.record_path(record["key"]))
    store.checkpoint_path(record["key"]).parent.mkdir()
    store.checkpoint_path(record["key"]).write_bytes(b"x")
    def refuse(*args, **kw): raise OSError(30, "Read-only file system")
    for name in ("unlink", "mkdir", "open"): monkeypatch.setattr(os, name, refuse)
    assert store.record(record["key"]) == record and store.checkpoint_path(record["key"]).exists()


# --- stored predictions ----------------------------------------------------------------------------------------------

def with_arrays(tmp_path, arrays):
    "A store with a record of these arrays"
    store, record = Store(tmp_path), bare_record("han-1")
    with atomic_write(store.probability_path("han-1"), "wb") as f: np.savez(f, **arrays)
    record["probabilities"] = {"sha256": file_hash(store.probability_path("han-1"))}
    return store, record


def test_predictions_name_their_videos_and_classes(done, tmp_path):
    store, record = done
    full, without = store.probabilities(record), store.probabilities(record, without=True)
    ids, classes = [f"vid{i}_é_0_10" for i in range(len(full))], ["Cat"]*full.video.shape[1]
    packed = pack_probabilities(full, without, ids, classes)
    new, named = with_arrays(tmp_path, packed)
    assert new.names(named) == (ids, classes)
    for a, b in zip((full, without), passes_of(packed)): assert all(np.array_equal(x, b.arrays()[k]) for k, x in a.arrays().items())
    plain = pack_probabilities(full, without)
    assert new.probabilities(named).video.shape == full.video.shape and set(packed) - set(plain) == {"ids", "classes"}
    with np.load(new.probability_path("han-1"), allow_pickle=False) as z: assert z["ids"].dtype.kind == z["classes"].dtype.kind == "U"
    for names in ({"ids": ids[:-1]}, {"classes": []}):
        with pytest.raises(InputError, match=rf"^{next(iter(names))}: "): pack_probabilities(full, without, **names)


def test_predictions_without_names_are_read_as_before(done, tmp_path):
    full, without = (done[0].probabilities(done[1], w) for w in (False, True))
    store, record = with_arrays(tmp_path, pack_probabilities(full, without))
    assert store.names(record) == (None, None) and np.array_equal(store.probabilities(record).segments, full.segments)


@pytest.mark.parametrize("arrays", [{}, {"video": np.ones(3)}, {"video": np.ones((2, 3)), "audio": np.ones((2, 3)), "visual": np.ones((2, 3)), "segments": np.ones((1, 5, 2, 3))},
                                    {"video": np.array(["x"])}, {"video": np.array([{}])}])
def test_predictions_that_do_not_fit_are_refused_by_name(tmp_path, arrays):
    store, record = with_arrays(tmp_path, arrays)
    with pytest.raises(InputError, match=r"han-1\.npz: "): store.probabilities(record)


# --- versions --------------------------------------------------------------------------------------------------------

def test_records_of_several_versions_are_never_put_together_silently():
    a, b = (invented_record(seed, versions={"avvp_nb": v}) for seed, v in ((1, "0.1.0"), (2, "9.0")))
    assert "0.1.0 and 9.0" in versions_note([a, b]) and provenance([a, b])["versions"] == ["0.1.0", "9.0"]
    assert versions_note([a]) == versions_note([a, invented_record(3)]) == "" and "versions" not in provenance([a, invented_record(3)])
    assert "9.0" in versions_note([a], "9.0") and versions_note([a], "0.1.0") == ""


def test_committed_records_are_of_one_version_and_whole():
    from tree import ROOT
    records = [whole_record(p) for p in sorted((ROOT/"figures"/"records").glob("*.json"))]
    assert records and versions_note(records) == "" and all(read_json(ROOT/"figures"/"records"/f"{r['key']}.json") == r for r in records)
