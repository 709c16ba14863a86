"""step on CUDA with merge inside of project's tiles: x' is written once and not read back before its sublayer's u; the
backward makes it again from x and f, and never writes it.

Otherwise as in `chain_programs`. Streams are flattened, x [T, nC]: stream i of a token begins at column i·C.
"""

from typing import Any

import tilelang.language as T

from tiles.kernels.apply.programs import Apply
from tiles.kernels.fused import merged_schedule
from tiles.kernels.fused.chain_macros import JOIN_THREADS, After, Before, Rows
from tiles.kernels.fused.chain_schedule import ChainSchedule, lanes, tiled
from tiles.kernels.fused.merged_macros import (
    FINISH_THREADS,
    Merged,
    finishing,
    merged_gradients,
    merged_halves,
    merged_projection,
)
from tiles.kernels.project.halves import THREADS
from tiles.kernels.project.matmul_programs import SplitSums, start_after
from tiles.kernels.spec import Problem
from tiles.lang.dialect import Dialect
from tiles.lang.program_attrs import checked
from tiles.lang.values import as_value


def step_forward(problem: Problem, schedule: ChainSchedule, dialect: Dialect) -> Any:
    """x'_ic = Σ_j res_ij x_jc + post_i f_c, then pre of x'."""
    n, width, fan_in, outputs = problem.streams, problem.width, problem.fan_in, problem.outputs
    stored, before = dialect.storage(problem.dtype), Before(problem, schedule, dialect)
    apply = Apply(problem, schedule.row_width, dialect, schedule.row_threads)
    project, rows = merged_projection(problem, tiled(schedule), dialect), Rows(schedule)
    cut = merged_halves(problem, tiled(schedule), dialect)
    tokens = T.dynamic("tokens")

    @T.prim_func
    def step_forward(
        x: T.Tensor((tokens, fan_in), stored),
        f: T.Tensor((tokens, width), stored),
        post: T.Tensor((tokens, n), "float32"),
        res: T.Tensor((tokens, n, n), "float32"),
        phi: T.Tensor((outputs, fan_in), "float32"),
        alpha: T.Tensor((3,), "float32"),
        bias: T.Tensor((outputs,), "float32"),
        eps: T.float32,
        x_next: T.Tensor((tokens, fan_in), stored),
        u: T.Tensor((tokens, width), stored),
        post_next: T.Tensor((tokens, n), "float32"),
        res_next: T.Tensor((tokens, n, n), "float32"),
        z: T.Tensor((tokens, outputs), "float32"),
        s: T.Tensor((tokens,), "float32"),
        parts: T.Tensor((schedule.splits, tokens * (outputs + 1)), "float32"),
        pre: T.Tensor((tokens, n), "float32"),
        halves: T.Tensor(cut.shape, cut.dtype),
    ):
        if schedule.halved:
            with dialect.kernel(cut.blocks, cut.rows, threads=THREADS) as (group, k):
                dialect.let_next_start(schedule.overlap)
                cut.fill(phi, halves, group, k)
        with dialect.kernel(before.groups(tokens), schedule.splits, threads=schedule.threads) as (group, split):
            start_after(dialect, schedule)
            into = SplitSums(parts, split, outputs)
            project(x, f, post, res, halves if schedule.halved else phi, x_next, group, split, as_value(tokens), into)
        with dialect.kernel(T.ceildiv(tokens, schedule.lane_tokens), threads=lanes(problem)) as block:
            dialect.await_last(schedule.overlap)
            before.coefficients(alpha, bias, eps, pre, post_next, res_next, z, s, parts, block, as_value(tokens))
        with dialect.kernel(rows.blocks(tokens), threads=schedule.row_threads) as block:
            dialect.await_last(schedule.overlap)
            for turn in T.serial(rows.turns(block, tokens)):
                token = rows.token(block, turn)
                apply.aggregate(x_next, u, token, apply.gates(pre, token))

    return checked(step_forward, chunk_tokens=schedule.chunk_tokens, overlap=schedule.overlap)


def step_backward(problem: Problem, schedule: ChainSchedule, dialect: Dialect) -> Any:
    """dpre_i = Σ_j res_ij ⟨du, x_j⟩ + post_i ⟨du, f⟩; all else while x' is made again, tile by tile."""
    n, width, fan_in, outputs = problem.streams, problem.width, problem.fan_in, problem.outputs
    stored, after = dialect.storage(problem.dtype), After(problem, schedule, dialect)
    tiles, count = tiled(schedule), n * n + n
    groups = merged_schedule.groups(problem, tiles)
    apply = Apply(problem, schedule.row_width, dialect, schedule.row_threads)
    spread, finish = merged_gradients(problem, tiles, dialect), finishing(problem, groups, dialect)
    rows = Rows(schedule)
    tokens, splits = T.dynamic("tokens"), T.dynamic("splits")

    @T.prim_func
    def step_backward(
        x: T.Tensor((tokens, fan_in), stored),
        f: T.Tensor((tokens, width), stored),
        post: T.Tensor((tokens, n), "float32"),
        res: T.Tensor((tokens, n, n), "float32"),
        phi: T.Tensor((outputs, fan_in), "float32"),
        alpha: T.Tensor((3,), "float32"),
        bias: T.Tensor((outputs,), "float32"),
        z: T.Tensor((tokens, outputs), "float32"),
        s: T.Tensor((tokens,), "float32"),
        dx_next: T.Tensor((tokens, fan_in), stored),
        du: T.Tensor((tokens, width), stored),
        dpost_next: T.Tensor((tokens, n), "float32"),
        dres_next: T.Tensor((tokens, n, n), "float32"),
        eps: T.float32,
        dx: T.Tensor((tokens, fan_in), stored),
        df: T.Tensor((tokens, width), stored),
        dpost: T.Tensor((tokens, n), "float32"),
        dres: T.Tensor((tokens, n, n), "float32"),
        dphi: T.Tensor((splits, outputs, fan_in), "float32"),
        dalpha: T.Tensor((splits, 3), "float32"),
        dbias: T.Tensor((splits, outputs), "float32"),
        dz: T.Tensor((tokens, outputs), "float32"),
        ds: T.Tensor((tokens,), "float32"),
        pre: T.Tensor((tokens, n), "float32"),
        along: T.Tensor((n + 1, tokens), "float32"),
        alphas: T.Tensor((tokens, 3), "float32"),
        biases: T.Tensor((tokens, outputs), "float32"),
        shares: T.Tensor((groups, tokens * count), "float32"),
    ):
        with dialect.kernel(rows.blocks(tokens), threads=schedule.row_threads) as block:
            dialect.let_next_start(schedule.overlap)
            for turn in T.serial(rows.turns(block, tokens)):
                token = rows.token(block, turn)
                apply.weigh_both(x, f, du, token, along)
        with dialect.kernel(T.ceildiv(tokens, schedule.lane_tokens), threads=lanes(problem)) as block:
            dialect.await_last(schedule.overlap)
            grads, sums = (Merged(along, res, post), dpost_next, dres_next), (alphas, biases)
            after.coefficients(*grads, z, s, alpha, bias, eps, dz, ds, pre, *sums, block, as_value(tokens))
        with dialect.kernel(groups, splits, threads=schedule.threads) as (group, split):
            merged, upper, into = (x, f, post, res), (pre, du, dx_next), (dx, df, dphi, shares)
            spread(*merged, phi, dz, ds, *upper, *into, group, split, as_value(tokens), as_value(splits))
        with dialect.kernel(T.ceildiv(tokens * count, FINISH_THREADS), threads=FINISH_THREADS) as block:
            dialect.await_last(schedule.overlap)
            finish(shares, dpost, dres, block, as_value(tokens))
        with dialect.kernel(splits, threads=JOIN_THREADS) as split:
            dialect.await_last(schedule.overlap)
            after.join(alphas, biases, dalpha, dbias, split, as_value(tokens), as_value(splits))

    return after.planned(step_backward)
