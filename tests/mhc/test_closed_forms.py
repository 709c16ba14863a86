"""The closed-form backwards, which kernels and fallback share, against finite differences in float64."""

from dataclasses import replace

import pytest
import torch

from tiles.family import Problem
from tiles.reference import in_float64
from tiles.registry import kernel_spec, kernel_specs


def differentiable(problem, scalars):
    """The reference forward with the reference backward as its gradient."""
    forward = kernel_spec(problem.op, "forward")
    backward = kernel_spec(problem.op, "backward")
    back = replace(problem, direction="backward")
    names = [argument.name for argument in forward.arguments(problem) if argument.role == "input"]

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return tuple(forward.reference(problem, dict(zip(names, inputs, strict=True)) | scalars).values())

        @staticmethod
        def backward(ctx, *grads):
            given = [argument.name for argument in backward.arguments(back) if argument.role == "input"]
            values = dict(zip(given, (*ctx.saved_tensors, *grads), strict=True)) | scalars
            results = backward.reference(back, values)
            return tuple(results[f"d{name}"] for name in names)

    return Op.apply


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("op", sorted({op for op, _ in kernel_specs()}))
def test_backward_is_the_derivative_of_forward(op, n):
    problem = Problem(op, "forward", streams=n, width=8, rounds=5)
    values = in_float64(kernel_spec(op, "forward").inputs(problem, 2, 0))
    scalars = {name: value for name, value in values.items() if not isinstance(value, torch.Tensor)}
    given = [value.requires_grad_() for name, value in values.items() if name not in scalars]
    assert torch.autograd.gradcheck(differentiable(problem, scalars), given)
