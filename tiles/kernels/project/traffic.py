"""The least that project moves and computes (docs/design.md, "Bytes a token")."""

from __future__ import annotations

from tiles.kernels.spec import DTYPE_BYTES, Problem, Traffic


def project(problem: Problem, tokens: int) -> Traffic:
    """forward: reads x̄ and phi, writes z and s; backward: reads x̄, phi, dz, ds, writes dx̄ and dphi."""
    fan_in, outputs, size = problem.fan_in, problem.outputs, DTYPE_BYTES[problem.dtype]
    streams, phi, small = tokens * fan_in * size, 4 * outputs * fan_in, 4 * tokens * (outputs + 1)
    matmul = 2 * tokens * outputs * fan_in
    if problem.direction == "forward":
        return Traffic(streams + phi, small, matmul + 2 * tokens * fan_in)
    return Traffic(streams + phi + small, streams + phi, 2 * matmul + 2 * tokens * fan_in)
