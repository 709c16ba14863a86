"""Every op of the kernel families as torch custom ops, `torch.ops.mhc.<op>` and `torch.ops.mhc.<op>_backward`.

All are made from the kernels' arguments. A backward takes the forward's tensors, those of its results that it wants
back, the gradients of the others, and its scalars; it gives the gradients of the forward's tensors. What a kernel adds
to starts at zero here. The ints that follow the arguments are streams, width and Sinkhorn rounds. Tensors have one
leading dimension, tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.library import custom_op

from mhc.kernels import DTYPE_NAMES, active
from tiles.family import TOKENS, Argument, Direction, Problem
from tiles.reference import DTYPES
from tiles.registry import kernel_spec, kernel_specs
from tiles.runtime import empty_result, is_result

PROBLEM = ("streams", "width", "rounds")


def _arguments(op: str, direction: Direction) -> tuple[list[Argument], list[Argument]]:
    """What a kernel takes and what it gives; names and roles are the same for every problem."""
    arguments = kernel_spec(op, direction).arguments(Problem(op, direction, streams=1, width=8))
    given = [argument for argument in arguments if argument.role in ("input", "scalar")]
    return given, [argument for argument in arguments if is_result(argument)]


def _schema(given: list[Argument], results: list[Argument]) -> str:
    takes = [f"{'float' if argument.role == 'scalar' else 'Tensor'} {argument.name}" for argument in given]
    takes += [f"int {name}" for name in PROBLEM]
    gives = ", ".join("Tensor" for _ in results)
    return f"({', '.join(takes)}) -> {f'({gives})' if len(results) > 1 else gives}"


def _zeros(argument: Argument, like: torch.Tensor) -> torch.Tensor:
    """A zeroed result on the device of `like`, with as many tokens."""
    tokens = like.shape[0]
    if like.device.type == "cpu":
        return empty_result(argument, tokens, 1).zero_()
    return like.new_zeros(argument.sized(tokens), dtype=DTYPES[argument.dtype])


def _make(name: str, op: str, direction: Direction) -> Any:
    """The custom op (torch's CustomOpDef) that runs one kernel, with its fake."""
    given, results = _arguments(op, direction)
    single, updates = len(results) == 1, any(argument.role == "updated" for argument in results)

    def run(*values: Any) -> Any:
        *inputs, streams, width, rounds = values
        inputs = [value.contiguous() if isinstance(value, torch.Tensor) else value for value in inputs]
        if updates:
            inputs += [_zeros(argument, inputs[0]) for argument in specified(*values) if argument.role == "updated"]
        outputs = active().run(op, direction, streams, width, rounds, inputs)
        return outputs[0] if single else outputs

    def specified(*values: Any) -> tuple[Argument, ...]:
        first, (streams, width, rounds) = values[0], values[-len(PROBLEM) :]
        problem = Problem(op, direction, streams, width, DTYPE_NAMES[first.dtype], rounds=rounds)
        return kernel_spec(op, direction).arguments(problem)

    def fake(*values: Any) -> Any:
        tokens = values[0].shape[0]
        outputs = tuple(
            values[0].new_empty(
                [tokens if size == TOKENS else size for size in argument.shape], dtype=DTYPES[argument.dtype]
            )
            for argument in specified(*values)
            if is_result(argument)
        )
        return outputs[0] if single else outputs

    made = custom_op(f"mhc::{name}", run, mutates_args=(), schema=_schema(given, results))
    made.register_fake(fake)
    return made


def _make_differentiable(op: str) -> Any:
    """An op's forward, whose gradient is its backward kernel."""
    forward, backward = _make(op, op, "forward"), _make(f"{op}_backward", op, "backward")
    (given, results), (wanted, _) = _arguments(op, "forward"), _arguments(op, "backward")
    tensors = sum(argument.role == "input" for argument in given)
    names = {argument.name for argument in wanted}
    kept = [place for place, argument in enumerate(results) if argument.name in names]
    differentiated = [place for place in range(len(results)) if place not in kept]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:tensors], *(output[place] for place in kept))
        ctx.settings = inputs[tensors:]

    def gradients(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        results = backward(*ctx.saved_tensors, *(grads[place] for place in differentiated), *ctx.settings)
        results = results if isinstance(results, tuple) else (results,)
        return (*results, *(None for _ in ctx.settings))

    forward.register_autograd(gradients, setup_context=setup_context)
    return forward


OPERATORS = {op: _make_differentiable(op) for op in sorted({op for op, _ in kernel_specs()})}
"""The differentiable custom ops by name."""
