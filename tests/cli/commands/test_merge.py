"""The command merge, on packs and cache folders."""

import json
from pathlib import Path

import pytest
from cli_helpers import mhc_tune, packed, put_merge

from tiles.cache.cache import KernelCache
from tiles.pack.pack import Pack


@pytest.mark.parametrize(
    ("times", "winner"),
    [((1.0, 2.0), b"a"), ((2.0, 1.0), b"b"), ((1.0, 1.0), b"a"), ((None, 3.0), b"b"), ((None, None), b"a")],
)
def test_of_two_kernels_the_faster_is_taken(
    a: KernelCache, b: KernelCache, tmp_path: Path, times: tuple[float | None, float | None], winner: bytes
) -> None:
    put_merge(a, 64, times[0], b"a")
    put_merge(b, 64, times[1], b"b")
    put_merge(a, 128, 1.0)
    put_merge(b, 256, 1.0)
    out = tmp_path / "out.mhcpack"
    result = mhc_tune("merge", out, packed(a), b.folder, "--json")
    assert result.exit_code == 0, result.stderr
    with Pack(out) as pack:
        assert {pack.binary(record) for record in pack.records() if record.key.width == 64} == {winner}
        assert sorted(record.key.width for record in pack.records()) == [64, 128, 256]
        assert pack.why_untrusted is None
    (choice,) = json.loads(result.stdout)["twice"]
    assert choice["kept"] == str(a.folder.with_suffix(".mhcpack") if winner == b"a" else b.folder)
    assert choice["left"] != choice["kept"]


def test_a_strangers_code_gets_no_signature_of_ours(
    a: KernelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_merge(a, 64, 1.0)
    out = tmp_path / "out.mhcpack"
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("MHC_TUNE_KEYS", str(tmp_path / "their keys"))
        theirs = packed(a)
    for source in (theirs, packed(a, signed=False)):
        refused = mhc_tune("merge", out, source)
        assert (refused.exit_code, refused.stdout, len(refused.stderr.splitlines())) == (2, "", 1)
        assert "a signature vouches for code" in refused.stderr
        assert not out.exists()
    assert mhc_tune("merge", out, theirs, "--unsigned").exit_code == 0
    with Pack(out) as pack:
        assert pack.why_untrusted == "it is not signed"
    out.unlink()
    assert mhc_tune("merge", out, theirs, "--trust-binaries").exit_code == 0
    with Pack(out) as pack:
        assert pack.why_untrusted is None


def test_a_merge_replaces_only_what_it_has_read(a: KernelCache, b: KernelCache) -> None:
    put_merge(a, 64, 1.0)
    put_merge(b, 128, 1.0)
    first, second = packed(a), packed(b)
    before = first.read_bytes()
    result = mhc_tune("merge", first, second)
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert first.read_bytes() == before
    assert mhc_tune("merge", first, first, second).exit_code == 0
    with Pack(first) as pack:
        assert {record.key.width for record in pack.records()} == {64, 128}


def test_a_merge_of_nothing_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = mhc_tune("merge", tmp_path / "out.mhcpack", tmp_path / "empty")
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert "a merge needs a kernel, found none in" in result.stderr
