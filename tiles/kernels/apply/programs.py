"""aggregate and merge as TileLang programs (docs/design.md, "The maths").

`Apply` makes the macros for one token, which the fused passes share. Stream indices are unrolled when the program is
built, so that every coefficient is a value of its own and x is read once for all outputs. Streams are flattened,
x [T, nC]: stream i of a token begins at column i·C.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import tilelang.language as T

from tiles.kernels.apply.columns import Columns
from tiles.kernels.apply.grouped import Grouped
from tiles.kernels.apply.schedule import ApplySchedule, in_groups
from tiles.kernels.spec import Problem
from tiles.lang.dialect import Dialect
from tiles.lang.rows import Row
from tiles.lang.values import Buffer, Expr, bind


class Apply:
    """The macros for one token, walked in blocks of `block` columns; its coefficients come as lists of values.

    With `threads`, each of so many CUDA threads has neighbouring columns to itself (`columns.Columns`).
    """

    def __init__(self, problem: Problem, block: int, dialect: Dialect, threads: int = 0) -> None:
        n, width = problem.streams, problem.width
        streams = tuple(range(n))
        columns = Columns(block, problem.dtype, dialect, threads)
        row = columns.row

        def rows(buffer: Buffer, copied: bool = False) -> list[Row]:
            return [row(buffer, copied=copied) for _ in streams]

        def fetch(parts: list[Row], token: Expr, column: Expr) -> None:
            for i in streams:
                parts[i].fetch(token, i * width + column)

        def place(parts: list[Row], token: Expr, column: Expr) -> None:
            for i in streams:
                parts[i].place(token, i * width + column)

        def flush(parts: list[Row]) -> None:
            for part in parts:
                part.flush()

        @T.macro
        def aggregate(x: Buffer, u: Buffer, token: Expr, pre: Sequence[Expr]) -> None:
            """u_c = Σ_i pre_i x_ic."""
            state, mixed = rows(x), row(u)
            for chunk in T.serial(width // block):
                fetch(state, token, chunk * block)
                mixed.place(token, chunk * block)
                for lane in columns.lanes():
                    for step in columns.steps():
                        column = columns.place(lane, step)
                        mixed.put(column, sum(pre[i] * state[i].get(column) for i in streams))
                mixed.flush()

        @T.macro
        def merge(x: Buffer, f: Buffer, out: Buffer, token: Expr, res: Any, post: Sequence[Expr]) -> None:
            """out_ic = Σ_j res_ij x_jc + post_i f_c."""
            state, sublayer, mixed = rows(x), row(f), rows(out)
            for chunk in T.serial(width // block):
                fetch(state, token, chunk * block)
                sublayer.fetch(token, chunk * block)
                place(mixed, token, chunk * block)
                for lane in columns.lanes():
                    for step in columns.steps():
                        column = columns.place(lane, step)
                        added = sublayer.get(column)
                        values = [state[j].get(column) for j in streams]
                        for i in streams:
                            mixed[i].put(column, post[i] * added + sum(res[i][j] * values[j] for j in streams))
                flush(mixed)

        @T.macro
        def put_gradients(dpost: Buffer, dres: Buffer, token: Expr, number: Expr, value: Expr) -> None:
            """One of the n sums of dpost and the n² of dres."""
            if number < n:
                dpost[token, number] = value
            else:
                dres[token, (number - n) // n, (number - n) % n] = value

        @T.macro
        def put_in_row(tensor: Buffer, token: Expr, i: Expr, value: Expr) -> None:
            tensor[token, i] = value

        @T.macro
        def put_in_column(tensor: Buffer, token: Expr, i: Expr, value: Expr) -> None:
            tensor[i, token] = value

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

            g may be dx itself.
            """
            res_sums = [[columns.sums() for _ in streams] for _ in streams]
            post_sums = [columns.sums() for _ in streams]
            state, sublayer, upper = rows(x), row(f), rows(g, copied=True)
            state_grads, sublayer_grads = rows(dx), row(df)
            for chunk in T.serial(width // block):
                fetch(upper, token, chunk * block)
                fetch(state, token, chunk * block)
                sublayer.fetch(token, chunk * block)
                place(state_grads, token, chunk * block)
                sublayer_grads.place(token, chunk * block)
                for lane in columns.lanes():
                    for step in columns.steps():
                        at, column = dialect.lane(lane), columns.place(lane, step)
                        grads = [upper[i].get(column) for i in streams]
                        added = sublayer.get(column)
                        sublayer_grads.put(column, sum(post[i] * grads[i] for i in streams))
                        for j in streams:
                            value = state[j].get(column)
                            state_grads[j].put(column, sum(res[i][j] * grads[i] for i in streams))
                            for i in streams:
                                res_sums[i][j][at] += grads[i] * value
                        for i in streams:
                            post_sums[i][at] += grads[i] * added
                flush(state_grads)
                sublayer_grads.flush()
            put = partial(put_gradients, dpost, dres, token)
            dialect.totals([*post_sums, *(sums for row_sums in res_sums for sums in row_sums)], put)

        @T.macro
        def weigh(x: Buffer, du: Buffer, token: Expr, dpre: Buffer, lane_of_token: Expr) -> None:
            """dpre_i = Σ_c du_c x_ic, into dpre [n, tokens of a block]."""
            sums = [columns.sums() for _ in streams]
            state, upper = rows(x), row(du)
            for chunk in T.serial(width // block):
                fetch(state, token, chunk * block)
                upper.fetch(token, chunk * block)
                for lane in columns.lanes():
                    for step in columns.steps():
                        at, column = dialect.lane(lane), columns.place(lane, step)
                        grad = upper.get(column)
                        for i in streams:
                            sums[i][at] += grad * state[i].get(column)
            dialect.totals(sums, partial(put_in_column, dpre, lane_of_token))

        @T.macro
        def weigh_both(x: Buffer, f: Buffer, du: Buffer, token: Expr, along: Buffer) -> None:
            """Σ_c du_c x_ic for every stream, and at last Σ_c du_c f_c, into along [n + 1, T]."""
            sums = [columns.sums() for _ in (*streams, n)]
            given, upper = [*rows(x), row(f)], row(du)
            for chunk in T.serial(width // block):
                fetch(given[:n], token, chunk * block)
                given[n].fetch(token, chunk * block)
                upper.fetch(token, chunk * block)
                for lane in columns.lanes():
                    for step in columns.steps():
                        at, column = dialect.lane(lane), columns.place(lane, step)
                        grad = upper.get(column)
                        for i, part in enumerate(given):
                            sums[i][at] += grad * part.get(column)
            dialect.totals(sums, partial(put_in_column, along, token))

        @T.macro
        def merge_and_weigh(
            x: Buffer, f: Buffer, du: Buffer, out: Buffer, token: Expr, res: Any, post: Sequence[Expr], dpre: Buffer
        ) -> None:
            """merge, and in the same pass dpre_i = Σ_c du_c out_ic, into dpre [n, T]."""
            sums = [columns.sums() for _ in streams]
            state, sublayer, upper, mixed = rows(x), row(f), row(du), rows(out)
            for chunk in T.serial(width // block):
                fetch(state, token, chunk * block)
                sublayer.fetch(token, chunk * block)
                upper.fetch(token, chunk * block)
                place(mixed, token, chunk * block)
                for lane in columns.lanes():
                    for step in columns.steps():
                        at, column = dialect.lane(lane), columns.place(lane, step)
                        added, grad = sublayer.get(column), upper.get(column)
                        values = [state[j].get(column) for j in streams]
                        for i in streams:
                            mixed[i].put(column, post[i] * added + sum(res[i][j] * values[j] for j in streams))
                            sums[i][at] += grad * mixed[i].get(column)
                flush(mixed)
            dialect.totals(sums, partial(put_in_column, dpre, token))

        @T.macro
        def aggregate_back(x: Buffer, du: Buffer, dx: Buffer, dpre: Buffer, token: Expr, pre: Sequence[Expr]) -> None:
            """dx_ic = pre_i du_c;  dpre_i = Σ_c du_c x_ic."""
            sums = [columns.sums() for _ in streams]
            state, upper, state_grads = rows(x), row(du), rows(dx)
            for chunk in T.serial(width // block):
                fetch(state, token, chunk * block)
                upper.fetch(token, chunk * block)
                place(state_grads, token, chunk * block)
                for lane in columns.lanes():
                    for step in columns.steps():
                        at, column = dialect.lane(lane), columns.place(lane, step)
                        grad = upper.get(column)
                        for i in streams:
                            sums[i][at] += grad * state[i].get(column)
                            state_grads[i].put(column, pre[i] * grad)
                flush(state_grads)
            dialect.totals(sums, partial(put_in_row, dpre, token))

        self.aggregate, self.merge, self.merge_and_weigh, self.weigh = aggregate, merge, merge_and_weigh, weigh
        self.aggregate_back, self.merge_back, self.weigh_both = aggregate_back, merge_back, weigh_both
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
    apply = Apply(problem, schedule.block_width, dialect, schedule.threads)
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
    n, width, stored = problem.streams, problem.width, dialect.storage(problem.dtype)
    apply = Apply(problem, schedule.block_width, dialect, schedule.threads)
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
            apply.aggregate_back(x, du, dx, dpre, token, apply.gates(pre, token))

    return aggregate_backward


def merging(problem: Problem, schedule: ApplySchedule, dialect: Dialect) -> Any:
    """The macros of merge: `Grouped` where a CUDA thread could not hold n² weights."""
    kind = Grouped if in_groups(problem, schedule) else Apply
    return kind(problem, schedule.block_width, dialect, schedule.threads)


def merge_forward(problem: Problem, schedule: ApplySchedule, dialect: Dialect) -> Any:
    """out_ic = Σ_j res_ij x_jc + post_i f_c."""
    n, width, stored = problem.streams, problem.width, dialect.storage(problem.dtype)
    apply = merging(problem, schedule, dialect)
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
    apply = merging(problem, schedule, dialect)
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
            apply.merge_back(x, f, g, dx, df, dres, dpost, token, apply.mixing(res, token), apply.gates(post, token))

    return merge_backward
