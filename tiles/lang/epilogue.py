"""A register block of a matrix product with an epilogue, for CPUs: gradients of streams, made and rounded at once."""

from typing import Any, NamedTuple

import tilelang.language as T

from tiles.lang.dialect import View
from tiles.lang.values import Expr


class Others(NamedTuple):
    """What gradients gain besides: gate[t] u[t, c], and where `more_is_given` is 1 and not 0 more[t, c]. `gate` runs
    over neighbouring elements."""

    u: View
    gate: View
    more: View
    more_is_given: Expr


@T.macro
def gradients(
    out: View,
    a: View,
    b: View,
    x: View,
    slope: View,
    others: Any,
    dtype: str,
    rows: int,
    count: Expr,
    width: int,
) -> None:
    """out[t, c] = Σ_{j < count} a[t, j] b[j, c] + 2 slope[t] x[t, c] + others, rounded to what `out` holds; t < rows,
    c < width. Buffers of 16-bit elements hold `dtype`. `tiles.compiler.cpu_epilogue` has what this calls.
    """
    stored = (out,) if others is None else (out, others.u, others.more)
    name = "_".join(["mhc_gradients", str(rows), *(_element(view, dtype) for view in stored)])
    of_product = (*_matrix(out), a.pointer(), a.stride(0), a.stride(1), *_matrix(b), *_matrix(x), slope.pointer())
    of_others = (
        ()
        if others is None
        else (
            *_matrix(others.u),
            others.gate.pointer(),
            *_matrix(others.more),
            others.more_is_given,
        )
    )
    T.call_extern("int32", name, *of_product, *of_others, count, width)


def _element(view: View, dtype: str) -> str:
    return "float32" if view.buffer.dtype == "float32" else dtype


def _matrix(view: View) -> tuple[Any, int]:
    return view.pointer(), view.stride(0)
