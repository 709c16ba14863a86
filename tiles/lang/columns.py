"""Blocks of columns: walked by a parallel loop, or by CUDA threads that have neighbouring columns to themselves."""

from __future__ import annotations

from typing import Any

import tilelang.language as T

from tiles.lang.dialect import Dialect
from tiles.lang.rows import ResultRow, SourceRow
from tiles.lang.values import Buffer, Expr, bind


class Columns:
    """Rows of `block` columns of `dtype`, and a loop nest over them.

    The loop over `outer()` is outside, that over `inner()` inside; `index` names a column for a row's `get` and `put`.

    With `threads`, each of so many CUDA threads has block / threads neighbouring columns: it moves them as one vector,
    and adds up in one register what it sums over them (`sums`, added to at `dialect.partial_index(outer)`). Columns
    that threads cannot share evenly, as narrow rows have them, are left to a parallel loop.

    With `nontemporal`, a CPU stores `result` rows past its caches; they are not read again then. With `prefetched`, it
    brings in what the next row has in the same columns.
    """

    def __init__(
        self,
        block: int,
        dtype: str,
        dialect: Dialect,
        threads: int = 0,
        *,
        nontemporal: bool = False,
        prefetched: bool = False,
    ) -> None:
        self._block, self._dtype, self._dialect = block, dtype, dialect
        self._nontemporal, self._prefetched = nontemporal, prefetched
        self._threads = 0 if threads and block % threads else threads
        self._packed = dialect.packed(dtype)

    def row(self, tensor: Buffer, *, copied: bool = False) -> SourceRow:
        """See `Dialect.row`."""
        if self._threads:
            return ThreadRow(tensor, self._dtype, self._threads, self._block // self._threads)
        copied = copied and not self._nontemporal
        return self._dialect.row(tensor, self._dtype, self._block, copied=copied, prefetched=self._prefetched)

    def result(self, tensor: Buffer) -> ResultRow:
        """A row that is written."""
        if self._threads:
            return ThreadRow(tensor, self._dtype, self._threads, self._block // self._threads)
        return self._dialect.result(tensor, self._dtype, self._block, nontemporal=self._nontemporal)

    def sums(self) -> Buffer:
        """An accumulator of sums over columns."""
        return self._dialect.accumulator(self._threads or self._block)

    def outer(self) -> Any:
        """The outer loop."""
        return self._dialect.parallel(self._threads or self._block // self._packed)

    def inner(self) -> Any:
        """The inner loop."""
        return T.unroll(self._block // self._threads) if self._threads else tuple(range(self._packed))

    def index(self, outer: Expr, inner: Expr) -> Any:
        """Where a row finds the column of both loops' variables."""
        return (outer, inner) if self._threads or self._packed > 1 else outer + inner

    def place(self, outer: Expr, inner: Expr) -> Expr:
        """Which of the block's columns that is, on a CPU."""
        return outer * self._packed + inner


class ThreadRow:
    """A `Row` of threads × share elements in registers; an element's index is (thread, place in its share)."""

    def __init__(self, tensor: Buffer, dtype: str, threads: int, share: int) -> None:
        self._tensor, self._dtype = tensor, dtype
        self._held = T.alloc_fragment((threads, share), dtype)
        self._at: tuple[Expr, Expr] = (0, 0)

    def load(self, row: Expr, column: Expr) -> None:
        """See `Row`."""
        _load(self._tensor, row, column, self._held)

    def store_at(self, row: Expr, column: Expr) -> None:
        """See `Row`."""
        self._at = row, column

    def get(self, index: Any) -> Expr:
        """See `Row`."""
        return bind(T.cast(self._held[index], "float32"))

    def put(self, index: Any, value: Expr, *, rounded: bool = False) -> None:
        """See `Row`."""
        _put(self._held, index, T.cast(value, self._dtype))

    def flush(self) -> None:
        """See `Row`."""
        _flush(self._held, self._tensor, *self._at)


@T.macro
def _put(held: Buffer, index: Any, value: Expr) -> None:
    held[index] = value


@T.macro
def _load(tensor: Buffer, row: Expr, column: Expr, held: Buffer) -> None:
    for thread, step in T.Parallel(*held.shape):
        held[thread, step] = tensor[row, column + thread * held.shape[1] + step]


@T.macro
def _flush(held: Buffer, tensor: Buffer, row: Expr, column: Expr) -> None:
    for thread, step in T.Parallel(*held.shape):
        tensor[row, column + thread * held.shape[1] + step] = held[thread, step]
