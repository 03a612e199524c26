"""`nbs/extend.ipynb` keeps its promise: a method and a data set, each in at most sixty lines, and nothing edited in the library.

That it runs is shown by `test_notebooks`, which executes it like every notebook without parameters.
"""
import json

import pytest
from tree import NOTEBOOKS

from avvp_nb.data.sources import DATASETS
from avvp_nb.methods.zoo import METHODS

EXTEND = next(nb for nb in NOTEBOOKS if nb.name == "extend")


def part(heading):
    "Code lines from one second-level heading to the next, what only shows refusals apart"
    lines, inside, refusals = 0, False, False
    for c in EXTEND.cells:
        source = "".join(c["source"])
        if c["cell_type"] == "markdown":
            heads = [line for line in source.splitlines() if line.startswith("## ")]
            if heads: inside, refusals = heads[-1] == f"## {heading}", False
            if "\n### " in f"\n{source}": refusals = "before any training" in source
        elif inside and not refusals: lines += len([x for x in source.splitlines() if x.strip()])
    return lines


@pytest.mark.parametrize("heading", ["A method", "A data set"])
def test_each_part_takes_at_most_sixty_lines(heading):
    assert 20 < part(heading) <= 60


def test_it_is_trained_stacked_recorded_tabled_and_judged():
    "What its committed outputs show"
    text = json.dumps([c.get("outputs", []) for c in EXTEND.cells])
    assert all(word in text for word in ("3 runs together: lone", "'verdict'", "Lone", "simulated kitchen"))


def test_nothing_of_it_is_part_of_the_library():
    assert "lone" not in METHODS and "kitchen" not in DATASETS
