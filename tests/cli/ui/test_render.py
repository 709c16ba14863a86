"""Tables for people: a terminal of 80 columns shows all of them."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from cli.ui.render import bench_tables, number, records_table
from tiles.cache.cache import KernelCache, Key
from tiles.kernels.spec import Problem
from tiles.target import Device

MEASUREMENT = {
    "default_ms": 0.123,
    "tuned_ms": 0.0617,
    "ratio": 1.99,
    "percent_of_copy": 71.5,
    "percent_of_limit": 72.5,
}
SCHEDULE = {"block_tokens": 48, "block_width": 640, "register_outputs": 6, "register_tokens": 12}


def test_a_table_of_kernels_fits_80_columns(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path)
    for name in ("one processor", "another processor"):
        key = Key.of(Problem("project", "backward", 16, 16384, "bfloat16", 131072), Device("cpu", name, "x86-64-v4"))
        cache.put(key, SCHEDULE, b"code", "text", MEASUREMENT, {})
    screen = io.StringIO()
    Console(file=screen, width=80).print(records_table(cache.records(), "some folder"))
    shown = screen.getvalue()
    assert "…" not in shown
    for text in (
        "project backward",
        "bfloat16",
        "register_outputs=6",
        "one processor",
        "another processor",
        "x86-64-v4",
    ):
        assert text in shown, text
    for value in ("0.123", "0.0617", "1.99", "71.5", "72.5"):
        assert shown.count(value) == 2, value


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.01234, "0.0123"), (1.5, "1.5"), (12.34, "12.3"), (1234.5, "1234")]
)
def test_number(value: float | None, text: str) -> None:
    assert number(value) == text


def test_bench_tables_set_implementations_side_by_side() -> None:
    shape = {"op": "merge", "direction": "both", "streams": 4, "width": 8, "tokens": 2, "dtype": "float32"}
    rows = [
        shape | {"impl": impl, "tokens": tokens, "median_ms": ms, "percent_of_limit": 30 / ms}
        for tokens in (2, 3)
        for impl, ms in (("tuned", 0.5), ("separate", 0.8), ("eager", 5.0), ("compile", 2.0))
        if tokens == 2 or impl != "tuned"
    ]
    impls = ["tuned", "separate", "eager", "compile"]
    first, second = bench_tables(rows, "a CPU, 2 threads", "copy 10 GB/s", impls)
    assert first.title == "n = 4, width 8, 2 tokens on a CPU, 2 threads: median times"
    names = ["op", "pass", "dtype", "tuned ms", "separate ms", "eager ms", "compile ms", "gain", "% of limit"]
    assert [str(column.header).replace("\n", " ") for column in first.columns] == names
    cells = [next(iter(column.cells)) for column in first.columns]
    assert cells == ["merge", "both", "float32", "0.5", "0.8", "5", "2", "4.0x", "60"]
    assert [next(iter(column.cells)) for column in second.columns][3:] == ["-", "0.8", "5", "2", "-", "-"]


def test_a_stack_says_what_joins_its_layers() -> None:
    shape = {"direction": "both", "streams": 4, "width": 8, "tokens": 2, "dtype": "float32"}
    for op, said in (("merge", False), ("stack", True)):
        row = shape | {"op": op, "impl": "eager", "median_ms": 1.0, "percent_of_limit": 3.0}
        (table,) = bench_tables([row], "a CPU", "copy 10 GB/s", ["eager"])
        assert ("step joins its layers" in str(table.caption)) == said
