"""Tables (Markdown) of the results of `mhc-tune gpu`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cli.bench import peers
from cli.gpu.plan import DECODE_TOKENS
from cli.ui.render import number
from tiles.cache.cache import write_atomically

OTHERS = (*peers.NAMES, "compile", "eager")
"""Implementations by others of the same ops."""

Row = Mapping[str, Any]


def write(values: Mapping[str, Any], path: Path) -> None:
    """Write all tables."""
    write_atomically(path, ("\n".join(_lines(values)) + "\n").encode())


def _lines(values: Mapping[str, Any]) -> Iterator[str]:
    about = ", ".join(f"{name} {version}" for name, version in values["about"].items())
    yield f"# {values['device']['name']} ({values['device']['arch']})\n\nMeasured by `mhc-tune gpu` with {about}.\n"
    rows = measured_rows(values)
    yield from _section("Numerics", _numerics(values))
    yield from _section("Share of the copy bandwidth", _shares(rows))
    yield from _section("Compared with public kernels", _comparisons(rows))
    yield from _section(f"{DECODE_TOKENS} tokens and fewer", _decode(rows))
    yield from _section("A transformer's training step", _block(values))
    yield from _section("Missing results", _missing(values))


def measured_rows(values: Mapping[str, Any]) -> list[Row]:
    """All timed rows."""
    items = (found for name, found in values["items"].items() if name.startswith("bench"))
    return [row for found in items for op in found.get("ops", {}).values() for row in op.get("rows", [])]


def by_impl(rows: Sequence[Row], names: Sequence[str]) -> dict[tuple[Any, ...], dict[str, Row]]:
    """{values of `names`: {implementation: row}}, in the order of the rows."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), {})[row["impl"]] = row
    return found


SHAPE = ("op", "direction", "streams", "width", "tokens")


def our_row(impls: Mapping[str, Row]) -> Row | None:
    """The row of the tuned kernels, or else of the default schedules."""
    return impls.get("tuned") or impls.get("default")


def fastest_other(impls: Mapping[str, Row]) -> Row | None:
    """The row of the fastest of `OTHERS`."""
    return min((impls[name] for name in OTHERS if name in impls), key=lambda row: row["median_ms"], default=None)


def _section(title: str, lines: Iterator[str]) -> Iterator[str]:
    found = list(lines)
    if found:
        yield from (f"## {title}\n", *found, "")


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    if rows:
        yield f"| {' | '.join(header)} |"
        yield "|---" * len(header) + "|"
        yield from (f"| {' | '.join(map(str, row))} |" for row in rows)


def _numerics(values: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for name, item in values["items"].items():
        for op, checked in item.get("ops", {}).items():
            if "errors" in checked:
                impl = name.split()[1]
                worst = max(checked["errors"], key=lambda result: _size(checked["errors"][result]))
                said = [
                    f"{worst} {number(checked['errors'][worst])}",
                    _yes(checked["within"]),
                    _yes(checked["repeats"]),
                ]
                rows.append([op, impl, *said])
    yield from _table(("op", "kernels", "largest relative error", "within limits", "repeats bit for bit"), rows)
    counts = values["items"].get("tests", {}).get("counts")
    if counts:
        yield "\nTests on the GPU: " + ", ".join(f"{count} {name.lower()}" for name, count in sorted(counts.items()))
    sanitizer = values["items"].get("sanitizer", {})
    if sanitizer.get("status") == "done":
        yield "\ncompute-sanitizer memcheck: no errors"


def _shares(rows: Sequence[Row]) -> Iterator[str]:
    lines = []
    large = [row for row in rows if row["tokens"] > DECODE_TOKENS and row["op"] != "layer"]
    for (op, direction, *shape), impls in by_impl(large, SHAPE).items():
        our = our_row(impls)
        if our:
            share = [number(our["median_ms"]), f"{our['gb_per_s']:.0f}", f"{our['percent_of_copy']:.0f}"]
            limit = f"{our['percent_of_limit']:.0f}"
            copied = number(impls["copy"]["median_ms"]) if "copy" in impls else "-"
            lines.append([op, direction, *shape, our["impl"], *share, limit, copied])
    header = ("op", "pass", "n", "width", "tokens", "kernels", "ms", "GB/s", "% of copy", "% of roofline", "copy ms")
    yield from _table(header, lines)


def _comparisons(rows: Sequence[Row]) -> Iterator[str]:
    lines = []
    for shape, impls in by_impl([row for row in rows if row["tokens"] > DECODE_TOKENS], SHAPE).items():
        our, other = our_row(impls), fastest_other(impls)
        if our and other:
            times = [number(impls[name]["median_ms"]) if name in impls else "-" for name in OTHERS]
            gain = f"{other['median_ms'] / our['median_ms']:.2f}"
            lines.append([*shape, number(our["median_ms"]), *times, other["impl"], gain])
    header = ("op", "pass", "n", "width", "tokens", "ours ms", *(f"{name} ms" for name in OTHERS), "fastest", "times")
    yield from _table(header, lines)


def _decode(rows: Sequence[Row]) -> Iterator[str]:
    lines = []
    for shape, impls in by_impl([row for row in rows if row["tokens"] <= DECODE_TOKENS], SHAPE).items():
        our, other = our_row(impls), fastest_other(impls)
        if not our:
            continue
        others = [f"{other['impl']} {number(1e3 * other['median_ms'])}"] if other else ["-"]
        unsplit = number(1e3 * impls["unsplit"]["median_ms"]) if "unsplit" in impls else "-"
        host = number(our.get("host_us"))
        lines.append([*shape, our["impl"], number(1e3 * our["median_ms"]), unsplit, *others, host])
    header = ("op", "pass", "n", "width", "tokens", "kernels", "us", "unsplit us", "fastest other us", "CPU us a call")
    yield from _table(header, lines)


def _block(values: Mapping[str, Any]) -> Iterator[str]:
    found = values["items"].get("block", {}).get("ops", {}).get("block", {})
    rows = [
        [
            row["network"],
            number(row["median_ms"]),
            f"{row['overhead_percent']:.1f}",
            number(row["peak_bytes"] / 2**20) if row["peak_bytes"] is not None else "-",
        ]
        for row in found.get("rows", [])
    ]
    if rows:
        yield f"{found['layers']} layers, n = {found['streams']}, width {found['width']}, {found['tokens']} tokens, "
        yield f"{found['dtype']}, forward and backward.\n"
    yield from _table(("network", "ms", "% over plain", "peak MiB"), rows)


def _missing(values: Mapping[str, Any]) -> Iterator[str]:
    for name, item in values["items"].items():
        if item.get("status") != "done":
            yield f"- {name}: {item.get('status')}, {item.get('why', '')}"
        for op in item.get("ops", {}).values():
            yield from (f"- {line}" for line in op.get("skipped", []))


def _size(error: float | None) -> float:
    return float("inf") if error is None else error


def _yes(value: bool) -> str:
    return "yes" if value else "NO"
