"""coefficients and Sinkhorn in plain torch (docs/design.md, "The maths"), and their closed-form backwards.

Sinkhorn runs in the log domain here, so that logits of any finite size are exact to rounding: the kernels are held
against this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tiles.kernels.reference_inputs import draw, fresh, uniform
from tiles.kernels.spec import Problem


def sinkhorn(logits: torch.Tensor, rounds: int) -> list[torch.Tensor]:
    """logits [..., n, n] -> the log of the matrix after each half round (columns first, rows last)."""
    steps = [logits]
    for _ in range(rounds):
        steps.append(steps[-1] - steps[-1].logsumexp(-2, keepdim=True))
        steps.append(steps[-1] - steps[-1].logsumexp(-1, keepdim=True))
    return steps


def sinkhorn_vjp(logits: torch.Tensor, rounds: int, grad: torch.Tensor) -> torch.Tensor:
    """The gradient of the logits from that of res, both [..., n, n]: back through the half rounds."""
    steps = sinkhorn(logits, rounds)
    grad = grad * steps[-1].exp()
    for half in range(2 * rounds, 0, -1):
        axis = -1 if half % 2 == 0 else -2
        grad = grad - steps[half].exp() * grad.sum(axis, keepdim=True)
    return grad


def _groups(problem: Problem, packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[..., N] -> pre [..., n], post [..., n], res [..., n²]."""
    n = problem.streams
    return packed.split((n, n, n * n), dim=-1)


def _per_group(problem: Problem, alpha: torch.Tensor) -> torch.Tensor:
    """alpha [3] -> [N], each group's gate at its outputs."""
    n = problem.streams
    return torch.cat((alpha[0].expand(n), alpha[1].expand(n), alpha[2].expand(n * n)))


def _logits(problem: Problem, values: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """h [T, N], r [T, 1] and alpha per output [N]."""
    r = torch.rsqrt(values["s"] / problem.fan_in + values["eps"])[:, None]
    gate = _per_group(problem, values["alpha"])
    return gate * values["z"] * r + values["bias"], r, gate


def forward(problem: Problem, values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """z [T, N], s [T], alpha [3], bias [N] -> pre [T, n], post [T, n], res [T, n, n]."""
    n = problem.streams
    h_pre, h_post, h_res = _groups(problem, _logits(problem, values)[0])
    res = sinkhorn(h_res.unflatten(-1, (n, n)), problem.rounds)[-1].exp()
    return {"pre": h_pre.sigmoid(), "post": 2 * h_post.sigmoid(), "res": res}


def backward(problem: Problem, values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Gradients of z, s, alpha and bias from those of pre, post and res (docs/design.md, "The maths")."""
    n, z = problem.streams, values["z"]
    h, r, gate = _logits(problem, values)
    h_pre, h_post, h_res = _groups(problem, h)
    pre, post = h_pre.sigmoid(), 2 * h_post.sigmoid()
    dh_pre = values["dpre"] * pre * (1 - pre)
    dh_post = values["dpost"] * post * (1 - post / 2)
    dh_res = sinkhorn_vjp(h_res.unflatten(-1, (n, n)), problem.rounds, values["dres"])
    dh = torch.cat((dh_pre, dh_post, dh_res.flatten(1)), dim=1)
    q = gate * dh
    dr = (q * z).sum(1)
    dalpha = torch.stack([group.sum() for group in _groups(problem, dh * z * r)])
    ds = -0.5 * r[:, 0] ** 3 * dr / problem.fan_in
    return {"dz": q * r, "ds": ds, "dalpha": dalpha, "dbias": dh.sum(0)}


def sinkhorn_forward(problem: Problem, values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """logits [T, n, n] -> res [T, n, n]."""
    return {"res": sinkhorn(values["logits"], problem.rounds)[-1].exp()}


def sinkhorn_backward(problem: Problem, values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """logits, dres -> dlogits, all [T, n, n]."""
    return {"dlogits": sinkhorn_vjp(values["logits"], problem.rounds, values["dres"])}


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
    return values | {"eps": 1e-6}


def sinkhorn_inputs(problem: Problem, tokens: int, seed: int) -> dict[str, Any]:
    """Logits of a few units, asymmetric."""
    n = problem.streams
    random = fresh(seed)
    logits = 3 * draw(random, "float32", tokens, n, n)
    if problem.direction == "forward":
        return {"logits": logits}
    return {"logits": logits, "dres": draw(random, "float32", tokens, n, n)}
