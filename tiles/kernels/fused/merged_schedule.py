"""The tiles of step and single_pass where they merge inside of them: a tile has the same columns of all streams."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from tiles.kernels.apply.schedule import MOST_WEIGHTS, VECTOR_BYTES
from tiles.kernels.project import tensor_core_schedule
from tiles.kernels.project.tensor_core_schedule import (
    ASYNC_BYTES,
    WGMMA_ROWS,
    TiledSchedule,
    aligned,
    padded_outputs,
    padded_products,
    smem_stride,
)
from tiles.kernels.spec import DTYPE_BYTES, Problem
from tiles.lang.storage import ROW_PADDING
from tiles.target import Target

MERGING = ("step", "single_pass")
"""The ops that merge."""

STAGES = {"forward": 4, "backward": 3}
"""Most tiles on their way at a time."""

MANY_STREAMS = 4
"""Streams whose values and weights take most registers of a thread."""

MANY_TOKENS = 4096
"""Tokens that keep a large GPU busy with tiles of 128."""

BUSY_TOKENS = 512
"""Tokens from which a forward's tiles make more thread blocks than a large GPU has multiprocessors."""

USUAL_WIDTH = 128
"""Columns of a usual tile, at least 16 of each stream: whole sectors of memory."""


def columns_of(problem: Problem, tiles: TiledSchedule) -> int:
    """Columns of each stream in a tile."""
    return tiles.block_width // problem.streams


def groups(problem: Problem, tiles: TiledSchedule) -> int:
    """Tiles of columns that cover the width."""
    return -(-problem.width // columns_of(problem, tiles))


def vector(problem: Problem, tiles: TiledSchedule) -> int:
    """Columns of a token that a thread has to itself: what moves as one, fewer where threads would be idle. Of few
    streams it is half of that, which leaves registers for two thread blocks; of many, weights are read less often."""
    most = VECTOR_BYTES // DTYPE_BYTES[problem.dtype] if problem.streams >= MANY_STREAMS else 4
    return tensor_core_schedule.power_of_two(
        min(most, tiles.block_tokens * columns_of(problem, tiles) // tiles.threads)
    )


def weighs_with_pre(problem: Problem) -> bool:
    """Whether pre is known before the tiles are: in the backward, and where one pass does all."""
    return problem.direction == "backward" or problem.base_op == "single_pass"


def weights_row(problem: Problem) -> int:
    """Floats from one token's weights to the next one's: post, res and, where it is known, pre."""
    count = problem.weights + (problem.streams if weighs_with_pre(problem) else 0)
    return -(-count // 4) * 4


def summed(problem: Problem) -> int:
    """What a backward's tile sums over its columns for each token: dpost, dres and, where one pass does all, dpre."""
    return problem.weights + (problem.streams if problem.base_op == "single_pass" else 0)


def frees_early(problem: Problem, tiles: TiledSchedule) -> bool:
    """Whether a backward's threads take all of a tile to registers, one vector of each row that is copied, before they
    work on it: its stage is free for another tile then, and as many tiles as there are stages are under way."""
    return tiles.block_tokens * columns_of(problem, tiles) == tiles.threads * vector(problem, tiles)


def copies_streams_together(problem: Problem, tiles: TiledSchedule) -> bool:
    """Whether a backward copies all streams as one tile: where a thread's share of one stream is less than a vector of
    16 bytes, and of all of them is not. TileLang 0.1.15 has layouts for a power of two of streams."""
    of_stream, whole = tiles.block_tokens * columns_of(problem, tiles), tiles.threads * 16 // DTYPE_BYTES[problem.dtype]
    return problem.streams.bit_count() == 1 and of_stream < whole <= problem.streams * of_stream


def usual(problem: Problem, target: Target) -> TiledSchedule | None:
    """The first of some usual shapes that fits, large tiles first; None where there is none."""
    fitting = (tiles for tiles in _usual(problem) if why_invalid(problem, tiles, target) is None)
    return next(fitting, None)


def _usual(problem: Problem) -> Iterator[TiledSchedule]:
    """Two thread blocks a multiprocessor, where registers are left for two; else one, with more tiles on their way.
    Of many streams and tokens a backward's tiles are twice as large, and so are the forward's where one pass does all:
    what every tile reads of phi, the weights and dz, and what it sums, is then about a third of what streams move. A
    backward has one thread block for them, of as many warps as two would have. Of one stream the forward that does all
    in one pass has tiles half as large, twice as many on their way: registers of larger ones spill on sm_100a."""
    forward, tokens, n = problem.direction == "forward", max(1, problem.tokens), problem.streams
    large = n >= MANY_STREAMS and tokens >= MANY_TOKENS and not (forward and problem.base_op == "step")
    twice = 2 if large else 1
    most, widest = (64 * twice, USUAL_WIDTH // (1 + _narrow(problem))) if forward else (32, USUAL_WIDTH * twice)
    rows = [block for block in (128, 64, 32, 16) if block <= most and (block < 2 * tokens or block == 16)]
    widths = [n * columns for columns in (128, 64, 32, 16) if n * columns <= widest]
    presplit_phi = tensor_core_schedule.presplits(problem) if forward else 0
    for width, block in product(widths, rows):
        for stages, min_blocks_per_sm, most_threads in _ways(problem, block, width):
            for threads in (count for count in (512, 256, 128, 64, 32) if count <= most_threads):
                tiles = TiledSchedule(block, width, stages, 1, min_blocks_per_sm, threads, presplit_phi=presplit_phi)
                yield replace(tiles, splits=_splits(problem, tiles))


def _narrow(problem: Problem) -> bool:
    """Whether a usual tile is half as wide as others."""
    return problem.direction == "forward" and problem.streams == 1 and problem.base_op == "single_pass"


def _ways(problem: Problem, block: int, width: int) -> list[tuple[int, int, int]]:
    """Stages, thread blocks of a multiprocessor and most threads of a block of usual tiles. A forward's values of many
    streams leave registers for two blocks where each is one warpgroup, which multiplies all rows of its tile at once,
    and where no tile is split into parts."""
    two = []
    if problem.streams < MANY_STREAMS or problem.direction == "backward":
        two = [(4 if _narrow(problem) else 2, 2, 256)]
    elif block == WGMMA_ROWS and problem.tokens >= BUSY_TOKENS and problem.dtype == "bfloat16":
        two = [(2, 2, 128)]
    most = 512 if width > USUAL_WIDTH else 256
    return [*two, *((stages, 1, most) for stages in (3, 2, 1))]


def _splits(problem: Problem, tiles: TiledSchedule) -> int:
    blocks = -(-max(1, problem.tokens) // tiles.block_tokens)
    if problem.direction == "forward":
        return tensor_core_schedule.forward_splits(blocks, groups(problem, tiles))
    return tensor_core_schedule.backward_splits(problem, groups(problem, tiles), tiles.min_blocks_per_sm, blocks)


def why_invalid(problem: Problem, tiles: TiledSchedule, target: Target) -> str | None:
    """None, or the rule that the tiles break."""
    n, columns = problem.streams, columns_of(problem, tiles)
    if problem.base_op not in MERGING:
        return f"merged must be 0 for {problem.op}, which does not merge, got 1: choose 0"
    if problem.weights > MOST_WEIGHTS:
        return f"merged must be 0 where a token has more than {MOST_WEIGHTS} weights, got 1 for n = {n}: choose 0"
    if tiles.block_width % n or columns % 8:
        return f"block_width must be a multiple of {8 * n} where merged is 1, got {tiles.block_width}: choose {16 * n}"
    elements = tiles.block_tokens * columns
    if elements % (tiles.threads * max(1, vector(problem, tiles))) or elements * DTYPE_BYTES[problem.dtype] < (
        ASYNC_BYTES * tiles.threads
    ):
        return f"threads must share {elements} elements of a stream in vectors, got {tiles.threads}: choose fewer"
    most, needed = STAGES[problem.direction], scratch(problem, tiles)
    return tensor_core_schedule.why_bad_tiles(problem, tiles, target, groups(problem, tiles), most, needed)


def scratch(problem: Problem, tiles: TiledSchedule) -> int:
    """Bytes of shared memory: the tiles of the loop, or the sums after it where they need more."""
    n, size, rows, across = problem.streams, DTYPE_BYTES[problem.dtype], tiles.block_tokens, tiles.block_width
    sums, inner, columns = padded_outputs(problem, tiles), padded_products(problem), columns_of(problem, tiles)
    parts = [] if problem.dtype == "bfloat16" else [2 * rows * across] * 2
    once = [*parts, rows * across * size, 4 * rows * weights_row(problem)]
    staged = [rows * columns * size] * (n + 1)
    if problem.direction == "forward":
        phi = [2 * sums * across] if tiles.presplit_phi else [4 * problem.outputs * columns] * n
        once, staged = [*once, *([] if tiles.presplit_phi else [2 * sums * across])], staged + phi
        epilogue = 4 * rows * smem_stride(sums)
    else:
        once += [2 * rows * inner, 2 * rows * sums, 2 * inner * across]
        once += [4 * rows * (across + ROW_PADDING), 4 * rows * summed(problem)]
        staged, epilogue = staged * 2, 4 * sums * (across + ROW_PADDING)
    return max(aligned([*once, *(tiles.stages * each for each in staged)]), epilogue)
