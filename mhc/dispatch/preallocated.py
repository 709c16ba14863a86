"""Preallocated results: `out=` of the functional ops, checked, and kernels that write to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from mhc.checks import expect
from mhc.dispatch.kernels import DTYPE_NAMES, active
from mhc.dispatch.operators import needs_dispatcher
from tiles.compiler.cuda_launcher import ALIGNMENT
from tiles.errors import BadInput
from tiles.kernels.reference_inputs import DTYPES
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import IDENTITY, Problem
from tiles.runtime.loaded_kernel import is_given, is_result

SINGLE = ("aggregate", "merge")
"""The ops with one result, whose `out` is a tensor."""


class _Result(NamedTuple):
    """A result as a message names it, its shape after the leading dimensions, and its dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def write_results(
    op: str, tensors: tuple[torch.Tensor, ...], settings: tuple[Any, ...], leading: torch.Size, out: Any
) -> Any:
    """Run an op's forward as `mhc.dispatch.operators.call` does, with `out` for its results; returns `out`, a tensor or
    a tuple.

    `out` has what the function returns: results [*leading, ...], contiguous, and None for a res that is the identity.
    Raises `BadInput` for anything else, where memory is shared with an input or another result, and where autograd or
    torch's dispatcher would have to take part. z and s, which only a backward takes, and a kernel's workspace on CUDA
    come from torch's allocator.
    """
    *scalars, streams, width, rounds = settings
    problem = Problem(op, "forward", streams, width, DTYPE_NAMES[tensors[0].dtype], rounds=rounds)
    names, results = _layout(problem)
    given = _as_tuple(problem, out, len(results))
    _check_autograd((*tensors, *given))
    device = tensors[0].device
    for (name, shape, dtype), tensor in zip(results, given, strict=True):
        expect(name, tensor, (*leading, *shape), dtype, device)
        if not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT:
            raise BadInput(
                f"{name} must be contiguous and begin at a multiple of {ALIGNMENT} bytes, got strides "
                f"{tensor.stride()} at byte {tensor.data_ptr() % ALIGNMENT}: pass the first rows of a buffer"
            )
    read = list(zip(names, tensors, strict=True))
    _check_memory(read, [(result.name, tensor) for result, tensor in zip(results, given, strict=True)])
    inputs = [*map(torch.Tensor.contiguous, tensors), *scalars]
    active().run_into(op, streams, width, rounds, inputs, given)
    for tensor in given:
        if not tensor.is_inference():  # a kernel writes through a pointer, which autograd does not see
            torch.autograd.graph.increment_version(tensor)
    return out


@lru_cache(maxsize=256)
def _layout(problem: Problem) -> tuple[tuple[str, ...], tuple[_Result, ...]]:
    """The names of a forward's inputs, and the results that the function returns: not those that are kept
    for the backward alone."""
    spec, backward = kernel_spec(problem.op, "forward"), replace(problem, direction="backward")
    kept = {a.name for a in kernel_spec(problem.op, "backward").arguments(backward) if is_given(a)}
    arguments = spec.arguments(problem)
    returned = [a for a in arguments if is_result(a) and a.name not in kept]
    return tuple(a.name for a in arguments if a.role == "input"), tuple(
        _Result("out" if len(returned) == 1 else f"out[{number}], {a.name},", a.sized(0)[1:], DTYPES[a.dtype])
        for number, a in enumerate(returned)
    )


def _as_tuple(problem: Problem, out: Any, count: int) -> tuple[torch.Tensor, ...]:
    """The tensors of `out`, less the None of an identity; raises `BadInput` where there are others."""
    if problem.base_op in SINGLE:
        wanted, found, fits = "a tensor", (out,), isinstance(out, torch.Tensor)
    else:
        nothing = 1 if problem.op.endswith(IDENTITY) else 0
        wanted = f"a tuple of {count} tensors" + " and None, for res" * nothing
        found = tuple(out) if isinstance(out, tuple | list) else (out,)
        kinds = [isinstance(tensor, torch.Tensor) for tensor in found[:count]]
        fits = len(found) == count + nothing and all(kinds) and found[count:] == (None,) * nothing
        found = found[:count]
    if not fits:
        raise BadInput(f"out must be {wanted}, got {_kinds(out)}: pass what {problem.base_op} returns without it")
    return found


def _kinds(out: Any) -> str:
    if isinstance(out, tuple | list):
        return f"({', '.join(type(each).__name__ for each in out)})"
    return type(out).__name__


def _check_autograd(tensors: Sequence[torch.Tensor]) -> None:
    """Raise `BadInput` where a kernel alone would not do."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise BadInput("out has no gradients, got tensors that require them: call in torch.no_grad(), or without out")
    if needs_dispatcher(tensors):
        raise BadInput(
            "out is for plain tensors outside of torch.compile, tracing and transforms, got others: leave it out there"
        )


def _check_memory(inputs: Sequence[tuple[str, torch.Tensor]], results: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Raise `BadInput` where a result shares memory: kernels are compiled for pointers that do not alias (restrict),
    and may read an input again after they have written a part of a result."""
    spans = [(name, *_span(tensor)) for name, tensor in (*inputs, *results)]
    for number, (name, first, end) in enumerate(spans[len(inputs) :], start=len(inputs)):
        for other, begins, ends in spans[:number]:
            if first < ends and begins < end:
                raise BadInput(
                    f"{name.rstrip(',')} must have memory of its own, got some of {other.rstrip(',')}: pass another "
                    "buffer, such as two in turn"
                )


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """The address of a tensor's first byte, and the one after its last."""
    if not tensor.numel():
        return 0, 0
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (steps + 1) * tensor.itemsize
