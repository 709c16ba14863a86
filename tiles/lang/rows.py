"""A row in a lane loop: read and written in place on a CPU, moved in vectors and kept in registers on CUDA."""

from __future__ import annotations

from typing import Any, Protocol

import tilelang.language as T

from tiles.lang.values import Buffer, Expr, bind


class Row(Protocol):
    """Consecutive elements of one row of a tensor [rows, columns], as float32.

    On a CPU they are read and written where they are. A CUDA thread moves its share of them as vectors of up to 16
    bytes, before and after the lane loop, and keeps it in registers.
    """

    def fetch(self, row: Expr, column: Expr) -> None:
        """The next lane loop reads the elements from (row, column) on."""

    def place(self, row: Expr, column: Expr) -> None:
        """The next lane loop writes the elements from (row, column) on; `flush` comes after it."""

    def get(self, lane: Expr) -> Expr:
        """An element."""

    def put(self, lane: Expr, value: Expr) -> None:
        """Write an element."""

    def flush(self) -> None:
        """All elements have been written."""


class CpuRow:
    """A `Row` that is read and written in place; where the loop also writes there, in a copy that a C compiler can tell
    apart: it does not vectorise a loop that reads what it writes."""

    def __init__(self, dialect: Any, tensor: Buffer, dtype: str, lanes: int, copied: bool) -> None:
        self._dialect, self._tensor, self._dtype = dialect, tensor, dtype
        self._copy = T.alloc_local((lanes,), "float32") if copied else None
        self._at: tuple[Expr, Expr] = (0, 0)

    def fetch(self, row: Expr, column: Expr) -> None:
        self.place(row, column)
        if self._copy is not None:
            _stage(self._dialect.load, self._tensor, self._dtype, row, column, self._copy)

    def place(self, row: Expr, column: Expr) -> None:
        self._at = row, column

    def get(self, lane: Expr) -> Expr:
        row, column = self._at
        if self._copy is not None:
            return bind(self._copy[lane])
        return bind(self._dialect.load(self._tensor[row, column + lane], self._dtype))

    def put(self, lane: Expr, value: Expr) -> None:
        row, column = self._at
        _put(self._tensor, (row, column + lane), self._dialect.store(value, self._dtype))

    def flush(self) -> None:
        pass


class CudaRow:
    """A `Row` in registers."""

    def __init__(self, tensor: Buffer, dtype: str, lanes: int) -> None:
        self._tensor, self._dtype, self._lanes = tensor, dtype, lanes
        self._held = T.alloc_fragment((lanes,), dtype)
        self._at: tuple[Expr, Expr] = (0, 0)

    def fetch(self, row: Expr, column: Expr) -> None:
        _copy(self._tensor[row, column : column + self._lanes], self._held)

    def place(self, row: Expr, column: Expr) -> None:
        self._at = row, column

    def get(self, lane: Expr) -> Expr:
        return bind(T.cast(self._held[lane], "float32"))

    def put(self, lane: Expr, value: Expr) -> None:
        _put(self._held, (lane,), T.cast(value, self._dtype))

    def flush(self) -> None:
        row, column = self._at
        _copy(self._held, self._tensor[row, column : column + self._lanes])


@T.macro
def _put(tensor: Buffer, index: Any, value: Expr) -> None:
    tensor[index] = value


@T.macro
def _copy(source: Any, target: Any) -> None:
    T.copy(source, target)


@T.macro
def _stage(load: Any, tensor: Buffer, dtype: str, row: Expr, column: Expr, copy: Buffer) -> None:
    for lane in T.grid(*copy.shape):
        copy[lane] = load(tensor[row, column + lane], dtype)
