"""The plain torch form of an op, for derivatives that its kernels do not compute.

A kernel computes an op, or its gradient in reverse mode, of whole tensors. Forward mode, the function transforms of
`torch.func` (vmap, jvp, grad, ...) and gradients of gradients run the op's torch reference instead, which torch can
differentiate in every mode and to every order: slower, and as exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from mhc.dispatch.kernels import DTYPE_NAMES, active
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Direction, Problem
from tiles.runtime.loaded_kernel import has_tokens, is_result, leading_shape


def is_transformed(values: Iterable[Any]) -> bool:
    """Whether a function transform is active, or a tensor among the values carries a tangent of forward mode."""
    if torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0 and any(
        isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None for value in values
    )


def kernel_is_not_enough(grads: Iterable[torch.Tensor | None]) -> bool:
    """In a backward: whether it will be differentiated again (`create_graph=True`) or is vectorised over gradients."""
    if torch.compiler.is_compiling():  # a compiled backward cannot be differentiated, and torch says so itself
        return False
    return (
        torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or any(grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads)
    )


def outputs(op: str, values: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    """All results of an op's forward kernel, in their order, from its inputs, scalars, streams, width and rounds; any
    leading dimensions in the place of tokens."""
    if not torch.compiler.is_compiling():
        what = "forward mode, function transforms and second derivatives"
        active().resolver.warn_once("torch form", f"{what} run {op} in slow plain torch, as no kernel computes them")
    *given, streams, width, rounds = values
    direction: Direction = "forward"
    problem = Problem(op, direction, streams, width, DTYPE_NAMES[given[0].dtype], rounds=rounds)
    arguments = kernel_spec(op, direction).arguments(problem)
    inputs = [argument for argument in arguments if not is_result(argument)]
    leading = leading_shape(given[0], len(inputs[0].shape) - 1)
    flat = {
        argument.name: value.reshape(-1, *value.shape[len(leading) :]) if has_tokens(argument) else value
        for argument, value in zip(inputs, given, strict=True)
    }
    with torch.autocast(given[0].device.type, enabled=False):
        results = kernel_spec(op, direction).reference(problem, flat)
    names = [argument.name for argument in arguments if is_result(argument)]
    return tuple(results[name].reshape((*leading, *results[name].shape[1:])) for name in names)


def gradients(
    op: str,
    inputs: Sequence[torch.Tensor],
    settings: Sequence[Any],
    grads: Sequence[torch.Tensor],
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of `inputs`, differentiable themselves; `grads` are those of the first results.

    None for an input that does not require a gradient.
    """
    with torch.enable_grad():
        results = outputs(op, (*inputs, *settings))
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    taken = results[: len(grads)]
    found = iter(torch.autograd.grad(taken, wanted, grads, create_graph=True, allow_unused=True))
    return tuple(next(found) if tensor.requires_grad else None for tensor in inputs)
