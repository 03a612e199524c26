"""Invented numbers say so everywhere, are never called simulated, and are not among the committed results; quotations are verbatim."""
import re

import pytest
from tree import NOTEBOOKS, ROOT

from avvp_nb.core import InputError, shared
from avvp_nb.records.invented import invented
from avvp_nb.records.spec import RunSpec
from avvp_nb.results import compare as C
from avvp_nb.results import groups as G
from avvp_nb.results import plots as P
from avvp_nb.results.claims import tier_of
from avvp_nb.results.table import Row

MADE = {"invented": lambda s: invented(RunSpec("dgm", backbone="han", scale="small", seed=s)), "invented_record": G.invented_record}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_invented_records_are_marked_and_nothing_else(make):
    records = [make(s) for s in (1, 2)]
    for r in records:
        assert "invented" in r["data"]["mark"] and "simulated" not in r["data"]["mark"] and r["data"]["simulated"], "nobody may take them for real"
    table = C.ours(records)
    for text in (table.to_markdown(), table.to_html(), table.to_latex(), table.to_csv()): assert "invented" in text and "simulated" not in text.lower()
    assert tier_of(table.mark) == "invented" and not G.provenance(records)["simulated"]


def test_a_mark_says_one_of_the_two_words():
    record = G.invented_record()
    for mark in ("simulated: invented numbers", "invented, simulated v1", "v1", ""):
        with pytest.raises(InputError, match="either 'simulated' or 'invented'"): G.check_record(record | {"data": record["data"] | {"mark": mark}})
    for mark in ("simulated", "invented numbers"):
        real = record["data"] | {"simulated": False, "mark": mark}
        with pytest.raises(InputError, match="are not simulated"): G.check_record(record | {"data": real})


def test_rows_and_figures_without_the_word_are_refused(tmp_path):
    for mark, word in (("invented numbers", "invented"), ("simulated v1", "simulated"), ("simulated v1; invented numbers", "invented")):
        with pytest.raises(InputError, match=f"the word '{word}'"): Row("x", "ours", "ours", {}, info={"mark": mark})
        with P.drawing() as plt: bare = P.finish(plt.subplots(figsize=(2, 1))[0], "", "nothing")
        with pytest.raises(InputError, match=f"the word '{word}'"): P.save_figure(bare, tmp_path / "x", {"mark": mark})


def committed():
    "Every text file of figures/"
    return [p for p in sorted((ROOT / "figures").rglob("*")) if p.suffix in (".json", ".md", ".csv", ".html", ".tex", ".svg") and p.name != "README.md"]


def test_no_invented_number_is_among_the_committed_results():
    found = committed()
    assert len(found) > 100
    for p in found: assert "invented" not in p.read_text(encoding="utf-8").lower(), p.relative_to(ROOT)


def test_this_test_would_notice_one(tmp_path):
    C.ours(G.invented_record()).save(tmp_path / "made_up")
    assert all("invented" in p.read_text().lower() for p in tmp_path.iterdir() if p.suffix != ".tex") and "invented" in (tmp_path / "made_up.tex").read_text()


# ---------------------------------------------------------------- quotations

PAPER = {"han": "han_eccv2020", "ma": "ma_cvpr2021", "dgm": "dgm_msdu", "coleaf": "coleaf_eccv2024"}
OURS = {"true video-level label per modality"}     # names of this project that stand in quotation marks


def words(text):
    "Lower-case words; mathematics, Greek letters, citations, abbreviations in brackets and hyphens at line ends are left out"
    text = re.sub(r"\$[^$]*\$|\\[a-z]+|[*_`]|\[[\d, –-]+\]|\([A-Z]{2,}\)", " ", text.replace("-\n", "")).lower()
    return re.findall(r"[a-z0-9]+", re.sub("[α-ωϑϕ]", " ", text))


def runs_of_five(found): return {tuple(found[i:i + 5]) for i in range(len(found) - 4)}


@pytest.fixture(scope="module")
def papers():
    folder = shared("papers")
    if not folder.is_dir(): pytest.skip("papers/ not found: set AVVP_SHARED to the folder that holds it")
    return {k: runs_of_five(words((folder / f"{v}.md").read_text(encoding="utf-8"))) for k, v in PAPER.items()}


def quotations(nb):
    "Quoted passages of block quotes, and of prose that names a paper, without what is left out [...] or put in by us [x]"
    for source in nb.of("markdown"):
        for line in source.splitlines():
            if line.startswith("|"): continue
            for q in re.findall(r'["“]([^"“”]*)["”]', line):
                for part in re.split(r"\[[^\]]*\]|…|\.\.\.|\$[^$]*\$|`[^`]*`", q):
                    if len(words(part)) >= 5 and part.strip() not in OURS: yield line.startswith(">"), part


ABOUT = {"methods/03_han": "han", "methods/04_ma_swap": "ma", "methods/05_ma_refine": "ma", "methods/06_ma": "ma", "methods/09_dgm": "dgm",
         "methods/11_coleaf_terms": "coleaf", "methods/12_coleaf": "coleaf", "han": "han", "ma": "ma", "dgm": "dgm", "coleaf": "coleaf",
         "results/06_figures_han": "han", "results/07_figures_ma": "ma", "results/08_figures_dgm": "dgm", "results/09_figures_coleaf": "coleaf"}
QUOTING = [nb for nb in NOTEBOOKS if nb.name in ABOUT]


def wrong(part, five):
    "The runs of five quoted words that a paper does not hold"
    w = words(part)
    return [" ".join(w[i:i + 5]) for i in range(len(w) - 4) if tuple(w[i:i + 5]) not in five]


@pytest.mark.parametrize("nb", QUOTING, ids=lambda nb: nb.name)
def test_quotations_are_verbatim(nb, papers):
    every = set().union(*papers.values())
    bad = {part.strip(): miss for block, part in quotations(nb) if (miss := wrong(part, papers[ABOUT[nb.name]] if block else every))}
    assert not bad, bad


def test_there_are_quotations_and_a_changed_word_is_noticed(papers):
    found = [part for nb in QUOTING for _, part in quotations(nb)]
    assert len(found) > 40
    assert wrong("we design the confidence score and the discrepancy", papers["dgm"]), "an early version quoted this, which the paper does not say"
    assert not wrong("indicates the parameter to be optimized", papers["dgm"])
