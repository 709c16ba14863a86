"""Values in a program: named, kept in a variable, or split over tokens, each for a reason that TileLang gives."""

from __future__ import annotations

from typing import Any

import tilelang.language as T
from tilelang import tvm

Expr = Any  # a TIR expression
Buffer = Any  # a TIR buffer


def bind(value: Expr) -> Expr:
    """Name a value, so that the generated code computes it once.

    A buffer element that goes into `T.max`, `T.min` or `T.reinterpret` and is stored to afterwards must be bound first:
    TileLang 0.1.15's C generator names such operands by their text and would use the old value again after the store.
    """
    return tvm.tirx.script.builder.bind(value)


def variable(value: Expr) -> Expr:
    """An int32 in a variable of the generated code. TVM copies the expression behind a `bind` to where it is used, and
    a C compiler that finds a minimum in a loop's index makes a gather of the load."""
    held = T.alloc_local((1,), "int32")
    _set(held, value)
    return held[0]


def values_of(tensor: Buffer, index: tuple[Expr, ...], count: int) -> list[Expr]:
    """So many neighbouring elements of a tensor, from an index on, each named."""
    return [bind(tensor[(*index[:-1], index[-1] + k)]) for k in range(count)]


def quads_of(tensor: Buffer, index: tuple[Expr, ...], count: int) -> list[Expr]:
    """The same of float32 elements, which a CUDA thread loads four at a time where index and count are multiples of it;
    one by one where not."""
    if count % 4:
        return values_of(tensor, index, count)
    held = T.alloc_local((count,), "float32")
    _load_quads(tensor, index, held)
    return [held[k] for k in range(count)]


def as_value(size: Expr) -> Expr:
    """A dynamic size to hand to a macro: TileLang 0.1.15 would rename the size itself to the macro's parameter."""
    return T.max(size, 0)


def token_range(tokens: Expr, split: Expr, splits: Expr, block: int) -> tuple[Buffer, Buffer, Buffer]:
    """The first token, the end and the number of token blocks of one split, in whole blocks.

    They are variables and not expressions: TVM's simplifier takes seconds over divisions by `splits` otherwise.
    """
    first, last, blocks = T.alloc_local((1,), "int32"), T.alloc_local((1,), "int32"), T.alloc_local((1,), "int32")
    _set_token_range(first, last, blocks, tokens, split, splits, block)
    return first, last, blocks


@T.macro
def _set(held: Buffer, value: Expr) -> None:
    held[0] = value


@T.macro
def _load_quads(tensor: Buffer, index: tuple[Expr, ...], held: Buffer) -> None:
    for quad in T.unroll(held.shape[0] // 4):
        for lane in T.vectorized(4):
            held[quad * 4 + lane] = tensor[(*index[:-1], index[-1] + quad * 4 + lane)]


@T.macro
def _set_token_range(
    first: Buffer, last: Buffer, blocks: Buffer, tokens: Expr, split: Expr, splits: Expr, block: int
) -> None:
    share = T.ceildiv(T.ceildiv(tokens, block), splits) * block
    first[0] = split * share
    last[0] = T.min(first[0] + share, tokens)
    blocks[0] = T.ceildiv(T.max(last[0] - first[0], 0), block)
