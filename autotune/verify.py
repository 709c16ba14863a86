"""Does a compiled kernel compute what its reference computes, and write nowhere else?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tiles.family import Argument
from tiles.reference import in_float64
from tiles.runtime import LoadedKernel, empty_result, is_result, summed

ODD_TOKENS = 131
"""A prime: no block of tokens divides it, so that tails are run."""

GUARD = 1024
"""Elements of guard before and behind each result; a multiple of a cache line in every dtype."""

BITS = {4: torch.int32, 2: torch.int16}


class WrongResult(Exception):
    """A kernel is wrong; one line says which result, where and by how much."""


def verify(kernel: LoadedKernel, inputs: Mapping[str, Any], tokens: int, seed: int) -> None:
    """Run `kernel` on 0, 1 and an odd number of tokens drawn from `seed`, and on `inputs`; raises `WrongResult`."""
    for count in (0, 1, ODD_TOKENS):
        drawn = kernel.spec.inputs(kernel.problem, count, seed + count)
        # Slices here are more than the few tokens are worth, so that the borders between slices are run.
        check(kernel, drawn, count, max(1, min(3, count)))
    check(kernel, inputs, tokens, kernel.slices(tokens))


def check(kernel: LoadedKernel, inputs: Mapping[str, Any], tokens: int, slices: int) -> None:
    """One run against the float64 reference, within `spec.tolerance`; raises `WrongResult`.

    Results start out as NaN, so that an element that is not written shows, and lie between guards.
    """
    arguments = [argument for argument in kernel.arguments if is_result(argument)]
    guarded = {argument.name: Guarded(argument, tokens, slices) for argument in arguments}
    for argument in arguments:
        if argument.role == "updated":
            guarded[argument.name].tensor.copy_(inputs[argument.name])
    kernel.launch(dict(inputs), {name: result.tensor for name, result in guarded.items()}, tokens, slices)
    wanted = kernel.spec.reference(kernel.problem, in_float64(dict(inputs)))
    for argument in arguments:
        result = guarded[argument.name]
        where = f"{argument.name} at {tokens} tokens in {slices} slices"
        if not result.intact():
            raise WrongResult(f"{where}: wrote outside of the result")
        got = summed(result.tensor) if argument.role == "partial" else result.tensor
        rtol, atol = kernel.spec.tolerance(kernel.problem, argument.name)
        _compare(where, got.double(), wanted[argument.name], rtol, atol)


class Guarded:
    """A result tensor of NaN between two guards."""

    def __init__(self, argument: Argument, tokens: int, slices: int) -> None:
        empty = empty_result(argument, tokens, slices)
        self._all = torch.full((empty.numel() + 2 * GUARD,), torch.nan, dtype=empty.dtype)
        self.tensor = self._all[GUARD : GUARD + empty.numel()].view(empty.shape)

    def intact(self) -> bool:
        """Whether both guards hold the very bits they were made with."""
        bits = self._all.view(BITS[self._all.element_size()])
        untouched = torch.full((GUARD,), torch.nan, dtype=self._all.dtype).view(bits.dtype)
        return torch.equal(bits[:GUARD], untouched) and torch.equal(bits[-GUARD:], untouched)


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
