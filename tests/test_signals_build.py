"""A bundle of real signals from miniatures of the public archives: layouts, formats, what is kept, and what is refused."""
import csv
import hashlib
import io
import os
import shutil
import struct
import sys
import tarfile
import zipfile
from collections import Counter

import numpy as np
import pytest

from avvp_nb import cli
from avvp_nb.core import InputError, shared
from avvp_nb.data import signals_archives as A
from avvp_nb.data import signals_build as B
from avvp_nb.data import signals_tunes as T
from avvp_nb.data.signals import RATE, Recipe, compose, open_bundle, render_pictures, render_sound

soundfile = pytest.importorskip("soundfile")
Image = pytest.importorskip("PIL.Image")
PLAYER = """#!{python}
# Plays the notes of a MIDI file as sines, as FluidSynth would be asked to
import array, math, sys, wave
if "--version" in sys.argv: print("FluidSynth runtime version 0.0.1"); sys.exit()
midi = open(sys.argv[-1], "rb").read()
assert open(sys.argv[-2], "rb").read(4) == b"RIFF" and midi[:4] == b"MThd"
pitches = [midi[i + 1] for i in range(len(midi) - 2) if midi[i] == 0x90 and midi[i + 2]][:4]
x = [round(3000*math.sin(2*math.pi*440*2**((p - 69)/12)*k/44100)) for p in pitches for k in range(4410)]
with wave.open(sys.argv[sys.argv.index("-F") + 1], "wb") as f:
    f.setnchannels(2); f.setsampwidth(2); f.setframerate(44100)
    f.writeframes((array.array("h", [v for v in x for _ in range(2)]).tobytes()*100)[:7*44100*4])
"""


def first_of_each():
    "The facts of one sound and one picture of each class and split"
    out = {}
    for w in A.wanted_files(): out.setdefault((w.modality, w.label, w.split), w)
    return list(out.values())


def wav(rng, rate, seconds=1.):
    f, n = io.BytesIO(), round(rate*seconds)
    x = np.convolve(rng.standard_normal(n + 8), rng.standard_normal(9), "valid")[:n]
    soundfile.write(f, np.r_[np.zeros(rate//4), .1*x, np.zeros(rate//4)], rate, format="WAV")
    return f.getvalue()


def jpg(rng, w):
    k = 1.4 if max(w.width, w.height) == B.LONGER else 1
    small = rng.integers(0, 256, (8, 8, 3), np.uint8)
    return B.jpeg(Image.fromarray(small).resize((round(k*w.width), round(k*w.height))))


def font(presets):
    "A soundfont of names, without a sound"
    def chunk(name, data): return name + struct.pack("<I", len(data)) + data
    records = b"".join(struct.pack("<20sHH14x", n.encode(), p, b) for (b, p), n in [*presets.items(), ((0, 0), "EOP")])
    body = chunk(b"LIST", b"pdta" + chunk(b"phdr", records))
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"sfbk" + body


def sketched(w, data):
    "The facts of a file, with the sketch and length of these contents"
    if w.modality == "visual": return w._replace(sketch=B.picture_sketch(B.smaller(B.opened_picture(data, w.file))))
    x = B.decoded(data, w.file)
    x = x if w.archive in B.UNCUT else B.cut_ends(x)
    return w._replace(sketch=B.sound_sketch(x), seconds=round(len(x)/RATE, 3))


def packed(kind, path, files):
    "Files as a folder, a zip file or a tar file"
    if kind == "folder":
        for name, data in files.items():
            (path/name).parent.mkdir(parents=True, exist_ok=True)
            (path/name).write_bytes(data)
        return path
    path = path.with_name(path.name + kind)
    if kind == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
            for name, data in files.items(): z.writestr(name, data)
    else:
        with tarfile.open(path, "w:gz") as t:
            for name, data in files.items():
                m = tarfile.TarInfo(name)
                m.size = len(data)
                t.addfile(m, io.BytesIO(data))
    return path


class Mini:
    "Facts and miniatures of the four archives, in their real layouts"
    def __init__(self, root):
        rng, self.files, self.wanted = np.random.default_rng(0), {}, []
        few = first_of_each()
        presets = {(w.tune.bank, w.tune.program): w.tune.preset for w in few if w.tune}
        self.font = root/A.FONT
        self.font.write_bytes(font(presets))
        known = hashlib.sha256(self.font.read_bytes()).hexdigest()
        for w in few:
            if w.tune:
                self.wanted.append(w._replace(source_sha256=known))
                continue
            data = jpg(rng, w) if w.modality == "visual" else wav(rng, 8000 if w.archive == "FSDD" else 44_100)
            self.files[w.archive, w.members[0]] = data
            self.wanted.append(sketched(w, data))
        table = "filename,fold,target,category,esc10,src_file,take\n" + "".join(
            f"{n.split('/')[1]},1,0,dog,True,1,A\n" for a, n in self.files if a == "ESC-10")
        self.esc = packed("folder", root/"ESC-50-master", {**self.of("ESC-10"), "meta/esc50.csv": table.encode()})
        self.fsdd = packed(".zip", root/"fsdd", self.of("FSDD", "free-spoken-digit-dataset-master/"))
        self.caltech = packed(".tar.gz", root/"101", self.of("Caltech-101", "101_ObjectCategories/"))
        self.player = root/"player"
        self.player.write_text(PLAYER.format(python=sys.executable))
        self.player.chmod(0o755)

    def of(self, archive, folder=""): return {folder + n: d for (a, n), d in self.files.items() if a == archive}

    @property
    def sources(self): return [self.esc, self.fsdd, self.caltech, self.font]

    def build(self, out, sources=None, **kw):
        return B.build(sources or self.sources, out, wanted=self.wanted, player=str(self.player), **kw)


@pytest.fixture(scope="module")
def mini(tmp_path_factory): return Mini(tmp_path_factory.mktemp("archives"))


@pytest.fixture(scope="module")
def built(mini, tmp_path_factory): return mini.build(tmp_path_factory.mktemp("out")/"bundle")


def refused(f, *said):
    with pytest.raises(InputError) as e: f()
    assert "\n" not in str(e.value)
    for text in said: assert text in str(e.value), str(e.value)


# ---- the whole way

def test_a_bundle_of_all_classes_that_timelines_are_composed_of(built, mini):
    b = open_bundle(built.bundle.root)
    assert (len(b.items), len(b.classes)) == (66, 10) and b.fingerprint == built.bundle.fingerprint
    for i in range(5):
        t = compose(b, "test", i)
        sound, heard = render_sound(b, t)
        assert sound.shape == (160_000,) and np.isfinite(sound).all() and len(t.classes) == 10
        assert heard.any() == bool(t.heard) and render_pictures(b, t).shape == (80, 256, 256, 3)
    facts = {w.file: w for w in mini.wanted}
    for x in b.items:
        w = facts[x.file]
        assert (x.modality, x.label, x.source, x.recording, x.split, x.licence) == (
            w.modality, w.label, w.source, w.recording, w.split, w.licence)
        assert x.attribution == w.attribution + ", drawn and rendered anew by avvp_nb"*bool(w.tune)
        if x.modality == "audio" and not w.tune: assert x.seconds == w.seconds
    assert "Permission is hereby granted" in (b.root/B.LICENCES).read_text(encoding="utf-8")
    assert "| FluidR3_GM rendering | 15 | MIT |" in (b.root/B.LICENCES).read_text(encoding="utf-8")


def test_what_differs_from_the_reference_bundle_is_said(built):
    said = str(built)
    assert "15 instrument sounds are OTHER tunes" in said and "played by FluidSynth 0.0.1" in said
    assert "0 of them to the very bytes" in said and "reference bundle's 7f2ce25779350d02" in said
    assert "their SHA-256 is not known" in said and built.same == 0


def test_sounds_and_pictures_have_the_form_of_the_bundle(built, mini):
    rows = list(csv.DictReader((built.bundle.root/"manifest.csv").open(encoding="utf-8")))
    for r in rows:
        path = built.bundle.root/r["file"]
        if r["modality"] == "visual":
            with Image.open(path) as im:
                assert im.format == "JPEG" and im.size == (int(r["width"]), int(r["height"])) and max(im.size) <= 256
                assert "exif" not in im.info
            continue
        x, rate = soundfile.read(path)
        assert rate == RATE and x.ndim == 1 and float(r["seconds"]) == round(len(x)/RATE, 3) and r["active"]
        assert .8 < np.abs(x).max() < 1.06 and soundfile.info(path).subtype == "VORBIS"
    speech = [float(r["seconds"]) for r in rows if r["class"] == "Speech" and r["modality"] == "audio"]
    dogs = [float(r["seconds"]) for r in rows if r["class"] == "Dog" and r["modality"] == "audio"]
    assert speech == [1.5]*3 and all(1 <= s <= 1.1 for s in dogs)      # digits are not cut, barks are


@pytest.mark.parametrize("kinds", [("folder", "folder", "folder"), (".zip", ".tar.gz", ".zip"), (".tar.gz", "folder", "nested")])
def test_every_form_of_an_archive_gives_the_same_bundle(kinds, mini, built, tmp_path):
    esc, fsdd, caltech = kinds
    sources = [packed(esc, tmp_path/"a", mini.of("ESC-10", "./ESC-50/")), packed(fsdd, tmp_path/"b", mini.of("FSDD", "x/y/")), mini.font]
    if caltech == "nested": sources.append(packed(".zip", tmp_path/"c", {f"caltech-101/{A.NESTED}": mini.caltech.read_bytes()}))
    else: sources.append(packed(caltech, tmp_path/"c", mini.of("Caltech-101", "101_ObjectCategories/")))
    assert mini.build(tmp_path/"out", sources).bundle.fingerprint == built.bundle.fingerprint


def test_the_older_esc_10_is_known_by_its_names(mini, tmp_path):
    "Ogg files in folders of classes, as the reference bundle was made from"
    files = {}
    for name, data in mini.of("ESC-10").items():
        x, rate = soundfile.read(io.BytesIO(data))
        f = io.BytesIO()
        soundfile.write(f, x, rate, format="OGG", subtype="VORBIS")
        files[f"001 - Some/{name.split('/')[1].rsplit('-', 1)[0]}.ogg"] = f.getvalue()
    old = packed("folder", tmp_path/"ESC-10", files)
    assert len(mini.build(tmp_path/"out", [old, *mini.sources[1:]]).bundle.items) == 66


def test_without_instruments_neither_soundfont_nor_player_is_needed(mini, tmp_path):
    done = B.build(mini.sources[:3], tmp_path/"out", instruments=False, wanted=mini.wanted, player="no-such-player")
    assert done.bundle.classes == ("Speech", "Dog", "Chicken_rooster", "Helicopter", "Clock")
    assert "Without instruments" in str(done) and len(done.bundle.items) == 36
    assert compose(done.bundle, "train", 0, Recipe()).classes == done.bundle.classes


def test_the_command(mini, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(B, "wanted_files", lambda: tuple(mini.wanted))
    folder = tmp_path/"bin"
    folder.mkdir()
    shutil.copy(mini.player, folder/T.PLAYER)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    argv = ["signals-build", *map(str, mini.sources), "--out", str(tmp_path/"out")]
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert out == f"{B.build(mini.sources, tmp_path/'out')}\n" and err == ""
    assert len(open_bundle(tmp_path/"out").items) == 66
    assert cli.main(["signals-build", str(mini.esc), "--out", str(tmp_path/"two")]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and len(err.strip().splitlines()) == 1 and "nothing is downloaded" in err
    assert not (tmp_path/"two").exists()


# ---- going on

def test_an_interrupted_build_goes_on(mini, built, tmp_path, monkeypatch):
    calls, convert = [], B.convert
    def stop(w, data, where):
        calls.append(w.file)
        if len(calls) == 20: raise KeyboardInterrupt
        return convert(w, data, where)
    monkeypatch.setattr(B, "convert", stop)
    with pytest.raises(KeyboardInterrupt): mini.build(tmp_path/"out")
    refused(lambda: open_bundle(tmp_path/"out"), "manifest.csv: no such file")
    made = sorted(p for p in (tmp_path/"out").rglob("*.*") if p.suffix in (".ogg", ".jpg"))
    assert len(made) == 19 and not list((tmp_path/"out").rglob("*.part"))
    assert mini.build(tmp_path/"out").bundle.fingerprint == built.bundle.fingerprint
    assert len(calls) == 20 + 51 - 19                                  # nothing was converted twice
    mini.build(tmp_path/"out")
    assert len(calls) == 20 + 51 - 19


@pytest.mark.parametrize("spoil", ["delete", "change", "other source"])
def test_only_what_changed_is_made_again(mini, built, tmp_path, monkeypatch, spoil):
    out = shutil.copytree(built.bundle.root, tmp_path/"out")
    victim, sources = next(w for w in mini.wanted if w.label == "Dog" and w.modality == "audio"), mini.sources
    if spoil == "delete": (out/victim.file).unlink()
    if spoil == "change": (out/victim.file).write_bytes(b"other")
    if spoil == "other source":
        x, rate = soundfile.read(mini.esc/victim.members[0])
        soundfile.write(tmp_path/"louder.wav", 2*x, rate)
        sources = [packed("folder", tmp_path/"esc", {**mini.of("ESC-10"), victim.members[0]: (tmp_path/"louder.wav").read_bytes()}), *sources[1:]]
    calls, convert = [], B.convert
    monkeypatch.setattr(B, "convert", lambda w, *a: (calls.append(w.file), convert(w, *a))[1])
    mini.build(out, sources)
    assert calls == [victim.file] and len(open_bundle(out).items) == 66


def test_leftovers_of_a_killed_build_are_swept(mini, built, tmp_path):
    out = shutil.copytree(built.bundle.root, tmp_path/"out")
    left = out/"audio"/"Dog"/".x.ogg.999999999.0123abcd.part"
    left.write_bytes(b"half")
    mini.build(out)
    assert not left.exists()


def test_a_folder_of_something_else_is_left_alone(mini, tmp_path):
    (tmp_path/"mine").mkdir()
    (tmp_path/"mine"/"letter.txt").write_text("dear")
    refused(lambda: mini.build(tmp_path/"mine"), "mine: holds something else", "choose a new folder")
    refused(lambda: mini.build(tmp_path/"mine"/"letter.txt"), "holds something else")
    assert [p.name for p in (tmp_path/"mine").iterdir()] == ["letter.txt"]


def test_a_damaged_journal_is_named(mini, built, tmp_path):
    out = shutil.copytree(built.bundle.root, tmp_path/"out")
    for text in ("", "a,b\n", (out/B.JOURNAL).read_text() + "x,y\n"):
        (out/B.JOURNAL).write_text(text)
        refused(lambda: mini.build(out), "sources.csv: is damaged")


# ---- bad input

def test_what_is_missing_is_named_with_archive_file_and_remedy(mini, tmp_path):
    refused(lambda: mini.build(tmp_path/"out", mini.sources[1:]), "ESC-10: 15 of 15 files are missing, such as audio/", "ESC-50", "name it among the sources")
    refused(lambda: mini.build(tmp_path/"out", mini.sources[:1]), "FSDD: 3 of 3 files are missing", "Caltech-101: 33 of 33")
    gone = dict(list(mini.of("FSDD").items())[1:])
    refused(lambda: mini.build(tmp_path/"out", [mini.esc, packed(".zip", tmp_path/"f", gone), mini.caltech, mini.font]), "FSDD: 1 of 3 files are missing, such as recordings/")
    refused(lambda: mini.build(tmp_path/"out", [tmp_path/"none.zip"]), "none.zip: no such file or folder")
    assert not (tmp_path/"out").exists()


@pytest.mark.parametrize("which", ["esc", "fsdd", "caltech", "font"])
def test_a_truncated_archive_is_named_before_or_where_it_matters(mini, tmp_path, which):
    kind = {"esc": ".tar.gz", "fsdd": ".zip", "caltech": ".tar.gz", "font": ".sf2"}[which]
    whole = packed(kind, tmp_path/"whole", mini.of("ESC-10")) if which == "esc" else getattr(mini, which)
    data = whole.read_bytes()
    for share in (0, .3, .6, .99):
        cut = tmp_path/f"cut{kind}"
        cut.write_bytes(data[:int(share*len(data))])
        sources = [s for s in mini.sources if s != getattr(mini, which)]
        if which == "font": cut = shutil.copy(cut, tmp_path/A.FONT)
        with pytest.raises(InputError) as e: mini.build(tmp_path/f"out{share}", [cut, *sources])
        assert "\n" not in str(e.value) and any(t in str(e.value) for t in ("damaged or cut short", "are missing", "is another file", "cannot be decoded"))


def test_another_soundfont_is_refused(mini, tmp_path):
    other = tmp_path/A.FONT
    other.write_bytes(font({(0, 0): "Grand"}))
    refused(lambda: mini.build(tmp_path/"out", [*mini.sources[:3], other]), "is another file (SHA-256")
    same = hashlib.sha256(other.read_bytes()).hexdigest()
    wanted = [w._replace(source_sha256=same) if w.tune else w for w in mini.wanted]
    refused(lambda: B.build([*mini.sources[:3], other], tmp_path/"out", wanted=wanted, player=str(mini.player)), "has no preset at bank", "as FluidR3_GM has")
    inside = packed(".zip", tmp_path/"z", {A.FONT: mini.font.read_bytes()})
    refused(lambda: mini.build(tmp_path/"out", [*mini.sources[:3], inside]), "lies in an archive", "unpack it")
    refused(lambda: B.build(mini.sources, tmp_path/"out", wanted=mini.wanted, player="no-such-player"), "is not installed", "--no-instruments")
    assert not (tmp_path/"out").exists()


def test_a_source_whose_sha256_is_known_is_compared(mini, tmp_path):
    wanted = [w._replace(source_sha256="0"*64) if w.archive == "FSDD" else w for w in mini.wanted]
    refused(lambda: B.build(mini.sources, tmp_path/"out", wanted=wanted, player=str(mini.player)), "fsdd.zip: ", "is another file (SHA-256", "expected 0000000000000000")


@pytest.mark.parametrize("archive", ["ESC-10", "FSDD", "Caltech-101"])
def test_another_sound_or_picture_under_the_same_name_is_refused(mini, tmp_path, archive):
    files = mini.of(archive)
    victim = next(w for w in mini.wanted if w.archive == archive)
    rng = np.random.default_rng(9)
    files[victim.members[0]] = jpg(rng, victim) if archive == "Caltech-101" else wav(rng, 8000 if archive == "FSDD" else 44_100)
    own = {"ESC-10": mini.esc, "FSDD": mini.fsdd, "Caltech-101": mini.caltech}[archive]
    sources = [packed(".zip", tmp_path/"other", files), *(s for s in mini.sources if s != own)]
    refused(lambda: mini.build(tmp_path/"out", sources), victim.members[0], "is not what", "bits of its sketch differ")
    refused(lambda: open_bundle(tmp_path/"out"), "manifest.csv: no such file")


def test_paths_that_lead_outside_are_refused_and_nothing_is_written_there(mini, tmp_path):
    for kind in (".zip", ".tar.gz"):
        for name in ("../recordings/0_george_2.wav", "/recordings/0_george_2.wav", "a\\..\\b.wav"):
            bad = packed(kind, tmp_path/"bad", {**mini.of("FSDD"), name: b"x"})
            refused(lambda: mini.build(tmp_path/"sub"/"out", [mini.esc, bad, mini.caltech, mini.font]), f"bad{kind}: holds '", "leads out of the archive")  # noqa: B023
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.tar.gz", "bad.zip"]
    out = packed("folder", tmp_path/"links", mini.of("FSDD"))
    first = next(out.rglob("*.wav"))
    first.rename(tmp_path/"elsewhere.wav")
    first.symlink_to(tmp_path/"elsewhere.wav")
    refused(lambda: mini.build(tmp_path/"out", [mini.esc, out, mini.caltech, mini.font]), "is a link that leads out of the folder")
    link = tmp_path/"link.tar.gz"
    with tarfile.open(link, "w:gz") as t:
        for name in mini.of("FSDD"):
            m = tarfile.TarInfo(name)
            m.type, m.linkname = tarfile.SYMTYPE, "/etc/hosts"
            t.addfile(m)
    refused(lambda: mini.build(tmp_path/"out2", [mini.esc, link, mini.caltech, mini.font]), "is a link")


def test_limits_of_archives(mini, tmp_path, monkeypatch):
    big = packed(".zip", tmp_path/"big", {next(iter(mini.of("FSDD"))): bytes(A.MAX_ITEM + 1), **dict(list(mini.of("FSDD").items())[1:])})
    assert big.stat().st_size < 2**20                                  # a bomb
    refused(lambda: mini.build(tmp_path/"out", [mini.esc, big, mini.caltech, mini.font]), "16,777,217 bytes", "at most")
    monkeypatch.setattr(A, "MAX_MEMBERS", 2)
    refused(lambda: list(A.walk(mini.fsdd)), "has more than 2 files")
    refused(lambda: list(A.walk(mini.esc)), "has more than 2 files")
    refused(lambda: list(A.walk(mini.caltech)), "has more than 2 files")
    monkeypatch.setattr(A, "MAX_MEMBERS", 100)
    monkeypatch.setattr(A, "MAX_TOTAL", 10)
    refused(lambda: list(A.walk(mini.caltech)), "unpacks to more than 10 bytes")


def test_a_zip_file_with_a_changed_byte_is_noticed(mini, tmp_path):
    data, name = bytearray(mini.fsdd.read_bytes()), next(iter(mini.of("FSDD")))
    with zipfile.ZipFile(mini.fsdd) as z: info = z.getinfo("free-spoken-digit-dataset-master/" + name)
    data[info.header_offset + 200] ^= 255
    (tmp_path/"f.zip").write_bytes(data)
    refused(lambda: mini.build(tmp_path/"out", [mini.esc, tmp_path/"f.zip", mini.caltech, mini.font]), "f.zip: is damaged or cut short")


@pytest.mark.parametrize("data", [b"", b"RIFF", b"OggS" + bytes(100), bytes(1000), b"\xff\xd8\xff\xe0" + bytes(50)])
def test_rubbish_is_no_sound_and_no_picture(data):
    refused(lambda: B.decoded(data, "x"), "x: cannot be decoded")
    refused(lambda: B.opened_picture(data, "x"), "x: cannot be decoded")


def test_sounds_that_are_none(tmp_path):
    def of(x, rate=8000):
        f = io.BytesIO()
        soundfile.write(f, x, rate, format="WAV", subtype="FLOAT")
        return f.getvalue()
    refused(lambda: B.decoded(of(np.zeros(100)), "x"), "x: is silent")
    refused(lambda: B.decoded(of(np.full(100, np.nan)), "x"), "x: is silent, or holds NaN")
    refused(lambda: B.decoded(of(np.ones(8000*61)), "x"), "x: 488,000 samples at 8,000 Hz")
    refused(lambda: B.decoded(of(np.ones(100), 1000), "x"), "x: 100 samples at 1,000 Hz")
    wide = Image.new("RGB", (5000, 10))
    refused(lambda: B.opened_picture(B.jpeg(wide), "x"), "5000 x 10 pixels")


# ---- the facts

def test_the_facts_of_the_package():
    every = A.wanted_files()
    assert len({w.file for w in every}) == len(every) == 1533 and {w.archive for w in every} == set(A.archives())
    assert B.reference_fingerprint(every) == "7f2ce25779350d02"
    assert all(len(w.sha256) == 64 and int(w.sha256, 16) >= 0 for w in every) and len({w.sha256 for w in every}) == 1533
    recordings = {}
    for w in every: recordings.setdefault((w.modality, w.recording), set()).add(w.split)
    assert max(map(len, recordings.values())) == 1
    assert Counter(w.licence for w in every) == {"CC-BY-4.0": 895, "CC-BY-SA-4.0": 240, "MIT": 200, "CC0-1.0": 134, "CC-BY-3.0": 64}


def _real():
    folder = shared("real_signals")
    if not folder.is_dir(): pytest.skip(f"{folder.name}/ not found: set AVVP_SHARED to the folder that holds it")
    return folder


def test_the_facts_are_those_of_the_real_bundle():
    "Every cell of its manifest follows from the package's data"
    rows = {r["file"]: r for r in csv.DictReader((_real()/"manifest.csv").open(encoding="utf-8"))}
    assert len(rows) == len(A.wanted_files())
    def number(text): return float(text or 0)
    for w in A.wanted_files():
        r = rows[w.file]
        said = (w.modality, w.label, w.source, w.recording, w.split, w.licence, w.attribution, w.sha256)
        assert said == tuple(r[k] for k in ("modality", "class", "source", "recording", "split", "licence", "attribution", "sha256"))
        assert (w.seconds, w.active, w.width, w.height) == tuple(number(r[k]) for k in ("seconds", "active", "width", "height"))


def test_sketches_are_those_of_the_real_files():
    folder = _real()
    for w in A.wanted_files()[::25]:
        if w.tune: continue
        data = (folder/w.file).read_bytes()
        found = B.picture_sketch(B.opened_picture(data, w.file)) if w.modality == "visual" else B.sound_sketch(soundfile.read(io.BytesIO(data), dtype="float32")[0])
        assert (int(found, 16) ^ int(w.sketch, 16)).bit_count() <= 2, w.file     # decoders may differ in the last bits


def test_tunes_are_the_same_everywhere():
    "The MIDI files of all tunes; a changed rule has to raise `TUNES`"
    tunes = [w for w in A.wanted_files() if w.tune]
    midi = b"".join(T.midi_bytes(T.score_of(w.tune, w.seconds), w.tune.bank, w.tune.program) for w in tunes)
    assert (T.TUNES, len(tunes), hashlib.sha256(midi).hexdigest()[:16]) == (1, 200, "0734aee479d415ea")
    for w in tunes:
        notes = T.score_of(w.tune, w.seconds).notes
        assert notes and all(w.tune.low <= n.pitch <= w.tune.high and n.length > 0 for n in notes)


def test_fluidsynth_plays_the_tunes(tmp_path):
    "With the program and the soundfont of this machine, where both are"
    places = [os.environ.get("AVVP_SOUNDFONT", ""), f"/usr/share/sounds/sf2/{A.FONT}"]
    path = next((p for p in places if p and os.path.isfile(p)), None)
    if not shutil.which(T.PLAYER) or path is None: pytest.skip("FluidSynth or FluidR3_GM.sf2 is not installed (AVVP_SOUNDFONT names it)")
    tunes = [w for w in A.wanted_files() if w.tune]
    T.check_presets(path, [w.tune for w in tunes])
    for w in tunes[::40]:
        x, y = (T.render(path, w.tune, w.seconds, T.find_player()[0]) for _ in range(2))
        assert (x == y).all() and len(x) == round(w.seconds*T.PLAYED) and np.abs(x).max() > .001
