"""The arguments of project's kernels, in call order."""

from __future__ import annotations

from tiles.kernels.spec import TOKENS, Argument, Problem


def arguments(problem: Problem) -> tuple[Argument, ...]:
    """forward: x, phi -> z, s;  backward: x, phi, dz, ds -> dx, dphi."""
    n, width, outputs, fan_in = problem.streams, problem.width, problem.outputs, problem.fan_in
    x = Argument("x", (TOKENS, n, width), problem.dtype, "input")
    phi = Argument("phi", (outputs, fan_in), "float32", "input")
    if problem.direction == "forward":
        z = Argument("z", (TOKENS, outputs), "float32", "output")
        return (x, phi, z, Argument("s", (TOKENS,), "float32", "output"))
    return (
        x,
        phi,
        Argument("dz", (TOKENS, outputs), "float32", "input"),
        Argument("ds", (TOKENS,), "float32", "input"),
        Argument("dx", (TOKENS, n, width), problem.dtype, "output"),
        Argument("dphi", (outputs, fan_in), "float32", "partial"),
    )
