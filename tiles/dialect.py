"""What one program text asks of its target: loops over lanes, accumulators, low-precision storage.

A program is written once against a `Dialect`. On a CPU a lane loop is a plain loop that the C compiler vectorises,
an accumulator is a scalar that it keeps in vector registers, and bfloat16 and float16, which have no C type, are
stored as uint16. On CUDA a lane loop is spread over the block's threads and an accumulator is a fragment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import tilelang.language as T
from tilelang import tvm

from tiles.target import Target

Expr = Any  # a TIR expression
Buffer = Any  # a TIR buffer


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

    def tile(self, *extents: int) -> Buffer:
        """float32 storage with one element per lane."""

    def accumulator(self, *extents: int) -> Buffer:
        """float32 storage that starts at zero and that a lane loop of these extents adds to; read it with `total`."""

    def scratch(self, *extents: int) -> Buffer:
        """Uninitialised float32 storage that is indexed freely: by a lane, by a serial loop, by all lanes alike."""

    def lane(self, *indices: Expr) -> tuple[Expr, ...]:
        """Where the lane at `indices` finds its part of an accumulator."""

    def total(self, accumulator: Buffer) -> Buffer:
        """The sum over lanes, as a buffer of one element."""

    def exp(self, value: Expr) -> Expr:
        """e to the power of a float32 value of at most 0 and any finite size."""


def dialect_for(target: Target) -> Dialect:
    """The dialect that programs for `target` are written in."""
    return Cpu() if target.kind == "cpu" else Cuda()


def bind(value: Expr) -> Expr:
    """Name a value, so that the generated code computes it once.

    A buffer element that goes into `T.max`, `T.min` or `T.reinterpret` and is stored to afterwards must be bound first:
    TileLang 0.1.15's C generator names such operands by their text and would use the old value again after the store.
    """
    return tvm.tirx.script.builder.bind(value)


def multiply_add(start: Expr, factors: Sequence[Expr], values: Sequence[Expr]) -> Expr:
    """start + Σ factors·values, added from left to right: one fused multiply-add a term."""
    for factor, value in zip(factors, values, strict=True):
        start = start + factor * value
    return start


def token_range(tokens: Expr, split: Expr, splits: Expr, block: int) -> tuple[Buffer, Buffer, Buffer]:
    """The first token, the end and the number of token blocks of one split, in whole blocks.

    They are variables and not expressions: TVM's simplifier takes seconds over divisions by `splits` otherwise.
    """
    first, last, blocks = T.alloc_local((1,), "int32"), T.alloc_local((1,), "int32"), T.alloc_local((1,), "int32")
    _set_token_range(first, last, blocks, tokens, split, splits, block)
    return first, last, blocks


@T.macro
def _set_token_range(
    first: Buffer, last: Buffer, blocks: Buffer, tokens: Expr, split: Expr, splits: Expr, block: int
) -> None:
    share = T.ceildiv(T.ceildiv(tokens, block), splits) * block
    first[0] = split * share
    last[0] = T.min(first[0] + share, tokens)
    blocks[0] = T.ceildiv(T.max(last[0] - first[0], 0), block)


class Cpu:
    """Plain C for one core; the launcher spreads slices of tokens over the cores. `tiles.prelude` has what it calls."""

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

    def tile(self, *extents: int) -> Buffer:
        return T.alloc_local(extents, "float32")

    def accumulator(self, *extents: int) -> Buffer:
        scalar = T.alloc_local((1,), "float32")
        _set_zero(scalar)
        return scalar

    def scratch(self, *extents: int) -> Buffer:
        return T.alloc_local(extents, "float32")

    def lane(self, *indices: Expr) -> tuple[Expr, ...]:
        return (0,)

    def total(self, accumulator: Buffer) -> Buffer:
        return accumulator

    def exp(self, value: Expr) -> Expr:
        return T.call_extern("float32", "mhc_exp", value)


class Cuda:
    """One thread block a program instance."""

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

    def tile(self, *extents: int) -> Buffer:
        return T.alloc_fragment(extents, "float32")

    def accumulator(self, *extents: int) -> Buffer:
        fragment = T.alloc_fragment(extents, "float32")
        _clear(fragment)
        return fragment

    def scratch(self, *extents: int) -> Buffer:
        return T.alloc_shared(extents, "float32")

    def lane(self, *indices: Expr) -> tuple[Expr, ...]:
        return indices

    def total(self, accumulator: Buffer) -> Buffer:
        total = T.alloc_fragment((1,), "float32")
        _reduce(accumulator, total)
        return total

    def exp(self, value: Expr) -> Expr:
        return T.exp(value)


@T.macro
def _set_zero(scalar: Buffer) -> None:
    scalar[0] = T.float32(0)


@T.macro
def _clear(fragment: Buffer) -> None:
    T.clear(fragment)


@T.macro
def _reduce(accumulator: Buffer, total: Buffer) -> None:
    T.reduce_sum(accumulator, total, dim=0)
