"""The folder's helper `tiny` can be imported by its tests; the standard library's text is read once."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from mhc.examples import train_bytes


@pytest.fixture(scope="session")
def text():
    return train_bytes.standard_library()


@pytest.fixture(autouse=True)
def _on_one_thread(one_thread):
    """Small models."""
