"""The arguments of the kernels pre and step, in call order.

z and s are results of the forward that the backward takes back: they save it from reading all columns of x twice.
"""

from __future__ import annotations

from tiles.kernels.spec import TOKENS, Argument, Problem, Role


def _parameters(problem: Problem) -> tuple[Argument, ...]:
    return (
        Argument("phi", (problem.outputs, problem.fan_in), "float32", "input"),
        Argument("alpha", (3,), "float32", "input"),
        Argument("bias", (problem.outputs,), "float32", "input"),
    )


def _parameter_gradients(problem: Problem) -> tuple[Argument, ...]:
    return (
        Argument("dphi", (problem.outputs, problem.fan_in), "float32", "partial"),
        Argument("dalpha", (3,), "float32", "partial"),
        Argument("dbias", (problem.outputs,), "float32", "partial"),
    )


def _streams(name: str, problem: Problem, role: Role) -> Argument:
    return Argument(name, (TOKENS, problem.streams, problem.width), problem.dtype, role)


def _row(name: str, problem: Problem, role: Role) -> Argument:
    return Argument(name, (TOKENS, problem.width), problem.dtype, role)


def _post(name: str, problem: Problem, role: Role) -> Argument:
    return Argument(name, (TOKENS, problem.streams), "float32", role)


def _res(name: str, problem: Problem, role: Role) -> Argument:
    return Argument(name, (TOKENS, problem.streams, problem.streams), "float32", role)


def _projected(problem: Problem, role: Role) -> tuple[Argument, ...]:
    return (
        Argument("z", (TOKENS, problem.outputs), "float32", role),
        Argument("s", (TOKENS,), "float32", role),
    )


EPS = Argument("eps", (), "float32", "scalar")


def pre(problem: Problem) -> tuple[Argument, ...]:
    """forward: x, phi, alpha, bias, eps -> u, post, res, z, s;
    backward: x, phi, alpha, bias, z, s, du, dpost, dres, eps, dx (added to) -> dx, dphi, dalpha, dbias."""
    x, parameters = _streams("x", problem, "input"), _parameters(problem)
    if problem.direction == "forward":
        results = (_row("u", problem, "output"), _post("post", problem, "output"), _res("res", problem, "output"))
        return (x, *parameters, EPS, *results, *_projected(problem, "output"))
    return (
        x,
        *parameters,
        *_projected(problem, "input"),
        _row("du", problem, "input"),
        _post("dpost", problem, "input"),
        _res("dres", problem, "input"),
        EPS,
        _streams("dx", problem, "updated"),
        *_parameter_gradients(problem),
    )


def step(problem: Problem) -> tuple[Argument, ...]:
    """forward: x, f, post, res, phi, alpha, bias, eps -> x_next, u, post_next, res_next, z, s;
    backward: x, f, post, res, phi, alpha, bias, z, s, dx_next, du, dpost_next, dres_next, eps
    -> dx, df, dpost, dres, dphi, dalpha, dbias."""
    given = (
        _streams("x", problem, "input"),
        _row("f", problem, "input"),
        _post("post", problem, "input"),
        _res("res", problem, "input"),
        *_parameters(problem),
    )
    if problem.direction == "forward":
        return (
            *given,
            EPS,
            _streams("x_next", problem, "output"),
            _row("u", problem, "output"),
            _post("post_next", problem, "output"),
            _res("res_next", problem, "output"),
            *_projected(problem, "output"),
        )
    return (
        *given,
        *_projected(problem, "input"),
        _streams("dx_next", problem, "input"),
        _row("du", problem, "input"),
        _post("dpost_next", problem, "input"),
        _res("dres_next", problem, "input"),
        EPS,
        _streams("dx", problem, "output"),
        _row("df", problem, "output"),
        _post("dpost", problem, "output"),
        _res("dres", problem, "output"),
        *_parameter_gradients(problem),
    )
