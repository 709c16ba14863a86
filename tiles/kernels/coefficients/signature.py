"""The arguments of the kernels coefficients and sinkhorn, in call order."""

from __future__ import annotations

from tiles.kernels.arguments import HC_EPS, MAP_SCALARS, affine, gates, matrix, projected
from tiles.kernels.spec import Argument, Problem


def arguments(problem: Problem) -> tuple[Argument, ...]:
    """forward: z, s, alpha, bias, eps, hc_eps, post_scale -> pre, post, res;
    backward: z, s, alpha, bias, dpre, dpost, dres, eps, hc_eps, post_scale
    -> dz, ds, dalpha, dbias."""
    given = (*projected("z", "s", problem, "input"), *affine("alpha", "bias", problem, "input"))
    if problem.direction == "forward":
        gated = (gates("pre", problem, "output"), gates("post", problem, "output"))
        return (*given, *MAP_SCALARS, *gated, matrix("res", problem, "output"))
    return (
        *given,
        gates("dpre", problem, "input"),
        gates("dpost", problem, "input"),
        matrix("dres", problem, "input"),
        *MAP_SCALARS,
        *projected("dz", "ds", problem, "output"),
        *affine("dalpha", "dbias", problem, "partial"),
    )


def sinkhorn_arguments(problem: Problem) -> tuple[Argument, ...]:
    """forward: logits, hc_eps -> res;  backward: logits, dres, hc_eps -> dlogits."""
    logits = matrix("logits", problem, "input")
    if problem.direction == "forward":
        return (logits, HC_EPS, matrix("res", problem, "output"))
    return (logits, matrix("dres", problem, "input"), HC_EPS, matrix("dlogits", problem, "output"))
