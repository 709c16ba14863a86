"""Tables are whole: at 80 and 100 columns of a terminal, and in a file, which gets as wide as it needs."""

import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import mhc_tune
from rich.table import Table

from cli.commands import compile as compile_command
from cli.commands import diff
from cli.commands.replay import replay_table
from cli.ui.fit import fitted
from cli.ui.output import show
from cli.ui.render import bench_tables, load_table, records_table, table
from tiles.cache.cache import KernelCache, Key
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.target import Device, Target

DEVICE = Device("cpu", "AMD EPYC family 26 model 2", "x86-64-v4")
MEASURED = {"default_ms": 12.3, "tuned_ms": 1234.5, "ratio": 1.99, "percent_of_copy": 71.5, "percent_of_limit": 72.5}
SCHEDULE = {"block_tokens": 48, "block_width": 640, "register_outputs": 6, "register_tokens": 12}
WIDE = Problem("coefficients", "backward", 16, 16384, "bfloat16", 131072)


def records(folder: Path, **changes: float) -> list[Any]:
    cache = KernelCache(folder)
    problem = Problem("project", "backward", 16, 16384, "bfloat16", 131072)
    cache.put(Key.of(problem, DEVICE), SCHEDULE, b"code", "text", MEASURED | changes, {})
    return cache.records()


def bench_rows(*impls: str) -> list[dict[str, Any]]:
    shape = {"streams": 16, "width": 16384, "tokens": 131072, "dtype": "bfloat16"}
    return [
        shape | {"op": op, "direction": way, "impl": impl, "median_ms": 123.4, "percent_of_limit": 45.6}
        for op in ("coefficients", "layer")
        for way in ("forward", "backward")
        for impl in impls
    ]


def bench_of(*impls: str) -> Table:
    (made,) = bench_tables(bench_rows(*impls), "AMD EPYC, 2 threads", "copy 45.0 GB/s, 321 GFLOP/s", impls)
    return made


def difference(folder: Path) -> Table:
    (one,), (other,) = records(folder / "a"), records(folder / "b", tuned_ms=1.0)
    found = [diff.Difference(one, other, ("version", "schedule", "code", "measured"))]
    return diff._table(found, "build/cache (A) against build/other/cache (B)")


def replayed(_: Path) -> Table:
    row = {"space": "step backward n=4 C=1280 float32 T=2048", "sampler": "random", "members": 12345, "trials": 100}
    row |= {"found": {"median": 1.234, "low": 1.123, "high": 1.345}, "to_95": None, "to_99": 77, "score": -0.12}
    return replay_table([row | {"duplicates": 3, "outside": 4, "ms_per_trial": 12.3, "seeds": 25}])


def compiled(target: Target, monkeypatch: pytest.MonkeyPatch) -> Table:
    spec = kernel_spec("coefficients", "backward")
    row = asdict(WIDE) | {"schedule": asdict(spec.default(WIDE, target)), "bytes_per_token": 123456.0}
    row |= {"code_bytes": 7654321, "registers": 255, "spilled_bytes": 1234, "shared_bytes": 232448}
    row |= {"in_flight_ratio": 1.234} if target.kind == "cuda" else {}
    shown: list[Table] = []
    monkeypatch.setattr(compile_command, "show", shown.append)
    compile_command._show(target, [row | {"occupancy_percent": 12.5}])
    return shown[0]


LOADED = {"from": "build/cache", "kernels": 16, "load_ms": 12.5, "total_ms": 31.25, "look_up_us": 1.75}
TABLES: dict[str, Callable[[Path, pytest.MonkeyPatch], Table]] = {
    "records": lambda folder, _: records_table(records(folder), "a cache folder"),
    "bench": lambda *_: bench_of("tuned", "default", "eager", "compile"),
    "bench of all": lambda *_: bench_of("tuned", "separate", "default", "eager", "compile", "tile-kernels", "liger"),
    "load": lambda *_: load_table([LOADED]),
    "diff": lambda folder, _: difference(folder),
    "replay": lambda folder, _: replayed(folder),
    "compile for a CPU": lambda _, patch: compiled(Target("cpu", "x86-64-v4"), patch),
    "compile for a GPU": lambda _, patch: compiled(Target("cuda", "sm_90a"), patch),
}


def words(made: Table) -> set[str]:
    """Every word of a table's title, caption, headings and cells."""
    texts = [made.title, made.caption]
    for column in made.columns:
        texts += [column.header, *column.cells]
    return {word for text in texts for word in str(text or "").split()}


def plain(text: str) -> str:
    """Without a terminal's control sequences."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes stdout and stderr a terminal of so many columns."""

    def of(columns: int) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", str(columns))

    return of


@pytest.mark.parametrize("columns", [60, 80, 100])
@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_whole_on_a_terminal(
    name: str,
    columns: int,
    terminal: Callable[[int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = TABLES[name](tmp_path, monkeypatch)
    wanted = words(made)
    terminal(columns)
    show(made)
    said = plain(capsys.readouterr().out)
    assert "…" not in said
    assert max(map(len, said.splitlines())) <= columns
    assert wanted - {word.rstrip(",") for word in said.split()} - set(said.split()) == set()


@pytest.mark.parametrize("name", TABLES)
def test_a_table_in_a_file_has_a_line_a_row(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    made = TABLES[name](tmp_path, monkeypatch)
    show(made)
    said = capsys.readouterr().out
    assert "…" not in said
    assert "\x1b" not in said
    for cells in zip(*(column.cells for column in made.columns), strict=True):
        first = [line for cell in cells for line in str(cell).splitlines()[:1]]
        assert any(all(cell in line for cell in first) for line in said.splitlines()), first


def test_the_comparison_of_make_tune_is_one_table_that_names_its_shape(
    terminal: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    for columns in (80, 100):
        terminal(columns)
        show(bench_of("tuned", "default", "eager", "compile"))
        lines = plain(capsys.readouterr().out).splitlines()
        assert lines[0] == "n = 16, width 16384, 131072 tokens on AMD EPYC, 2 threads: median times"
        (row,) = [line for line in lines if line.split()[:3] == ["layer", "forward", "bfloat16"]]
        assert row.split()[3:] == ["123", "123", "123", "123", "1.0x", "45.6"]


def test_columns_come_closer_before_rows_become_blocks() -> None:
    def numbers() -> Table:
        made = table("title", ("name",), ("a", "b", "c"))
        made.add_row("merge", "1", "2", "3")
        return made

    assert fitted(numbers(), 40).padding == (0, 1, 0, 1)
    assert fitted(numbers(), 14).padding == (0, 0, 0, 0)
    (column,) = fitted(numbers(), 12).columns
    assert list(column.cells) == ["name merge,\n  a 1, b 2,\n  c 3"]


@pytest.mark.parametrize("columns", [80, 100])
def test_the_doctor_is_whole(
    columns: int, terminal: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    terminal(columns)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("MHC_TUNE_CACHE", str(tmp_path / "a folder with a rather long name" / "kernels"))
    said = plain(mhc_tune("doctor").stdout)
    assert "…" not in said
    assert max(map(len, said.splitlines())) <= columns
    for text in ("Python", "TileLang", "compiler for this CPU", "install g++", "rather"):
        assert text in said
