"""The arguments of the kernels of single_pass, in call order.

`post` and `res` are the maps of the sublayer that returned f; `pre` is the one that comes with them, and weighs x'.
The maps of x' itself (`pre_next`, `post_next`, `res_next`) are for the next boundary. The scalars are MAP_SCALARS: eps,
hc_eps, post_scale. z and s are results of the forward that the backward takes back. Where res is the identity, it is
no argument, nor are its gradients. Where u is normalised, norm_weight comes after bias, norm_eps after the scalars, and
dnorm_weight after dbias.
"""

from __future__ import annotations

from tiles.kernels.arguments import affine, gates, mixing, norm_weight, phi, projected, row, scalars, streams
from tiles.kernels.spec import Argument, Problem


def single_pass(problem: Problem) -> tuple[Argument, ...]:
    """forward: x, f, pre, post, res, phi, alpha, bias, scalars -> x_next, u, pre_next, post_next, res_next, z, s;
    backward: x, f, pre, post, res, phi, alpha, bias, z, s, dx_next, du, dpre_next, dpost_next, dres_next, scalars
    -> dx, df, dpre, dpost, dres, dphi, dalpha, dbias."""
    given = (
        streams("x", problem, "input"),
        row("f", problem, "input"),
        gates("pre", problem, "input"),
        gates("post", problem, "input"),
        *mixing("res", problem, "input"),
        phi("phi", problem, "input"),
        *affine("alpha", "bias", problem, "input"),
        *norm_weight("norm_weight", problem, "input"),
    )
    if problem.direction == "forward":
        return (
            *given,
            *scalars(problem),
            streams("x_next", problem, "output"),
            row("u", problem, "output"),
            gates("pre_next", problem, "output"),
            gates("post_next", problem, "output"),
            *mixing("res_next", problem, "output"),
            *projected("z", "s", problem, "output"),
        )
    return (
        *given,
        *projected("z", "s", problem, "input"),
        streams("dx_next", problem, "input"),
        row("du", problem, "input"),
        gates("dpre_next", problem, "input"),
        gates("dpost_next", problem, "input"),
        *mixing("dres_next", problem, "input"),
        *scalars(problem),
        streams("dx", problem, "output"),
        row("df", problem, "output"),
        gates("dpre", problem, "output"),
        gates("dpost", problem, "output"),
        *mixing("dres", problem, "output"),
        phi("dphi", problem, "partial"),
        *affine("dalpha", "dbias", problem, "partial"),
        *norm_weight("dnorm_weight", problem, "partial"),
    )
