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
    """An empty table: columns of text, then columns of numbers, aligned right, whose headings may wrap."""
    made = Table(title=title, header_style="bold", box=box.SIMPLE)
    for name in text:
        made.add_column(name, no_wrap=True)
    for name in numbers:
        made.add_column(name, justify="right")
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
        default, tuned, ratio, *shares = (record.measurement.get(name) for name in MEASURED)
        gain = "-" if ratio is None else f"{ratio:.2f}x"
        made.add_row("\n".join(lines), number(default), number(tuned), gain, *map(number, shares))
    return made


def bench_tables(rows: Sequence[Mapping[str, Any]], where: str, limits: str, impls: Sequence[str]) -> list[Table]:
    """A table a shape, with one row per op, pass and dtype, and one column of median times (ms) per implementation.

    The last columns are the gain of the tuned kernels over the faster one of eager and compiled torch, and their share
    of the roofline limit. `where` and `limits` describe the device and its limits.
    """
    shapes = dict.fromkeys((row["streams"], row["width"], row["tokens"]) for row in rows)
    return [_bench_table(rows, shape, where, limits, impls) for shape in shapes]


def _bench_table(
    rows: Sequence[Mapping[str, Any]], shape: tuple[int, int, int], where: str, limits: str, impls: Sequence[str]
) -> Table:
    streams, width, tokens = shape
    title = f"n = {streams}, width {width}, {tokens} tokens on {where}: median times"
    made = table(title, ("op", "pass", "dtype"), (*(f"{impl}\nms" for impl in impls), "gain", "% of\nlimit"))
    notes = [
        "gain: how many times as fast tuned is as the faster one of eager and compile",
        f"% of limit: share of the speed that memory and arithmetic allow ({limits})",
    ]
    cells: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if (row["streams"], row["width"], row["tokens"]) == shape:
            cells.setdefault((row["op"], row["direction"], row["dtype"]), {})[row["impl"]] = row
    if any(op == "stack" for op, _, _ in cells):
        notes.append("stack: step joins its layers, not single_pass")
    made.caption = "\n".join(notes)
    for about, by_impl in cells.items():
        times = {impl: row["median_ms"] for impl, row in by_impl.items()}
        tuned, torch_ms = times.get("tuned"), [times[impl] for impl in ("eager", "compile") if impl in times]
        gain = f"{min(torch_ms) / tuned:.1f}x" if tuned and torch_ms else "-"
        share = number(by_impl["tuned"]["percent_of_limit"] if tuned else None)
        made.add_row(*about, *(number(times.get(impl)) for impl in impls), gain, share)
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
