"""The dialects, for CPU and CUDA, that one program text is written in: loops, accumulators, low-precision storage.

On a CPU a parallel loop is a plain loop that the C compiler vectorises, an accumulator is a scalar that it keeps in
vector registers, and bfloat16 and float16, which have no C type, are stored as uint16. On CUDA a parallel loop is
spread over the block's threads and an accumulator is a fragment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import tilelang.language as T

from tiles.lang.rows import CudaRow, ResultRow, SourceRow, cpu_result, cpu_row, prefetch
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

    def parallel(self, *extents: int) -> Any:
        """A loop nest whose iterations are independent (or only add to accumulators)."""

    def accumulator(self, *extents: int) -> Buffer:
        """float32 storage of zeros that a parallel loop of these extents adds to; read it with `totals`."""

    def scratch(self, *extents: int) -> Buffer:
        """Uninitialised float32 storage that is indexed freely: by one thread or by all alike."""

    def per_thread(self, *extents: int) -> Buffer:
        """Uninitialised float32 storage. The last index is a thread of `thread_loop`, which alone touches its part; the
        others come from `unrolled`, so that registers can hold it."""

    def thread_loop(self, count: int) -> Any:
        """A loop over what threads have `per_thread`: on a CPU all of them in turn, on CUDA the thread itself."""

    def unrolled(self, count: int) -> Any:
        """A loop over an index of `per_thread` storage."""

    def reciprocal(self, value: Expr) -> Expr:
        """1 / value to about float32's precision, for values far from float32's limits."""

    def upscaled(self, value: Expr) -> Expr:
        """Numerator or divisor of a quotient that may be so small that `reciprocal` would take it for 0: both times a
        power of two where that is so, which changes no bit of other quotients. Values stay below 1e20."""

    def row(
        self, tensor: Buffer, dtype: str, width: int, *, copied: bool = False, prefetched: bool = False
    ) -> SourceRow:
        """`width` elements of a tensor's row that a parallel loop reads; `copied` where it also writes there,
        `prefetched` where rows are read one after the other."""

    def result(self, tensor: Buffer, dtype: str, width: int, *, nontemporal: bool = False) -> ResultRow:
        """`width` elements of a tensor's row that a parallel loop writes; `nontemporal` where a CPU's caches have
        better use than to hold them."""

    def packed(self, dtype: str) -> int:
        """Elements of a row that an iteration takes: where it is 2, they are indexed by (pair, 0 or 1)."""

    def partial_index(self, *indices: Expr) -> tuple[Expr, ...]:
        """Where iteration `indices` of a parallel loop finds its part of an accumulator."""

    def totals(self, accumulators: Sequence[Buffer], into: Callable[[Expr, Expr], Any]) -> Any:
        """Give `into` the number and the sum of each of these accumulators, which have the same extent."""

    def exp(self, value: Expr) -> Expr:
        """e to the power of a float32 value of at most 0 and any finite size."""

    def pdl_trigger(self, use_pdl: int) -> Any:
        """Let the program's next kernel start as soon as there is room for its thread blocks (programmatic dependent
        launch)."""

    def pdl_wait(self, use_pdl: int) -> Any:
        """Let the next kernel start, and wait for those before. With `use_pdl` every kernel but the first does so, in
        all of its threads, before it touches what an earlier one touches."""

    def min_blocks_per_sm(self, blocks: int) -> Any:
        """Hold registers down so that a multiprocessor can have so many thread blocks (`__launch_bounds__`)."""

    def barrier(self) -> Any:
        """What one thread has written to tensors or scratch, others may read after this."""


@dataclass(frozen=True)
class View:
    """A matrix inside of a buffer: it starts at `origin` and runs along two of the buffer's axes."""

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
    return Cpu() if target.kind == "cpu" else Cuda(uses_wgmma=compute_capability(target) >= 90)


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

    def parallel(self, *extents: int) -> Any:
        return T.grid(*extents)

    def accumulator(self, *extents: int) -> Buffer:
        scalar = T.alloc_local((1,), "float32")
        _set_zero(scalar)
        return scalar

    def scratch(self, *extents: int) -> Buffer:
        return T.alloc_local(extents, "float32")

    def per_thread(self, *extents: int) -> Buffer:
        return self.scratch(*extents)

    def thread_loop(self, count: int) -> Any:
        return T.serial(count)

    def unrolled(self, count: int) -> Any:
        return T.serial(count)

    def reciprocal(self, value: Expr) -> Expr:
        return T.float32(1) / value

    def upscaled(self, value: Expr) -> Expr:
        return value

    def row(
        self, tensor: Buffer, dtype: str, width: int, *, copied: bool = False, prefetched: bool = False
    ) -> SourceRow:
        return cpu_row(tensor, dtype, width, copied=copied, prefetched=prefetched)

    def result(self, tensor: Buffer, dtype: str, width: int, *, nontemporal: bool = False) -> ResultRow:
        return cpu_result(tensor, dtype, width, nontemporal=nontemporal)

    def packed(self, dtype: str) -> int:
        return 1 if dtype == "float32" else 2

    def partial_index(self, *indices: Expr) -> tuple[Expr, ...]:
        return (0,)

    def totals(self, accumulators: Sequence[Buffer], into: Callable[[Expr, Expr], Any]) -> Any:
        for number, accumulator in enumerate(accumulators):
            into(number, accumulator[0])

    def exp(self, value: Expr) -> Expr:
        return T.call_extern("float32", "mhc_exp", value)

    def pdl_trigger(self, use_pdl: int) -> Any:
        pass

    def pdl_wait(self, use_pdl: int) -> Any:
        pass

    def min_blocks_per_sm(self, blocks: int) -> Any:
        pass

    def barrier(self) -> Any:
        pass

    def rounded(self, value: Expr, dtype: str) -> Expr:
        """What `load` gives back of a value that is stored."""
        return value if dtype == "float32" else T.call_extern("float32", f"mhc_round_{dtype}", value)

    def prefetch(self, tensors: tuple[Buffer, ...], place: tuple[Expr, ...], count: int) -> Any:
        """Say that `count` elements of each tensor from a place on are needed soon; they may lie past its end."""
        for tensor in dict.fromkeys(tensors):
            prefetch(tensor, place, count, level=2)

    def dot_sums(self, rows: int, columns: int) -> Buffer:
        """Storage for rows × columns running dot products, zero at first; read it with `dot_sum`."""
        sums = T.alloc_local((rows, columns, DOT_LANES), "float32")
        _clear_lanes(sums)
        return sums

    def add_dots(self, sums: View, a: View, b: View, rows: int, columns: int, width: int) -> Any:
        """sums[i, j] += Σ_c a[i, c] b[j, c]: a register block of dot products over `width` columns."""
        views = sums, a, b
        matrices = [part for view in views for part in (view.pointer(), view.stride(0))]
        _call("mhc_add_dots", *matrices, rows, columns, width)

    def dot_sum(self, sums: Buffer, row: Expr, column: Expr) -> Expr:
        """The value of one of them."""
        return T.call_extern("float32", "mhc_dot_sum", T.address_of(sums[row, column, 0]))

    def squares(self, scratch: Buffer, place: tuple[Expr, ...], count: int) -> Expr:
        """The sum of the squares of `count` elements of scratch from a place on, a multiple of 8, in one order."""
        return T.call_extern("float32", "mhc_squares", T.address_of(scratch[place]), count)

    def add_product(self, out: View, a: View, b: View, rows: int, count: Expr, width: int) -> Any:
        """out[i, c] += Σ_{j < count} a[i, j] b[j, c]: a register block of a matrix product, c over `width`."""
        factors = a.pointer(), a.stride(0), a.stride(1)
        _call("mhc_add_product", out.pointer(), out.stride(0), *factors, b.pointer(), b.stride(0), rows, count, width)


class Cuda:
    """One thread block a program instance. `uses_wgmma`: matrix instructions may read shared memory through the async
    proxy, and have to be told of what was written otherwise."""

    def __init__(self, *, uses_wgmma: bool) -> None:
        self.uses_wgmma = uses_wgmma

    def storage(self, dtype: str) -> str:
        return dtype

    def load(self, value: Expr, dtype: str) -> Expr:
        return T.cast(value, "float32")

    def store(self, value: Expr, dtype: str) -> Expr:
        return T.cast(value, dtype)

    def kernel(self, *grid: Expr, threads: int) -> Any:
        return T.Kernel(*grid, threads=threads)

    def parallel(self, *extents: int) -> Any:
        return T.Parallel(*extents)

    def accumulator(self, *extents: int) -> Buffer:
        fragment = T.alloc_fragment(extents, "float32")
        _clear(fragment)
        return fragment

    def scratch(self, *extents: int) -> Buffer:
        return T.alloc_shared(extents, "float32")

    def per_thread(self, *extents: int) -> Buffer:
        return Registers(extents[:-1]) if prod(extents[:-1]) <= OWNED_REGISTERS else self.scratch(*extents)

    def thread_loop(self, count: int) -> Any:
        return (T.get_thread_binding(),)

    def unrolled(self, count: int) -> Any:
        return T.unroll(count) if count**2 <= OWNED_REGISTERS else T.serial(count)

    def reciprocal(self, value: Expr) -> Expr:
        return T.fast_rcp(value)  # rcp.approx.ftz: what is denormal counts as 0, and gives infinity

    def upscaled(self, value: Expr) -> Expr:
        return value * T.float32(2.0**60)  # the least denormal number becomes 1.6e-27

    def row(
        self, tensor: Buffer, dtype: str, width: int, *, copied: bool = False, prefetched: bool = False
    ) -> SourceRow:
        return CudaRow(tensor, dtype, width)

    def result(self, tensor: Buffer, dtype: str, width: int, *, nontemporal: bool = False) -> ResultRow:
        return CudaRow(tensor, dtype, width)

    def packed(self, dtype: str) -> int:
        return 1

    def partial_index(self, *indices: Expr) -> tuple[Expr, ...]:
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

    def pdl_trigger(self, use_pdl: int) -> Any:
        return T.pdl_trigger() if use_pdl else None

    def pdl_wait(self, use_pdl: int) -> Any:
        return _pdl_wait() if use_pdl else None

    def min_blocks_per_sm(self, blocks: int) -> Any:
        return _min_blocks_per_sm(blocks) if blocks > 1 else None

    def barrier(self) -> Any:
        return T.sync_threads()  # a macro emits what its statements evaluate to


class Registers:
    """`per_thread` storage in registers: `[..., thread]` is its element `[...]`."""

    def __init__(self, extents: tuple[int, ...]) -> None:
        self._held = T.alloc_local(extents or (1,), "float32")

    def __getitem__(self, index: Any) -> Expr:
        return self._held[_without_thread(index)]

    def __setitem__(self, index: Any, value: Expr) -> None:
        _put(self._held, _without_thread(index), value)


def _without_thread(index: Any) -> tuple[Expr, ...]:
    return (index[:-1] if isinstance(index, tuple) else ()) or (0,)


@T.macro
def _pdl_wait() -> None:
    T.pdl_trigger()
    T.pdl_sync()


@T.macro
def _min_blocks_per_sm(blocks: int) -> None:
    T.annotate_min_blocks_per_sm(blocks)


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
    """A thread adds up a row of `parts`; threads start apart from each other: rows may begin in one memory bank."""
    extent = parts.shape[1]
    for thread in T.Parallel(extent):
        for row, accumulator in enumerate(accumulators):
            parts[row, thread] = accumulator[thread]
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
