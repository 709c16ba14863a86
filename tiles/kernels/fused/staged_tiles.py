"""Tiles that a merged backward copies ahead of their turn: x, f, dx' and du, in several stages of shared memory."""

from typing import Any, NamedTuple

import tilelang.language as T

from tiles.kernels.fused.merged_schedule import columns_of, copies_streams_together
from tiles.kernels.project.tensor_core_schedule import TiledSchedule
from tiles.kernels.spec import Problem
from tiles.lang.dialect import Cuda
from tiles.lang.tensor_cores import TensorCores
from tiles.lang.values import Buffer, Expr


class StagedTiles:
    """x, f, dx', du of a block of tokens: `begin` copies them to a stage of what `allocate` gives, in `count` groups,
    and `of` has a stage's tiles [tokens, columns], stream by stream. All streams are one tile where that makes vectors
    of 16 bytes."""

    def __init__(self, problem: Problem, schedule: TiledSchedule, dialect: Cuda) -> None:
        tiles, n, columns = TensorCores(dialect), problem.streams, columns_of(problem, schedule)
        together, streams = copies_streams_together(problem, schedule), tuple(range(n))
        self.count = 4 if together else 2 * (n + 1)
        self._stages, self._shape, self._dtype = schedule.stages, (schedule.block_tokens, columns), problem.dtype
        self._tiles, self._streams, self._together = tiles, n, together

        @T.macro
        def copy(tensor: Buffer, row: Expr, column: Expr, staged: Any, stage: Expr) -> None:
            """The same columns of all streams."""
            if together:
                tiles.async_copy_streams_g2s(tensor, row, column, staged[0], stage)
            else:
                for i in streams:
                    tiles.async_copy_g2s(tensor, row, i * problem.width + column, staged[i], stage)

        @T.macro
        def begin(p: Any, row: Expr, column: Expr, staged: Any, stage: Expr) -> None:
            copy(p.x, row, column, staged.x, stage)
            copy(p.dx_next, row, column, staged.dx_next, stage)
            tiles.async_copy_g2s(p.f, row, column, staged.f, stage)
            tiles.async_copy_g2s(p.du, row, column, staged.du, stage)

        self.begin = begin

    def allocate(self) -> "Stages":
        """All stages, in shared memory."""
        return Stages(self._all_streams(), self._sublayer(), self._all_streams(), self._sublayer())

    def of(self, staged: "Stages", stage: Expr) -> list["_Tile"]:
        """The tiles of x and f, then of dx' and du."""
        return [
            *self._of_streams(staged.x, stage),
            _Tile(staged.f, stage, ()),
            *self._of_streams(staged.dx_next, stage),
            _Tile(staged.du, stage, ()),
        ]

    def _all_streams(self) -> tuple[Buffer, ...]:
        rows, columns = self._shape
        if self._together:
            return (self._tiles.multistage_streams(self._stages, rows, self._streams, columns, self._dtype),)
        return tuple(self._sublayer() for _ in range(self._streams))

    def _sublayer(self) -> Buffer:
        return self._tiles.multistage_smem(self._stages, *self._shape, self._dtype)

    def _of_streams(self, staged: tuple[Buffer, ...], stage: Expr) -> list["_Tile"]:
        if self._together:
            return [_Tile(staged[0], stage, (i,)) for i in range(self._streams)]
        return [_Tile(tile, stage, ()) for tile in staged]


class Stages(NamedTuple):
    """Shared memory of all stages; streams are in one tile [stages, tokens, n, columns] or in one each."""

    x: tuple[Buffer, ...]
    f: Buffer
    dx_next: tuple[Buffer, ...]
    du: Buffer


class _Tile(NamedTuple):
    """One stage of one stream, or of a sublayer's input or output, as [tokens, columns]."""

    tiles: Buffer
    stage: Expr
    stream: tuple[int, ...]

    def __getitem__(self, index: Any) -> Expr:
        token, column = index
        return self.tiles[(self.stage, token, *self.stream, column)]
