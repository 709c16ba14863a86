"""Chain schedules: pre, step and single_pass on CUDA as kernels one after the other, on chunks of tokens that stay in
the L2 cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from tiles.errors import BadInput
from tiles.kernels.apply import schedule as apply
from tiles.kernels.apply.schedule import ApplySchedule
from tiles.kernels.coefficients import schedule as coefficients
from tiles.kernels.fused import merged_schedule
from tiles.kernels.limits import why_bad_threads, why_not_divisor, why_too_much_scratch
from tiles.kernels.project import tensor_core_schedule
from tiles.kernels.project.tensor_core_schedule import TiledSchedule
from tiles.kernels.spec import DTYPE_BYTES, Problem
from tiles.lang.storage import OWNED_REGISTERS
from tiles.target import Target

CHUNK_BYTES = 24 * 1024 * 1024
"""The streams of a chunk: half of an L2 cache, since what is made of them takes room as well."""

ROW_THREADS = (64, 128, 160, 256, 320)
ROW_BLOCKS = (0, 528)
"""Thread blocks of a pass over rows: four for each multiprocessor of a Hopper GPU; 0: one for each token."""

FEW_TOKENS = 64
"""Up to here launches cost more than thread blocks of many warps where one would do for the coefficients."""

SUM_ELEMENTS = 32
"""Sums over splits that a thread holds at a time."""

TILES = {
    "block_tokens": (16, 64, 128),
    "block_width": (32, 64, 128),
    "stages": (1, 2, 4),
    "splits": (1, 4, 8, 16, 64),
    "min_blocks_per_sm": (1, 2),
    "threads": (128, 256),
    "use_pdl": (0, 1),
    "presplit_phi": (0, 1),
}
"""What of project's tiles is tried here."""


@dataclass(frozen=True)
class ChainSchedule:
    """Project's tiles, passes over rows of tokens, and between them the coefficients.

    block_tokens, block_width, stages, splits, min_blocks_per_sm, threads, use_pdl, presplit_phi: as in `TiledSchedule`.
    coefficient_tokens: tokens of a thread block of the coefficients, a thread each; spare threads add up splits.
    row_width: columns in one parallel loop of aggregate and merge; a divisor of C.
    row_threads: CUDA threads of those passes.
    row_blocks: thread blocks of those passes, which take tokens in turns; 0: one for each token.
    chunk_tokens: all kernels take so many tokens before the next ones are touched; 0: all at once.
    merged: 1 if step merges inside of project's tiles, which then have the same columns of all streams: x' is not read
        back (forward), or not even written (backward); 0 if passes of their own merge.
    fuse_aggregate: 1 if thread blocks of the coefficients, of row_threads threads, also aggregate their tokens: a
        launch less; 0 if a pass of its own aggregates.
    """

    block_tokens: int
    block_width: int
    stages: int
    splits: int
    min_blocks_per_sm: int
    threads: int
    coefficient_tokens: int
    row_width: int
    row_threads: int
    row_blocks: int
    chunk_tokens: int
    use_pdl: int = 0
    merged: int = 0
    presplit_phi: int = 0
    fuse_aggregate: int = 0


def tiled(schedule: ChainSchedule) -> TiledSchedule:
    """Project's part."""
    return TiledSchedule(*(getattr(schedule, field.name) for field in fields(TiledSchedule)))


def coefficient_threads(problem: Problem, schedule: ChainSchedule | None = None) -> int:
    """Threads of a block of the coefficients: a warp whose registers hold its matrices, or fewer in shared memory; as
    many as a row has where the block aggregates too."""
    if schedule and schedule.fuse_aggregate:
        return schedule.row_threads
    return 32 if _in_registers(problem) else 8


def _in_registers(problem: Problem) -> bool:
    """Whether the matrices of a token's coefficients fit a thread's registers."""
    return problem.streams**2 <= OWNED_REGISTERS


def _aggregates(problem: Problem) -> bool:
    """Whether a pass of its own aggregates, which may be fused with the coefficients."""
    return problem.direction == "forward" and problem.base_op != "single_pass"


def split_sums(problem: Problem, schedule: ChainSchedule) -> tuple[int, int]:
    """How a thread adds up its share of a block's N + 1 sums of each token: in how many turns, how many at a time."""
    share = -(-schedule.coefficient_tokens * (problem.outputs + 1) // coefficient_threads(problem, schedule))
    turns = -(-share // SUM_ELEMENTS)
    return turns, -(-share // turns)


def row_stride(columns: int) -> int:
    """Floats from one token's row of coefficients to the next in shared memory: odd, so that 32 tokens' are in all
    banks."""
    return columns | 1


def dots_of_streams(problem: Problem, schedule: ChainSchedule) -> bool:
    """Whether dpre comes from dot products with x and f, weighted with res and post, where x' is never written."""
    return bool(schedule.merged) and problem.base_op == "step" and problem.direction == "backward"


def default(problem: Problem, target: Target) -> ChainSchedule:
    """What project and the passes over rows take by themselves; few tokens for each block that adds up their sums.

    Raises `BadInput` for a norm of the sublayer's input, which no CUDA kernel has.
    """
    if why := _why_norm(problem):
        raise BadInput(why)
    within = merged_schedule.usual(problem, target) if _merges(problem) else None
    part = within or tensor_core_schedule.default(problem, target, staged=staged(problem))
    rows = _rows(problem, target)
    walk = {"row_width": rows.block_width, "row_threads": rows.threads, "row_blocks": 0}
    fuses = _aggregates(problem) and _in_registers(problem) and problem.tokens <= FEW_TOKENS
    most = 1 if fuses else 8 if problem.direction == "forward" else 32
    coefficient_tokens = max(1, min(most, problem.tokens, coefficient_threads(problem)))
    modes = {"merged": int(within is not None), "fuse_aggregate": int(fuses)}
    return ChainSchedule(**vars(part), coefficient_tokens=coefficient_tokens, **walk, chunk_tokens=0, **modes)


def _why_norm(problem: Problem) -> str | None:
    """The rule that there is no norm here, or None where it holds."""
    if not problem.normalises:
        return None
    plain = problem.of(problem.base_op).op
    return f"ops with a norm must run on a CPU, got {problem.op} on CUDA: run {plain}, then torch's rms_norm"


def _merges(problem: Problem) -> bool:
    """Whether a default merges inside of project's tiles. That of many streams does not: forward, all weights are read
    for every few columns; backward, there are n² sums of every token and tile."""
    return problem.base_op in merged_schedule.MERGING and problem.streams <= 4


def _rows(problem: Problem, target: Target) -> ApplySchedule:
    """The default of the heaviest pass over rows, which leaves registers to the compiler here."""
    return replace(apply.default(problem.of(_row_op(problem), "backward"), target), min_blocks_per_sm=1)


def _row_op(problem: Problem) -> str:
    """The op of the heaviest pass over rows."""
    return "merge" if problem.base_op in merged_schedule.MERGING and problem.mixes else "aggregate"


def staged(problem: Problem) -> int:
    """Tiles of the streams that a backward stages: x, and besides du and the gradient of x from elsewhere."""
    return 1 if problem.direction == "forward" else 3


def space(problem: Problem, target: Target) -> Mapping[str, tuple[int, ...]]:
    """Project's tiles, thinned out, since every one meets every way to walk the rows; tokens of the coefficients; rows
    of few threads and of many; chunks."""
    usual = default(problem, target)
    tiles = tensor_core_schedule.space(problem, target, staged=staged(problem))
    choices = {name: [value for value in values if value in TILES[name]] for name, values in tiles.items()}
    if usual.threads > max(TILES["threads"]):  # for large tiles, of which the fewest threads would hold too much
        choices["threads"] = [usual.threads // 2]
    choices["merged"] = [0, 1] if merged_schedule.usual(problem, target) else [0]
    vectors = [8 * threads for threads in ROW_THREADS if problem.width % (8 * threads) == 0]
    vectors = sorted({*vectors[:1], *vectors[-1:]})
    threads = [count // 8 for count in vectors] or [64, 128]
    choices |= {"coefficient_tokens": [8, coefficient_threads(problem)], "row_width": vectors, "row_threads": threads}
    choices["fuse_aggregate"] = [0, usual.fuse_aggregate]
    if problem.outputs < tensor_core_schedule.MUCH_OF_PHI:
        choices["presplit_phi"] = []
    chunk = tensor_core_schedule.power_of_two(CHUNK_BYTES // (problem.fan_in * DTYPE_BYTES[problem.dtype]))
    for name, counts in (("row_blocks", ROW_BLOCKS), ("chunk_tokens", (0, chunk))):
        choices[name] = [count for count in counts if count < problem.tokens]
    names = [field.name for field in fields(ChainSchedule)]
    return {name: tuple(sorted({*choices[name], getattr(usual, name)})) for name in names}


def why_invalid(problem: Problem, schedule: ChainSchedule, target: Target) -> str | None:
    """None, or the rule that the schedule breaks."""
    if why := _why_norm(problem):
        return why
    if schedule.merged not in (0, 1):
        return f"merged must be 0 or 1, got {schedule.merged}: choose 0"
    if schedule.merged:
        why = merged_schedule.why_invalid(problem, tiled(schedule), target)
    elif problem.direction == "forward" and schedule.block_width & (schedule.block_width - 1):
        # TileLang 0.1.15 finds no layout for tiles of 48 or 96 columns here.
        return f"block_width must be a power of two where merged is 0, got {schedule.block_width}: choose 64"
    else:
        why = tensor_core_schedule.why_invalid(problem, tiled(schedule), target, staged=staged(problem))
    why = why or why_bad_threads(schedule.row_threads, target)
    why = why or why_not_divisor("row_width", schedule.row_width, problem.width)
    if why:
        return why
    for name, count in (("row_blocks", schedule.row_blocks), ("chunk_tokens", schedule.chunk_tokens)):
        if not 0 <= count < 2**31:
            return f"{name} must be in 0..2**31 - 1, got {count}: choose 0"
    if schedule.fuse_aggregate not in (0, 1):
        return f"fuse_aggregate must be 0 or 1, got {schedule.fuse_aggregate}: choose 0"
    if schedule.fuse_aggregate and not (_aggregates(problem) and _in_registers(problem)):
        return (
            "fuse_aggregate must be 0 but in the forward of pre and step of up to 8 streams, got 1 for "
            f"{problem.op} {problem.direction} of {problem.streams}: choose 0"
        )
    most = coefficient_threads(problem)
    if not 1 <= schedule.coefficient_tokens <= most:
        return f"coefficient_tokens must be in 1..{most}, got {schedule.coefficient_tokens}: choose 8"
    rows = ApplySchedule(schedule.row_width, schedule.row_threads)
    usual = _rows(problem, target)
    if problem.base_op == "single_pass" and schedule.merged and (rows != usual or schedule.row_blocks):
        chosen = f"{rows.block_width}, {rows.threads}, {schedule.row_blocks}"
        return (
            f"row_width, row_threads and row_blocks must be {usual.block_width}, {usual.threads} and 0 where tiles do "
            f"all, got {chosen}: choose those, or merged = 0"
        )
    if rows != usual:
        why = apply.why_invalid(problem.of(_row_op(problem), "backward"), rows, target)
    return why or why_too_much_scratch(_coefficient_scratch(problem, schedule, target), target)


def scratch(problem: Problem, schedule: ChainSchedule, target: Target) -> int:
    """Bytes of shared memory of the kernel that needs most."""
    if schedule.merged:
        tiles = merged_schedule.scratch(problem, tiled(schedule))
    else:
        tiles = tensor_core_schedule.scratch(problem, tiled(schedule), staged=staged(problem))
    return max(tiles, _coefficient_scratch(problem, schedule, target))


def _coefficient_scratch(problem: Problem, schedule: ChainSchedule, target: Target) -> int:
    """Bytes for a block of tokens in the kernel of the coefficients: what threads work on, and rows that they share;
    forward, the sums over splits as well."""
    count, block, of_res = coefficient_threads(problem, schedule), schedule.coefficient_tokens, 0
    if problem.mixes:
        of_res = block * row_stride(problem.streams**2)
    if problem.direction == "backward":
        rows = block * row_stride(problem.outputs) + of_res * (1 + dots_of_streams(problem, schedule))
        return 4 * (coefficients.backward_scratch(problem, count, target) + rows)
    turns, elements = split_sums(problem, schedule)
    return 4 * (count * (coefficients.forward_scratch(problem, 1, target) + turns * elements) + of_res)
