"""The tile schedule of the kernels aggregate and merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tiles.family import Problem
from tiles.limits import REGISTERS, divisors, why_bad_threads, why_not_divisor, why_too_much_scratch
from tiles.target import Target

STAGED_BYTES = 32 * 1024
"""What merge's backward keeps of a token's gradients at a time: most of an L1 cache."""


@dataclass(frozen=True)
class ApplySchedule:
    """How one token's row is walked.

    block_width: columns in one lane loop, a divisor of the width; all streams of a block are handled together.
    threads: CUDA threads a block; 0 on a CPU.
    """

    block_width: int
    threads: int


def default(problem: Problem, target: Target) -> ApplySchedule:
    """On a CPU the whole row, or what of it stays near where it is staged; on CUDA as many columns as the accumulators
    leave registers for."""
    if target.kind == "cpu":
        staged = problem.op == "merge" and problem.direction == "backward"
        most = max(8, STAGED_BYTES // (4 * problem.streams)) if staged else problem.width
        return ApplySchedule(problem.width if problem.width <= most else divisors(problem.width, 8, most)[-1], 0)
    threads = 128
    fitting = [size for size in divisors(problem.width, 8, 1024) if _registers(problem, size, threads) <= REGISTERS]
    return ApplySchedule(fitting[-1] if fitting else divisors(problem.width, 8, 128)[0], threads)


def space(problem: Problem, target: Target) -> Mapping[str, tuple[int, ...]]:
    """Column blocks that divide the width, and thread counts on CUDA."""
    blocks = divisors(problem.width, 32, 2048)
    if target.kind == "cpu":
        return {"block_width": tuple(sorted({*blocks, problem.width})), "threads": (0,)}
    default_block = default(problem, target).block_width
    return {"block_width": tuple(sorted({*blocks, default_block})), "threads": (32, 64, 128, 256, 512)}


def why_invalid(problem: Problem, schedule: ApplySchedule, target: Target) -> str | None:
    """None, or the rule that the schedule breaks."""
    why = why_bad_threads(schedule.threads, target) or why_not_divisor(
        "block_width", schedule.block_width, problem.width
    )
    why = why or why_too_much_scratch(scratch(problem, schedule, target), target)
    if why or target.kind == "cpu" or schedule == default(problem, target):
        return why
    held = _registers(problem, schedule.block_width, schedule.threads)
    if held > REGISTERS:
        return f"accumulators must fit {REGISTERS} registers, got {held}: choose a smaller block_width"
    return None


def scratch(problem: Problem, schedule: ApplySchedule, target: Target) -> int:
    """Bytes of scratch."""
    staged = target.kind == "cpu" and problem.op == "merge" and problem.direction == "backward"
    return 4 * problem.streams * schedule.block_width if staged else 0


def _registers(problem: Problem, block_width: int, threads: int) -> int:
    """float32 values that a CUDA thread holds across columns: sums in the backwards, one row in the forwards."""
    n, lanes = problem.streams, -(-block_width // threads)
    sums = {("aggregate", "backward"): n, ("merge", "backward"): n * n + n}.get((problem.op, problem.direction), 0)
    return (sums + n + 2) * lanes
