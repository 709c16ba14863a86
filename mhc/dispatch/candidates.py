"""Candidates: the ways to run a problem, as plain data."""

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

REFERENCE_REQUESTED = "the torch reference was asked for"


@dataclass(frozen=True)
class KernelCandidate:
    """One way to run a problem.

    Fields:
        runs, why: its kind, and one sentence on how close a match it is.
        why_refused: why it cannot run, or None.
        schedule: the kernel's schedule; None for separate kernels and the torch reference.
        code: the record whose binary is ready to load; None where the schedule has to be compiled.
        why_recompile: why a stored kernel's own binary is not used.
        compiled_for: the problem that a compiled schedule is stored under, in `folder`.
        sibling: whether it was tuned on another device.
    """

    runs: Runs
    why: str
    why_refused: str | None = None
    schedule: Mapping[str, Any] | None = None
    code: Record | None = None
    why_recompile: str | None = None
    compiled_for: Problem | None = None
    folder: Subfolder = "recompiled"
    sibling: bool = False

    @property
    def as_recompiled(self) -> str:
        """`, as ...`: the end of a sentence on a schedule that is compiled here."""
        return f", as {self.why_recompile}" if self.why_recompile else ""


def tuned_candidate(stored: Candidate[Record]) -> KernelCandidate:
    """A stored record: its own binary, its schedule compiled here, or the separate kernels where they were faster."""
    record, sibling = stored.record, stored.match == "sibling device"
    if record.measurement.get("separate_wins", False):
        why = f"{stored.match}: faster than the fused kernel {stored.why}"
        return KernelCandidate("separate", why, stored.why_refused, sibling=sibling)
    return KernelCandidate(
        "tuned" if stored.why_recompile is None else "recompiled",
        f"{stored.match}: {stored.why}",
        stored.why_refused,
        record.schedule,
        code=record if stored.why_recompile is None else None,
        why_recompile=stored.why_recompile,
        compiled_for=record.key.problem,
        sibling=sibling,
    )


def shipped_candidate(stored: Candidate[ShippedRecord]) -> KernelCandidate:
    """A schedule that ships with this package."""
    why = f"shipped schedule, {stored.match}: {stored.why.replace('tuned', 'measured', 1)}"
    if stored.record.measurement.get("separate_wins", False):
        return KernelCandidate("separate", why, stored.why_refused)
    key = stored.record.key
    return KernelCandidate("shipped", why, stored.why_refused, stored.record.schedule, compiled_for=key.problem)
