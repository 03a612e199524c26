"""Fixtures shared by all tests: where other people's material lies, and how a reference case is read."""
import json
import os

import numpy as np
import pytest

from avvp_nb.core import shared

# Numbers in bf16 are tested on processors without bf16 products, too, where a run would refuse them for their slowness
os.environ.setdefault("AVVP_SLOW_BF16", "1")

LONGEST = ("test_notebooks", "test_notebook_papers", "test_notebook_dgm", "test_parallel", "test_cluster")


def pytest_collection_modifyitems(items):
    "Files that take longest come first, so that parallel processes end together"
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


def _folder(name):
    path = shared(name)
    if not path.is_dir():
        pytest.skip(f"{path.name}/ not found: set AVVP_SHARED to the folder that holds it")
    return path


@pytest.fixture(scope="session")
def llp():
    "Folder of the real LLP annotation files"
    return _folder("llp")


@pytest.fixture(scope="session")
def llp_stats():
    "Folder of the statistics of the real annotations"
    return _folder("llp_stats")


@pytest.fixture(scope="session")
def golden():
    "Read one reference case: `case = golden('han_forward'); case['a_prob'], case.info`"
    folder = _folder("golden")

    class Case(dict):
        info: dict

    def read(name):
        with np.load(folder / f"{name}.npz") as z:
            case = Case({k: z[k] for k in z.files})
        case.info = json.loads((folder / f"{name}.json").read_text())
        return case

    return read


def close(case, key, value):
    "Assert that `value` agrees with array `key` of a reference case within the tolerance recorded there"
    tol = case.info.get("tolerance_by_array", {}).get(key, case.info["tolerance"])
    np.testing.assert_allclose(np.asarray(value), case[key], err_msg=key, **tol)
