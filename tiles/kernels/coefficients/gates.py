"""Gates: from z and s to pre, post and res, and back, as TileLang macros that the fused kernels share.

Every macro works on a block of tokens, start..start + block, clamped to last - 1, with a thread for each. `maps`
has alpha, bias, eps, hc_eps and post_scale.
"""

from typing import Any, NamedTuple

import tilelang.language as T

from tiles.kernels.coefficients.sinkhorn import Sinkhorn
from tiles.kernels.spec import Problem
from tiles.lang.dialect import Dialect
from tiles.lang.values import bind


class ForwardScratch(NamedTuple):
    """What `Forward` works on; the last dimension is the tokens of a block."""

    logits: Any
    matrix: Any
    column: Any
    scale: Any
    pre: Any
    post: Any


class Forward:
    """z, s -> pre, post, res for a block of tokens: the macro `run`, shared with the fused kernels.

    `scratch` allocates what it works on: pre and post [n, tokens], matrix [n, n, tokens] and more. Tokens are
    start..start + block, clamped to last - 1.
    """

    def __init__(self, problem: Problem, block: int, dialect: Dialect) -> None:
        n, fan_in, unrolled, mixes = problem.streams, problem.fan_in, dialect.unrolled, problem.mixes
        rounds = Sinkhorn(problem, block, dialect)
        self._problem, self._block, self._dialect = problem, block, dialect

        def shifted(post: Any, by: Any) -> Any:
            """post with hc_eps: Hunyuan-V4 adds it, whose res is the identity."""
            return post if mixes else post + by

        @T.macro
        def logits(held: Any, z: Any, maps: Any, start: Any, last: Any) -> None:
            """Those of res."""
            for i in unrolled(n):
                for j in unrolled(n):
                    for thread in dialect.thread_loop(block):
                        token = T.min(start + thread, last - 1)
                        k = 2 * n + i * n + j
                        held.logits[i, j, thread] = maps.alpha[2] * z[token, k] * held.scale[thread] + maps.bias[k]

        @T.macro
        def gates(held: Any, z: Any, s: Any, maps: Any, start: Any, last: Any) -> None:
            """scale, pre, post, and the logits of res."""
            for thread in dialect.thread_loop(block):
                token = T.min(start + thread, last - 1)
                held.scale[thread] = T.float32(1) / T.sqrt(s[token] * T.float32(1 / fan_in) + maps.eps)
            for i in unrolled(n):
                for thread in dialect.thread_loop(block):
                    token = T.min(start + thread, last - 1)
                    h = bind(maps.alpha[0] * z[token, i] * held.scale[thread] + maps.bias[i])
                    held.pre[i, thread] = _sigmoid(dialect, h) + maps.hc_eps
                for thread in dialect.thread_loop(block):
                    token = T.min(start + thread, last - 1)
                    h = bind(maps.alpha[1] * z[token, n + i] * held.scale[thread] + maps.bias[n + i])
                    held.post[i, thread] = shifted(maps.post_scale * _sigmoid(dialect, h), maps.hc_eps)
            if mixes:
                logits(held, z, maps, start, last)

        @T.macro
        def run(held: Any, z: Any, s: Any, maps: Any, start: Any, last: Any) -> None:
            gates(held, z, s, maps, start, last)
            if mixes:
                rounds.forward(held.logits, held.matrix, held.column, None, maps)

        @T.macro
        def store(held: Any, maps: Any, pre: Any, start: Any, last: Any) -> None:
            """Write post and res of `maps` out, and pre where it is given."""
            for i in unrolled(n):
                for thread in dialect.thread_loop(block):
                    maps.post[T.min(start + thread, last - 1), i] = held.post[i, thread]
                if pre is not None:
                    for thread in dialect.thread_loop(block):
                        pre[T.min(start + thread, last - 1), i] = held.pre[i, thread]
            if mixes:
                for i in unrolled(n):
                    for j in unrolled(n):
                        for thread in dialect.thread_loop(block):
                            maps.res[T.min(start + thread, last - 1), i, j] = held.matrix[i, j, thread]

        self.gates, self.run, self.store, self.shifted = gates, run, store, shifted

    def scratch(self) -> ForwardScratch:
        """Allocate what the macros work on; call it inside the kernel."""
        return _forward_scratch(self._problem, self._block, self._dialect, self._dialect.per_thread)


def _forward_scratch(problem: Problem, block: int, dialect: Dialect, kind: Any) -> ForwardScratch:
    """`kind` allocates the logits of res; there are none where it is the identity."""
    n, own, of_res = problem.streams, dialect.per_thread, (None, None, None)
    if problem.mixes:
        of_res = kind(n, n, block), own(n, n, block), own(n, block)
    return ForwardScratch(*of_res, own(block), own(n, block), own(n, block))


class BackwardScratch(NamedTuple):
    """What `Backward` works on; the last dimension is the tokens of a block."""

    forward: ForwardScratch
    kept: Any
    dpre: Any
    dpost: Any
    dres: Any
    dz: Any
    ds: Any
    products: Any
    sums: Any


class Backward:
    """dpre, dpost, dres -> dz, ds, and sums for dalpha and dbias: macros that the fused kernels share.

    `scratch` allocates what they work on. A block of tokens: fill dpre, dpost [n, tokens] and, where res is not the
    identity, dres [n, n, tokens], then `run`; it leaves dz [N, tokens] and ds [tokens], which `store_logits` writes.
    `clear` comes before the first block, `store` after the last; where pre is needed before, `gates` and
    `run_after_gates` do what `run` does.
    """

    def __init__(self, problem: Problem, block: int, dialect: Dialect) -> None:
        n, outputs, fan_in, unrolled = problem.streams, problem.outputs, problem.fan_in, dialect.unrolled
        groups = ((0, 1, 0), (1, 1, n), (2, n, 2 * n))[: problem.maps]  # gate, rows of n logits, the first of them
        forward, rounds, mixes = Forward(problem, block, dialect), Sinkhorn(problem, block, dialect), problem.mixes
        gates, shifted = forward.gates, forward.shifted
        self._problem, self._block, self._dialect = problem, block, dialect

        @T.macro
        def clear(held: Any) -> None:
            for k in T.serial(outputs + len(groups)):
                for thread in dialect.thread_loop(block):
                    held.sums[k, thread] = T.float32(0)

        @T.macro
        def logit_gradients(held: Any, maps: Any) -> None:
            """dh, kept in dz: back through the gates and the rounds."""
            of = held.forward
            for i in unrolled(n):
                for thread in dialect.thread_loop(block):
                    gate = bind(of.pre[i, thread] - maps.hc_eps)
                    held.dz[i, thread] = held.dpre[i, thread] * gate * (T.float32(1) - gate)
                for thread in dialect.thread_loop(block):
                    gate = bind(shifted(of.post[i, thread], -maps.hc_eps))
                    closed = T.float32(1) - T.float32(1) / maps.post_scale * gate
                    held.dz[n + i, thread] = held.dpost[i, thread] * gate * closed
            if mixes:
                for i in unrolled(n):
                    for j in unrolled(n):
                        for thread in dialect.thread_loop(block):
                            held.dz[2 * n + i * n + j, thread] = held.dres[i, j, thread]

        @T.macro
        def run_after_gates(held: Any, z: Any, maps: Any, start: Any, last: Any) -> None:
            of = held.forward
            if mixes:
                rounds.forward(of.logits, of.matrix, of.column, held.kept, maps)
                rounds.backward(of.logits, of.matrix, of.column, held.kept, held.dres, maps)
            logit_gradients(held, maps)
            for thread in dialect.thread_loop(block):
                held.ds[thread] = T.float32(0)
            for g, rows, offset in groups:
                for thread in dialect.thread_loop(block):
                    held.products[thread] = T.float32(0)
                for i in unrolled(rows):
                    for j in unrolled(n):
                        for thread in dialect.thread_loop(block):
                            token = T.min(start + thread, last - 1)
                            k = offset + i * n + j
                            dh = bind(held.dz[k, thread])
                            scaled = bind(dh * of.scale[thread])
                            held.dz[k, thread] = maps.alpha[g] * scaled
                            held.products[thread] += scaled * z[token, k]
                            held.sums[k, thread] += T.if_then_else(start + thread < last, dh, T.float32(0))
                for thread in dialect.thread_loop(block):
                    held.ds[thread] += maps.alpha[g] * held.products[thread]
                    held.sums[outputs + g, thread] += T.if_then_else(
                        start + thread < last, held.products[thread], T.float32(0)
                    )
            for thread in dialect.thread_loop(block):
                scale = bind(of.scale[thread])
                held.ds[thread] = T.float32(-0.5 / fan_in) * scale * scale * held.ds[thread]

        @T.macro
        def run(held: Any, z: Any, s: Any, maps: Any, start: Any, last: Any) -> None:
            gates(held.forward, z, s, maps, start, last)
            run_after_gates(held, z, maps, start, last)

        @T.macro
        def store_logits(held: Any, dz: Any, ds: Any, start: Any, last: Any) -> None:
            """Write dz and ds out."""
            for thread in dialect.thread_loop(block):
                ds[T.min(start + thread, last - 1)] = held.ds[thread]
            for i in unrolled(outputs // n):
                for j in unrolled(n):
                    for thread in dialect.thread_loop(block):
                        dz[T.min(start + thread, last - 1), i * n + j] = held.dz[i * n + j, thread]

        @T.macro
        def add_threads(sums: Any, first: int, count: int, into: Any, row: Any) -> None:
            """Each thread adds up a row; threads start apart from each other, as all rows begin in one memory bank."""
            for k in dialect.parallel(count):
                total = T.alloc_var("float32", init=0.0)
                for step in T.serial(block):
                    total += sums[first + k, (step + k) % block]
                into[row, k] = total

        @T.macro
        def store(held: Any, dalpha: Any, dbias: Any, split: Any) -> None:
            """Write the sums out."""
            dialect.barrier()
            add_threads(held.sums, 0, outputs, dbias, split)
            add_threads(held.sums, outputs, len(groups), dalpha, split)

        self.clear, self.run, self.store_logits, self.store = clear, run, store_logits, store
        self.gates, self.run_after_gates = gates, run_after_gates

    def scratch(self) -> BackwardScratch:
        """Allocate what the macros work on; call it inside the kernel."""
        n, outputs, rounds = self._problem.streams, self._problem.outputs, self._problem.rounds
        block, per_thread, shared = self._block, self._dialect.per_thread, self._dialect.scratch
        mixes = self._problem.mixes
        return BackwardScratch(
            forward=_forward_scratch(self._problem, block, self._dialect, shared),
            kept=shared(max(1, rounds - 1), 2 * n, block) if mixes else None,
            dpre=shared(n, block),  # not read before the rounds are done, which fill the registers
            dpost=shared(n, block),
            dres=per_thread(n, n, block) if mixes else None,
            dz=per_thread(outputs, block),
            ds=per_thread(block),
            products=per_thread(block),
            sums=shared(outputs + self._problem.maps, block),
        )


def _sigmoid(dialect: Dialect, h: Any) -> Any:
    """1 / (1 + e^-h), from e^-|h| so that nothing overflows."""
    decay = bind(dialect.exp(T.min(h, -h)))
    return T.Select(h >= T.float32(0), T.float32(1), decay) * dialect.reciprocal(T.float32(1) + decay)
