"""Which stored kernel serves a problem on a device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from tiles.family import Problem
from tiles.record import Key, Record
from tiles.target import Device, why_cannot_run

How = Literal["exact", "nearest bucket", "sibling device"]


@dataclass(frozen=True)
class Choice:
    """The record to use, how near it is, and one sentence for people that says so."""

    record: Record
    how: How
    why: str


def find(records: Iterable[Record], problem: Problem, device: Device) -> Choice | None:
    """The best record for a problem, or None: exact, else the nearest token bucket, else a sibling device's.

    Programs take any token count, so another bucket's schedule is right, only perhaps slower. A sibling is a device
    of the same kind whose code runs here. Records of other sources, toolchain or format never serve: their code may
    be called differently.
    """
    wanted = Key.of(problem, device)
    usable = [
        record
        for record in records
        if replace(record.key, tokens=wanted.tokens, device=device) == wanted
        and record.key.device.kind == device.kind
        and why_cannot_run(record.key.device.arch, device) is None
    ]
    if not usable:
        return None
    best = min(usable, key=lambda record: _distance(record.key, wanted))
    return _explained(best, wanted)


def _distance(key: Key, wanted: Key) -> tuple[bool, bool, bool, int, int, str]:
    """Sorts nearer keys first: this device, its architecture, its name, then buckets by |log2|, the larger on a tie."""
    device, here = key.device, wanted.device
    steps = abs(key.tokens.bit_length() - wanted.tokens.bit_length())
    return (device != here, device.arch != here.arch, device.name != here.name, steps, -key.tokens, key.digest)


def _explained(record: Record, wanted: Key) -> Choice:
    found = record.key
    if found == wanted:
        return Choice(record, "exact", f"tuned for {found.tokens} tokens on this device, {found.device.name}")
    if found.device == wanted.device:
        why = f"tuned for {found.tokens} tokens on this device, the nearest to the {wanted.tokens} wanted"
        return Choice(record, "nearest bucket", why)
    why = (
        f"tuned for {found.tokens} tokens on {found.device.name} ({found.device.arch}), whose code runs on this "
        f"device, {wanted.device.name} ({wanted.device.arch}), for the {wanted.tokens} tokens wanted"
    )
    return Choice(record, "sibling device", why)
