"""The tile schedules of project, forward and backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tiles.kernels.limits import (
    divisors,
    dots_block,
    dots_width,
    nontemporal_choices,
    why_bad_nontemporal,
    why_bad_register_block,
    why_bad_threads,
    why_not_divisor,
    why_not_multiple,
    why_too_many_dots,
    why_too_much_scratch,
)
from tiles.kernels.project import tensor_core_schedule
from tiles.kernels.project.tensor_core_schedule import TiledSchedule
from tiles.kernels.spec import DTYPE_BYTES, Problem
from tiles.lang.storage import DOT_LANES
from tiles.target import Target


@dataclass(frozen=True)
class ForwardSchedule:
    """On a CPU: a register block of tokens × outputs whose dot products run over blocks of columns.

    register_tokens, register_outputs: tokens and outputs (rows of phi) in a register block.
    block_width: columns of x̄ that are held as float32 while all outputs pass over them; a divisor of nC.
    threads: 0; the launcher cuts slices.
    """

    register_tokens: int
    register_outputs: int
    block_width: int
    threads: int


@dataclass(frozen=True)
class BackwardSchedule:
    """On a CPU: blocks of tokens × columns that are read once for both gradients.

    block_tokens: tokens whose products with dz are summed in registers before they are added to dphi.
    register_tokens: tokens in a register block of dx; a divisor of block_tokens.
    register_outputs: outputs in a register block of dphi.
    block_width: columns in a block; a divisor of nC / column_groups.
    column_groups: parts of the columns, each swept over all tokens by itself.
    threads: 0; the launcher cuts slices.
    nontemporal: 1 where dx is stored past the caches.
    """

    block_tokens: int
    register_tokens: int
    register_outputs: int
    block_width: int
    column_groups: int
    threads: int
    nontemporal: int = 0


OnCpu = ForwardSchedule | BackwardSchedule
Schedule = OnCpu | TiledSchedule


def default(problem: Problem, target: Target) -> Schedule:
    """On a CPU all columns of a token block in one sweep; on CUDA tiles for tensor cores."""
    if target.kind == "cuda":
        return tensor_core_schedule.default(problem, target)
    if problem.direction == "forward":
        tokens, outputs = dots_block(problem, target)
        return ForwardSchedule(tokens, outputs, divisors(problem.fan_in, 64, dots_width(problem, target))[-1], 0)
    nontemporal = nontemporal_choices(problem, problem.streams, target)[0]
    return BackwardSchedule(48, 6, 6, divisors(problem.fan_in, 8, 64)[-1], 1, 0, nontemporal)


def space(problem: Problem, target: Target) -> Mapping[str, tuple[int, ...]]:
    """Register blocks, blocks of tokens and columns, sweeps; on CUDA tiles."""
    if target.kind == "cuda":
        return tensor_core_schedule.space(problem, target)
    usual = default(problem, target)
    if isinstance(usual, ForwardSchedule):
        columns = {*divisors(problem.fan_in, 64, 2560), usual.block_width}
        return {
            "register_tokens": (2, 3, 4, 5, 6, 8),
            "register_outputs": (2, 3, 4, 5, 6, 8),
            "block_width": tuple(sorted(columns)),
            "threads": (0,),
        }
    assert isinstance(usual, BackwardSchedule)
    widths = {usual.block_width, max(8, usual.block_width // 16 * 8), *divisors(problem.fan_in, 64, 256)}
    return {
        "block_tokens": (16, 24, 48, 96, 192),
        "register_tokens": (4, 6, 8),
        "register_outputs": (4, 5, 6, 8),
        "block_width": tuple(sorted(widths)),
        "column_groups": (1, 2, 4, 8),
        "threads": (0,),
        "nontemporal": tuple(sorted(nontemporal_choices(problem, problem.streams, target))),
    }


def why_invalid(problem: Problem, schedule: Schedule, target: Target) -> str | None:
    """None, or the rule that the schedule breaks."""
    tiled = isinstance(schedule, TiledSchedule)
    if tiled != (target.kind == "cuda"):
        return f"a schedule must be of its target's kind, got {schedule} for {target}: tune this kernel again"
    if isinstance(schedule, TiledSchedule):
        return tensor_core_schedule.why_invalid(problem, schedule, target)
    tokens, outputs, width = schedule.register_tokens, schedule.register_outputs, schedule.block_width
    why = why_bad_threads(schedule.threads, target) or why_bad_register_block(tokens, outputs)
    if why:
        return why
    if isinstance(schedule, BackwardSchedule):
        return _why_invalid_backward(problem, schedule, target)
    return (
        why_not_divisor("block_width", width, problem.fan_in)
        or why_too_many_dots(tokens * outputs, target)
        or why_too_much_scratch(scratch(problem, schedule, target), target)
    )


def _why_invalid_backward(problem: Problem, schedule: BackwardSchedule, target: Target) -> str | None:
    if schedule.column_groups < 1 or problem.fan_in % schedule.column_groups:
        return f"column_groups must divide nC = {problem.fan_in}, got {schedule.column_groups}: choose 1"
    return (
        why_bad_nontemporal(schedule.nontemporal, target)
        or why_not_multiple("block_tokens", schedule.block_tokens, schedule.register_tokens)
        or why_not_divisor("block_width", schedule.block_width, problem.fan_in // schedule.column_groups)
        or why_too_much_scratch(scratch(problem, schedule, target), target)
    )


def scratch(problem: Problem, schedule: Schedule, target: Target) -> int:
    """Bytes of scratch."""
    if isinstance(schedule, TiledSchedule):
        return tensor_core_schedule.scratch(problem, schedule)
    if isinstance(schedule, ForwardSchedule):
        return 4 * forward_scratch(problem, schedule)
    results = schedule.nontemporal * DTYPE_BYTES[problem.dtype] * schedule.register_tokens * schedule.block_width
    return 4 * ((problem.outputs + 1) * schedule.block_tokens + backward_scratch(schedule)) + results


def forward_scratch(problem: Problem, schedule: Any) -> int:
    """float32 values that `programs.projection` holds in scratch."""
    held: int = schedule.register_tokens * (problem.outputs * DOT_LANES + schedule.block_width)
    return held


def backward_scratch(schedule: Any) -> int:
    """float32 values that `programs.gradients` holds in scratch."""
    held: int = schedule.block_tokens * schedule.block_width
    return held
