"""The fused passes pre and step made of the separate kernels: for where those are faster, and to compare with.

Every function takes and gives what the fused kernel of its name does (`tiles.kernels.fused.signature`). `run` runs one
kernel: (op, direction, its inputs) -> its results.
"""

from __future__ import annotations

import torch

from tiles.kernels.spec import Results, Run


def pre_forward(
    run: Run,
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    hc_eps: float,
    post_scale: float,
) -> Results:
    """-> u, post, res, z, s."""
    z, s = run("project", "forward", (x, phi))
    pre, post, res = run("coefficients", "forward", (z, s, alpha, bias, eps, hc_eps, post_scale))
    (u,) = run("aggregate", "forward", (x, pre))
    return u, post, res, z, s


def pre_backward(
    run: Run,
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    z: torch.Tensor,
    s: torch.Tensor,
    du: torch.Tensor,
    dpost: torch.Tensor,
    dres: torch.Tensor,
    eps: float,
    hc_eps: float,
    post_scale: float,
    dx: torch.Tensor | None,
) -> Results:
    """-> dx (added to in place where it is given), dphi, dalpha, dbias."""
    scalars = (eps, hc_eps, post_scale)
    pre = run("coefficients", "forward", (z, s, alpha, bias, *scalars))[0]
    through_u, dpre = run("aggregate", "backward", (x, pre, du))
    dz, ds, dalpha, dbias = run("coefficients", "backward", (z, s, alpha, bias, dpre, dpost, dres, *scalars))
    through_z, dphi = run("project", "backward", (x, phi, dz, ds))
    given = through_u if dx is None else dx.add_(through_u)
    return given.add_(through_z), dphi, dalpha, dbias


def step_forward(
    run: Run,
    x: torch.Tensor,
    f: torch.Tensor,
    post: torch.Tensor,
    res: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    hc_eps: float,
    post_scale: float,
) -> Results:
    """-> x_next, u, post_next, res_next, z, s."""
    (x_next,) = run("merge", "forward", (x, f, res, post))
    return (x_next, *pre_forward(run, x_next, phi, alpha, bias, eps, hc_eps, post_scale))


def step_backward(
    run: Run,
    x: torch.Tensor,
    f: torch.Tensor,
    post: torch.Tensor,
    res: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    z: torch.Tensor,
    s: torch.Tensor,
    dx_next: torch.Tensor,
    du: torch.Tensor,
    dpost_next: torch.Tensor,
    dres_next: torch.Tensor,
    eps: float,
    hc_eps: float,
    post_scale: float,
) -> Results:
    """-> dx, df, dpost, dres, dphi, dalpha, dbias."""
    (x_next,) = run("merge", "forward", (x, f, res, post))
    after = (z, s, du, dpost_next, dres_next, eps, hc_eps, post_scale)
    g, dphi, dalpha, dbias = pre_backward(run, x_next, phi, alpha, bias, *after, dx_next.clone())
    dx, df, dres, dpost = run("merge", "backward", (x, f, res, post, g))
    return dx, df, dpost, dres, dphi, dalpha, dbias
