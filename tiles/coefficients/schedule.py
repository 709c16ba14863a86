"""The tile schedule of the kernels coefficients and sinkhorn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tiles.family import Problem
from tiles.limits import scratch_bytes, why_bad_threads, why_too_much_scratch
from tiles.target import Target


@dataclass(frozen=True)
class CoefficientsSchedule:
    """How many tokens are worked on at once.

    block_tokens: lanes, one token each.
    threads: CUDA threads a block; 0 on a CPU.
    """

    block_tokens: int
    threads: int


def default(problem: Problem, target: Target) -> CoefficientsSchedule:
    """The most lanes up to 32 whose scratch fits."""
    lanes = 32
    while lanes > 1 and 4 * _floats(problem, lanes) > scratch_bytes(target):
        lanes //= 2
    return CoefficientsSchedule(lanes, 0 if target.kind == "cpu" else 32)


def space(problem: Problem, target: Target) -> Mapping[str, tuple[int, ...]]:
    """Lanes; thread counts on CUDA."""
    lanes = {8, 16, 32, 64, 128, default(problem, target).block_tokens}
    return {"block_tokens": tuple(sorted(lanes)), "threads": (0,) if target.kind == "cpu" else (32, 64, 128)}


def why_invalid(problem: Problem, schedule: CoefficientsSchedule, target: Target) -> str | None:
    """None, or the rule that the schedule breaks."""
    lanes = schedule.block_tokens
    if not 1 <= lanes <= 1024:
        return f"block_tokens must be in 1..1024, got {lanes}: choose 32"
    return why_bad_threads(schedule.threads, target) or why_too_much_scratch(scratch(problem, schedule, target), target)


def scratch(problem: Problem, schedule: CoefficientsSchedule, target: Target) -> int:
    """Bytes of scratch."""
    return 4 * _floats(problem, schedule.block_tokens)


def _floats(problem: Problem, lanes: int) -> int:
    """float32 values that the program's scratch holds."""
    n = problem.streams
    if problem.op == "coefficients":
        return forward_scratch(problem, lanes) if problem.direction == "forward" else backward_scratch(problem, lanes)
    held = 2 * n * n + n
    if problem.direction == "backward":
        held += n * n + 2 * n * max(1, problem.rounds - 1)
    return held * lanes


def forward_scratch(problem: Problem, lanes: int) -> int:
    """float32 values that `programs.Forward` holds in scratch."""
    n = problem.streams
    return (2 * n * n + 3 * n + 1) * lanes


def backward_scratch(problem: Problem, lanes: int) -> int:
    """float32 values that `programs.Backward` holds in scratch."""
    n = problem.streams
    held = 2 * n * max(1, problem.rounds - 1) + n * n + 2 * n + 2 * problem.outputs + 4
    return forward_scratch(problem, lanes) + held * lanes
