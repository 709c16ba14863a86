"""aggregate and merge in plain torch (docs/design.md, "The maths"), and their closed-form backwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tiles.kernels.apply.signature import merge_arguments
from tiles.kernels.reference_inputs import draw, fresh, in_order, uniform, wide
from tiles.kernels.spec import Problem


def aggregate_forward(problem: Problem, values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """u = Σ_i pre_i x_i: x [T, n, C], pre [T, n] -> u [T, C]."""
    x, pre = values["x"], values["pre"]
    return {"u": torch.einsum("ti,tic->tc", pre, wide(x, pre)).to(x.dtype)}


def aggregate_backward(problem: Problem, values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """dx_i = pre_i du, dpre_i = ⟨du, x_i⟩."""
    x, pre = values["x"], values["pre"]
    du = wide(values["du"], pre)
    dx = torch.einsum("ti,tc->tic", pre, du).to(x.dtype)
    return {"dx": dx, "dpre": torch.einsum("tc,tic->ti", du, wide(x, pre))}


def merge_forward(problem: Problem, values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """x'_i = Σ_j res_ij x_j + post_i f: x [T, n, C], f [T, C], res [T, n, n], post [T, n] -> out [T, n, C]."""
    x, f, post = (values[name] for name in ("x", "f", "post"))
    mixed = wide(x, post)
    if problem.mixes:
        mixed = torch.einsum("tij,tjc->tic", values["res"], mixed)
    return {"out": (mixed + post[:, :, None] * wide(f, post)[:, None, :]).to(x.dtype)}


def merge_backward(problem: Problem, values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """dx_j = Σ_i res_ij g_i, df = Σ_i post_i g_i, dres_ij = ⟨g_i, x_j⟩, dpost_i = ⟨g_i, f⟩."""
    f, post = values["f"], values["post"]
    g = wide(values["g"], post)
    gradients = {
        "df": torch.einsum("ti,tic->tc", post, g).to(f.dtype),
        "dpost": torch.einsum("tic,tc->ti", g, wide(f, post)),
    }
    if problem.mixes:
        x, res = values["x"], values["res"]
        gradients["dx"] = torch.einsum("tij,tic->tjc", res, g).to(x.dtype)
        gradients["dres"] = torch.einsum("tic,tjc->tij", g, wide(x, res))
    return gradients


def aggregate_inputs(problem: Problem, tokens: int, seed: int) -> dict[str, Any]:
    """Streams of unit variance and weights in (0, 1)."""
    random, n, width, dtype = fresh(seed), problem.streams, problem.width, problem.dtype
    values = {
        "x": draw(random, dtype, tokens, n, width),
        "pre": uniform(random, tokens, n),
    }
    if problem.direction == "backward":
        values["du"] = draw(random, dtype, tokens, width)
    return values


def merge_inputs(problem: Problem, tokens: int, seed: int) -> dict[str, Any]:
    """Streams of unit variance and an asymmetric res with rows that sum to one."""
    random, n, width, dtype = fresh(seed), problem.streams, problem.width, problem.dtype
    values = {
        "x": draw(random, dtype, tokens, n, width),
        "f": draw(random, dtype, tokens, width),
        "res": draw(random, "float32", tokens, n, n).softmax(-1),
        "post": 2 * uniform(random, tokens, n),
    }
    if problem.direction == "backward":
        values["g"] = draw(random, dtype, tokens, n, width)
    return in_order(values, merge_arguments(problem))
