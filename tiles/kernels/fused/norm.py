"""The RMSNorm of a sublayer's input on a CPU, as macros that pre, step and single_pass share.

u = Σ_i pre_i x_i as ever; r = rsqrt(mean(u²) + norm_eps); the sublayer gets u·r·w. The row of a token is scaled while
it is in the nearest cache. The backward makes u again from the streams; with g = w·du, du the gradient of what the
sublayer gets, and a factor for each token,

    slope = r³ Σ_c u_c g_c / C,  the gradient of u is r·g − slope·u, and that of w is Σ_t du·u·r.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import tilelang.language as T

from tiles.kernels.apply.merge import weighted
from tiles.kernels.spec import Problem
from tiles.lang.columns import Columns
from tiles.lang.dialect import Cpu
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
        def aggregate(p: Any, token: Expr, pre: Sequence[Expr]) -> None:
            """u of a token, normalised before it is rounded."""
            state, held = [columns.row(p.x) for _ in streams], dialect.scratch(width)
            for chunk in T.serial(width // block):
                for i in streams:
                    state[i].load(token, i * width + chunk * block)
                for outer in columns.outer():
                    for inner in columns.inner():
                        values = [row.get(columns.index(outer, inner)) for row in state]
                        held[chunk * block + columns.aside(outer, inner)] = weighted(pre, values)
            scale, normed = bind(inverse_root(dialect.squares(held, (0,), width), p.norm_eps)), columns.result(p.u)
            for chunk in T.serial(width // block):
                normed.store_at(token, chunk * block)
                for outer in columns.outer():
                    for inner in columns.inner():
                        weight = bind(p.norm_weight[chunk * block + columns.place(outer, inner)])
                        u = held[chunk * block + columns.aside(outer, inner)]
                        normed.put(columns.index(outer, inner), u * scale * weight)
                normed.flush()

        @T.macro
        def store_factors(p: Any, kept: Any, row: Expr, squares: Expr, product: Expr) -> None:
            """r and slope of a token from Σ u² and Σ u·g."""
            scale = bind(inverse_root(squares, p.norm_eps))
            kept.scale[row] = scale
            kept.slope[row] = scale * (scale * (scale * product * T.float32(1 / width)))  # r³ may be past float32

        @T.macro
        def dots(p: Any, kept: Any, token: Expr, row: Expr, pre: Buffer, dpre: Buffer) -> None:
            """A token's r and slope, and dpre_i = ⟨gradient of u, x_i⟩ = r ⟨g, x_i⟩ − slope ⟨u, x_i⟩.

            pre and dpre [n, tokens of a block]; the token is number `row` of it.
            """
            state, upper = [columns.row(p.x) for _ in streams], columns.row(p.du)
            gates = [bind(pre[i, row]) for i in streams]
            of_g, of_u = ([dialect.accumulator(block) for _ in streams] for _ in range(2))
            for chunk in T.serial(width // block):
                for i in streams:
                    state[i].load(token, i * width + chunk * block)
                upper.load(token, chunk * block)
                for outer in columns.outer():
                    for inner in columns.inner():
                        column = columns.index(outer, inner)
                        values = [row_of.get(column) for row_of in state]
                        g = bind(upper.get(column) * p.norm_weight[chunk * block + columns.place(outer, inner)])
                        u = bind(weighted(gates, values))
                        for i in streams:
                            of_g[i][0] += g * values[i]
                            of_u[i][0] += u * values[i]
            squares, product = weighted(gates, [s[0] for s in of_u]), weighted(gates, [s[0] for s in of_g])
            store_factors(p, kept, row, squares, product)
            for i in streams:
                dpre[i, row] = kept.scale[row] * of_g[i][0] - kept.slope[row] * of_u[i][0]

        @T.macro
        def through(p: Any, kept: Any, split: Expr, column: Expr, row: Expr, index: Expr, du: Expr, u: Expr) -> None:
            """The gradient of u in one column of a token, into its row, and the token's part of w's."""
            scaled = bind(kept.scale[row] * du)
            kept.of_u[row, index] = scaled * p.norm_weight[column + index] - kept.slope[row] * u
            p.dnorm_weight[split, column + index] += scaled * u

        @T.macro
        def gradients(p: Any, kept: Any, split: Expr, start: Expr, column: Expr, count: Expr, pre: Buffer) -> None:
            """The gradient of u in `block` columns of so many tokens, and their part of w's."""
            for t in T.serial(count):
                gates = [bind(pre[i, t]) for i in streams]
                for index in dialect.parallel(block):
                    values = [dialect.load(p.x[start + t, i * width + column + index], dtype) for i in streams]
                    du = dialect.load(p.du[start + t, column + index], dtype)
                    through(p, kept, split, column, t, index, du, bind(weighted(gates, values)))

        self.aggregate, self.scale_row, self.store_factors = aggregate, scale_row, store_factors
        self.dots, self.through, self.gradients = dots, through, gradients

    def scratch(self, block_tokens: int, block_width: int) -> NormScratch:
        """Allocate what the backward keeps; call it inside the kernel."""
        scratch = self._dialect.scratch
        return NormScratch(scratch(block_tokens), scratch(block_tokens), scratch(block_tokens, block_width))
