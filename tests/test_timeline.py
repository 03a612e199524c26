"""A timeline and its files: events against a count by hand, every file read again, and a page that can harm nobody."""
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from avvp_nb.core import CLASSES, Parsing
from avvp_nb.data.tables import parse_intervals, rasterise
from avvp_nb.metrics import RULES
from avvp_nb.results import timeline as T
from avvp_nb.results.timeline_page import MOST_PICTURES, safe, timeline_page

EVIL = ("</script><script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "a\tb\nc", "--> x", "猫", "&amp;",
        "see http://example.org", "\x1b[31mred\u202e")


def drawn(N=23, C=25, seed=0, classes=CLASSES, **about):
    "A timeline of random runs"
    rng = np.random.default_rng(seed)
    heard, seen = np.repeat(rng.random((2, -(-N // 3), C)), 3, 1)[:, :N].astype(np.float32)
    return T.timeline("dir/a.mp4", heard, seen, T.by_threshold(heard, seen, (.7, .8)), classes, "toy", **about)


def events_by_hand(on):
    "(onset, offset, class) of every run, one second after the other"
    out = []
    for c in range(on.shape[1]):
        start = None
        for t, x in enumerate([*on[:, c], False]):
            if x and start is None: start = t
            if not x and start is not None: out.append((start, t, c)); start = None
    return sorted(out)


@pytest.mark.parametrize("N", (1, 10, 23))
@pytest.mark.parametrize("seed", (0, 1))
def test_events_are_the_runs(N, seed):
    t = drawn(N, seed=seed)
    found = T.timeline_events(t)
    for k, (p, on) in T.lanes(t).items():
        own = [e for e in found if e["modality"] == k]
        assert sorted((e["onset_s"], e["offset_s"], e["class_index"]) for e in own) == events_by_hand(on)
        for e in own:
            run = p[e["onset_s"]:e["offset_s"], e["class_index"]]
            assert e["confidence"] == pytest.approx(run.mean(), abs=1e-4) and e["peak"] == pytest.approx(run.max(), abs=1e-4)
    keys = [(e["onset_s"], T.PARTS.index(e["modality"]), e["class_index"]) for e in found]
    assert keys == sorted(keys)


def test_both_is_heard_and_seen():
    t = drawn()
    assert (T.lanes(t)["audio_visual"][1] == (t.on_heard & t.on_seen)).all() and T.lanes(t)["audio_visual"][1].any()


@pytest.mark.parametrize("rule", RULES)
def test_one_window_is_the_published_rule(rule):
    "Seconds as videos of one second decide as the video of ten does, under every rule"
    rng = np.random.default_rng(3)
    def one():
        x = rng.random((1, 10, 2, 25)).astype(np.float32)
        return Parsing(x.max((1, 2)), x[:, :, 0].mean(1), x[:, :, 1].mean(1), x)
    passes = one(), one()
    seconds = [Parsing(*(np.repeat(g, 10, 0) for g in (p.video, p.audio, p.visual)), p.segments[0][:, None]) for p in passes]
    for a, b in zip(T.by_rule(seconds[0], rule, seconds[1]), RULES[rule].decide(*passes)): assert (a == b[0]).all()


def test_thresholds_are_inclusive_in_float32():
    x = np.float32([[.3, np.nextafter(np.float32(.3), np.float32(0))]])
    assert T.by_threshold(x, x, .3)[0].tolist() == [[True, False]]


def test_json_has_what_scripts_ask():
    t = drawn(cannot_see=["Speech"], warnings=["W_SHORT: x"], thresholds={"heard": .7, "seen": .8})
    told = json.loads(json.dumps(T.timeline_json(t), allow_nan=False))
    assert len(told["seconds"]) == 23 and told["backend"] == "toy" and told["cannot_see"] == ["Speech"]
    for i, s in enumerate(told["seconds"]):
        for k, on in (("heard", t.on_heard), ("seen", t.on_seen)): assert s[k] == [CLASSES[c] for c in np.flatnonzero(on[i])]
    assert told["warnings"] == ["W_SHORT: x"] and told["thresholds"]["seen"] == .8 and "No paper's model" in told["statement"]


def test_csv_comes_back():
    t = drawn()
    head, *rows = [r.split("\t") for r in T.timeline_csv(t).splitlines()]
    assert head == ["filename", "onset", "offset", "event_labels", "modality", "confidence"]
    for k, on in (("audio", t.on_heard), ("visual", t.on_seen), ("audio_visual", t.on_heard & t.on_seen)):
        text = "\n".join("\t".join(r[:4]) for r in [head, *rows] if r is head or r[4] == k) + "\n"
        assert (rasterise(parse_intervals(text, CLASSES, 23, "x"), ["a_0_23"], 23, 25)[0] == on).all()


def test_npz_comes_back_without_pickle():
    t = drawn(classes=(*CLASSES[:24], "猫"))
    with np.load(io.BytesIO(T.timeline_npz(t)), allow_pickle=False) as z:
        assert (z["heard"] == t.heard).all() and (z["on_seen"] == t.on_seen).all() and z["classes"][24] == "猫"
        assert z["heard"].dtype == np.float32


def test_subtitles_come_back():
    t = drawn(N=10)
    head, *cues = T.timeline_vtt(t).rstrip("\n").split("\n\n")
    assert head == "WEBVTT" and len(cues) == len(T.timeline_events(t))
    for cue, e in zip(cues, T.timeline_events(t)):
        times, text = cue.split("\n")
        a, b = (sum(float(x) * 60**i for i, x in enumerate(reversed(c.split(":")))) for c in times.split(" --> "))
        assert (a, b) == (e["onset_s"], e["offset_s"]) and text.startswith(f"[{e['modality']}] ")


class Page(HTMLParser):
    "The elements and the text of a page"
    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.styles, self.inside = [], [], "", ""
        self.feed(text)
    def handle_starttag(self, tag, attributes): self.tags.append((tag, dict(attributes))); self.inside = tag
    def handle_data(self, data):
        if self.inside == "style": self.styles += data
        else: self.text.append(data)
    def handle_endtag(self, tag): self.inside = ""


def evil_page():
    t = drawn(N=12, C=len(EVIL), classes=EVIL, cannot_see=[EVIL[0]], warnings=[f"W_X: {EVIL[0]}"],
              networks={EVIL[1]: [{EVIL[0]: EVIL[1]}]}, media={"tracks": [EVIL[1]], "title": EVIL[0]}, model={"method": EVIL[0]})
    t.file = EVIL[0] + ".mp4"
    return timeline_page(t, np.zeros((96, 6, 8, 3), np.uint8), np.sin(np.arange(12*160)))


def test_no_name_becomes_markup():
    page = Page(evil_page())
    known = {"html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "p", "ul", "li", "strong", "div",
             "span", "svg", "polygon", "img", "i", "b", "u", "s", "em", "table", "thead", "tbody", "tr", "th", "td",
             "details", "summary", "dl", "dt", "dd"}
    assert {tag for tag, _ in page.tags} <= known
    assert not [a for _, a in page.tags if any(k.startswith("on") for k in a)]
    text = "".join(page.text)
    for name in EVIL[:2]: assert name in text
    assert "see http://example.org" in text and "\x1b" not in text


def test_nothing_comes_from_elsewhere():
    raw = evil_page()
    assert "http" not in raw and "url(" not in raw and "@import" not in raw and "<script" not in raw
    page = Page(raw)
    assert all(a["src"].startswith("data:image/jpeg;base64,") for _, a in page.tags if "src" in a)
    assert not [a for _, a in page.tags if "href" in a or "srcset" in a]
    assert "prefers-color-scheme:dark" in page.styles and ("meta", {"charset": "utf-8"}) in page.tags


def test_page_says_what_it_must():
    t = drawn(cannot_see=["Speech", "Frying_(food)"], warnings=["W_PACKETS: 3 places"], thresholds={"heard": .7},
              versions={"avvp_nb": "0.1.0"}, windows="none", missing=["visual"])
    text = "".join(Page(timeline_page(t)).text)
    for said in ("Frying (food)", "W_PACKETS: 3 places", "0.7", "0.1.0", "toy", "No paper's model", "none in the file",
                 "not calibrated", "the file has no pictures"): assert said in text, said
    assert text.count("toy cannot see") == 1        # at the top; the lanes say that there are no pictures


def test_page_of_nothing_and_page_of_an_hour():
    zero = np.zeros((1, 25), np.float32)
    quiet = timeline_page(T.timeline("a.mp4", zero, None, T.by_threshold(zero, zero), backend="toy"), None, np.zeros(16_000))
    assert "Nothing is heard or seen" in quiet and "25 classes without an event" in quiet
    long = drawn(N=3600, C=4, classes=tuple("abcd"))
    page = timeline_page(long, np.zeros((3600, 30, 40, 3), np.uint8), np.zeros(3600*160))
    assert page.count("<img") <= MOST_PICTURES and len(page) < 4_000_000


def test_page_is_the_same_twice_and_changes_nothing():
    state = np.random.get_state()[1].tolist()
    assert evil_page() == evil_page() and np.random.get_state()[1].tolist() == state


def test_safe_is_read_as_it_was():
    import html
    for name in EVIL[:7]: assert html.unescape(safe(name)) == name
    assert not re.search("[<>\"]|http", "".join(map(safe, EVIL)))
