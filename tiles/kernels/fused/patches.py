"""How step's merge walks a tile that has the same columns of all streams: what a CUDA thread has of it to itself."""

from collections.abc import Sequence
from math import gcd
from typing import Any

import tilelang.language as T

from tiles.kernels.fused import merged_schedule
from tiles.kernels.fused.merged_schedule import columns_of, weights_row
from tiles.kernels.project.matmul_schedule import TiledSchedule
from tiles.kernels.spec import Problem
from tiles.lang.dialect import Dialect
from tiles.lang.tensor_cores import tiles_for
from tiles.lang.values import Buffer, Expr, bind

SWIZZLED = 64
"""Columns of a tile for products that shared memory permutes among each other."""


class Patch:
    """Tokens × neighbouring columns of one stream after another. A lane has some columns of one token to itself, which
    move as one vector, and keeps what it has of each stream in an array of its own: element `at` of stream i is at
    i · vector + at."""

    def __init__(self, problem: Problem, schedule: TiledSchedule, dialect: Dialect) -> None:
        columns, vector = columns_of(problem, schedule), merged_schedule.vector(problem, schedule)
        self.vector, self._extents = vector, (schedule.block_tokens, columns // vector)
        self._dialect, self._tiles = dialect, tiles_for(dialect)
        self._columns, self._turns = columns, gcd(problem.streams, max(1, SWIZZLED // columns))
        elements, whole = self._tiles.elements, problem.width % columns == 0

        @T.macro
        def fetch(
            staged: Sequence[Buffer], slot: tuple[Expr, ...], t: Expr, lane: Expr, room: Expr, own: Buffer
        ) -> None:
            """Its elements of each tile: of one slot, where tiles have slots. From column `room` on they are zero."""
            for number in _numbers(staged):
                if whole or lane * vector < room:
                    for at in elements(vector):
                        own[number * vector + at] = staged[number][(*slot, t, lane * vector + at)]
                else:
                    for at in elements(vector):
                        own[number * vector + at] = T.cast(0, own.dtype)

        @T.macro
        def write(own: Buffer, number: int, out: Buffer, row: Expr, column: Expr) -> None:
            """Its elements of one stream."""
            for at in elements(vector):
                out[row, column + at] = own[number * vector + at]

        self.fetch, self.write = fetch, write

    def place(self, stream: Expr, column: Expr) -> Expr:
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

    def lanes(self) -> Any:
        """The outer loop: a token, and a lane of those that share its columns."""
        return self._dialect.lanes(*self._extents)

    def steps(self) -> Any:
        """The inner loop."""
        return T.unroll(self.vector)

    def own(self, streams: int, dtype: str) -> Buffer:
        """What a lane has to itself of so many streams, as stored."""
        return T.alloc_local((streams * self.vector,), self._dialect.storage(dtype))

    def held(self, count: int, dtype: str) -> Buffer:
        """What lanes keep from one loop over them to the next, so many values each."""
        return self._tiles.held((*self._extents, count), dtype)

    def sums(self) -> Buffer:
        """A lane's sum over its columns, zero at first."""
        return self._tiles.sums(*self._extents)


class Weights:
    """post_i, res_ij and, in the backward, pre_i of a block of tokens: a lane takes its token's as vectors."""

    def __init__(self, problem: Problem, schedule: TiledSchedule, dialect: Dialect) -> None:
        n, tokens, every = problem.streams, schedule.block_tokens, dialect.lanes
        row, elements = weights_row(problem), tiles_for(dialect).elements
        self._extents, self._tiles = (tokens, row), tiles_for(dialect)

        @T.macro
        def gather(post: Buffer, res: Buffer, start: Expr, near: Buffer) -> None:
            """post and res."""
            for t, i in every(tokens, n):
                near[t, i] = bind(post[start + t, i])
            for t, k in every(tokens, n * n):
                near[t, n + k] = bind(res[start + t, k // n, k % n])

        @T.macro
        def add(pre: Buffer, start: Expr, near: Buffer) -> None:
            """pre."""
            for t, i in every(tokens, n):
                near[t, n + n * n + i] = bind(pre[start + t, i])

        @T.macro
        def fetch(near: Buffer, t: Expr, own: Buffer) -> None:
            """One token's."""
            for quad in T.unroll(row // 4):
                for k in elements(4):
                    own[quad * 4 + k] = near[t, quad * 4 + k]

        self.gather, self.add, self.fetch = gather, add, fetch

    def tile(self) -> Buffer:
        """What `gather` and `add` fill."""
        return self._tiles.operand(*self._extents, "float32")

    def own(self) -> Buffer:
        """What `fetch` fills: post_i at i, res_ij at n + i · n + j, then pre_i."""
        return T.alloc_local((self._extents[1],), "float32")


def _numbers(sources: Sequence[Any]) -> tuple[int, ...]:
    return tuple(range(len(sources)))
