"""The least that coefficients and sinkhorn move and compute. All tensors are float32."""

from __future__ import annotations

from tiles.kernels.spec import Problem, Traffic


def _rounds_flops(problem: Problem) -> int:
    """Each half round sums and divides n² elements; the backward walks back through the rounds that it recomputes."""
    forward = 4 * problem.rounds * problem.streams**2
    return forward if problem.direction == "forward" else 3 * forward


def coefficients(problem: Problem, tokens: int) -> Traffic:
    """forward: z, s -> pre, post, res; backward: those and their gradients -> dz, ds, dalpha, dbias."""
    outputs = problem.outputs
    token, parameters = 4 * tokens, 4 * (problem.maps + outputs)
    flops = tokens * ((_rounds_flops(problem) if problem.mixes else 0) + 8 * outputs)
    if problem.direction == "forward":
        return Traffic(token * (outputs + 1) + parameters, token * outputs, flops)
    return Traffic(token * (2 * outputs + 1) + parameters, token * (outputs + 1) + parameters, 2 * flops)


def sinkhorn(problem: Problem, tokens: int) -> Traffic:
    """forward: logits -> res; backward: logits, dres -> dlogits."""
    matrix = 4 * tokens * problem.streams**2
    read = matrix if problem.direction == "forward" else 2 * matrix
    return Traffic(read, matrix, tokens * _rounds_flops(problem))
