"""Files in, timelines out: with a toy back end and a toy decoder, so that nothing here needs an optional package."""
import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from avvp_nb.core import CLASSES, InputError
from avvp_nb.limits import read_npz
from avvp_nb.media import decode
from avvp_nb.media.backend import FPS, RATE, Backend
from avvp_nb.media.decode import Media
from avvp_nb.methods.zoo import METHODS
from avvp_nb.metrics import RULES
from avvp_nb.records.spec import RunSpec
from avvp_nb.records.weights import save_weights
from avvp_nb.runs import parse as P
from avvp_nb.runs import parser as R
from avvp_nb.train.learner import predict_both

SIZES = dict(classes=3, audio_dim=2, frame_dim=3, motion_dim=2, dim=8)
NAMES = ["Loud", "Bright", "</script>"]


class Toy(Backend):
    "Hears loud seconds, sees bright ones; its features are the same numbers"
    name, audio_dim, frame_dim, motion_dim = "toy", 2, 3, 2
    classes, cannot_see = tuple(NAMES), ("Loud", "</script>")
    def sound(self, x):
        rms = np.sqrt((x.reshape(-1, RATE)**2).mean(1))
        return np.stack([rms, 1 - rms], 1), np.stack([rms, 0*rms, 0*rms], 1)
    def pictures(self, x):
        light = x.reshape(len(x), -1).mean(1)/255
        seconds = light.reshape(-1, FPS).mean(1)
        return np.repeat(light[:, None], 3, 1), np.stack([seconds]*2, 1), np.stack([0*seconds, seconds, 0*seconds], 1)


def read(path, **options):
    "A file is a JSON list: seconds, loud ones, bright ones, missing track or none"
    path = Path(path)
    if not path.exists(): raise InputError("E_NOT_FOUND: no such file", where=path)
    data = path.read_bytes()
    if data[:1] != b"[": raise InputError("E_NOT_MEDIA: cannot be opened", where=path)
    N, loud, bright, missing = json.loads(data)
    if missing == "crash": raise ZeroDivisionError("of\nthe decoder")
    if missing == "ctrl-c": raise KeyboardInterrupt
    wave, light = np.zeros(N*RATE, np.float32), np.zeros((N*FPS, 6, 8, 3), np.uint8)
    for s in loud: wave[s*RATE:(s + 1)*RATE] = .8
    for s in bright: light[s*FPS:(s + 1)*FPS] = 200
    return Media(path, {"duration": float(N)}, N, None if missing == "visual" else light, None,
                 None if missing == "audio" else wave, [("W_SHORT", "as an\nexample")]*(N < 10))


def video(path, N=4, loud=(0,), bright=(1,), missing=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([N, list(loud), list(bright), missing]))
    return path


def parse(paths, out, **settings):
    return P.parse_files(paths, out, Toy(), read=read, **{"progress": False, **settings})


def tree(folder): return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != P.MANIFEST}


def told(path): return json.loads(Path(path).read_text())


@pytest.fixture
def shell(monkeypatch, capsys):
    "Status, output and error output of the command with the toys in place"
    monkeypatch.setattr(decode, "read_media_safely", read, raising=False)
    def run(*words):
        p = argparse.ArgumentParser()
        P.add_parse_arguments(p)
        a = p.parse_args(list(map(str, words)))
        a.backend = a.backend or Toy()
        try: status = P.parse_command(a)
        except InputError as e:                   # as `cli.act` does
            print(f"error: {e}", file=sys.stderr)
            status = 2
        return status, *capsys.readouterr()
    return run


# what is written

def test_contract(tmp_path):
    done = P.parse_file(video(tmp_path/"in/park.mp4", 12, [0, 1], [1, 2]), tmp_path/"out", backend=Toy(), read=read)
    assert sorted(tree(tmp_path/"out")) == ["park.csv", "park.html", "park.json", "park.npz"] and done.seconds == 12
    j = told(tmp_path/"out/park.json")
    assert [s for s in j["seconds"] if s["heard"] or s["seen"]] == [
        {"heard": ["Loud"], "seen": []}, {"heard": ["Loud"], "seen": ["Bright"]}, {"heard": [], "seen": ["Bright"]}]
    assert len(j["seconds"]) == 12 and j["backend"] == "toy" and j["cannot_see"] == ["Loud", "</script>"] and j["warnings"] == []
    assert j["thresholds"] == {"heard": .3, "seen": .3} and len(j["media"]["sha256"]) == 64 and j["versions"]["avvp_nb"]
    assert "No paper's model" in j["statement"]
    z = read_npz(tmp_path/"out/park.npz")
    assert z["heard"].shape == (12, 3) and z["classes"].tolist() == NAMES
    rows = (tmp_path/"out/park.csv").read_text().splitlines()
    assert rows[1].split("\t")[:5] == ["park_0_12", "0", "2", "Loud", "audio"] and len(rows) == 3
    page = (tmp_path/"out/park.html").read_text()
    assert "http" not in page and "<script" not in page and "&lt;/script&gt;" in page and "data:image/jpeg" in page


@pytest.mark.parametrize("missing, silent", (("audio", "heard"), ("visual", "seen")))
def test_missing_track(tmp_path, missing, silent):
    P.parse_file(video(tmp_path/"a.mp4", 10, range(10), range(10), missing), tmp_path, backend=Toy(), read=read)
    j = told(tmp_path/"a.json")
    other = {"heard": "seen", "seen": "heard"}[silent]
    assert not any(s[silent] for s in j["seconds"]) and all(s[other] for s in j["seconds"])
    assert not [e for e in j["events"] if e["modality"] in (missing, "audio_visual")]


def test_thresholds_one_for_each(tmp_path):
    v = video(tmp_path/"a.mp4", 10, range(10), range(10))        # 0.8 and 200/255 = 0.784
    parse([v], tmp_path, threshold=(.79, .79))
    assert all(s == {"heard": ["Loud"], "seen": []} for s in told(tmp_path/"a.json")["seconds"])


def test_vtt_on_request(tmp_path):
    parse([video(tmp_path/"a.mp4")], tmp_path/"out", formats=["vtt"])
    assert sorted(tree(tmp_path/"out")) == ["a.json", "a.vtt"]


def test_nothing_of_the_caller_changes(tmp_path):
    net = weights(tmp_path)
    torch.manual_seed(0); np.random.seed(0)
    state, numbers, here, threads = torch.get_rng_state(), np.random.get_state()[1].tolist(), os.getcwd(), torch.get_num_threads()
    parse([video(tmp_path/"a.mp4", 12)], tmp_path/"o", model=net)
    assert torch.equal(state, torch.get_rng_state()) and np.random.get_state()[1].tolist() == numbers
    assert os.getcwd() == here and torch.get_num_threads() == threads and torch.get_default_dtype() == torch.float32


# names

def test_equal_stems_differ_whatever_the_order(tmp_path):
    a, b, c = (video(tmp_path/f) for f in ("x/1.mp4", "y/1.mp4", "y/1.MKV"))
    names = {p.path: p.files[0].name for p in parse([a, b, c], tmp_path/"o")}
    assert len(set(names.values())) == 3 and all(n.startswith("1-") for n in names.values())
    assert {p.path: p.files[0].name for p in parse([c, b, a], tmp_path/"o2")} == names
    assert [p.status for p in parse([c, a, b], tmp_path/"o")] == ["before"]*3


def test_a_second_file_of_a_name_comes_later(tmp_path):
    a, b = video(tmp_path/"x/1.mp4", 3), video(tmp_path/"y/1.mp4", 5)
    parse([a], tmp_path/"o"); second = parse([b], tmp_path/"o")[0].files[0].name
    assert second.startswith("1-") and len(told(tmp_path/"o/1.json")["seconds"]) == 3
    assert [p.files[0].name for p in parse([a, b], tmp_path/"o")] == ["1.json", second]


@pytest.mark.parametrize("name", ("猫 и ü.mp4", "a b  c.mp4", "-dash.mp4", "x"*245 + ".mp4", "a.b.c.mp4", "<b>&.mp4", "new\nline.mp4"))
def test_names_of_any_kind(tmp_path, name):
    done = parse([video(tmp_path/"in"/name)], tmp_path/"o")[0]
    assert done.status == "done" and len(told(done.files[0])["seconds"]) == 4
    if len(name) < 200: assert done.files[0].stem == Path(name).stem
    assert parse([tmp_path/"in"], tmp_path/"o")[0].status == "before"


@pytest.mark.skipif(os.name != "posix" or sys.platform == "darwin", reason="names are bytes on Linux alone")
def test_a_name_that_is_no_text(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.mp4"))
    video(path)
    assert [p.status for p in parse([path], tmp_path/"o")] == ["done"]
    assert [p.status for p in parse([path], tmp_path/"o")] == ["before"]


def test_folders(tmp_path):
    for f in ("b.mp4", "a.webm", ".hidden.mp4", "deep/c.MOV", ".git/d.mp4"): video(tmp_path/"in"/f)
    (tmp_path/"in/notes.txt").write_text("x"); (tmp_path/"in/deep/loop").symlink_to(tmp_path/"in")
    assert [p.path.name for p in parse([tmp_path/"in"], tmp_path/"o")] == ["a.webm", "b.mp4", "c.MOV"]


# bad files

def test_one_bad_file_never_stops_the_rest(tmp_path, capsys):
    folder = tmp_path/"in"
    video(folder/"a.mp4"); video(folder/"c.mp4"); video(folder/"crash.mp4", missing="crash")
    (folder/"b.mp4").write_text("text"); (folder/"empty.mp4").write_bytes(b""); (folder/"dir.mp4").mkdir()
    done = P.parse_files([folder, tmp_path/"none.mp4"], tmp_path/"o", Toy(), read=read)
    assert {p.path.name: p.status for p in done} == {"a.mp4": "done", "b.mp4": "failed", "c.mp4": "done", "crash.mp4": "failed",
                                                     "empty.mp4": "failed", "none.mp4": "failed"}
    assert {f.rsplit(".")[0] for f in tree(tmp_path/"o")} == {"a", "c"}
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 6 and err[0].startswith("[1/6] a.mp4 4.0 s of video, ") and "E_NOT_MEDIA" in err[1]
    codes = {e["name"]: e.get("code") for e in P.read_manifest(tmp_path/"o").values()}
    assert codes["crash"] == "E_FAILED" and codes["none"] == "E_NOT_FOUND" and codes["a"] is None


def test_statuses(tmp_path, shell):
    good, bad = video(tmp_path/"good.mp4"), tmp_path/"bad.mp4"
    bad.write_text("no video")
    out = ("--out", tmp_path/"o")
    assert shell(good, *out)[:2] == (0, f"{tmp_path/'o/good.html'}\n")
    assert shell(good, bad, *out)[0] == 1
    assert shell(bad, tmp_path/"none.mp4", *out)[0] == 2
    status, said, err = shell(bad, *out)
    assert (status, said) == (2, "") and err.count("\n") == 1 and f"{bad}: E_NOT_MEDIA" in err


@pytest.mark.parametrize("words, said", (
    (["--threshold", "2"], "threshold: (2.0, 2.0) is not possible"), (["--formats", "json,pdf"], "formats: 'pdf' is not possible"),
    (["--seen-threshold", "-1"], "threshold: (0.3, -1.0) is not possible"),
    (["--stride", "0"], "expected a stride of 1 to 10 s"), (["--rule", "han"], "rule: has no effect without --model"),
    (["--backend", "zeroshoot"], "did you mean 'zeroshot'?"), (["--model", "none.st"], "none.st: there is no such file"),
    (["--threshold", "nan"], "threshold: (nan, nan) is not possible")))
def test_wrong_arguments_before_any_work(tmp_path, shell, words, said):
    status, _, err = shell(video(tmp_path/"a.mp4"), "--out", tmp_path/"o", *words)
    assert status == 2 and said in err and err.count("\n") == 1 and not (tmp_path/"o").exists()


def test_files_of_others_are_kept(tmp_path):
    for suffix in (".json", ".csv", ".html"):
        out = tmp_path/suffix
        out.mkdir(); (out/f"a{suffix}").write_text("{}")
        with pytest.raises(InputError, match="was not written by this command"):
            P.parse_file(video(tmp_path/"a.mp4"), out, backend=Toy(), read=read)
        assert tree(out) == {f"a{suffix}": b"{}"}


def test_no_place_to_write(tmp_path):
    (tmp_path/"file").write_text("")
    with pytest.raises(InputError, match="could not be written"): parse([video(tmp_path/"a.mp4")], tmp_path/"file")
    with pytest.raises(InputError, match="could not be written"): parse([video(tmp_path/"a.mp4")], tmp_path/"file/o")


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    v, real = video(tmp_path/"a.mp4"), os.fsync
    def full(fd): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in str(parse([v], tmp_path/"o")[0].error) and tree(tmp_path/"o") == {}
    monkeypatch.setattr(os, "fsync", real)
    assert parse([v], tmp_path/"o")[0].status == "done"


# again

def test_again_is_kept_until_something_changes(tmp_path):
    v = video(tmp_path/"a.mp4")
    def status(**settings): return parse([v], tmp_path/"o", **settings)[0].status
    assert [status(), status(), status(force=True), status(threshold=.5), status(threshold=.5)] == ["done", "before", "done", "done", "before"]
    before = tree(tmp_path/"o")
    os.utime(v, (1, 1)); assert status(threshold=.5) == "before"
    video(v, 4, (1,)); assert status(threshold=.5) == "done" and tree(tmp_path/"o") != before
    (tmp_path/"o/a.csv").unlink(); assert [status(threshold=.5), status(threshold=.5)] == ["done", "before"]


class Counting(Toy):
    asked = 0
    def sound(self, x): Counting.asked += 1; return super().sound(x)


def test_new_thresholds_ask_no_network_again(tmp_path):
    v, Counting.asked = video(tmp_path/"a.mp4", 12, [1, 2, 5], [3]), 0
    def run(**settings): return P.parse_file(v, tmp_path/"o", backend=Counting(), read=read, **settings)
    run(); run(threshold=.81); fast = tree(tmp_path/"o"); assert Counting.asked == 1
    run(threshold=.81, force=True); assert Counting.asked == 2 and tree(tmp_path/"o") == fast
    (tmp_path/"o/a.npz").write_bytes(b"no archive"); run(threshold=.5); assert Counting.asked == 3
    run(threshold=.4, frames="official"); assert Counting.asked == 4                   # other pictures
    video(v, 12, [1]); run(threshold=.6); assert Counting.asked == 5                   # another file


@pytest.mark.parametrize("total", (601, 1200, 1201))
def test_long_files_come_in_parts(tmp_path, total):
    "As one piece and in parts: the same timeline, and no part is in memory when the next one comes"
    v, alive = video(tmp_path/"a.mp4"), []
    def piece(start, N, more):
        wave = np.repeat(np.float32((np.arange(start, start + N) % 7 == 0)*.8), RATE)
        light = np.repeat(np.uint8((np.arange(start, start + N) % 5 == 0)*200), FPS)[:, None, None, None]
        return Media(v, {"more": more}, N, np.broadcast_to(light, (N*FPS, 6, 8, 3)), None, wave, [("W_X", "x")])
    def whole(path, **options): return piece(0, total, False)
    def parts(path, length=None, start=0, **options):
        if length is None: raise InputError("E_TOO_LONG: too long", where=path)
        assert all(m.waveform is None and m.pictures is None for m in alive)
        alive.append(piece(start, min(length, total - start), start + length < total))
        return alive[-1]
    for name, f in (("whole", whole), ("parts", parts)): P.parse_file(v, tmp_path/name, backend=Toy(), read=f)
    assert tree(tmp_path/"whole")["a.npz"] == tree(tmp_path/"parts")["a.npz"] and len(alive) == -(-total // 600)
    assert [told(tmp_path/n/"a.json")["events"] for n in ("whole", "parts")][0] and told(tmp_path/"parts/a.json")["warnings"] == ["W_X: x"]
    assert tree(tmp_path/"whole")["a.html"].count(b"<img") == tree(tmp_path/"parts")["a.html"].count(b"<img")


def test_a_damaged_manifest_costs_only_time(tmp_path):
    a, b = video(tmp_path/"a.mp4"), video(tmp_path/"b.mp4")
    parse([a, b], tmp_path/"o")
    path = tmp_path/"o"/P.MANIFEST
    lines = path.read_text().splitlines()
    path.write_text("\n".join(['{"path": 3}', "[]", "{", "["*9999, lines[1], lines[0][:40]]))     # a's line is cut
    assert [p.status for p in parse([a, b], tmp_path/"o")] == ["done", "before"]
    assert [p.status for p in parse([a, b], tmp_path/"o")] == ["before", "before"]


def test_interruption(tmp_path):
    for f, how in (("a.mp4", None), ("b.mp4", "ctrl-c"), ("c.mp4", None)): video(tmp_path/"in"/f, missing=how)
    with pytest.raises(KeyboardInterrupt): parse([tmp_path/"in"], tmp_path/"o")
    assert {f.rsplit(".")[0] for f in tree(tmp_path/"o")} == {"a"}
    video(tmp_path/"in/b.mp4")
    assert [p.status for p in parse([tmp_path/"in"], tmp_path/"o")] == ["before", "done", "done"]


KILLED = """
import os, sys, time
sys.path.insert(0, {tests!r})
import test_parse as T
from avvp_nb.runs import parse as P
moved, replace = [], os.replace
def slow(a, b):
    replace(a, b); moved.append(b)
    if len(moved) == {after}: print("now", flush=True); time.sleep(60)
os.replace = slow
T.parse([{folder!r}], {out!r})
"""


@pytest.mark.parametrize("after", (2, 5))     # in the middle of the first file's outputs, and of the second's
def test_killed_and_continued_gives_the_same(tmp_path, after):
    folder = tmp_path/"in"
    for i in range(3): video(folder/f"{i}.mp4", 10 + i, [i], [0])
    parse([folder], tmp_path/"whole")
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(folder), out=str(tmp_path/"o"), after=after)
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert p.stdout.readline() == b"now\n"
    os.kill(p.pid, signal.SIGKILL); p.wait()
    assert [f for f in tree_names(tmp_path/"o") if f.endswith(".part")]
    assert parse([folder], tmp_path/"o")[0].status == ("before" if after == 5 else "done")
    assert tree(tmp_path/"o") == tree(tmp_path/"whole")


def tree_names(folder): return [p.name for p in folder.iterdir()]


def test_the_next_file_is_read_ahead(tmp_path):
    "While the networks are at work, the next file is decoded; one that fails there fails alone"
    for i in range(4): video(tmp_path/f"in/{i}.mp4", missing="crash" if i == 2 else None)
    at_work, overlaps = [], []
    class Slow(Toy):
        def sound(self, x):
            at_work.append(1); time.sleep(.3); at_work.clear()
            return super().sound(x)
    def noted(path, **options): time.sleep(.1); overlaps.append(bool(at_work)); return read(path)
    done = P.parse_files([tmp_path/"in"], tmp_path/"o", Slow(), read=noted, progress=False)
    assert [p.status for p in done] == ["done", "done", "failed", "done"] and sum(overlaps) >= 1 and len(overlaps) == 4


# a trained network

def weights(folder, name="net.safetensors", sizes=SIZES, method="han", seed=0, **header):
    spec = RunSpec(method).plain()
    torch.manual_seed(seed)
    model = METHODS[method].build(spec, sizes)[0]
    save_weights(model, folder/name, {"spec": spec, "sizes": sizes, "classes": NAMES[:sizes["classes"]], **header})
    return folder/name


@pytest.mark.parametrize("method", ("han", "ma", "cmpae"))
def test_a_network_decides_as_its_rule_says(tmp_path, method):
    "Ten seconds are one window: the grid is what the rule says of the network's own answer"
    path = weights(tmp_path, method=method)
    media = read(video(tmp_path/"a.mp4", 10, [1, 2, 5], [3, 4]))
    p = R.Parser(Toy(), model=path)
    t = R.parse_media(p, media)
    clips = R.as_windows(R.observe(p.of, media), [0], p.of, p.net)
    assert (clips.frames.shape[1] == 80) == (method == "cmpae")           # CMPAE looks at all eight pictures of a second
    passes = predict_both(p.net.model, clips)
    for a, b in zip((t.on_heard, t.on_seen), RULES[p.net.rule].decide(*passes)): assert (a == b[0]).all()
    assert t.about["model"]["method"] == method and t.classes == tuple(NAMES)


def test_windows_against_the_sum_written_out(tmp_path):
    p = R.Parser(Toy(), model=weights(tmp_path), stride=4)
    media = read(video(tmp_path/"a.mp4", 17, [1, 2, 9, 13], [3, 4, 14]))
    said, _ = R.net_seconds(p.net, R.look_at(p.of, [media]), p.of, 4)
    media = read(tmp_path/"a.mp4")
    first = [0, 4, 7]
    each = predict_both(p.net.model, R.as_windows(R.observe(p.of, media), first, p.of, p.net))[0]
    for t in range(17):
        inside = [(j, t - s) for j, s in enumerate(first) if 0 <= t - s < 10]
        w = [min(k + 1, 10 - k) for _, k in inside]
        want = sum(x*each.segments[j, k] for x, (j, k) in zip(w, inside))/sum(w)
        gate = sum(x*each.audio[j] for x, (j, _) in zip(w, inside))/sum(w)
        np.testing.assert_allclose(said.segments[t, 0], want, atol=1e-5)
        np.testing.assert_allclose(said.audio[t], gate, atol=1e-5)


@pytest.mark.parametrize("N", (1, 3, 10, 11, 27))
def test_any_length(tmp_path, N):
    done = parse([video(tmp_path/"a.mp4", N)], tmp_path/"o", model=weights(tmp_path))[0]
    j = told(done.files[0])
    assert len(j["seconds"]) == N and all(e["offset_s"] <= N for e in j["events"]) and j["model"]["rule"] == "han"
    assert "net.safetensors" in (tmp_path/"o/a.html").read_text()


@pytest.mark.parametrize("change, said", (
    ({"sizes": {**SIZES, "audio_dim": 5}}, "takes 5 features of sound a second. expected 2, as the back end 'toy' gives"),
    ({"sizes": {**SIZES, "frame_dim": 5}}, "takes 5 features of pictures"), ({"sizes": {**SIZES, "motion_dim": 5}}, "takes 5 motion"),
    ({"features": {"backend": "paper"}}, "was trained on features of 'paper'. expected features of 'toy'"),
    ({"classes": None}, "does not name its 3 classes"), ({"classes": ["one"]}, "list of classes is not one of 3 names")))
def test_networks_that_do_not_fit(tmp_path, change, said):
    with pytest.raises(InputError) as e: parse([video(tmp_path/"a.mp4")], tmp_path/"o", model=weights(tmp_path, **change))
    assert said in str(e.value) and "\n" not in str(e.value) and not (tmp_path/"o").exists()


def test_a_simulated_network_says_so(tmp_path):
    parse([video(tmp_path/"a.mp4")], tmp_path/"o", model=weights(tmp_path, mark="simulated LLP"))
    assert told(tmp_path/"o/a.json")["model"]["mark"] == "simulated LLP" and "simulated LLP" in (tmp_path/"o/a.html").read_text()


def test_a_released_checkpoint(tmp_path, monkeypatch):
    "The authors' tensors under the authors' names, fed with features of the papers' widths"
    from avvp_nb.methods.official import to_official
    class Wide(Toy):
        audio_dim, frame_dim, motion_dim = 128, 2048, 512
        def sound(self, x): return np.zeros((len(x)//RATE, 128)), None
        def pictures(self, x): return np.zeros((len(x), 2048)), np.zeros((len(x)//FPS, 512)), None
    torch.save(to_official(METHODS["han"].official["han"].build()), tmp_path/"han.pt")
    v = video(tmp_path/"a.mp4", 12)
    P.parse_file(v, tmp_path/"o", backend=Wide(), read=read, model=tmp_path/"han.pt", official="han")
    j = told(tmp_path/"o/a.json")
    assert j["model"]["released"] and j["model"]["rule"] == "han" and j["classes"] == list(CLASSES)
    with pytest.raises(InputError, match="--backend paper"): parse([v], tmp_path/"o", model=tmp_path/"han.pt", official="han")
    with pytest.raises(InputError, match="E_WEIGHTS"): P.parse_file(v, tmp_path/"o", model=tmp_path/"han.pt", official="han")


def test_llp_is_meant_where_25_classes_have_no_names(tmp_path):
    assert R.load_net(weights(tmp_path, sizes={**SIZES, "classes": 25}, classes=None), Toy()).classes == CLASSES


# the real thing: needs PyAV, the packages with the weights, and the shared video

@pytest.fixture(scope="module")
def real(llp, tmp_path_factory):
    for name in ("av", "onnxruntime"): pytest.importorskip(name)
    path = llp/"BjCEufrlXm4.mp4"
    if not path.exists(): pytest.skip("the shared video is not there")
    try: parser = R.Parser()
    except InputError as e: pytest.skip(str(e))
    out = tmp_path_factory.mktemp("real")
    done = P.run_job(P.Job(parser, out), [path], progress=False)[0]
    if done.error: raise done.error
    return told(out/"BjCEufrlXm4.json"), out


def test_the_real_video(real):
    j, out = real
    heard, seen = ([s[k] for s in j["seconds"]] for k in ("heard", "seen"))
    assert len(j["seconds"]) == 10 and sum("Dog" in x for x in heard) >= 7 and sum("Speech" in x for x in heard) >= 6
    assert sum("Dog" in x for x in seen) >= 8 and seen[0] == [] and not {"Cat", "Car"} & set(sum(heard + seen, []))
    assert len(j["cannot_see"]) == 9 and "Speech" in j["cannot_see"]
    page = (out/"BjCEufrlXm4.html").read_text()
    assert "http" not in page and page.count("<img") == 10 and "licence" in page


def test_real_files_that_are_none(real, tmp_path):
    (tmp_path/"text.mp4").write_text("not a video"); (tmp_path/"empty.mp4").write_bytes(b"")
    shutil.copy(next(real[1].glob("*.json")), tmp_path/"cut.mp4")
    done = P.parse_files([tmp_path], tmp_path/"o", Toy(), progress=False)
    assert [p.status for p in done] == ["failed"]*3 and all("\n" not in str(p.error) for p in done) and tree(tmp_path/"o") == {}


def test_real_files_of_many_kinds(tmp_path):
    "Through the real decoder in its child process: with and without tracks, odd sizes and rates, a name in another script"
    pytest.importorskip("av")
    from avvp_nb.media.container import sample_video
    folder = tmp_path/"in"
    folder.mkdir()
    for name, how in {"whole": {}, "mute": {"sound": False}, "blind": {"pictures": False}, "odd": {"size": (50, 38), "fps": 7, "rate": 8000},
                      "видео 猫": {"seconds": 12.2, "layout": "mono"}, "turned": {"turn": 90}}.items():
        sample_video(folder/f"{name}.mp4", **how)
    (folder/"cut.mp4").write_bytes((folder/"whole.mp4").read_bytes()[:-3000])
    done = {p.path.stem: p for p in P.parse_files([folder], tmp_path/"o", Toy(), progress=False)}
    assert {k for k, p in done.items() if p.error} == {"cut"} and "E_NOT_MEDIA" in str(done["cut"].error)
    j = {k: told(p.files[0]) for k, p in done.items() if not p.error}
    assert {k: len(v["seconds"]) for k, v in j.items()} == {"whole": 2, "mute": 2, "blind": 2, "odd": 2, "видео 猫": 12, "turned": 2}
    assert [w[:10] for w in j["mute"]["warnings"]] == ["W_NO_AUDIO", "W_SHORT: 2"] and j["mute"]["missing"] == ["audio"]
    assert j["blind"]["missing"] == ["visual"] and "W_NO_VIDEO" in j["blind"]["warnings"][0]
    assert j["odd"]["media"]["tracks"] == ["mpeg4 50 × 38, 7 pictures a second", "aac 8,000 Hz, stereo"]
    assert sorted(tree(tmp_path/"o")) == sorted(f"{k}.{x}" for k in j for x in P.USUAL)
