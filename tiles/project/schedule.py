"""The tile schedules of project, forward and backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tiles.family import Problem
from tiles.limits import REGISTERS, divisors, why_bad_threads, why_not_divisor, why_too_much_scratch
from tiles.target import Target


@dataclass(frozen=True)
class ForwardSchedule:
    """A register block of tokens × outputs whose dot products run over blocks of columns.

    block_tokens: tokens in a register block.
    block_outputs: outputs (rows of phi) in a register block.
    block_width: columns of x̄ that are held as float32 while all outputs pass over them; a divisor of nC.
    threads: CUDA threads a block; 0 on a CPU.
    """

    block_tokens: int
    block_outputs: int
    block_width: int
    threads: int


@dataclass(frozen=True)
class BackwardSchedule:
    """A block of columns whose part of phi and dphi stays near while the tokens pass over it.

    The fields mean what they mean in the forward.
    """

    block_tokens: int
    block_outputs: int
    block_width: int
    threads: int


Schedule = ForwardSchedule | BackwardSchedule


def default(problem: Problem, target: Target) -> Schedule:
    """24 accumulators fill the vector registers of a CPU core; its L1 cache holds the columns."""
    forward = problem.direction == "forward"
    if target.kind == "cpu":
        block = divisors(problem.fan_in, 64, 640 if forward else 128)[-1]
        return ForwardSchedule(6, 4, block, 0) if forward else BackwardSchedule(4, 4, block, 0)
    block = divisors(problem.fan_in, 64, 512 if forward else 64)[-1]
    return ForwardSchedule(2, 4, block, 128) if forward else BackwardSchedule(4, 4, block, 64)


def space(problem: Problem, target: Target) -> Mapping[str, tuple[int, ...]]:
    """Register blocks and column blocks; thread counts on CUDA."""
    forward = problem.direction == "forward"
    blocks = {*divisors(problem.fan_in, 64, 1280 if forward else 512), default(problem, target).block_width}
    return {
        "block_tokens": (2, 3, 4, 6, 8),
        "block_outputs": (2, 3, 4, 6, 8),
        "block_width": tuple(sorted(blocks)),
        "threads": (0,) if target.kind == "cpu" else (64, 128, 256),
    }


def why_invalid(problem: Problem, schedule: Schedule, target: Target) -> str | None:
    """None, or the rule that the schedule breaks."""
    tokens, outputs, width = schedule.block_tokens, schedule.block_outputs, schedule.block_width
    if not (1 <= tokens <= 16 and 1 <= outputs <= 16):
        return f"block_tokens and block_outputs must be in 1..16, got {tokens} and {outputs}: choose 4 and 4"
    why = why_bad_threads(schedule.threads, target) or why_not_divisor("block_width", width, problem.fan_in)
    if why:
        return why
    held = tokens * outputs
    if target.kind == "cpu" and held > 32:
        return f"block_tokens × block_outputs must fit 32 vector registers, got {held}: choose smaller blocks"
    if target.kind == "cuda" and (held + 2 * tokens) * -(-width // schedule.threads) > REGISTERS:
        return f"the register block of {held} × {width} columns must fit {REGISTERS} registers: choose smaller blocks"
    shared = problem.outputs * (tokens if problem.direction == "forward" else width)
    staged = 2 * tokens * width if target.kind == "cpu" else 0
    return why_too_much_scratch(shared + staged, target)
