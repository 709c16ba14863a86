"""Tensor cores: tiles in shared memory, cp.async pipelines and matrix products of CUDA programs.

Matrices of float32 are multiplied as sums of bfloat16 parts, a = a₀ + a₁ with a₀ = bfloat16(a), a₁ = bfloat16(a − a₀):
16 bits of a survive, products are exact in float32, and tensor cores are at their fastest. One pass with TF32 takes as
long as two with bfloat16 and keeps 10 bits.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T
from tilelang.layout import Layout

from tiles.lang.dialect import Cuda
from tiles.lang.storage import ROW_PADDING
from tiles.lang.values import Buffer, Expr

OPERAND = "bfloat16"
"""The dtype of operands, which has float32's range."""


def split_bf16x2(dialect: Any, value: Expr, which: int) -> Expr:
    """Part 0 or 1 of a float32 value, as stored."""
    high = dialect.store(value, OPERAND)
    if which == 0:
        return high
    return dialect.store(value - dialect.load(high, OPERAND), OPERAND)


class TensorCores:
    """The vocabulary of programs that multiply tiles, besides that of `Cuda`."""

    def __init__(self, dialect: Cuda) -> None:
        self._uses_wgmma = dialect.uses_wgmma
        self.min_blocks_per_sm = dialect.min_blocks_per_sm

    def smem(self, rows: int, columns: int, dtype: str) -> Buffer:
        """A tile in shared memory."""
        return T.alloc_shared((rows, columns), dtype)

    def multistage_smem(self, stages: int, rows: int, columns: int, dtype: str) -> Buffer:
        """So many tiles in shared memory, for `async_copy_g2s`."""
        return T.alloc_shared((stages, rows, columns), dtype)

    def pad_rows(self, *tiles: Buffer) -> Any:
        """Put `ROW_PADDING` after the rows of tiles that threads read in the layout of accumulators, and no product."""
        T.annotate_layout({tile: _padded(tile) for tile in tiles})

    def accumulator(self, rows: int, columns: int) -> Buffer:
        """A float32 fragment of zeros that products are added to."""
        made = T.alloc_fragment((rows, columns), "float32")
        _clear(made)
        return made

    def fragment(self, extents: tuple[int, ...], dtype: str) -> Buffer:
        """What threads hold of a tile in registers."""
        return T.alloc_fragment(extents, dtype)

    def copy_g2s(self, tensor: Buffer, row: Expr, column: Expr, tile: Buffer) -> Any:
        """Copy the tile that begins at (row, column); what lies outside of the tensor is zero."""
        _copy(tensor[row : row + tile.shape[0], column : column + tile.shape[1]], tile)

    def async_copy_g2s(self, tensor: Buffer, row: Expr, column: Expr, tiles: Buffer, stage: Expr) -> Any:
        """Begin to copy a tile as `copy_g2s` does, into one stage; `cp_async_wait_group` waits for it."""
        rows, columns = tiles.shape[1:]
        _async_copy(tensor[row : row + rows, column : column + columns], tiles[stage, 0:rows, 0:columns])

    def multistage_streams(self, stages: int, rows: int, streams: int, columns: int, dtype: str) -> Buffer:
        """So many tiles of all streams in shared memory, token by token, for `async_copy_streams_g2s`."""
        return T.alloc_shared((stages, rows, streams, columns), dtype)

    def async_copy_streams_g2s(self, tensor: Buffer, row: Expr, column: Expr, tiles: Buffer, stage: Expr) -> Any:
        """Begin to copy the same columns of all streams, flattened in `tensor`, as one tile: a thread's share of it is
        a whole vector where its share of one stream's is half of one."""
        rows, streams, columns = tiles.shape[1:]
        shape = (tensor.shape[0], streams, tensor.shape[1] // streams)
        source = T.reshape(tensor, shape)[row : row + rows, 0:streams, column : column + columns]
        _async_copy(source, tiles[stage, 0:rows, 0:streams, 0:columns])

    def cp_async_wait_group(self, count: int) -> Any:
        """Wait for all asynchronous copies of any thread but the last `count` tiles."""
        _wait_group(count)

    def copy_to_global(self, tile: Buffer, tensor: Buffer, row: Expr, column: Expr) -> Any:
        """Write a tile out; what lies outside of the tensor is dropped."""
        _copy(tile, tensor[row : row + tile.shape[0], column : column + tile.shape[1]])

    def pipelined(self, count: Expr, stages: int) -> Any:
        """A loop whose `copy_g2s` run up to `stages` rounds ahead."""
        return T.Pipelined(count, num_stages=stages)

    def gemm(self, a: Buffer, b: Buffer, out: Buffer, *, transpose_a: bool = False, transpose_b: bool = False) -> Any:
        """out += a·b."""
        _gemm(a, b, out, transpose_a, transpose_b)

    def fence_proxy_async(self) -> Any:
        """Let products read what was copied before this, where threads have not written to one of their operands.

        wgmma reads shared memory by another way than cp.async writes it, which TileLang 0.1.15 does not see to.
        """
        if self._uses_wgmma:
            _fence()

    def reduced(self, *extents: int) -> Buffer:
        """A float32 fragment for `sum_over_axis_1`."""
        return T.alloc_fragment(extents, "float32")

    def sum_over_axis_1(self, values: Buffer, into: Buffer) -> Any:
        """into[i, ...] = Σ_j values[i, j, ...]."""
        _reduce(values, into)

    def vectorized(self, count: int) -> Any:
        """A loop that moves neighbouring elements as one vector."""
        return T.vectorized(count)


def _padded(tile: Buffer) -> Layout:
    rows, row = int(tile.shape[-2]), int(tile.shape[-1]) + ROW_PADDING
    if len(tile.shape) == 2:
        return Layout(tile.shape, lambda i, j: i * row + j)
    return Layout(tile.shape, lambda stage, i, j: (stage * rows + i) * row + j)


@T.macro
def _clear(fragment: Buffer) -> None:
    T.clear(fragment)


@T.macro
def _copy(source: Any, target: Any) -> None:
    T.copy(source, target)


@T.macro
def _async_copy(source: Any, target: Any) -> None:
    T.async_copy(source, target)


@T.macro
def _wait_group(count: int) -> None:
    T.ptx_wait_group(count)
    T.sync_threads()


@T.macro
def _gemm(a: Buffer, b: Buffer, out: Buffer, transpose_a: bool, transpose_b: bool) -> None:
    T.gemm(a, b, out, transpose_A=transpose_a, transpose_B=transpose_b, policy=T.GemmWarpPolicy.FullRow)


@T.macro
def _fence() -> None:
    T.fence_proxy_async()


@T.macro
def _reduce(values: Buffer, into: Buffer) -> None:
    T.reduce_sum(values, into, dim=1)
