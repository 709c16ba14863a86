"""The tile schedules of the kernels pre and step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tiles.kernels.apply.schedule import stages_grads
from tiles.kernels.coefficients import schedule as coefficients
from tiles.kernels.fused import chain_schedule
from tiles.kernels.fused.chain_schedule import ChainSchedule
from tiles.kernels.limits import (
    divisors,
    dots_block,
    dots_width,
    token_lanes,
    why_bad_register_block,
    why_bad_threads,
    why_not_divisor,
    why_not_multiple,
    why_too_many_dots,
    why_too_much_scratch,
)
from tiles.kernels.project.schedule import backward_scratch, forward_scratch
from tiles.kernels.spec import DTYPE_BYTES, Problem
from tiles.target import Target


@dataclass(frozen=True)
class FusedSchedule:
    """On a CPU: a block of tokens goes through all steps before the next one is touched: its streams stay cached.

    block_tokens: tokens in such a block.
    register_tokens, register_outputs: register blocks of project; register_tokens divides block_tokens.
    block_width: columns that project holds as float32; a divisor of nC forward and of C backward.
    row_width: columns in one parallel loop of aggregate and merge, where those run; a divisor of C.
    threads: 0; the launcher cuts slices.
    """

    block_tokens: int
    register_tokens: int
    register_outputs: int
    block_width: int
    row_width: int
    threads: int


Schedule = FusedSchedule | ChainSchedule

CACHED_BYTES = 512 * 1024
"""The streams of a block on a CPU: half of an L2 cache of today."""

NEAR_BYTES, NEAR_WIDTH, FAR_WIDTH, FEW_TOKENS = 32 * 1024, 64, 256, 256
"""An L1 cache, and the columns of a backward's block: NEAR_WIDTH where their x, phi and dphi fit into it. Rows of
FAR_WIDTH are longer: better for more outputs, and for FEW_TOKENS, whose phi and dphi come from farther away."""


def default(problem: Problem, target: Target) -> Schedule:
    """On a CPU as many tokens as stay cached, at most 8 register blocks; in the backward, where every block of tokens
    passes over phi and adds to dphi, at least as many as there are outputs."""
    if target.kind == "cuda":
        return chain_schedule.default(problem, target)
    forward = problem.direction == "forward"
    columns = problem.fan_in if forward else problem.width
    tokens, outputs = dots_block(problem, target) if forward else (6, 6)
    cached = min(8, max(1, CACHED_BYTES // (problem.fan_in * DTYPE_BYTES[problem.dtype] * tokens)))
    blocks = cached if forward else max(cached, -(-problem.outputs // tokens))
    near = 4 * NEAR_WIDTH * (tokens * blocks + 2 * problem.outputs) <= NEAR_BYTES and problem.tokens > FEW_TOKENS
    backward_width = NEAR_WIDTH if near else FAR_WIDTH
    width = divisors(columns, 8, dots_width(problem, target) if forward else backward_width)[-1]
    row = divisors(problem.width, 8, 128)[-1]
    return _fitting(problem, target, FusedSchedule(tokens * blocks, tokens, outputs, width, row, 0))


def _fitting(problem: Problem, target: Target, schedule: FusedSchedule) -> FusedSchedule:
    """The schedule with its token block halved until the scratch fits."""
    while (
        why_too_much_scratch(scratch(problem, schedule, target), target)
        and schedule.block_tokens > schedule.register_tokens
    ):
        half = max(1, schedule.block_tokens // schedule.register_tokens // 2) * schedule.register_tokens
        schedule = replace(schedule, block_tokens=half)
    return schedule


def space(problem: Problem, target: Target) -> Mapping[str, tuple[int, ...]]:
    """Token blocks, register blocks, column blocks; on CUDA those of the chain."""
    if target.kind == "cuda":
        return chain_schedule.space(problem, target)
    usual, forward = default(problem, target), problem.direction == "forward"
    assert isinstance(usual, FusedSchedule)
    widths = divisors(problem.fan_in, 64, 2560) if forward else divisors(problem.width, 64, 256)
    in_loops = problem.base_op == "step" or (forward and not problem.normalises)
    rows = divisors(problem.width, 64, 2048) if in_loops else ()
    return {
        "block_tokens": tuple(sorted({8, 16, 20, 24, 40, 48, 80, 96, 192, usual.block_tokens})),
        "register_tokens": (2, 3, 4, 5, 6, 8),
        "register_outputs": (2, 3, 4, 5, 6, 8),
        "block_width": tuple(sorted({*widths, usual.block_width})),
        "row_width": tuple(sorted({*rows, usual.row_width})),
        "threads": (0,),
    }


def why_invalid(problem: Problem, schedule: Schedule, target: Target) -> str | None:
    """None, or the rule that the schedule breaks."""
    if isinstance(schedule, ChainSchedule) != (target.kind == "cuda"):
        return f"a schedule must be of its target's kind, got {schedule} for {target}: tune this kernel again"
    if isinstance(schedule, ChainSchedule):
        return chain_schedule.why_invalid(problem, schedule, target)
    forward, tokens, outputs = problem.direction == "forward", schedule.register_tokens, schedule.register_outputs
    held = tokens * outputs
    return (
        why_bad_threads(schedule.threads, target)
        or why_bad_register_block(tokens, outputs)
        or why_not_multiple("block_tokens", schedule.block_tokens, tokens)
        or why_not_divisor("block_width", schedule.block_width, problem.fan_in if forward else problem.width)
        or why_not_divisor("row_width", schedule.row_width, problem.width)
        or (why_too_many_dots(held, target) if forward else None)
        or why_too_much_scratch(scratch(problem, schedule, target), target)
    )


def scratch(problem: Problem, schedule: Schedule, target: Target) -> int:
    """Bytes of scratch."""
    if isinstance(schedule, ChainSchedule):
        return chain_schedule.scratch(problem, schedule, target)
    lanes = token_lanes(schedule.block_tokens)
    if problem.direction == "forward":
        held = coefficients.forward_scratch(problem, lanes, target) + forward_scratch(problem, schedule)
        held += 2 * problem.width * problem.normalises
    else:
        held = coefficients.backward_scratch(problem, lanes, target) + backward_scratch(schedule)
        held += norm_scratch(problem, schedule) + problem.normalises * problem.streams * lanes
    copied = problem.streams * schedule.row_width if stages_grads(problem) else 0
    return 4 * held + DTYPE_BYTES[problem.dtype] * copied


def norm_scratch(problem: Problem, schedule: Any) -> int:
    """float32 values that `norm.NormScratch` holds in a backward, where there is a norm."""
    return schedule.block_tokens * (schedule.block_width + 2) if problem.normalises else 0
