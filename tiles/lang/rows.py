"""Rows of parallel loops: read and written in place on a CPU, moved in vectors and kept in registers on CUDA."""

from __future__ import annotations

from typing import Any, Protocol

import tilelang.language as T

from tiles.lang.values import Buffer, Expr, bind


class Row(Protocol):
    """Consecutive elements of one row of a tensor [rows, columns], as float32.

    On a CPU they are read and written where they are. A CUDA thread moves its share of them as vectors of up to 16
    bytes, before and after the loop, and keeps it in registers.
    """

    def load(self, row: Expr, column: Expr) -> None:
        """The next loop reads the elements from (row, column) on."""

    def store_at(self, row: Expr, column: Expr) -> None:
        """The next loop writes the elements from (row, column) on; `flush` comes after it."""

    def get(self, index: Expr) -> Expr:
        """An element."""

    def put(self, index: Expr, value: Expr) -> None:
        """Write an element."""

    def flush(self) -> None:
        """All elements have been written."""


class CpuRow:
    """A `Row` that is read and written in place; where the loop also writes there, read from a copy: a C compiler does
    not vectorise a loop that reads what it writes."""

    def __init__(self, dialect: Any, tensor: Buffer, dtype: str, width: int, copied: bool) -> None:
        self._dialect, self._tensor, self._dtype = dialect, tensor, dtype
        self._copy = T.alloc_local((width,), "float32") if copied else None
        self._at: tuple[Expr, Expr] = (0, 0)

    def load(self, row: Expr, column: Expr) -> None:
        self.store_at(row, column)
        if self._copy is not None:
            _copy_row(self._dialect.load, self._tensor, self._dtype, row, column, self._copy)

    def store_at(self, row: Expr, column: Expr) -> None:
        self._at = row, column

    def get(self, index: Expr) -> Expr:
        row, column = self._at
        if self._copy is not None:
            return bind(self._copy[index])
        return bind(self._dialect.load(self._tensor[row, column + index], self._dtype))

    def put(self, index: Expr, value: Expr) -> None:
        row, column = self._at
        _put(self._tensor, (row, column + index), self._dialect.store(value, self._dtype))

    def flush(self) -> None:
        pass


class CudaRow:
    """A `Row` in registers."""

    def __init__(self, tensor: Buffer, dtype: str, width: int) -> None:
        self._tensor, self._dtype, self._width = tensor, dtype, width
        self._held = T.alloc_fragment((width,), dtype)
        self._at: tuple[Expr, Expr] = (0, 0)

    def load(self, row: Expr, column: Expr) -> None:
        _copy(self._tensor[row, column : column + self._width], self._held)

    def store_at(self, row: Expr, column: Expr) -> None:
        self._at = row, column

    def get(self, index: Expr) -> Expr:
        return bind(T.cast(self._held[index], "float32"))

    def put(self, index: Expr, value: Expr) -> None:
        _put(self._held, (index,), T.cast(value, self._dtype))

    def flush(self) -> None:
        row, column = self._at
        _copy(self._held, self._tensor[row, column : column + self._width])


@T.macro
def _put(tensor: Buffer, index: Any, value: Expr) -> None:
    tensor[index] = value


@T.macro
def _copy(source: Any, target: Any) -> None:
    T.copy(source, target)


@T.macro
def _copy_row(load: Any, tensor: Buffer, dtype: str, row: Expr, column: Expr, copy: Buffer) -> None:
    for index in T.grid(*copy.shape):
        copy[index] = load(tensor[row, column + index], dtype)
