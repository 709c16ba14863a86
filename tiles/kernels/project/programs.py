"""project as TileLang programs (docs/design.md, the maths): a tall, thin matmul and the squared norm, with x read once.
Here are those for a CPU, in register blocks; `tensor_core_programs` has those for CUDA.

`projection` and `gradients` make the macros that the fused kernels share. Streams are flattened, x̄ [T, K]: stream i of
a token begins at column i·C. Tokens past the end are clamped to the last one and never stored.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tilelang.language as T

from tiles.kernels.limits import LANES
from tiles.kernels.project import tensor_core_programs
from tiles.kernels.project.schedule import BackwardSchedule, ForwardSchedule, Schedule
from tiles.kernels.project.signature import arguments
from tiles.kernels.project.tensor_core_schedule import TiledSchedule
from tiles.kernels.spec import Problem
from tiles.lang.dialect import Cpu, Cuda, Dialect, View
from tiles.lang.epilogue import Others
from tiles.lang.epilogue import gradients as stream_gradients
from tiles.lang.program import program
from tiles.lang.rows import move
from tiles.lang.values import Buffer, Expr, as_value, bind, token_range, variable

LINE = 32
"""Columns that are brought in together: a cache line of 16-bit elements."""


def forward(problem: Problem, schedule: Schedule, dialect: Dialect) -> Any:
    """z_tk = Σ_c x̄_tc phi_kc;  s_t = Σ_c x̄_tc²."""
    if isinstance(schedule, TiledSchedule):
        assert isinstance(dialect, Cuda)
        return tensor_core_programs.forward(problem, schedule, dialect)
    assert isinstance(schedule, ForwardSchedule)
    assert isinstance(dialect, Cpu)
    project = projection(problem, schedule, dialect, lambda p: (p.x,), schedule.register_tokens)

    @program(arguments(problem), dialect)
    def project_forward(p: Any) -> None:
        with dialect.kernel(T.ceildiv(p.tokens, schedule.register_tokens), threads=schedule.threads) as block:
            project(p, block * schedule.register_tokens, as_value(p.tokens))

    return project_forward


def projection(
    problem: Problem, schedule: Any, dialect: Cpu, soon: Callable[[Any], tuple[Buffer, ...]], ahead: int
) -> Any:
    """The macro that projects one register block of tokens, start..start + register_tokens as far as below `last`.

    Meanwhile it brings in what is read next: the same part of the rows, `ahead` tokens later, of the tensors `soon`.
    """
    fan_in, outputs, width = problem.fan_in, problem.outputs, schedule.block_width
    rows = tuple(range(schedule.register_tokens))
    groups = output_groups(outputs, schedule.register_outputs)

    prefetch = prefetch_of(problem, width, groups, dialect)
    # A C compiler may add up what is left of a row in another order than what is left of the next.
    vectors_fill_rows = width % (4 * LANES) == 0

    @T.macro
    def add_group(dots: Buffer, staged: Buffer, phi: Buffer, chunk: Expr, k: Expr, size: int) -> None:
        weights = View(phi, (k, chunk * width), (0, 1))
        sums = View(dots, (0, k, 0), (0, 1))
        dialect.add_dots(sums, View(staged, (0, 0), (0, 1)), weights, len(rows), size, width)

    @T.macro
    def project(p: Any, start: Expr, last: Expr) -> None:
        token = [variable(T.min(start + t, last - 1)) for t in rows]
        staged = dialect.scratch(len(rows), width)
        squares = [dialect.accumulator(width) for _ in rows]
        dots = dialect.dot_sums(len(rows), outputs)
        for chunk in T.serial(fan_in // width):
            for index in dialect.parallel(width):
                at = dialect.partial_index(index)
                for t in rows:
                    value = bind(dialect.load(p.x[token[t], chunk * width + index], problem.dtype))
                    staged[t, index] = value
                    if vectors_fill_rows:
                        squares[t][at] += value * value
            if not vectors_fill_rows:
                for t in rows:
                    squares[t][0] += dialect.squares(staged, (t, 0), width)
            for g in T.serial(groups.whole):
                prefetch(soon(p), [token[t] + ahead for t in rows], chunk * width, g)
                add_group(dots, staged, p.phi, chunk, g * groups.size, groups.size)
            if groups.rest > 0:
                prefetch(soon(p), [token[t] + ahead for t in rows], chunk * width, groups.whole)
                add_group(dots, staged, p.phi, chunk, groups.whole * groups.size, groups.rest)
        for t in rows:
            if start + t < last:
                p.s[token[t]] = squares[t][0]
                for k in dialect.parallel(outputs):
                    p.z[token[t], k] = dialect.dot_sum(dots, t, k)

    return project


def backward(problem: Problem, schedule: Schedule, dialect: Dialect) -> Any:
    """dx̄_tc = Σ_k dz_tk phi_kc + 2 ds_t x̄_tc;  dphi_kc = Σ_t dz_tk x̄_tc, one partial sum per split of the tokens."""
    if isinstance(schedule, TiledSchedule):
        assert isinstance(dialect, Cuda)
        return tensor_core_programs.backward(problem, schedule, dialect)
    assert isinstance(schedule, BackwardSchedule)
    assert isinstance(dialect, Cpu)
    outputs, block, width = problem.outputs, schedule.block_tokens, schedule.block_width
    columns = problem.fan_in // schedule.column_groups
    dx_dphi_tile = gradients(problem, schedule, dialect, nontemporal=bool(schedule.nontemporal))

    @program(arguments(problem), dialect)
    def project_backward(p: Any) -> None:
        with dialect.kernel(schedule.column_groups, p.splits, threads=schedule.threads) as (group, split):
            factors, slope = dialect.scratch(outputs, block), dialect.scratch(block)
            written = () if schedule.nontemporal else (p.dx,)
            for k in T.serial(outputs):
                for index in dialect.parallel(columns):
                    p.dphi[split, k, group * columns + index] = T.float32(0)
            first, last, blocks = token_range(p.tokens, split, p.splits, block)
            for step in T.serial(blocks[0]):
                start = bind(first[0] + step * block)
                for index in dialect.parallel(block):
                    token = T.min(start + index, last[0] - 1)
                    slope[index] = p.ds[token]
                    for k in T.serial(outputs):
                        factors[k, index] = p.dz[token, k]
                for part in T.serial(columns // width):
                    column = bind(group * columns + part * width)
                    dx_dphi_tile(p, factors, slope, split, start, last[0], column, None, written)

    return project_backward


def gradients(problem: Problem, schedule: Any, dialect: Cpu, *, nontemporal: bool = False) -> Any:
    """The macro for a block of tokens and columns: dphi += dzᵀ·x̄ and dx̄ = dz·phi + 2 x̄ ds + others, of x, phi, dx and
    dphi. `nontemporal`: dx goes past the caches.

    dz comes as `factors` [N, block_tokens], ds as `slope` [block_tokens]. `others`, where given, makes what else rows
    gain from (token in the block, token). The rows of `soon` are read or written with dx: they come in before.
    """
    outputs, width, dtype, block = problem.outputs, schedule.block_width, problem.dtype, schedule.block_tokens
    rows, groups = schedule.register_tokens, output_groups(outputs, schedule.register_outputs)
    share = -(-block // (groups.whole + (groups.rest > 0)))

    @T.macro
    def add_group(
        dphi: Buffer, factors: Buffer, staged: Buffer, split: Expr, column: Expr, k: Expr, size: int, count: Expr
    ) -> None:
        out, of_tokens = View(dphi, (split, k, column), (1, 2)), View(factors, (k, 0), (0, 1))
        dialect.add_product(out, of_tokens, View(staged, (0, 0), (0, 1)), size, count, width)

    @T.macro
    def prefetch(tensors: tuple[Buffer, ...], first: Expr, count: int, column: Expr) -> None:
        for t in T.serial(count):
            dialect.prefetch(tensors, (first + t, column), width)

    @T.macro
    def dx_rows(
        p: Any,
        factors: Buffer,
        slope: Buffer,
        staged: Buffer,
        result: Buffer | None,
        start: Expr,
        t: Expr,
        column: Expr,
        size: int,
        others: Callable[[Expr, Expr], Others] | None,
    ) -> None:
        """dx of tokens t..t + size of the block. Meanwhile the next block of columns of x comes in."""
        prefetch((p.x,), start + t, size, column + width)
        out = View(p.dx, (start + t, column), (0, 1)) if result is None else View(result, (0, 0), (0, 1))
        of_x, of_outputs = View(staged, (t, 0), (0, 1)), View(factors, (0, t), (1, 0))
        more = None if others is None else others(t, start + t)
        phi, slopes = View(p.phi, (0, column), (0, 1)), View(slope, (t,), (0, 0))
        stream_gradients(out, of_outputs, phi, of_x, slopes, more, dtype, size, outputs, width)
        if result is not None:
            for row in range(size):
                move("mhc_stream", result, (row, 0), p.dx, (start + t + row, column), width)

    @T.macro
    def dx_dphi_tile(
        p: Any,
        factors: Buffer,
        slope: Buffer,
        split: Expr,
        start: Expr,
        last: Expr,
        column: Expr,
        others: Callable[[Expr, Expr], Others] | None,
        soon: tuple[Buffer, ...],
    ) -> None:
        staged = dialect.scratch(block, width)
        result = T.alloc_local((rows, width), dialect.storage(dtype)) if nontemporal else None
        count = variable(T.min(block, last - start))
        for t in T.serial(count):
            for index in dialect.parallel(width):
                staged[t, index] = dialect.load(p.x[start + t, column + index], dtype)
        for g in T.serial(groups.whole):
            prefetch(soon, start + g * share, share, column)
            add_group(p.dphi, factors, staged, split, column, g * groups.size, groups.size, count)
        if groups.rest > 0:
            prefetch(soon, start + groups.whole * share, share, column)
            add_group(p.dphi, factors, staged, split, column, groups.whole * groups.size, groups.rest, count)
        done = 0
        for size in dict.fromkeys((rows, 2, 1)):  # the last tokens in smaller register blocks
            whole = variable((count - done) // size)
            for r in T.serial(whole):
                dx_rows(p, factors, slope, staged, result, start, variable(done + r * size), column, size, others)
            done = variable(done + whole * size)

    return dx_dphi_tile


class Groups(NamedTuple):
    """Outputs cut into register blocks: how many whole ones of `size`, and the outputs that are left."""

    size: int
    whole: int
    rest: int


def prefetch_of(problem: Problem, width: int, groups: Groups, dialect: Cpu) -> Any:
    """A function that brings in, before one of the calls that go through `groups`, its piece of `width` columns of the
    streams from `column` on: of each of these tensors, as far as a row of it is as long as the streams'."""
    piece = -(-width // (groups.whole + (groups.rest > 0)) // LINE) * LINE

    def prefetch(tensors: Sequence[Buffer], tokens: Sequence[Expr], column: Expr, call: Expr) -> None:
        for token in tokens:
            for tensor in tensors:
                share = problem.fan_in // int(tensor.shape[1])
                dialect.prefetch((tensor,), (token, (column + call * piece) // share), -(-piece // share))

    return prefetch


def output_groups(outputs: int, size: int) -> Groups:
    """Cut `outputs` into blocks of `size`."""
    return Groups(size, outputs // size, outputs % size)
