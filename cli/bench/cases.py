"""Benchmark cases: an op or composite at one shape, with random inputs and the results of a float64 reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch.utils.checkpoint import checkpoint

from cli.bench.torch_composites import COMPOSITES, SINGLE_OPS, STACK_LAYERS, composite_of_ops, stack
from cli.bench.torch_ops import OpFunction
from mhc.modules.init import constrained_bias
from tiles.kernels.arguments import PAPER_SCALARS
from tiles.kernels.reference_inputs import draw, fresh
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Direction, Problem, Traffic

OPS = (*SINGLE_OPS, *COMPOSITES)
DIRECTIONS = ("forward", "backward", "both")

# Largest relative error (Frobenius norm) of an implementation that is timed. It separates wrong maths from rounding: a
# baseline may round coefficients to the streams' dtype (a relative 2^-9 for bfloat16), and composites do so several
# times in a row. `mhc-tune verify` has much tighter bounds for kernels.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 4e-3}

FUSED_PASSES: Mapping[str, Mapping[str, int]] = {
    "layer": {"pre": 1, "merge": 1},
    "stack": {"pre": 1, "step": STACK_LAYERS - 1, "merge": 1},
}
"""For composites that are no single kernel: the fused kernels that move the least memory, and how often each runs."""

CPU = torch.device("cpu")

DISTINCT_TOKENS = 251
"""Different tokens on a GPU; more repeat them. A prime, so that a kernel that reads a wrong block of tokens gives wrong
results."""

PARAMETERS = ("phi", "alpha", "bias", "norm_weight")
"""Inputs that all tokens share; every other input and every result has a row per token."""

STACK_SCALE, STACK_POST_BIAS = 0.3, -3.0
"""Parameters of a stack's layers: their distance from the initial values, as a share of what the kernels draw; and the
bias of post, which makes post 0.1."""


@dataclass(frozen=True)
class BenchCase:
    """One of `OPS` at one shape; "layer" and "stack" are around identity sublayers.

    Fields:
        inputs: the differentiable tensors, in the order of the op's arguments.
        names: of the inputs; in a stack a name occurs once per layer.
        grad_outputs: a gradient for each result.
        expected: float64 results, then float64 gradients of the inputs.
        traffic: the least that forward, backward and both must move and compute.
    """

    op: str
    streams: int
    width: int
    tokens: int
    dtype: str
    inputs: tuple[torch.Tensor, ...]
    names: tuple[str, ...]
    grad_outputs: tuple[torch.Tensor, ...]
    expected: tuple[torch.Tensor, ...]
    traffic: Mapping[str, Traffic]

    def describe(self) -> str:
        """Op and shape on one line."""
        return f"{self.op} n={self.streams} C={self.width} {self.dtype} T={self.tokens}"

    def error(self, function: OpFunction, *, gradients: bool = True) -> float:
        """The largest relative error (Frobenius norm) of the function's results and, if `gradients`, of its gradients.

        Gradients of one name count as one tensor, as that of a single alpha may be almost zero by chance.
        """
        with torch.set_grad_enabled(gradients):
            got = results = function(*self.inputs)
        if gradients:
            got = (*results, *torch.autograd.grad(results, self.inputs, self.grad_outputs))
        labels = [*map(str, range(len(results))), *self.names][: len(got)]
        error, size = dict.fromkeys(labels, torch.zeros(())), dict.fromkeys(labels, torch.zeros(()))
        for label, one, want in zip(labels, got, self.expected, strict=False):
            error[label] = error[label] + (one.detach().double() - want).square().sum()
            size[label] = size[label] + want.square().sum()
        # torch's max: Python's may drop a NaN.
        return float(torch.stack([(error[label] / size[label]).sqrt() for label in error]).max())

    def calls(self, function: OpFunction, directions: Sequence[str]) -> dict[str, Callable[[], object]]:
        """The call that is timed in each direction. Forward saves nothing for a backward, as in inference."""

        def forward() -> object:
            with torch.no_grad():
                return function(*self.inputs)

        def both() -> object:
            return torch.autograd.grad(function(*self.inputs), self.inputs, self.grad_outputs)

        def backward_of(results: tuple[torch.Tensor, ...]) -> Callable[[], object]:
            return lambda: torch.autograd.grad(results, self.inputs, self.grad_outputs, retain_graph=True)

        made: dict[str, Callable[[], object]] = {"forward": forward, "both": both}
        if "backward" in directions:
            made["backward"] = backward_of(function(*self.inputs))
        return {direction: made[direction] for direction in directions}


def make_case(
    op: str, streams: int, width: int, tokens: int, dtype: str, seed: int, device: torch.device = CPU
) -> BenchCase:
    """A case with the inputs that the kernels draw; the reference is the four single ops' in float64, with autograd.

    On a GPU, where there are many tokens, `DISTINCT_TOKENS` of them are drawn and repeated.
    """
    if device.type == "cpu":
        return _random_case(op, streams, width, tokens, dtype, seed)
    return repeat_tokens(_random_case(op, streams, width, min(tokens, DISTINCT_TOKENS), dtype, seed), tokens, device)


def _random_case(op: str, streams: int, width: int, tokens: int, dtype: str, seed: int) -> BenchCase:
    """A case on the CPU in which all tokens differ."""
    problem = Problem(op, "forward", streams, width, dtype, tokens)
    names, inputs = _inputs(problem, seed)
    wide = tuple(tensor.double().requires_grad_() for tensor in inputs)
    results = reference(op, problem)(*wide)
    random = fresh(seed + 1)
    grad_outputs = tuple(
        draw(random, kind, *result.shape) for kind, result in zip(_dtypes(problem), results, strict=False)
    )
    gradients = torch.autograd.grad(results, wide, tuple(grad.double() for grad in grad_outputs))
    expected = tuple(tensor.detach() for tensor in (*results, *gradients))
    inputs = tuple(tensor.requires_grad_() for tensor in inputs)
    return BenchCase(op, streams, width, tokens, dtype, inputs, names, grad_outputs, expected, least_traffic(problem))


def repeat_tokens(case: BenchCase, tokens: int, device: torch.device) -> BenchCase:
    """The case on `device` with its tokens repeated until there are `tokens`.

    Tokens are independent, so that their results and gradients repeat too, and the parameters' gradients are sums over
    the copies: the float64 reference costs no more than that of the distinct tokens.
    """
    copies, rest = divmod(tokens, case.tokens)
    is_parameter = [name in PARAMETERS for name in case.names]
    results, gradients = case.expected[: len(case.grad_outputs)], case.expected[len(case.grad_outputs) :]
    of_rest = _gradients(case, rest, is_parameter) if rest else [torch.zeros(())] * len(gradients)

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        moved = tensor.detach().to(device)
        return torch.cat([moved.repeat(copies, *[1] * (moved.dim() - 1)), moved[:rest]])

    problem = Problem(case.op, "forward", case.streams, case.width, case.dtype, tokens)
    return replace(
        case,
        tokens=tokens,
        inputs=tuple(
            (tensor.detach().to(device) if shared else rows(tensor)).requires_grad_()
            for tensor, shared in zip(case.inputs, is_parameter, strict=True)
        ),
        grad_outputs=tuple(map(rows, case.grad_outputs)),
        expected=(
            *(rows(_stored(result, case.dtype)) for result in results),
            *(
                (copies * whole + part).to(device) if shared else rows(_stored(whole, case.dtype))
                for whole, part, shared in zip(gradients, of_rest, is_parameter, strict=True)
            ),
        ),
        traffic=least_traffic(problem),
    )


def _stored(expected: torch.Tensor, dtype: str) -> torch.Tensor:
    """Expected values in float32 for half-precision streams: float64 would fill the GPU's memory."""
    return expected if dtype == "float32" else expected.float()


def _gradients(case: BenchCase, tokens: int, is_parameter: list[bool]) -> list[torch.Tensor]:
    """Float64 gradients of the inputs for the first `tokens` tokens alone."""
    wide = [
        (tensor if shared else tensor[:tokens]).detach().double().requires_grad_()
        for tensor, shared in zip(case.inputs, is_parameter, strict=True)
    ]
    problem = Problem(case.op, "forward", case.streams, case.width, case.dtype, tokens)
    results = reference(case.op, problem)(*wide)[: len(case.grad_outputs)]
    grad_outputs = [gradient[:tokens].double() for gradient in case.grad_outputs]
    return list(torch.autograd.grad(results, wide, grad_outputs))


def reference(op: str, problem: Problem) -> OpFunction:
    """The op, made of the four single ops' torch references; computes in float64 on float64 inputs."""
    parts = {part: _single_op_reference(replace(problem, op=part)) for part in SINGLE_OPS}
    if op in parts:
        return parts[op]
    if op != "stack":
        return composite_of_ops(op, parts)
    one = composite_of_ops("layer", parts)

    def checkpointed(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # The float64 values of all layers would take gigabytes.
        kept: tuple[torch.Tensor, ...] = checkpoint(one, *values, use_reentrant=False)
        return kept

    return stack(checkpointed)


def _single_op_reference(problem: Problem) -> OpFunction:
    spec = kernel_spec(problem.op, "forward")
    given, outputs = _names(problem, "input"), _names(problem, "output")

    def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = spec.reference(problem, dict(zip(given, inputs, strict=True)) | PAPER_SCALARS)
        return tuple(results[name] for name in outputs)

    return run


def _inputs(problem: Problem, seed: int) -> tuple[tuple[str, ...], tuple[torch.Tensor, ...]]:
    """Names and values of the op's inputs, as its kernel draws them; a layer has those of pre."""
    if problem.op == "stack":
        names, (x, *_) = _inputs(replace(problem, op="layer"), seed)
        layers = [_inputs(replace(problem, op="layer", tokens=0), seed + block)[1] for block in range(STACK_LAYERS)]
        parameters = chain.from_iterable(_near_initial(*layer[1:]) for layer in layers)
        return (*names[:1], *names[1:] * STACK_LAYERS), (x, *parameters)
    problem = replace(problem, op="pre") if problem.op == "layer" else problem
    values = kernel_spec(problem.op, "forward").inputs(problem, problem.tokens, seed)
    names = tuple(_names(problem, "input"))
    return names, tuple(values[name] for name in names)


def _near_initial(phi: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Parameters of a stack's layer, near the initial ones.

    With the drawn ones the streams would grow and become equal from layer to layer, until the differences that make the
    gradients are lost in rounding. `post` is small for the same reason, as identity sublayers have no norm.
    """
    streams = math.isqrt(len(bias) + 1) - 1
    start = constrained_bias(streams)
    start[streams : 2 * streams] = STACK_POST_BIAS
    return phi, STACK_SCALE * alpha, start + STACK_SCALE * bias


def _dtypes(problem: Problem) -> list[str]:
    """The dtype of each result. A kernel's further outputs, kept for its backward, come after them."""
    if problem.op in FUSED_PASSES:
        return [problem.dtype]
    arguments = kernel_spec(problem.op, "forward").arguments(problem)
    return [argument.dtype for argument in arguments if argument.role == "output"]


def _names(problem: Problem, role: str) -> list[str]:
    arguments = kernel_spec(problem.op, "forward").arguments(problem)
    return [argument.name for argument in arguments if argument.role == role]


def least_traffic(problem: Problem) -> dict[str, Traffic]:
    """The least that an op must move and compute in each direction, with everything fused that can be."""

    def moved(direction: Direction) -> Traffic:
        passes = FUSED_PASSES.get(problem.op, {problem.op: 1})
        parts = [replace(problem, op=op, direction=direction) for op, count in passes.items() for _ in range(count)]
        total = _total(kernel_spec(part.op, direction).traffic(part, part.tokens) for part in parts)
        # By itself an op's backward has nothing to add to; in a composite it adds to the gradient of the streams.
        given = [] if problem.op in FUSED_PASSES else kernel_spec(problem.op, direction).arguments(parts[0])
        added_to = sum(argument.nbytes(problem.tokens) for argument in given if argument.role == "updated")
        return replace(total, read=total.read - added_to)

    forward, backward = moved("forward"), moved("backward")
    return {"forward": forward, "backward": backward, "both": _total((forward, backward))}


def _total(parts: Iterable[Traffic]) -> Traffic:
    listed = list(parts)
    return Traffic(
        sum(part.read for part in listed), sum(part.written for part in listed), sum(part.flops for part in listed)
    )
