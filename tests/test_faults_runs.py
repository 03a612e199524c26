"""Faults of making, publishing, collecting and repeating runs: whose stage, whose key, what a link points to, what killed processes
leave, what a merge lets in, how large a grid may be, and what is done with a store that may only be read."""
import argparse
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading

import micro
import numpy as np
import pytest

from avvp_nb import runs
from avvp_nb.core import InputError, file_hash, read_json, write_json
from avvp_nb.runs import gpu_report as reporting
from avvp_nb.runs import merge as merging
from avvp_nb.runs import remote as remotes
from avvp_nb.runs import reproduce as reproducing
from avvp_nb.runs import single, stacked
from avvp_nb.runs.grid import expand, read_grid
from avvp_nb.runs.remote import Remote, default_stage, pull, push
from avvp_nb.runs.sweep import sweep

posix = pytest.mark.skipif(os.name != "posix", reason="owners, links and pipes of POSIX")


@pytest.fixture(autouse=True)
def small(monkeypatch): micro.install(monkeypatch.setitem)


def han(seed=1, **kw): return runs.RunSpec("han", scale="micro", seed=seed, epochs=1, **kw)


MA = dict(options={"refine": "audio"}, scale="micro", epochs=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A store with a run of MA and of its base model"
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as m:
        micro.install(m.setitem)
        runs.run(runs.RunSpec("ma", **MA), root, "cpu", "off")
    return root


@pytest.fixture
def store(made, tmp_path):
    "A copy of it that may be spoilt"
    shutil.copytree(made, tmp_path / "store")
    return runs.Store(tmp_path / "store")


def staged(store):
    "The record of its run of MA"
    return next(r for r in store.records() if r["first"])


def killed_while_writing(path):
    "Leave what a process leaves that is killed in `atomic_write`"
    code = f"import os; from avvp_nb.core import atomic_write\nwith atomic_write({str(path)!r}) as f: f.write('x'); f.flush(); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code])
    (part,) = path.parent.glob(f".{path.name}.*.part")
    return part


def times(root):
    "When each file and folder was last changed"
    return {p: p.stat().st_mtime_ns for p in [root, *root.rglob("*")]}


# --- S1: whose stage -------------------------------------------------------------------------------------------------

@pytest.fixture
def temp(tmp_path, monkeypatch):
    "A temporary folder of its own"
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))
    return tmp_path / "temp"


@posix
def test_the_default_stage_is_for_its_owner_alone(temp):
    remote = Remote("memory://mine")
    assert remote.store.root.parent.parent == temp and stat.S_IMODE(remote.store.root.parent.stat().st_mode) == 0o700
    remote.store.root.parent.chmod(0o755)                       # as earlier versions made it: closed, and used
    assert Remote("memory://mine").store.root == remote.store.root and stat.S_IMODE(remote.store.root.parent.stat().st_mode) == 0o700


def planted_link(folder, elsewhere): folder.symlink_to(elsewhere)
def planted_open(folder, elsewhere): folder.mkdir(); folder.chmod(0o777)
def planted_file(folder, elsewhere): folder.write_text("")


@posix
@pytest.mark.parametrize("plant, said", [(planted_link, "is a link"), (planted_open, "can be written to by other users"), (planted_file, "is no folder")])
def test_a_stage_that_others_could_have_prepared_is_refused(temp, tmp_path, plant, said):
    (tmp_path / "elsewhere").mkdir()
    plant(temp / f"avvp_nb-{os.getuid()}", tmp_path / "elsewhere")
    with pytest.raises(InputError, match=f"avvp_nb-{os.getuid()}: {said}.*--stage"): sweep([han()], "memory://planted", device="cpu", progress="off")
    assert not any((tmp_path / "elsewhere").iterdir())
    Remote("memory://planted", tmp_path / "named")              # a folder that is named is used


@posix
def test_a_stage_of_another_user_is_refused(temp, monkeypatch):
    monkeypatch.setattr(remotes.os, "getuid", lambda uid=os.getuid(): uid + 1)
    with pytest.raises(InputError, match="belongs to another user"): default_stage("memory://theirs")


# --- S2: whose key ---------------------------------------------------------------------------------------------------

@pytest.fixture
def published(store, tmp_path):
    "(URL, folder behind it, key) of a published run"
    url, key = f"file://{tmp_path}/bucket/deep/remote", staged(store)["key"]
    assert push(Remote(url, store.root), key)
    return url, tmp_path / "bucket" / "deep" / "remote", key


CHANGES = {"a key that leads out": (lambda r: {**r, "key": "../../PLANTED"}, "no name"),
           "an absolute key": (lambda r: {**r, "key": "/PLANTED"}, "no name"),
           "the key of another run": (lambda r: {**r, "key": "han-0123456789abcdef"}, "is the record of han-0123456789abcdef"),
           "a backbone that leads out": (lambda r: {**r, "spec": {**r["spec"], "backbone": "../../PLANTED"}}, "no name"),
           "an unknown backbone": (lambda r: {**r, "spec": {**r["spec"], "backbone": "PLANTED"}}, "does not follow from its spec|known here"),
           "another spec": (lambda r: {**r, "spec": {**r["spec"], "seed": 7}}, "does not follow from its spec"),
           "no spec": (lambda r: {**r, "spec": None}, "is a damaged run record"),
           "no record": (lambda r: [r], "is not a whole run record")}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_downloaded_record_says_of_itself_names_no_file(published, tmp_path, name):
    url, bucket, key = published
    change, said = CHANGES[name]
    for folder, end in (("probabilities", "npz"), ("weights", "safetensors"), ("products", "npz")):
        for p in (bucket / folder / f"../../PLANTED.{end}", bucket / folder / f"PLANTED.{end}"): p.resolve().write_bytes(b"planted")
    write_json(change(read_json(bucket / "records" / f"{key}.json")), bucket / "records" / f"{key}.json")
    home = runs.Store(tmp_path / "x" / "y" / "home")
    with pytest.raises(InputError, match=said) as e: pull(Remote(url, tmp_path / "new"), key, home)
    assert f"records/{key}.json" in str(e.value)
    assert not [p for p in (tmp_path / "x").rglob("*") if p.is_file() and p.parent.name != "locks"]


@pytest.mark.parametrize("key", ["../../PLANTED", "/etc/passwd", "", None, "a/b"])
def test_only_a_plain_key_is_asked_for(published, tmp_path, key):
    with pytest.raises(InputError, match="is not the key of a run"): pull(Remote(published[0], tmp_path / "new"), key)


def test_damaged_probabilities_are_not_written(published, tmp_path):
    url, bucket, key = published
    (bucket / "probabilities" / f"{key}.npz").write_bytes(b"changed")
    with pytest.raises(InputError, match="is missing or not the file of its record"): pull(Remote(url, tmp_path / "new"), key)
    assert not list((tmp_path / "new").rglob("*.npz"))


def test_a_run_is_collected_whole(published, store, tmp_path):
    url, _, key = published
    assert pull(Remote(url, tmp_path / "new"), key) == store.record(key)
    assert (tmp_path / "new" / remotes.product_file(store.record(key))[0]).exists()


# --- S4: what a link points to ---------------------------------------------------------------------------------------

@posix
@pytest.mark.parametrize("part", merging.PARTS)
@pytest.mark.parametrize("kind", ["link", "dangling link", "linked folder", "pipe"])
def test_a_merge_follows_no_links(store, tmp_path, part, kind):
    secret, folder = tmp_path / "secret", store.root / part
    secret.write_text("secret")
    victim = sorted(folder.iterdir())[-1]
    if kind == "linked folder":
        folder.rename(tmp_path / "moved")
        folder.symlink_to(tmp_path / "moved")
    else:
        victim.unlink()
        if kind == "pipe": os.mkfifo(victim)
        else: victim.symlink_to(secret if kind == "link" else tmp_path / "nothing")
    with pytest.raises(InputError, match=f"{part}.*: is (a link|no file)"): merging.merge(store, tmp_path / "home")
    assert not (tmp_path / "home").exists()


def test_a_product_that_belongs_to_no_run_stays_where_it_is(store, tmp_path):
    shutil.copy(sorted((store.root / "products").iterdir())[0], store.root / "products" / "x.npz")
    assert merging.merge(store, tmp_path / "home")["copied"]["products"] == 1
    assert not (tmp_path / "home" / "products" / "x.npz").exists()


# --- B12: what a merge lets in ---------------------------------------------------------------------------------------

def rewrite(part, change):
    "Damage: a record with changed contents"
    def spoil(store, key): write_json({**store.record(key), part: change(store.record(key)[part])}, store.record_path(key))
    return spoil


def garbled(store, key):
    "Probabilities that are no archive, and a record with their hash"
    store.probability_path(key).write_bytes(b"garbage")
    rewrite("probabilities", lambda p: {**p, "sha256": file_hash(store.probability_path(key))})(store, key)


def lacking(store, key):
    "Probabilities without an array, and a record with their hash"
    np.savez(store.probability_path(key), video=np.zeros((1, 25), np.float16))
    rewrite("probabilities", lambda p: {**p, "sha256": file_hash(store.probability_path(key))})(store, key)


def exchanged(store, key):
    other = next(r["key"] for r in store.records() if r["key"] != key)
    shutil.copy(store.weight_path(other), store.weight_path(key))


def cut_weights(store, key): store.weight_path(key).write_bytes(store.weight_path(key).read_bytes()[:-8])
def bad_product(store, key): (store.root / remotes.product_file(store.record(key))[0]).write_bytes(b"garbage")


BROKEN = {"spec null": (rewrite("spec", lambda x: None), "records/.*spec is None"),
          "data null": (rewrite("data", lambda x: None), "records/.*data is None"),
          "metrics null": (rewrite("metrics", lambda x: None), "records/.*metrics is None"),
          "another seed": (rewrite("spec", lambda x: {**x, "seed": 9}), "records/.*does not follow from its spec and data"),
          "other data": (rewrite("data", lambda x: {**x, "identity": {}}), "records/.*does not follow from its spec and data"),
          "garbage with its hash": (garbled, "probabilities/.*could not be read"),
          "an array is missing": (lacking, "probabilities/.*is missing"),
          "cut weights": (cut_weights, "weights/.*is not a weights file"),
          "weights of another run": (exchanged, "weights/.*are the weights of another run"),
          "garbage as a product": (bad_product, "products/.*")}


@pytest.mark.parametrize("name", BROKEN)
def test_a_merge_lets_nothing_broken_in(store, tmp_path, name):
    spoil, said = BROKEN[name]
    key = staged(store)["key"]
    spoil(store, key)
    with pytest.raises(InputError, match=said): merging.merge(store, tmp_path / "home")
    assert not (tmp_path / "home").exists()


def test_a_whole_store_is_merged(store, tmp_path):
    assert merging.merge(store, tmp_path / "home")["copied"] == {"probabilities": 2, "weights": 2, "products": 1, "videos": 2, "records": 2}


# --- L2, L4, L5, L8: what killed processes leave ---------------------------------------------------------------------

@posix
def test_the_leftovers_of_a_killed_run_go_with_the_next(store):
    key = staged(store)["key"]
    parts = [killed_while_writing(p) for p in (store.root / remotes.product_file(staged(store))[0], store.weight_path(key), store.record_path("ma-other"))]
    mine = store.root / "products" / f".ma-1.npz.{os.getpid()}.0a1b2c3d.part"
    mine.touch()
    store.record_path(key).unlink()
    runs.run(runs.RunSpec("ma", **MA), store, "cpu", "off")
    assert not any(p.exists() for p in parts) and mine.exists()               # that of a living process is left alone


@posix
def test_the_leftovers_of_a_killed_merge_go_with_the_next(store, tmp_path):
    home = tmp_path / "home"
    for p in merging.PARTS: (home / p).mkdir(parents=True)
    parts = [killed_while_writing(home / p / f"han-1.{end}") for p, end in merging.PARTS.items()]
    merging.merge(store, home)
    assert len(parts) == len(merging.PARTS) == 5 and not list(home.rglob("*.part"))


@posix
def test_the_leftovers_of_a_killed_table_go_with_the_next(tmp_path, monkeypatch):
    killed_while_writing_in = tmp_path / "tables"
    killed_while_writing_in.mkdir()
    for end in ("html", "json"): killed_while_writing(killed_while_writing_in / f"han_1_micro_simulated.{end}")
    with pytest.raises(InputError, match="none of its runs is recorded"): reproducing.reproduce("han", 1, "micro", (1,), tmp_path, "cpu", "off", train=False)
    assert not list(tmp_path.rglob("*.part"))


@posix
def test_what_somebody_is_writing_stays(store):
    part = killed_while_writing(store.weight_path("han-1"))
    with single.turn(store, "han-1"): assert single.sweep_store(store) == 0 and part.exists()     # as seen from another machine
    assert single.sweep_store(store) == 1 and not part.exists()


def test_a_checkpoint_beside_a_record_goes(store):
    key = staged(store)["key"]
    store.checkpoint_path(key).parent.mkdir(exist_ok=True)
    for call in (runs.run, lambda s, *a: runs.run_stacked([s], *a), lambda s, *a: runs.run_many([s], *a)):
        store.checkpoint_path(key).write_bytes(b"left")
        call(runs.RunSpec("ma", **MA), store, "cpu", "off")
        assert not store.checkpoint_path(key).exists()


# --- B21: how large a grid may be ------------------------------------------------------------------------------------

def refused(tmp_path, text, said, name="grid.yaml"):
    if name.endswith("yaml"): pytest.importorskip("yaml")
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=said) as e: read_grid(tmp_path / name)
    assert name in str(e.value) and len(str(e.value)) < 3000


MILLIONS = {"method": "han", "seed": list(range(2000)), "epochs": list(range(1, 2000))}


@pytest.mark.parametrize("grid", [MILLIONS, [MILLIONS], [{"method": "han", "seed": list(range(100)), "epochs": [1] * 100}] * 200,
                                  {"method": "dgm", "options": {"gamma": [.1] * 5000, "msdu": [True] * 5000}},
                                  {"tables": {"paper": "dgm"}, "seed": list(range(9999))}], ids=str)
def test_a_grid_of_millions_is_refused_before_it_is_made(tmp_path, grid, monkeypatch):
    made, one = [], reproducing.plan("han", 1, "tiny").specs[0]
    monkeypatch.setattr("avvp_nb.runs.grid.spec_at", lambda where, **kw: made.append(kw) or one)
    refused(tmp_path, json.dumps(grid), "[0-9,]+ combinations. expected at most 10,000", "grid.json")
    assert len(made) <= 20_000


LAUGHS = "a0: &a0 [1, 2]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40))
MERGED = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 40))


@pytest.mark.parametrize("text, said", [(LAUGHS, "too many values"), (MERGED, "too many values"), ("seed: &a [*a]", "contains itself"), ("[" * 100_000, "nested too deep"),
                                        ("{a: " * 5000, "nested too deep"), ("seed: [" + "1, " * 200_000 + "1]", "too many values"), ("# \n" * 400_000, "bytes"),
                                        ("seed: 2020-13-45", "cannot be read"), ("? [1, 2]\n: 3", "cannot be read|not valid|no such key")],
                         ids=["aliases", "merge keys", "itself", "lists", "mappings", "values", "bytes", "date", "key"])
def test_a_bomb_of_yaml_is_refused(tmp_path, text, said): refused(tmp_path, text, said)


@pytest.mark.parametrize("text, said", [("[" * 100_000, "nested too deep"), (json.dumps({"method": ["x" * 1_000_000]}), "is not possible|bytes"),
                                        (json.dumps(["x"] * 100_000), "is a str"), (json.dumps({"x" * 900_000: 1}), "no such key"),
                                        (json.dumps({"method": "han", "options": 0}), "0 is a int"), (json.dumps({"data": {"sim": 3}}), "sim: 3 is a int")],
                         ids=["deep", "long value", "many texts", "long key", "options", "sim"])
def test_a_bomb_of_json_is_refused(tmp_path, text, said): refused(tmp_path, text, said, "grid.json")


def test_a_large_grid_that_can_be_meant_is_read():
    assert len(expand({"method": "han", "seed": list(range(3000)), "epochs": [1]})) == 3000


def test_aliases_may_be_used(tmp_path):
    pytest.importorskip("yaml")
    (tmp_path / "g.yaml").write_text("- &a {method: han, seed: &s [1, 2]}\n- {<<: *a, epochs: 3}\n- {method: ma, seed: *s}\n")
    assert len(read_grid(tmp_path / "g.yaml")) == 6


def test_a_table_of_a_grid_that_does_not_exist_is_named_with_the_file(tmp_path):
    refused(tmp_path, json.dumps({"tables": {"paper": "dgm", "table": "IX"}}), "grid.json: tables: table of dgm: 'IX' is not possible", "grid.json")


# --- B22: settings ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [0, -3])
def test_a_stack_of_no_runs_is_refused(tmp_path, monkeypatch, n):
    for name in ("run", "run_stacked"): monkeypatch.setattr(stacked, name, lambda *_, **__: pytest.fail("worked"))
    with pytest.raises(InputError, match=f"stack: {n} is not possible. expected at least 1"): stacked.run_many([han()], tmp_path / "out", "cpu", "off", stack=n)
    with pytest.raises(InputError, match=f"stack: {n} is not possible. expected at least 1"): sweep([han()], tmp_path / "out", device="cpu", stack=n)
    with pytest.raises(InputError, match=f"stack: {n} is not possible. expected at least 1"): reporting.gpu_report(tmp_path / "out", "micro", device="cpu", stack=n)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("setting", [dict(progress="x"), dict(gpus=-1.), dict(gpus=float("nan")), dict(retries=-1), dict(minutes=0), dict(pulse=0.), dict(patience=float("nan"))], ids=str)
def test_settings_of_a_sweep_are_checked_before_any_work(tmp_path, setting):
    (k, x), = setting.items()
    with pytest.raises(InputError, match=f"^{k}: {x!r} is not possible. expected"): sweep([han()], tmp_path / "out", device="cpu", **setting)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("budget", [-1., 0., float("nan"), float("inf")])
def test_a_budget_is_a_number_of_seconds(tmp_path, budget):
    with pytest.raises(InputError, match=f"budget: {budget} is not possible"): reporting.gpu_report(tmp_path / "out", "micro", budget, device="cpu")
    assert not (tmp_path / "out").exists()


# --- C3: a store that may only be read -------------------------------------------------------------------------------

def test_a_recorded_run_is_read_without_writing(store, monkeypatch):
    monkeypatch.setattr(runs.Store, "prepare", lambda self: pytest.fail("wrote"))
    monkeypatch.setattr(runs.Store, "lock", lambda self, key: pytest.fail("locked"))
    spec, before = runs.RunSpec("ma", **MA), times(store.root)
    want = staged(store)
    assert runs.run(spec, store, "cpu", "off") == want
    assert runs.run_many([spec, spec], store, "cpu", "off") == [want] * 2
    assert runs.run_stacked([spec], store, "cpu", "off", size=2) == [want]
    assert times(store.root) == before


def test_tables_that_cannot_be_saved_are_named_before_any_work(store, monkeypatch):
    (store.root / "tables").write_text("in the way")             # as a folder that may only be read, for root as well
    monkeypatch.setattr(reproducing, "train_missing", lambda *_: pytest.fail("trained"))
    for train in (False, True):
        with pytest.raises(InputError, match="store/tables: tables cannot be saved here: could not be written.*a folder of your own"):
            reproducing.reproduce("ma", 1, "micro", (1,), store, "cpu", "off", train=train)


# --- whom one waits for ----------------------------------------------------------------------------------------------

def test_who_waits_says_once_for_whom(store, capsys):
    key = staged(store)["key"]
    store.record_path(key).rename(store.root / "aside")
    got = []
    other = threading.Thread(target=lambda: got.append(runs.run(runs.RunSpec("ma", **MA), store, "cpu", "lines")))
    with single.turn(store, key):
        other.start()
        said = ""
        while "\n" not in said and other.is_alive(): other.join(.02); said += capsys.readouterr().err
        (store.root / "aside").rename(store.record_path(key))
    other.join()
    said += capsys.readouterr().err
    assert said.count("waiting for") == 1 and f"{key}: waiting for process {os.getpid()} on " in said and got == [store.record(key)]
    assert not list((store.root / "locks").glob("*.owner"))


@pytest.mark.parametrize("note, shown", [("process 7 on \x1b[31mred", "process 7 on ?[31mred"), ("x" * 5000, "x" * 200), ("", "another process")], ids=["escape", "long", "empty"])
def test_a_note_beside_a_lock_is_shown_safely(tmp_path, note, shown):
    (tmp_path / "note").write_text(note)
    assert single.holder(tmp_path / "note") == shown


# --- fresh -----------------------------------------------------------------------------------------------------------

def finished(store): return {p.stem: p.stat().st_mtime_ns for p in (store.root / "records").iterdir()}


def test_a_fresh_run_replaces_its_record_and_only_that(store):
    key, before, old = staged(store)["key"], finished(store), staged(store)
    again = runs.run(runs.RunSpec("ma", **MA), store, "cpu", "off", fresh=True)
    assert {k for k, t in finished(store).items() if t != before[k]} == {key}
    assert all(again[k] == old[k] for k in ("key", "probabilities", "metrics", "first"))


@pytest.mark.parametrize("stack", [1, 4])
def test_a_fresh_list_is_trained_again_from_its_first_epoch(tmp_path, stack):
    specs, store = [han(s) for s in (1, 2, 3)], runs.Store(tmp_path)
    old = runs.run_many(specs, store, "cpu", "off", stack)
    store.checkpoint_path(old[0]["key"]).write_bytes(b"not a checkpoint")             # nothing is continued
    before = finished(store)
    new = runs.run_many(specs[:2], store, "cpu", "off", stack, fresh=True)
    assert [finished(store)[r["key"]] > before[r["key"]] for r in old] == [True, True, False]
    assert [len(r["history"]) for r in new] == [1, 1] and not list(tmp_path.glob("checkpoints/*"))


def test_an_interrupted_fresh_run_leaves_the_old_record(store, monkeypatch):
    want, before = staged(store), times(store.root / "records")

    def stop(*_, **__): raise KeyboardInterrupt
    monkeypatch.setattr(single, "predict_both", stop)
    with pytest.raises(KeyboardInterrupt): runs.run(runs.RunSpec("ma", **MA), store, "cpu", "off", fresh=True)
    assert times(store.root / "records") == before and runs.run(runs.RunSpec("ma", **MA), store, "cpu", "off") == want
    store.probabilities(want)


def test_reproduce_repeats_what_is_recorded(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(reproducing, "run", lambda *a, **kw: calls.append(kw))
    specs = reproducing.plan("han", 1, "micro", (1,)).specs
    monkeypatch.setattr(reproducing, "stored", lambda specs, store: dict.fromkeys(range(len(specs)), ("key", True)))
    assert reproducing.train_missing(specs, tmp_path, "cpu", "off") == 0 and calls == []
    assert reproducing.train_missing(specs, tmp_path, "cpu", "off", fresh=True) == len(specs) and calls == [{"fresh": True}] * len(specs)
    p = argparse.ArgumentParser()
    reproducing.add_arguments(p)
    assert p.parse_args(["han", "--fresh"]).fresh and not p.parse_args(["han"]).fresh
