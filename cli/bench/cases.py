"""What `mhc-tune bench` times: an op or a composition at one shape, with fresh inputs and a float64 reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch.utils.checkpoint import checkpoint

from cli.bench.torch_composites import BLOCKS, COMPOSED, PARTS, composed, layer, pre, stack
from cli.bench.torch_ops import EPS, Form
from mhc.modules.init import constrained_bias
from tiles.kernels.reference_inputs import draw, fresh
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Direction, Problem, Traffic

OPS = (*PARTS, *COMPOSED)
DIRECTIONS = ("forward", "backward", "both")

# Relative error in the Frobenius norm that an implementation may have to be timed. It tells wrong maths from rounding:
# a baseline may round coefficients to the streams' dtype (a relative 2^-9 for bfloat16), and compositions do so at
# several places one after the other. Kernels are held to much tighter bounds by `mhc-tune verify`.
ROUNDING = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 4e-3}

LEAST: Mapping[str, Mapping[str, int]] = {
    "layer": {"pre": 1, "merge": 1},
    "stack": {"pre": 1, "step": BLOCKS - 1, "merge": 1},
}
"""The fused passes that move least where an op is no kernel by itself, and how often each runs."""

CPU = torch.device("cpu")

PERIOD = 251
"""Tokens that are drawn for a GPU. A prime: a kernel that reads the right tokens of the wrong block of tokens is wrong
there."""

SHARED = ("phi", "alpha", "bias")
"""Inputs that all tokens share; all other inputs and all results have a row for each token."""


SMALL = 0.3
"""Of a stack's parameters: how far they are from the start, as a share of what the kernels draw."""

LOW_POST = -3.0
"""Of a stack's parameters: the bias of post, which makes it 0.1."""


@dataclass(frozen=True)
class Case:
    """One of `OPS`; "layer" and "stack" are around identity sublayers.

    Fields:
        inputs: the differentiable tensors, in the order of the form's parameters.
        names: of the inputs; a stack has as many of a name as it has layers.
        upstream: a gradient for each result.
        wanted: float64 results, then float64 gradients of the inputs.
        traffic: the least that forward, backward and both must move and compute.
    """

    op: str
    streams: int
    width: int
    tokens: int
    dtype: str
    inputs: tuple[torch.Tensor, ...]
    names: tuple[str, ...]
    upstream: tuple[torch.Tensor, ...]
    wanted: tuple[torch.Tensor, ...]
    traffic: Mapping[str, Traffic]

    def describe(self) -> str:
        """One line for people."""
        return f"{self.op} n={self.streams} C={self.width} {self.dtype} T={self.tokens}"

    def error(self, form: Form, *, gradients: bool = True) -> float:
        """The largest relative error of the form's results and, if asked for, gradients, each in the Frobenius norm.

        Gradients of one name count as one: that of a single alpha may by chance be next to nothing.
        """
        with torch.set_grad_enabled(gradients):
            got = results = form(*self.inputs)
        if gradients:
            got = (*results, *torch.autograd.grad(results, self.inputs, self.upstream))
        labels = [*map(str, range(len(results))), *self.names][: len(got)]
        error, size = dict.fromkeys(labels, torch.zeros(())), dict.fromkeys(labels, torch.zeros(()))
        for label, one, want in zip(labels, got, self.wanted, strict=False):
            error[label] = error[label] + (one.detach().double() - want).square().sum()
            size[label] = size[label] + want.square().sum()
        # Not Python's max, which may drop a NaN.
        return float(torch.stack([(error[label] / size[label]).sqrt() for label in error]).max())

    def calls(self, form: Form, directions: Sequence[str]) -> dict[str, Callable[[], object]]:
        """What is timed in each direction. Forward keeps nothing for a backward, as in inference."""

        def forward() -> object:
            with torch.no_grad():
                return form(*self.inputs)

        def both() -> object:
            return torch.autograd.grad(form(*self.inputs), self.inputs, self.upstream)

        def backward_of(results: tuple[torch.Tensor, ...]) -> Callable[[], object]:
            return lambda: torch.autograd.grad(results, self.inputs, self.upstream, retain_graph=True)

        made: dict[str, Callable[[], object]] = {"forward": forward, "both": both}
        if "backward" in directions:
            made["backward"] = backward_of(form(*self.inputs))
        return {direction: made[direction] for direction in directions}


def make_case(
    op: str, streams: int, width: int, tokens: int, dtype: str, seed: int, device: torch.device = CPU
) -> Case:
    """A case with the kernels' own inputs; its reference is the four ops' float64 references and autograd.

    On another device than a CPU there are many tokens: `PERIOD` of them are drawn and repeated (`repeated`).
    """
    if device.type == "cpu":
        return _drawn(op, streams, width, tokens, dtype, seed)
    return repeated(_drawn(op, streams, width, min(tokens, PERIOD), dtype, seed), tokens, device)


def _drawn(op: str, streams: int, width: int, tokens: int, dtype: str, seed: int) -> Case:
    """A case on the CPU, every token of its own."""
    problem = Problem(op, "forward", streams, width, dtype, tokens)
    names, inputs = _inputs(problem, seed)
    wide = tuple(tensor.double().requires_grad_() for tensor in inputs)
    results = reference(op, problem)(*wide)
    random = fresh(seed + 1)
    upstream = tuple(draw(random, kind, *result.shape) for kind, result in zip(_dtypes(problem), results, strict=False))
    gradients = torch.autograd.grad(results, wide, tuple(grad.double() for grad in upstream))
    wanted = tuple(tensor.detach() for tensor in (*results, *gradients))
    inputs = tuple(tensor.requires_grad_() for tensor in inputs)
    return Case(op, streams, width, tokens, dtype, inputs, names, upstream, wanted, least_traffic(problem))


def repeated(case: Case, tokens: int, device: torch.device) -> Case:
    """The case with its tokens over and over until there are `tokens`, on `device`.

    Tokens do not see each other, so that results and gradients of tokens repeat too, and the gradients of the
    parameters are sums over the copies: the float64 reference costs as little as that of a few tokens.
    """
    copies, rest = divmod(tokens, case.tokens)
    shared = [name in SHARED for name in case.names]
    results, gradients = case.wanted[: len(case.upstream)], case.wanted[len(case.upstream) :]
    of_rest = _gradients(case, rest, shared) if rest else [torch.zeros(())] * len(gradients)

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        there = tensor.detach().to(device)
        return torch.cat([there.repeat(copies, *[1] * (there.dim() - 1)), there[:rest]])

    problem = Problem(case.op, "forward", case.streams, case.width, case.dtype, tokens)
    return replace(
        case,
        tokens=tokens,
        inputs=tuple(
            (tensor.detach().to(device) if alike else rows(tensor)).requires_grad_()
            for tensor, alike in zip(case.inputs, shared, strict=True)
        ),
        upstream=tuple(map(rows, case.upstream)),
        wanted=(
            *(rows(_stored(result, case.dtype)) for result in results),
            *(
                (copies * whole + part).to(device) if alike else rows(_stored(whole, case.dtype))
                for whole, part, alike in zip(gradients, of_rest, shared, strict=True)
            ),
        ),
        traffic=least_traffic(problem),
    )


def _stored(wanted: torch.Tensor, dtype: str) -> torch.Tensor:
    """What is wanted of a row of tokens, in float32 where the streams have 8 or 11 bits: float64 would fill the GPU."""
    return wanted if dtype == "float32" else wanted.float()


def _gradients(case: Case, tokens: int, shared: list[bool]) -> list[torch.Tensor]:
    """Float64 gradients of the inputs from the first `tokens` tokens alone."""
    wide = [
        (tensor if alike else tensor[:tokens]).detach().double().requires_grad_()
        for tensor, alike in zip(case.inputs, shared, strict=True)
    ]
    problem = Problem(case.op, "forward", case.streams, case.width, case.dtype, tokens)
    results = reference(case.op, problem)(*wide)[: len(case.upstream)]
    upstream = [gradient[:tokens].double() for gradient in case.upstream]
    return list(torch.autograd.grad(results, wide, upstream))


def reference(op: str, problem: Problem) -> Form:
    """The op made of the four ops' torch references; in float64 on float64 inputs."""
    parts = {part: _part(replace(problem, op=part)) for part in PARTS}
    if op in parts:
        return parts[op]
    if op != "stack":
        return composed(op, pre(parts), parts["merge"])
    one = layer(pre(parts), parts["merge"])

    def forgetful(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # All layers' float64 values at once would be gigabytes.
        kept: tuple[torch.Tensor, ...] = checkpoint(one, *values, use_reentrant=False)
        return kept

    return stack(forgetful)


def _part(problem: Problem) -> Form:
    spec = kernel_spec(problem.op, "forward")
    given, outputs = _names(problem, "input"), _names(problem, "output")

    def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = spec.reference(problem, dict(zip(given, inputs, strict=True)) | {"eps": EPS})
        return tuple(results[name] for name in outputs)

    return run


def _inputs(problem: Problem, seed: int) -> tuple[tuple[str, ...], tuple[torch.Tensor, ...]]:
    """Names and values that the op's kernel draws; the layer's are those of pre."""
    if problem.op == "stack":
        names, (x, *_) = _inputs(replace(problem, op="layer"), seed)
        layers = [_inputs(replace(problem, op="layer", tokens=0), seed + block)[1] for block in range(BLOCKS)]
        parameters = chain.from_iterable(_calm(*layer[1:]) for layer in layers)
        return (*names[:1], *names[1:] * BLOCKS), (x, *parameters)
    problem = replace(problem, op="pre") if problem.op == "layer" else problem
    values = kernel_spec(problem.op, "forward").inputs(problem, problem.tokens, seed)
    names = tuple(_names(problem, "input"))
    return names, tuple(values[name] for name in names)


def _calm(phi: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A stacked layer's parameters, near those that a network starts with.

    With the drawn ones the streams would grow and become alike from layer to layer, until their differences, which the
    gradients are made of, are lost in rounding. `post` is small for the same reason: no norm tames identity sublayers.
    """
    streams = math.isqrt(len(bias) + 1) - 1
    start = constrained_bias(streams)
    start[streams : 2 * streams] = LOW_POST
    return phi, SMALL * alpha, start + SMALL * bias


def _dtypes(problem: Problem) -> list[str]:
    """The dtype of each result. A kernel has more outputs, which it keeps for its backward, behind them."""
    if problem.op in LEAST:
        return [problem.dtype]
    arguments = kernel_spec(problem.op, "forward").arguments(problem)
    return [argument.dtype for argument in arguments if argument.role == "output"]


def _names(problem: Problem, role: str) -> list[str]:
    arguments = kernel_spec(problem.op, "forward").arguments(problem)
    return [argument.name for argument in arguments if argument.role == role]


def least_traffic(problem: Problem) -> dict[str, Traffic]:
    """The least that an op must move and compute in each direction, with every pass fused that can be."""

    def moved(direction: Direction) -> Traffic:
        passes = LEAST.get(problem.op, {problem.op: 1})
        parts = [replace(problem, op=op, direction=direction) for op, count in passes.items() for _ in range(count)]
        return _total(kernel_spec(part.op, direction).traffic(part, part.tokens) for part in parts)

    forward, backward = moved("forward"), moved("backward")
    return {"forward": forward, "backward": backward, "both": _total((forward, backward))}


def _total(parts: Iterable[Traffic]) -> Traffic:
    listed = list(parts)
    return Traffic(
        sum(part.read for part in listed), sum(part.written for part in listed), sum(part.flops for part in listed)
    )
