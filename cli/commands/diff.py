"""`mhc-tune diff`: what differs between two packs or cache folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.commands.packs import PATH_HELP, described, open_shelf, warn
from cli.ui.options import JsonOption
from cli.ui.output import say, show, show_json
from cli.ui.render import SHAPE, device_text, number, shape_of, table
from tiles.cache.record import Record
from tiles.target import Device


@dataclass(frozen=True)
class Difference:
    """One kernel's difference: a record is None where a side has no such kernel; `changed` says what is not equal."""

    a: Record | None
    b: Record | None
    changed: tuple[str, ...]

    @property
    def record(self) -> Record:
        """A record of the kernel."""
        record = self.a or self.b
        assert record
        return record


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help=PATH_HELP)],
    b: Annotated[Path, typer.Argument(metavar="B", help=PATH_HELP)],
    json: JsonOption = False,
) -> None:
    """Show which kernels only one of two packs or cache folders holds, and whose schedule, code or times differ.

    Kernels are the same where op, shape and device are; of several versions of one, this version's or else the latest
    counts. Exits with 0 when both hold the same and with 1 when they do not. Dates, hosts and commands do not count.
    """
    sides = []
    for path in (a, b):
        shelf = open_shelf(path)
        sides.append(shelf.records())
        warn(shelf.complaints)
    found = differences(*sides)
    if json:
        show_json({"a": str(a), "b": str(b), "equal": not found, "differences": [_described(item) for item in found]})
    elif found:
        show(_table(found, f"{a} (A) against {b} (B)"))
    say(f"{len(found)} kernels differ" if found else "both hold the same kernels")
    if found:
        raise typer.Exit(1)


def differences(a: Sequence[Record], b: Sequence[Record]) -> list[Difference]:
    """What differs, kernel by kernel, ordered by shape."""
    ours, theirs = _by_kernel(a), _by_kernel(b)
    found = []
    for kernel in sorted(ours.keys() | theirs.keys(), key=_order):
        one, other = ours.get(kernel), theirs.get(kernel)
        changed = _changed(one, other) if one and other else ("only in A" if one else "only in B",)
        if changed:
            found.append(Difference(one, other, changed))
    return found


_Kernel = tuple[tuple[str, str, int, int, int, str], int, Device]
"""Shape, Sinkhorn rounds and device."""


def _by_kernel(records: Sequence[Record]) -> dict[_Kernel, Record]:
    """One record a kernel; those that count come last and stay."""

    def weight(record: Record) -> tuple[bool, str]:
        return record.key.current, str(record.provenance.get("date", ""))

    return {
        (shape_of(record.key.problem), record.key.rounds, record.key.device): record
        for record in sorted(records, key=weight)
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
    made = table(title, ("differs", *SHAPE), ("A ms", "B ms", "B / A"))
    made.add_column("schedule", overflow="fold")
    made.add_column("device", overflow="fold")
    for item in found:
        times = [side.measurement.get("tuned_ms") if side else None for side in (item.a, item.b)]
        made.add_row(
            ", ".join(item.changed),
            *map(str, shape_of(item.record.key.problem)),
            *map(number, times),
            number(times[1] / times[0] if times[0] and times[1] else None),
            _schedule_change(item),
            device_text(item.record.key.device),
        )
    return made


def _schedule_change(item: Difference) -> str:
    """The tunables that differ, as `block_width=64 -> 128`."""
    if not item.a or not item.b:
        return ""
    a, b = item.a.schedule, item.b.schedule
    names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    return " ".join(f"{name}={a.get(name, '-')} -> {b.get(name, '-')}" for name in names)


def _described(item: Difference) -> dict[str, Any]:
    return {
        "problem": item.record.key.problem.describe(),
        "device": item.record.key.device.as_dict(),
        "changed": list(item.changed),
        "a": described(item.a) if item.a else None,
        "b": described(item.b) if item.b else None,
    }
