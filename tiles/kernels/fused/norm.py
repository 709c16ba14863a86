"""The RMSNorm of a sublayer's input on a CPU, as macros that pre, step and single_pass share.

u = Σ_i pre_i x_i as ever; r = rsqrt(mean(u²) + norm_eps); the sublayer gets u·r·w. The row of a token is scaled while
it is in the nearest cache (`tiles.compiler.cpu_norm`). The backward makes u again from the streams; with g = w·du, du
the gradient of what the sublayer gets, and a factor for each token,

    slope = r³ Σ_c u_c g_c / C,  the gradient of u is r·g − slope·u, and that of w is Σ_t du·u·r.
"""

from typing import Any, NamedTuple

import tilelang.language as T

from tiles.kernels.apply.merge import weighted
from tiles.kernels.spec import Problem
from tiles.lang.columns import Columns
from tiles.lang.dialect import Cpu, View
from tiles.lang.streams import Streams, norm_dots, norm_gradients, norm_rows
from tiles.lang.values import Buffer, Expr, bind


class NormScratch(NamedTuple):
    """What a backward keeps of a block of tokens: r and slope of each, the gradient of u in a block of columns."""

    scale: Buffer
    slope: Buffer
    of_u: Buffer


class Norm:
    """The macros for one token, walked in blocks of `block` columns."""

    def __init__(self, problem: Problem, block: int, dialect: Cpu) -> None:
        n, width, dtype = problem.streams, problem.width, problem.dtype
        streams, columns = tuple(range(n)), Columns(block, dtype, dialect)
        self._dialect = dialect

        def streams_of(p: Any, start: Expr, column: Expr) -> Streams:
            return Streams(View(p.x, (start, column), (0, 1)), n, dtype)

        def inverse_root(squares: Expr, eps: Expr) -> Expr:
            """r of the sum of a row's squares."""
            return T.float32(1) / T.sqrt(squares * T.float32(1 / width) + eps)

        @T.macro
        def scale_row(p: Any, token: Expr, squares: Expr) -> None:
            """Normalise a row of u whose squares add up to `squares`."""
            scale = bind(inverse_root(squares, p.norm_eps))
            given, normed = columns.row(p.u), columns.result(p.u)
            for chunk in T.serial(width // block):
                given.load(token, chunk * block)
                normed.store_at(token, chunk * block)
                for outer in columns.outer():
                    for inner in columns.inner():
                        column = columns.index(outer, inner)
                        weight = bind(p.norm_weight[chunk * block + columns.place(outer, inner)])
                        normed.put(column, given.get(column) * scale * weight)
                normed.flush()

        @T.macro
        def aggregate(p: Any, pre: Buffer, start: Expr, count: Expr) -> None:
            """u of a block of tokens, normalised before it is rounded. pre [n, tokens of a block]."""
            held, weight = dialect.scratch(2, width), (p.norm_weight, p.norm_eps)
            norm_rows(View(p.u, (start, 0), (0, 1)), streams_of(p, start, 0), pre, weight, held, count)

        @T.macro
        def store_factors(p: Any, kept: Any, row: Expr, squares: Expr, product: Expr) -> None:
            """r and slope of a token from Σ u² and Σ u·g."""
            scale = bind(inverse_root(squares, p.norm_eps))
            kept.scale[row] = scale
            kept.slope[row] = scale * (scale * (scale * product * T.float32(1 / width)))  # r³ may be past float32

        @T.macro
        def dots(p: Any, kept: Any, start: Expr, count: Expr, pre: Buffer, dpre: Buffer) -> None:
            """r and slope of a block of tokens, and dpre_i = ⟨gradient of u, x_i⟩ = r ⟨g, x_i⟩ − slope ⟨u, x_i⟩.

            pre and dpre [n, tokens of a block].
            """
            tokens = int(dpre.shape[1])
            of_u, du = dialect.scratch(n, tokens), View(p.du, (start, 0), (0, 1))
            norm_dots(dpre, of_u, streams_of(p, start, 0), du, pre, p.norm_weight, count)
            for t in dialect.parallel(tokens):
                gates = [bind(pre[i, t]) for i in streams]
                squares, product = (weighted(gates, [of[i, t] for i in streams]) for of in (of_u, dpre))
                store_factors(p, kept, t, squares, product)
                for i in streams:
                    of_x = kept.scale[t] * dpre[i, t] - kept.slope[t] * of_u[i, t]
                    dpre[i, t] = T.if_then_else(t < count, of_x, T.float32(0))

        @T.macro
        def through(p: Any, kept: Any, split: Expr, column: Expr, row: Expr, index: Expr, du: Expr, u: Expr) -> None:
            """The gradient of u in one column of a token, into its row, and the token's part of w's."""
            scaled = bind(kept.scale[row] * du)
            kept.of_u[row, index] = scaled * p.norm_weight[column + index] - kept.slope[row] * u
            p.dnorm_weight[split, column + index] += scaled * u

        @T.macro
        def gradients(p: Any, kept: Any, split: Expr, start: Expr, column: Expr, count: Expr, pre: Buffer) -> None:
            """The gradient of u in `block` columns of so many tokens, and their part of w's."""
            dweight, weight = View(p.dnorm_weight, (split, column), (0, 1)), View(p.norm_weight, (column,), (0, 0))
            du, factors = View(p.du, (start, column), (0, 1)), (kept.scale, kept.slope)
            norm_gradients(kept.of_u, dweight, weight, streams_of(p, start, column), du, pre, factors, count, block)

        self.aggregate, self.scale_row, self.store_factors = aggregate, scale_row, store_factors
        self.dots, self.through, self.gradients = dots, through, gradients

    def scratch(self, block_tokens: int, block_width: int) -> NormScratch:
        """Allocate what the backward keeps; call it inside the kernel."""
        scratch = self._dialect.scratch
        return NormScratch(scratch(block_tokens), scratch(block_tokens), scratch(block_tokens, block_width))
