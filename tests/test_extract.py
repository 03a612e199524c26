"""Features of videos in the authors' layout: shapes, provenance, resuming, and bad files among good ones."""
import hashlib

import numpy as np
import pytest

from avvp_nb.core import InputError
from avvp_nb.data.features import doctor, layout_source
from avvp_nb.media.backend import Backend
from avvp_nb.media.container import sample_video
from avvp_nb.media.decode import read_media
from avvp_nb.runs.extract import extract, sets_of

pytest.importorskip("av", reason="PyAV is not installed: pip install av")


class Papers(Backend):
    "The widths of the papers' networks; numbers that depend on what is seen and heard"
    name, audio_dim, frame_dim, motion_dim, size = "paper", 128, 2048, 512, 24
    calls = 0

    def sound(self, x):
        self.calls += 1
        return np.abs(x.reshape(-1, 16_000)).mean(1, keepdims=True).repeat(128, 1), None

    def pictures(self, x):
        level = x.reshape(len(x), -1).mean(1, keepdims=True)
        return level.repeat(2048, 1), level.reshape(-1, 8).mean(1, keepdims=True).repeat(512, 1), None


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    sample_video(folder / "PWxyz_-12aB_0_10.mp4", 10, fps=8)
    sample_video(folder / "short.mp4", 2)
    sample_video(folder / "deaf.mkv", 12, fps=4, sound=False)
    (folder / "text.mp4").write_text("no video")
    (folder / "notes.txt").write_text("not looked at")
    return folder


def run(videos, out, of=None, **kw):
    return extract(videos, out, of or Papers(), progress=False, read=read_media, **kw)


def tree(folder):
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*.npy"))}


def test_the_authors_layout(videos, tmp_path):
    found = {e.name: e for e in run(videos, tmp_path / "out")}
    assert {k: e.status for k, e in found.items()} == \
        {"PWxyz_-12aB": "done", "short": "done", "deaf": "done", "text": "failed"}
    assert "W_NO_AUDIO" in found["deaf"].text and "text.mp4: E_NOT_MEDIA" in found["text"].text
    report = doctor(tmp_path / "out", ["PWxyz_-12aB", "short", "deaf"], seconds=10, full=True, progress=False)
    assert len(report.problems) == 0
    x = {k: np.load(tmp_path / "out" / k / "short.npy") for k in ("vggish", "res152", "r2plus1d_18")}
    assert [a.shape for a in x.values()] == [(10, 128), (80, 2048), (10, 512)] and all(a.dtype == np.float32 for a in x.values())
    assert not x["vggish"][2:].any() and (x["res152"][16:] == x["res152"][15]).all()      # filled up
    long = np.load(tmp_path / "out" / "res152" / "deaf.npy")
    assert long.shape == (80, 2048) and np.abs(long[:, 0] - 5 * np.floor(np.arange(80) / 2)).max() < 4   # cut, not squeezed
    source = layout_source(tmp_path / "out")
    assert source["simulated"] is False and source["mark"] == "own videos, back end paper, 10 s, frames grid"


def test_resuming_gives_the_same_tree(videos, tmp_path):
    class Stops(Papers):
        def sound(self, x):
            if self.calls == 1:
                raise KeyboardInterrupt
            return super().sound(x)

    run(videos, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(videos, tmp_path / "out", Stops())
    of = Papers()
    found = run(videos, tmp_path / "out", of)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert sorted(e.status for e in found) == ["before", "done", "done", "failed"] and of.calls == 2
    assert [e.status for e in run(videos, tmp_path / "out", of)].count("before") == 3 and of.calls == 2
    assert not [p for p in (tmp_path / "out").rglob("*") if ".part" in p.name]


def test_what_changed_is_done_again(videos, tmp_path):
    out = tmp_path / "out"
    run(videos, out)
    (videos / "short.mp4").touch()                                       # same content, another time
    assert [e.status for e in run(videos, out)].count("before") == 3
    sample_video(videos / "short.mp4", 3)
    (out / "vggish" / "deaf.npy").write_bytes((out / "vggish" / "deaf.npy").read_bytes()[:-4])
    assert {e.name: e.status for e in run(videos, out)} == \
        {"PWxyz_-12aB": "before", "short": "done", "deaf": "done", "text": "failed"}
    assert np.load(out / "vggish" / "deaf.npy").shape == (10, 128)


def test_refused_before_any_work(videos, tmp_path):
    of = Papers()
    run(videos, tmp_path / "out")
    before = tree(tmp_path / "out")
    for kw in (dict(frames="official"), dict(seconds=5)):
        with pytest.raises(InputError, match="holds features of another source"):
            run(videos, tmp_path / "out", of, **kw)
    sample_video(videos / "PWxyz_-12aB_10_20.mp4", 1)
    with pytest.raises(InputError, match="2 videos have the id PWxyz_-12aB"):
        run(videos, tmp_path / "out2", of)
    with pytest.raises(InputError, match="seconds: 0"):
        run(videos / "short.mp4", tmp_path / "out2", of, seconds=0)
    assert of.calls == 0 and tree(tmp_path / "out") == before and not (tmp_path / "out2").exists()


def test_other_back_ends_have_folders_of_their_own():
    of = Papers()
    assert [s.folder for s in sets_of(of).values()] == ["vggish", "res152", "r2plus1d_18"]
    of.name, of.motion_dim = "small", 0
    assert [s.folder for s in sets_of(of).values()] == ["small_sound", "small_pictures"]
