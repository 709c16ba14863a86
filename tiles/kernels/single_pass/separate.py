"""single_pass as the kernels that it joins, one after the other: what a tuner compares it with. `run` runs one kernel:
(op, direction, its inputs) -> its results.
"""

from __future__ import annotations

import torch

from tiles.kernels.spec import Direction, Results, Run

FORWARD: tuple[tuple[str, Direction], ...] = (
    ("merge", "forward"),
    ("aggregate", "forward"),
    ("project", "forward"),
    ("coefficients", "forward"),
)
BACKWARD: tuple[tuple[str, Direction], ...] = (
    ("merge", "forward"),
    ("coefficients", "backward"),
    ("aggregate", "backward"),
    ("project", "backward"),
    ("merge", "backward"),
)


def forward(
    run: Run,
    x: torch.Tensor,
    f: torch.Tensor,
    pre: torch.Tensor,
    post: torch.Tensor,
    res: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    hc_eps: float,
    post_scale: float,
) -> Results:
    """-> x_next, u, pre_next, post_next, res_next, z, s."""
    (x_next,) = run("merge", "forward", (x, f, res, post))
    (u,) = run("aggregate", "forward", (x_next, pre))
    z, s = run("project", "forward", (x_next, phi))
    return (x_next, u, *run("coefficients", "forward", (z, s, alpha, bias, eps, hc_eps, post_scale)), z, s)


def backward(
    run: Run,
    x: torch.Tensor,
    f: torch.Tensor,
    pre: torch.Tensor,
    post: torch.Tensor,
    res: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    z: torch.Tensor,
    s: torch.Tensor,
    dx_next: torch.Tensor,
    du: torch.Tensor,
    dpre_next: torch.Tensor,
    dpost_next: torch.Tensor,
    dres_next: torch.Tensor,
    eps: float,
    hc_eps: float,
    post_scale: float,
) -> Results:
    """-> dx, df, dpre, dpost, dres, dphi, dalpha, dbias."""
    (x_next,) = run("merge", "forward", (x, f, res, post))
    upstream = (dpre_next, dpost_next, dres_next)
    given = (z, s, alpha, bias, *upstream, eps, hc_eps, post_scale)
    dz, ds, dalpha, dbias = run("coefficients", "backward", given)
    g, dpre = run("aggregate", "backward", (x_next, pre, du))
    through_z, dphi = run("project", "backward", (x_next, phi, dz, ds))
    dx, df, dres, dpost = run("merge", "backward", (x, f, res, post, g.add_(dx_next).add_(through_z)))
    return dx, df, dpre, dpost, dres, dphi, dalpha, dbias
