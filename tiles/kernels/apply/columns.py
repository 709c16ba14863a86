"""How a block of columns is walked: by a lane loop, or by CUDA threads that have neighbouring columns to themselves."""

from __future__ import annotations

from typing import Any

import tilelang.language as T

from tiles.lang.dialect import Dialect
from tiles.lang.rows import Row
from tiles.lang.values import Buffer, Expr, bind


class Columns:
    """Rows of `block` columns of `dtype`, and a loop nest over them.

    The loop over `lanes()` is outside, that over `steps()` inside; `place` names a column for `Row.get` and `Row.put`.

    With `threads`, each of so many CUDA threads has block / threads neighbouring columns: it moves them as one vector,
    and adds up in one register what it sums over them (`sums`, added to at `dialect.lane(lane)`). Columns that threads
    cannot share evenly, as narrow rows have them, are left to a lane loop.
    """

    def __init__(self, block: int, dtype: str, dialect: Dialect, threads: int = 0) -> None:
        self._block, self._dtype, self._dialect = block, dtype, dialect
        self._threads = 0 if threads and block % threads else threads

    def row(self, tensor: Buffer, *, copied: bool = False) -> Row:
        """See `Dialect.row`."""
        if self._threads:
            return ThreadRow(tensor, self._dtype, self._threads, self._block // self._threads)
        return self._dialect.row(tensor, self._dtype, self._block, copied=copied)

    def sums(self) -> Buffer:
        """An accumulator of sums over columns."""
        return self._dialect.accumulator(self._threads or self._block)

    def lanes(self) -> Any:
        """The outer loop."""
        return self._dialect.lanes(self._threads or self._block)

    def steps(self) -> Any:
        """The inner loop."""
        return T.unroll(self._block // self._threads) if self._threads else T.serial(1)

    def place(self, lane: Expr, step: Expr) -> Any:
        """Where a row finds the column of a lane and a step."""
        return (lane, step) if self._threads else lane + step


class ThreadRow:
    """A `Row` of threads × share elements in registers; an element's place is (thread, step)."""

    def __init__(self, tensor: Buffer, dtype: str, threads: int, share: int) -> None:
        self._tensor, self._dtype = tensor, dtype
        self._held = T.alloc_fragment((threads, share), dtype)
        self._at: tuple[Expr, Expr] = (0, 0)

    def fetch(self, row: Expr, column: Expr) -> None:
        """See `Row`."""
        _fetch(self._tensor, row, column, self._held)

    def place(self, row: Expr, column: Expr) -> None:
        """See `Row`."""
        self._at = row, column

    def get(self, place: Any) -> Expr:
        """See `Row`."""
        return bind(T.cast(self._held[place], "float32"))

    def put(self, place: Any, value: Expr) -> None:
        """See `Row`."""
        _put(self._held, place, T.cast(value, self._dtype))

    def flush(self) -> None:
        """See `Row`."""
        _flush(self._held, self._tensor, *self._at)


@T.macro
def _put(held: Buffer, place: Any, value: Expr) -> None:
    held[place] = value


@T.macro
def _fetch(tensor: Buffer, row: Expr, column: Expr, held: Buffer) -> None:
    for thread, step in T.Parallel(*held.shape):
        held[thread, step] = tensor[row, column + thread * held.shape[1] + step]


@T.macro
def _flush(held: Buffer, tensor: Buffer, row: Expr, column: Expr) -> None:
    for thread, step in T.Parallel(*held.shape):
        tensor[row, column + thread * held.shape[1] + step] = held[thread, step]
