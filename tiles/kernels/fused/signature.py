"""The arguments of the kernels pre and step, in call order.

The scalars are MAP_SCALARS: eps, hc_eps, post_scale. z and s are results of the forward that the backward takes back:
they save it from reading all columns of x twice. Where res is the identity, it is
no argument, nor are its gradients. Where u is normalised, norm_weight comes after bias, norm_eps after the scalars, and
dnorm_weight after dbias.
"""

from __future__ import annotations

from tiles.kernels.arguments import (
    DX_IS_GIVEN,
    affine,
    gates,
    mixing,
    norm_weight,
    phi,
    projected,
    row,
    scalars,
    streams,
)
from tiles.kernels.spec import Argument, Problem


def next_maps(problem: Problem, of: str = "") -> dict[str, str]:
    """The parameters post_next and res_next (or, `of` "d", their gradients) by the names without the ending."""
    names = (f"{of}post", f"{of}res")[: problem.maps - 1]
    return {name: f"{name}_next" for name in names}


def _parameters(problem: Problem) -> tuple[Argument, ...]:
    maps = (phi("phi", problem, "input"), *affine("alpha", "bias", problem, "input"))
    return (*maps, *norm_weight("norm_weight", problem, "input"))


def _parameter_gradients(problem: Problem) -> tuple[Argument, ...]:
    maps = (phi("dphi", problem, "partial"), *affine("dalpha", "dbias", problem, "partial"))
    return (*maps, *norm_weight("dnorm_weight", problem, "partial"))


def pre(problem: Problem) -> tuple[Argument, ...]:
    """forward: x, phi, alpha, bias, scalars -> u, post, res, z, s;
    backward: x, phi, alpha, bias, z, s, du, dpost, dres, scalars, dx (added to, or None) -> dx, dphi, dalpha, dbias."""
    given = (streams("x", problem, "input"), *_parameters(problem))
    if problem.direction == "forward":
        maps = (gates("post", problem, "output"), *mixing("res", problem, "output"))
        return (*given, *scalars(problem), row("u", problem, "output"), *maps, *projected("z", "s", problem, "output"))
    return (
        *given,
        *projected("z", "s", problem, "input"),
        row("du", problem, "input"),
        gates("dpost", problem, "input"),
        *mixing("dres", problem, "input"),
        *scalars(problem),
        DX_IS_GIVEN,
        streams("dx", problem, "updated"),
        *_parameter_gradients(problem),
    )


def step(problem: Problem) -> tuple[Argument, ...]:
    """forward: x, f, post, res, phi, alpha, bias, scalars -> x_next, u, post_next, res_next, z, s;
    backward: x, f, post, res, phi, alpha, bias, z, s, dx_next, du, dpost_next, dres_next, scalars
    -> dx, df, dpost, dres, dphi, dalpha, dbias."""
    given = (
        streams("x", problem, "input"),
        row("f", problem, "input"),
        gates("post", problem, "input"),
        *mixing("res", problem, "input"),
        *_parameters(problem),
    )
    if problem.direction == "forward":
        return (
            *given,
            *scalars(problem),
            streams("x_next", problem, "output"),
            row("u", problem, "output"),
            gates("post_next", problem, "output"),
            *mixing("res_next", problem, "output"),
            *projected("z", "s", problem, "output"),
        )
    return (
        *given,
        *projected("z", "s", problem, "input"),
        streams("dx_next", problem, "input"),
        row("du", problem, "input"),
        gates("dpost_next", problem, "input"),
        *mixing("dres_next", problem, "input"),
        *scalars(problem),
        streams("dx", problem, "output"),
        row("df", problem, "output"),
        gates("dpost", problem, "output"),
        *mixing("dres", problem, "output"),
        *_parameter_gradients(problem),
    )
