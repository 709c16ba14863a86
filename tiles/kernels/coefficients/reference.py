"""coefficients and Sinkhorn in plain torch (docs/design.md, "The maths"), and their closed-form backwards.

Sinkhorn runs in the log domain here, so that logits of any finite size are exact to rounding: the kernels are held
against this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from tiles.kernels.reference_inputs import draw, fresh, uniform
from tiles.kernels.spec import Problem


def sinkhorn(logits: torch.Tensor, rounds: int, hc_eps: float = 0.0) -> list[torch.Tensor]:
    """logits [..., n, n] -> the log of the matrix after each half round (columns first, rows last).

    The first half round is a softmax, given without the hc_eps that is then added to it; hc_eps is also added to the
    sums of all later ones.
    """
    logits = logits - logits.amax(-2, keepdim=True).detach()  # large ones would round in the difference
    steps = [logits, logits - logits.logsumexp(-2, keepdim=True)]
    log = _plus(steps[1], hc_eps)
    for half in range(1, 2 * rounds):
        log = log - _plus(log.logsumexp(-1 if half % 2 else -2, keepdim=True), hc_eps)
        steps.append(log)
    return steps


def _plus(log: torch.Tensor, hc_eps: float) -> torch.Tensor:
    """log(e^log + hc_eps)."""
    return torch.logaddexp(log, torch.full_like(log, math.log(hc_eps))) if hc_eps else log


def sinkhorn_vjp(logits: torch.Tensor, rounds: int, grad: torch.Tensor, hc_eps: float = 0.0) -> torch.Tensor:
    """The gradient of the logits from that of res, both [..., n, n]: back through the half rounds."""
    steps = sinkhorn(logits, rounds, hc_eps)
    grad = grad * steps[-1].exp()
    for half in range(2 * rounds, 0, -1):
        axis = -1 if half % 2 == 0 else -2
        if half == 1 and hc_eps:
            grad = grad * (steps[1] - _plus(steps[1], hc_eps)).exp()
        grad = grad - steps[half].exp() * grad.sum(axis, keepdim=True)
    return grad


def _groups(problem: Problem, packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[..., N] -> pre [..., n], post [..., n] and, where it is not the identity, res [..., n²]."""
    n = problem.streams
    return packed.split((n, n, n * n)[: problem.maps], dim=-1)


def _per_group(problem: Problem, alpha: torch.Tensor) -> torch.Tensor:
    """alpha [3] or [2] -> [N], each group's gate at its outputs."""
    n = problem.streams
    return torch.cat([gate.expand(size) for gate, size in zip(alpha, (n, n, n * n), strict=False)])


def _logits(problem: Problem, values: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """h [T, N], r [T, 1] and alpha per output [N]."""
    r = torch.rsqrt(values["s"] / problem.fan_in + values["eps"])[:, None]
    gate = _per_group(problem, values["alpha"])
    return gate * values["z"] * r + values["bias"], r, gate


def forward(problem: Problem, values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """z [T, N], s [T], alpha [3], bias [N] -> pre [T, n], post [T, n], res [T, n, n]; no res where it is the identity,
    and hc_eps is added to post (Hunyuan-V4)."""
    n, hc_eps = problem.streams, values["hc_eps"]
    h_pre, h_post, *h_res = _groups(problem, _logits(problem, values)[0])
    maps = {"pre": h_pre.sigmoid() + hc_eps, "post": values["post_scale"] * h_post.sigmoid()}
    if not problem.mixes:
        return {**maps, "post": maps["post"] + hc_eps}
    return {**maps, "res": sinkhorn(h_res[0].unflatten(-1, (n, n)), problem.rounds, hc_eps)[-1].exp()}


def backward(problem: Problem, values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Gradients of z, s, alpha and bias from those of pre, post and res (docs/design.md, "The maths")."""
    n, z = problem.streams, values["z"]
    h, r, gate = _logits(problem, values)
    h_pre, h_post, *h_res = _groups(problem, h)
    pre, post = h_pre.sigmoid(), h_post.sigmoid()
    dh_pre = values["dpre"] * pre * (1 - pre)
    dh_post = values["dpost"] * values["post_scale"] * post * (1 - post)
    dh_res = []
    if problem.mixes:
        logits = h_res[0].unflatten(-1, (n, n))
        dh_res = [sinkhorn_vjp(logits, problem.rounds, values["dres"], values["hc_eps"]).flatten(1)]
    dh = torch.cat((dh_pre, dh_post, *dh_res), dim=1)
    q = gate * dh
    dr = (q * z).sum(1)
    dalpha = torch.stack([group.sum() for group in _groups(problem, dh * z * r)])
    ds = -0.5 * r[:, 0] ** 3 * dr / problem.fan_in
    return {"dz": q * r, "ds": ds, "dalpha": dalpha, "dbias": dh.sum(0)}


def sinkhorn_forward(problem: Problem, values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """logits [T, n, n] -> res [T, n, n]."""
    return {"res": sinkhorn(values["logits"], problem.rounds, values["hc_eps"])[-1].exp()}


def sinkhorn_backward(problem: Problem, values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """logits, dres -> dlogits, all [T, n, n]."""
    return {"dlogits": sinkhorn_vjp(values["logits"], problem.rounds, values["dres"], values["hc_eps"])}


def inputs(problem: Problem, tokens: int, seed: int) -> dict[str, Any]:
    """What project would hand over for streams of unit variance, with gates and biases that make res asymmetric."""
    n, outputs = problem.streams, problem.outputs
    random = fresh(seed)
    values: dict[str, Any] = {
        "z": draw(random, "float32", tokens, outputs),
        "s": problem.fan_in * (0.5 + uniform(random, tokens)),
        "alpha": draw(random, "float32", 3),
        "bias": draw(random, "float32", outputs),
    }
    if problem.direction == "backward":
        values["dpre"] = draw(random, "float32", tokens, n)
        values["dpost"] = draw(random, "float32", tokens, n)
        values["dres"] = draw(random, "float32", tokens, n, n)
    return values | scalars(seed)


def scalars(seed: int) -> dict[str, float]:
    """eps, hc_eps and post_scale: the paper's, DeepSeek-V4's, and others that are far from both."""
    hc_eps, post_scale = ((0.0, 2.0), (1e-6, 2.0), (1e-2, 1.25))[seed % 3]
    return {"eps": 1e-6, "hc_eps": hc_eps, "post_scale": post_scale}


def sinkhorn_inputs(problem: Problem, tokens: int, seed: int) -> dict[str, Any]:
    """Logits of a few units, asymmetric."""
    n = problem.streams
    random = fresh(seed)
    logits = 3 * draw(random, "float32", tokens, n, n)
    hc_eps = scalars(seed)["hc_eps"]
    if problem.direction == "forward":
        return {"logits": logits, "hc_eps": hc_eps}
    return {"logits": logits, "dres": draw(random, "float32", tokens, n, n), "hc_eps": hc_eps}
