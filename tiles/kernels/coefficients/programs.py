"""coefficients and Sinkhorn as TileLang programs (docs/design.md, "The maths"): macros between loads and stores."""

from typing import Any

import tilelang.language as T

from tiles.kernels.coefficients.gates import Backward, Forward
from tiles.kernels.coefficients.schedule import CoefficientsSchedule
from tiles.kernels.coefficients.sinkhorn import Sinkhorn
from tiles.kernels.spec import Problem
from tiles.lang.dialect import Dialect
from tiles.lang.values import as_value, bind, token_range


def sinkhorn_forward(problem: Problem, schedule: CoefficientsSchedule, dialect: Dialect) -> Any:
    """res = SK(logits)."""
    n, block, each = problem.streams, schedule.block_tokens, dialect.each
    rounds = Sinkhorn(problem, block, dialect)
    tokens = T.dynamic("tokens")

    @T.prim_func
    def sinkhorn_forward(
        logits: T.Tensor((tokens, n, n), "float32"),
        res: T.Tensor((tokens, n, n), "float32"),
    ):
        with dialect.kernel(T.ceildiv(tokens, block), threads=block) as start:
            work, matrix, column = dialect.own(n, n, block), dialect.own(n, n, block), dialect.own(n, block)
            for i in each(n):
                for j in each(n):
                    for lane in dialect.own_lanes(block):
                        work[i, j, lane] = logits[T.min(start * block + lane, tokens - 1), i, j]
            rounds.forward(work, matrix, column, None)
            for i in each(n):
                for j in each(n):
                    for lane in dialect.own_lanes(block):
                        res[T.min(start * block + lane, tokens - 1), i, j] = matrix[i, j, lane]

    return sinkhorn_forward


def sinkhorn_backward(problem: Problem, schedule: CoefficientsSchedule, dialect: Dialect) -> Any:
    """dlogits = SKᵀ(dres)."""
    n, block, each = problem.streams, schedule.block_tokens, dialect.each
    rounds = Sinkhorn(problem, block, dialect)
    tokens = T.dynamic("tokens")

    @T.prim_func
    def sinkhorn_backward(
        logits: T.Tensor((tokens, n, n), "float32"),
        dres: T.Tensor((tokens, n, n), "float32"),
        dlogits: T.Tensor((tokens, n, n), "float32"),
    ):
        with dialect.kernel(T.ceildiv(tokens, block), threads=block) as start:
            work, matrix = dialect.scratch(n, n, block), dialect.own(n, n, block)
            grad, column = dialect.own(n, n, block), dialect.own(n, block)
            kept = dialect.scratch(max(1, problem.rounds - 1), 2 * n, block)
            for i in each(n):
                for j in each(n):
                    for lane in dialect.own_lanes(block):
                        work[i, j, lane] = logits[T.min(start * block + lane, tokens - 1), i, j]
                        grad[i, j, lane] = dres[T.min(start * block + lane, tokens - 1), i, j]
            rounds.forward(work, matrix, column, kept)
            rounds.backward(work, matrix, column, kept, grad)
            for i in each(n):
                for j in each(n):
                    for lane in dialect.own_lanes(block):
                        dlogits[T.min(start * block + lane, tokens - 1), i, j] = grad[i, j, lane]

    return sinkhorn_backward


def forward(problem: Problem, schedule: CoefficientsSchedule, dialect: Dialect) -> Any:
    """h = alpha∘z·r + bias;  pre = σ(h_pre);  post = 2σ(h_post);  res = SK(h_res);  r = rsqrt(s/K + eps)."""
    n, block, outputs = problem.streams, schedule.block_tokens, problem.outputs
    coefficients = Forward(problem, block, dialect)
    tokens = T.dynamic("tokens")

    @T.prim_func
    def coefficients_forward(
        z: T.Tensor((tokens, outputs), "float32"),
        s: T.Tensor((tokens,), "float32"),
        alpha: T.Tensor((3,), "float32"),
        bias: T.Tensor((outputs,), "float32"),
        eps: T.float32,
        pre: T.Tensor((tokens, n), "float32"),
        post: T.Tensor((tokens, n), "float32"),
        res: T.Tensor((tokens, n, n), "float32"),
    ):
        with dialect.kernel(T.ceildiv(tokens, block), threads=block) as step:
            held = coefficients.scratch()
            start, last = bind(step * block), as_value(tokens)
            coefficients.run(held, z, s, alpha, bias, eps, start, last)
            coefficients.store(held, pre, post, res, start, last)

    return coefficients_forward


def backward(problem: Problem, schedule: CoefficientsSchedule, dialect: Dialect) -> Any:
    """dh from dpre, dpost and dres;  dz = alpha∘dh·r;  ds = -½ r² Σ_k alpha dh_k z_k r / K;
    dalpha_g = Σ_t Σ_{k∈g} dh_k z_k r and dbias = Σ_t dh, one partial sum per split of the tokens."""
    n, block, outputs, each = problem.streams, schedule.block_tokens, problem.outputs, dialect.each
    coefficients = Backward(problem, block, dialect)
    tokens, splits = T.dynamic("tokens"), T.dynamic("splits")

    @T.prim_func
    def coefficients_backward(
        z: T.Tensor((tokens, outputs), "float32"),
        s: T.Tensor((tokens,), "float32"),
        alpha: T.Tensor((3,), "float32"),
        bias: T.Tensor((outputs,), "float32"),
        dpre: T.Tensor((tokens, n), "float32"),
        dpost: T.Tensor((tokens, n), "float32"),
        dres: T.Tensor((tokens, n, n), "float32"),
        eps: T.float32,
        dz: T.Tensor((tokens, outputs), "float32"),
        ds: T.Tensor((tokens,), "float32"),
        dalpha: T.Tensor((splits, 3), "float32"),
        dbias: T.Tensor((splits, outputs), "float32"),
    ):
        with dialect.kernel(splits, threads=block) as split:
            held = coefficients.scratch()
            coefficients.clear(held)
            first, last, blocks = token_range(tokens, split, splits, block)
            for step in T.serial(blocks[0]):
                start = bind(first[0] + step * block)
                for i in each(n):
                    for lane in dialect.own_lanes(block):
                        held.dpre[i, lane] = dpre[T.min(start + lane, last[0] - 1), i]
                        held.dpost[i, lane] = dpost[T.min(start + lane, last[0] - 1), i]
                    for j in each(n):
                        for lane in dialect.own_lanes(block):
                            held.dres[i, j, lane] = dres[T.min(start + lane, last[0] - 1), i, j]
                coefficients.run(held, z, s, alpha, bias, eps, start, last[0])
                coefficients.store_logits(held, dz, ds, start, last[0])
            coefficients.store(held, dalpha, dbias, split)

    return coefficients_backward
