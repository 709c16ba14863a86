"""Every op of the kernel families as torch custom ops, `torch.ops.mhc.<op>` and `torch.ops.mhc.<op>_backward`.

All are made from the kernels' arguments. A backward takes the forward's tensors, the gradients of its results and
its scalars, and gives the gradients of the forward's tensors. The ints that follow the arguments are streams, width
and Sinkhorn rounds. Tensors have one leading dimension, tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.library import custom_op

from mhc.kernels import DTYPE_NAMES, active
from tiles.family import TOKENS, Argument, Direction, Problem
from tiles.reference import DTYPES
from tiles.registry import kernel_spec, kernel_specs

PROBLEM = ("streams", "width", "rounds")


def _arguments(op: str, direction: Direction) -> tuple[list[Argument], list[Argument]]:
    """What a kernel takes and what it gives; names and roles are the same for every problem."""
    arguments = kernel_spec(op, direction).arguments(Problem(op, direction, streams=1, width=8))
    given = [argument for argument in arguments if argument.role in ("input", "scalar")]
    return given, [argument for argument in arguments if argument.role in ("output", "partial")]


def _schema(given: list[Argument], results: list[Argument]) -> str:
    takes = [f"{'float' if argument.role == 'scalar' else 'Tensor'} {argument.name}" for argument in given]
    takes += [f"int {name}" for name in PROBLEM]
    gives = ", ".join("Tensor" for _ in results)
    return f"({', '.join(takes)}) -> {f'({gives})' if len(results) > 1 else gives}"


def _make(name: str, op: str, direction: Direction) -> Any:
    """The custom op (torch's CustomOpDef) that runs one kernel, with its fake."""
    given, results = _arguments(op, direction)
    single = len(results) == 1

    def run(*values: Any) -> Any:
        *inputs, streams, width, rounds = values
        inputs = [value.contiguous() if isinstance(value, torch.Tensor) else value for value in inputs]
        outputs = active().run(op, direction, streams, width, rounds, inputs)
        return outputs[0] if single else outputs

    def fake(*values: Any) -> Any:
        first, (streams, width, rounds) = values[0], values[-len(PROBLEM) :]
        problem = Problem(op, direction, streams, width, DTYPE_NAMES[first.dtype], rounds=rounds)
        outputs = tuple(
            first.new_empty(
                [first.shape[0] if size == TOKENS else size for size in argument.shape], dtype=DTYPES[argument.dtype]
            )
            for argument in kernel_spec(op, direction).arguments(problem)
            if argument.role in ("output", "partial")
        )
        return outputs[0] if single else outputs

    made = custom_op(f"mhc::{name}", run, mutates_args=(), schema=_schema(given, results))
    made.register_fake(fake)
    return made


def _make_differentiable(op: str) -> Any:
    """An op's forward, whose gradient is its backward kernel."""
    forward, backward = _make(op, op, "forward"), _make(f"{op}_backward", op, "backward")
    given, _ = _arguments(op, "forward")
    tensors = sum(argument.role == "input" for argument in given)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:tensors])
        ctx.settings = inputs[tensors:]

    def gradients(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        results = backward(*ctx.saved_tensors, *grads, *ctx.settings)
        results = results if isinstance(results, tuple) else (results,)
        return (*results, *(None for _ in ctx.settings))

    forward.register_autograd(gradients, setup_context=setup_context)
    return forward


OPERATORS = {op: _make_differentiable(op) for op in sorted({op for op, _ in kernel_specs()})}
"""The differentiable custom ops by name."""
