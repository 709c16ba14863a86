"""The arguments of the kernels aggregate and merge, in call order."""

from __future__ import annotations

from tiles.kernels.arguments import gates, mixing, row, streams
from tiles.kernels.spec import Argument, Problem


def aggregate_arguments(problem: Problem) -> tuple[Argument, ...]:
    """forward: x, pre -> u;  backward: x, pre, du -> dx, dpre."""
    given = (streams("x", problem, "input"), gates("pre", problem, "input"))
    if problem.direction == "forward":
        return (*given, row("u", problem, "output"))
    results = (streams("dx", problem, "output"), gates("dpre", problem, "output"))
    return (*given, row("du", problem, "input"), *results)


def merge_arguments(problem: Problem) -> tuple[Argument, ...]:
    """forward: x, f, res, post -> out;  backward: x, f, res, post, g -> dx, df, dres, dpost.

    Where res is the identity, backward: f, post, g -> df, dpost, as g is dx.
    """
    x, f, post = (streams("x", problem, "input"),), row("f", problem, "input"), gates("post", problem, "input")
    if problem.direction == "forward":
        return (*x, f, *mixing("res", problem, "input"), post, streams("out", problem, "output"))
    return (
        *(x if problem.mixes else ()),
        f,
        *mixing("res", problem, "input"),
        post,
        streams("g", problem, "input"),
        *((streams("dx", problem, "output"),) if problem.mixes else ()),
        row("df", problem, "output"),
        *mixing("dres", problem, "output"),
        gates("dpost", problem, "output"),
    )
