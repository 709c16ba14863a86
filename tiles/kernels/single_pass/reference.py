"""single_pass in plain torch: the references of the ops that it joins (DeepSeek-V4.1's report, equation 6)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from tiles.kernels.apply import reference as apply
from tiles.kernels.coefficients import reference as coefficients
from tiles.kernels.fused import norm_reference as norm
from tiles.kernels.project import reference as project
from tiles.kernels.reference_inputs import draw, fresh, in_order, uniform
from tiles.kernels.single_pass import signature
from tiles.kernels.spec import Problem

Values = Mapping[str, Any]


def forward(problem: Problem, values: Values) -> dict[str, torch.Tensor]:
    """x' = res x + post f;  u' = pre · x';  and the maps of x'."""
    x_next = apply.merge_forward(problem, values)["out"]
    projected = project.forward(problem, {"x": x_next, "phi": values["phi"]})
    maps = coefficients.forward(problem, {**values, **projected})
    u = apply.aggregate_forward(problem, {"x": x_next, "pre": values["pre"]})["u"]
    u = norm.forward(problem, values, u)
    return {"x_next": x_next, "u": u, **{f"{name}_next": value for name, value in maps.items()}, **projected}


def backward(problem: Problem, values: Values) -> dict[str, torch.Tensor]:
    """g = dx' + pre·du + dz·phi + 2 x' ds;  dpre_i = ⟨du, x'_i⟩;  dphi = dzᵀ·x';  then merge's backward with g."""
    x_next = apply.merge_forward(problem, values)["out"]
    upstream = {name: values[f"{name}_next"] for name in ("dpre", "dpost", "dres") if f"{name}_next" in values}
    logits = coefficients.backward(problem, {**values, **upstream})
    pre, phi = values["pre"], values["phi"]
    # In the parameters' precision, so that dx is rounded once.
    wide = {"x": x_next.to(phi.dtype), "phi": phi, "dz": logits["dz"], "ds": logits["ds"]}
    projected = project.backward(problem, wide)
    du, of_norm = norm.backward(problem, values, x_next, pre)
    through_u = apply.aggregate_backward(problem, {"x": wide["x"], "pre": pre, "du": du})
    g = values["dx_next"] + through_u["dx"] + projected["dx"]
    merged = apply.merge_backward(problem, {**values, "g": g})
    parameters = {"dphi": projected["dphi"], "dalpha": logits["dalpha"], "dbias": logits["dbias"], **of_norm}
    return {"dx": g.to(values["x"].dtype), **merged, "dpre": through_u["dpre"], **parameters}


def inputs(problem: Problem, tokens: int, seed: int) -> dict[str, Any]:
    """The inputs of merge, gates for its result, and parameters with biases that make res asymmetric."""
    values = apply.merge_inputs(replace(problem, direction="forward"), tokens, seed)
    random, n, width, dtype = fresh(seed + 1), problem.streams, problem.width, problem.dtype
    values |= {
        "pre": uniform(random, tokens, n),
        "phi": draw(random, "float32", problem.outputs, problem.fan_in) / problem.fan_in**0.5,
        "alpha": 0.5 * draw(random, "float32", problem.maps),
        "bias": draw(random, "float32", problem.outputs),
        **coefficients.scalars(seed),
        **norm.inputs(problem, seed),
    }
    if problem.direction == "backward":
        x_next = apply.merge_forward(problem, values)["out"]
        values |= project.forward(problem, {"x": x_next, "phi": values["phi"]})
        values |= {
            "dx_next": draw(random, dtype, tokens, n, width),
            "du": draw(random, dtype, tokens, width),
            "dpre_next": draw(random, "float32", tokens, n),
            "dpost_next": draw(random, "float32", tokens, n),
            "dres_next": draw(random, "float32", tokens, n, n),
        }
    return in_order(values, signature.single_pass(problem))
