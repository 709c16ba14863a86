"""Tables of kernels and measurements as rich renderables, and the formats of their cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from tiles.cache.record import Record, record_dict
from tiles.kernels.spec import Problem
from tiles.target import Device

SHAPE = ("op", "direction", "streams", "width", "tokens", "dtype")
"""Columns that identify a problem."""

MEASURED = ("default_ms", "tuned_ms", "ratio", "percent_of_copy", "percent_of_limit")


def table(title: str, text: Sequence[str], numbers: Sequence[str]) -> Table:
    """An empty table: columns of text, then columns of numbers, aligned right."""
    made = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE)
    for name in text:
        made.add_column(name, no_wrap=True)
    for name in numbers:
        made.add_column(name, justify="right", no_wrap=True)
    return made


def records_table(records: Sequence[Record], title: str) -> Table:
    """One row per kernel: problem, schedule, device; times (ms), % of copy bandwidth, % of the roofline limit."""
    devices = sorted({device_text(record.key.device) for record in records})
    several = len(devices) > 1
    about = f"{title}: {len(records)} kernels" + (f", {devices[0]}" if len(devices) == 1 else "")
    made = table(about, (), ())
    # One column for all text, which may wrap, so that a row fits a narrow terminal.
    made.add_column("kernel, schedule", min_width=20)
    for name in ("default ms", "tuned ms", "gain", "% of copy", "% of limit"):
        made.add_column(name, justify="right", min_width=6)
    for record in sorted(records, key=lambda record: shape_of(record.key.problem)):
        lines = [record.key.problem.describe(), f"  {schedule_text(record.schedule)}"]
        lines += [f"  {device_text(record.key.device)}"] if several else []
        made.add_row("\n".join(lines), *(number(record.measurement.get(name)) for name in MEASURED))
    return made


def bench_table(rows: Sequence[Mapping[str, Any]], title: str, impls: Sequence[str]) -> Table:
    """One row per op, direction and shape; one column of median times (ms) per implementation.

    The last columns are the tuned kernels' share of the roofline limit and their speed-up over other implementations.
    """
    others = [impl for impl in ("separate", "eager", "compile") if impl in impls]
    made = table(title, SHAPE, [f"{impl} ms" for impl in impls] + ["% of limit"] + [f"vs {impl}" for impl in others])
    cells: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault(tuple(row[name] for name in SHAPE), {})[row["impl"]] = row
    for shape, by_impl in cells.items():
        times = {impl: row["median_ms"] for impl, row in by_impl.items()}
        tuned = times.get("tuned")
        gains = [times[impl] / tuned if tuned and impl in times else None for impl in others]
        made.add_row(
            *map(str, shape),
            *(number(times.get(impl)) for impl in impls),
            number(by_impl["tuned"]["percent_of_limit"] if tuned else None),
            *(f"{gain:.1f}x" if gain else "-" for gain in gains),
        )
    return made


def load_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row per pack or folder: time to load it (ms), to the end of the first call (ms), of a warm look-up (us)."""
    made = table(
        "mhc.load_kernels, in fresh processes", ("from", "kernels"), ("load ms", "first call ends ms", "look-up us")
    )
    for row in rows:
        made.add_row(
            row["from"], str(row["kernels"]), *(number(row[name]) for name in ("load_ms", "total_ms", "look_up_us"))
        )
    return made


def shape_of(problem: Problem) -> tuple[str, str, int, int, int, str]:
    """A problem's values of the columns `SHAPE`."""
    return (problem.op, problem.direction, problem.streams, problem.width, problem.tokens, problem.dtype)


def record_json(record: Record) -> dict[str, Any]:
    """A record as plain data, with its digest, which names its files."""
    return record_dict(record) | {"digest": record.key.digest}


def device_text(device: Device) -> str:
    """A device's name and architecture."""
    return f"{device.name} ({device.arch})"


def schedule_text(schedule: Mapping[str, Any]) -> str:
    """A schedule on one line."""
    return " ".join(f"{name}={value}" for name, value in schedule.items())


def number(value: float | None) -> str:
    """Three significant digits, or a dash where nothing was measured."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
