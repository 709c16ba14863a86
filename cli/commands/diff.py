"""`mhc-tune diff`: differences between two packs or cache folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.ui.options import PATH_HELP, JsonOption, cache_or_pack
from cli.ui.output import say, show, show_json, warn
from cli.ui.render import device_text, number, record_json, shape_of, table
from tiles.cache.record import Record
from tiles.target import Device


@dataclass(frozen=True)
class Difference:
    """Difference of one kernel: None for a side that lacks it; `changed` names what is not equal."""

    a: Record | None
    b: Record | None
    changed: tuple[str, ...]

    @property
    def record(self) -> Record:
        """The record of A, or else of B."""
        record = self.a or self.b
        assert record
        return record


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help=PATH_HELP)],
    b: Annotated[Path, typer.Argument(metavar="B", help=PATH_HELP)],
    json: JsonOption = False,
) -> None:
    """Compare two packs or cache folders: missing kernels, and different schedules, code or times.

    Kernels are matched by op, shape and device; among several versions of one, this version counts, or else the latest.
    Dates, hosts and commands are not compared. Exits with 0 when both hold the same and with 1 when they differ.
    """
    sides = []
    for path in (a, b):
        source = cache_or_pack(path)
        sides.append(source.records())
        warn(source.complaints)
    found = differences(*sides)
    if json:
        show_json({"a": str(a), "b": str(b), "equal": not found, "differences": [_as_json(item) for item in found]})
    elif found:
        show(_table(found, f"{a} (A) against {b} (B)"))
    say(f"{len(found)} kernels differ" if found else "both hold the same kernels")
    if found:
        raise typer.Exit(1)


def differences(a: Sequence[Record], b: Sequence[Record]) -> list[Difference]:
    """The kernels that differ, ordered by shape."""
    in_a, in_b = _by_kernel(a), _by_kernel(b)
    found = []
    for kernel in sorted(in_a.keys() | in_b.keys(), key=_order):
        one, other = in_a.get(kernel), in_b.get(kernel)
        changed = _changed(one, other) if one and other else ("only in A" if one else "only in B",)
        if changed:
            found.append(Difference(one, other, changed))
    return found


_Kernel = tuple[tuple[str, str, int, int, int, str], int, Device]
"""Shape, Sinkhorn rounds and device."""


def _by_kernel(records: Sequence[Record]) -> dict[_Kernel, Record]:
    """One record per kernel: sorted so that the one that counts comes last and overwrites the others."""

    def precedence(record: Record) -> tuple[bool, str]:
        return record.key.current, str(record.provenance.get("date", ""))

    return {
        (shape_of(record.key.problem), record.key.rounds, record.key.device): record
        for record in sorted(records, key=precedence)
    }


def _order(kernel: _Kernel) -> tuple[Any, ...]:
    shape, rounds, device = kernel
    return shape, rounds, device.name, device.arch, device.units, device.l2_bytes


def _changed(a: Record, b: Record) -> tuple[str, ...]:
    same = {
        "version": (a.key.toolchain, a.key.sources) == (b.key.toolchain, b.key.sources),
        "schedule": a.schedule == b.schedule,
        "code": a.sha256 == b.sha256,
        "measured": a.measurement == b.measurement,
    }
    return tuple(name for name, equal in same.items() if not equal)


def _table(found: Sequence[Difference], title: str) -> Any:
    made = table(title, (), ())
    for name in ("differs", "kernel"):
        made.add_column(name)
    for name in ("A ms", "B ms", "B / A"):
        made.add_column(name, justify="right")
    for name in ("schedule", "device"):
        made.add_column(name)
    for item in found:
        times = [side.measurement.get("tuned_ms") if side else None for side in (item.a, item.b)]
        made.add_row(
            ", ".join(item.changed),
            item.record.key.problem.describe(),
            *map(number, times),
            number(times[1] / times[0] if times[0] and times[1] else None),
            _schedule_change(item),
            device_text(item.record.key.device),
        )
    return made


def _schedule_change(item: Difference) -> str:
    """The tunables that differ, such as `block_width=64 -> 128`."""
    if not item.a or not item.b:
        return ""
    a, b = item.a.schedule, item.b.schedule
    names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    return " ".join(f"{name}={a.get(name, '-')} -> {b.get(name, '-')}" for name in names)


def _as_json(item: Difference) -> dict[str, Any]:
    return {
        "problem": item.record.key.problem.describe(),
        "device": item.record.key.device.as_dict(),
        "changed": list(item.changed),
        "a": record_json(item.a) if item.a else None,
        "b": record_json(item.b) if item.b else None,
    }
