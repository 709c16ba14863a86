"""The RMSNorm of a sublayer's input in plain torch, and its closed-form backward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tiles.kernels.reference_inputs import draw, fresh, uniform, wide
from tiles.kernels.spec import Problem

Values = Mapping[str, Any]


def forward(problem: Problem, values: Values, u: torch.Tensor) -> torch.Tensor:
    """u [T, C] as the sublayer gets it: where there is a norm, u·r·norm_weight with r = rsqrt(mean(u²) + norm_eps)."""
    if not problem.normalises:
        return u
    weight = values["norm_weight"]
    return (wide(u, weight) * _scale(wide(u, weight), values) * weight).to(u.dtype)


def backward(
    problem: Problem, values: Values, x: torch.Tensor, pre: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The gradient of u before its norm from `du`, that of the sublayer's input, and that of norm_weight by its name.

    x [T, n, C] and pre [T, n] make u. With û = u·r and g = norm_weight·du: r·(g − û·mean(û·g)) and Σ_t du·û.
    """
    if not problem.normalises:
        return values["du"], {}
    weight = values["norm_weight"]
    u, du = torch.einsum("ti,tic->tc", pre, wide(x, pre)), wide(values["du"], weight)
    scale, of_unit = _scale(u, values), weight * du
    unit = u * scale
    grad = scale * (of_unit - unit * (unit * of_unit).mean(1, keepdim=True))
    return grad, {"dnorm_weight": (du * unit).sum(0)}


def _scale(u: torch.Tensor, values: Values) -> torch.Tensor:
    """r [T, 1]."""
    return torch.rsqrt(u.square().mean(1, keepdim=True) + values["norm_eps"])


def inputs(problem: Problem, seed: int) -> dict[str, Any]:
    """Weights around one, and an eps of the usual order or one that shows."""
    if not problem.normalises:
        return {}
    random = fresh(seed + 3)
    weight = 0.5 + uniform(random, problem.width) + 0.1 * draw(random, "float32", problem.width)
    return {"norm_weight": weight, "norm_eps": (1e-6, 1e-2)[seed % 2]}
