"""pre and step as TileLang programs: the macros of project, coefficients and apply, a block of tokens after another.
Here are those for a CPU; `chain_programs` and `merged_programs` have those for CUDA.

The streams of a block are read from memory once and stay in the caches until all steps are done with them. Nothing is
kept on the side for that: what a later step needs again it reads from the tensors. Streams are flattened, x [T, nC]:
stream i of a token begins at column i·C.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import tilelang.language as T

from tiles.kernels.apply.aggregate import Aggregate
from tiles.kernels.apply.merge import Merge
from tiles.kernels.coefficients import gates
from tiles.kernels.fused import chain_programs, merged_programs, signature
from tiles.kernels.fused.chain_schedule import ChainSchedule
from tiles.kernels.fused.norm import Norm, NormScratch
from tiles.kernels.fused.schedule import FusedSchedule, Schedule
from tiles.kernels.limits import token_lanes
from tiles.kernels.project.programs import gradients, projection
from tiles.kernels.spec import Problem
from tiles.lang.dialect import Cpu, Cuda, Dialect, View
from tiles.lang.epilogue import Others
from tiles.lang.program import program
from tiles.lang.streams import Streams, stream_dots
from tiles.lang.values import Buffer, Expr, as_value, bind, token_range, variable


def pre_forward(problem: Problem, schedule: Schedule, dialect: Dialect) -> Any:
    """z, s from x;  pre, post, res from z, s;  u_c = Σ_i pre_i x_ic."""
    if isinstance(schedule, ChainSchedule):
        assert isinstance(dialect, Cuda)
        return chain_programs.pre_forward(problem, schedule, dialect)
    assert isinstance(dialect, Cpu)
    block, before = schedule.block_tokens, _Forward(problem, schedule, dialect, lambda p: (p.x,), 0)

    @program(signature.pre(problem), dialect)
    def pre_forward(p: Any) -> None:
        with dialect.kernel(T.ceildiv(p.tokens, block), threads=schedule.threads) as step:
            start, last = variable(step * block), as_value(p.tokens)
            count = variable(T.min(block, last - start))
            before.run(p, start, last, count)

    return pre_forward


def step_forward(problem: Problem, schedule: Schedule, dialect: Dialect) -> Any:
    """x'_ic = Σ_j res_ij x_jc + post_i f_c, then pre of x'."""
    if isinstance(schedule, ChainSchedule):
        assert isinstance(dialect, Cuda)
        return (merged_programs if schedule.merged else chain_programs).step_forward(problem, schedule, dialect)
    assert isinstance(dialect, Cpu)
    block = schedule.block_tokens
    before = _Forward(problem, schedule, dialect, lambda p: (p.x, p.f), block)
    mixed = Merge(problem, schedule.row_width, dialect, prefetched=True)

    @program(signature.step(problem), dialect)
    def step_forward(p: Any) -> None:
        with dialect.kernel(T.ceildiv(p.tokens, block), threads=schedule.threads) as step:
            start, last = variable(step * block), as_value(p.tokens)
            count = variable(T.min(block, last - start))
            for t in T.serial(count):
                token = variable(start + t)
                mixed.merge(p.x, p.f, p.x_next, token, mixed.weights(p, token))
            before.run(p.renamed(x="x_next", **signature.next_maps(problem)), start, last, count)

    return step_forward


def pre_backward(problem: Problem, schedule: Schedule, dialect: Dialect) -> Any:
    """dx̄ (+)= dz·phi + 2 x̄ ds + pre·du, with dz and ds from du, dpost and dres; dphi, dalpha and dbias."""
    if isinstance(schedule, ChainSchedule):
        assert isinstance(dialect, Cuda)
        return chain_programs.pre_backward(problem, schedule, dialect)
    assert isinstance(dialect, Cpu)
    after = _Backward(problem, schedule, dialect)

    @program(signature.pre(problem), dialect)
    def pre_backward(p: Any) -> None:
        with dialect.kernel(p.splits, threads=schedule.threads) as split:
            held = after.coefficients.scratch()
            after.clear(held, p, split)
            normed = after.scratch()
            first, last, blocks = token_range(p.tokens, split, p.splits, schedule.block_tokens)
            for step in T.serial(blocks[0]):
                start = variable(first[0] + step * schedule.block_tokens)
                count = variable(T.min(schedule.block_tokens, last[0] - start))
                after.logits(held, normed, p, start, count)
                after.dx_dphi(held, normed, p, More(p.dx, p.dx_is_given), split, start, last[0], count)
            after.coefficients.store(held, p.dalpha, p.dbias, split)

    return pre_backward


def step_backward(problem: Problem, schedule: Schedule, dialect: Dialect) -> Any:
    """g = dx' + pre'·du' + dz'·phi' + 2x'·ds', then the backward of merge with g; x' is rebuilt from x and f.

    Both x' and g lie in the rows of dx until dx itself is written: they are in the caches, and no memory is set aside
    for them.
    """
    if isinstance(schedule, ChainSchedule):
        assert isinstance(dialect, Cuda)
        return (merged_programs if schedule.merged else chain_programs).step_backward(problem, schedule, dialect)
    assert isinstance(dialect, Cpu)
    after, mixed = _Backward(problem, schedule, dialect), Merge(problem, schedule.row_width, dialect)

    @program(signature.step(problem), dialect)
    def step_backward(p: Any) -> None:
        with dialect.kernel(p.splits, threads=schedule.threads) as split:
            held = after.coefficients.scratch()
            after.clear(held, p, split)
            normed = after.scratch()
            first, last, blocks = token_range(p.tokens, split, p.splits, schedule.block_tokens)
            of_x_next = p.renamed(x="dx", **signature.next_maps(problem, "d"))
            for step in T.serial(blocks[0]):
                start = variable(first[0] + step * schedule.block_tokens)
                count = variable(T.min(schedule.block_tokens, last[0] - start))
                for t in T.serial(count):
                    token = variable(start + t)
                    mixed.merge(p.x, p.f, p.dx, token, mixed.weights(p, token))
                after.logits(held, normed, of_x_next, start, count)
                after.dx_dphi(held, normed, of_x_next, More(p.dx_next, T.float32(1)), split, start, last[0], count)
                for t in T.serial(count):
                    token = variable(start + t)
                    mixed.merge_back(p.renamed(g="dx"), token, mixed.weights(p, token))
            after.coefficients.store(held, p.dalpha, p.dbias, split)

    return step_backward


class More(NamedTuple):
    """The gradient that streams get from elsewhere, and whether there is one: 1 or 0."""

    grads: Buffer
    is_given: Expr


class _Forward:
    """The macro for a block of tokens before a sublayer: project, coefficients, aggregate."""

    def __init__(
        self, problem: Problem, schedule: FusedSchedule, dialect: Cpu, soon: Callable[[Any], Any], ahead: int
    ) -> None:
        """See `projection` for `soon` and `ahead`; 0 is the next register block."""
        project = projection(problem, schedule, dialect, soon, ahead or schedule.register_tokens)
        coefficients = gates.Forward(problem, token_lanes(schedule.block_tokens), dialect)
        apply = Aggregate(problem, schedule.row_width, dialect)
        norm, rows = Norm(problem, schedule.row_width, dialect), schedule.register_tokens

        @T.macro
        def run(p: Any, start: Expr, last: Expr, count: Expr) -> None:
            held = coefficients.scratch()
            for r in T.serial(T.ceildiv(count, rows)):
                project(p, start + r * rows, last)
            coefficients.run(held, p.z, p.s, p, start, start + count)
            coefficients.store(held, p, None, start, start + count)
            if problem.normalises:
                norm.aggregate(p, held.pre, start, count)
            else:
                for t in T.serial(count):
                    pre = [bind(held.pre[i, t]) for i in apply.streams]
                    apply.aggregate(p.x, p.u, start + t, pre)

        self.run = run


class _Backward:
    """The macros for a block of tokens on the way back from a sublayer's input to the streams and the parameters."""

    def __init__(self, problem: Problem, schedule: FusedSchedule, dialect: Cpu) -> None:
        n, width, block, outputs = problem.streams, problem.width, schedule.block_tokens, problem.outputs
        lanes = token_lanes(block)
        coefficients = gates.Backward(problem, lanes, dialect)
        dx_dphi_tile = gradients(problem, schedule, dialect)
        norm = Norm(problem, schedule.block_width, dialect)

        @T.macro
        def clear(held: Any, p: Any, split: Expr) -> None:
            coefficients.clear(held)
            for k in T.serial(outputs):
                for index in dialect.parallel(problem.fan_in):
                    p.dphi[split, k, index] = T.float32(0)
            if problem.normalises:
                for index in dialect.parallel(width):
                    p.dnorm_weight[split, index] = T.float32(0)

        @T.macro
        def logits(held: Any, normed: Any, p: Any, start: Expr, count: Expr) -> None:
            """dz and ds of the block, and its part of the sums for dalpha and dbias."""
            for i in T.serial(n):
                for index in dialect.parallel(lanes):
                    held.dpre[i, index] = T.float32(0)  # what is past the last token is not written below
                    held.dpost[i, index] = p.dpost[start + T.min(index, count - 1), i]
            if problem.mixes:
                for i, j in T.grid(n, n):
                    for index in dialect.parallel(lanes):
                        held.dres[i, j, index] = p.dres[start + T.min(index, count - 1), i, j]
            coefficients.gates(held.forward, p.z, p.s, p, start, start + count)
            if problem.normalises:
                norm.dots(p, normed, start, count, held.forward.pre, held.dpre)
            else:
                x, du = View(p.x, (start, 0), (0, 1)), View(p.du, (start, 0), (0, 1))
                stream_dots(held.dpre, Streams(x, n, problem.dtype), du, count)
            coefficients.run_after_gates(held, p.z, p, start, start + count)

        def others(
            held: Any, u: Buffer, more: More, i: Expr, column: Expr, in_block: bool, t: Expr, token: Expr
        ) -> Others:
            """pre_i times the gradient of u, whose rows are tokens, or those of the block; and `more`."""
            of_u = View(u, (t, 0) if in_block else (token, column), (0, 1))
            gate = View(held.forward.pre, (i, t), (0, 1))
            return Others(of_u, gate, View(more.grads, (token, i * width + column), (0, 1)), more.is_given)

        @T.macro
        def dx_dphi(
            held: Any, normed: Any, p: Any, more: More, split: Expr, start: Expr, last: Expr, count: Expr
        ) -> None:
            """dx = dz·phi + 2 x ds + pre·du + more, and the block's part of dphi."""
            if problem.normalises:
                for part in T.serial(width // schedule.block_width):
                    column = bind(part * schedule.block_width)
                    norm.gradients(p, normed, split, start, column, count, held.forward.pre)
                    for i in T.serial(n):
                        extra = partial(others, held, normed.of_u, more, i, column, True)
                        dx_dphi_tile(p, held.dz, held.ds, split, start, last, i * width + column, extra, (more.grads,))
            else:
                for i in T.serial(n):
                    for part in T.serial(width // schedule.block_width):
                        column = bind(part * schedule.block_width)
                        extra = partial(others, held, p.du, more, i, column, False)
                        dx_dphi_tile(p, held.dz, held.ds, split, start, last, i * width + column, extra, (more.grads,))

        def scratch() -> NormScratch | None:
            """What a norm keeps; call it inside the kernel."""
            return norm.scratch(block, schedule.block_width) if problem.normalises else None

        self.coefficients, self.clear, self.logits, self.dx_dphi = coefficients, clear, logits, dx_dphi
        self.scratch = scratch
