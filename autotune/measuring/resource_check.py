"""What a compiled CUDA kernel shows before it runs: resources, and whether they leave it a chance to win."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tiles.compiler.compile import Artifact
from tiles.kernels.occupancy import occupancy


@dataclass(frozen=True)
class Look:
    """What the compiler reports of a kernel, and what follows for one multiprocessor.

    Fields:
        threads: of a block.
        registers: 32-bit registers of a thread.
        spilled_bytes: stores and loads of a thread that the lack of registers adds, in bytes of code that runs once.
        shared_bytes: shared memory of a block, static and dynamic.
        resident_blocks: how many blocks a multiprocessor holds at a time.
        occupancy_percent: their warps, of the most that it can hold.
        limited_by: what keeps more blocks out (`occupancy.Occupancy`).
    """

    threads: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    resident_blocks: int
    occupancy_percent: float
    limited_by: str


def look(artifact: Artifact) -> Look | None:
    """The look of CUDA code; None for a CPU's, whose compiler reports nothing."""
    if artifact.target.kind == "cpu":
        return None
    details = artifact.details
    shared = details["static_shared_bytes"] + details["dynamic_shared_bytes"]
    found = occupancy(artifact.target.arch, details["threads"], details["registers"], shared)
    return Look(
        threads=details["threads"],
        registers=details["registers"],
        spilled_bytes=details["spill_stores"] + details["spill_loads"],
        shared_bytes=shared,
        resident_blocks=found.blocks,
        occupancy_percent=found.percent,
        limited_by=found.limited_by,
    )


def why_cannot_win(artifact: Artifact, others: Iterable[Artifact]) -> str | None:
    """Why a kernel need not be timed, in one line, or None where it may win.

    It cannot run where not one block fits a multiprocessor. It is not worth its time where it spills registers and one
    of the `others`, schedules of the same kernel, does without.
    """
    seen = look(artifact)
    if seen is None:
        return None
    arch = artifact.target.arch
    if seen.resident_blocks == 0:
        return (
            f"DoesNotFit: one block must fit a multiprocessor of {arch}, got {seen.threads} threads of "
            f"{seen.registers} registers and {seen.shared_bytes} bytes of shared memory: too much {seen.limited_by}"
        )
    if seen.spilled_bytes and any(_spills_nothing(other) for other in others):
        return (
            f"Spills: {seen.spilled_bytes} bytes of registers go to local memory and back on {arch} at "
            f"{seen.registers} registers a thread, where another schedule spills nothing"
        )
    return None


def _spills_nothing(artifact: Artifact) -> bool:
    seen = look(artifact)
    return seen is not None and seen.spilled_bytes == 0 and seen.resident_blocks > 0
