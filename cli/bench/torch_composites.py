"""Composites of the four single ops: pre, the same with a norm, step, single_pass, layer (around an identity sublayer),
a stack of layers.

Their parameters are phi, alpha and bias of each layer in turn; a norm's weight comes last.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cli.bench.torch_ops import OpFunction, variants
from mhc.sublayer_norm import NORM_EPS

SINGLE_OPS = ("project", "coefficients", "aggregate", "merge")
COMPOSITES = ("pre", "pre_norm", "step", "single_pass", "layer", "stack")

STACK_LAYERS = 8

PARAMETERS_PER_LAYER = 3

HALF, SINGLE = "bfloat16 and float16", "float32"

COMBINATIONS: Mapping[tuple[str, str], tuple[tuple[str, str, str, str], ...]] = {
    ("eager", HALF): (
        ("matmul and norm, native", "divide loop", "einsum, native", "einsum, native"),
        ("matmul and norm, native", "scaling vectors", "einsum, native", "einsum, native"),
        ("matmul and norm, native", "divide loop", "bmm, float32", "baddbmm, native"),
        ("matmul and norm, float32", "scaling vectors", "einsum, float32", "baddbmm, float32"),
    ),
    ("eager", SINGLE): (
        ("matmul and norm, float32", "scaling vectors", "einsum, float32", "baddbmm, float32"),
        ("matmul and norm, float32", "divide loop", "einsum, float32", "baddbmm, float32"),
        ("matmul, float32", "scaling vectors", "einsum, float32", "baddbmm, float32"),
    ),
    ("compile", HALF): (
        ("matmul, native", "scaling vectors", "einsum, native", "broadcast, float32"),
        ("matmul, float32", "scaling vectors", "broadcast, float32", "broadcast, float32"),
    ),
    ("compile", SINGLE): (
        ("matmul and norm, float32", "scaling vectors", "broadcast, float32", "broadcast, float32"),
        ("matmul, float32", "scaling vectors", "broadcast, float32", "broadcast, float32"),
    ),
}
"""Variants of the single ops that are fast together, the best known first. For half precision one of them keeps phi and
the coefficients in float32, as the paper does."""


def combinations(impl: str, streams: int, width: int, dtype: str) -> dict[str, Mapping[str, OpFunction]]:
    """The single ops' variants to compose for eager or compile, by their joined names."""
    known = {op: variants(op, streams, width, dtype) for op in SINGLE_OPS}
    listed = COMBINATIONS[impl, SINGLE if dtype == "float32" else HALF]
    return {
        "; ".join(names): {op: known[op][name] for op, name in zip(SINGLE_OPS, names, strict=True)} for names in listed
    }


def forms(impl: str, op: str, streams: int, width: int, dtype: str) -> dict[str, OpFunction]:
    """All forms of an op for eager or compile by name: variants of a single op, combinations of a composite."""
    if op in SINGLE_OPS:
        return variants(op, streams, width, dtype)
    found = combinations(impl, streams, width, dtype)
    return {name: composite_of_ops(op, parts) for name, parts in found.items()}


def composite_of_ops(op: str, parts: Mapping[str, OpFunction]) -> OpFunction:
    """One of `COMPOSITES`, made of the single ops."""
    return composite(op, maps(parts["project"], parts["coefficients"]), parts["aggregate"], parts["merge"])


def composite(op: str, maps: OpFunction, aggregate: OpFunction, merge: OpFunction) -> OpFunction:
    """One of `COMPOSITES`, made of maps, an aggregate and a merge."""
    before = pre(maps, aggregate)
    one = layer(before, merge)
    return {
        "pre": before,
        "pre_norm": pre_norm(before),
        "step": step(before, merge),
        "single_pass": single_pass(maps, aggregate, merge),
        "layer": one,
        "stack": stack(one),
    }[op]


def maps(project: OpFunction, coefficients: OpFunction) -> OpFunction:
    """What the streams are multiplied with: (x, phi, alpha, bias) -> (pre, post, res)."""

    def run(x: torch.Tensor, phi: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return coefficients(*project(x, phi), alpha, bias)

    return run


def pre(maps: OpFunction, aggregate: OpFunction) -> OpFunction:
    """Everything before a sublayer: (x, *parameters) -> (u, post, res)."""

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weights, post, res = maps(x, *parameters)
        return (*aggregate(x, weights), post, res)

    return run


def pre_norm(pre: OpFunction) -> OpFunction:
    """The same, then torch's rms_norm of u: (x, *parameters, norm_weight) -> (u, post, res)."""

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *of_maps, weight = parameters
        u, *maps = pre(x, *of_maps)
        return (torch.nn.functional.rms_norm(u, weight.shape, weight.to(u.dtype), NORM_EPS), *maps)

    return run


def step(pre: OpFunction, merge: OpFunction) -> OpFunction:
    """From one sublayer's output to the next one's input: (x, f, post, res, *parameters) -> (x', u', post', res')."""

    def run(
        x: torch.Tensor, f: torch.Tensor, post: torch.Tensor, res: torch.Tensor, *parameters: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        (x_next,) = merge(x, f, res, post)
        return (x_next, *pre(x_next, *parameters))

    return run


def single_pass(maps: OpFunction, aggregate: OpFunction, merge: OpFunction) -> OpFunction:
    """The same with the pre that comes with post and res (DeepSeek-V4.1's report, equation 6):
    (x, f, pre, post, res, *parameters) -> (x', u', pre', post', res').
    """

    def run(
        x: torch.Tensor,
        f: torch.Tensor,
        pre: torch.Tensor,
        post: torch.Tensor,
        res: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        (x_next,) = merge(x, f, res, post)
        return (x_next, *aggregate(x_next, pre), *maps(x_next, *parameters))

    return run


def layer(pre: OpFunction, merge: OpFunction) -> OpFunction:
    """(x, *parameters) -> (x',)."""

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        u, post, res = pre(x, *parameters)
        return merge(x, u, res, post)

    return run


def stack(layer: OpFunction) -> OpFunction:
    """Layers in sequence, as many as there are parameters for: (x, *parameters) -> (x',)."""

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for first in range(0, len(parameters), PARAMETERS_PER_LAYER):
            (x,) = layer(x, *parameters[first : first + PARAMETERS_PER_LAYER])
        return (x,)

    return run
