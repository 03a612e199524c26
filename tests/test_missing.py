"""Videos whose features are missing or damaged: a run stops, or is told to go on and says so wherever its numbers go."""
import contextlib
import io
import json
import os
import re
import shutil
from dataclasses import replace

import micro
import numpy as np
import pytest
from tree import NOTEBOOKS

from avvp_nb import cli, runs
from avvp_nb.core import InputError, read_json, write_json
from avvp_nb.data import sources
from avvp_nb.data.annotations import load_annotations
from avvp_nb.data.clips import check_present, load_clips
from avvp_nb.data.features import FEATURE_SETS, layout_source, write_layout
from avvp_nb.data.packed import open_store, pack
from avvp_nb.data.sim_files import write_simulated
from avvp_nb.data.sources import DataSpec, Scale, identify, load_data, missing_note, missing_videos
from avvp_nb.data.unav100 import load_unav
from avvp_nb.data.unav_features import n_rows, pack_unav, unav_file
from avvp_nb.data.unav_simulate import write_unav
from avvp_nb.records.invented import invented
from avvp_nb.records.spec import run_key
from avvp_nb.records.store import check_whole
from avvp_nb.results.claims_page import claims_table
from avvp_nb.results.compare import compare, ours, rules_table, stack
from avvp_nb.results.groups import invented_record, provenance
from avvp_nb.results.plans import all_specs
from avvp_nb.results.rules import cross_table, only_table
from avvp_nb.results.table import table_of
from avvp_nb.runs.grid import read_grid
from avvp_nb.runs.sweep import on_missing_as

SIZES = {"train": 6, "val": 4, "test": 5}
SENTENCE = "Without 3 train and 1 test videos whose features are missing or damaged."


@pytest.fixture(autouse=True)
def small(monkeypatch):
    micro.install(monkeypatch.setitem)
    monkeypatch.setitem(sources.SCALES, "two", Scale(2, 2, 2, epochs=1, select="last"))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    "Both data sets in their authors' layouts, whole"
    root = tmp_path_factory.mktemp("written")
    write_simulated(root/"llp", SIZES)
    write_unav(root/"unav", SIZES)
    return root


class Copy:
    "A copy of one data set that may be spoilt"
    def __init__(self, written, root, name):
        self.root, self.name = shutil.copytree(written/name, root/name), name
        self.labels = self.root/"data" if name == "llp" else self.root
        self.annotations = load_annotations(self.labels) if name == "llp" else load_unav(self.labels)

    def data(self, **kw):
        kw = {"features": str(self.root), **kw}
        return DataSpec(str(self.labels), dataset="llp" if self.name == "llp" else "unav100", **kw)

    def file(self, split, k, m="audio"):
        if self.name == "unav": return unav_file(self.root, self.annotations[split].ids[k], m)
        return self.root/"feats"/FEATURE_SETS[m].folder/f"{self.annotations[split].video_ids[k]}.npy"

    def spoil(self):
        "Three training videos and one of test: nothing there, half of it, other bytes, a folder"
        self.file("train", 1).unlink()
        os.truncate(self.file("train", 2, "frames"), 300)
        self.file("train", 5, "motion").write_bytes(b"no numbers")
        self.file("test", 4).unlink(); self.file("test", 4).mkdir()
        return self

    def pack(self, out, **kw):
        if self.name == "unav": return pack_unav(self.root, out, self.annotations, **kw)
        return pack(self.root, out, self.annotations, progress=False, **kw)


@pytest.fixture(params=["llp", "unav"])
def copy(request, written, tmp_path): return Copy(written, tmp_path, request.param)


@pytest.fixture
def llp(written, tmp_path): return Copy(written, tmp_path, "llp")


def line(e):
    assert "\n" not in str(e.value) and len(str(e.value)) < 1200
    return str(e.value)


# ---- what is refused ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("packed", [False, True], ids=["layout", "packed"])
def test_missing_videos_stop_a_run_before_any_work(copy, packed, tmp_path):
    copy.spoil()
    data = copy.data(features=str(copy.pack(tmp_path/"store", on_missing="drop").path)) if packed else copy.data()
    spec = runs.RunSpec("han", data=data, scale="micro", epochs=1)
    for f in (lambda: runs.run(spec, tmp_path/"out", "cpu", "off"), lambda: load_data(data, "micro", tmp_path/"out"/"cache")):
        with pytest.raises(InputError) as e: f()
        assert "--on-missing drop" in line(e) or "fetch" in line(e)
        if packed:
            first = copy.annotations["train"].ids[1]
            assert f"no features for 3 of 6 train and 1 of 5 test videos ({first}, " in line(e) and "--on-missing drop" in line(e)
    assert not (tmp_path/"out"/"records").exists() and not list((tmp_path/"out").glob("cache/*-drop"))


def test_the_whole_split_is_looked_at_however_few_videos_are_used(copy, tmp_path):
    "The one that is missing is the last of six; the scale takes two"
    copy.file("train", 5).unlink()
    store = copy.pack(tmp_path/"store", on_missing="drop")
    for features in (copy.root, store.path):
        with pytest.raises(InputError, match="missing|no features for 1 of 6 train videos"):
            load_data(copy.data(features=str(features)), "two", tmp_path/"cache")
        loaded = load_data(copy.data(features=str(features), on_missing="drop"), "two", tmp_path/"cache")
        assert [len(c) for c in loaded.values()] == [2, 2, 2] and missing_videos(loaded) == {"train": 1}


@pytest.mark.parametrize("packed", [False, True], ids=["layout", "packed"])
def test_a_split_without_any_features_is_refused_either_way(copy, packed, tmp_path):
    for k in range(SIZES["val"]): copy.file("val", k).unlink()
    features = copy.pack(tmp_path/"store", on_missing="drop").path if packed else copy.root
    with pytest.raises(InputError, match="no features for 4 of 4 val videos .*expected some video of the split") as e:
        identify(copy.data(features=str(features), on_missing="drop"), tmp_path/"cache")
    assert line(e).startswith(f"{features}: ")                         # where the user said they are, not the cache


def test_nothing_usable_is_refused_with_the_first_file(llp, tmp_path):
    for split, n in SIZES.items():
        for k in range(n): llp.file(split, k, "motion").write_bytes(b"")
    with pytest.raises(InputError, match="0 of 15 videos can be used"): identify(llp.data(on_missing="drop"), tmp_path/"cache")


@pytest.mark.parametrize("value", ["skip", "", None, True, "DROP", ["drop"]])
def test_the_choice_is_checked(value):
    with pytest.raises(InputError, match="on_missing: .*is not possible. expected one of 'error', 'drop'"): DataSpec(on_missing=value)


def test_a_store_that_is_no_part_of_the_split_names_only_what_lacks(llp, tmp_path):
    store = pack(llp.root, tmp_path/"s", llp.annotations["test"].video_ids[:3] + llp.annotations["train"].video_ids, progress=False)
    with pytest.raises(InputError, match="no features for 4 of 4 val and 2 of 5 test videos"): check_present(llp.annotations, store, "error")
    with pytest.raises(InputError, match="for 4 of 4 val videos"): check_present(llp.annotations, store, "drop")
    with pytest.raises(InputError, match="on_missing: 'ignore'"): check_present(llp.annotations, store, "ignore")
    check_present({"train": llp.annotations["train"]}, store, "error")
    many = pack(llp.root, tmp_path/"t", llp.annotations["val"].video_ids, progress=False)
    with pytest.raises(InputError, match=r"6 of 6 train, 5 of 5 test|6 of 6 train and 5 of 5 test") as e: check_present(llp.annotations, many, "error")
    assert line(e).count("simtr") == 5 and ", ...)" in line(e)             # five ids, not eleven


# ---- what goes on without them --------------------------------------------------------------------------------

def test_what_is_left_is_in_order_and_counted(copy, tmp_path):
    copy.spoil()
    loaded = load_data(copy.data(on_missing="drop"), "micro", tmp_path/"cache")
    assert {k: c.rows.tolist() for k, c in loaded.items()} == {"train": [0, 3, 4], "val": [0, 1, 2, 3], "test": [0, 1, 2, 3]}
    assert missing_videos(loaded) == {"train": 3, "test": 1} and missing_note(missing_videos(loaded)) == SENTENCE
    assert loaded.summary()["without features"].tolist() == [3, 0, 1]
    store = copy.pack(tmp_path/"store", on_missing="drop", dtype="float32" if copy.name == "llp" else "float16")
    packed = copy.data(features=str(store.path), on_missing="drop")
    assert identify(packed, tmp_path/"cache")[0] == loaded.identity        # the same data in another form
    for k, c in load_data(packed, "micro", tmp_path/"other").items():
        assert c.ids == loaded[k].ids and np.array_equal(c.audio, loaded[k].audio)


def test_whole_data_do_not_change(copy, tmp_path):
    "With nothing missing the choice changes neither identity, key, clips nor record, and nothing is packed twice"
    both = [copy.data(on_missing=x) for x in ("error", "drop")]
    one, two = (identify(d, tmp_path/"cache")[0] for d in both)
    assert one == two and len({run_key(runs.RunSpec("han", data=d), one) for d in both}) == 1
    assert not list((tmp_path/"cache").glob("*-drop"))
    a, b = (load_data(d, "micro", tmp_path/"cache") for d in both)
    assert missing_videos(a) == missing_videos(b) == {} and "without features" not in a.summary()
    assert all("missing" not in c.source for c in (*a.values(), *b.values()))
    assert [c.source["fingerprint"] for c in a.values()] == [c.source["fingerprint"] for c in b.values()]
    first = runs.run(runs.RunSpec("han", data=both[0], scale="micro", epochs=1), tmp_path, "cpu", "off")
    assert runs.run(runs.RunSpec("han", data=both[1], scale="micro", epochs=1), tmp_path, "cpu", "off") == first
    assert "missing" not in first["data"] and not re.search("missing or damaged", compare(first).to_markdown())


def test_a_part_in_the_cache_is_never_taken_for_the_whole(copy, tmp_path):
    copy.spoil()
    cache = tmp_path/"cache"
    part = identify(copy.data(on_missing="drop"), cache)[0]
    for _ in range(2):
        with pytest.raises(InputError): identify(copy.data(), cache)
    assert identify(copy.data(on_missing="drop"), cache)[0] == part
    other = copy.file("train", 0, "motion")
    np.save(other, np.load(other) + 1)                               # a changed file is other data, and packed again
    changed = identify(copy.data(on_missing="drop"), cache)[0]
    assert changed != part and len(list(cache.glob("*-drop"))) == 2
    for m in FEATURE_SETS:                                                          # repaired
        for split, k in (("train", 1), ("train", 2), ("train", 5), ("test", 4)):
            f = copy.file(split, k, m)
            if f.is_dir(): f.rmdir()
            shutil.copy(copy.file("val", 0, m), f) if copy.name == "llp" else fit(copy, split, k, m)
    whole = identify(copy.data(), cache)[0]
    assert whole not in (part, changed) and identify(copy.data(on_missing="drop"), cache)[0] == whole
    assert len(list(cache.glob("*-drop"))) == 2                                      # the whole was there


def fit(copy, split, k, m):
    "A file of UnAV-100 of the right length"
    like = np.load(copy.file("val", 0, m))
    durations = copy.annotations[split].durations
    np.save(copy.file(split, k, m), np.resize(like, (n_rows(durations[k]), like.shape[1])))


def test_all_frames_are_dropped_alike(llp, tmp_path):
    llp.spoil()
    full, pooled = (load_data(llp.data(on_missing="drop"), "micro", tmp_path/"cache", f) for f in ("full", "pooled"))
    assert full["train"].frames.shape[:2] == (3, 80) and missing_videos(full) == missing_videos(pooled)
    assert full.identity == pooled.identity
    with pytest.raises(InputError): load_data(llp.data(), "micro", tmp_path/"cache", "full")


@pytest.mark.parametrize("seed", range(12))
def test_any_pattern_of_damage(written, tmp_path, seed):
    "Files spoilt by lot: refused exactly when any is, and what is left is what was not touched"
    rng = np.random.default_rng(seed)
    x = Copy(written, tmp_path, ("llp", "unav")[seed % 2])
    bad = {(s, k) for s, n in SIZES.items() for k in range(n) if rng.random() < (.05, .2, .4)[seed % 3]}
    for s, k in bad:
        f = x.file(s, k, rng.choice(list(FEATURE_SETS)))
        how = rng.integers(4)
        if how == 0: f.unlink()
        elif how == 1: os.truncate(f, int(rng.integers(200)))
        elif how == 2: f.write_bytes(rng.bytes(500))
        else: np.save(f, np.zeros((3, 5), "f4"))
    lost = {s: sum(t == s for t, _ in bad) for s in SIZES}
    if any(lost[s] == n for s, n in SIZES.items()): pytest.skip("a whole split")
    if bad:
        with pytest.raises(InputError): load_data(x.data(), "micro", tmp_path/"cache")
    got = load_data(x.data(on_missing="drop"), "micro", tmp_path/"cache")
    assert missing_videos(got) == {s: n for s, n in lost.items() if n}
    for s, n in SIZES.items(): assert got[s].rows.tolist() == [k for k in range(n) if (s, k) not in bad]


def test_written_clips_do_not_hand_the_count_on(llp, tmp_path):
    llp.spoil()
    part = load_clips(llp.annotations, llp.root, "train", on_missing="drop")
    assert part.source["missing"] == 3 and part[:2].source["missing"] == 3
    write_layout(part, tmp_path/"again")
    assert "missing" not in layout_source(tmp_path/"again")
    assert "missing" not in pack(tmp_path/"again", tmp_path/"s", part.ids, progress=False).source


# ---- records, tables, claims ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(written, tmp_path_factory):
    "A run on spoilt data: (its data, its store, its record, what it printed)"
    root = tmp_path_factory.mktemp("trained")
    x = Copy(written, root, "llp").spoil()
    with pytest.MonkeyPatch.context() as m:
        micro.install(m.setitem)
        data = x.data(on_missing="drop")
        with contextlib.redirect_stdout(io.StringIO()) as said:
            record = runs.run(runs.RunSpec("han", data=data, scale="micro", epochs=1), root/"out", "cpu", "lines")
    return x, root/"out", record, said.getvalue()


def test_the_record_and_the_run_say_so(trained):
    x, out, record, said = trained
    assert record["data"]["missing"] == {"train": 3, "test": 1} and record["data"]["n"] == {"train": 3, "val": 4, "test": 4}
    assert SENTENCE in said and said.count(SENTENCE) == 1
    assert runs.Store(out).record(record["key"]) == record
    assert "on_missing" not in json.dumps(record)


def test_stacked_runs_say_so(trained, tmp_path, capsys):
    x = trained[0]
    specs = [runs.RunSpec("han", data=x.data(on_missing="drop"), scale="micro", epochs=1, seed=s) for s in (1, 2)]
    records = runs.run_stacked(specs, tmp_path, "cpu", "lines", 2)
    assert [r["data"]["missing"] for r in records] == [{"train": 3, "test": 1}]*2 and SENTENCE in capsys.readouterr().out
    assert ours(records).notes.count(SENTENCE) == 1
    runs.run_stacked([replace(s, seed=s.seed + 5) for s in specs], tmp_path, "cpu", "off", 2)
    assert not capsys.readouterr().out                                     # silent when it is to be


@pytest.mark.parametrize("make", [compare, ours, rules_table, lambda r: cross_table({"HAN": [r]}), lambda r: only_table({"HAN": [r]}),
                                  lambda r: stack([ours(r), ours(r)]), lambda r: table_of(ours(r).frame.reset_index(drop=True), "x", [r])],
                         ids=["compare", "ours", "rules", "cross", "only", "stack", "frame"])
def test_every_table_says_so_once(trained, make):
    record = trained[2]
    table = make(record)
    for text in (table.to_markdown(), table.to_html(), table.to_latex()): assert text.count(SENTENCE) == 1
    whole = {**record, "data": {k: v for k, v in record["data"].items() if k != "missing"}}
    assert make(whole).notes == [n for n in table.notes if n != SENTENCE]      # nothing else differs


def test_runs_that_differ_in_it_are_named():
    a, b = invented_record(1), invented_record(2)
    a = {**a, "data": {**a["data"], "missing": {"val": 1}}}
    (note,) = provenance([a, b])["missing"]
    assert note == f"{a['key']}: without 1 val video whose features are missing or damaged."
    assert ours([a, b]).notes[-1] == note and "missing" not in provenance([b])
    c = {**invented_record(3), "data": {**a["data"], "missing": {"val": 2}}}
    assert len(provenance([a, b, c])["missing"]) == 2


def test_saved_tables_hold_it_in_every_format(trained, tmp_path):
    paths = compare(trained[2]).save(tmp_path/"t")
    texts = {p.suffix: p.read_text() for p in paths}
    assert all(SENTENCE in texts[s] for s in (".md", ".html", ".tex")) and read_json(tmp_path/"t.json")["missing"] == [SENTENCE]


def test_claims_say_so():
    rs = [invented(s) for s in all_specs("han", "tiny", (1, 2))]
    few = [{**r, "data": {**r["data"], "missing": {"train": 3, "test": 1}}} for r in rs]
    assert claims_table(few, "han", "tiny").notes[-1] == SENTENCE and SENTENCE not in claims_table(rs, "han", "tiny").notes
    (note,) = [n for n in claims_table(few[:1] + rs[1:], "han", "tiny").notes if "missing or damaged" in n]
    assert note.startswith(f"{rs[0]['key']}: without 3 train")                 # which run it is about


@pytest.mark.parametrize("missing", [3, [], "x", {"train": 0}, {"train": -1}, {"train": "3"}, {"train": True}, {"train": 1.5}, {"x\x1b[31m": 1},
                                     {"test": None}, {"test": {}}, {"": 2}], ids=repr)
def test_a_record_that_says_nonsense_is_refused(trained, missing):
    record = {**trained[2], "data": {**trained[2]["data"], "missing": missing}}
    with pytest.raises(InputError, match="data.missing is ") as e: check_whole(record, "x.json")
    assert line(e).isprintable()


def test_versions_that_differ_stand_below_a_table():
    a, b = (invented_record(s, versions={"avvp_nb": v}) for s, v in ((1, "0.1.0"), (2, "0.2.0\x1b[31m")))
    (note,) = [n for n in ours([a, b]).notes if "versions" in n]
    assert note == r"Made with several versions of avvp_nb: the runs with 0.1.0 and 0.2.0\x1b[31m."
    assert compare([a, b]).notes.count(note) == 1 and not [n for n in ours([a]).notes if "versions" in n]


# ---- from a shell ---------------------------------------------------------------------------------------------

@pytest.fixture
def shell(capsys):
    def call(*argv):
        capsys.readouterr()
        return cli.main([str(a) for a in argv]), *capsys.readouterr()
    return call


def arguments(x): return ("--annotations", x.labels, "--features", x.root, "--on-missing")


def test_run(llp, shell, tmp_path):
    llp.spoil()
    common = ("run", "han", "--scale", "micro", "--epochs", 1, "--device", "cpu", "--out", tmp_path/"out", "--annotations", llp.labels, "--features", llp.root)
    status, out, err = shell(*common)
    assert status == 2 and len(err.strip().splitlines()) == 1 and "--on-missing drop" in err and not (tmp_path/"out"/"records").exists()
    status, out, err = shell(*common, "--on-missing", "drop")
    assert status == 0 and out.count(SENTENCE) == 2                            # while it runs, and below the table
    status, again, err = shell(*common, "--on-missing", "drop")
    assert status == 0 and again.count(SENTENCE) == 1
    with pytest.raises(SystemExit): shell(*common, "--on-missing", "skip")
    assert shell(*common)[0] == 2                                            # a record of the part is none of the whole


def test_run_on_unav100(written, shell, tmp_path):
    x = Copy(written, tmp_path, "unav").spoil()
    common = ("run", "han", "--dataset", "unav100", "--scale", "micro", "--epochs", 1, "--device", "cpu", "--out", tmp_path/"out",
              "--unav-annotations", x.labels, "--unav-features", x.root)
    status, out, err = shell(*common)
    assert status == 2 and len(err.strip().splitlines()) == 1
    status, out, err = shell(*common, "--on-missing", "drop")
    assert status == 0 and out.count(SENTENCE) == 2


def test_reproduce_and_claims_read_the_same_records(trained, shell):
    x, out, record, _ = trained
    common = ("--scale", "micro", "--out", out, "--annotations", x.labels, "--features", x.root)
    reproduce = ("reproduce", "han", "--table", "1", "--seeds", 1, "--no-train", "--device", "cpu", *common)
    status, said, err = shell(*reproduce)
    assert status == 2 and len(err.strip().splitlines()) == 1
    runs.run(runs.RunSpec("han", data=x.data(on_missing="drop"), scale="micro"), out, "cpu", "off")
    status, said, err = shell(*reproduce, "--on-missing", "drop")
    assert status == 0 and said.count(SENTENCE) == 1, err
    assert shell("claims", "han", *common)[0] == 2
    status, said, err = shell("claims", "han", *common, "--on-missing", "drop")
    assert status == 0 and "Claims of HAN" in said, err


def test_sweep(llp, shell, tmp_path):
    llp.spoil()
    data = {"annotations": str(llp.labels), "features": str(llp.root)}
    grid = {"method": "han", "scale": "micro", "epochs": 1, "seed": [1, 2], "data": data}
    write_json(grid, tmp_path/"g.json"); write_json({**grid, "data": {**data, "on_missing": "drop"}}, tmp_path/"d.json")
    common = ("--out", tmp_path/"out", "--device", "cpu")
    status, out, err = shell("sweep", tmp_path/"g.json", *common)
    assert status == 2 and len(err.strip().splitlines()) == 1 and not (tmp_path/"out"/"records").exists()
    status, out, err = shell("sweep", tmp_path/"g.json", *common, "--on-missing", "drop")
    assert status == 0 and "2 of 2 runs recorded" in out and SENTENCE in out, err
    status, out, err = shell("sweep", tmp_path/"d.json", *common)
    assert status == 0 and "2 runs, 2 of them recorded" in out                       # the same runs
    assert shell("sweep", tmp_path/"d.json", *common, "--on-missing", "error")[0] == 2
    write_json({**grid, "data": {**data, "on_missing": "skip"}}, tmp_path/"e.json")
    with pytest.raises(InputError, match="e.json: data: on_missing: 'skip' is not possible"): read_grid(tmp_path/"e.json")
    assert on_missing_as(None, [1]) == [1]


def test_pack_then_run(llp, shell, tmp_path):
    llp.spoil()
    store = tmp_path/"store"
    assert shell("pack", llp.root, store, "--annotations", llp.labels)[0] == 2
    assert shell("pack", llp.root, store, "--annotations", llp.labels, "--on-missing", "drop")[0] == 0
    assert len(open_store(store)) == 11
    common = ("run", "han", "--scale", "micro", "--epochs", 1, "--device", "cpu", "--out", tmp_path/"out", "--annotations", llp.labels, "--features", store)
    status, out, err = shell(*common)
    assert status == 2 and "no features for 3 of 6 train and 1 of 5 test videos (simtr000001" in err and "--on-missing drop" in err
    assert shell(*common, "--on-missing", "drop")[1].count(SENTENCE) == 2


# ---- notebooks ------------------------------------------------------------------------------------------------

def test_experiment_notebooks_have_the_switches():
    "Wherever features may be given, it may be said what happens where some are missing; and runs may be repeated"
    for nb in NOTEBOOKS:
        cell = next(("".join(c["source"]) for c in nb.cells if "parameters" in c["metadata"].get("tags", [])), "")
        if "\nfeatures: " not in cell or nb.name == "ave": continue      # AVE's features are two whole files: one video cannot be missing
        assert 'on_missing: str = "error"  # ' in cell, nb.name
        assert nb.name == "claims" or "fresh: bool = False  # " in cell, nb.name
        code = "".join(s for c in nb.cells if c["cell_type"] == "code" for s in c["source"])
        assert code.count("DataSpec(") == code.count("on_missing=on_missing)"), nb.name
        assert nb.name == "claims" or "train_missing(" in code and '"on_missing"' in code and '"fresh"' in code   # in no provenance
