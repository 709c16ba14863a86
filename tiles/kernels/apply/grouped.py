"""merge for many streams: their n² weights and sums do not fit a thread's registers, so they come a few at a time.

The maths is that of `programs.Apply`. The forward writes one output stream after the other from streams that it holds.
The backward takes `schedule.GROUP` input streams at a time and reads g again for each group: it was just read, so it
comes from a cache. Members of a group past the last stream repeat it; their sums are dropped.
"""

from functools import partial

import tilelang.language as T

from tiles.kernels.apply.columns import Columns
from tiles.kernels.apply.schedule import GROUP
from tiles.kernels.spec import Problem
from tiles.lang.dialect import Dialect
from tiles.lang.values import Buffer, Expr, bind


class Grouped:
    """The macros for one token; its coefficients are read where they are needed."""

    def __init__(self, problem: Problem, block: int, dialect: Dialect, threads: int) -> None:
        n, width = problem.streams, problem.width
        streams, members = tuple(range(n)), tuple(range(min(GROUP, n)))
        columns = Columns(block, problem.dtype, dialect, threads)
        row = columns.row

        @T.macro
        def merge(x: Buffer, f: Buffer, out: Buffer, token: Expr, res: Buffer, post: Buffer) -> None:
            """out_ic = Σ_j res_ij x_jc + post_i f_c."""
            state, sublayer, mixed = [row(x) for _ in streams], row(f), row(out)
            for chunk in T.serial(width // block):
                for j in streams:
                    state[j].fetch(token, j * width + chunk * block)
                sublayer.fetch(token, chunk * block)
                for i in T.serial(n):
                    mixed.place(token, i * width + chunk * block)
                    gate, weights = bind(post[token, i]), [bind(res[token, i, j]) for j in streams]
                    for lane in columns.lanes():
                        for step in columns.steps():
                            column = columns.place(lane, step)
                            kept = sum(weights[j] * state[j].get(column) for j in streams)
                            mixed.put(column, gate * sublayer.get(column) + kept)
                    mixed.flush()

        @T.macro
        def put_post(dpost: Buffer, token: Expr, i: Expr, value: Expr) -> None:
            dpost[token, i] = value

        @T.macro
        def put_res(dres: Buffer, token: Expr, first: Expr, number: Expr, value: Expr) -> None:
            """One of the sums of n rows for a group's members. Those past the last stream added up in another order."""
            if first + number % len(members) < n:
                dres[token, number // len(members), first + number % len(members)] = value

        @T.macro
        def sublayer_back(f: Buffer, g: Buffer, df: Buffer, dpost: Buffer, token: Expr, post: Buffer) -> None:
            """df_c = Σ_i post_i g_ic;  dpost_i = Σ_c g_ic f_c."""
            sums, weights = [columns.sums() for _ in streams], [bind(post[token, i]) for i in streams]
            upper, sublayer, sublayer_grads = [row(g) for _ in streams], row(f), row(df)
            for chunk in T.serial(width // block):
                for i in streams:
                    upper[i].fetch(token, i * width + chunk * block)
                sublayer.fetch(token, chunk * block)
                sublayer_grads.place(token, chunk * block)
                for lane in columns.lanes():
                    for step in columns.steps():
                        at, column = dialect.lane(lane), columns.place(lane, step)
                        grads, added = [upper[i].get(column) for i in streams], sublayer.get(column)
                        sublayer_grads.put(column, sum(weights[i] * grads[i] for i in streams))
                        for i in streams:
                            sums[i][at] += grads[i] * added
                sublayer_grads.flush()
            dialect.totals(sums, partial(put_post, dpost, token))

        @T.macro
        def streams_back(x: Buffer, g: Buffer, dx: Buffer, dres: Buffer, token: Expr, res: Buffer, first: Expr) -> None:
            """dx_jc = Σ_i res_ij g_ic;  dres_ij = Σ_c g_ic x_jc, for the group of streams j that begins at first."""
            sums = [[columns.sums() for _ in members] for _ in streams]
            upper = [row(g) for _ in streams]
            state, state_grads = [row(x) for _ in members], [row(dx) for _ in members]
            group = [bind(T.min(first + member, n - 1)) for member in members]
            weights = [[bind(res[token, i, j]) for j in group] for i in streams]
            for chunk in T.serial(width // block):
                for i in streams:
                    upper[i].fetch(token, i * width + chunk * block)
                for member in members:
                    state[member].fetch(token, group[member] * width + chunk * block)
                    state_grads[member].place(token, group[member] * width + chunk * block)
                for lane in columns.lanes():
                    for step in columns.steps():
                        at, column = dialect.lane(lane), columns.place(lane, step)
                        grads = [upper[i].get(column) for i in streams]
                        for member in members:
                            value = state[member].get(column)
                            state_grads[member].put(column, sum(weights[i][member] * grads[i] for i in streams))
                            for i in streams:
                                sums[i][member][at] += grads[i] * value
                for member in members:
                    state_grads[member].flush()
            dialect.totals([part for row_sums in sums for part in row_sums], partial(put_res, dres, token, first))

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
            res: Buffer,
            post: Buffer,
        ) -> None:
            """All four gradients; g must not be dx, which is read after a part of dx is written."""
            sublayer_back(f, g, df, dpost, token, post)
            for group in T.serial(T.ceildiv(n, len(members))):
                streams_back(x, g, dx, dres, token, res, group * len(members))

        self.merge, self.merge_back = merge, merge_back

    def gates(self, weights: Buffer, token: Expr) -> Buffer:
        """Where the macros find a token's n weights."""
        return weights

    def mixing(self, res: Buffer, token: Expr) -> Buffer:
        """Where the macros find a token's n × n weights."""
        return res
