"""The least that aggregate and merge move and compute (docs/design.md, "Bytes a token")."""

from __future__ import annotations

from tiles.kernels.spec import DTYPE_BYTES, Problem, Traffic


def aggregate(problem: Problem, tokens: int) -> Traffic:
    """forward: reads (n)C, writes C; backward: reads (n+1)C, writes nC, in the streams' dtype; pre is float32."""
    n, width, size = problem.streams, problem.width, DTYPE_BYTES[problem.dtype]
    if problem.direction == "forward":
        return Traffic(tokens * (n * width * size + 4 * n), tokens * width * size, 2 * tokens * n * width)
    read = tokens * ((n + 1) * width * size + 4 * n)
    return Traffic(read, tokens * (n * width * size + 4 * n), 3 * tokens * n * width)


def merge(problem: Problem, tokens: int) -> Traffic:
    """forward: reads (n+1)C, writes nC; backward: reads (2n+1)C, writes (n+1)C, or (n+1)C and C where res is the
    identity; res and post are float32."""
    n, width, size = problem.streams, problem.width, DTYPE_BYTES[problem.dtype]
    weights, flops = 4 * problem.weights, 2 * tokens * problem.weights * width
    if problem.direction == "forward":
        read, written = (n + 1) * width * size + weights, n * width * size
        return Traffic(tokens * read, tokens * written, flops)
    streams = n if problem.mixes else 0
    read, written = (streams + n + 1) * width * size + weights, (streams + 1) * width * size + weights
    return Traffic(tokens * read, tokens * written, 2 * flops)
