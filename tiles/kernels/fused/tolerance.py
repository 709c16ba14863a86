"""Tolerances of the fused kernels: pre, step and single_pass."""

from __future__ import annotations

from tiles.kernels.spec import Problem
from tiles.kernels.tolerance import HALF_ULP, float32_sum, in_parts, stored, token_sum


def of_fused(problem: Problem, name: str) -> tuple[float, float]:
    """(rtol, atol) of a result: that of the op that ends in it. Where a merge comes first, x' and g are rounded to the
    streams' dtype on the way, as between separate kernels: the float64 reference does not round, so every element may
    be off by half an ulp, and what sums over elements by a random walk of them."""
    if name in ("dx", "df", "x_next", "u"):
        rtol, atol = stored(problem.dtype)
    elif name in ("dphi", "dalpha", "dbias", "dnorm_weight"):
        rtol, atol = token_sum(problem.tokens * problem.streams)
    elif name in ("z", "s", "dpre", "dpost", "dres"):
        rtol, atol = float32_sum(problem.fan_in)
    else:
        rtol, atol = 1e-4, 1e-5  # gates and res, as in coefficients
    if name == "u" and problem.normalises:
        rtol += 2 * HALF_ULP[problem.dtype]  # rounded before its norm as well, as between two ops
    if name in ("dx", "z", "dphi"):
        size = {"dx": problem.outputs / problem.fan_in, "z": 1, "dphi": max(64, problem.tokens)}[name]
        rtol, atol = in_parts((rtol, atol), size)
    if problem.base_op == "pre":
        return rtol, atol + (1e-5 if name == "u" else 0)
    half = HALF_ULP[problem.dtype]
    return rtol + 4 * half, atol + 8 * half * _terms(problem, name) ** 0.5


def _terms(problem: Problem, name: str) -> int:
    """How many errors of order half an ulp meet in a result."""
    if name == "s":
        return problem.fan_in
    if name in ("dpre", "dpost", "dres"):
        return problem.width
    if name in ("dphi", "dalpha", "dbias"):
        return max(64, problem.tokens) * problem.width
    return 1 if name == "z" else 8 * problem.streams  # the rows of phi have norm one
