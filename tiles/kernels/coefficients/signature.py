"""The arguments of the kernels coefficients and sinkhorn, in call order."""

from __future__ import annotations

from tiles.kernels.arguments import EPS, affine, gates, matrix, projected
from tiles.kernels.spec import Argument, Problem


def arguments(problem: Problem) -> tuple[Argument, ...]:
    """forward: z, s, alpha, bias, eps -> pre, post, res;
    backward: z, s, alpha, bias, dpre, dpost, dres, eps -> dz, ds, dalpha, dbias."""
    given = (*projected("z", "s", problem, "input"), *affine("alpha", "bias", problem, "input"))
    if problem.direction == "forward":
        gated = (gates("pre", problem, "output"), gates("post", problem, "output"))
        return (*given, EPS, *gated, matrix("res", problem, "output"))
    return (
        *given,
        gates("dpre", problem, "input"),
        gates("dpost", problem, "input"),
        matrix("dres", problem, "input"),
        EPS,
        *projected("dz", "ds", problem, "output"),
        *affine("dalpha", "dbias", problem, "partial"),
    )


def sinkhorn_arguments(problem: Problem) -> tuple[Argument, ...]:
    """forward: logits -> res;  backward: logits, dres -> dlogits."""
    logits = matrix("logits", problem, "input")
    if problem.direction == "forward":
        return (logits, matrix("res", problem, "output"))
    return (logits, matrix("dres", problem, "input"), matrix("dlogits", problem, "output"))
