"""Thread tiles of a merge inside of project's tiles: what a CUDA thread has to itself of a tile of all streams."""

from collections.abc import Sequence
from math import gcd
from typing import Any

import tilelang.language as T

from tiles.kernels.fused import merged_schedule
from tiles.kernels.fused.merged_schedule import columns_of, weights_row
from tiles.kernels.project.tensor_core_schedule import TiledSchedule
from tiles.kernels.spec import Problem
from tiles.lang.dialect import Cuda
from tiles.lang.tensor_cores import TensorCores
from tiles.lang.values import Buffer, Expr, bind

SWIZZLED = 64
"""Columns of a tile for products that shared memory permutes among each other."""


class ThreadTile:
    """Tokens × neighbouring columns of one stream after another. A thread has some columns of one token to itself,
    which move as one vector, and keeps what it has of each stream in an array of its own: element `at` of stream i is
    at i · vector + at."""

    def __init__(self, problem: Problem, schedule: TiledSchedule, dialect: Cuda) -> None:
        columns, vector = columns_of(problem, schedule), merged_schedule.vector(problem, schedule)
        self.vector, self._extents = vector, (schedule.block_tokens, columns // vector)
        self._dialect, self._tiles = dialect, TensorCores(dialect)
        self._columns, self._turns = columns, gcd(problem.streams, max(1, SWIZZLED // columns))
        elements, whole = self._tiles.vectorized, problem.width % columns == 0

        def within(value: Expr, inside: Expr) -> Expr:
            return value if whole else T.if_then_else(inside, value, T.cast(0, value.dtype))

        @T.macro
        def load(tiles: Sequence[Any], t: Expr, thread: Expr, room: Expr, held: Buffer) -> None:
            """Its elements of each tile [tokens, columns]; zeros from column `room` on."""
            for number in _numbers(tiles):
                if whole or thread * vector < room:
                    for at in elements(vector):
                        held[number * vector + at] = tiles[number][t, thread * vector + at]
                else:
                    for at in elements(vector):
                        held[number * vector + at] = T.cast(0, held.dtype)

        @T.macro
        def hold(tiles: Sequence[Any], t: Expr, thread: Expr, room: Expr, fragments: Sequence[Buffer]) -> None:
            """The same into a `fragment` for each tile, which another loop reads."""
            for number in _numbers(tiles):
                for at in elements(vector):
                    fragments[number][t, thread, at] = within(
                        tiles[number][t, thread * vector + at], thread * vector < room
                    )

        @T.macro
        def write(held: Buffer, number: int, out: Buffer, row: Expr, column: Expr) -> None:
            """Its elements of one stream."""
            for at in elements(vector):
                out[row, column + at] = held[number * vector + at]

        self.load, self.hold, self.write = load, hold, write

    def swizzled(self, stream: Expr, column: Expr) -> Expr:
        """Where a tile for products has a column of a stream. Streams take turns by 8 columns: what neighbouring
        threads write, of two tokens or four, goes to different banks of swizzled rows then."""
        turns, width = self._turns, 8 * self._turns
        return stream // turns * (turns * self._columns) + column // 8 * width + stream % turns * 8 + column % 8

    def origin(self, place: Expr) -> tuple[Expr, Expr]:
        """The way back: the stream and the column that are at a place."""
        turns, width = self._turns, 8 * self._turns
        within = place % (turns * self._columns)
        stream = place // (turns * self._columns) * turns + within % width // 8
        return stream, within // width * 8 + within % 8

    def threads(self) -> Any:
        """The outer loop: a token, and a thread of those that share its columns."""
        return self._dialect.parallel(*self._extents)

    def steps(self) -> Any:
        """The inner loop."""
        return T.unroll(self.vector)

    def registers(self, streams: int, dtype: str) -> Buffer:
        """Registers for a thread's columns of so many streams, as stored."""
        return T.alloc_local((streams * self.vector,), self._dialect.storage(dtype))

    def fragment(self, count: int, dtype: str) -> Buffer:
        """What threads keep from one such loop to the next, so many values each."""
        return self._tiles.fragment((*self._extents, count), dtype)

    def sums(self) -> Buffer:
        """A thread's sum over its columns, zero at first."""
        return self._tiles.accumulator(*self._extents)


class Weights:
    """post_i, res_ij and, where it is known, pre_i of a block of tokens: a thread takes its token's as vectors."""

    def __init__(self, problem: Problem, schedule: TiledSchedule, dialect: Cuda) -> None:
        n, tokens, every = problem.streams, schedule.block_tokens, dialect.parallel
        row, elements = weights_row(problem), TensorCores(dialect).vectorized
        self._extents, self._tiles = (tokens, row), TensorCores(dialect)

        @T.macro
        def gather(p: Any, start: Expr, smem_weights: Buffer) -> None:
            """post and res."""
            for t, i in every(tokens, n):
                smem_weights[t, i] = bind(p.post[start + t, i])
            if problem.mixes:
                for t, k in every(tokens, n * n):
                    smem_weights[t, n + k] = bind(p.res[start + t, k // n, k % n])

        @T.macro
        def add(pre: Buffer, start: Expr, smem_weights: Buffer) -> None:
            """pre."""
            for t, i in every(tokens, n):
                smem_weights[t, problem.weights + i] = bind(pre[start + t, i])

        @T.macro
        def load(smem_weights: Buffer, t: Expr, held: Buffer) -> None:
            """One token's."""
            for quad in T.unroll(row // 4):
                for k in elements(4):
                    held[quad * 4 + k] = smem_weights[t, quad * 4 + k]

        self.gather, self.add, self.load, self._problem = gather, add, load, problem

    def res(self, held: Buffer) -> Any:
        """res of what `load` has filled, as `merged` takes it."""
        n = self._problem.streams
        return [[held[n + i * n + j] for j in range(n)] for i in range(n)] if self._problem.mixes else None

    def gates(self, held: Buffer) -> list[Expr]:
        """post of what `load` has filled."""
        return [held[i] for i in range(self._problem.streams)]

    def tile(self) -> Buffer:
        """What `gather` and `add` fill."""
        return self._tiles.smem(*self._extents, "float32")

    def registers(self) -> Buffer:
        """What `load` fills: post_i at i, res_ij where it has any at n + i · n + j, then pre_i."""
        return T.alloc_local((self._extents[1],), "float32")


def _numbers(sources: Sequence[Any]) -> tuple[int, ...]:
    return tuple(range(len(sources)))
