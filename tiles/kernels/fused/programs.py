"""pre and step as TileLang programs: the macros of project, coefficients and apply, a block of tokens after another.
Here are those for a CPU; `chain_programs` has those for CUDA.

The streams of a block are read from memory once and stay near in the caches until all steps are done with them.
Nothing is kept on the side for that: what a later step needs again it reads from the tensors. Streams are flattened,
x [T, nC]: stream i of a token begins at column i·C.
"""

from functools import partial
from typing import Any

import tilelang.language as T

from tiles.kernels.apply.programs import Apply
from tiles.kernels.coefficients import gates
from tiles.kernels.fused import chain_programs, merged_programs
from tiles.kernels.fused.chain_schedule import ChainSchedule
from tiles.kernels.fused.schedule import FusedSchedule, Schedule
from tiles.kernels.project.programs import gradients, projection
from tiles.kernels.spec import Problem
from tiles.lang.dialect import Cpu, Dialect
from tiles.lang.values import Buffer, Expr, as_value, bind, token_range, variable


def pre_forward(problem: Problem, schedule: Schedule, dialect: Dialect) -> Any:
    """z, s from x;  pre, post, res from z, s;  u_c = Σ_i pre_i x_ic."""
    if isinstance(schedule, ChainSchedule):
        return chain_programs.pre_forward(problem, schedule, dialect)
    assert isinstance(dialect, Cpu)
    n, width, fan_in, outputs = problem.streams, problem.width, problem.fan_in, problem.outputs
    block, stored = schedule.block_tokens, dialect.storage(problem.dtype)
    before = _Before(problem, schedule, dialect)
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
    ):
        with dialect.kernel(T.ceildiv(tokens, block), threads=schedule.threads) as step:
            start, last = variable(step * block), as_value(tokens)
            count = variable(T.min(block, last - start))
            before.run(x, phi, alpha, bias, eps, u, post, res, z, s, start, last, count)

    return pre_forward


def step_forward(problem: Problem, schedule: Schedule, dialect: Dialect) -> Any:
    """x'_ic = Σ_j res_ij x_jc + post_i f_c, then pre of x'."""
    if isinstance(schedule, ChainSchedule):
        made = merged_programs if schedule.merged else chain_programs
        return made.step_forward(problem, schedule, dialect)
    assert isinstance(dialect, Cpu)
    n, width, fan_in, outputs = problem.streams, problem.width, problem.fan_in, problem.outputs
    block, stored = schedule.block_tokens, dialect.storage(problem.dtype)
    apply, before = Apply(problem, schedule.row_width, dialect), _Before(problem, schedule, dialect)
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
    ):
        with dialect.kernel(T.ceildiv(tokens, block), threads=schedule.threads) as step:
            start, last = variable(step * block), as_value(tokens)
            count = variable(T.min(block, last - start))
            for t in T.serial(count):
                token = variable(start + t)
                apply.merge(x, f, x_next, token, apply.mixing(res, token), apply.gates(post, token))
            before.run(x_next, phi, alpha, bias, eps, u, post_next, res_next, z, s, start, last, count)

    return step_forward


def pre_backward(problem: Problem, schedule: Schedule, dialect: Dialect) -> Any:
    """dx̄ += dz·phi + 2 x̄ ds + pre·du, with dz and ds from du, dpost and dres; dphi, dalpha and dbias."""
    if isinstance(schedule, ChainSchedule):
        return chain_programs.pre_backward(problem, schedule, dialect)
    assert isinstance(dialect, Cpu)
    n, width, fan_in, outputs = problem.streams, problem.width, problem.fan_in, problem.outputs
    stored, after = dialect.storage(problem.dtype), _After(problem, schedule, dialect)
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
    ):
        with dialect.kernel(splits, threads=schedule.threads) as split:
            held = after.coefficients.scratch()
            after.clear(held, dphi, split)
            first, last, blocks = token_range(tokens, split, splits, schedule.block_tokens)
            for step in T.serial(blocks[0]):
                start = variable(first[0] + step * schedule.block_tokens)
                count = variable(T.min(schedule.block_tokens, last[0] - start))
                after.logits(held, x, du, dpost, dres, z, s, alpha, bias, eps, start, last[0], count)
                after.spread(held, x, phi, du, dx, dx, dphi, split, start, last[0])
            after.coefficients.store(held, dalpha, dbias, split)

    return pre_backward


def step_backward(problem: Problem, schedule: Schedule, dialect: Dialect) -> Any:
    """g = dx' + pre'·du' + dz'·phi' + 2x'·ds', then the backward of merge with g; x' is rebuilt from x and f.

    Both x' and g lie in the rows of dx until dx itself is written: they are near, and no memory is set aside for them.
    """
    if isinstance(schedule, ChainSchedule):
        made = merged_programs if schedule.merged else chain_programs
        return made.step_backward(problem, schedule, dialect)
    assert isinstance(dialect, Cpu)
    n, width, fan_in, outputs = problem.streams, problem.width, problem.fan_in, problem.outputs
    stored, after = dialect.storage(problem.dtype), _After(problem, schedule, dialect)
    apply = Apply(problem, schedule.row_width, dialect)
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
    ):
        with dialect.kernel(splits, threads=schedule.threads) as split:
            held = after.coefficients.scratch()
            after.clear(held, dphi, split)
            first, last, blocks = token_range(tokens, split, splits, schedule.block_tokens)
            for step in T.serial(blocks[0]):
                start = variable(first[0] + step * schedule.block_tokens)
                count = variable(T.min(schedule.block_tokens, last[0] - start))
                for t in T.serial(count):
                    token = variable(start + t)
                    apply.merge(x, f, dx, token, apply.mixing(res, token), apply.gates(post, token))
                after.logits(held, dx, du, dpost_next, dres_next, z, s, alpha, bias, eps, start, last[0], count)
                after.spread(held, dx, phi, du, dx_next, dx, dphi, split, start, last[0])
                for t in T.serial(count):
                    token = variable(start + t)
                    mix, gate = apply.mixing(res, token), apply.gates(post, token)
                    apply.merge_back(x, f, dx, dx, df, dres, dpost, token, mix, gate)
            after.coefficients.store(held, dalpha, dbias, split)

    return step_backward


class _Before:
    """The macro for a block of tokens before a sublayer: project, coefficients, aggregate."""

    def __init__(self, problem: Problem, schedule: FusedSchedule, dialect: Cpu) -> None:
        project = projection(problem, schedule, dialect)
        coefficients = gates.Forward(problem, schedule.block_tokens, dialect)
        apply = Apply(problem, schedule.row_width, dialect)
        rows = schedule.register_tokens

        @T.macro
        def run(
            x: Buffer,
            phi: Buffer,
            alpha: Buffer,
            bias: Buffer,
            eps: Expr,
            u: Buffer,
            post: Buffer,
            res: Buffer,
            z: Buffer,
            s: Buffer,
            start: Expr,
            last: Expr,
            count: Expr,
        ) -> None:
            held = coefficients.scratch()
            for r in T.serial(T.ceildiv(count, rows)):
                project(x, phi, z, s, start + r * rows, last)
            coefficients.run(held, z, s, alpha, bias, eps, start, last)
            coefficients.store(held, None, post, res, start, last)
            for t in T.serial(count):
                apply.aggregate(x, u, start + t, [bind(held.pre[i, t]) for i in apply.streams])

        self.run = run


class _After:
    """The macros for a block of tokens on the way back from a sublayer's input to the streams and the parameters."""

    def __init__(self, problem: Problem, schedule: FusedSchedule, dialect: Cpu) -> None:
        n, width, block, outputs = problem.streams, problem.width, schedule.block_tokens, problem.outputs
        coefficients = gates.Backward(problem, block, dialect)
        apply, spread_block = Apply(problem, schedule.row_width, dialect), gradients(problem, schedule, dialect)

        @T.macro
        def clear(held: Any, dphi: Buffer, split: Expr) -> None:
            coefficients.clear(held)
            for k in T.serial(outputs):
                for lane in dialect.lanes(problem.fan_in):
                    dphi[split, k, lane] = T.float32(0)

        @T.macro
        def logits(
            held: Any,
            x: Buffer,
            du: Buffer,
            dpost: Buffer,
            dres: Buffer,
            z: Buffer,
            s: Buffer,
            alpha: Buffer,
            bias: Buffer,
            eps: Expr,
            start: Expr,
            last: Expr,
            count: Expr,
        ) -> None:
            """dz and ds of the block, and its part of the sums for dalpha and dbias."""
            for i in T.serial(n):
                for lane in dialect.lanes(block):
                    held.dpre[i, lane] = T.float32(0)  # lanes past the last token are not written below
                    held.dpost[i, lane] = dpost[T.min(start + lane, last - 1), i]
            for i, j in T.grid(n, n):
                for lane in dialect.lanes(block):
                    held.dres[i, j, lane] = dres[T.min(start + lane, last - 1), i, j]
            for t in T.serial(count):
                apply.weigh(x, du, start + t, held.dpre, t)
            coefficients.run(held, z, s, alpha, bias, eps, start, last)

        def merged(
            held: Any, du: Buffer, more: Buffer, i: Expr, column: Expr, t: Expr, token: Expr, lane: Expr
        ) -> Expr:
            """pre_i du_c, and the gradient that x gets from elsewhere."""
            of_u = dialect.load(du[token, column + lane], problem.dtype)
            return held.forward.pre[i, t] * of_u + dialect.load(more[token, i * width + column + lane], problem.dtype)

        @T.macro
        def spread(
            held: Any,
            x: Buffer,
            phi: Buffer,
            du: Buffer,
            more: Buffer,
            dx: Buffer,
            dphi: Buffer,
            split: Expr,
            start: Expr,
            last: Expr,
        ) -> None:
            """dx = dz·phi + 2 x ds + pre·du + more, and the block's part of dphi."""
            for i in T.serial(n):
                for part in T.serial(width // schedule.block_width):
                    column = bind(part * schedule.block_width)
                    spread_block(
                        x,
                        phi,
                        dx,
                        dphi,
                        held.dz,
                        held.ds,
                        split,
                        start,
                        last,
                        i * width + column,
                        partial(merged, held, du, more, i, column),
                        (more,),
                    )

        self.coefficients, self.clear, self.logits, self.spread = coefficients, clear, logits, spread
