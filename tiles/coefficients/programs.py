"""coefficients and Sinkhorn as TileLang programs (DESIGN, the maths).

A lane is a token: every lane loop does one step of the maths for a block of tokens at once, on matrices stored
[n, n, tokens]. Lanes past the last token repeat it, so that every lane computes the same thing; sums leave them out.

Sinkhorn's first round is evaluated as exp(h_ij - colmax_j - rowmax_i) / (column sum) / (row sum), where colmax and
rowmax leave a one in every row and column: no sum can vanish, whatever the logits. After that round every row and
column sum lies in [1/n², n], so the other rounds are plain divisions. The backward works on the gradient of log M,
which needs M after each half round only; it gets them back from the last one by multiplying with the sums it kept.
"""

from typing import Any

import tilelang.language as T

from tiles.coefficients.schedule import CoefficientsSchedule
from tiles.dialect import Dialect, bind, token_range
from tiles.family import Problem

LOWEST = -1e38  # keeps a difference of two finite logits finite


class Sinkhorn:
    """The rounds on blocks of matrices; `logits` and `matrix` are scratch [n, n, tokens]."""

    def __init__(self, problem: Problem, schedule: CoefficientsSchedule, dialect: Dialect) -> None:
        n, rounds, block = problem.streams, problem.rounds, schedule.block_tokens
        streams = tuple(range(n))

        @T.macro
        def column_start(logits: Any, column: Any) -> None:
            """logits -> log of the first column step's numerators (at most 0); column[j] its sums, in [1, n]."""
            for j in T.serial(n):
                for lane in dialect.lanes(block):
                    values = [bind(logits[i, j, lane]) for i in streams]
                    top = bind(_maximum(values))
                    shifted = [bind(T.max(value - top, T.float32(LOWEST))) for value in values]
                    for i in streams:
                        logits[i, j, lane] = shifted[i]
                    column[j, lane] = sum(dialect.exp(value) for value in shifted)

        @T.macro
        def row_start(logits: Any, column: Any, matrix: Any) -> None:
            """The matrix after the first round."""
            for i in T.serial(n):
                for lane in dialect.lanes(block):
                    values = [bind(logits[i, j, lane]) for j in streams]
                    top = bind(_maximum(values))
                    row = [bind(dialect.exp(values[j] - top) / column[j, lane]) for j in streams]
                    inverse = bind(T.float32(1) / sum(row))
                    for j in streams:
                        matrix[i, j, lane] = row[j] * inverse

        @T.macro
        def round_(matrix: Any, kept: Any, step: Any) -> None:
            """One round, columns then rows; `kept` [rounds, 2n, tokens] takes the sums where it is given."""
            for j in T.serial(n):
                for lane in dialect.lanes(block):
                    total = bind(sum(matrix[i, j, lane] for i in streams))
                    inverse = bind(T.float32(1) / total)
                    if kept is not None:
                        kept[step, j, lane] = total
                    for i in streams:
                        matrix[i, j, lane] = matrix[i, j, lane] * inverse
            for i in T.serial(n):
                for lane in dialect.lanes(block):
                    total = bind(sum(matrix[i, j, lane] for j in streams))
                    inverse = bind(T.float32(1) / total)
                    if kept is not None:
                        kept[step, n + i, lane] = total
                    for j in streams:
                        matrix[i, j, lane] = matrix[i, j, lane] * inverse

        @T.macro
        def row_back(matrix: Any, grad: Any) -> None:
            for i in T.serial(n):
                for lane in dialect.lanes(block):
                    total = bind(sum(grad[i, j, lane] for j in streams))
                    for j in streams:
                        grad[i, j, lane] = grad[i, j, lane] - matrix[i, j, lane] * total

        @T.macro
        def column_back(matrix: Any, grad: Any) -> None:
            for j in T.serial(n):
                for lane in dialect.lanes(block):
                    total = bind(sum(grad[i, j, lane] for i in streams))
                    for i in streams:
                        grad[i, j, lane] = grad[i, j, lane] - matrix[i, j, lane] * total

        @T.macro
        def forward(logits: Any, matrix: Any, column: Any, kept: Any) -> None:
            """logits (overwritten) -> matrix, after all rounds."""
            column_start(logits, column)
            row_start(logits, column, matrix)
            for step in T.serial(rounds - 1):
                round_(matrix, kept, step)

        @T.macro
        def backward(logits: Any, matrix: Any, column: Any, kept: Any, grad: Any) -> None:
            """grad: of the matrix that `forward` left -> of the logits that it was given."""
            for i, j in T.grid(n, n):
                for lane in dialect.lanes(block):
                    grad[i, j, lane] = grad[i, j, lane] * matrix[i, j, lane]
            for back in T.serial(rounds - 1):
                step = rounds - 2 - back
                row_back(matrix, grad)
                for i, j in T.grid(n, n):
                    for lane in dialect.lanes(block):
                        matrix[i, j, lane] = matrix[i, j, lane] * kept[step, n + i, lane]
                column_back(matrix, grad)
                for i, j in T.grid(n, n):
                    for lane in dialect.lanes(block):
                        matrix[i, j, lane] = matrix[i, j, lane] * kept[step, j, lane]
            row_back(matrix, grad)
            for i, j in T.grid(n, n):
                for lane in dialect.lanes(block):
                    matrix[i, j, lane] = dialect.exp(logits[i, j, lane]) / column[j, lane]
            column_back(matrix, grad)

        self.forward, self.backward = forward, backward


def sinkhorn_forward(problem: Problem, schedule: CoefficientsSchedule, dialect: Dialect) -> Any:
    """res = SK(logits)."""
    n, block = problem.streams, schedule.block_tokens
    rounds = Sinkhorn(problem, schedule, dialect)
    tokens = T.dynamic("tokens")

    @T.prim_func
    def sinkhorn_forward(
        logits: T.Tensor((tokens, n, n), "float32"),
        res: T.Tensor((tokens, n, n), "float32"),
    ):
        with dialect.kernel(T.ceildiv(tokens, block), threads=schedule.threads) as start:
            work, matrix = dialect.scratch(n, n, block), dialect.scratch(n, n, block)
            column = dialect.scratch(n, block)
            for i, j in T.grid(n, n):
                for lane in dialect.lanes(block):
                    work[i, j, lane] = logits[T.min(start * block + lane, tokens - 1), i, j]
            rounds.forward(work, matrix, column, None)
            for i, j in T.grid(n, n):
                for lane in dialect.lanes(block):
                    res[T.min(start * block + lane, tokens - 1), i, j] = matrix[i, j, lane]

    return sinkhorn_forward


def sinkhorn_backward(problem: Problem, schedule: CoefficientsSchedule, dialect: Dialect) -> Any:
    """dlogits = SKᵀ(dres)."""
    n, block = problem.streams, schedule.block_tokens
    rounds = Sinkhorn(problem, schedule, dialect)
    tokens = T.dynamic("tokens")

    @T.prim_func
    def sinkhorn_backward(
        logits: T.Tensor((tokens, n, n), "float32"),
        dres: T.Tensor((tokens, n, n), "float32"),
        dlogits: T.Tensor((tokens, n, n), "float32"),
    ):
        with dialect.kernel(T.ceildiv(tokens, block), threads=schedule.threads) as start:
            work, matrix = dialect.scratch(n, n, block), dialect.scratch(n, n, block)
            grad, column = dialect.scratch(n, n, block), dialect.scratch(n, block)
            kept = dialect.scratch(max(1, problem.rounds - 1), 2 * n, block)
            for i, j in T.grid(n, n):
                for lane in dialect.lanes(block):
                    work[i, j, lane] = logits[T.min(start * block + lane, tokens - 1), i, j]
                    grad[i, j, lane] = dres[T.min(start * block + lane, tokens - 1), i, j]
            rounds.forward(work, matrix, column, kept)
            rounds.backward(work, matrix, column, kept, grad)
            for i, j in T.grid(n, n):
                for lane in dialect.lanes(block):
                    dlogits[T.min(start * block + lane, tokens - 1), i, j] = grad[i, j, lane]

    return sinkhorn_backward


def forward(problem: Problem, schedule: CoefficientsSchedule, dialect: Dialect) -> Any:
    """h = alpha∘z·r + bias;  pre = σ(h_pre);  post = 2σ(h_post);  res = SK(h_res);  r = rsqrt(s/K + eps)."""
    n, block, outputs, fan_in = problem.streams, schedule.block_tokens, problem.outputs, problem.fan_in
    rounds = Sinkhorn(problem, schedule, dialect)
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
        with dialect.kernel(T.ceildiv(tokens, block), threads=schedule.threads) as start:
            work, matrix = dialect.scratch(n, n, block), dialect.scratch(n, n, block)
            column, scale = dialect.scratch(n, block), dialect.scratch(block)
            for lane in dialect.lanes(block):
                token = T.min(start * block + lane, tokens - 1)
                scale[lane] = T.float32(1) / T.sqrt(s[token] * T.float32(1 / fan_in) + eps)
            for i in T.serial(n):
                for lane in dialect.lanes(block):
                    token = T.min(start * block + lane, tokens - 1)
                    h = bind(alpha[0] * z[token, i] * scale[lane] + bias[i])
                    pre[token, i] = _sigmoid(dialect, h)
                for lane in dialect.lanes(block):
                    token = T.min(start * block + lane, tokens - 1)
                    h = bind(alpha[1] * z[token, n + i] * scale[lane] + bias[n + i])
                    post[token, i] = 2 * _sigmoid(dialect, h)
            for i, j in T.grid(n, n):
                for lane in dialect.lanes(block):
                    token = T.min(start * block + lane, tokens - 1)
                    k = 2 * n + i * n + j
                    work[i, j, lane] = alpha[2] * z[token, k] * scale[lane] + bias[k]
            rounds.forward(work, matrix, column, None)
            for i, j in T.grid(n, n):
                for lane in dialect.lanes(block):
                    res[T.min(start * block + lane, tokens - 1), i, j] = matrix[i, j, lane]

    return coefficients_forward


def backward(problem: Problem, schedule: CoefficientsSchedule, dialect: Dialect) -> Any:
    """dh from dpre, dpost and dres;  dz = alpha∘dh·r;  ds = -½ r² Σ_k alpha dh_k z_k r / K;
    dalpha_g = Σ_t Σ_{k∈g} dh_k z_k r and dbias = Σ_t dh, one partial sum per split of the tokens."""
    n, block, outputs, fan_in = problem.streams, schedule.block_tokens, problem.outputs, problem.fan_in
    rounds = Sinkhorn(problem, schedule, dialect)
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
        with dialect.kernel(splits, threads=schedule.threads) as split:
            work, matrix = dialect.scratch(n, n, block), dialect.scratch(n, n, block)
            grad, column = dialect.scratch(n, n, block), dialect.scratch(n, block)
            kept = dialect.scratch(max(1, problem.rounds - 1), 2 * n, block)
            scale, slope = dialect.scratch(block), dialect.scratch(block)
            dh, bias_sums = dialect.scratch(outputs, block), dialect.scratch(outputs, block)
            alpha_sums = dialect.scratch(3, block)
            for k in T.serial(outputs):
                for lane in dialect.lanes(block):
                    bias_sums[k, lane] = T.float32(0)
            for g in T.serial(3):
                for lane in dialect.lanes(block):
                    alpha_sums[g, lane] = T.float32(0)
            first, last, blocks = token_range(tokens, split, splits, block)
            for step in T.serial(blocks[0]):
                start = bind(first[0] + step * block)
                for lane in dialect.lanes(block):
                    token = T.min(start + lane, last[0] - 1)
                    scale[lane] = T.float32(1) / T.sqrt(s[token] * T.float32(1 / fan_in) + eps)
                    slope[lane] = T.float32(0)
                for i, j in T.grid(n, n):
                    for lane in dialect.lanes(block):
                        token = T.min(start + lane, last[0] - 1)
                        k = 2 * n + i * n + j
                        work[i, j, lane] = alpha[2] * z[token, k] * scale[lane] + bias[k]
                        grad[i, j, lane] = dres[token, i, j]
                rounds.forward(work, matrix, column, kept)
                rounds.backward(work, matrix, column, kept, grad)
                for i in T.serial(n):
                    for lane in dialect.lanes(block):
                        token = T.min(start + lane, last[0] - 1)
                        gate = bind(_sigmoid(dialect, alpha[0] * z[token, i] * scale[lane] + bias[i]))
                        dh[i, lane] = dpre[token, i] * gate * (T.float32(1) - gate)
                    for lane in dialect.lanes(block):
                        token = T.min(start + lane, last[0] - 1)
                        gate = bind(_sigmoid(dialect, alpha[1] * z[token, n + i] * scale[lane] + bias[n + i]))
                        dh[n + i, lane] = 2 * dpost[token, i] * gate * (T.float32(1) - gate)
                for i, j in T.grid(n, n):
                    for lane in dialect.lanes(block):
                        dh[2 * n + i * n + j, lane] = grad[i, j, lane]
                for g, size, offset in ((0, n, 0), (1, n, n), (2, n * n, 2 * n)):
                    for k in T.serial(size):
                        for lane in dialect.lanes(block):
                            token = T.min(start + lane, last[0] - 1)
                            there = T.if_then_else(start + lane < last[0], T.float32(1), T.float32(0))
                            scaled = bind(dh[offset + k, lane] * scale[lane])
                            product = bind(scaled * z[token, offset + k])
                            dz[token, offset + k] = alpha[g] * scaled
                            slope[lane] += alpha[g] * product
                            alpha_sums[g, lane] += there * product
                            bias_sums[offset + k, lane] += there * dh[offset + k, lane]
                for lane in dialect.lanes(block):
                    token = T.min(start + lane, last[0] - 1)
                    ds[token] = T.float32(-0.5 / fan_in) * scale[lane] * scale[lane] * slope[lane]
            for g in T.serial(3):
                total = dialect.accumulator(block)
                for lane in dialect.lanes(block):
                    total[dialect.lane(lane)] += alpha_sums[g, lane]
                dalpha[split, g] = dialect.total(total)[0]
            for k in T.serial(outputs):
                total = dialect.accumulator(block)
                for lane in dialect.lanes(block):
                    total[dialect.lane(lane)] += bias_sums[k, lane]
                dbias[split, k] = dialect.total(total)[0]

    return coefficients_backward


def _maximum(values: list[Any]) -> Any:
    top = values[0]
    for value in values[1:]:
        top = T.max(top, value)
    return top


def _sigmoid(dialect: Dialect, h: Any) -> Any:
    """1 / (1 + e^-h), from e^-|h| so that nothing overflows."""
    decay = bind(dialect.exp(T.min(h, -h)))
    return T.Select(h >= T.float32(0), T.float32(1), decay) / (T.float32(1) + decay)
