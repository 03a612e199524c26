"""The page in a real browser: it is drawn, without a complaint, without the network, on a screen and on a telephone."""
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from avvp_nb.results.timeline import by_threshold, timeline
from avvp_nb.results.timeline_page import timeline_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BLUE, ORANGE, PURPLE = (42, 111, 187), (217, 130, 43), (107, 76, 154)      # of the three lanes, on a light page


@pytest.fixture(scope="module")
def browser():
    "What a headless Chromium says of a page, and its picture"
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None: pytest.skip(f"no browser found: none of {', '.join(BROWSERS)} is installed")

    def look(page, folder, width, height, *more):
        path, picture = folder / "page.html", folder / f"{width}.png"
        path.write_text(page, encoding="utf-8")
        done = subprocess.run([program, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
                               "--v=0", "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}",
                               f"--window-size={width},{height}", f"--screenshot={picture}", *more, path.as_uri()],
                              capture_output=True, text=True, timeout=120)
        said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        if not picture.exists(): pytest.skip(f"the browser drew nothing: {done.stderr[-300:]}")
        return np.asarray(Image.open(picture).convert("RGB")).astype(int), said
    return look


def page(N=10, name="Dog", mute=False):
    "A page of strong colours: a red video, one class heard, seen, and both"
    heard, seen = np.zeros((2, N, 3), np.float32)
    heard[:6, 0], seen[4:, 0] = 1., 1.
    on = by_threshold(heard, seen)
    pictures = np.zeros((8*N, 60, 80, 3), np.uint8)
    pictures[..., 0] = 255
    t = timeline("a.mp4", None if mute else heard, seen, on, (name, "Cat", "Car"), "toy", cannot_see=["Cat"],
                 missing=["audio"]*mute, warnings=["W_X: a warning"], thresholds={"heard": .3, "seen": .3})
    return timeline_page(t, pictures, None if mute else np.sin(np.arange(N*16_000)/9))


def share(picture, colour, within=12): return (abs(picture - colour).max(-1) <= within).mean()


@pytest.mark.parametrize("width, height", ((1000, 900), (390, 900)))
def test_page_is_drawn(browser, tmp_path, width, height):
    seen, said = browser(page(), tmp_path, width, height)
    assert said == [] and seen.shape == (height, width, 3)
    assert share(seen, (255, 0, 0), 20) > .005                           # the strip of pictures
    for colour in (BLUE, ORANGE, PURPLE): assert share(seen, colour) > .001, colour
    assert (seen[:, -3:] == seen[0, -1]).all()                           # nothing is pushed over the edge


def test_lanes_are_where_the_events_are(browser, tmp_path):
    seen, _ = browser(page(), tmp_path, 1000, 900)
    def columns(picture, colour):
        found = np.flatnonzero((abs(picture - colour).max(-1) <= 20).sum(0) > 4)
        return found.min(), found.max() + 1
    left, right = columns(seen, (255, 0, 0))
    bottom = np.flatnonzero((abs(seen - (255, 0, 0)).max(-1) <= 20).any(1)).max()
    lanes, second = seen[bottom + 80:bottom + 220], (right - left)/10           # below waveform and seconds
    for colour, start, end in ((BLUE, 0, 6), (ORANGE, 4, 10), (PURPLE, 4, 6)):
        np.testing.assert_allclose(columns(lanes, colour), (left + start*second, left + end*second), atol=4)


def test_dark_page_and_page_without_sound(browser, tmp_path):
    light, said = browser(page(mute=True), tmp_path, 800, 700)
    dark, more = browser(page(mute=True), tmp_path, 801, 700, "--blink-settings=preferredColorScheme=0")
    assert said + more == [] and light[5, 5].min() > 200 and dark[5, 5].max() < 80
    full, _ = browser(page(), tmp_path, 802, 700)
    assert share(light, BLUE) < share(full, BLUE)/3                                     # only the legend's is left


def test_hostile_names_run_nothing(browser, tmp_path):
    name = "</style></script><script>console.error('ran'); document.body.style.background = 'rgb(255, 0, 255)'</script>"
    seen, said = browser(page(name=name), tmp_path, 800, 900)
    assert said == [] and share(seen, (255, 0, 255), 5) == 0
    heard, said = browser("<script>console.error('ran')</script>", tmp_path, 400, 300)
    assert len(said) == 1                                                # the test would have heard it


def test_long_page_stays_in_its_box(browser, tmp_path):
    seen, said = browser(page(N=300), tmp_path, 700, 800)
    assert said == [] and (seen[:, -3:] == seen[0, -1]).all()
