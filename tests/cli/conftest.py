import sys
from pathlib import Path

import pytest

from tiles.cache.cache import KernelCache

sys.path.insert(0, str(Path(__file__).parent))  # the tests import `cli_helpers` and `tuner_events`


@pytest.fixture
def a(tmp_path: Path) -> KernelCache:
    return KernelCache(tmp_path / "a")


@pytest.fixture
def b(tmp_path: Path) -> KernelCache:
    return KernelCache(tmp_path / "b")


@pytest.fixture
def own_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of keys for one test."""
    monkeypatch.setenv("MHC_TUNE_KEYS", str(tmp_path / "keys"))
    return tmp_path / "keys"
