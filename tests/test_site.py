"""`make site`: pages that are read without a network, from a small project and, marked slow, from this one, in a real browser."""
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from urllib.parse import unquote, urldefrag

import pytest
from tree import ROOT, load

for package in ("nbconvert", "math_core"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[dev]'")
site = load(ROOT / "tools" / "site.py")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
RUN = "toy-0123456789abcdef"
HOSTILE = "</script><script>console.error('ran')</script>"


# --- a small project --------------------------------------------------------------------------------------------------

def md(*lines): return {"cell_type": "markdown", "metadata": {}, "source": "\n".join(lines)}


def code(source, *outputs): return {"cell_type": "code", "metadata": {}, "execution_count": 1, "source": source, "outputs": list(outputs)}


def shown(**data): return {"output_type": "display_data", "metadata": {}, "data": {k.replace("_", "/", 1): v for k, v in data.items()}}


def notebook(path, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{**c, "id": f"cell{i}"} for i, c in enumerate(cells)]
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}), encoding="utf-8")


def table(head, rows):
    cells = "".join("<tr>" + "".join(f'<td style="text-align:right">{c}</td>' for c in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{''.join(f'<th>{h}</th>' for h in head)}</tr></thead><tbody>{cells}</tbody></table>"


CLAIMS = table(("claim", "verdict", "ours"), [(f"C-{i}", ("reproduced", "undecided (1 seed)")[i % 2], f"{(-1)**i*i}.5".replace("-", "−")) for i in range(9)])


@pytest.fixture
def project(tmp_path):
    "Four notebooks that link to each other, a table, a figure, a record and a data card"
    root = tmp_path / "project"
    notebook(root / "nbs" / "index.ipynb", md("# Start", "", "> Where to begin.", "", "The experiment: [toy](toy.ipynb)."))
    notebook(root / "nbs" / "00_core.ipynb", md("# core", "", "> Names.", "", "[index](index.ipynb) · [toy →](methods/00_toy.ipynb) · used in [toy](toy.ipynb)"),
             code("#| default_exp core"), code("#| export\ndef answer(): return 42"), code("#| hide\nimport secret_thing"), md("## A heading, twice"), md("## A heading, twice"))
    notebook(root / "nbs" / "methods" / "00_toy.ipynb", md("# toy", "", "> A method.", "", "See [twice](../00_core.ipynb#A-heading,-twice), [the module](../../avvp_nb/core.py),",
             "[a setting](../../settings.ini), `avvp_nb/core.py` and [the paper](https://example.org/paper)."),
             md(r"Inline $\mu^v_t$, and", "", r"$$\bar x = \frac{1}{T}\sum_{t=1}^T x_t \tag{7}$$", "", "costs nothing: `$$`."))
    notebook(root / "nbs" / "toy.ipynb", {"cell_type": "raw", "metadata": {}, "source": "---\nskip_exec: true\n---"},
             md("# Experiment", "", "> What came out.", "", f"## Found {HOSTILE}"), code("1 < 2", shown(text_html=CLAIMS), shown(text_plain="a < b & c")))
    (root / "README.md").write_text("# avvp_nb\n\nRead [index](nbs/index.ipynb), [cards](data_cards/llp.md) or the [licence](LICENSE).\n", encoding="utf-8")
    (root / "LICENSE").write_text("free\n")
    for folder in ("figures/tables", "figures/records", "data_cards"): (root / folder).mkdir(parents=True)
    (root / "data_cards" / "llp.md").write_text("# LLP\n\nA card.\n")
    (root / "figures" / "tables" / "claims.html").write_text(f"<!doctype html><html><head><title>x</title></head><body>{CLAIMS}</body></html>")
    (root / "figures" / "tables" / "claims.csv").write_text("claim,verdict\n")
    (root / "figures" / "tables" / "claims.json").write_text(json.dumps({"caption": "Claims of Toy", "mark": "simulated", "runs": [RUN]}))
    (root / "figures" / "loss.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>')
    scores = {"segment": {"A": 61.25, "V": 50.0, "Type@AV": 55.0}, "event": {"A": 50.0, "V": 40.0, "Type@AV": 45.0}}
    record = {"spec": {"method": "toy", "scale": "tiny", "seed": 1}, "seed": 1, "rule": "han", "metrics": {"han": scores, "ma": scores}, "wall_time": 6.0,
              "history": [{"loss": .5}, {"loss": .25}], "data": {"mark": "simulated v1"}, "floors": {"nothing": scores}, "commit": "a" * 40}
    (root / "figures" / "records" / f"{RUN}.json").write_text(json.dumps(record))
    return root


@pytest.fixture
def built(project, tmp_path):
    "The small project's site"
    site.build(project, tmp_path / "out")
    return tmp_path / "out"


def page(folder, name): return (folder / name).read_text(encoding="utf-8")


def main(folder, name): return page(folder, name).partition("<main")[2]


def index(folder): return json.loads(page(folder, "search-index.js").removeprefix("window.SITE_INDEX = ").rstrip().rstrip(";"))


# --- links and addresses ----------------------------------------------------------------------------------------------

class Links(HTMLParser):
    "Anchors of a page, where its links lead, and what it loads"
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads, self.twice = set(), [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if name := a.get("id"):
            self.twice += [name] * (name in self.ids)
            self.ids.add(name)
        if tag == "a" and "href" in a: self.links.append(a["href"])
        elif tag == "link": self.loads.append(a["href"])
        if "src" in a and not a["src"].startswith("data:"): self.loads.append(a["src"])
        if "srcdoc" in a: self.loads += re.findall(r"""(?:src|href)=["']?(https?:[^"'\s>]+)""", a["srcdoc"])


def faults(folder):
    "Links that lead nowhere, anchors that are not there or there twice, and whatever is loaded from elsewhere, as lines"
    pages = {p.resolve(): Links(p) for p in folder.rglob("*.html")}
    for path, found in pages.items():
        name = path.relative_to(folder.resolve()).as_posix()
        yield from (f"{name}: two anchors {t}" for t in found.twice)
        for url in found.links + found.loads:
            if re.match(r"[a-z]+:", url):
                if url in found.loads or not url.startswith(("https:", "http:", "mailto:")): yield f"{name}: {url}"
                continue
            to, anchor = urldefrag(url)
            target = (path.parent / unquote(to)).resolve() if to else path
            if not target.is_file(): yield f"{name}: {url} is not there"
            elif anchor and target in pages and unquote(anchor) not in pages[target].ids: yield f"{name}: no anchor {url}"


def test_links_of_the_small_site(built):
    assert list(faults(built)) == []
    text = main(built, "nbs/methods/00_toy.html")
    assert '<a href="../00_core.html#a-heading-twice">twice</a>' in text and '<a href="../00_core.html">the module</a>' in text
    assert '<a href="../00_core.html"><code>avvp_nb/core.py</code></a>' in text and '<span title="../../settings.ini">a setting</span>' in text
    assert '<a href="https://example.org/paper">' in text
    assert '<a href="nbs/index.html">' in main(built, "index.html") and '<a href="LICENSE.txt">' in main(built, "index.html")


def test_faults_would_be_found(built):
    path = built / "nbs" / "toy.html"
    path.write_text(path.read_text() + '<a id="content"></a><a href="gone.html">x</a><a href="00_core.html#gone">y</a><img src="https://example.org/x.png"><a href="javascript:x">')
    assert [f.partition(": ")[2] for f in faults(built)] == ["two anchors content", "gone.html is not there", "no anchor 00_core.html#gone", "javascript:x",
                                                            "https://example.org/x.png"]


def test_reading_order(built):
    order, name = [], "index.html"
    while name:
        order.append(name)
        found = re.search(r'rel="next" href="([^"]+)"', page(built, name))
        name = ((built / name).parent / found[1]).resolve().relative_to(built.resolve()).as_posix() if found else None
    assert order == ["index.html", "nbs/index.html", "nbs/00_core.html", "nbs/methods/00_toy.html", "nbs/toy.html"]
    side = page(built, "nbs/methods/00_toy.html").partition("<main")[0]
    assert re.search(r"<details open><summary>methods</summary>\s*<ul>\s*<li><a href=\"../../nbs/methods/00_toy.html\" aria-current=\"page\">toy</a>", side)
    assert "<summary>ground</summary>" in side and "<summary>experiments</summary>" in side


# --- what pages show --------------------------------------------------------------------------------------------------

def test_formulas_are_mathml(built):
    text = main(built, "nbs/methods/00_toy.html")
    assert len(re.findall("<math", text)) == 2 and '<span class="number">(7)</span>' in text and "<munderover>" in text
    assert "$$" not in re.sub(r"<code>.*?</code>", "", text) and "<code>$$</code>" in text and "\\tag" not in text


def test_front_matter_hidden_cells_and_directives_are_not_shown(built):
    assert "skip_exec" not in page(built, "nbs/toy.html")
    text = main(built, "nbs/00_core.html")
    assert "secret_thing" not in text and "#|" not in text and "default_exp" not in text
    assert 'data-module="avvp_nb/core.py"' in text and '<a id="x-answer"></a>' in text
    assert '>Used in <a href="toy.html">toy</a>.<' in text and "toy →</a> ·" not in text and 'id="a-heading-twice-2"' in text


def test_text_stays_text(built):
    text = page(built, "nbs/toy.html")
    assert "a &lt; b &amp; c" in text and '<span class="o">&lt;</span>' in text
    script = page(built, "search-index.js")
    assert "</script" not in script and "<" not in script
    cell = site.cell(HOSTILE) + site.matrix([((HOSTILE,), {HOSTILE: HOSTILE})], (HOSTILE,))
    assert "<script" not in cell and cell.count("&lt;script&gt;") == 5
    assert "&lt;script&gt;" in text and text.count("<script") == 1                     # the page's own
    assert site.kept("H<sub>2</sub>O <!-- x -->") == "H<sub>2</sub>O <!-- x -->"
    for bad in ("<name>", "<img src=x>", "<b onclick='x'>", "<br><script>"): assert site.kept(bad).startswith("&lt;")


def test_search_index(built):
    rows = index(built)
    assert all(len(r) == 4 and all(isinstance(x, str) for x in r) for r in rows)
    assert ["nbs/00_core.html#x-answer", "core", "answer()", ""] in rows
    toy = next(r for r in rows if r[0] == "nbs/methods/00_toy.html#toy")
    assert "Inline μtv, and" in toy[3] and toy[2] == "" and "A method." in toy[3]
    assert any(r[0] == f"figures/records/{RUN}.html" and "scale tiny" in r[3] for r in rows)
    for url in (r[0] for r in rows):
        name, anchor = urldefrag(url)
        assert not anchor or anchor in Links(built / name).ids, url


def test_which_tables_are_sorted_and_filtered(built):
    assert "<table data-sort data-filter>" in main(built, "nbs/toy.html") and "<table data-sort data-filter>" in main(built, "figures/tables/claims.html")
    few, words = CLAIMS.replace("verdict", "answer"), CLAIMS.replace(' style="text-align:right"', "")
    assert "<table data-sort>" in site.boxed(few) and "data-" not in site.boxed(words)
    assert "data-" not in site.boxed(CLAIMS.replace("<td", '<td rowspan="2"', 1))


def test_results_and_records(built):
    text = main(built, f"figures/records/{RUN}.html")
    assert text.index("segment") < text.index("event") and '<td class="number">61.2</td>' in text and "simulated v1" in text and "a" * 40 in text
    assert '<a href="../tables/claims.html">claims</a>' in text and f'<a href="{RUN}.json">' in text
    text = main(built, "figures/tables/claims.html")
    assert f'<a class="run" href="../records/{RUN}.html">{RUN}</a>' in text and "Claims of Toy" in text and '<a href="claims.csv">csv</a>' in text and "<!doctype" not in text
    assert '<img src="loss.svg"' in main(built, "figures/loss.html") and (built / "figures" / "loss.svg").is_file()
    assert f'<a class="run" href="{RUN}.html">' in main(built, "figures/records/index.html") and ">A card.<" in main(built, "data_cards/llp.html")


# --- the build --------------------------------------------------------------------------------------------------------

def contents(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_same_tree_gives_the_same_bytes(project, built, tmp_path):
    site.build(project, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(built)
    assert str(tmp_path).encode() not in b"".join(contents(built).values())


@pytest.mark.parametrize("name, cells, said", [
    ("nbs/methods/00_toy.ipynb", [md("# toy", "", "> x", "", r"$\frac{1}{2$")], r"the formula \$\\frac\{1\}\{2\$ can't be shown"),
    ("nbs/toy.ipynb", [md("# toy", "", "> x", "", r"$$\nosuchthing x$$")], "nosuchthing"),
    ("nbs/toy.ipynb", None, "not a readable notebook")])
def test_a_failing_notebook_is_named_and_the_last_site_stays(project, built, name, cells, said):
    before = contents(built)
    if cells: notebook(project / name, *cells)
    else: (project / name).write_text('{"cells": [')
    with pytest.raises(site.SiteError, match=f"^{re.escape(name)}: .*{said}"): site.build(project, built)
    assert contents(built) == before and not built.with_name("out.part").exists()


def test_a_broken_record_is_named(project, built):
    (project / "figures" / "records" / f"{RUN}.json").write_text("{")
    with pytest.raises(site.SiteError, match=f"^figures/records/{RUN}.json: not JSON"): site.build(project, built)


def test_a_folder_with_other_things_is_not_replaced(project, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(site.SiteError, match="mine: is there"): site.build(project, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


# --- in a browser -----------------------------------------------------------------------------------------------------

PROBE = """<!doctype html><meta charset="utf-8"><iframe id="f" style="width:%(width)dpx;height:900px;border:0"></iframe><pre id="out"></pre><script>
const frame = document.getElementById("f"), wait = ms => new Promise(r => setTimeout(r, ms));
const load = url => new Promise(r => { frame.onload = () => setTimeout(r, 30); frame.src = url; });
const visit = async url => { await load(url); return [frame.contentDocument, frame.contentWindow]; };
(async () => {
  const found = {};
  try { %(script)s } catch (e) { found.failed = String(e && e.stack || e); }
  document.getElementById("out").textContent = "FOUND" + JSON.stringify(found) + "END";
  document.title = "done";
})();
</script>"""

MEASURE = r"""for (const url of PAGES) {
    const [d, w] = await visit(BASE + url), bare = d.querySelector("main").cloneNode(true);
    bare.querySelectorAll("code, pre, .input, .output, script").forEach(e => e.remove());
    found[url] = {wide: d.documentElement.scrollWidth - w.innerWidth, math: d.querySelectorAll("main math").length,
                  flat: [...d.querySelectorAll("main math")].filter(m => !(m.getBoundingClientRect().height > 2) && !m.closest("details")).length,
                  raw: /\$\$|\\\(|\\frac|\\mathbf/.test(bare.textContent), menu: getComputedStyle(d.querySelector(".side")).display,
                  search: !d.querySelector(".search").hidden, size: parseFloat(getComputedStyle(d.body).fontSize)};
}"""

USE = r"""let [d] = await visit(BASE + "nbs/toy.html");
    const rows = () => [...d.querySelectorAll("tbody tr")].filter(r => !r.hidden).map(r => r.cells[0].textContent);
    const column = d.querySelectorAll("th button")[2];
    column.click(); found.up = rows(); column.click(); found.down = rows(); column.click(); found.back = rows();
    const [text] = d.querySelectorAll(".filter input"), choice = d.querySelector(".filter select");
    choice.value = "undecided"; choice.dispatchEvent(new Event("change")); found.undecided = rows();
    text.value = "c-3"; text.dispatchEvent(new Event("input")); found.c3 = rows();
    const box = d.querySelector(".search input");
    box.focus(); box.dispatchEvent(new Event("focus")); box.value = "answer"; box.dispatchEvent(new Event("input"));
    for (let i = 0; i < 50 && d.querySelector(".search ol").hidden; i++) await wait(20);
    found.hits = [...d.querySelectorAll(".search li a")].map(a => a.getAttribute("href"));
    box.value = "no such word"; box.dispatchEvent(new Event("input")); await wait(50); found.none = d.querySelector(".search ol").textContent;"""


@pytest.fixture(scope="module")
def browser():
    "What a script finds out in a headless Chromium that has no network, and what the console said"
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None: pytest.skip(f"no browser found: none of {', '.join(BROWSERS)} is installed")

    def ask(folder, tmp_path, script, width=390, timeout=600, **names):
        declared = "".join(f"const {k} = {json.dumps(v)};" for k, v in {"BASE": folder.resolve().as_uri() + "/", **names}.items())
        probe = tmp_path / f"probe{width}.html"
        probe.write_text(PROBE % {"width": width, "script": declared + script}, encoding="utf-8")
        done = subprocess.run([program, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--allow-file-access-from-files",
                               "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000",
                               f"--virtual-time-budget={timeout*1000}", "--dump-dom", probe.as_uri()], capture_output=True, text=True, timeout=timeout)
        found = re.search(r'<pre id="out">FOUND(.*)END</pre>', done.stdout, re.S)
        if not done.stdout.strip(): pytest.skip(f"the browser says nothing: {done.stderr[-300:]}")
        assert found, done.stdout[-2000:] + done.stderr[-2000:]
        return json.loads(unescape(found[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return ask


def test_search_sorting_and_filter_in_a_browser(browser, built, tmp_path):
    found, said = browser(built, tmp_path, USE, width=1000)
    assert "failed" not in found, found["failed"]
    assert found["up"] == [f"C-{i}" for i in (7, 5, 3, 1, 0, 2, 4, 6, 8)] and found["down"] == found["up"][::-1] and found["back"] == [f"C-{i}" for i in range(9)]
    assert found["undecided"] == ["C-1", "C-3", "C-5", "C-7"] and found["c3"] == ["C-3"]
    assert found["hits"][0] == "../nbs/00_core.html#x-answer" and found["none"] == "Nothing found"
    assert said == []


def test_small_site_on_a_telephone(browser, built, tmp_path):
    pages = sorted(p.relative_to(built).as_posix() for p in built.rglob("*.html"))
    found, said = browser(built, tmp_path, MEASURE, PAGES=pages)
    assert said == [] and {k: v for k, v in found.items() if v["wide"] > 0 or v["raw"] or v["flat"] or v["menu"] != "none" or not v["search"]} == {}
    assert found["nbs/methods/00_toy.html"]["math"] == 2
    (built / "wide.html").write_text('<!doctype html><body><form class="search"></form><nav class="side"></nav><main><p style="width:2000px">$$x$$</p></main><script>gone()</script>')
    found, said = browser(built, tmp_path, MEASURE, PAGES=["wide.html"])
    assert found["wide.html"]["wide"] > 1000 and found["wide.html"]["raw"] and said    # the test would have seen it


@pytest.mark.slow
def test_the_whole_site(browser, tmp_path):
    out = tmp_path / "site"
    notebooks = [p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(x.startswith((".", "_")) for x in p.relative_to(ROOT / "nbs").parts)]
    records = {p.stem for p in (ROOT / "figures" / "records").glob("*.json")}
    pages = site.build(ROOT, out)
    assert {f"nbs/{p.relative_to(ROOT / 'nbs').with_suffix('.html').as_posix()}" for p in notebooks} <= {p.path for p in pages}
    assert {f"figures/records/{r}.html" for r in records} <= {p.path for p in pages}
    assert list(faults(out)) == []
    sizes = {p: p.stat().st_size for p in out.rglob("*") if p.is_file()}
    of_records = {p: n for p, n in sizes.items() if p.parent == out / "figures" / "records"}    # these grow with every run
    assert sum(sizes.values()) - sum(of_records.values()) < 50e6 and sum(of_records.values()) < 100e3 * len(records)
    names = sorted(p.relative_to(out).as_posix() for p in out.rglob("*.html"))
    found, said = browser(out, tmp_path, MEASURE, PAGES=names)
    assert "failed" not in found, found["failed"]
    assert said == []
    assert {k: v for k, v in found.items() if v["wide"] > 0 or v["raw"] or v["flat"] or v["menu"] != "none"} == {}
    assert sum(v["math"] for v in found.values()) > 500 and found["nbs/methods/03_han.html"]["math"] > 20
    claims, zoo = (page(out, f"nbs/{n}.html") for n in ("results/18_claims_page", "zoo"))
    assert "data-filter" in claims and "data-sort" in zoo


@pytest.mark.parametrize("style, short", [("text-align:right;padding:1px 5px;white-space:nowrap", "r5n"), ("text-align:left;padding:1px 4px;white-space:nowrap", "l4n"),
                                          ("text-align:left;padding:1px 5px;white-space:normal;min-width:10em", "l5w")])
def test_cells_of_our_tables_are_written_short_and_the_style_sheet_knows_them(style, short):
    assert site.compact(f'<td title="a" style="{style}">1</td><th style="{style}">x</th>') == f'<td title="a" data-c="{short}">1</td><th data-c="{short}">x</th>'
    other = f'<td style="{style};color:red">1</td><p style="{style}">&lt;td style="{style}"</p>'
    assert site.compact(other) == other
    rules = dict(re.findall(r"^(\[data-c[^{]*) \{ (.*) \}", site.style(), re.M))
    assert set(rules) == {"[data-c]", "[data-c^=r]", '[data-c*="4"]', "[data-c$=w]"}
    got = {}
    for selector, text in rules.items():
        if {"[data-c]": True, "[data-c^=r]": short[0] == "r", '[data-c*="4"]': "4" in short, "[data-c$=w]": short[-1] == "w"}[selector]:
            got |= dict(x.strip().replace(" !important", "").split(": ") for x in text.split(";") if x.strip())
    assert got == dict(x.split(":") for x in style.split(";"))


def test_most_cells_of_a_rendered_table_are_short():
    text = (ROOT / "figures" / "tables" / "han_1_small_simulated.html").read_text(encoding="utf-8")
    assert len(site.CELL.findall(text)) > 50 and len(site.compact(text)) < .8 * len(text)
