"""Rows of parallel loops: read and written in place on a CPU, moved in vectors and kept in registers on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import tilelang.language as T

from tiles.lang.values import Buffer, Expr, bind


class SourceRow(Protocol):
    """Consecutive elements of one row of a tensor [rows, columns], as float32, which loops read.

    On a CPU they are read where they are. A CUDA thread moves its share of them as vectors of up to 16 bytes, before
    the loop, and keeps it in registers.
    """

    def load(self, row: Expr, column: Expr) -> None:
        """The next loop reads the elements from (row, column) on."""

    def get(self, index: Any) -> Expr:
        """An element."""


class ResultRow(Protocol):
    """The same of elements which loops write; a CUDA thread moves its share after the loop."""

    def store_at(self, row: Expr, column: Expr) -> None:
        """The next loop writes the elements from (row, column) on; `flush` comes after it."""

    def get(self, index: Any) -> Expr:
        """An element that has been written."""

    def put(self, index: Any, value: Expr, *, rounded: bool = False) -> None:
        """Write an element; `rounded` where it is a value of the row's dtype already."""

    def flush(self) -> None:
        """All elements have been written."""


class Row(SourceRow, ResultRow, Protocol):
    """A row that loops may read and write."""


class ElementRow:
    """A CPU's row of float32, which is read and written in place."""

    def __init__(self, tensor: Buffer) -> None:
        self._tensor = tensor
        self._at: tuple[Expr, Expr] = (0, 0)

    def load(self, row: Expr, column: Expr) -> None:
        self.store_at(row, column)

    def store_at(self, row: Expr, column: Expr) -> None:
        self._at = row, column

    def get(self, index: Expr) -> Expr:
        row, column = self._at
        return bind(self._tensor[row, column + index])

    def put(self, index: Expr, value: Expr, *, rounded: bool = False) -> None:
        row, column = self._at
        _put(self._tensor, (row, column + index), value)

    def flush(self) -> None:
        pass


class PairRow:
    """A CPU's row of 16-bit elements, which is read and written in place, two at a time: an element's index is (pair,
    0 or 1), and of a pair 0 is written first. So all vectors of a loop are 32 bits wide, and none is packed."""

    def __init__(self, tensor: Buffer, dtype: str) -> None:
        self._tensor, self._dtype = tensor, dtype
        self._at: tuple[Expr, Expr] = (0, 0)
        self._first: Expr = None

    def load(self, row: Expr, column: Expr) -> None:
        self.store_at(row, column)

    def store_at(self, row: Expr, column: Expr) -> None:
        self._at = row, column

    def get(self, index: Any) -> Expr:
        pair, which = index
        both = T.call_extern("uint32", "mhc_load_pair", self._pointer(pair))
        return bind(T.call_extern("float32", f"mhc_of_pair_{self._dtype}", both, which))

    def put(self, index: Any, value: Expr, *, rounded: bool = False) -> None:
        pair, which = index
        if which == 0:
            self._first = bind(value)
        else:
            how = "mhc_narrow_pair" if rounded else "mhc_pair"
            both = T.call_extern("uint32", f"{how}_{self._dtype}", self._first, value)
            _call("mhc_store_pair", self._pointer(pair), both)

    def flush(self) -> None:
        pass

    def _pointer(self, pair: Expr) -> Expr:
        row, column = self._at
        return T.address_of(self._tensor[row, column + 2 * pair])


class CopiedRow:
    """A CPU's `SourceRow` that is read from a copy, since the loop writes where it reads: a C compiler does not
    vectorise such a loop. `row` makes the row of the copy."""

    def __init__(self, row: Callable[[Buffer], Row], tensor: Buffer, width: int) -> None:
        self._tensor, self._width = tensor, width
        self._held = T.alloc_local((1, width), tensor.dtype)
        self._row = row(self._held)

    def load(self, row: Expr, column: Expr) -> None:
        move("mhc_copy", self._tensor, (row, column), self._held, (0, 0), self._width)
        self._row.load(0, 0)

    def get(self, index: Any) -> Expr:
        return self._row.get(index)


class PrefetchedRow:
    """A CPU's `SourceRow` of the tensor's rows one after the other: while a part of one is worked on, the same part of
    the next is brought into the L1 cache. A stream's row is too short for the processor to see that by itself."""

    def __init__(self, row: SourceRow, tensor: Buffer, width: int) -> None:
        self._row, self._tensor, self._width = row, tensor, width

    def load(self, row: Expr, column: Expr) -> None:
        prefetch(self._tensor, (row + 1, column), self._width, level=1)
        self._row.load(row, column)

    def get(self, index: Any) -> Expr:
        return self._row.get(index)


class NontemporalRow:
    """A CPU's `ResultRow` that is kept as it is stored, and moved past the caches when it is whole. `row` makes
    the row of what is kept."""

    def __init__(self, row: Callable[[Buffer], Row], tensor: Buffer, width: int) -> None:
        self._tensor, self._width = tensor, width
        self._held = T.alloc_local((1, width), tensor.dtype)
        self._row = row(self._held)
        self._at: tuple[Expr, Expr] = (0, 0)

    def store_at(self, row: Expr, column: Expr) -> None:
        self._at = row, column
        self._row.store_at(0, 0)

    def get(self, index: Any) -> Expr:
        return self._row.get(index)

    def put(self, index: Any, value: Expr, *, rounded: bool = False) -> None:
        self._row.put(index, value, rounded=rounded)

    def flush(self) -> None:
        move("mhc_stream", self._held, (0, 0), self._tensor, self._at, self._width)


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

    def put(self, index: Expr, value: Expr, *, rounded: bool = False) -> None:
        _put(self._held, (index,), T.cast(value, self._dtype))

    def flush(self) -> None:
        row, column = self._at
        _copy(self._held, self._tensor[row, column : column + self._width])


@T.macro
def _put(tensor: Buffer, index: Any, value: Expr) -> None:
    tensor[index] = value


def move(how: str, source: Buffer, first: Any, target: Buffer, at: Any, count: int) -> Any:
    """Move `count` elements as they are stored: mhc_copy, or mhc_stream past a CPU's caches (non-temporal stores)."""
    _call(f"{how}_{target.dtype}", T.address_of(target[at]), T.address_of(source[first]), count)


def prefetch(tensor: Buffer, place: tuple[Expr, ...], count: int, *, level: int) -> Any:
    """Bring `count` elements into a CPU's cache of a level, 1 or 2; they may lie past the tensor's end."""
    _call(f"mhc_prefetch_l{level}_{tensor.dtype}", T.address_of(tensor[place]), count)


@T.macro
def _call(function: str, *arguments: Expr) -> None:
    T.call_extern("int32", function, *arguments)


@T.macro
def _copy(source: Any, target: Any) -> None:
    T.copy(source, target)
