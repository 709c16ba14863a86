"""What pre and step on CUDA are made of besides passes over rows: how these share the tokens, and the macros of the
kernels between them."""

from typing import Any, NamedTuple

import tilelang.language as T

from tiles.kernels.coefficients import gates
from tiles.kernels.fused.chain_schedule import ChainSchedule, lanes, split_sums, tiled
from tiles.kernels.project.matmul_programs import column_groups, gradients, projection, whole_halves
from tiles.kernels.spec import Problem
from tiles.lang.dialect import Dialect
from tiles.lang.program_attrs import checked
from tiles.lang.tensor_cores import tiles_for
from tiles.lang.values import Buffer, Expr, variable

LOADS_AHEAD = 100
"""Loads of a thread that are under way at a time where sums over splits are added up."""

SUM_ROWS, JOIN_THREADS = 32, 256
"""Rows that are summed side by side where the sums of all lane blocks are joined, and threads of that kernel."""


class Rows:
    """How a pass over rows hands out its tokens: one to each thread block, or all to a grid of `row_blocks`."""

    def __init__(self, schedule: ChainSchedule) -> None:
        self._blocks = schedule.row_blocks

    def blocks(self, tokens: Expr) -> Expr:
        """The grid."""
        return self._blocks or tokens

    def turns(self, block: Expr, tokens: Expr) -> Expr:
        """How many tokens a thread block takes."""
        return T.ceildiv(tokens - block, self._blocks) if self._blocks else 1

    def token(self, block: Expr, turn: Expr) -> Expr:
        """The token of a turn: neighbours go to neighbouring blocks at the same time."""
        return variable(block + turn * self._blocks)


class _Sums(NamedTuple):
    """A block's sums [tokens · (N + 1)] as if they were all tokens' [T, N] or, where `column` is given, [T]."""

    near: Buffer
    start: Expr
    outputs: int
    column: int | None

    def __getitem__(self, index: Any) -> Expr:
        token, column = index if self.column is None else (index, self.column)
        return self.near[(token - self.start) * (self.outputs + 1) + column]


class Before:
    """The macros before a sublayer: `cut` phi, `project` for a tile, `coefficients` for a block of tokens."""

    def __init__(self, problem: Problem, schedule: ChainSchedule, dialect: Dialect) -> None:
        block, outputs, splits = schedule.lane_tokens, problem.outputs, schedule.splits
        lane, tiles = gates.Forward(problem, lanes(problem), dialect), tiles_for(dialect)
        turns, elements = split_sums(problem, schedule)
        turn, ahead = lanes(problem) * elements, min(splits, max(1, LOADS_AHEAD // elements))

        @T.macro
        def coefficients(
            alpha: Buffer,
            bias: Buffer,
            eps: Expr,
            pre: Buffer,
            post: Buffer,
            res: Buffer,
            z: Buffer,
            s: Buffer,
            parts: Buffer,
            group: Expr,
            last: Expr,
        ) -> None:
            """The splits' sums in order, then all that comes from them."""
            start, end = variable(group * block), variable(T.min(group * block + block, last))
            held, near = lane.scratch(), dialect.scratch(turns * turn)
            for at in T.serial(turns):
                total = tiles.sums(1, turn)
                for split in T.unroll(splits, unroll_factor=ahead):
                    for _, e in dialect.lanes(1, turn):
                        total[0, e] += parts[split, start * (outputs + 1) + at * turn + e]
                for _, e in dialect.lanes(1, turn):
                    near[at * turn + e] = total[0, e]
            for t, k in dialect.lanes(block, outputs):
                if start + t < end:
                    z[start + t, k] = near[t * (outputs + 1) + k]
            for t in dialect.lanes(block):
                if start + t < end:
                    s[start + t] = near[t * (outputs + 1) + outputs]
            dialect.barrier()
            sums = _Sums(near, start, outputs, None), _Sums(near, start, outputs, outputs)
            lane.run(held, *sums, alpha, bias, eps, start, end)
            lane.store(held, pre, post, res, start, end)

        self.project, self.coefficients = projection(problem, tiled(schedule), dialect), coefficients
        self.cut = whole_halves(problem, tiled(schedule), dialect)
        self._tile = schedule.block_tokens

    def groups(self, tokens: Expr) -> Expr:
        """Tiles of tokens."""
        return T.ceildiv(tokens, self._tile)


class After:
    """The macros on the way back: `coefficients` for a block of tokens, `spread` for a tile of columns, `join`."""

    def __init__(self, problem: Problem, schedule: ChainSchedule, dialect: Dialect) -> None:
        n, outputs, block, each = problem.streams, problem.outputs, schedule.lane_tokens, dialect.each
        count = lanes(problem)
        back = gates.Backward(problem, count, dialect)
        self._schedule = schedule

        @T.macro
        def coefficients(
            dpre: Buffer,
            dpost: Buffer,
            dres: Buffer,
            z: Buffer,
            s: Buffer,
            alpha: Buffer,
            bias: Buffer,
            eps: Expr,
            dz: Buffer,
            ds: Buffer,
            pre: Buffer,
            alphas: Buffer,
            biases: Buffer,
            group: Expr,
            last: Expr,
        ) -> None:
            """dz and ds of a block of tokens, pre again, and the block's sums for dalpha and dbias."""
            start, end = variable(group * block), variable(T.min(group * block + block, last))
            held = back.scratch()
            back.clear(held)
            for i in each(n):
                for lane in dialect.own_lanes(count):
                    held.dpre[i, lane] = dpre[i, T.min(start + lane, end - 1)]
                    held.dpost[i, lane] = dpost[T.min(start + lane, end - 1), i]
                for j in each(n):
                    for lane in dialect.own_lanes(count):
                        held.dres[i, j, lane] = dres[T.min(start + lane, end - 1), i, j]
            back.run(held, z, s, alpha, bias, eps, start, end)
            back.store_logits(held, dz, ds, start, end)
            for i in each(n):
                for lane in dialect.own_lanes(count):
                    pre[T.min(start + lane, end - 1), i] = held.forward.pre[i, lane]
            back.store(held, alphas, biases, group)

        @T.macro
        def join_columns(sums: Buffer, total: Buffer, split: Expr, first: Expr, last: Expr, columns: int) -> None:
            joined = dialect.scratch(SUM_ROWS, columns)
            for r, k in dialect.lanes(SUM_ROWS, columns):
                part = T.alloc_var("float32", init=0.0)
                for step in T.serial(T.ceildiv(last - first, SUM_ROWS)):
                    if first + step * SUM_ROWS + r < last:
                        part += sums[first + step * SUM_ROWS + r, k]
                joined[r, k] = part
            dialect.barrier()
            for k in dialect.lanes(columns):
                whole = T.alloc_var("float32", init=0.0)
                for r in T.serial(SUM_ROWS):
                    whole += joined[r, k]
                total[split, k] = whole

        @T.macro
        def join(
            alphas: Buffer, biases: Buffer, dalpha: Buffer, dbias: Buffer, split: Expr, tokens: Expr, splits: Expr
        ) -> None:
            """One split's part of the blocks' sums."""
            share = variable(T.ceildiv(T.ceildiv(tokens, block), splits))
            first = variable(split * share)
            last = variable(T.min(first + share, T.ceildiv(tokens, block)))
            join_columns(alphas, dalpha, split, first, last, 3)
            join_columns(biases, dbias, split, first, last, outputs)

        part = tiled(schedule)
        self.coefficients, self.join, self.spread = coefficients, join, gradients(problem, part, dialect)
        self.groups = column_groups(problem, part)

    def planned(self, program: Any) -> Any:
        """The program with what the launcher needs to know."""
        schedule = self._schedule
        splits = {"most_splits": schedule.splits, "split_tokens": schedule.block_tokens}
        return checked(program, chunk_tokens=schedule.chunk_tokens, overlap=schedule.overlap, **splits)
