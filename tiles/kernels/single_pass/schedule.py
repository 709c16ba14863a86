"""The tile schedules of single_pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tiles.kernels.coefficients import schedule as coefficients
from tiles.kernels.fused import chain_schedule
from tiles.kernels.fused.chain_schedule import ChainSchedule
from tiles.kernels.fused.schedule import norm_scratch
from tiles.kernels.limits import (
    divisors,
    dots_block,
    nontemporal_choices,
    token_lanes,
    why_bad_nontemporal,
    why_bad_register_block,
    why_not_divisor,
    why_not_multiple,
    why_too_many_dots,
    why_too_much_scratch,
)
from tiles.kernels.spec import DTYPE_BYTES, Problem
from tiles.lang.storage import DOT_LANES
from tiles.target import Target


@dataclass(frozen=True)
class SinglePassSchedule:
    """On a CPU: tokens by columns of all streams are done with before the next ones are touched.

    block_tokens: tokens whose coefficients are computed side by side; backward, also those that share one addition to
        dphi.
    register_tokens, register_outputs: register blocks of project; register_tokens divides block_tokens.
    block_width: columns of each stream that a row is taken by; a divisor of C.
    nontemporal: 1 where x' and u' (backward dx and df) are stored past the caches.
    """

    block_tokens: int
    register_tokens: int
    register_outputs: int
    block_width: int
    nontemporal: int = 0


Schedule = SinglePassSchedule | ChainSchedule

CACHE_LINE, PAGE = 16, 1024
"""Floats of a cache line, and of all sets of an L1 cache."""

FEW_STREAMS, MANY_STREAMS, FEW_TOKENS = 4, 8, 256

FORWARD_COLUMNS, STREAM_COLUMNS = 20480, 1280
"""Columns of all streams that a forward's default stages for a register block of tokens, most of a scratch, and the
most of each of FEW_STREAMS, of which phi would stay cached."""

BACKWARD_COLUMNS, FEW_TOKENS_COLUMNS = 128, 256
"""Columns of each stream that a backward's default takes at a time; twice as many for FEW_TOKENS, whose phi and dphi
come from farther away, in long rows."""


def default(problem: Problem, target: Target) -> Schedule:
    """On a CPU forward all columns, or what of a register block of tokens stays cached. Backward, where every block of
    tokens passes over phi and adds to dphi, more tokens, and columns of which their x' stay cached."""
    if target.kind == "cuda":
        return chain_schedule.default(problem, target)
    forward = problem.direction == "forward"
    tokens, outputs = dots_block(problem, target) if forward else (6, 6)
    if forward:
        few_streams = problem.streams <= FEW_STREAMS
        blocks, columns = 8, STREAM_COLUMNS if few_streams else FORWARD_COLUMNS // problem.streams
    else:
        few_tokens = problem.tokens <= FEW_TOKENS
        blocks = 4 if problem.streams > MANY_STREAMS else 6 if few_tokens else 8
        columns = FEW_TOKENS_COLUMNS if few_tokens else BACKWARD_COLUMNS
    width = divisors(problem.width, 8, columns)[-1]
    nontemporal = nontemporal_choices(problem, problem.streams, target)[0]
    return _fitting(problem, target, SinglePassSchedule(tokens * blocks, tokens, outputs, width, nontemporal))


def _fitting(problem: Problem, target: Target, schedule: SinglePassSchedule) -> SinglePassSchedule:
    """The schedule with its columns, then its token block halved until the scratch fits."""
    while why_too_much_scratch(scratch(problem, schedule, target), target):
        narrower = divisors(problem.width, 8, max(8, schedule.block_width - 8))[-1]
        if narrower < schedule.block_width:
            schedule = replace(schedule, block_width=narrower)
        elif schedule.block_tokens > schedule.register_tokens:
            half = max(1, schedule.block_tokens // schedule.register_tokens // 2) * schedule.register_tokens
            schedule = replace(schedule, block_tokens=half)
        else:
            break
    return schedule


def space(problem: Problem, target: Target) -> Mapping[str, tuple[int, ...]]:
    """Token blocks, register blocks, column blocks; on CUDA those of the chain."""
    if target.kind == "cuda":
        return chain_schedule.space(problem, target)
    usual = default(problem, target)
    assert isinstance(usual, SinglePassSchedule)
    return {
        "block_tokens": tuple(sorted({4, 8, 16, 20, 24, 40, 48, 96, usual.block_tokens})),
        "register_tokens": (2, 3, 4, 5, 6, 8),
        "register_outputs": (2, 3, 4, 5, 6, 8),
        "block_width": tuple(sorted({*divisors(problem.width, 32, 1280), usual.block_width})),
        "nontemporal": tuple(sorted(nontemporal_choices(problem, problem.streams, target))),
    }


def why_invalid(problem: Problem, schedule: Schedule, target: Target) -> str | None:
    """None, or the rule that the schedule breaks."""
    if isinstance(schedule, ChainSchedule) != (target.kind == "cuda"):
        return f"a schedule must be of its target's kind, got {schedule} for {target}: tune this kernel again"
    if isinstance(schedule, ChainSchedule):
        return chain_schedule.why_invalid(problem, schedule, target)
    tokens, outputs = schedule.register_tokens, schedule.register_outputs
    return (
        why_bad_nontemporal(schedule.nontemporal, target)
        or why_bad_register_block(tokens, outputs)
        or why_not_multiple("block_tokens", schedule.block_tokens, tokens)
        or why_not_divisor("block_width", schedule.block_width, problem.width)
        or (why_too_many_dots(tokens * outputs, target) if problem.direction == "forward" else None)
        or why_too_much_scratch(scratch(problem, schedule, target), target)
    )


def scratch(problem: Problem, schedule: Schedule, target: Target) -> int:
    """Bytes of scratch."""
    if isinstance(schedule, ChainSchedule):
        return chain_schedule.scratch(problem, schedule, target)
    tokens, rows = schedule.block_tokens, schedule.register_tokens
    row = tile_row(problem, schedule)
    if problem.direction == "forward":
        results = _results_scratch(problem, schedule, problem.streams)
        held = rows * (problem.outputs * DOT_LANES + 1 + row + problem.normalises)
        return 4 * (coefficients.forward_scratch(problem, token_lanes(tokens), target) + held) + results
    results = _results_scratch(problem, schedule, problem.streams + 1)
    held = tokens * problem.outputs + tokens * row + norm_scratch(problem, schedule)
    return 4 * (coefficients.backward_scratch(problem, token_lanes(tokens), target) + held) + results


def _results_scratch(problem: Problem, schedule: SinglePassSchedule, rows: int) -> int:
    """Bytes of results that are kept before they go past the caches."""
    return schedule.nontemporal * rows * schedule.block_width * DTYPE_BYTES[problem.dtype]


def tile_row(problem: Problem, schedule: SinglePassSchedule) -> int:
    """Floats from one row of a tile of all streams to the next. Rows of whole pages would share the sets of a cache:
    forward those of a register block, which are read side by side, begin in sets that lie evenly apart."""
    columns = problem.streams * schedule.block_width
    if problem.direction == "backward":
        return columns + CACHE_LINE
    apart = PAGE // schedule.register_tokens // CACHE_LINE * CACHE_LINE
    return columns + (apart - columns) % PAGE
