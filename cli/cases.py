"""What `mhc-tune bench` times: an op or the layer at one shape, with fresh inputs and a float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from cli.baselines import Form, layer
from tiles.family import Argument, Direction, Problem
from tiles.reference import draw, fresh, in_float64
from tiles.registry import kernel_spec

OPS = ("project", "coefficients", "aggregate", "merge")
DIRECTIONS = ("forward", "backward", "both")

# Relative error in the Frobenius norm that an implementation may have to be timed. It tells wrong maths from rounding:
# a baseline may round coefficients to the streams' dtype (a relative 2^-9 for bfloat16), and the layer does so at
# several places one after the other. Kernels are held to much tighter bounds by `mhc-tune verify`.
ROUNDING = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 4e-3}


@dataclass(frozen=True)
class Case:
    """One op, or "layer": the four ops around an identity sublayer.

    Fields:
        inputs: the differentiable tensors, in the order of the form's parameters.
        upstream: a gradient for each result.
        wanted: float64 results, then float64 gradients of the inputs.
        traffic: the least bytes that forward and backward must move.
    """

    op: str
    streams: int
    width: int
    tokens: int
    dtype: str
    inputs: tuple[torch.Tensor, ...]
    upstream: tuple[torch.Tensor, ...]
    wanted: tuple[torch.Tensor, ...]
    traffic: Mapping[str, int]

    def describe(self) -> str:
        """One line for people."""
        return f"{self.op} n={self.streams} C={self.width} {self.dtype} T={self.tokens}"

    def error(self, form: Form) -> float:
        """The largest relative error of the form's results and gradients, each in the Frobenius norm."""
        results = form(*self.inputs)
        got = (*results, *torch.autograd.grad(results, self.inputs, self.upstream))
        pairs = [(one.detach().double(), want) for one, want in zip(got, self.wanted, strict=True)]
        # Not Python's max, which may drop a NaN.
        return float(torch.stack([(one - want).norm() / want.norm() for one, want in pairs]).max())

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


def op_case(op: str, streams: int, width: int, tokens: int, dtype: str, seed: int) -> Case:
    """A case from the kernels' own inputs and reference."""
    problem = Problem(op, "backward", streams, width, dtype, tokens)
    forward, backward = kernel_spec(op, "forward"), kernel_spec(op, "backward")
    values = backward.inputs(problem, tokens, seed)
    given = _names(forward.arguments(replace(problem, direction="forward")), "input")
    upstream = [name for name in _names(backward.arguments(problem), "input") if name not in given]
    wide = in_float64(values)
    results = forward.reference(replace(problem, direction="forward"), wide)
    gradients = backward.reference(problem, wide)
    wanted = [results[name] for name in _names(forward.arguments(replace(problem, direction="forward")), "output")]
    wanted += [gradients[f"d{name}"] for name in given]
    return Case(
        op,
        streams,
        width,
        tokens,
        dtype,
        tuple(values[name].requires_grad_() for name in given),
        tuple(values[name] for name in upstream),
        tuple(wanted),
        _traffic([op], problem),
    )


def layer_case(streams: int, width: int, tokens: int, dtype: str, seed: int) -> Case:
    """The layer; its reference is the ops' float64 references, differentiated by autograd."""
    problem = Problem("project", "forward", streams, width, dtype, tokens)
    projected = kernel_spec("project", "forward").inputs(problem, tokens, seed)
    gates = kernel_spec("coefficients", "forward").inputs(replace(problem, op="coefficients"), tokens, seed)
    inputs = (projected["x"], projected["phi"], gates["alpha"], gates["bias"])
    upstream = (draw(fresh(seed + 1), dtype, tokens, streams, width),)
    wide = tuple(tensor.double().requires_grad_() for tensor in inputs)
    results = layer(reference_forms(problem, gates["eps"]))(*wide)
    gradients = torch.autograd.grad(results, wide, tuple(grad.double() for grad in upstream))
    wanted = tuple(tensor.detach() for tensor in (*results, *gradients))
    inputs = tuple(tensor.requires_grad_() for tensor in inputs)
    return Case("layer", streams, width, tokens, dtype, inputs, upstream, wanted, _traffic(OPS, problem))


def reference_forms(problem: Problem, eps: float) -> dict[str, Form]:
    """The kernels' torch references as forms."""

    def form(op: str) -> Form:
        spec, of = kernel_spec(op, "forward"), replace(problem, op=op, direction="forward")
        arguments = spec.arguments(of)
        given, outputs = _names(arguments, "input"), _names(arguments, "output")

        def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            results = spec.reference(of, dict(zip(given, inputs, strict=True)) | {"eps": eps})
            return tuple(results[name] for name in outputs)

        return run

    return {op: form(op) for op in OPS}


def _names(arguments: Sequence[Argument], role: str) -> list[str]:
    return [argument.name for argument in arguments if argument.role == role]


def _traffic(ops: Sequence[str], problem: Problem) -> dict[str, int]:
    def moved(direction: Direction) -> int:
        parts = (replace(problem, op=op, direction=direction) for op in ops)
        return sum(kernel_spec(part.op, direction).traffic(part, problem.tokens).bytes for part in parts)

    forward, backward = moved("forward"), moved("backward")
    return {"forward": forward, "backward": backward, "both": forward + backward}
