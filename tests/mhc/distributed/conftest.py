"""The two processes that all tests of this folder share."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the tests import `two_ranks` and `models`

from two_ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    pair = Ranks(tmp_path_factory.mktemp("ranks"))
    yield pair
    pair.end()


@pytest.fixture(autouse=True)
def _on_one_thread(one_thread):
    """In this process as in those of `ranks`."""
