"""Write the project as a site of static pages that is read without a network: `python tools/site.py` (or `make site`).

    python tools/site.py             write _site/; open _site/index.html in a browser
    python tools/site.py --out DIR   write it elsewhere

One page for each notebook (as it is committed: nothing is executed), the README as front page, the committed tables,
figures and run records, and the data cards. Formulas become MathML here, so no script draws them. The same tree
gives the same bytes. What can't be shown stops the build with one line that names its file.
"""
import argparse
import html
import importlib.util
import json
import posixpath
import re
import shutil
import sys
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from urllib.parse import quote, unquote

import jinja2
import matplotlib
import nbformat
from nbconvert import HTMLExporter, TemplateExporter
from nbconvert.filters import DataTypeFilter, Highlight2HTML
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter

ROOT = Path(__file__).resolve().parents[1]
PARTS = Path(__file__).resolve().parent / "site"    # template, style and script
NAME = "avvp_nb"
FONTS = ("STIXGeneral.ttf", "DejaVuSans.ttf", "LICENSE_STIX", "LICENSE_DEJAVU")    # matplotlib's: letters, and brackets that grow
RESULTS = "committed results"
METRICS = ("A", "V", "AV", "Type@AV", "Event@AV", "Ao", "Vo", "Type@AVo", "Event@AVo")    # the order of columns


class SiteError(Exception):
    "One line: which file can't be shown, and why"


def loaded(name):
    "A neighbour of this file as a module (this folder stays out of `sys.path`: `site` is also a module of Python's)"
    spec = importlib.util.spec_from_file_location(f"tools_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nav = loaded("nav")


@dataclass
class Page:
    "A page: where it lies in the site, what it was made from, its body, and what the search knows of it"
    path: str
    title: str
    body: str = ""
    source: str = ""
    group: str = ""
    entries: list = field(default_factory=list)    # [anchor, heading, text]
    before: object = None    # neighbours in reading order
    after: object = None


# --- which pages there are --------------------------------------------------------------------------------------------

def notebooks(root=ROOT):
    "(group, path) of every notebook in reading order: index, the floors from the ground up, experiments as index lists them"
    nbs = root / "nbs"
    there = [p for p in sorted(nbs.rglob("*.ipynb")) if not any(x.startswith((".", "_")) for x in p.relative_to(nbs).parts)]
    order = nav.numbered(root)
    new = [p for p in there if p.name[0].isdigit() and p not in order]    # of a floor that tools/nav.py doesn't list yet
    ground = [p for p in order if p.parent == nbs and p.name < "9"]
    order = ground + new + order[len(ground):]
    rest, index = [p for p in there if p not in order], nbs / "index.ipynb"
    text = index.read_text(encoding="utf-8") if index.is_file() else ""
    rest.sort(key=lambda p: (p != index, text.rfind(f"]({p.relative_to(nbs).as_posix()}") % (len(text) + 1), p.name))
    floor = {p: p.parent.name if p.parent != nbs else "ground" if p.name < "9" else "command line" for p in order}
    return [("", p) for p in rest[:1]] + [(floor[p], p) for p in order] + [("experiments", p) for p in rest[1:]]


def site_path(name):
    "Path in the site of the page for a file of the repository, both with forward slashes"
    if name == "README.md": return "index.html"
    if posixpath.basename(name) == "README.md": return posixpath.join(posixpath.dirname(name), "index.html")
    return posixpath.splitext(name)[0] + ".html"


def module(nb):
    "Path of the module that a notebook writes, or None"
    found = next((m for c in nb.cells if (m := re.search(r"^#\s*\|\s*default_exp\s+([\w.]+)", c.source, re.M))), None)
    return f"avvp_nb/{found[1].replace('.', '/')}.py" if found else None


def read_notebook(path, root=ROOT):
    "A notebook, or a `SiteError` that names it"
    try: return nbformat.read(path, as_version=4)
    except Exception as e: raise SiteError(f"{path.relative_to(root).as_posix()}: not a readable notebook: {first_line(e)}") from e


def first_line(e): return next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)


def committed(root, folder, *suffixes):
    "Files of a folder of figures/, in order"
    return sorted(p for p in (root / folder).glob("*") if p.suffix in suffixes and p.is_file() and p.name != "README.md")


class Site:
    "What the pages need to know of each other"
    def __init__(self, root=ROOT):
        self.root, self.nbs = Path(root), []
        if not (self.root / "nbs").is_dir(): raise SiteError(f"{self.root.name}: has no folder nbs/; start me in the repository")
        self.targets = {"README.md": "index.html", "figures": "figures/index.html", "data_cards": "data_cards/index.html",
                        "nbs": "nbs/index.html", "figures/records": "figures/records/index.html"}    # file -> page or copy
        for group, path in notebooks(self.root):
            nb, name = read_notebook(path, self.root), path.relative_to(self.root).as_posix()
            self.nbs.append((group, name, nb))
            self.targets[name] = site_path(name)
            if wrote := module(nb): self.targets[wrote] = site_path(name)
        for path in sorted((self.root / "figures").rglob("*.*")):
            name = path.relative_to(self.root).as_posix()
            shown = path.suffix == ".html" or path.name == "README.md" or path.parent.name in ("tables", "bench") and path.suffix == ".md"
            self.targets[name] = site_path(name) if shown or path.parent.name == "records" and path.suffix == ".json" else name
        for path in committed(self.root, "data_cards", ".md"): self.targets[f"data_cards/{path.name}"] = f"data_cards/{path.stem}.html"
        if (self.root / "LICENSE").is_file(): self.targets["LICENSE"] = "LICENSE.txt"
        self.records = {p.stem for p in committed(self.root, "figures/records", ".json")}

    def link(self, url, source):
        "What a link in the file `source` becomes on its page; None if it leads to nothing that the site has"
        if re.match(r"[a-z][a-z0-9+.-]*:|//", url, re.I): return url
        path, _, anchor = url.partition("#")
        anchor = f"#{slug(unquote(anchor))}" if anchor and not anchor.startswith("x-") else f"#{anchor}" if anchor else ""
        if not path: return anchor or None
        name = posixpath.normpath(posixpath.join(posixpath.dirname(source), unquote(path)))
        return self.relative(self.targets[name], source) + anchor if name in self.targets else None

    def relative(self, target, source):
        "From the page of a source file to a path of the site"
        here = self.targets.get(source, source)
        return quote(posixpath.relpath(target, posixpath.dirname(here) or "."))


# --- prose ------------------------------------------------------------------------------------------------------------

def slug(text):
    "A heading as an anchor: small letters, figures, hyphens"
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", text.strip().lower()))


APART = re.compile(r"(</?(?:p|li|td|th|tr|div|h\d|br|ul|ol|figure)\b)")    # tags between words


def plain(text):
    "HTML as text, without cells of code and their outputs"
    text = re.sub(r'<figure class="cell.*?</figure>|<a class="anchor".*?</a>|<style\b.*?</style>', " ", text, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", APART.sub(r" \1", text))).split())


@cache
def converter():
    "LaTeX to MathML"
    try:
        from math_core import LatexToMathML
    except ModuleNotFoundError as e: raise SiteError("math_core is missing, which draws the formulas: pip install math-core") from e
    return LatexToMathML(fancy_error=False)


def formula(tex, display, source):
    "A formula as MathML; a tag stands at the right end of its line, brackets that grow are marked"
    tag = re.search(r"\\tag\*?\{([^{}]*)\}", tex)
    bare = tex.replace(tag[0], "") if tag else tex
    try: out = converter().convert_with_local_state(bare.strip(), displaystyle=display)
    except SiteError: raise
    except Exception as e: raise SiteError(f"{source}: the formula ${tex.strip()}$ can't be shown: {first_line(e)}") from e
    out = re.sub(r'<mo(?![^>]*stretchy="false")([^>]*)>([()\[\]{}|⌊⌋⌈⌉‖⟨⟩])</mo>', r'<mo class="fence"\1>\2</mo>', out)
    if not display: return out if len(bare) < 60 else f'<span class="long">{out}</span>'
    return f'<span class="formula">{out}{f"""<span class="number">({html.escape(tag[1])})</span>""" if tag else ""}</span>'


def boxed(table):
    "A table in a box that scrolls; one with figures can be sorted, a long one and one of verdicts filtered"
    body = table.partition("<tbody")[2]
    rows, head = body.count("<tr"), table.partition("<tbody")[0]
    figures = re.search(r'text-align: ?right|class="(?:number|dataframe)', table)
    marks = " data-sort" if rows >= 4 and figures and "<thead" in head and "rowspan" not in body else ""
    if marks and rows >= (8 if re.search(r">\s*verdict\s*<", head) else 20): marks += " data-filter"
    return f'<div class="box" tabindex="0">{table.replace("<table", "<table" + marks, 1)}</div>'


TAGS = "b|br|caption|code|dd|details|div|dl|dt|em|hr|i|kbd|li|ol|p|pre|small|span|strong|sub|summary|sup|table|tbody|td|th|thead|tr|ul"


def kept(text):
    "HTML in prose as it is if it only marks up text, else as text: no script, and `<name>` stays a word"
    bare = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    fine = not re.search(rf"<(?!/?(?:{TAGS})\b)", bare, re.I) and not re.search(r"<[^>]*\s(?:on\w+|href|src)\s*=", bare, re.I)
    return text if fine else html.escape(text, quote=False)


class Prose(IPythonRenderer):
    "Markdown of one file to HTML: links lead to pages, headings have anchors, formulas are MathML"
    def __init__(self, site, source):
        super().__init__(escape=False, exclude_anchor_links=True)
        self.site, self.source, self.taken = site, source, set()

    def render(self, text): return MarkdownWithMath(renderer=self).render(text)

    def heading(self, text, level, **attrs):
        name = base = slug(plain(text)) or "section"
        while name in self.taken: name = f"{base}-{len([t for t in self.taken if t.rstrip('0123456789').rstrip('-') == base]) + 1}"
        self.taken.add(name)
        return f'<h{level} id="{name}">{text}<a class="anchor" href="#{name}" aria-label="Link to this section">#</a></h{level}>\n'

    def block_math(self, body): return formula(body, True, self.source)
    def inline_math(self, body): return formula(body, False, self.source)
    def latex_environment(self, name, body): return formula(rf"\begin{{{name}}}{body}\end{{{name}}}", True, self.source)

    def link(self, text, url, title=None):
        to = self.site.link(url, self.source)
        return f'<a href="{html.escape(to)}">{text}</a>' if to else f'<span title="{html.escape(url)}">{text}</span>'

    def codespan(self, text):
        to, code = self.site.targets.get(text.strip().rstrip("/")) if "/" in text else None, f"<code>{html.escape(text, quote=False)}</code>"
        return f'<a href="{html.escape(self.site.relative(to, self.source))}">{code}</a>' if to else code

    def image(self, text, url, title=None):
        to = self.site.link(url, self.source) or ""
        if to.startswith(("http", "//")) or not to: return f"<span>[{html.escape(plain(text) or 'picture')}]</span>"
        return f'<img src="{html.escape(to)}" alt="{html.escape(plain(text))}">'

    def inline_html(self, text): return kept(text)
    def block_html(self, text): return f"{kept(text.strip())}\n"

    def table(self, text): return boxed(f"<table>\n{text}</table>") + "\n"


def output_html(site, source):
    "HTML that a cell printed: its tables in boxes, its links leading to pages; a page within it stays as it is"
    def link(m):
        to = site.link(html.unescape(m[1]), source)
        return f'href="{html.escape(to)}"' if to else ""
    def change(text):
        if "<iframe" in text: return text
        text = re.sub(r"<style scoped>.*?</style>", "", text, flags=re.S).replace(' border="1"', "")
        return re.sub(r"<table.*?</table>", lambda m: boxed(m[0]), re.sub(r'\bhref="([^"]*)"', link, text), flags=re.S)
    return change


# --- notebooks --------------------------------------------------------------------------------------------------------

DIRECTIVE = re.compile(r"^#\s*\|.*\n?", re.M)


def prepared(nb):
    "A copy without front matter, hidden cells and directives; exported cells carry their module and the names they define"
    out, wrote, seen = nbformat.from_dict({**nb, "cells": []}), module(nb), set()
    for cell in nb.cells:
        cell, said = nbformat.from_dict(cell), " ".join(DIRECTIVE.findall(cell.source)) if cell.cell_type == "code" else ""
        if cell.cell_type == "raw" or re.search(r"\|\s*hide\b", said): continue
        if cell.cell_type == "code":
            cell.source = DIRECTIVE.sub("", cell.source).strip("\n")
            if not cell.source and not cell.outputs: continue
            if re.search(r"\|\s*export", said):
                names = [n for n in re.findall(r"^(?:async )?(?:def|class) (\w+)", cell.source, re.M) if n not in seen]
                seen.update(names)
                cell.metadata = {**cell.metadata, "site_module": wrote or "", "site_names": names}
        elif not any(c.cell_type == "markdown" for c in out.cells): cell.source = nav.MARK.sub(used, cell.source)
        out.cells.append(cell)
    return out


def used(m):
    "What stays of the navigation line: the experiment that uses the notebook (the page has its own arrows)"
    found = re.search(r"used in (\[[^\]]*\]\([^)]*\))", m[0])
    return f"Used in {found[1]}." if found else ""


class Exporter(HTMLExporter):
    "nbconvert's, with the template beside this file; it doesn't parse each page once more for attributes that ours has"
    def from_notebook_node(self, nb, resources=None, **kw):
        self.register_filter("highlight_code", Highlight2HTML(pygments_lexer="ipython3", parent=self))
        self.register_filter("filter_data_type", DataTypeFilter(parent=self))
        return TemplateExporter.from_notebook_node(self, nb, self._init_resources(resources), **kw)


@cache
def exporter(): return Exporter(template_name="notebook", extra_template_basedirs=[str(PARTS)])


def sections(body):
    "(anchor, heading, HTML) of a page's parts; what stands above the first heading has neither"
    parts = re.split(r'<h[1-4] id="([^"]+)">(.*?)</h[1-4]>', body, flags=re.S)
    return [("", "", parts[0])] + [(parts[i], plain(parts[i + 1]), parts[i + 2]) for i in range(1, len(parts), 3)]


def contents(body):
    "A folded list of the sections, for pages with four or more"
    found = re.findall(r'<h([23]) id="([^"]+)">(.*?)</h\1>', body, flags=re.S)
    if len(found) < 4: return ""
    rows = "".join(f'<li class="h{level}"><a href="#{name}">{html.escape(plain(text))}</a></li>' for level, name, text in found)
    return f'<details class="contents"><summary>On this page</summary><ul>{rows}</ul></details>'


def with_contents(body):
    "The list under the title and its summary"
    return re.sub(r"(</h1>\s*(?:<blockquote>.*?</blockquote>)?)", lambda m: m[0] + contents(body), body, count=1, flags=re.S)


def searched(body, heads=False):
    "What the search knows of a page: its sections, and the names its exported cells define; with `heads`, no text"
    out = [[anchor, head, "" if heads else plain(text)] for anchor, head, text in sections(body)]
    return [e for e in out if e[1] or e[2]] + [[f"x-{name}", f"{name}()", ""] for name in re.findall(r'<a id="x-(\w+)"', body)]


def notebook_page(site, group, name, nb):
    "The page of one notebook"
    prose, out = Prose(site, name), exporter()
    out.register_filter("markdown2html", prose.render)
    out.register_filter("output_html", output_html(site, name))
    try: body, _ = out.from_notebook_node(prepared(nb))
    except SiteError: raise
    except Exception as e: raise SiteError(f"{name}: can't be shown: {first_line(e)}") from e
    title = next((plain(h) for h in re.findall(r"<h1[^>]*>(.*?)</h1>", body, re.S)), Path(name).stem)
    return Page(site.targets[name], title, with_contents(body.strip()), name, group, searched(body))


# --- markdown files, tables, figures, records -------------------------------------------------------------------------

def markdown_page(site, name, group="", heads=False):
    "The page of a Markdown file"
    body = Prose(site, name).render((site.root / name).read_text(encoding="utf-8"))
    title = next((plain(h) for h in re.findall(r"<h1[^>]*>(.*?)</h1>", body, re.S)), Path(name).stem)
    return Page(site.targets[name], title, with_contents(body), name, group, searched(body, heads))


def read_json(path, root):
    "A JSON file's object, or a `SiteError` that names it"
    try: return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e: raise SiteError(f"{path.relative_to(root).as_posix()}: not JSON: {first_line(e)}") from e


def cell(value, kind="td"):
    "A value as a cell of a table"
    if isinstance(value, bool) or value is None: return f"<{kind}>{ {True: 'yes', False: 'no', None: '–'}[value]}</{kind}>"
    if isinstance(value, (int, float)):
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        return f'<{kind} class="number">{text.replace("-", "−")}</{kind}>'
    return f"<{kind}>{html.escape(str(value))}</{kind}>"


def facts(value, prefix=""):
    "(name, value) of everything in nested dictionaries; short lists in a line, long ones as their length"
    if isinstance(value, dict) and value:
        for k, v in value.items(): yield from facts(v, f"{prefix}.{k}" if prefix else str(k))
    elif isinstance(value, list):
        short = all(not isinstance(v, (dict, list)) for v in value) and len(value) <= 12
        yield prefix, (", ".join(map(str, value)) or "none") if short else f"{len(value)} values"
    else: yield prefix, value if value not in ({}, "") else "none"


def fact_table(site, value, source):
    "Nested dictionaries as a table of two columns, a long one folded; the names of runs are links to their records"
    rows = [f"<tr><th>{html.escape(k)}</th>{linked_runs(site, cell(v), source)}</tr>" for k, v in facts(value)]
    table = f'<div class="box" tabindex="0"><table class="facts"><tbody>{"".join(rows)}</tbody></table></div>'
    return table if len(rows) <= 25 else f"<details><summary>{len(rows)} entries</summary>{table}</details>"


def linked_runs(site, text, source):
    "Names of committed runs as links"
    def link(m): return f'<a class="run" href="{site.relative(f"figures/records/{m[0]}.html", source)}">{m[0]}</a>' if m[0] in site.records else m[0]
    return re.sub(r"\b[a-z]\w*-[0-9a-f]{16}\b", link, text)


def matrix(rows, corner=()):
    "A table of dictionaries with the same keys: [(labels of the row, values by column)]"
    columns = sorted(dict.fromkeys(k for _, values in rows for k in values), key=lambda k: METRICS.index(k) if k in METRICS else len(METRICS))
    def kind(c): return "" if any(isinstance(values.get(c), str) for _, values in rows) else ' class="number"'
    head = "".join(f"<th>{html.escape(c)}</th>" for c in corner) + "".join(f"<th{kind(c)}>{html.escape(str(c))}</th>" for c in columns)
    body = "".join(f"<tr>{''.join(cell(x) for x in labels)}{''.join(cell(values.get(c)) for c in columns)}</tr>" for labels, values in rows)
    return boxed(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def scores(value):
    "Scores by level and metric (or by name, level and metric) as rows of one decimal"
    def rows(v, labels=()):
        if all(isinstance(x, dict) for x in v.values()): return [r for k, x in v.items() for r in rows(x, (*labels, k))]
        return [(labels, {k: Score(x) if isinstance(x, (int, float)) else "–" if x is None else str(x) for k, x in v.items()})]
    return sorted(rows(value), key=lambda r: (*r[0][:-1], r[0][-1] != "segment"))


class Score(float):
    "A number printed with one decimal"
    def __format__(self, spec): return float.__format__(self, ".1f")


def record_page(site, path, citing):
    "The page of one run: what it was, its scores, how it went, what made it, who uses it"
    r, key, name = read_json(path, site.root), path.stem, f"figures/records/{path.name}"
    spec, metrics, rule = r.get("spec", {}), r.get("metrics", {}), r.get("rule")
    what = [spec.get("method"), spec.get("backbone") and f"on {spec['backbone']}", spec.get("scale") and f"scale {spec['scale']}",
            f"seed {r.get('seed')}", rule and f"decision rule {rule}", r.get("data", {}).get("mark")]
    said = " · ".join(html.escape(str(w)) for w in what if w)
    parts = [f"<h1>{html.escape(key)}</h1>", f"<blockquote><p>{said}</p></blockquote>",
             f'<p>The record of one training run, as it was written: <a href="{path.name}">{path.name}</a>.</p>']
    if metrics.get(rule): parts += ["<h2 id='scores'>Scores (F, %)</h2>", matrix(scores(metrics[rule]), ("level",))]
    parts += [f"<h2 id='{slug(k)}'>{k}</h2>{fact_table(site, r[at], name)}" for k, at in
              (("Specification", "spec"), ("Data", "data"), ("Selection", "selection")) if r.get(at)]
    if r.get("history"): parts += ["<h2 id='history'>History</h2>", matrix([((i,), dict(facts(h))) for i, h in enumerate(r["history"], 1)], ("epoch",))]
    others = {k: v for k, v in metrics.items() if k != rule}
    if others: parts += ["<h2 id='other-rules'>Under other decision rules</h2>", matrix(scores(others), ("rule", "level"))]
    if r.get("floors"): parts += ["<h2 id='floors'>Without a model</h2>", matrix(scores(r["floors"]), ("predictor", "level"))]
    told = {"spec", "metrics", "floors", "history", "data", "selection"}
    parts += ["<h2 id='provenance'>Provenance</h2>", fact_table(site, {k: v for k, v in r.items() if k not in told}, name)]
    if citing: parts += ["<h2 id='used-in'>Used in</h2>", listed(site, citing, name)]
    return Page(f"figures/records/{key}.html", key, "\n".join(parts), name, RESULTS, [["", "", html.unescape(said)]])


def listed(site, pages, source, told=False):
    "Links to pages as a list; with `told`, what the search knows of each"
    def row(p):
        said = f"<br><small>{html.escape(p.entries[0][2])}</small>" if told and p.entries and p.entries[0][2] != p.title else ""
        return f'<li><a href="{site.relative(p.path, source)}">{html.escape(p.title)}</a>{said}</li>'
    return f'<ul class="columns">{"".join(map(row, pages))}</ul>'


def files_of(folder, stem, root):
    "The committed files of one table or figure"
    return [p for p in sorted((root / folder).glob(f"{stem}.*")) if p.suffix in (".png", ".svg", ".json", ".csv", ".tex", ".md") and p.stem == stem]


def downloads(files):
    links = " · ".join(f'<a href="{quote(p.name)}">{p.suffix[1:]}</a>' for p in files)
    return f'<p class="used">As a file: {links}</p>' if links else ""


def made_by(site, about, name):
    "How a table or figure was made, from the JSON beside it"
    rest = {k: v for k, v in about.items() if k not in ("caption", "files")}
    if isinstance(rest.get("runs"), list): rest["runs"] = ", ".join(map(str, rest["runs"])) or "none"
    return f"<h2 id='made-by'>Made by</h2>{fact_table(site, rest, name)}" if rest else ""


def result_page(site, folder, stem):
    "The page of one committed table or figure"
    root, files = site.root, files_of(folder, stem, site.root)
    name, suffixes = f"{folder}/{stem}", {p.suffix for p in files}
    about = read_json(root / f"{name}.json", root) if ".json" in suffixes and folder != "figures/bench" else {}
    title = about.get("caption") or stem
    whole, source = root / f"{name}.html", f"{name}.html"
    site.targets.setdefault(source, source)
    if whole.is_file():
        text = whole.read_text(encoding="utf-8")
        shown = output_html(site, source)(re.sub(r".*<body[^>]*>|</body>.*", "", text, flags=re.S))
    elif ".md" in suffixes: shown = Prose(site, source).render((root / f"{name}.md").read_text(encoding="utf-8"))
    else: shown = f'<img src="{stem}{".svg" if ".svg" in suffixes else ".png"}" alt="{html.escape(title, quote=True)}">'
    mark = f"<blockquote><p>{html.escape(about['mark'])}</p></blockquote>" if about.get("mark") else ""
    body = f"<h1>{html.escape(stem)}</h1>{mark}{shown}<p>{html.escape(title if title != stem else '')}</p>{downloads(files)}{made_by(site, about, source)}"
    page = Page(site_path(f"{name}.html"), stem, body, name + "." + min(x[1:] for x in suffixes), RESULTS, [["", "", title]])
    return page, about.get("runs") or []


def results(site):
    "(tables, figures, benchmarks, records) as lists of pages; a record names the pages that use it"
    root, made, citing = site.root, [], {}
    for folder, suffixes in (("figures/tables", (".html", ".md", ".csv")), ("figures", (".svg", ".png")), ("figures/bench", (".md",))):
        stems = dict.fromkeys(p.stem for p in committed(root, folder, *suffixes))
        pages = [result_page(site, folder, s) for s in stems]
        for page, runs in pages:
            for run in runs: citing.setdefault(run, []).append(page)
        made.append([p for p, _ in pages])
    made.append([record_page(site, p, citing.get(p.stem)) for p in committed(root, "figures/records", ".json")])
    return made


def records_index(site):
    "All runs in one table that can be sorted and filtered"
    name, rows = "figures/records/index.html", []
    for p in committed(site.root, "figures/records", ".json"):
        r = read_json(p, site.root)
        spec, got = r.get("spec", {}), r.get("metrics", {}).get(r.get("rule"), {})
        label = {"method": spec.get("method"), "backbone": spec.get("backbone"), "scale": spec.get("scale"), "seed": r.get("seed")}
        mean = {f"{level} Type@AV": Score(v["Type@AV"]) for level, v in got.items() if isinstance(v, dict) and isinstance(v.get("Type@AV"), float)}
        rows.append(((p.stem,), label | {"segment Type@AV": None, "event Type@AV": None} | mean | {"minutes": Score(r.get("wall_time", 0) / 60)}))
    body = f"<h1>Records</h1><blockquote><p>One for each training run behind a table or figure here.</p></blockquote>{linked_runs(site, matrix(rows, ('run',)), name)}"
    return Page(name, "Records", body, "figures/records", RESULTS, [["", "", "records of all training runs"]])


def figures_index(site, tables, pictures, bench):
    "What is committed as results"
    source, intro = "figures/README.md", ""
    if (site.root / source).is_file(): intro = Prose(site, source).render((site.root / source).read_text(encoding="utf-8"))
    def picture(p):
        file = p.path[:-5] + (".svg" if (site.root / (p.path[:-5] + ".svg")).is_file() else ".png")
        return f'<a href="{posixpath.basename(p.path)}"><img loading="lazy" alt="" src="{posixpath.basename(file)}">{html.escape(p.title)}</a>'
    body = intro or "<h1>Committed results</h1>"
    body += f"<h2 id='tables'>Tables</h2>{listed(site, tables, source, True)}<h2 id='figures'>Figures</h2><div class='gallery'>{''.join(map(picture, pictures))}</div>"
    if bench: body += f"<h2 id='benchmarks'>Benchmarks</h2>{listed(site, bench, source)}"
    return Page("figures/index.html", "Tables and figures", body, source if intro else "figures", RESULTS, searched(intro))


def cards(site):
    "The data cards, and the list of them"
    pages = [markdown_page(site, f"data_cards/{p.name}", RESULTS) for p in committed(site.root, "data_cards", ".md")]
    body = f"<h1>Data cards</h1><blockquote><p>What each data set and simulator is, and what is known to be wrong with it.</p></blockquote>{listed(site, pages, 'data_cards/index.html')}"
    return [Page("data_cards/index.html", "Data cards", body, "data_cards", RESULTS, []), *pages] if pages else []


# --- the whole --------------------------------------------------------------------------------------------------------

def chained(pages):
    "Each page knows the one before and the one after"
    for a, b in zip(pages, pages[1:]): a.after, b.before = b, a
    return pages


def pages_of(site):
    "All pages, and the groups of the list at the side"
    front = markdown_page(site, "README.md", heads=True)
    books = [notebook_page(site, *nb) for nb in site.nbs]
    front.title = "Overview"
    for p in books[:1]: p.title = "Start here"
    chained([front, *books])
    tables, pictures, bench, records = results(site)
    lists = [figures_index(site, tables, pictures, bench), records_index(site)]
    lists += [markdown_page(site, n, RESULTS) for n in ("figures/weights/README.md",) if (site.root / n).is_file()]
    data = cards(site)
    for some in (tables, pictures, bench, records, data[1:]): chained(some)
    groups = [{"name": "", "links": [(front.path, front.title), *((p.path, p.title) for p in books if not p.group)]}]
    for name in dict.fromkeys([p.group for p in books if p.group == "experiments"] + [p.group for p in books if p.group]):
        groups.append({"name": name, "links": [(p.path, p.title) for p in books if p.group == name]})
    groups.append({"name": RESULTS, "links": [(p.path, p.title) for p in (*lists, *data)]})
    return [front, *books, *lists, *tables, *pictures, *bench, *records, *data], groups


def search_index(pages):
    "The index as a script (a page that is opened as a file may not fetch one): [address, title, heading, text]"
    rows = [[p.path + (f"#{anchor}" if anchor else ""), p.title, "" if head == p.title else head, text] for p in pages for anchor, head, text in p.entries]
    text = ",\n".join(json.dumps(r, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c").replace("\u2028", " ").replace("\u2029", " ") for r in rows)
    return f"window.SITE_INDEX = [\n{text}\n];\n"


def style():
    "The style sheet with the colours of code"
    light, dark = (HtmlFormatter(style=s).get_style_defs(".highlight") for s in ("default", "github-dark"))
    def rules(text): return "\n".join(line for line in text.splitlines() if line.startswith(".highlight .") and "background" not in line)
    return (PARTS / "site.css").read_text(encoding="utf-8") + rules(light) + "\n@media (prefers-color-scheme: dark) {\n" + rules(dark) + "\n}\n"


def copied(site, out):
    "Style, script, fonts, and the committed files that pages show or offer"
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    (out / "fonts").mkdir()
    for name in FONTS: shutil.copyfile(fonts / name, out / "fonts" / name)
    (out / "site.css").write_text(style(), encoding="utf-8")
    shutil.copyfile(PARTS / "site.js", out / "site.js")
    for path in sorted((site.root / "figures").rglob("*")):
        if path.suffix not in (".png", ".svg", ".json", ".csv", ".tex", ".md") or path.name == "README.md": continue
        if path.parent.parent.name == "records": continue     # of a study: no page is about one of them
        to = out / path.relative_to(site.root)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, to)
    if "LICENSE" in site.targets: shutil.copyfile(site.root / "LICENSE", out / "LICENSE.txt")


CELL = re.compile(r'(<t[dh][^>]*?) style="text-align:(l|r)(?:eft|ight);padding:1px ([45])px;white-space:(?:nowrap|normal;min-width:10em)"')


def compact(text):
    "Cells of our own tables with a short attribute, for which site.css has the rules, in place of the same long style each time"
    def short(m): return f'{m[1]} data-c="{m[2]}{m[3]}{"w" if "min-width" in m[0] else "n"}"'
    return CELL.sub(short, text)


def write(site, out):
    "All pages and what they need, into an empty folder; returns the pages"
    pages, groups = pages_of(site)
    env = jinja2.Environment(loader=jinja2.FileSystemLoader(PARTS), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    env.filters["e"] = html.escape
    template = env.get_template("page.html.j2")
    for page in pages:
        to = out / page.path
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(compact(template.render(page=page, groups=groups, root="../"*page.path.count("/"), name=NAME)), encoding="utf-8", newline="\n")
    (out / "search-index.js").write_text(search_index(pages), encoding="utf-8", newline="\n")
    copied(site, out)
    return pages


def build(root=ROOT, out=None):
    "Write the site beside its place, then move it there: an interrupted or failed build leaves the last one as it was"
    out = Path(out or root / "_site").resolve()
    if out.is_file() or out.is_dir() and any(out.iterdir()) and not (out / "search-index.js").is_file():
        raise SiteError(f"{out.name}: is there and isn't a site that I wrote; move it, or name another folder with --out")
    part, old = (out.with_name(f"{out.name}.{x}") for x in ("part", "old"))
    for left in (part, old): shutil.rmtree(left, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        pages = write(Site(root), part)
        if out.exists(): out.rename(old)
        part.rename(out)
    finally:
        for left in (part, old): shutil.rmtree(left, ignore_errors=True)
    return pages


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "_site", help="folder to write; default _site")
    out, start = parser.parse_args(argv).out, time.monotonic()
    try: pages = build(ROOT, out)
    except SiteError as e:
        print(f"make site: {e}", file=sys.stderr)
        return 1
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())/1e6
    print(f"{len(pages)} pages, {size:.1f} MB, in {time.monotonic() - start:.0f} s: open {out.name}/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
