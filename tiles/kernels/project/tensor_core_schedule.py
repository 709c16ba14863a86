"""The schedules of project on tensor cores, forward and backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from math import gcd

from tiles.kernels.limits import MAX_ACCUMULATORS, supports_pdl, why_bad_pdl, why_bad_threads, why_too_much_scratch
from tiles.kernels.occupancy import REGISTER_FILE, SYSTEM_SHARED
from tiles.kernels.spec import DTYPE_BYTES, Problem
from tiles.lang.storage import ROW_PADDING
from tiles.target import Target

MMA = 16
"""Rows and inner elements that one matrix instruction takes; columns come in eights."""

WGMMA_ROWS, SWIZZLED = 64, 16
"""Rows of wgmma, which four warps share, and bfloat16 elements in the shortest swizzled row, of 32 bytes."""

OTHER_REGISTERS = 64
"""What a thread holds besides its tiles: addresses, loop counters, scales (50 to 110 by ptxas, less if asked)."""

OPERAND_REGISTERS = 8
"""What a backward's thread holds besides where its two products take operands from registers, as all do but wgmma."""

THREAD_BLOCKS = 256
"""Thread blocks that a forward's default aims at: two for each multiprocessor of a large GPU."""

MUCH_OF_PHI, MANY_TOKENS = 80, 2048
"""Outputs and tokens from which on a default has phi split once."""

ALIGNMENT = 1024
"""Bytes: where a swizzled tile may begin in shared memory."""

ASYNC_BYTES = 4
"""The least that a thread copies asynchronously."""

MULTIPROCESSORS = 132
"""Of an H100 or H200, whose turns a backward's default fills."""


@dataclass(frozen=True)
class TiledSchedule:
    """Tiles of tokens × columns. The forward keeps sums for all outputs of a tile's tokens while it walks the columns;
    the backward those of a tile's columns while it walks the tokens, and reads each tile once for both gradients.

    block_tokens, block_width: tokens and columns in a tile, multiples of 16.
    stages: tiles that are on their way or in use at a time.
    splits: parts of the columns (backward: of the tokens), each with sums of its own, added in order.
    min_blocks_per_sm: thread blocks that a multiprocessor shall have registers for.
    threads: CUDA threads a block.
    use_pdl: 1 if kernels start while the one before ends (`Dialect.pdl_wait`), 0 if after it.
    presplit_phi: 1 if a kernel before splits phi into bfloat16 parts for all thread blocks, 0 if each splits its copy.
    """

    block_tokens: int
    block_width: int
    stages: int
    splits: int
    min_blocks_per_sm: int
    threads: int
    use_pdl: int = 0
    presplit_phi: int = 0


def default(problem: Problem, target: Target, *, staged: int = 1) -> TiledSchedule:
    """The first of some usual shapes that fits, large tiles first; enough splits to keep a large GPU busy.

    Here and below, `staged` counts the tiles of the streams' shape that a backward copies.
    """
    usual = _usual_forward(problem) if problem.direction == "forward" else _usual_backward(problem, staged)
    return next(schedule for schedule in usual if why_invalid(problem, schedule, target, staged=staged) is None)


def _usual_forward(problem: Problem) -> Iterator[TiledSchedule]:
    tokens = max(1, problem.tokens)
    most = 16 if tokens <= 16 else 64 if tokens <= 2048 else 128
    rows = [block for block in (128, 64, 32, 16) if block <= most]
    for stages, block, width in product(((4, 3, 2), (1,)), rows, (64, 32, 16)):
        for count, threads, min_blocks_per_sm in product(stages, dict.fromkeys((max(64, 2 * block), 256)), (2, 1)):
            blocks, columns = -(-tokens // block), -(-problem.fan_in // width)
            splits = forward_splits(blocks, columns)
            yield TiledSchedule(
                block, width, count, splits, min_blocks_per_sm, threads, presplit_phi=presplits(problem)
            )


def _usual_backward(problem: Problem, staged: int) -> Iterator[TiledSchedule]:
    """Room for a second thread block is worth more than for tiles on their way, where each is three."""
    tokens = max(1, problem.tokens)
    rows = [block for block in (64, 32, 16) if block < 2 * tokens or block == MMA]
    depths = (2, 1) if staged == 1 else (1,)
    shapes = product((128, 64, 32, 16), rows, depths, (256, 128, 64, 32), (2, 1))
    for width, block, stages, threads, min_blocks_per_sm in shapes:
        tiles = TiledSchedule(block, width, stages, 1, min_blocks_per_sm, threads)
        groups = column_groups(problem, tiles, streams_of_tile(problem, tiles, staged))
        yield replace(tiles, splits=backward_splits(problem, groups, min_blocks_per_sm, -(-tokens // block)))


def streams_of_tile(problem: Problem, schedule: TiledSchedule, staged: int) -> int:
    """Streams that a backward's tile has the same columns of: where it copies du as well, as many as leave it whole
    sectors of memory, since du is read once for all of them. A tile that is copied ahead is one stream's, whose long
    rows meet all banks of shared memory."""
    return gcd(problem.streams, schedule.block_width // MMA) if staged > 1 and schedule.stages == 1 else 1


def column_groups(problem: Problem, schedule: TiledSchedule, streams: int) -> int:
    """A backward's tiles of so many streams each that cover all columns of all streams."""
    return problem.streams // streams * -(-problem.width // (schedule.block_width // streams))


def forward_splits(blocks: int, columns: int) -> int:
    """Splits of so many blocks of columns that keep a large GPU busy with so many blocks of tokens."""
    return power_of_two(min(64, THREAD_BLOCKS // blocks, columns // 2))


def backward_splits(problem: Problem, groups: int, min_blocks_per_sm: int, blocks: int) -> int:
    """Splits of so many blocks of tokens that take least time where so many thread blocks run at a time and all start
    together: turns over the thread blocks, each for its share of the tokens, and the sums for dphi, which every split
    writes for another kernel to read, beside the streams, which are read and written once."""
    sums, at_a_time = (
        4 * problem.outputs / (max(1, problem.tokens) * DTYPE_BYTES[problem.dtype]),
        MULTIPROCESSORS * min_blocks_per_sm,
    )

    def time(splits: int) -> float:
        return -(-groups * splits // at_a_time) * -(-blocks // splits) * (1 + sums * splits)

    return min(range(1, max(1, min(64, blocks // 2)) + 1), key=time)


def presplits(problem: Problem) -> int:
    """Whether a default's forward has phi split by a kernel before: where it is large, and for many thread blocks."""
    return int(problem.outputs >= MUCH_OF_PHI and problem.tokens >= MANY_TOKENS)


def power_of_two(most: int) -> int:
    """The largest power of two that is not above `most`, or 1."""
    return 1 << max(0, max(1, most).bit_length() - 1)


def space(problem: Problem, target: Target, *, staged: int = 1) -> Mapping[str, tuple[int, ...]]:
    """Tiles, stages, splits, registers, threads."""
    usual = default(problem, target, staged=staged)
    choices: dict[str, tuple[int, ...]] = {
        "block_tokens": (16, 32, 64, 128),
        "block_width": (32, 64, 128, 256),
        "stages": tuple(range(1, _most_stages(problem, staged) + 1)),
        "splits": (1, 2, 4, 8, 16, 32, 64) if problem.direction == "forward" else (1, 2, 3, 4, 6, 8, 16, 32),
    }
    choices |= {
        "min_blocks_per_sm": (1, 2, 3, 4),
        "threads": (64, 128, 256),
        "use_pdl": (0, 1) if supports_pdl(target) else (0,),
    }
    choices["presplit_phi"] = (0, 1) if problem.direction == "forward" else (0,)
    return {name: tuple(sorted({*values, getattr(usual, name)})) for name, values in choices.items()}


def why_invalid(problem: Problem, schedule: TiledSchedule, target: Target, *, staged: int = 1) -> str | None:
    """None, or the rule that the schedule breaks."""
    columns = -(-problem.fan_in // schedule.block_width)
    needed = scratch(problem, schedule, staged=staged)
    copied = schedule.block_tokens * schedule.block_width * DTYPE_BYTES[problem.dtype]
    if staged > 1 and schedule.stages > 1 and copied < ASYNC_BYTES * schedule.threads:
        return f"threads must share {copied} bytes of a tile by {ASYNC_BYTES}, got {schedule.threads}: choose fewer"
    return why_bad_tiles(problem, schedule, target, columns, _most_stages(problem, staged), needed)


def why_bad_tiles(
    problem: Problem, schedule: TiledSchedule, target: Target, columns: int, most_stages: int, needed: int
) -> str | None:
    """None, or the rule that tiles break: `columns` blocks of them, and `needed` bytes of shared memory."""
    rows = schedule.block_tokens
    for name, size in (("tokens", rows), ("columns", schedule.block_width)):
        if size < MMA or size % MMA or size > 512:
            return f"{name} of a tile must be a multiple of {MMA} up to 512, got {size}: choose 64"
    why = why_bad_threads(schedule.threads, target) or why_bad_pdl(schedule.use_pdl, target)
    why = why or _why_bad_counts(problem, schedule, columns, most_stages)
    if why:
        return why
    if problem.direction == "forward":
        shared = _even(schedule.threads, rows)
    else:
        shared = _even(schedule.threads, rows, schedule.block_width) and _even(schedule.threads, schedule.block_width)
        sums = padded_outputs(problem, schedule)
        shared = shared and (
            target.arch != "sm_90a"
            or (
                _whole(schedule.threads, rows, schedule.block_width)
                and _whole(schedule.threads, schedule.block_width, sums)
            )
        )
    if not shared:
        return f"tiles must be whole 16 × 8 blocks for every warp, got {schedule.threads} threads: choose 64 or 128"
    held = registers(problem, schedule)
    others = OTHER_REGISTERS + OPERAND_REGISTERS * (problem.direction == "backward" and target.arch != "sm_90a")
    if held > MAX_ACCUMULATORS or (held + others) * schedule.threads * schedule.min_blocks_per_sm > REGISTER_FILE:
        return (
            f"{schedule.min_blocks_per_sm} thread blocks must fit {REGISTER_FILE} registers, got {held} values for "
            f"each of {schedule.threads} threads: choose smaller tiles or fewer blocks"
        )
    return why_too_much_scratch((needed + SYSTEM_SHARED) * schedule.min_blocks_per_sm - SYSTEM_SHARED, target)


def _why_bad_counts(problem: Problem, schedule: TiledSchedule, columns: int, most: int) -> str | None:
    if problem.direction == "forward":
        if not 1 <= schedule.splits <= columns:
            return f"splits must be in 1..{columns}, the blocks of columns, got {schedule.splits}: choose 1"
        if schedule.presplit_phi not in (0, 1):
            return f"presplit_phi must be 0 or 1, got {schedule.presplit_phi}: choose 0"
        if problem.op == "project" and schedule.splits == 1 and schedule.use_pdl and not schedule.presplit_phi:
            return "use_pdl must be 0 where one split makes one kernel, got 1: choose 0, or more splits"
    elif schedule.presplit_phi:
        return f"presplit_phi must be 0 in the backward, which copies phi once, got {schedule.presplit_phi}: choose 0"
    elif not 1 <= schedule.splits <= 1024:
        return f"splits must be in 1..1024, got {schedule.splits}: choose 4"
    if not 1 <= schedule.stages <= most:
        return f"stages must be in 1..{most} for {problem.dtype}, got {schedule.stages}: choose 1"
    if not 1 <= schedule.min_blocks_per_sm <= 8:
        return f"min_blocks_per_sm must be in 1..8, got {schedule.min_blocks_per_sm}: choose 1"
    return None


def _most_stages(problem: Problem, staged: int) -> int:
    """A backward's loop over tokens is of unknown length: TileLang pipelines it, by one tile, only if it ends with a
    use of all that it copies. Extra gradients are copied ahead in another way (`tensor_core_programs.gradients`)."""
    if problem.direction == "forward":
        return 4
    if staged > 1:
        return 3
    return 2 if problem.dtype == "bfloat16" else 1


def _even(threads: int, rows: int, columns: int | None = None) -> bool:
    """Whether warps can share rows × columns in blocks of 16 × 8, rows first; sums are padded until they can."""
    warps, bands = threads // 32, rows // MMA
    if warps <= bands:
        return bands % warps == 0
    return warps % bands == 0 and (columns is None or columns % (8 * warps // bands) == 0)


def _whole(threads: int, rows: int, columns: int) -> bool:
    """Whether wgmma takes a product of rows × columns: where more warps than bands of rows share it, each needs columns
    that are whole swizzled rows, since the second factor is stored row by row."""
    warps, bands = threads // 32, rows // MMA
    if rows % WGMMA_ROWS or warps % 4 or warps <= bands:
        return True
    return columns * bands % (warps * SWIZZLED) == 0


def padded_outputs(problem: Problem, schedule: TiledSchedule) -> int:
    """Columns of the sums for both parts of all outputs: every warp gets whole instructions."""
    rows = schedule.block_tokens if problem.direction == "forward" else schedule.block_width
    unit = max(MMA, 8 * -(-schedule.threads // 32 * MMA // rows))
    return -(-2 * problem.outputs // unit) * unit


def padded_products(problem: Problem) -> int:
    """The inner size of the three products that make dz·phi."""
    return -(-3 * problem.outputs // MMA) * MMA


def registers(problem: Problem, schedule: TiledSchedule) -> int:
    """float32 values that a thread holds of its tiles of sums."""
    sums = padded_outputs(problem, schedule)
    if problem.direction == "forward":
        return -(-schedule.block_tokens * (schedule.block_width + sums) // schedule.threads)
    return -(-schedule.block_width * (schedule.block_tokens + sums) // schedule.threads)


def scratch(problem: Problem, schedule: TiledSchedule, *, staged: int = 1) -> int:
    """Bytes of shared memory: the tiles of the loop, or the sums after it where they need more."""
    size, width, rows, stages = DTYPE_BYTES[problem.dtype], schedule.block_width, schedule.block_tokens, schedule.stages
    sums, inner = padded_outputs(problem, schedule), padded_products(problem)
    held = [] if problem.dtype == "bfloat16" else [2 * rows * width] * 2
    if problem.direction == "forward":
        phi_tile = 2 * sums * width
        held += [stages * rows * width * size]
        held += [stages * phi_tile] if schedule.presplit_phi else [stages * 4 * problem.outputs * width, phi_tile]
        return max(aligned(held), 4 * rows * smem_stride(sums))
    straight, padded = rows * width * size, rows * (width + ROW_PADDING) * size
    streams = streams_of_tile(problem, schedule, staged)
    others = [padded, rows * (width // streams + ROW_PADDING) * size] if staged > 1 else []
    if problem.dtype != "bfloat16":
        held += [stages * padded]
    elif others and stages > 1:  # what is copied ahead goes to where a product takes it
        held += [straight, stages * padded]
    else:
        held += [stages * straight]
    held += [stages * other for other in others]
    held += [padded, 2 * inner * width, 2 * rows * inner, 2 * rows * sums, 4 * rows]
    held += [4 * rows * gates_row(streams)] if others else []
    return max(aligned(held), 4 * sums * smem_stride_transposed(schedule))


def aligned(sizes: Iterable[int]) -> int:
    """Bytes of shared memory for buffers of these sizes, each of which may begin where a swizzled tile can."""
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def gates_row(streams: int) -> int:
    """Floats from one token's pre of a backward's tile to the next: those of eight tokens are in different banks."""
    return streams if streams <= 4 else streams | 1


def smem_stride(sums: int) -> int:
    """Elements from one row of sums to the next in shared memory: four rows of eight meet all 32 banks."""
    return sums if sums % 16 else sums + ROW_PADDING


def smem_stride_transposed(schedule: TiledSchedule) -> int:
    """The same for sums that are transposed on the way, where eight elements of a row come from as many threads."""
    return schedule.block_width + ROW_PADDING // 2
