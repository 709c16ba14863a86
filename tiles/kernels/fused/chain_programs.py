"""pre and step on CUDA: project's tiles and passes over rows of tokens, one kernel after the other.

The launcher takes a chunk of tokens through all kernels before it touches the next one, so that streams read a second
time come from the L2 cache. The coefficients are a kernel of their own, a lane for each token. Streams are flattened,
x [T, nC]: stream i of a token begins at column i·C.
"""

from typing import Any

import tilelang.language as T

from tiles.kernels.apply.programs import Apply, merging
from tiles.kernels.apply.schedule import ApplySchedule, in_groups
from tiles.kernels.fused.chain_macros import JOIN_THREADS, After, Before, Rows
from tiles.kernels.fused.chain_schedule import ChainSchedule, lanes
from tiles.kernels.project.halves import THREADS
from tiles.kernels.project.matmul_programs import SplitSums, start_after
from tiles.kernels.spec import Problem
from tiles.lang.dialect import Dialect
from tiles.lang.program_attrs import checked
from tiles.lang.values import as_value


def pre_forward(problem: Problem, schedule: ChainSchedule, dialect: Dialect) -> Any:
    """z, s from x;  pre, post, res from z, s;  u_c = Σ_i pre_i x_ic."""
    n, width, fan_in, outputs = problem.streams, problem.width, problem.fan_in, problem.outputs
    stored, before = dialect.storage(problem.dtype), Before(problem, schedule, dialect)
    apply = Apply(problem, schedule.row_width, dialect, schedule.row_threads)
    rows = Rows(schedule)
    tokens = T.dynamic("tokens")

    @T.prim_func
    def pre_forward(
        x: T.Tensor((tokens, fan_in), stored),
        phi: T.Tensor((outputs, fan_in), "float32"),
        alpha: T.Tensor((3,), "float32"),
        bias: T.Tensor((outputs,), "float32"),
        eps: T.float32,
        u: T.Tensor((tokens, width), stored),
        post: T.Tensor((tokens, n), "float32"),
        res: T.Tensor((tokens, n, n), "float32"),
        z: T.Tensor((tokens, outputs), "float32"),
        s: T.Tensor((tokens,), "float32"),
        parts: T.Tensor((schedule.splits, tokens * (outputs + 1)), "float32"),
        pre: T.Tensor((tokens, n), "float32"),
        halves: T.Tensor(before.cut.shape, before.cut.dtype),
    ):
        if schedule.halved:
            with dialect.kernel(before.cut.blocks, before.cut.rows, threads=THREADS) as (group, k):
                dialect.let_next_start(schedule.overlap)
                before.cut.fill(phi, halves, group, k)
        with dialect.kernel(before.groups(tokens), schedule.splits, threads=schedule.threads) as (group, split):
            start_after(dialect, schedule)
            before.project(
                x, halves if schedule.halved else phi, group, split, as_value(tokens), SplitSums(parts, split, outputs)
            )
        with dialect.kernel(T.ceildiv(tokens, schedule.lane_tokens), threads=lanes(problem)) as block:
            dialect.await_last(schedule.overlap)
            before.coefficients(alpha, bias, eps, pre, post, res, z, s, parts, block, as_value(tokens))
        with dialect.kernel(rows.blocks(tokens), threads=schedule.row_threads) as block:
            dialect.await_last(schedule.overlap)
            for turn in T.serial(rows.turns(block, tokens)):
                token = rows.token(block, turn)
                apply.aggregate(x, u, token, apply.gates(pre, token))

    return checked(pre_forward, chunk_tokens=schedule.chunk_tokens, overlap=schedule.overlap)


def step_forward(problem: Problem, schedule: ChainSchedule, dialect: Dialect) -> Any:
    """x'_ic = Σ_j res_ij x_jc + post_i f_c, then pre of x'."""
    n, width, fan_in, outputs = problem.streams, problem.width, problem.fan_in, problem.outputs
    stored, before = dialect.storage(problem.dtype), Before(problem, schedule, dialect)
    apply = Apply(problem, schedule.row_width, dialect, schedule.row_threads)
    mixed = merging(problem, ApplySchedule(schedule.row_width, schedule.row_threads), dialect)
    rows = Rows(schedule)
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
        halves: T.Tensor(before.cut.shape, before.cut.dtype),
    ):
        if schedule.halved:
            with dialect.kernel(before.cut.blocks, before.cut.rows, threads=THREADS) as (group, k):
                dialect.let_next_start(schedule.overlap)
                before.cut.fill(phi, halves, group, k)
        with dialect.kernel(rows.blocks(tokens), threads=schedule.row_threads) as block:
            start_after(dialect, schedule)
            for turn in T.serial(rows.turns(block, tokens)):
                token = rows.token(block, turn)
                mixed.merge(x, f, x_next, token, mixed.mixing(res, token), mixed.gates(post, token))
        with dialect.kernel(before.groups(tokens), schedule.splits, threads=schedule.threads) as (group, split):
            dialect.await_last(schedule.overlap)
            before.project(
                x_next,
                halves if schedule.halved else phi,
                group,
                split,
                as_value(tokens),
                SplitSums(parts, split, outputs),
            )
        with dialect.kernel(T.ceildiv(tokens, schedule.lane_tokens), threads=lanes(problem)) as block:
            dialect.await_last(schedule.overlap)
            before.coefficients(alpha, bias, eps, pre, post_next, res_next, z, s, parts, block, as_value(tokens))
        with dialect.kernel(rows.blocks(tokens), threads=schedule.row_threads) as block:
            dialect.await_last(schedule.overlap)
            for turn in T.serial(rows.turns(block, tokens)):
                token = rows.token(block, turn)
                apply.aggregate(x_next, u, token, apply.gates(pre, token))

    return checked(step_forward, chunk_tokens=schedule.chunk_tokens, overlap=schedule.overlap)


def pre_backward(problem: Problem, schedule: ChainSchedule, dialect: Dialect) -> Any:
    """dx̄ += dz·phi + 2 x̄ ds + pre·du, with dz and ds from du, dpost and dres; dphi, dalpha and dbias."""
    n, width, fan_in, outputs = problem.streams, problem.width, problem.fan_in, problem.outputs
    stored, after = dialect.storage(problem.dtype), After(problem, schedule, dialect)
    apply = Apply(problem, schedule.row_width, dialect, schedule.row_threads)
    rows = Rows(schedule)
    tokens, splits = T.dynamic("tokens"), T.dynamic("splits")

    @T.prim_func
    def pre_backward(
        x: T.Tensor((tokens, fan_in), stored),
        phi: T.Tensor((outputs, fan_in), "float32"),
        alpha: T.Tensor((3,), "float32"),
        bias: T.Tensor((outputs,), "float32"),
        z: T.Tensor((tokens, outputs), "float32"),
        s: T.Tensor((tokens,), "float32"),
        du: T.Tensor((tokens, width), stored),
        dpost: T.Tensor((tokens, n), "float32"),
        dres: T.Tensor((tokens, n, n), "float32"),
        eps: T.float32,
        dx: T.Tensor((tokens, fan_in), stored),
        dphi: T.Tensor((splits, outputs, fan_in), "float32"),
        dalpha: T.Tensor((splits, 3), "float32"),
        dbias: T.Tensor((splits, outputs), "float32"),
        dz: T.Tensor((tokens, outputs), "float32"),
        ds: T.Tensor((tokens,), "float32"),
        pre: T.Tensor((tokens, n), "float32"),
        dpre: T.Tensor((n, tokens), "float32"),
        alphas: T.Tensor((tokens, 3), "float32"),
        biases: T.Tensor((tokens, outputs), "float32"),
    ):
        with dialect.kernel(rows.blocks(tokens), threads=schedule.row_threads) as block:
            dialect.let_next_start(schedule.overlap)
            for turn in T.serial(rows.turns(block, tokens)):
                token = rows.token(block, turn)
                apply.weigh(x, du, token, dpre, token)
        with dialect.kernel(T.ceildiv(tokens, schedule.lane_tokens), threads=lanes(problem)) as block:
            dialect.await_last(schedule.overlap)
            grads, sums = (dpre, dpost, dres), (alphas, biases)
            after.coefficients(*grads, z, s, alpha, bias, eps, dz, ds, pre, *sums, block, as_value(tokens))
        with dialect.kernel(after.groups, splits, threads=schedule.threads) as (group, split):
            beside = (du, dx, pre)
            after.spread(x, phi, dz, ds, dx, dphi, group, split, as_value(tokens), as_value(splits), beside)
        with dialect.kernel(splits, threads=JOIN_THREADS) as split:
            dialect.await_last(schedule.overlap)
            after.join(alphas, biases, dalpha, dbias, split, as_value(tokens), as_value(splits))

    return after.planned(pre_backward)


def step_backward(problem: Problem, schedule: ChainSchedule, dialect: Dialect) -> Any:
    """x' again from x and f, and dpre;  in its place g = dx' + what pre's backward adds;  then merge's backward."""
    n, width, fan_in, outputs = problem.streams, problem.width, problem.fan_in, problem.outputs
    stored, after = dialect.storage(problem.dtype), After(problem, schedule, dialect)
    apply = Apply(problem, schedule.row_width, dialect, schedule.row_threads)
    walk = ApplySchedule(schedule.row_width, schedule.row_threads)
    mixed, grouped = merging(problem, walk, dialect), in_groups(problem, walk)
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
        near: T.Tensor((tokens, fan_in), stored),
        dz: T.Tensor((tokens, outputs), "float32"),
        ds: T.Tensor((tokens,), "float32"),
        pre: T.Tensor((tokens, n), "float32"),
        dpre: T.Tensor((n, tokens), "float32"),
        alphas: T.Tensor((tokens, 3), "float32"),
        biases: T.Tensor((tokens, outputs), "float32"),
    ):
        with dialect.kernel(rows.blocks(tokens), threads=schedule.row_threads) as block:
            dialect.let_next_start(schedule.overlap)
            for turn in T.serial(rows.turns(block, tokens)):
                token = rows.token(block, turn)
                if grouped:
                    mixed.merge(x, f, near, token, mixed.mixing(res, token), mixed.gates(post, token))
                    dialect.barrier()
                    apply.weigh(near, du, token, dpre, token)
                else:
                    gate = apply.gates(post, token)
                    apply.merge_and_weigh(x, f, du, near, token, apply.mixing(res, token), gate, dpre)
        with dialect.kernel(T.ceildiv(tokens, schedule.lane_tokens), threads=lanes(problem)) as block:
            dialect.await_last(schedule.overlap)
            grads, sums = (dpre, dpost_next, dres_next), (alphas, biases)
            after.coefficients(*grads, z, s, alpha, bias, eps, dz, ds, pre, *sums, block, as_value(tokens))
        with dialect.kernel(after.groups, splits, threads=schedule.threads) as (group, split):
            beside = (du, dx_next, pre)
            after.spread(near, phi, dz, ds, near, dphi, group, split, as_value(tokens), as_value(splits), beside)
        with dialect.kernel(rows.blocks(tokens), threads=schedule.row_threads) as block:
            dialect.await_last(schedule.overlap)
            for turn in T.serial(rows.turns(block, tokens)):
                token = rows.token(block, turn)
                weights = (mixed.mixing(res, token), mixed.gates(post, token))
                mixed.merge_back(x, f, near, dx, df, dres, dpost, token, *weights)
        with dialect.kernel(splits, threads=JOIN_THREADS) as split:
            dialect.await_last(schedule.overlap)
            after.join(alphas, biases, dalpha, dbias, split, as_value(tokens), as_value(splits))

    return after.planned(step_backward)
