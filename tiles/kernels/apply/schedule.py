"""The tile schedule of the kernels aggregate and merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tiles.kernels.limits import (
    MAX_ACCUMULATORS,
    divisors,
    nontemporal_choices,
    why_bad_nontemporal,
    why_bad_threads,
    why_not_divisor,
    why_too_much_scratch,
)
from tiles.kernels.occupancy import REGISTER_FILE
from tiles.kernels.spec import DTYPE_BYTES, Problem
from tiles.target import Target

CPU_BLOCKS = (64, 32)
"""Columns that a CPU's default works on at a time, the first that divides the width: few, so that what is brought in of
the next token is spread evenly over the work on this one."""

STAGED_BYTES = 32 * 1024
"""What is kept aside of a token's rows at a time: most of an L1 cache."""

THREADS = (32, 64, 96, 128, 160, 192, 256, 320)
"""CUDA threads a block to choose from: those that are no power of two suit widths such as 2560 = 320 × 8."""

FEW_TOKENS, BACKWARD_THREADS = 64, (256, 128)
"""Most threads of a backward's default, which may take 255 registers each: at up to so few tokens, and at more."""

VECTOR_BYTES = 16
"""The longest vector that a CUDA thread loads or stores."""

MIN_BLOCKS = (1, 2, 3, 4, 5, 6, 8, 16)
"""Thread blocks that a multiprocessor shall have registers for."""

HELD_DOWN, FROM = 128, 96
"""Registers that a default of merge's backward is held down to where it needs no more, and FROM or more. Left to itself
ptxas takes about 150 of them there and loads a chunk's rows in two turns: fewer warps, each with half as much under
way."""

SPARE_REGISTERS = 8
"""What a CUDA thread needs beside its values, for addresses above all."""

MOST_WEIGHTS = 72
"""Weights of one token (those of res and n of post) that a CUDA thread can hold beside its columns."""

GROUP = 4
"""Input streams that merge's backward works on at a time where there are more weights."""


@dataclass(frozen=True)
class ApplySchedule:
    """How one token's row is walked.

    block_width: columns in one parallel loop, a divisor of the width; all streams of a block are handled together.
    threads: CUDA threads a block; 0 on a CPU.
    nontemporal: 1 where a CPU stores streams and sublayer inputs past its caches.
    min_blocks_per_sm: thread blocks that a CUDA multiprocessor shall have registers for; 1 leaves them to the compiler.
    """

    block_width: int
    threads: int
    nontemporal: int = 0
    min_blocks_per_sm: int = 1


def default(problem: Problem, target: Target) -> ApplySchedule:
    """On a CPU a few vectors at a time; in odd widths the whole row, or what L1 holds of it where rows are kept aside.
    On CUDA as many threads as a row keeps busy with the longest vectors that the registers take. A backward needs most
    of them: there, few threads make room for other blocks, whose loads are under way while one adds up."""
    if target.kind == "cpu":
        nontemporal = _nontemporal(problem, target)[0]
        for block in (block for block in CPU_BLOCKS if problem.width % block == 0):
            return ApplySchedule(block, 0, nontemporal)
        row_bytes = DTYPE_BYTES[problem.dtype] * staged_rows(problem, nontemporal)
        most = max(8, STAGED_BYTES // row_bytes) if row_bytes else problem.width
        whole = problem.width <= most
        return ApplySchedule(problem.width if whole else divisors(problem.width, 8, most)[-1], 0, nontemporal)
    most = BACKWARD_THREADS[problem.tokens > FEW_TOKENS] if problem.direction == "backward" else THREADS[-1]
    for lanes in (lanes for lanes in (8, 4, 2, 1) if lanes * DTYPE_BYTES[problem.dtype] <= VECTOR_BYTES):
        for threads in (count for count in reversed(THREADS) if count <= most and problem.width % (lanes * count) == 0):
            schedule = ApplySchedule(lanes * threads, threads)
            if _why_not_cuda(problem, schedule) is None:
                return replace(schedule, min_blocks_per_sm=_blocks(problem, schedule))
    return ApplySchedule(divisors(problem.width, 8, 128)[0], 32)


def _blocks(problem: Problem, schedule: ApplySchedule) -> int:
    """Thread blocks of a default that a multiprocessor shall have registers for."""
    mixes_back = problem.base_op == "merge" and problem.mixes and problem.direction == "backward"
    if not mixes_back or problem.tokens <= FEW_TOKENS:
        return 1
    needed = _registers(problem, schedule) + problem.weights + SPARE_REGISTERS
    fitting = REGISTER_FILE // (HELD_DOWN * schedule.threads)
    return max(count for count in MIN_BLOCKS if count <= fitting) if FROM <= needed <= HELD_DOWN else 1


def space(problem: Problem, target: Target) -> Mapping[str, tuple[int, ...]]:
    """Column blocks that divide the width, and thread counts on CUDA."""
    blocks = {*divisors(problem.width, 32, 2048), default(problem, target).block_width}
    if target.kind == "cpu":
        return {
            "block_width": tuple(sorted({*blocks, problem.width})),
            "threads": (0,),
            "nontemporal": tuple(sorted(_nontemporal(problem, target))),
            "min_blocks_per_sm": (1,),
        }
    vectors = {lanes * threads for lanes in (4, 8) for threads in THREADS if problem.width % (lanes * threads) == 0}
    walks = {"block_width": tuple(sorted(blocks | vectors)), "threads": THREADS}
    return walks | {"nontemporal": (0,), "min_blocks_per_sm": MIN_BLOCKS}


def why_invalid(problem: Problem, schedule: ApplySchedule, target: Target) -> str | None:
    """None, or the rule that the schedule breaks."""
    why = why_bad_threads(schedule.threads, target) or why_not_divisor(
        "block_width", schedule.block_width, problem.width
    )
    why = why or why_bad_nontemporal(schedule.nontemporal, target)
    most = 1 if target.kind == "cpu" else MIN_BLOCKS[-1]
    if why is None and not 1 <= schedule.min_blocks_per_sm <= most:
        why = f"min_blocks_per_sm must be in 1..{most} on {target}, got {schedule.min_blocks_per_sm}: choose 1"
    why = why or why_too_much_scratch(scratch(problem, schedule, target), target)
    if why or target.kind == "cpu" or schedule == default(problem, target):
        return why
    return _why_not_cuda(problem, schedule)


def _why_not_cuda(problem: Problem, schedule: ApplySchedule) -> str | None:
    """What a thread block asks of a schedule: even shares, values in registers."""
    if schedule.block_width % schedule.threads:
        return f"threads must divide block_width {schedule.block_width}, got {schedule.threads}: choose 32"
    held = _registers(problem, schedule)
    if held > MAX_ACCUMULATORS:
        return f"a thread's values must fit {MAX_ACCUMULATORS} registers, got {held}: choose a smaller block_width"
    left = REGISTER_FILE // (schedule.threads * schedule.min_blocks_per_sm)
    if schedule.min_blocks_per_sm > 1 and left < held + SPARE_REGISTERS:
        blocks = f"{schedule.min_blocks_per_sm} blocks of {schedule.threads} threads"
        needed = held + SPARE_REGISTERS
        return f"min_blocks_per_sm must leave a thread {needed} registers, got {left} with {blocks}: choose fewer"
    return None


def scratch(problem: Problem, schedule: ApplySchedule, target: Target) -> int:
    """Bytes of scratch."""
    if target.kind != "cpu":
        return 0
    return DTYPE_BYTES[problem.dtype] * staged_rows(problem, schedule.nontemporal) * schedule.block_width


def staged_rows(problem: Problem, nontemporal: int) -> int:
    """Rows of a token's block of columns that a CPU keeps aside: results that go past the caches, or a copy of
    gradients that it reads where it may write in their place."""
    if nontemporal:
        return _results(problem)
    return problem.streams if stages_grads(problem) else 0


def _results(problem: Problem) -> int:
    """Rows of the width that a token's results have."""
    backward, aggregate = problem.direction == "backward", problem.base_op == "aggregate"
    if aggregate:
        return problem.streams if backward else 1
    if backward and not problem.mixes:
        return 1
    return problem.streams + backward


def _nontemporal(problem: Problem, target: Target) -> tuple[int, ...]:
    return nontemporal_choices(problem, _results(problem), target)


def stages_grads(problem: Problem) -> bool:
    """Whether a CPU copies the gradients that it reads: where it may write in their place."""
    return problem.op in ("merge", "step") and problem.direction == "backward"


def in_groups(problem: Problem, schedule: ApplySchedule) -> bool:
    """Whether merge takes its streams in groups (`merge.Merge`): a CUDA thread could not hold all n² weights."""
    return schedule.threads > 0 and problem.weights > MOST_WEIGHTS


def _registers(problem: Problem, schedule: ApplySchedule) -> int:
    """Registers that a CUDA thread fills: sums over columns in the backwards, one each, and its columns of the rows of
    streams and sublayers, as they are stored."""
    n, backward = problem.streams, problem.direction == "backward"
    if problem.base_op == "aggregate":
        rows, sums = (2 * n + 1, n) if backward else (n + 1, 0)
    elif in_groups(problem, schedule):
        rows, sums = (n + 2 * GROUP, n * GROUP) if backward else (n + 2, 0)
    elif problem.mixes:
        rows, sums = (3 * n + 2, problem.weights) if backward else (2 * n + 1, 0)
    else:
        rows, sums = (n + 2, n) if backward else (2 * n + 1, 0)
    lanes = schedule.block_width // schedule.threads
    return sums + -(-rows * lanes * DTYPE_BYTES[problem.dtype] // 4)
