"""aggregate and merge as TileLang programs (DESIGN, the maths).

One program instance owns one token. Stream indices are unrolled when the program is built, so that every
coefficient is a value of its own and x is read once for all outputs.
"""

from typing import Any

import tilelang.language as T

from tiles.apply.schedule import ApplySchedule
from tiles.dialect import Dialect, bind
from tiles.family import Problem


def aggregate_forward(problem: Problem, schedule: ApplySchedule, dialect: Dialect) -> Any:
    """u_c = Σ_i pre_i x_ic."""
    n, width, dtype = problem.streams, problem.width, problem.dtype
    streams, block, stored = tuple(range(n)), schedule.block_width, dialect.storage(dtype)
    tokens = T.dynamic("tokens")

    @T.prim_func
    def aggregate_forward(
        x: T.Tensor((tokens, n, width), stored),
        pre: T.Tensor((tokens, n), "float32"),
        u: T.Tensor((tokens, width), stored),
    ):
        with dialect.kernel(tokens, threads=schedule.threads) as token:
            weights = [bind(pre[token, i]) for i in streams]
            for chunk in T.serial(width // block):
                for lane in dialect.lanes(block):
                    c = chunk * block + lane
                    mixed = sum(weights[i] * dialect.load(x[token, i, c], dtype) for i in streams)
                    u[token, c] = dialect.store(mixed, dtype)

    return aggregate_forward


def aggregate_backward(problem: Problem, schedule: ApplySchedule, dialect: Dialect) -> Any:
    """dx_ic = pre_i du_c;  dpre_i = Σ_c du_c x_ic."""
    n, width, dtype = problem.streams, problem.width, problem.dtype
    streams, block, stored = tuple(range(n)), schedule.block_width, dialect.storage(dtype)
    tokens = T.dynamic("tokens")

    @T.prim_func
    def aggregate_backward(
        x: T.Tensor((tokens, n, width), stored),
        pre: T.Tensor((tokens, n), "float32"),
        du: T.Tensor((tokens, width), stored),
        dx: T.Tensor((tokens, n, width), stored),
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
                        sums[i][at] += grad * dialect.load(x[token, i, c], dtype)
                        dx[token, i, c] = dialect.store(weights[i] * grad, dtype)
            for i in streams:
                dpre[token, i] = dialect.total(sums[i])[0]

    return aggregate_backward


def merge_forward(problem: Problem, schedule: ApplySchedule, dialect: Dialect) -> Any:
    """out_ic = Σ_j res_ij x_jc + post_i f_c."""
    n, width, dtype = problem.streams, problem.width, problem.dtype
    streams, block, stored = tuple(range(n)), schedule.block_width, dialect.storage(dtype)
    tokens = T.dynamic("tokens")

    @T.prim_func
    def merge_forward(
        x: T.Tensor((tokens, n, width), stored),
        f: T.Tensor((tokens, width), stored),
        res: T.Tensor((tokens, n, n), "float32"),
        post: T.Tensor((tokens, n), "float32"),
        out: T.Tensor((tokens, n, width), stored),
    ):
        with dialect.kernel(tokens, threads=schedule.threads) as token:
            mix = [[bind(res[token, i, j]) for j in streams] for i in streams]
            gate = [bind(post[token, i]) for i in streams]
            for chunk in T.serial(width // block):
                for lane in dialect.lanes(block):
                    c = chunk * block + lane
                    sublayer = bind(dialect.load(f[token, c], dtype))
                    rows = [bind(dialect.load(x[token, j, c], dtype)) for j in streams]
                    for i in streams:
                        mixed = gate[i] * sublayer + sum(mix[i][j] * rows[j] for j in streams)
                        out[token, i, c] = dialect.store(mixed, dtype)

    return merge_forward


def merge_backward(problem: Problem, schedule: ApplySchedule, dialect: Dialect) -> Any:
    """dx_jc = Σ_i res_ij g_ic;  df_c = Σ_i post_i g_ic;  dres_ij = Σ_c g_ic x_jc;  dpost_i = Σ_c g_ic f_c."""
    n, width, dtype = problem.streams, problem.width, problem.dtype
    streams, block, stored = tuple(range(n)), schedule.block_width, dialect.storage(dtype)
    tokens = T.dynamic("tokens")

    @T.prim_func
    def merge_backward(
        x: T.Tensor((tokens, n, width), stored),
        f: T.Tensor((tokens, width), stored),
        res: T.Tensor((tokens, n, n), "float32"),
        post: T.Tensor((tokens, n), "float32"),
        g: T.Tensor((tokens, n, width), stored),
        dx: T.Tensor((tokens, n, width), stored),
        df: T.Tensor((tokens, width), stored),
        dres: T.Tensor((tokens, n, n), "float32"),
        dpost: T.Tensor((tokens, n), "float32"),
    ):
        with dialect.kernel(tokens, threads=schedule.threads) as token:
            mix = [[bind(res[token, i, j]) for j in streams] for i in streams]
            gate = [bind(post[token, i]) for i in streams]
            res_sums = [[dialect.accumulator(block) for _ in streams] for _ in streams]
            post_sums = [dialect.accumulator(block) for _ in streams]
            for chunk in T.serial(width // block):
                for lane in dialect.lanes(block):
                    c, at = chunk * block + lane, dialect.lane(lane)
                    grads = [bind(dialect.load(g[token, i, c], dtype)) for i in streams]
                    sublayer = bind(dialect.load(f[token, c], dtype))
                    df[token, c] = dialect.store(sum(gate[i] * grads[i] for i in streams), dtype)
                    for j in streams:
                        row = bind(dialect.load(x[token, j, c], dtype))
                        dx[token, j, c] = dialect.store(sum(mix[i][j] * grads[i] for i in streams), dtype)
                        for i in streams:
                            res_sums[i][j][at] += grads[i] * row
                    for i in streams:
                        post_sums[i][at] += grads[i] * sublayer
            for i in streams:
                dpost[token, i] = dialect.total(post_sums[i])[0]
                for j in streams:
                    dres[token, i, j] = dialect.total(res_sums[i][j])[0]

    return merge_backward
