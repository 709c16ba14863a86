"""What one program text asks of its target: loops over lanes, accumulators, low-precision storage.

A program is written once against a `Dialect`. On a CPU a lane loop is a plain loop that the C compiler vectorises,
an accumulator is a scalar that it keeps in vector registers, and bfloat16 and float16, which have no C type, are
stored as uint16. On CUDA a lane loop is spread over the block's threads and an accumulator is a fragment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import tilelang.language as T

from tiles.lang.rows import CpuRow, CudaRow, Row
from tiles.lang.storage import DOT_LANES, OWNED_REGISTERS
from tiles.lang.values import Buffer, Expr
from tiles.target import Target, compute_capability

TOTALS_FLOATS = 4096
"""Floats of shared memory in which a CUDA block adds up accumulators."""


class Dialect(Protocol):
    """The vocabulary of the programs."""

    def storage(self, dtype: str) -> str:
        """The element type that a tensor of `dtype` has in the kernel's signature."""

    def load(self, value: Expr, dtype: str) -> Expr:
        """A stored element as float32."""

    def store(self, value: Expr, dtype: str) -> Expr:
        """A float32 value as it is stored: rounded to nearest, ties to even."""

    def kernel(self, *grid: Expr, threads: int) -> Any:
        """The launch frame."""

    def lanes(self, *extents: int) -> Any:
        """A loop nest whose iterations are independent (or only add to accumulators)."""

    def accumulator(self, *extents: int) -> Buffer:
        """float32 storage that starts at zero and that a lane loop of these extents adds to; read it with `totals`."""

    def scratch(self, *extents: int) -> Buffer:
        """Uninitialised float32 storage that is indexed freely: by a lane, by a serial loop, by all lanes alike."""

    def own(self, *extents: int) -> Buffer:
        """Uninitialised float32 storage. The last index is a lane of `own_lanes`, which alone touches its part; the
        others come from `each`, so that registers can hold it."""

    def own_lanes(self, count: int) -> Any:
        """A loop over lanes that own storage. On CUDA a kernel with such loops has a thread for each lane."""

    def each(self, count: int) -> Any:
        """A loop over an index of what lanes own."""

    def reciprocal(self, value: Expr) -> Expr:
        """1 / value to about float32's precision, for values far from float32's limits."""

    def row(self, tensor: Buffer, dtype: str, lanes: int, *, copied: bool = False) -> Row:
        """`lanes` elements of a tensor's row for a lane loop; `copied` where the loop reads what it also writes."""

    def lane(self, *indices: Expr) -> tuple[Expr, ...]:
        """Where the lane at `indices` finds its part of an accumulator."""

    def totals(self, accumulators: Sequence[Buffer], into: Callable[[Expr, Expr], Any]) -> Any:
        """Give `into` the number and the sum over lanes of each of these accumulators, which have the same extent."""

    def exp(self, value: Expr) -> Expr:
        """e to the power of a float32 value of at most 0 and any finite size."""

    def let_next_start(self, overlap: int) -> Any:
        """Where kernels `overlap`, the program's next one may start as soon as there is room for its thread blocks."""

    def await_last(self, overlap: int) -> Any:
        """Let the next kernel start, and wait for those before. Where kernels `overlap`, every one but the first does
        so in all of its threads, before it touches what an earlier one touches."""

    def barrier(self) -> Any:
        """What one lane has written to tensors or scratch, other lanes may read after this."""


@dataclass(frozen=True)
class View:
    """A matrix inside of a float32 buffer: it starts at `origin` and runs along two of the buffer's axes."""

    buffer: Buffer
    origin: tuple[Expr, ...]
    axes: tuple[int, int]

    def stride(self, axis: int) -> int:
        """Elements from one row (axis 0) or column (axis 1) to the next."""
        return prod(int(size) for size in self.buffer.shape[self.axes[axis] + 1 :])

    def pointer(self) -> Expr:
        """The address of the first element."""
        return T.address_of(self.buffer[self.origin])


def dialect_for(target: Target) -> Dialect:
    """The dialect that programs for `target` are written in."""
    return Cpu() if target.kind == "cpu" else Cuda(by_proxy=compute_capability(target) >= 90)


class Cpu:
    """Plain C for one core; the launcher spreads slices of tokens over the cores. `tiles.compiler.cpu_prelude` has
    what it calls."""

    def storage(self, dtype: str) -> str:
        return "float32" if dtype == "float32" else "uint16"

    def load(self, value: Expr, dtype: str) -> Expr:
        return value if dtype == "float32" else T.call_extern("float32", f"mhc_load_{dtype}", value)

    def store(self, value: Expr, dtype: str) -> Expr:
        return value if dtype == "float32" else T.call_extern("uint16", f"mhc_store_{dtype}", value)

    def kernel(self, *grid: Expr, threads: int) -> Any:
        return T.Kernel(*grid)

    def lanes(self, *extents: int) -> Any:
        return T.grid(*extents)

    def accumulator(self, *extents: int) -> Buffer:
        scalar = T.alloc_local((1,), "float32")
        _set_zero(scalar)
        return scalar

    def scratch(self, *extents: int) -> Buffer:
        return T.alloc_local(extents, "float32")

    def own(self, *extents: int) -> Buffer:
        return self.scratch(*extents)

    def own_lanes(self, count: int) -> Any:
        return T.serial(count)

    def each(self, count: int) -> Any:
        return T.serial(count)

    def reciprocal(self, value: Expr) -> Expr:
        return T.float32(1) / value

    def row(self, tensor: Buffer, dtype: str, lanes: int, *, copied: bool = False) -> Row:
        return CpuRow(self, tensor, dtype, lanes, copied)

    def lane(self, *indices: Expr) -> tuple[Expr, ...]:
        return (0,)

    def totals(self, accumulators: Sequence[Buffer], into: Callable[[Expr, Expr], Any]) -> Any:
        for number, accumulator in enumerate(accumulators):
            into(number, accumulator[0])

    def exp(self, value: Expr) -> Expr:
        return T.call_extern("float32", "mhc_exp", value)

    def let_next_start(self, overlap: int) -> Any:
        pass

    def await_last(self, overlap: int) -> Any:
        pass

    def barrier(self) -> Any:
        pass

    def prefetch(self, tensors: tuple[Buffer, ...], row: Expr, column: Expr, count: int) -> Any:
        """Say that `count` elements of a row of each tensor are needed soon; they may lie past its end."""
        for tensor in dict.fromkeys(tensors):
            _call(f"mhc_prefetch_{tensor.dtype}", T.address_of(tensor[row, column]), count)

    def dot_sums(self, rows: int, columns: int) -> Buffer:
        """Storage for rows × columns running dot products, zero at first; read it with `dot_sum`."""
        sums = T.alloc_local((rows, columns, DOT_LANES), "float32")
        _clear_lanes(sums)
        return sums

    def add_dots(self, sums: Buffer, first: Expr, a: View, b: View, rows: int, columns: int, width: int) -> Any:
        """sums[i, first + j] += Σ_c a[i, c] b[j, c]: a register block of dot products over `width` lanes."""
        views = View(sums, (0, first, 0), (0, 1)), a, b
        matrices = [part for view in views for part in (view.pointer(), view.stride(0))]
        _call("mhc_add_dots", *matrices, rows, columns, width)

    def dot_sum(self, sums: Buffer, row: Expr, column: Expr) -> Expr:
        """The value of one of them."""
        return T.call_extern("float32", "mhc_dot_sum", T.address_of(sums[row, column, 0]))

    def add_product(self, out: View, a: View, b: View, rows: int, count: Expr, width: int) -> Any:
        """out[i, c] += Σ_{j < count} a[i, j] b[j, c]: a register block of a matrix product, c over `width` lanes."""
        factors = a.pointer(), a.stride(0), a.stride(1)
        _call("mhc_add_product", out.pointer(), out.stride(0), *factors, b.pointer(), b.stride(0), rows, count, width)


class Cuda:
    """One thread block a program instance. `by_proxy`: matrix instructions may read shared memory by a way of their
    own, as wgmma does, and have to be told of what other ways wrote."""

    def __init__(self, *, by_proxy: bool) -> None:
        self.by_proxy = by_proxy

    def storage(self, dtype: str) -> str:
        return dtype

    def load(self, value: Expr, dtype: str) -> Expr:
        return T.cast(value, "float32")

    def store(self, value: Expr, dtype: str) -> Expr:
        return T.cast(value, dtype)

    def kernel(self, *grid: Expr, threads: int) -> Any:
        return T.Kernel(*grid, threads=threads)

    def lanes(self, *extents: int) -> Any:
        return T.Parallel(*extents)

    def accumulator(self, *extents: int) -> Buffer:
        fragment = T.alloc_fragment(extents, "float32")
        _clear(fragment)
        return fragment

    def scratch(self, *extents: int) -> Buffer:
        return T.alloc_shared(extents, "float32")

    def own(self, *extents: int) -> Buffer:
        return Registers(extents[:-1]) if prod(extents[:-1]) <= OWNED_REGISTERS else self.scratch(*extents)

    def own_lanes(self, count: int) -> Any:
        return (T.get_thread_binding(),)

    def each(self, count: int) -> Any:
        return T.unroll(count) if count**2 <= OWNED_REGISTERS else T.serial(count)

    def reciprocal(self, value: Expr) -> Expr:
        return T.fast_rcp(value)

    def row(self, tensor: Buffer, dtype: str, lanes: int, *, copied: bool = False) -> Row:
        return CudaRow(tensor, dtype, lanes)

    def lane(self, *indices: Expr) -> tuple[Expr, ...]:
        return indices

    def totals(self, accumulators: Sequence[Buffer], into: Callable[[Expr, Expr], Any]) -> Any:
        """By way of shared memory: a reduction by shuffles and barriers for each would wait on every step of it."""
        extent = int(accumulators[0].shape[0])
        group = max(1, TOTALS_FLOATS // extent)
        parts = T.alloc_shared((min(group, len(accumulators)), extent), "float32")
        for first in range(0, len(accumulators), group):
            _add_up(parts, accumulators[first : first + group], first, into)

    def exp(self, value: Expr) -> Expr:
        return T.exp(value)

    def let_next_start(self, overlap: int) -> Any:
        return T.pdl_trigger() if overlap else None

    def await_last(self, overlap: int) -> Any:
        return _await_last() if overlap else None

    def barrier(self) -> Any:
        return T.sync_threads()  # a macro emits what its statements evaluate to


class Registers:
    """What a CUDA thread owns: `[..., lane]` is its element `[...]`, as a lane is a thread."""

    def __init__(self, extents: tuple[int, ...]) -> None:
        self._held = T.alloc_local(extents or (1,), "float32")

    def __getitem__(self, index: Any) -> Expr:
        return self._held[_without_lane(index)]

    def __setitem__(self, index: Any, value: Expr) -> None:
        _put(self._held, _without_lane(index), value)


def _without_lane(index: Any) -> tuple[Expr, ...]:
    return (index[:-1] if isinstance(index, tuple) else ()) or (0,)


@T.macro
def _await_last() -> None:
    T.pdl_trigger()
    T.pdl_sync()


@T.macro
def _put(held: Buffer, index: Any, value: Expr) -> None:
    held[index] = value


@T.macro
def _set_zero(scalar: Buffer) -> None:
    scalar[0] = T.float32(0)


@T.macro
def _clear(fragment: Buffer) -> None:
    T.clear(fragment)


@T.macro
def _add_up(parts: Buffer, accumulators: Sequence[Buffer], first: int, into: Callable[[Expr, Expr], Any]) -> None:
    """A lane adds up a row of `parts`; lanes start apart from each other, since rows may begin in one memory bank."""
    extent = parts.shape[1]
    for lane in T.Parallel(extent):
        for row, accumulator in enumerate(accumulators):
            parts[row, lane] = accumulator[lane]
    T.sync_threads()
    for row in T.Parallel(len(accumulators)):
        total = T.alloc_var("float32", init=0.0)
        for step in T.unroll(extent, unroll_factor=16):
            total += parts[row, (step + row) % extent]
        into(first + row, total)
    T.sync_threads()


@T.macro
def _clear_lanes(sums: Buffer) -> None:
    for i, j, lane in T.grid(*sums.shape):
        sums[i, j, lane] = T.float32(0)


@T.macro
def _call(function: str, *arguments: Expr) -> None:
    T.call_extern("int32", function, *arguments)
