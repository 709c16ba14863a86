"""Rows of a block of tokens in shared memory, between tensors and threads that take a token each.

Such threads touch 4 bytes of a sector of global memory at a time, the threads that copy rows all of it.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import tilelang.language as T
from tilelang import tvm

from tiles.kernels.fused.chain_schedule import row_stride
from tiles.lang.dialect import Cuda
from tiles.lang.values import Buffer, Expr, bind

NEIGHBOURS = tvm.tirx.IntImm("int32", 1)
"""Elements in a row that a thread copies: TileLang 0.1.15 would take four, which then move one by one."""


class TokenRows:
    """The rows that a block of tokens has in a float32 tensor [T, *shape]: the macros `load` and `save`, for the tokens
    start..end, and `of`, the rows as if they were the tensor."""

    def __init__(self, dialect: Cuda, block: int, *shape: int) -> None:
        self._dialect, self._block, self._shape = dialect, block, shape

        @T.macro
        def load(tensor: Buffer, held: Buffer, start: Expr, end: Expr) -> None:
            for at in T.Parallel(block, *shape, coalesced_width=NEIGHBOURS):
                if start + at[0] < end:
                    held[at[0], _flat(at[1:], shape)] = bind(tensor[(start + at[0], *at[1:])])

        @T.macro
        def save(held: Buffer, tensor: Buffer, start: Expr, end: Expr) -> None:
            for at in T.Parallel(block, *shape, coalesced_width=NEIGHBOURS):
                if start + at[0] < end:
                    tensor[(start + at[0], *at[1:])] = held[at[0], _flat(at[1:], shape)]

        self.load, self.save = load, save

    def scratch(self) -> Buffer:
        """Shared memory for the rows."""
        return self._dialect.scratch(self._block, row_stride(prod(self._shape)))

    def of(self, held: Buffer, start: Expr) -> "RowsOf":
        """The rows by their tokens."""
        return RowsOf(held, start, self._shape)


class RowsOf(NamedTuple):
    """A block's rows as if they were all tokens' [T, *shape]."""

    held: Buffer
    start: Expr
    shape: tuple[int, ...]

    def __getitem__(self, index: Any) -> Expr:
        return self.held[self._place(index)]

    def __setitem__(self, index: Any, value: Expr) -> None:
        _put(self.held, self._place(index), value)

    def _place(self, index: Any) -> tuple[Expr, Expr]:
        token, *at = index
        return token - self.start, _flat(at, self.shape)


def _flat(at: Sequence[Expr], shape: tuple[int, ...]) -> Expr:
    """The place in a row of what is at `at` in a tensor."""
    place = at[0]
    for size, index in zip(shape[1:], at[1:], strict=True):
        place = place * size + index
    return place


@T.macro
def _put(held: Buffer, index: Any, value: Expr) -> None:
    held[index] = value
