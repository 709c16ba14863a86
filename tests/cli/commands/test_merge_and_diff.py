"""`merge` and `diff` on packs and cache folders."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app
from tiles.cache.cache import KernelCache, Key
from tiles.cache.record import Record
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.pack.pack import Pack, write_pack
from tiles.target import Device

DEVICE = Device("cpu", "A CPU", "x86-64")


def mhc_tune(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert not result.exception or isinstance(result.exception, SystemExit), result.exception
    return result


def fill(
    cache: KernelCache,
    width: int,
    tuned_ms: float | None,
    binary: bytes = b"code",
    schedule: dict[str, Any] | None = None,
    date: str = "2026-01-01",
    **changes: Any,
) -> Record:
    """Store a kernel; `schedule` is changes to the default, `changes` to the key."""
    problem = Problem("merge", "forward", 4, width, "float32", 128)
    values = asdict(kernel_spec("merge", "forward").default(problem, DEVICE.target)) | (schedule or {})
    measured = {} if tuned_ms is None else {"tuned_ms": tuned_ms}
    return cache.put(replace(Key.of(problem, DEVICE), **changes), values, binary, "//", measured, {"date": date})


@pytest.fixture
def a(tmp_path: Path) -> KernelCache:
    return KernelCache(tmp_path / "a")


@pytest.fixture
def b(tmp_path: Path) -> KernelCache:
    return KernelCache(tmp_path / "b")


def packed(cache: KernelCache, **options: bool) -> Path:
    path = cache.folder.with_suffix(".mhcpack")
    write_pack(cache, path, **options)
    return path


@pytest.mark.parametrize(
    ("times", "winner"),
    [((1.0, 2.0), b"a"), ((2.0, 1.0), b"b"), ((1.0, 1.0), b"a"), ((None, 3.0), b"b"), ((None, None), b"a")],
)
def test_of_two_kernels_the_faster_is_taken(
    a: KernelCache, b: KernelCache, tmp_path: Path, times: tuple[float | None, float | None], winner: bytes
) -> None:
    fill(a, 64, times[0], b"a")
    fill(b, 64, times[1], b"b")
    fill(a, 128, 1.0)
    fill(b, 256, 1.0)
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
    fill(a, 64, 1.0)
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
    fill(a, 64, 1.0)
    fill(b, 128, 1.0)
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
    assert "a merge must hold a kernel, found none in" in result.stderr


def test_equal_contents_do_not_differ(a: KernelCache, b: KernelCache) -> None:
    for cache, date in ((a, "2026-01-01"), (b, "2026-02-02")):
        fill(cache, 64, 1.0, date=date)
    for one, other in ((a.folder, packed(a)), (a.folder, b.folder), (packed(b), packed(a))):
        result = mhc_tune("diff", one, other, "--json")
        assert result.exit_code == 0
        assert json.loads(result.stdout)["equal"] is True
    assert "both hold the same kernels" in mhc_tune("diff", a.folder, b.folder).stderr


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({"tuned_ms": 0.5}, ["measured"]),
        ({"binary": b"other"}, ["code"]),
        ({"schedule": {"block_width": 32}}, ["schedule"]),
        ({"sources": "elsewhere", "binary": b"x", "tuned_ms": 2.0}, ["version", "code", "measured"]),
    ],
)
def test_what_differs_is_named(a: KernelCache, b: KernelCache, change: dict[str, Any], changed: list[str]) -> None:
    fill(a, 64, 1.0)
    fill(b, **({"width": 64, "tuned_ms": 1.0} | change))
    result = mhc_tune("diff", packed(a), b.folder, "--json")
    assert result.exit_code == 1
    (difference,) = json.loads(result.stdout)["differences"]
    assert difference["changed"] == changed
    assert difference["a"]["measurement"] == {"tuned_ms": 1.0}
    table = mhc_tune("diff", packed(a), b.folder)
    assert table.exit_code == 1
    assert ", ".join(changed) in table.stdout
    assert ("block_width=64 -> 32" in table.stdout) == ("schedule" in changed)


def test_kernels_of_one_side_are_listed(a: KernelCache, b: KernelCache) -> None:
    fill(a, 64, 1.0)
    fill(a, 128, 1.0)
    fill(b, 128, 1.0)
    fill(b, 256, 1.0)
    result = mhc_tune("diff", a.folder, b.folder, "--json")
    found = [
        (item["changed"], (item["a"] or item["b"])["key"]["width"]) for item in json.loads(result.stdout)["differences"]
    ]
    assert found == [(["only in A"], 64), (["only in B"], 256)]
    assert "2 kernels differ" in mhc_tune("diff", a.folder, b.folder).stderr


def test_of_several_versions_the_current_counts_then_the_latest(a: KernelCache, b: KernelCache) -> None:
    fill(a, 64, 1.0)
    fill(a, 64, 9.0, sources="older", date="2026-09-09")
    fill(a, 128, 2.0, sources="one", date="2026-02-02")
    fill(a, 128, 3.0, sources="two", date="2026-03-03")
    fill(b, 64, 1.0)
    fill(b, 128, 3.0, sources="two", date="2026-03-03")
    assert mhc_tune("diff", a.folder, b.folder).exit_code == 0
