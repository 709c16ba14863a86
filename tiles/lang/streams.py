"""Walks over the streams of a block of tokens, for CPUs: `tiles.compiler.cpu_streams` has what these call.

x and rows (u, du) begin at the first token. gate[i][t] is the weight of stream i for token t; u_t = Σ_i gate[i][t]
x_t[i]. Buffers of 16-bit elements hold `dtype`.
"""

from typing import NamedTuple

import tilelang.language as T

from tiles.lang.dialect import View
from tiles.lang.values import Buffer, Expr


class Streams(NamedTuple):
    """What streams are: x, how many, and their dtype."""

    x: View
    streams: int
    dtype: str

    def name(self, function: str) -> str:
        """The function for them."""
        return f"mhc_{function}_{self.streams}_{self.dtype}"


@T.macro
def stream_dots(dots: Buffer, streams: Streams, row: View, tokens: Expr) -> None:
    """dots[i, t] = Σ_c row_tc x_tic. dots [n, tokens of a block]."""
    of_rows = (T.address_of(dots[0, 0]), int(dots.shape[1]), streams.x.pointer(), row.pointer())
    T.call_extern("int32", streams.name("stream_dots"), *of_rows, tokens, row.stride(0))


@T.macro
def row_dots(sums: View, rows: View, row: View, streams: int, dtype: str, width: int) -> None:
    """sums[i] += Σ_c rows_ic row_c, for all streams: float32 rows of `width` columns, one after the other, and a row of
    `dtype`."""
    T.call_extern("int32", f"mhc_row_dots_{streams}_{dtype}", sums.pointer(), rows.pointer(), row.pointer(), width)


@T.macro
def norm_dots(
    dots: Buffer, u_dots: Buffer, streams: Streams, row: View, gate: Buffer, weight: Buffer, tokens: Expr
) -> None:
    """dots[i, t] = Σ_c row_tc weight_c x_tic, and u_dots[i, t] = Σ_c u_tc x_tic. These and gate: [n, tokens of a
    block]."""
    of_dots = (T.address_of(dots[0, 0]), T.address_of(u_dots[0, 0]), int(dots.shape[1]))
    of_rows = (streams.x.pointer(), row.pointer(), T.address_of(gate[0, 0]), T.address_of(weight[0]))
    T.call_extern("int32", streams.name("norm_dots"), *of_dots, *of_rows, tokens, row.stride(0))


@T.macro
def norm_rows(u: View, streams: Streams, gate: Buffer, norm: tuple[Buffer, Expr], held: Buffer, tokens: Expr) -> None:
    """u_t rsqrt(mean(u_t²) + eps) weight, rounded; `norm` is weight and eps, `held` [2, C] scratch."""
    of_gate = (T.address_of(gate[0, 0]), int(gate.shape[1]), T.address_of(norm[0][0]), norm[1])
    of_rows = (u.pointer(), streams.x.pointer(), *of_gate, T.address_of(held[0, 0]))
    T.call_extern("int32", streams.name("norm_rows"), *of_rows, tokens, u.stride(0))


@T.macro
def norm_gradients(
    of_u: Buffer,
    dweight: View,
    weight: View,
    streams: Streams,
    du: View,
    gate: Buffer,
    factors: tuple[Buffer, Buffer],
    tokens: Expr,
    width: int,
) -> None:
    """of_u[t, c] = scale_t du_tc weight_c − slope_t u_tc of `width` columns, and dweight_c += Σ_t scale_t du_tc u_tc.
    `factors` are scale and slope."""
    sums = (T.address_of(of_u[0, 0]), int(of_u.shape[1]), dweight.pointer(), weight.pointer())
    of_rows = (streams.x.pointer(), du.pointer(), du.stride(0), T.address_of(gate[0, 0]), int(gate.shape[1]))
    of_tokens = (T.address_of(factors[0][0]), T.address_of(factors[1][0]), tokens, width)
    T.call_extern("int32", streams.name("norm_gradients"), *sums, *of_rows, *of_tokens)
