"""aggregate and merge as TileLang programs (DESIGN, the maths).

`Apply` makes the macros for one token, which the fused passes share. Stream indices are unrolled when the program is
built, so that every coefficient is a value of its own and x is read once for all outputs. Streams are flattened,
x [T, nC]: stream i of a token begins at column i·C.
"""

from collections.abc import Sequence
from typing import Any

import tilelang.language as T

from tiles.apply.schedule import ApplySchedule
from tiles.dialect import Buffer, Dialect, Expr, bind
from tiles.family import Problem


class Apply:
    """The macros for one token, walked in blocks of `block` columns; its coefficients come as lists of values."""

    def __init__(self, problem: Problem, block: int, dialect: Dialect) -> None:
        n, width, dtype = problem.streams, problem.width, problem.dtype
        streams = tuple(range(n))

        def load(buffer: Buffer, token: Expr, column: Expr) -> Expr:
            return bind(dialect.load(buffer[token, column], dtype))

        @T.macro
        def aggregate(x: Buffer, u: Buffer, token: Expr, pre: Sequence[Expr]) -> None:
            """u_c = Σ_i pre_i x_ic."""
            for chunk in T.serial(width // block):
                for lane in dialect.lanes(block):
                    c = chunk * block + lane
                    mixed = sum(pre[i] * load(x, token, i * width + c) for i in streams)
                    u[token, c] = dialect.store(mixed, dtype)

        @T.macro
        def merge(x: Buffer, f: Buffer, out: Buffer, token: Expr, res: Any, post: Sequence[Expr]) -> None:
            """out_ic = Σ_j res_ij x_jc + post_i f_c."""
            for chunk in T.serial(width // block):
                for lane in dialect.lanes(block):
                    c = chunk * block + lane
                    sublayer = load(f, token, c)
                    rows = [load(x, token, j * width + c) for j in streams]
                    for i in streams:
                        mixed = post[i] * sublayer + sum(res[i][j] * rows[j] for j in streams)
                        out[token, i * width + c] = dialect.store(mixed, dtype)

        @T.macro
        def merge_back(
            x: Buffer,
            f: Buffer,
            g: Buffer,
            dx: Buffer,
            df: Buffer,
            dres: Buffer,
            dpost: Buffer,
            token: Expr,
            res: Any,
            post: Sequence[Expr],
        ) -> None:
            """dx_jc = Σ_i res_ij g_ic;  df_c = Σ_i post_i g_ic;  dres_ij = Σ_c g_ic x_jc;  dpost_i = Σ_c g_ic f_c.

            g may be dx itself: it is staged, since a C compiler does not vectorise a loop that reads what it writes.
            """
            res_sums = [[dialect.accumulator(block) for _ in streams] for _ in streams]
            post_sums = [dialect.accumulator(block) for _ in streams]
            staged = [dialect.tile(block) for _ in streams]
            for chunk in T.serial(width // block):
                for lane in dialect.lanes(block):
                    for i in streams:
                        staged[i][lane] = dialect.load(g[token, i * width + chunk * block + lane], dtype)
                for lane in dialect.lanes(block):
                    c, at = chunk * block + lane, dialect.lane(lane)
                    grads = [bind(staged[i][lane]) for i in streams]
                    sublayer = load(f, token, c)
                    df[token, c] = dialect.store(sum(post[i] * grads[i] for i in streams), dtype)
                    for j in streams:
                        row = load(x, token, j * width + c)
                        mixed = sum(res[i][j] * grads[i] for i in streams)
                        dx[token, j * width + c] = dialect.store(mixed, dtype)
                        for i in streams:
                            res_sums[i][j][at] += grads[i] * row
                    for i in streams:
                        post_sums[i][at] += grads[i] * sublayer
            for i in streams:
                dpost[token, i] = dialect.total(post_sums[i])[0]
                for j in streams:
                    dres[token, i, j] = dialect.total(res_sums[i][j])[0]

        @T.macro
        def weigh(x: Buffer, du: Buffer, token: Expr, dpre: Buffer, lane_of_token: Expr) -> None:
            """dpre_i = Σ_c du_c x_ic, into dpre [n, tokens of a block]."""
            sums = [dialect.accumulator(block) for _ in streams]
            for chunk in T.serial(width // block):
                for lane in dialect.lanes(block):
                    c, at = chunk * block + lane, dialect.lane(lane)
                    grad = load(du, token, c)
                    for i in streams:
                        sums[i][at] += grad * load(x, token, i * width + c)
            for i in streams:
                dpre[i, lane_of_token] = dialect.total(sums[i])[0]

        self.aggregate, self.merge, self.merge_back, self.weigh = aggregate, merge, merge_back, weigh
        self.streams = streams

    def gates(self, weights: Buffer, token: Expr) -> list[Expr]:
        """The n values of one token of weights [T, n]."""
        return [bind(weights[token, i]) for i in self.streams]

    def mixing(self, res: Buffer, token: Expr) -> list[list[Expr]]:
        """The n × n values of one token of res [T, n, n]."""
        return [[bind(res[token, i, j]) for j in self.streams] for i in self.streams]


def aggregate_forward(problem: Problem, schedule: ApplySchedule, dialect: Dialect) -> Any:
    """u_c = Σ_i pre_i x_ic."""
    n, width, stored = problem.streams, problem.width, dialect.storage(problem.dtype)
    apply = Apply(problem, schedule.block_width, dialect)
    tokens = T.dynamic("tokens")

    @T.prim_func
    def aggregate_forward(
        x: T.Tensor((tokens, n * width), stored),
        pre: T.Tensor((tokens, n), "float32"),
        u: T.Tensor((tokens, width), stored),
    ):
        with dialect.kernel(tokens, threads=schedule.threads) as token:
            apply.aggregate(x, u, token, apply.gates(pre, token))

    return aggregate_forward


def aggregate_backward(problem: Problem, schedule: ApplySchedule, dialect: Dialect) -> Any:
    """dx_ic = pre_i du_c;  dpre_i = Σ_c du_c x_ic."""
    n, width, dtype, block = problem.streams, problem.width, problem.dtype, schedule.block_width
    streams, stored = tuple(range(n)), dialect.storage(dtype)
    tokens = T.dynamic("tokens")

    @T.prim_func
    def aggregate_backward(
        x: T.Tensor((tokens, n * width), stored),
        pre: T.Tensor((tokens, n), "float32"),
        du: T.Tensor((tokens, width), stored),
        dx: T.Tensor((tokens, n * width), stored),
        dpre: T.Tensor((tokens, n), "float32"),
    ):
        with dialect.kernel(tokens, threads=schedule.threads) as token:
            weights = [bind(pre[token, i]) for i in streams]
            sums = [dialect.accumulator(block) for _ in streams]
            for chunk in T.serial(width // block):
                for lane in dialect.lanes(block):
                    c, at = chunk * block + lane, dialect.lane(lane)
                    grad = bind(dialect.load(du[token, c], dtype))
                    for i in streams:
                        sums[i][at] += grad * dialect.load(x[token, i * width + c], dtype)
                        dx[token, i * width + c] = dialect.store(weights[i] * grad, dtype)
            for i in streams:
                dpre[token, i] = dialect.total(sums[i])[0]

    return aggregate_backward


def merge_forward(problem: Problem, schedule: ApplySchedule, dialect: Dialect) -> Any:
    """out_ic = Σ_j res_ij x_jc + post_i f_c."""
    n, width, stored = problem.streams, problem.width, dialect.storage(problem.dtype)
    apply = Apply(problem, schedule.block_width, dialect)
    tokens = T.dynamic("tokens")

    @T.prim_func
    def merge_forward(
        x: T.Tensor((tokens, n * width), stored),
        f: T.Tensor((tokens, width), stored),
        res: T.Tensor((tokens, n, n), "float32"),
        post: T.Tensor((tokens, n), "float32"),
        out: T.Tensor((tokens, n * width), stored),
    ):
        with dialect.kernel(tokens, threads=schedule.threads) as token:
            apply.merge(x, f, out, token, apply.mixing(res, token), apply.gates(post, token))

    return merge_forward


def merge_backward(problem: Problem, schedule: ApplySchedule, dialect: Dialect) -> Any:
    """dx_jc = Σ_i res_ij g_ic;  df_c = Σ_i post_i g_ic;  dres_ij = Σ_c g_ic x_jc;  dpost_i = Σ_c g_ic f_c."""
    n, width, stored = problem.streams, problem.width, dialect.storage(problem.dtype)
    apply = Apply(problem, schedule.block_width, dialect)
    tokens = T.dynamic("tokens")

    @T.prim_func
    def merge_backward(
        x: T.Tensor((tokens, n * width), stored),
        f: T.Tensor((tokens, width), stored),
        res: T.Tensor((tokens, n, n), "float32"),
        post: T.Tensor((tokens, n), "float32"),
        g: T.Tensor((tokens, n * width), stored),
        dx: T.Tensor((tokens, n * width), stored),
        df: T.Tensor((tokens, width), stored),
        dres: T.Tensor((tokens, n, n), "float32"),
        dpost: T.Tensor((tokens, n), "float32"),
    ):
        with dialect.kernel(tokens, threads=schedule.threads) as token:
            res_, post_ = apply.mixing(res, token), apply.gates(post, token)
            apply.merge_back(x, f, g, dx, df, dres, dpost, token, res_, post_)

    return merge_backward
