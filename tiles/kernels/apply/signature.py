"""The arguments of the kernels aggregate and merge, in call order."""

from __future__ import annotations

from tiles.kernels.spec import TOKENS, Argument, Problem


def _streams(name: str, problem: Problem, role: str) -> Argument:
    return Argument(name, (TOKENS, problem.streams, problem.width), problem.dtype, role)  # type: ignore[arg-type]


def _row(name: str, problem: Problem, role: str) -> Argument:
    return Argument(name, (TOKENS, problem.width), problem.dtype, role)  # type: ignore[arg-type]


def _weights(name: str, role: str, *shape: int) -> Argument:
    return Argument(name, (TOKENS, *shape), "float32", role)  # type: ignore[arg-type]


def aggregate_arguments(problem: Problem) -> tuple[Argument, ...]:
    """forward: x, pre -> u;  backward: x, pre, du -> dx, dpre."""
    n = problem.streams
    given = (_streams("x", problem, "input"), _weights("pre", "input", n))
    if problem.direction == "forward":
        return (*given, _row("u", problem, "output"))
    return (
        *given,
        _row("du", problem, "input"),
        _streams("dx", problem, "output"),
        _weights("dpre", "output", n),
    )


def merge_arguments(problem: Problem) -> tuple[Argument, ...]:
    """forward: x, f, res, post -> out;  backward: x, f, res, post, g -> dx, df, dres, dpost."""
    n = problem.streams
    given = (
        _streams("x", problem, "input"),
        _row("f", problem, "input"),
        _weights("res", "input", n, n),
        _weights("post", "input", n),
    )
    if problem.direction == "forward":
        return (*given, _streams("out", problem, "output"))
    return (
        *given,
        _streams("g", problem, "input"),
        _streams("dx", problem, "output"),
        _row("df", problem, "output"),
        _weights("dres", "output", n, n),
        _weights("dpost", "output", n),
    )
