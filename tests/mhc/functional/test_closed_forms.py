"""The closed-form backwards, which kernels and fallback share, against finite differences in float64."""

from dataclasses import replace

import pytest
import torch

from tiles.kernels.reference_inputs import in_float64
from tiles.kernels.registry import kernel_spec, kernel_specs
from tiles.kernels.spec import Problem


def differentiable(problem, scalars):
    """The reference forward with the reference backward as its gradient."""
    forward = kernel_spec(problem.op, "forward")
    backward = kernel_spec(problem.op, "backward")
    back = replace(problem, direction="backward")
    names = [argument.name for argument in forward.arguments(problem) if argument.role == "input"]

    results = [argument.name for argument in forward.arguments(problem) if argument.role == "output"]
    arguments = backward.arguments(back)
    given = [argument.name for argument in arguments if argument.role == "input"]
    kept = [name for name in results if name in given]
    left_out = {name for name in names if name not in given}  # their gradient is that of the result

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            found = forward.reference(problem, dict(zip(names, inputs, strict=True)) | scalars)
            ctx.save_for_backward(
                *(value for name, value in zip(names, inputs, strict=True) if name not in left_out),
                *(found[name] for name in kept),
            )
            return tuple(found[name] for name in results if name not in kept)

        @staticmethod
        def backward(ctx, *grads):
            values = dict(zip(given, (*ctx.saved_tensors, *grads), strict=True)) | scalars
            added_to = {argument.name for argument in arguments if argument.role == "updated"}
            values |= {name: torch.zeros_like(values[name[1:]]) for name in added_to}
            gradients = backward.reference(back, values)
            return tuple(grads[0] if name in left_out else gradients[f"d{name}"] for name in names)

    return Op.apply


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("op", sorted({op for op, _ in kernel_specs()}))
def test_backward_is_the_derivative_of_forward(op, n):
    problem = Problem(op, "forward", streams=n, width=8, rounds=5)
    values = in_float64(kernel_spec(op, "forward").inputs(problem, 2, 0))
    scalars = {name: value for name, value in values.items() if not isinstance(value, torch.Tensor)}
    given = [value.requires_grad_() for name, value in values.items() if name not in scalars]
    assert torch.autograd.gradcheck(differentiable(problem, scalars), given)
