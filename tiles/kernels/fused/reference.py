"""pre and step in plain torch: the references of the ops that they join, one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from tiles.kernels.apply import reference as apply
from tiles.kernels.coefficients import reference as coefficients
from tiles.kernels.fused import norm_reference as norm
from tiles.kernels.fused import signature
from tiles.kernels.project import reference as project
from tiles.kernels.reference_inputs import draw, fresh, in_order
from tiles.kernels.spec import Problem

Values = Mapping[str, Any]


def pre_forward(problem: Problem, values: Values) -> dict[str, torch.Tensor]:
    """x [T, n, C], phi [N, nC], alpha [3], bias [N] -> u [T, C], post [T, n], res [T, n, n], z [T, N], s [T]."""
    projected = project.forward(problem, values)
    gates = coefficients.forward(problem, {**values, **projected})
    u = apply.aggregate_forward(problem, {"x": values["x"], "pre": gates.pop("pre")})["u"]
    return {"u": norm.forward(problem, values, u), **gates, **projected}


def pre_backward(problem: Problem, values: Values) -> dict[str, torch.Tensor]:
    """dx [T, n, C], added to the dx that is given where one is, dphi [N, nC], dalpha [3], dbias [N]."""
    x, gate = values["x"], coefficients.forward(problem, values)["pre"]
    du, of_norm = norm.backward(problem, values, x, gate)
    aggregated = apply.aggregate_backward(problem, {"x": x, "pre": gate, "du": du})
    logits = coefficients.backward(problem, {**values, "dpre": aggregated["dpre"]})
    # In the parameters' precision, so that dx is rounded once.
    wide = {"x": x.to(values["phi"].dtype), "phi": values["phi"], "dz": logits["dz"], "ds": logits["ds"]}
    projected = project.backward(problem, wide)
    dx = torch.einsum("ti,tc->tic", gate, du.to(gate.dtype)) + projected["dx"]
    more = values.get("dx")
    return {
        "dx": (dx if more is None else more + dx).to(x.dtype),
        "dphi": projected["dphi"],
        "dalpha": logits["dalpha"],
        "dbias": logits["dbias"],
        **of_norm,
    }


def step_forward(problem: Problem, values: Values) -> dict[str, torch.Tensor]:
    """x, f, post, res and the next block's phi, alpha, bias -> x_next, and `pre` of it."""
    x_next = apply.merge_forward(problem, values)["out"]
    after = pre_forward(problem, {**values, "x": x_next})
    after |= {f"{name}_next": after.pop(name) for name in ("post", "res") if name in after}
    return {"x_next": x_next, **after}


def step_backward(problem: Problem, values: Values) -> dict[str, torch.Tensor]:
    """dx, df, dpost, dres and the gradients of the next block's parameters."""
    x_next = apply.merge_forward(problem, values)["out"]
    after = {name: values[f"{name}_next"] for name in ("dx", "dpost", "dres") if f"{name}_next" in values}
    gradients = pre_backward(problem, {**values, **after, "x": x_next})
    return gradients | apply.merge_backward(problem, {**values, "g": gradients["dx"]})


def pre_inputs(problem: Problem, tokens: int, seed: int) -> dict[str, Any]:
    """Streams of unit variance, biases that make res asymmetric, and alpha of the order that training reaches."""
    random, n, width, dtype = fresh(seed), problem.streams, problem.width, problem.dtype
    values: dict[str, Any] = {
        "x": draw(random, dtype, tokens, n, width),
        "phi": draw(random, "float32", problem.outputs, problem.fan_in) / problem.fan_in**0.5,
        "alpha": 0.5 * draw(random, "float32", problem.maps),
        "bias": draw(random, "float32", problem.outputs),
        **coefficients.scalars(seed),
        **norm.inputs(problem, seed),
    }
    if problem.direction == "backward":
        values |= project.forward(problem, values)
        values |= {
            "du": draw(random, dtype, tokens, width),
            "dpost": draw(random, "float32", tokens, n),
            "dres": draw(random, "float32", tokens, n, n),
            "dx": draw(random, dtype, tokens, n, width),
        }
    return in_order(values, signature.pre(problem))


def step_inputs(problem: Problem, tokens: int, seed: int) -> dict[str, Any]:
    """The inputs of merge, and those of pre for its result."""
    merged = apply.merge_inputs(replace(problem, direction="forward"), tokens, seed)
    values = pre_inputs(replace(problem, direction="forward"), tokens, seed + 1) | merged
    if problem.direction == "backward":
        random, n, width, dtype = fresh(seed + 2), problem.streams, problem.width, problem.dtype
        x_next = apply.merge_forward(problem, merged)["out"]
        values |= project.forward(problem, {"x": x_next, "phi": values["phi"]})
        values |= {
            "dx_next": draw(random, dtype, tokens, n, width),
            "du": draw(random, dtype, tokens, width),
            "dpost_next": draw(random, "float32", tokens, n),
            "dres_next": draw(random, "float32", tokens, n, n),
        }
    return in_order(values, signature.step(problem))
