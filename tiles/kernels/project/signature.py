"""The arguments of project's kernels, in call order."""

from __future__ import annotations

from tiles.kernels.arguments import phi, projected, streams
from tiles.kernels.spec import Argument, Problem


def arguments(problem: Problem) -> tuple[Argument, ...]:
    """forward: x, phi -> z, s;  backward: x, phi, dz, ds -> dx, dphi."""
    given = (streams("x", problem, "input"), phi("phi", problem, "input"))
    if problem.direction == "forward":
        return (*given, *projected("z", "s", problem, "output"))
    results = (streams("dx", problem, "output"), phi("dphi", problem, "partial"))
    return (*given, *projected("dz", "ds", problem, "input"), *results)
