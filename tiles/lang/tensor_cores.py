"""The vocabulary of programs that multiply tiles: tensor cores on CUDA; plain loops on a CPU, where tests run the very
same texts against the references.

Matrices of float32 are multiplied as sums of bfloat16 parts, a = a₀ + a₁ with a₀ = bfloat16(a), a₁ = bfloat16(a − a₀):
16 bits of a survive, products are exact in float32, and tensor cores are at their fastest. One pass with TF32 takes as
long as two with bfloat16 and keeps 10 bits.
"""

from __future__ import annotations

from typing import Any, Protocol

import tilelang.language as T
from tilelang.layout import Layout

from tiles.lang.dialect import Cuda, Dialect
from tiles.lang.storage import ROW_PADDING
from tiles.lang.values import Buffer, Expr, bind

PART = "bfloat16"
"""The dtype of a part, which has float32's range."""


class Tiles(Protocol):
    """What such a program needs besides `Dialect`."""

    def operand(self, rows: int, columns: int, dtype: str) -> Buffer:
        """A tile near the processor, as stored."""

    def pad(self, *operands: Buffer) -> Any:
        """Put `ROW_PADDING` after the rows of operands that no product takes, but threads, in the layout of sums."""

    def sums(self, rows: int, columns: int) -> Buffer:
        """A float32 tile that products are added to."""

    def held(self, extents: tuple[int, ...], dtype: str) -> Buffer:
        """What threads hold of a tile in registers, as stored."""

    def stage(self, tensor: Buffer, row: Expr, column: Expr, tile: Buffer) -> Any:
        """Copy the tile that begins at (row, column); what lies outside of the tensor is zero."""

    def slots(self, count: int, rows: int, columns: int, dtype: str) -> Buffer:
        """So many tiles near the processor, as stored."""

    def fetch(self, tensor: Buffer, row: Expr, column: Expr, slots: Buffer, slot: Expr) -> Any:
        """Begin to copy a tile as `stage` does, into one slot; `arrived` waits for it."""

    def arrived(self, but: int) -> Any:
        """Wait for all that was begun to be copied but the last so many tiles, by any thread."""

    def write(self, tile: Buffer, tensor: Buffer, row: Expr, column: Expr) -> Any:
        """The way back; what lies outside of the tensor is dropped."""

    def steps(self, count: Expr, stages: int) -> Any:
        """A loop whose `stage` copies run up to `stages` rounds ahead."""

    def multiply(self, a: Buffer, b: Buffer, out: Buffer, *, turn_a: bool = False, turn_b: bool = False) -> Any:
        """out += a·b, each turned (transposed) first where so asked."""

    def show(self) -> Any:
        """Products read what was copied before this, where threads have not written to one of their operands."""

    def row_totals(self, sums: Buffer, totals: Buffer) -> Any:
        """totals[i] = Σ_j sums[i, j]."""

    def totals(self, *extents: int) -> Buffer:
        """What `row_totals` and `lane_totals` fill."""

    def lane_totals(self, parts: Buffer, totals: Buffer) -> Any:
        """totals[i, k] = Σ_j parts[i, j, k]."""

    def elements(self, count: int) -> Any:
        """A loop that moves neighbouring elements as one vector."""

    def resident(self, blocks: int) -> Any:
        """Hold registers down so that a multiprocessor can have so many thread blocks at a time."""


def tiles_for(dialect: Dialect) -> Tiles:
    """The vocabulary that goes with a dialect."""
    return CudaTiles(dialect) if isinstance(dialect, Cuda) else CpuTiles(dialect)


def part(dialect: Any, value: Expr, which: int) -> Expr:
    """Part 0 or 1 of a float32 value, as stored."""
    first = dialect.store(value, PART)
    if which == 0:
        return first
    return dialect.store(value - dialect.load(first, PART), PART)


class CudaTiles:
    """Shared memory, fragments, cp.async pipelines and tensor cores."""

    def __init__(self, dialect: Cuda) -> None:
        self._by_proxy = dialect.by_proxy

    def operand(self, rows: int, columns: int, dtype: str) -> Buffer:
        return T.alloc_shared((rows, columns), dtype)

    def pad(self, *operands: Buffer) -> Any:
        T.annotate_layout({operand: _padded(operand) for operand in operands})

    def sums(self, rows: int, columns: int) -> Buffer:
        held = T.alloc_fragment((rows, columns), "float32")
        _clear(held)
        return held

    def held(self, extents: tuple[int, ...], dtype: str) -> Buffer:
        return T.alloc_fragment(extents, dtype)

    def stage(self, tensor: Buffer, row: Expr, column: Expr, tile: Buffer) -> Any:
        _copy(tensor[row : row + tile.shape[0], column : column + tile.shape[1]], tile)

    def slots(self, count: int, rows: int, columns: int, dtype: str) -> Buffer:
        return T.alloc_shared((count, rows, columns), dtype)

    def fetch(self, tensor: Buffer, row: Expr, column: Expr, slots: Buffer, slot: Expr) -> Any:
        rows, columns = slots.shape[1:]
        _fetch(tensor[row : row + rows, column : column + columns], slots[slot, 0:rows, 0:columns])

    def arrived(self, but: int) -> Any:
        _arrived(but)

    def write(self, tile: Buffer, tensor: Buffer, row: Expr, column: Expr) -> Any:
        _copy(tile, tensor[row : row + tile.shape[0], column : column + tile.shape[1]])

    def steps(self, count: Expr, stages: int) -> Any:
        return T.Pipelined(count, num_stages=stages)

    def multiply(self, a: Buffer, b: Buffer, out: Buffer, *, turn_a: bool = False, turn_b: bool = False) -> Any:
        _gemm(a, b, out, turn_a, turn_b)

    def show(self) -> Any:
        """wgmma reads shared memory by another way than cp.async writes it, which TileLang 0.1.15 does not see to."""
        if self._by_proxy:
            _fence()

    def row_totals(self, sums: Buffer, totals: Buffer) -> Any:
        _reduce(sums, totals)

    def lane_totals(self, parts: Buffer, totals: Buffer) -> Any:
        _reduce(parts, totals)

    def elements(self, count: int) -> Any:
        return T.vectorized(count)

    def totals(self, *extents: int) -> Buffer:
        return T.alloc_fragment(extents, "float32")

    def resident(self, blocks: int) -> Any:
        if blocks > 1:
            _resident(blocks)


class CpuTiles:
    """Arrays and loops."""

    def __init__(self, dialect: Any) -> None:
        self._dialect = dialect

    def operand(self, rows: int, columns: int, dtype: str) -> Buffer:
        return T.alloc_local((rows, columns), self._dialect.storage(dtype))

    def pad(self, *operands: Buffer) -> Any:
        pass

    def sums(self, rows: int, columns: int) -> Buffer:
        held = T.alloc_local((rows, columns), "float32")
        _zero(held)
        return held

    def held(self, extents: tuple[int, ...], dtype: str) -> Buffer:
        return T.alloc_local(extents, self._dialect.storage(dtype))

    def stage(self, tensor: Buffer, row: Expr, column: Expr, tile: Buffer) -> Any:
        _stage(tensor, row, column, tile)

    def slots(self, count: int, rows: int, columns: int, dtype: str) -> Buffer:
        return T.alloc_local((count, rows, columns), self._dialect.storage(dtype))

    def fetch(self, tensor: Buffer, row: Expr, column: Expr, slots: Buffer, slot: Expr) -> Any:
        _stage_slot(tensor, row, column, slots, slot)

    def arrived(self, but: int) -> Any:
        pass

    def write(self, tile: Buffer, tensor: Buffer, row: Expr, column: Expr) -> Any:
        _write(tile, tensor, row, column)

    def steps(self, count: Expr, stages: int) -> Any:
        return T.serial(count)

    def multiply(self, a: Buffer, b: Buffer, out: Buffer, *, turn_a: bool = False, turn_b: bool = False) -> Any:
        _multiply(self._dialect.load, a, b, out, int(a.shape[0 if turn_a else 1]), turn_a, turn_b)

    def show(self) -> Any:
        pass

    def row_totals(self, sums: Buffer, totals: Buffer) -> Any:
        _row_totals(sums, totals)

    def lane_totals(self, parts: Buffer, totals: Buffer) -> Any:
        _lane_totals(parts, totals)

    def elements(self, count: int) -> Any:
        return T.serial(count)

    def totals(self, *extents: int) -> Buffer:
        return T.alloc_local(extents, "float32")

    def resident(self, blocks: int) -> Any:
        pass


def _padded(operand: Buffer) -> Layout:
    rows, row = int(operand.shape[-2]), int(operand.shape[-1]) + ROW_PADDING
    if len(operand.shape) == 2:
        return Layout(operand.shape, lambda i, j: i * row + j)
    return Layout(operand.shape, lambda slot, i, j: (slot * rows + i) * row + j)


@T.macro
def _clear(held: Buffer) -> None:
    T.clear(held)


@T.macro
def _copy(source: Any, target: Any) -> None:
    T.copy(source, target)


@T.macro
def _fetch(source: Any, target: Any) -> None:
    T.async_copy(source, target)


@T.macro
def _arrived(but: int) -> None:
    T.ptx_wait_group(but)
    T.sync_threads()


@T.macro
def _gemm(a: Buffer, b: Buffer, out: Buffer, turn_a: bool, turn_b: bool) -> None:
    T.gemm(a, b, out, transpose_A=turn_a, transpose_B=turn_b, policy=T.GemmWarpPolicy.FullRow)


@T.macro
def _fence() -> None:
    T.fence_proxy_async()


@T.macro
def _reduce(sums: Buffer, totals: Buffer) -> None:
    T.reduce_sum(sums, totals, dim=1)


@T.macro
def _resident(blocks: int) -> None:
    T.annotate_min_blocks_per_sm(blocks)


@T.macro
def _zero(held: Buffer) -> None:
    for i, j in T.grid(*held.shape):
        held[i, j] = T.float32(0)


@T.macro
def _stage(tensor: Buffer, row: Expr, column: Expr, tile: Buffer) -> None:
    for i, j in T.grid(*tile.shape):
        if row + i < tensor.shape[0] and column + j < tensor.shape[1]:
            tile[i, j] = tensor[row + i, column + j]
        else:
            tile[i, j] = T.cast(0, tile.dtype)


@T.macro
def _stage_slot(tensor: Buffer, row: Expr, column: Expr, slots: Buffer, slot: Expr) -> None:
    for i, j in T.grid(*slots.shape[1:]):
        if row + i < tensor.shape[0] and column + j < tensor.shape[1]:
            slots[slot, i, j] = tensor[row + i, column + j]
        else:
            slots[slot, i, j] = T.cast(0, slots.dtype)


@T.macro
def _write(tile: Buffer, tensor: Buffer, row: Expr, column: Expr) -> None:
    for i, j in T.grid(*tile.shape):
        if row + i < tensor.shape[0] and column + j < tensor.shape[1]:
            tensor[row + i, column + j] = tile[i, j]


@T.macro
def _multiply(load: Any, a: Buffer, b: Buffer, out: Buffer, count: int, turn_a: bool, turn_b: bool) -> None:
    for i, j in T.grid(*out.shape):
        for k in T.serial(count):
            left = bind(load(a[k, i] if turn_a else a[i, k], PART))
            out[i, j] += left * load(b[j, k] if turn_b else b[k, j], PART)


@T.macro
def _row_totals(sums: Buffer, totals: Buffer) -> None:
    for i in T.serial(sums.shape[0]):
        totals[i] = T.float32(0)
        for j in T.serial(sums.shape[1]):
            totals[i] += sums[i, j]


@T.macro
def _lane_totals(parts: Buffer, totals: Buffer) -> None:
    for i, k in T.grid(*totals.shape):
        totals[i, k] = T.float32(0)
        for j in T.serial(parts.shape[1]):
            totals[i, k] += parts[i, j, k]
