"""The ways to run a problem, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mhc.dispatch.kernel_report import Runs
from tiles.cache.compiled_here import Subfolder
from tiles.cache.lookup import Candidate
from tiles.cache.record import Record
from tiles.cache.shipped import ShippedRecord
from tiles.kernels.spec import Problem

ASKED_FOR = "the torch reference was asked for"


@dataclass(frozen=True)
class Option:
    """One way to run a problem.

    Fields:
        runs, why: what it is, and one sentence about how near it is.
        refused: why it does not serve, or None.
        schedule: of a kernel; None for what is made of other kernels or of torch.
        code: the record whose own code is ready; where there is none, the schedule is compiled.
        because: why a stored kernel's own code is not called.
        compiled_for: the problem that a compiled schedule is kept under, in `folder`.
        sibling: whether it was tuned on another device.
    """

    runs: Runs
    why: str
    refused: str | None = None
    schedule: Mapping[str, Any] | None = None
    code: Record | None = None
    because: str | None = None
    compiled_for: Problem | None = None
    folder: Subfolder = "recompiled"
    sibling: bool = False


def tuned_option(found: Candidate[Record]) -> Option:
    """A stored record: its own code, its schedule compiled here, or the separate kernels where they were faster."""
    record, sibling = found.record, found.match == "sibling device"
    if record.measurement.get("separate_wins", False):
        why = f"{found.match}: faster than the fused kernel {found.why}"
        return Option("separate", why, found.why_refused, sibling=sibling)
    return Option(
        "tuned" if found.why_recompile is None else "recompiled",
        f"{found.match}: {found.why}",
        found.why_refused,
        record.schedule,
        code=record if found.why_recompile is None else None,
        because=found.why_recompile,
        compiled_for=record.key.problem,
        sibling=sibling,
    )


def shipped_option(found: Candidate[ShippedRecord]) -> Option:
    """A schedule that came with this package."""
    why = f"shipped schedule, {found.match}: {found.why.replace('tuned', 'measured', 1)}"
    if found.record.measurement.get("separate_wins", False):
        return Option("separate", why, found.why_refused)
    return Option("shipped", why, found.why_refused, found.record.schedule, compiled_for=found.record.key.problem)
