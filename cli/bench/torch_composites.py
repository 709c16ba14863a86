"""What is made of the four ops: pre, step, the layer (around an identity sublayer) and a stack of layers.

Their parameters are phi, alpha and bias of one layer, or of one layer after the other.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cli.bench.torch_ops import Form, forms

PARTS = ("project", "coefficients", "aggregate", "merge")
COMPOSED = ("pre", "step", "layer", "stack")

BLOCKS = 8
"""Layers of a stack."""

PARAMETERS = 3
"""Parameters of a layer."""

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
"""Forms of the four ops that go well together, the best that is known first. For half precision there is always one
that keeps phi and the coefficients in float32, as the paper does."""


def combinations(impl: str, streams: int, width: int, dtype: str) -> dict[str, Mapping[str, Form]]:
    """The forms of the four ops to compose for eager or compile, by a name that tells them all."""
    known = {op: forms(op, streams, width, dtype) for op in PARTS}
    chosen = COMBINATIONS[impl, SINGLE if dtype == "float32" else HALF]
    return {"; ".join(names): {op: known[op][name] for op, name in zip(PARTS, names, strict=True)} for names in chosen}


def composed(op: str, pre: Form, merge: Form) -> Form:
    """One of `COMPOSED` made of a pre and a merge."""
    one = layer(pre, merge)
    return {"pre": pre, "step": step(pre, merge), "layer": one, "stack": stack(one)}[op]


def pre(parts: Mapping[str, Form]) -> Form:
    """All that precedes a sublayer: (x, phi, alpha, bias) -> (u, post, res)."""
    project, coefficients, aggregate = (parts[op] for op in ("project", "coefficients", "aggregate"))

    def run(x: torch.Tensor, phi: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        z, s = project(x, phi)
        weights, post, res = coefficients(z, s, alpha, bias)
        return (*aggregate(x, weights), post, res)

    return run


def step(pre: Form, merge: Form) -> Form:
    """From a sublayer's output to the next one's input: (x, f, post, res, *parameters) -> (x', u', post', res')."""

    def run(
        x: torch.Tensor, f: torch.Tensor, post: torch.Tensor, res: torch.Tensor, *parameters: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        (x_next,) = merge(x, f, res, post)
        return (x_next, *pre(x_next, *parameters))

    return run


def layer(pre: Form, merge: Form) -> Form:
    """(x, *parameters) -> (x',)."""

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        u, post, res = pre(x, *parameters)
        return merge(x, u, res, post)

    return run


def stack(layer: Form) -> Form:
    """One layer after the other, as many as there are parameters for: (x, *parameters) -> (x',)."""

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for first in range(0, len(parameters), PARAMETERS):
            (x,) = layer(x, *parameters[first : first + PARAMETERS])
        return (x,)

    return run
