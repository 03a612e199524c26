"""The kill campaign: each kind of run and each command that writes, killed around every change of a file and started again.
Afterwards its results are those of an undisturbed run, to the last bit, and nothing else is there."""
import hashlib
import os
import shutil
from pathlib import Path

import micro
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")]

RUNS = {"han": dict(method="han"), "ma": dict(method="ma"), "jomold": dict(method="jomold"),
        "dgm": dict(method="dgm", backbone="han"), "cmpae": dict(method="cmpae"),
        "coleaf": dict(method="coleaf", backbone="han"), "valor": dict(method="valor", labels="clip+clap"),
        "ma, by lot": dict(method="ma", options={"refine": "random"}), "talnet": dict(method="talnet", options={"thresholds": "f1"}),
        "jocor": dict(method="jocor"), "dhhn": dict(method="dhhn", protocol="refined"),
        "mm_pyramid": dict(method="mm_pyramid", options={"refine": "both"}), "deep": dict(method="deep", options={"denoise": True})}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    s = micro.Server(tmp_path_factory.mktemp("server"))
    yield s
    s.close()


def held(folder):
    "Files of a folder but for locks, which stay"
    return {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file() and p.parent.name != "locks"
            and not p.name.endswith(".lock")}


def digest(path): return hashlib.sha256(path.read_bytes()).hexdigest()


def moments(folder): return int((folder / "log").read_text())


def campaign(server, tmp_path, job, after, least):
    "`job(folder)` killed at each moment and done again; `after(folder)` must give what it gives undisturbed"
    def ask(folder, die=None): return server.ask([job(folder) | {"log": str(folder / "log"), "die": die}])[0]
    whole = tmp_path / "whole"
    whole.mkdir()
    answer = ask(whole)
    assert answer["end"] == "done", answer["said"]
    want, n = after(whole), moments(whole)
    assert n >= least, "too few changes of files to speak of a campaign"
    for moment in range(1, n + 1):
        folder = tmp_path / "killed"
        folder.mkdir()
        first = ask(folder, moment)
        assert first["end"] == "killed", (moment, first["said"])
        second = ask(folder)
        assert second["end"] == "done", (moment, second["said"])
        assert after(folder) == want, moment
        shutil.rmtree(folder)


def ran(folder):
    "Names of all files of a store, and the essence of its records"
    store = folder / "runs"
    found = {k: micro.essence(store, r) for k, r in micro.records(store).items()}
    names = {k for k in held(store) if "/.verified" not in k}
    return found, names


@pytest.mark.parametrize("name", RUNS)
def test_each_kind_of_run(server, tmp_path, name):
    spec = {"scale": "micro", "epochs": 2, **RUNS[name]}
    campaign(server, tmp_path, lambda folder: {"store": str(folder / "runs"), "spec": spec}, ran, 14)


def written(folder):
    "Contents of all files that a command has written"
    return {k: digest(p) for k, p in held(folder).items() if k != "log"}


SIMULATE = ["simulate", "{}/sim", "--videos", "3", "1", "2"]
COMMANDS = {"simulate": SIMULATE, "simulate unav": [*SIMULATE, "--dataset", "unav100"]}


@pytest.mark.parametrize("name", COMMANDS)
def test_simulate(server, tmp_path, name):
    def job(folder): return {"store": "", "spec": {}, "argv": [a.format(folder) for a in COMMANDS[name]]}
    campaign(server, tmp_path, job, written, 10)


def test_pack(server, tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    argv = [a.format(made) for a in SIMULATE]
    assert server.ask([{"store": "", "spec": {}, "argv": argv}])[0]["end"] == "done"
    labels = next(made.rglob("AVVP_train.csv")).parent
    def job(folder):
        return {"store": "", "spec": {}, "argv": ["pack", str(made / "sim"), str(folder / "store"), "--annotations", str(labels)]}
    campaign(server, tmp_path, job, written, 10)


@pytest.fixture(scope="module")
def source(server, tmp_path_factory):
    "A store with a run of two stages"
    folder = tmp_path_factory.mktemp("source")
    answer = server.ask([{"store": str(folder), "spec": {"scale": "micro", "method": "ma"}}])[0]
    assert answer["end"] == "done", answer["said"]
    return folder


def test_merge(server, tmp_path, source):
    def job(folder): return {"store": "", "spec": {}, "argv": ["merge", str(source), str(folder / "mine")]}
    campaign(server, tmp_path, job, written, 12)


def test_tables_of_reproduce(server, tmp_path, source):
    "Tables and figures are written again; what was recorded stays"
    def job(folder):
        if not (folder / "runs").exists(): shutil.copytree(source, folder / "runs")
        return {"store": "", "spec": {}, "argv": ["reproduce", "ma", "--table", "1", "--scale", "micro", "--no-train", "--out",
                                                  str(folder / "runs")]}
    campaign(server, tmp_path, job, lambda folder: set(held(folder)), 6)


def test_a_grid(server, tmp_path):
    "Three runs in one command"
    grid = tmp_path / "g.yaml"
    grid.write_text("method: dgm\nbackbone: han\nscale: micro\nepochs: 1\noptions: {gamma: [0.1, 0.2]}\nseed: [1]\n")
    def job(folder): return {"store": "", "spec": {}, "argv": ["sweep", str(grid), "--out", str(folder / "runs")]}
    campaign(server, tmp_path, job, ran, 12)


def test_the_hook_kills(server, tmp_path):
    "The campaign above is no rubber stamp: a job that leaves a file behind is noticed"
    def job(folder):
        (Path(folder) / "runs").mkdir(exist_ok=True)
        (Path(folder) / "runs" / f".left.{len(list((folder / 'runs').iterdir()))}.part").touch()
        return {"store": str(folder / "runs"), "spec": {"scale": "micro", "epochs": 1, "method": "han"}}
    with pytest.raises(AssertionError): campaign(server, tmp_path, job, ran, 1)
