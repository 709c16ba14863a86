"""The steps from z and s to pre, post and res, and back, as TileLang macros: the fused passes share them.

Every macro works on a block of tokens, start..start + block, clamped to last - 1, with a lane for each.
"""

from typing import Any, NamedTuple

import tilelang.language as T

from tiles.coefficients.sinkhorn import Sinkhorn
from tiles.dialect import Dialect
from tiles.family import Problem
from tiles.values import bind


class ForwardScratch(NamedTuple):
    """What `Forward` works on; the last dimension is the tokens of a block."""

    logits: Any
    matrix: Any
    column: Any
    scale: Any
    pre: Any
    post: Any


class Forward:
    """z, s -> pre, post, res for a block of tokens: the macro `run`, shared with the fused passes.

    `scratch` allocates what it works on: pre and post [n, tokens], matrix [n, n, tokens] and more. Tokens are
    start..start + block, clamped to last - 1.
    """

    def __init__(self, problem: Problem, block: int, dialect: Dialect) -> None:
        n, fan_in = problem.streams, problem.fan_in
        rounds = Sinkhorn(problem, block, dialect)
        self._n, self._block, self._dialect = n, block, dialect

        @T.macro
        def gates(held: Any, z: Any, s: Any, alpha: Any, bias: Any, eps: Any, start: Any, last: Any) -> None:
            """scale, pre, post, and the logits of res."""
            for lane in dialect.lanes(block):
                token = T.min(start + lane, last - 1)
                held.scale[lane] = T.float32(1) / T.sqrt(s[token] * T.float32(1 / fan_in) + eps)
            for i in T.serial(n):
                for lane in dialect.lanes(block):
                    token = T.min(start + lane, last - 1)
                    h = bind(alpha[0] * z[token, i] * held.scale[lane] + bias[i])
                    held.pre[i, lane] = _sigmoid(dialect, h)
                for lane in dialect.lanes(block):
                    token = T.min(start + lane, last - 1)
                    h = bind(alpha[1] * z[token, n + i] * held.scale[lane] + bias[n + i])
                    held.post[i, lane] = 2 * _sigmoid(dialect, h)
            for i, j in T.grid(n, n):
                for lane in dialect.lanes(block):
                    token = T.min(start + lane, last - 1)
                    k = 2 * n + i * n + j
                    held.logits[i, j, lane] = alpha[2] * z[token, k] * held.scale[lane] + bias[k]

        @T.macro
        def run(held: Any, z: Any, s: Any, alpha: Any, bias: Any, eps: Any, start: Any, last: Any) -> None:
            gates(held, z, s, alpha, bias, eps, start, last)
            rounds.forward(held.logits, held.matrix, held.column, None)

        @T.macro
        def store(held: Any, post: Any, res: Any, start: Any, last: Any) -> None:
            """Write post and res out."""
            for i in T.serial(n):
                for lane in dialect.lanes(block):
                    post[T.min(start + lane, last - 1), i] = held.post[i, lane]
            for i, j in T.grid(n, n):
                for lane in dialect.lanes(block):
                    res[T.min(start + lane, last - 1), i, j] = held.matrix[i, j, lane]

        self.gates, self.run, self.store = gates, run, store

    def scratch(self) -> ForwardScratch:
        """Allocate what the macros work on; call it inside the kernel."""
        n, block, of = self._n, self._block, self._dialect.scratch
        return ForwardScratch(of(n, n, block), of(n, n, block), of(n, block), of(block), of(n, block), of(n, block))


class BackwardScratch(NamedTuple):
    """What `Backward` works on; the last dimension is the tokens of a block."""

    forward: ForwardScratch
    kept: Any
    dpre: Any
    dpost: Any
    dres: Any
    dz: Any
    ds: Any
    bias_sums: Any
    alpha_sums: Any


class Backward:
    """dpre, dpost, dres -> dz, ds, and sums for dalpha and dbias: macros that the fused passes share.

    `scratch` allocates what they work on. A block of tokens: fill dpre, dpost [n, tokens] and dres [n, n, tokens], then
    `run`; it leaves dz [N, tokens] and ds [tokens]. `clear` comes before the first block, `store` after the last.
    """

    def __init__(self, problem: Problem, block: int, dialect: Dialect) -> None:
        n, outputs, fan_in = problem.streams, problem.outputs, problem.fan_in
        groups = ((0, n, 0), (1, n, n), (2, n * n, 2 * n))
        gates, rounds = Forward(problem, block, dialect).gates, Sinkhorn(problem, block, dialect)
        self._problem, self._block, self._dialect = problem, block, dialect

        @T.macro
        def clear(held: Any) -> None:
            for k in T.serial(outputs):
                for lane in dialect.lanes(block):
                    held.bias_sums[k, lane] = T.float32(0)
            for g in T.serial(3):
                for lane in dialect.lanes(block):
                    held.alpha_sums[g, lane] = T.float32(0)

        @T.macro
        def logit_gradients(held: Any) -> None:
            """dh, kept in dz: back through the gates and the rounds."""
            of = held.forward
            for i in T.serial(n):
                for lane in dialect.lanes(block):
                    gate = bind(of.pre[i, lane])
                    held.dz[i, lane] = held.dpre[i, lane] * gate * (T.float32(1) - gate)
                for lane in dialect.lanes(block):
                    gate = bind(of.post[i, lane])
                    held.dz[n + i, lane] = held.dpost[i, lane] * gate * (T.float32(1) - T.float32(0.5) * gate)
            for i, j in T.grid(n, n):
                for lane in dialect.lanes(block):
                    held.dz[2 * n + i * n + j, lane] = held.dres[i, j, lane]

        @T.macro
        def run(held: Any, z: Any, s: Any, alpha: Any, bias: Any, eps: Any, start: Any, last: Any) -> None:
            of = held.forward
            gates(of, z, s, alpha, bias, eps, start, last)
            rounds.forward(of.logits, of.matrix, of.column, held.kept)
            rounds.backward(of.logits, of.matrix, of.column, held.kept, held.dres)
            logit_gradients(held)
            for lane in dialect.lanes(block):
                held.ds[lane] = T.float32(0)
            for g, size, offset in groups:
                for k in T.serial(size):
                    for lane in dialect.lanes(block):
                        token = T.min(start + lane, last - 1)
                        there = T.if_then_else(start + lane < last, T.float32(1), T.float32(0))
                        dh = bind(held.dz[offset + k, lane])
                        scaled = bind(dh * of.scale[lane])
                        product = bind(scaled * z[token, offset + k])
                        held.dz[offset + k, lane] = alpha[g] * scaled
                        held.ds[lane] += alpha[g] * product
                        held.alpha_sums[g, lane] += there * product
                        held.bias_sums[offset + k, lane] += there * dh
            for lane in dialect.lanes(block):
                scale = bind(of.scale[lane])
                held.ds[lane] = T.float32(-0.5 / fan_in) * scale * scale * held.ds[lane]

        @T.macro
        def store(held: Any, dalpha: Any, dbias: Any, split: Any) -> None:
            for g in T.serial(3):
                total = dialect.accumulator(block)
                for lane in dialect.lanes(block):
                    total[dialect.lane(lane)] += held.alpha_sums[g, lane]
                dalpha[split, g] = dialect.total(total)[0]
            for k in T.serial(outputs):
                total = dialect.accumulator(block)
                for lane in dialect.lanes(block):
                    total[dialect.lane(lane)] += held.bias_sums[k, lane]
                dbias[split, k] = dialect.total(total)[0]

        self.clear, self.run, self.store = clear, run, store

    def scratch(self) -> BackwardScratch:
        """Allocate what the macros work on; call it inside the kernel."""
        n, outputs, rounds = self._problem.streams, self._problem.outputs, self._problem.rounds
        block, of = self._block, self._dialect.scratch
        return BackwardScratch(
            forward=Forward(self._problem, block, self._dialect).scratch(),
            kept=of(max(1, rounds - 1), 2 * n, block),
            dpre=of(n, block),
            dpost=of(n, block),
            dres=of(n, n, block),
            dz=of(outputs, block),
            ds=of(block),
            bias_sums=of(outputs, block),
            alpha_sums=of(3, block),
        )


def _sigmoid(dialect: Dialect, h: Any) -> Any:
    """1 / (1 + e^-h), from e^-|h| so that nothing overflows."""
    decay = bind(dialect.exp(T.min(h, -h)))
    return T.Select(h >= T.float32(0), T.float32(1), decay) / (T.float32(1) + decay)
