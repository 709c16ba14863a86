"""Load time: fresh processes for a real pack and folder, medians, and no figure for a fallback."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cli.bench import load_time
from tiles.cache.cache import KernelCache, Key
from tiles.compiler.compile import compile_kernel
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.target import detect_device

SHAPE = (2, 64, 32, "float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the kernel of the first call."""
    device, spec = detect_device("cpu"), kernel_spec("merge", "forward")
    streams, width, tokens, dtype = SHAPE
    problem = spec.canonical(Problem("merge", "forward", streams, width, dtype, tokens))
    schedule = spec.default(problem, device.target)
    built = compile_kernel(problem, schedule, device.target)
    cache = KernelCache(tmp_path_factory.mktemp("cache"))
    cache.put(Key.of(problem, device), asdict(schedule), built.binary, built.source, {}, {})
    return cache.folder


@pytest.mark.slow
def test_fresh_processes_load_a_pack_and_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_time, "PROCESSES", 1)
    skipped: list[str] = []
    rows = load_time.measure(folder, SHAPE, skipped)
    assert skipped == []
    assert [(row["from"], row["kernels"], row["processes"]) for row in rows] == [("pack", 1, 1), ("folder", 1, 1)]
    for row in rows:
        assert 0 < row["load_ms"] < row["total_ms"]
        assert row["look_up_us"] > 0
        assert (row["op"], row["width"], row["tokens"]) == ("merge", 64, 32)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the processes say, in order: the pack's and the folder's take turns."""
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(load_time, "_load", lambda path, problem: said.pop(0))
    monkeypatch.setattr(load_time, "PROCESSES", 3)
    return said


def run(total_ms: float, runs: str = "tuned") -> dict[str, Any]:
    return {"load_ms": total_ms / 2, "total_ms": total_ms, "look_up_us": total_ms / 10, "runs": runs, "why": "a reason"}


def test_times_are_medians(folder: Path, loads: list[dict[str, Any]]) -> None:
    loads += [run(total) for total in (1, 20, 100, 40, 3, 30)]
    pack, kept = load_time.measure(folder, SHAPE, [])
    assert (pack["load_ms"], pack["total_ms"], pack["look_up_us"]) == (1.5, 3, 0.3)
    assert (kept["total_ms"], kept["processes"]) == (30, 3)


def test_a_fallback_has_no_figure(folder: Path, loads: list[dict[str, Any]]) -> None:
    loads += [run(1), run(2, "reference")] * 3
    skipped: list[str] = []
    assert [row["from"] for row in load_time.measure(folder, SHAPE, skipped)] == ["pack"]
    assert skipped == ["load folder merge forward n=2 C=64 float32 T=32: would run reference: a reason"]


def test_a_process_that_fails_is_an_error_with_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_time, "CHILD", "import sys; sys.exit(f'cannot read {sys.argv[1]}')")
    with pytest.raises(RuntimeError, match=r"a process that loads none failed: cannot read .*/none$"):
        load_time._load(tmp_path / "none", Problem("merge", "forward", 2, 64))
