"""Lazy loading: a binary is read and checked before the first call of its kernel, and no other one is."""

import pytest
from fake_kernels import PROBLEM, answer, fakes, put

import mhc
import tiles.cache.cache
import tiles.pack.zip_format
from tiles.cache.cache import KernelCache
from tiles.pack.pack import write_pack

__all__ = ["fakes"]
pytestmark = pytest.mark.usefixtures("fakes")


@pytest.fixture
def checked(monkeypatch):
    """The SHA-256 of every binary that was checked, in order."""
    seen = []
    check = tiles.cache.cache.checked_binary

    def recording(record, binary):
        seen.append(record.sha256)
        return check(record, binary)

    monkeypatch.setattr(tiles.cache.cache, "checked_binary", recording)
    monkeypatch.setattr(tiles.pack.zip_format, "checked_binary", recording)
    return seen


@pytest.mark.parametrize("form", ["folder", "pack"])
def test_a_binary_is_checked_before_the_first_call_and_no_other(tmp_path, checked, form):
    wanted = put(tmp_path / "cache", 1)
    put(tmp_path / "cache", 2, tokens=64 * PROBLEM.tokens)
    path = tmp_path / "cache"
    if form == "pack":
        path = tmp_path / "kernels.mhcpack"
        write_pack(KernelCache(tmp_path / "cache"), path)
    checked.clear()
    kernels = mhc.Kernels.from_path(path)
    assert checked == []
    assert answer(kernels) == 1
    assert checked == [wanted.sha256]
    assert answer(kernels) == 1
    assert checked == [wanted.sha256]
