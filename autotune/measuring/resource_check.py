"""Resource check of compiled CUDA kernels: registers, shared memory and occupancy, before a kernel runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tiles.compiler.compile import Artifact
from tiles.kernels.occupancy import occupancy


@dataclass(frozen=True)
class ResourceUsage:
    """The resources of a kernel that the compiler reports, and its occupancy of one multiprocessor.

    Fields:
        threads: per block.
        registers: 32-bit registers per thread.
        spilled_bytes: spill stores and loads per thread, in bytes of code that runs once.
        shared_bytes: shared memory per block, static and dynamic.
        resident_blocks: blocks per multiprocessor.
        occupancy_percent: their warps, of the most that a multiprocessor can hold.
        limited_by: the resource that limits the blocks (`occupancy.Occupancy`).
    """

    threads: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    resident_blocks: int
    occupancy_percent: float
    limited_by: str


def resource_usage(artifact: Artifact) -> ResourceUsage | None:
    """The resource usage of CUDA code; None for a CPU's, whose compiler reports none."""
    if artifact.target.kind == "cpu":
        return None
    details = artifact.details
    shared = details["static_shared_bytes"] + details["dynamic_shared_bytes"]
    found = occupancy(artifact.target.arch, details["threads"], details["registers"], shared)
    return ResourceUsage(
        threads=details["threads"],
        registers=details["registers"],
        spilled_bytes=details["spill_stores"] + details["spill_loads"],
        shared_bytes=shared,
        resident_blocks=found.blocks,
        occupancy_percent=found.percent,
        limited_by=found.limited_by,
    )


def why_rejected(artifact: Artifact, others: Iterable[Artifact]) -> str | None:
    """Why a kernel is not timed, in one line, or None where it may win.

    It cannot run where not one block fits a multiprocessor. It is not worth timing where it spills registers and one of
    the `others`, schedules of the same kernel, does not.
    """
    usage = resource_usage(artifact)
    if usage is None:
        return None
    arch = artifact.target.arch
    if usage.resident_blocks == 0:
        return (
            f"DoesNotFit: one block must fit a multiprocessor of {arch}, got {usage.threads} threads of "
            f"{usage.registers} registers and {usage.shared_bytes} bytes of shared memory: too much {usage.limited_by}"
        )
    if usage.spilled_bytes and any(_spills_nothing(other) for other in others):
        return (
            f"Spills: {usage.spilled_bytes} bytes of registers go to local memory and back on {arch} at "
            f"{usage.registers} registers a thread, where another schedule spills nothing"
        )
    return None


def _spills_nothing(artifact: Artifact) -> bool:
    usage = resource_usage(artifact)
    return usage is not None and usage.spilled_bytes == 0 and usage.resident_blocks > 0
