"""Verification of a compiled kernel: results against the float64 reference, and no write out of bounds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from tiles.kernels.reference_inputs import DTYPES, in_float64
from tiles.kernels.spec import TOKENS, Argument
from tiles.runtime.loaded_kernel import CPU, LoadedKernel, is_result, summed

ODD_TOKENS = 131
"""A prime: no block of tokens divides it, so that partial blocks run."""

GUARD = 1024
"""Least elements of guard before and behind each tensor; a multiple of a cache line in every dtype."""

GUARD_TOKENS = 64
"""A guard holds at least the rows of so many tokens: a block that overruns the end reaches no further."""

BITS = {4: torch.int32, 2: torch.int16}

POISON = {torch.float32: 0x7FA5A5A5, torch.bfloat16: 0x7FA5, torch.float16: 0x7DA5}
"""Bits of a signalling NaN: arithmetic on it gives a NaN of other bits, so that adding to a guard shows."""


class WrongResult(Exception):
    """A kernel is wrong: one line with the tensor, the place and the error.

    It may have written anywhere, so that the process that ran it is not used again (`worker`).
    """

    poisons = True


def verify(kernel: LoadedKernel, inputs: Mapping[str, Any], tokens: int, seed: int) -> None:
    """Run `kernel` on 0, 1 and an odd number of tokens drawn from `seed`, on as many where what it updates holds
    nothing yet, and on `inputs`; raises `WrongResult`."""
    for count in (0, 1, ODD_TOKENS):
        drawn = inputs_for(kernel, count, seed + count)
        # More slices than so few tokens need, so that the borders between slices run.
        slices = max(1, min(3, count)) if kernel.kind == "cpu" else 1
        check(kernel, drawn, count, slices)
        if count == ODD_TOKENS and len(fresh := without_updated(kernel.arguments, drawn)) < len(drawn):
            check(kernel, fresh, count, slices)
    check(kernel, inputs, tokens, kernel.slices(tokens))


def check(kernel: LoadedKernel, inputs: Mapping[str, Any], tokens: int, slices: int) -> None:
    """Check one run against the float64 reference, within `spec.tolerance`; raises `WrongResult`.

    Results start as NaN, so that an element that is not written shows. They and the inputs lie between guards of NaN: a
    write there shows, and a read whose value is used. Inputs must not change.
    """
    place = kernel.device
    given = {arg.name: GuardedTensor(arg, tokens, slices, place) for arg in kernel.arguments if arg.role == "input"}
    for name, guarded in given.items():
        guarded.tensor.copy_(inputs[name])
    written = {arg.name: GuardedTensor(arg, tokens, slices, place) for arg in kernel.arguments if is_result(arg)}
    results = {name: guarded.tensor for name, guarded in written.items()}
    init_updated(kernel, inputs, results)
    kernel.launch({**inputs, **{name: guarded.tensor for name, guarded in given.items()}}, results, tokens, slices)
    where = f"at {tokens} tokens in {slices} slices"
    for name, guarded in given.items():
        if not (guarded.intact() and torch.equal(_bits(guarded.tensor), _bits(inputs[name]))):
            raise WrongResult(f"{name} {where}: wrote to an input or beside it")
    for name, guarded in written.items():
        if not guarded.intact():
            raise WrongResult(f"{name} {where}: wrote outside of the result")
    wanted = kernel.spec.reference(kernel.problem, in_float64(dict(inputs)))
    for argument in kernel.arguments:
        if is_result(argument):
            got = results[argument.name]
            got = summed(got) if argument.role == "partial" else got
            tolerance = kernel.spec.tolerance(kernel.problem, argument.name)
            _compare(f"{argument.name} {where}", got.double(), wanted[argument.name], *tolerance)


def inputs_for(kernel: LoadedKernel, tokens: int, seed: int) -> dict[str, Any]:
    """Inputs drawn from `seed`, on the kernel's device; the same numbers on every device."""
    drawn = kernel.spec.inputs(kernel.problem, tokens, seed)
    place = kernel.device
    return {name: value.to(place) if isinstance(value, torch.Tensor) else value for name, value in drawn.items()}


def without_updated(arguments: Iterable[Argument], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of a kernel that has nothing to add to."""
    updated = {argument.name for argument in arguments if argument.role == "updated"}
    return {name: value for name, value in inputs.items() if name not in updated}


def init_updated(kernel: LoadedKernel, inputs: Mapping[str, Any], results: Mapping[str, torch.Tensor]) -> None:
    """Initialize the results that a kernel updates in place, where they hold something."""
    for argument in kernel.arguments:
        if argument.role == "updated" and argument.name in inputs:
            results[argument.name].copy_(inputs[argument.name])


class GuardedTensor:
    """An argument's tensor, of NaN, between two guards."""

    def __init__(self, argument: Argument, tokens: int, slices: int, device: torch.device = CPU) -> None:
        dtype, shape = DTYPES[argument.dtype], argument.sized(tokens)
        shape = (slices, *shape) if argument.role == "partial" else shape
        row = math.prod(argument.sized(1)) if TOKENS in argument.shape else 0
        self._guard, size = max(GUARD, GUARD_TOKENS * row), math.prod(shape)
        self._poison = POISON[dtype]
        # As integers: a float conversion may change the bits of a NaN.
        length = size + 2 * self._guard
        self._all = torch.full((length,), self._poison, dtype=BITS[dtype.itemsize], device=device)
        self.tensor = self._all[self._guard : self._guard + size].view(dtype).view(shape)

    def intact(self) -> bool:
        """Whether both guards hold their original bits."""
        guards = self._all[: self._guard], self._all[-self._guard :]
        return all(bool((guard == self._poison).all()) for guard in guards)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers: NaN equals itself, and 0 differs from -0."""
    return tensor.contiguous().view(BITS[tensor.element_size()])


def _compare(where: str, got: torch.Tensor, want: torch.Tensor, rtol: float, atol: float) -> None:
    bad = ~torch.isclose(got, want, rtol=rtol, atol=atol)
    count = int(bad.sum())
    if count == 0:
        return
    error = (got - want).abs().nan_to_num(torch.inf)
    worst = int(torch.where(bad, error, -1.0).argmax())
    raise WrongResult(
        f"{where}: {count} of {got.numel()} elements are beyond rtol {rtol:g}, atol {atol:g}; "
        f"got {got.flatten()[worst]:g} where the reference has {want.flatten()[worst]:g}"
    )
