"""Sinkhorn's rounds as TileLang macros (docs/design.md, "The maths").

A thread takes a token: every `thread_loop` does one step of the maths for a block of tokens, on matrices stored
[n, n, tokens]. Threads past the last token repeat it, so that all compute the same thing; sums leave them out.

Sinkhorn's first round is evaluated as exp(h_ij - colmax_j - rowmax_i) / (column sum) / (row sum), where colmax and
rowmax leave a one in every row and column: no sum can vanish, whatever the logits. After that round every row and
column sum lies in [1/n², n], so the other rounds are plain divisions. The backward works on the gradient of log M,
which needs M after each half round only; it gets them back from the last one by multiplying with the sums it kept.

`hc_eps` is added to the softmax over the columns that the first half round is, and to all sums that divide after it. A
row then cannot vanish, and rowmax is left out; it may be as small as hc_eps itself. With hc_eps = 0 all this changes no
bit.
"""

from typing import Any

import tilelang.language as T

from tiles.kernels.spec import Problem
from tiles.lang.dialect import Dialect
from tiles.lang.values import bind

LOWEST = -1e38  # keeps a difference of two finite logits finite


class Sinkhorn:
    """The rounds on blocks of matrices: `logits` [n, n, tokens] is scratch or per thread, `matrix`, `grad` and `column`
    [n, tokens] are per thread, `kept` [rounds - 1, 2n, tokens] is scratch. `maps` has hc_eps."""

    def __init__(self, problem: Problem, block: int, dialect: Dialect) -> None:
        n, rounds = problem.streams, problem.rounds
        streams, unrolled = tuple(range(n)), dialect.unrolled

        @T.macro
        def column_start(logits: Any, column: Any) -> None:
            """logits -> log of the first column step's numerators (at most 0); column[j] its sums, in [1, n]."""
            for j in unrolled(n):
                for thread in dialect.thread_loop(block):
                    values = [bind(logits[i, j, thread]) for i in streams]
                    top = bind(_maximum(values))
                    shifted = [_bounded(bind(value - top)) for value in values]
                    for i in streams:
                        logits[i, j, thread] = shifted[i]
                    column[j, thread] = sum(dialect.exp(value) for value in shifted)

        @T.macro
        def row_start(logits: Any, column: Any, matrix: Any, maps: Any) -> None:
            """The matrix after the first round."""
            for i in unrolled(n):
                for thread in dialect.thread_loop(block):
                    values = [bind(logits[i, j, thread]) for j in streams]
                    top = bind(T.Select(maps.hc_eps > T.float32(0), T.float32(0), _maximum(values)))
                    row = [
                        bind(dialect.exp(values[j] - top) * dialect.reciprocal(column[j, thread]) + maps.hc_eps)
                        for j in streams
                    ]
                    inverse = bind(dialect.reciprocal(dialect.upscaled(sum(row) + maps.hc_eps)))
                    for j in streams:
                        matrix[i, j, thread] = dialect.upscaled(row[j]) * inverse

        @T.macro
        def round_(matrix: Any, kept: Any, step: Any, maps: Any) -> None:
            """One round, columns then rows; `kept` [rounds, 2n, tokens] takes the sums where it is given."""
            for j in unrolled(n):
                for thread in dialect.thread_loop(block):
                    total = bind(sum(matrix[i, j, thread] for i in streams) + maps.hc_eps)
                    inverse = bind(dialect.reciprocal(total))
                    if kept is not None:
                        kept[step, j, thread] = total
                    for i in streams:
                        matrix[i, j, thread] = matrix[i, j, thread] * inverse
            for i in unrolled(n):
                for thread in dialect.thread_loop(block):
                    total = bind(sum(matrix[i, j, thread] for j in streams) + maps.hc_eps)
                    inverse = bind(dialect.reciprocal(total))
                    if kept is not None:
                        kept[step, n + i, thread] = total
                    for j in streams:
                        matrix[i, j, thread] = matrix[i, j, thread] * inverse

        @T.macro
        def row_back(matrix: Any, grad: Any) -> None:
            for i in unrolled(n):
                for thread in dialect.thread_loop(block):
                    total = bind(sum(grad[i, j, thread] for j in streams))
                    for j in streams:
                        grad[i, j, thread] = grad[i, j, thread] - matrix[i, j, thread] * total

        @T.macro
        def column_back(matrix: Any, grad: Any) -> None:
            for j in unrolled(n):
                for thread in dialect.thread_loop(block):
                    total = bind(sum(grad[i, j, thread] for i in streams))
                    for i in streams:
                        grad[i, j, thread] = grad[i, j, thread] - matrix[i, j, thread] * total

        @T.macro
        def forward(logits: Any, matrix: Any, column: Any, kept: Any, maps: Any) -> None:
            """logits (overwritten) -> matrix, after all rounds."""
            column_start(logits, column)
            row_start(logits, column, matrix, maps)
            for step in T.serial(rounds - 1):
                round_(matrix, kept, step, maps)

        @T.macro
        def backward(logits: Any, matrix: Any, column: Any, kept: Any, grad: Any, maps: Any) -> None:
            """grad: of the matrix that `forward` left -> of the logits that it was given."""
            for i in unrolled(n):
                for j in unrolled(n):
                    for thread in dialect.thread_loop(block):
                        grad[i, j, thread] = grad[i, j, thread] * matrix[i, j, thread]
            for back in T.serial(rounds - 1):
                step = rounds - 2 - back
                row_back(matrix, grad)
                for i in unrolled(n):
                    for j in unrolled(n):
                        for thread in dialect.thread_loop(block):
                            matrix[i, j, thread] = matrix[i, j, thread] * kept[step, n + i, thread]
                column_back(matrix, grad)
                for i in unrolled(n):
                    for j in unrolled(n):
                        for thread in dialect.thread_loop(block):
                            matrix[i, j, thread] = matrix[i, j, thread] * kept[step, j, thread]
            row_back(matrix, grad)
            for i in unrolled(n):
                for j in unrolled(n):
                    for thread in dialect.thread_loop(block):
                        softmax = bind(dialect.exp(logits[i, j, thread]) * dialect.reciprocal(column[j, thread]))
                        # of hc_eps beside it
                        share = bind(
                            dialect.upscaled(softmax) * dialect.reciprocal(dialect.upscaled(softmax + maps.hc_eps))
                        )
                        grad[i, j, thread] = T.Select(
                            maps.hc_eps > T.float32(0), grad[i, j, thread] * share, grad[i, j, thread]
                        )
                        matrix[i, j, thread] = softmax
            column_back(matrix, grad)

        self.forward, self.backward = forward, backward


def _bounded(value: Any) -> Any:
    """At least LOWEST; NaN stays NaN, which a maximum would drop."""
    return bind(T.Select(value < T.float32(LOWEST), T.float32(LOWEST), value))


def _maximum(values: list[Any]) -> Any:
    top = values[0]
    for value in values[1:]:
        top = T.max(top, value)
    return top
