"""project in plain torch: z = x̄·phiᵀ and s = Σ x̄² (docs/design.md, "The maths"), and its closed-form backward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tiles.kernels.reference_inputs import draw, fresh, wide
from tiles.kernels.spec import Problem


def forward(problem: Problem, values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """x [T, n, C], phi [N, nC] -> z [T, N], s [T]."""
    phi = values["phi"]
    rows = wide(values["x"], phi).flatten(1)
    return {"z": rows @ phi.T, "s": rows.square().sum(1)}


def backward(problem: Problem, values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """dx = dz·phi + 2 x̄ ds [T, n, C], dphi = dzᵀ·x̄ [N, nC]."""
    x, phi, dz, ds = (values[name] for name in ("x", "phi", "dz", "ds"))
    rows = wide(x, phi).flatten(1)
    dx = dz @ phi + 2 * rows * ds[:, None]
    return {"dx": dx.view(x.shape).to(x.dtype), "dphi": dz.T @ rows}


def inputs(problem: Problem, tokens: int, seed: int) -> dict[str, Any]:
    """Streams of unit variance; phi scaled so that z is of order one."""
    random = fresh(seed)
    x = draw(random, problem.dtype, tokens, problem.streams, problem.width)
    phi = draw(random, "float32", problem.outputs, problem.fan_in) / problem.fan_in**0.5
    if problem.direction == "forward":
        return {"x": x, "phi": phi}
    dz = draw(random, "float32", tokens, problem.outputs)
    return {"x": x, "phi": phi, "dz": dz, "ds": draw(random, "float32", tokens)}
