"""The tile schedule of the kernels coefficients and sinkhorn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tiles.kernels.limits import owned_scratch, scratch_bytes, why_too_much_scratch
from tiles.kernels.spec import Problem
from tiles.target import Target


@dataclass(frozen=True)
class CoefficientsSchedule:
    """How many tokens are worked on at once.

    block_tokens: tokens of a block; on CUDA a thread takes one.
    """

    block_tokens: int


def default(problem: Problem, target: Target) -> CoefficientsSchedule:
    """The most tokens up to 32 whose scratch fits."""
    tokens = 32
    while tokens > 1 and scratch(problem, CoefficientsSchedule(tokens), target) > scratch_bytes(target):
        tokens //= 2
    return CoefficientsSchedule(tokens)


def space(problem: Problem, target: Target) -> Mapping[str, tuple[int, ...]]:
    """Tokens of a block."""
    return {"block_tokens": tuple(sorted({8, 16, 32, 64, 128, default(problem, target).block_tokens}))}


def why_invalid(problem: Problem, schedule: CoefficientsSchedule, target: Target) -> str | None:
    """None, or the rule that the schedule breaks."""
    tokens = schedule.block_tokens
    if not 1 <= tokens <= 1024:
        return f"block_tokens must be in 1..1024, got {tokens}: choose 32"
    return why_too_much_scratch(scratch(problem, schedule, target), target)


def scratch(problem: Problem, schedule: CoefficientsSchedule, target: Target) -> int:
    """Bytes of scratch."""
    n, tokens, owned = problem.streams, schedule.block_tokens, owned_scratch(target)
    if problem.op == "coefficients":
        held = forward_scratch if problem.direction == "forward" else backward_scratch
        return 4 * held(problem, tokens, target)
    matrix, column = owned(n * n), owned(n)
    if problem.direction == "forward":
        return 4 * tokens * (2 * matrix + column)
    return 4 * tokens * (n * n + 2 * matrix + column + 2 * n * max(1, problem.rounds - 1))


def forward_scratch(problem: Problem, tokens: int, target: Target) -> int:
    """float32 values that `gates.Forward` holds in scratch."""
    n, owned = problem.streams, owned_scratch(target)
    of_res = 2 * owned(n * n) + owned(n) if problem.mixes else 0
    return tokens * (of_res + 2 * owned(n) + owned(1))


def backward_scratch(problem: Problem, tokens: int, target: Target) -> int:
    """float32 values that `gates.Backward` holds in scratch."""
    n, outputs, owned = problem.streams, problem.outputs, owned_scratch(target)
    forward, given, sums = 2 * owned(n) + owned(1), 2 * n, outputs + problem.maps
    of_res = n * n + 2 * owned(n * n) + owned(n) + 2 * n * max(1, problem.rounds - 1) if problem.mixes else 0
    return tokens * (forward + of_res + given + owned(outputs) + 2 * owned(1) + sums)
