"""coefficients and sinkhorn as TileLang programs (docs/design.md, the maths): loads and stores around their macros."""

from typing import Any

import tilelang.language as T

from tiles.kernels.coefficients.gates import Backward, Forward
from tiles.kernels.coefficients.schedule import CoefficientsSchedule
from tiles.kernels.coefficients.signature import arguments, sinkhorn_arguments
from tiles.kernels.coefficients.sinkhorn import Sinkhorn
from tiles.kernels.spec import Problem
from tiles.lang.dialect import Dialect
from tiles.lang.program import program
from tiles.lang.values import Buffer, Expr, as_value, bind, token_range

MOST_SPLITS = 256
"""Thread blocks that share the tokens on CUDA, one block of tokens each while there are no more than that: a warp goes
through the rounds of a block step by step, and few of them leave multiprocessors idle."""


def sinkhorn_forward(problem: Problem, schedule: CoefficientsSchedule, dialect: Dialect) -> Any:
    """res = SK(logits)."""
    n, block = problem.streams, schedule.block_tokens
    rounds, matrices = Sinkhorn(problem, block, dialect), _Matrices(problem, block, dialect)

    @program(sinkhorn_arguments(problem), dialect)
    def sinkhorn_forward(p: Any) -> None:
        with dialect.kernel(T.ceildiv(p.tokens, block), threads=block) as start:
            work, matrix = dialect.per_thread(n, n, block), dialect.per_thread(n, n, block)
            column = dialect.per_thread(n, block)
            matrices.load(p.logits, work, start, as_value(p.tokens))
            rounds.forward(work, matrix, column, None, p)
            matrices.store(matrix, p.res, start, as_value(p.tokens))

    return sinkhorn_forward


def sinkhorn_backward(problem: Problem, schedule: CoefficientsSchedule, dialect: Dialect) -> Any:
    """dlogits = SKᵀ(dres)."""
    n, block = problem.streams, schedule.block_tokens
    rounds, matrices = Sinkhorn(problem, block, dialect), _Matrices(problem, block, dialect)

    @program(sinkhorn_arguments(problem), dialect)
    def sinkhorn_backward(p: Any) -> None:
        with dialect.kernel(T.ceildiv(p.tokens, block), threads=block) as start:
            work, matrix = dialect.scratch(n, n, block), dialect.per_thread(n, n, block)
            grad, column = dialect.per_thread(n, n, block), dialect.per_thread(n, block)
            kept = dialect.scratch(max(1, problem.rounds - 1), 2 * n, block)
            matrices.load(p.logits, work, start, as_value(p.tokens))
            matrices.load(p.dres, grad, start, as_value(p.tokens))
            rounds.forward(work, matrix, column, kept, p)
            rounds.backward(work, matrix, column, kept, grad, p)
            matrices.store(grad, p.dlogits, start, as_value(p.tokens))

    return sinkhorn_backward


class _Matrices:
    """The macros that move matrices [T, n, n] of a block of tokens to storage [n, n, tokens] and back."""

    def __init__(self, problem: Problem, block: int, dialect: Dialect) -> None:
        n, unrolled = problem.streams, dialect.unrolled

        @T.macro
        def load(tensor: Buffer, into: Any, start: Expr, last: Expr) -> None:
            for i in unrolled(n):
                for j in unrolled(n):
                    for thread in dialect.thread_loop(block):
                        into[i, j, thread] = tensor[T.min(start * block + thread, last - 1), i, j]

        @T.macro
        def store(of: Any, tensor: Buffer, start: Expr, last: Expr) -> None:
            for i in unrolled(n):
                for j in unrolled(n):
                    for thread in dialect.thread_loop(block):
                        tensor[T.min(start * block + thread, last - 1), i, j] = of[i, j, thread]

        self.load, self.store = load, store


def forward(problem: Problem, schedule: CoefficientsSchedule, dialect: Dialect) -> Any:
    """h = alpha∘z·r + bias;  r = rsqrt(s/K + eps);  pre = σ(h_pre) + hc_eps;  post = post_scale σ(h_post);
    res = SK(h_res)."""
    block, coefficients = schedule.block_tokens, Forward(problem, schedule.block_tokens, dialect)

    @program(arguments(problem), dialect)
    def coefficients_forward(p: Any) -> None:
        with dialect.kernel(T.ceildiv(p.tokens, block), threads=block) as step:
            held = coefficients.scratch()
            start, last = bind(step * block), as_value(p.tokens)
            coefficients.run(held, p.z, p.s, p, start, last)
            coefficients.store(held, p, p.pre, start, last)

    return coefficients_forward


def backward(problem: Problem, schedule: CoefficientsSchedule, dialect: Dialect) -> Any:
    """dh from dpre, dpost and dres;  dz = alpha∘dh·r;  ds = -½ r² Σ_k alpha dh_k z_k r / K;
    dalpha_g = Σ_t Σ_{k∈g} dh_k z_k r and dbias = Σ_t dh, one partial sum per split of the tokens."""
    n, block, unrolled = problem.streams, schedule.block_tokens, dialect.unrolled
    coefficients = Backward(problem, block, dialect)

    @program(arguments(problem), dialect, most_splits=MOST_SPLITS, split_tokens=block)
    def coefficients_backward(p: Any) -> None:
        with dialect.kernel(p.splits, threads=block) as split:
            held = coefficients.scratch()
            coefficients.clear(held)
            first, last, blocks = token_range(p.tokens, split, p.splits, block)
            for step in T.serial(blocks[0]):
                start = bind(first[0] + step * block)
                for i in unrolled(n):
                    for thread in dialect.thread_loop(block):
                        held.dpre[i, thread] = p.dpre[T.min(start + thread, last[0] - 1), i]
                        held.dpost[i, thread] = p.dpost[T.min(start + thread, last[0] - 1), i]
                    for j in unrolled(n):
                        for thread in dialect.thread_loop(block):
                            held.dres[i, j, thread] = p.dres[T.min(start + thread, last[0] - 1), i, j]
                coefficients.run(held, p.z, p.s, p, start, last[0])
                coefficients.store_logits(held, p.dz, p.ds, start, last[0])
            coefficients.store(held, p.dalpha, p.dbias, split)

    return coefficients_backward
