"""One implementation of a benchmark case: the calls that are timed, and a check of its results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from cli.bench.cases import DIRECTIONS, TOLERANCE, BenchCase
from cli.bench.torch_ops import OpFunction
from mhc.dispatch.kernels import Kernels, using


def _unchanged(case: BenchCase) -> BenchCase:
    return case


@dataclass(frozen=True)
class Implementation:
    """One implementation of a case.

    Fields:
        impl: its name in tables and JSON.
        variant, directions: which variant of the implementation it is, and the directions in which that is timed.
        kernels: what the ops of `mhc` run during its calls; None if they are not called.
        adapt: converts the case to how this implementation's users store their tensors, such as transposed parameters,
            outside of the timed calls.
    """

    impl: str
    function: OpFunction
    variant: str
    directions: Sequence[str] = DIRECTIONS
    kernels: Kernels | None = None
    adapt: Callable[[BenchCase], BenchCase] = _unchanged

    def error(self, case: BenchCase) -> float:
        """See `BenchCase.error`; gradients count if they are timed."""
        with self._active():
            return self.adapt(case).error(self.function, gradients=set(self.directions) != {"forward"})

    def results(self, case: BenchCase) -> tuple[torch.Tensor, ...]:
        """The results of one run, then the gradients of the inputs."""
        case = self.adapt(case)
        with self._active():
            results = self.function(*case.inputs)
            gradients = torch.autograd.grad(results, case.inputs, case.grad_outputs)
        return tuple(tensor.detach() for tensor in (*results, *gradients))

    def calls(self, case: BenchCase) -> dict[str, Callable[[], object]]:
        """See `BenchCase.calls`: with this implementation's kernels, also in the backward. Each call synchronizes."""
        launches = self.launches(case)
        if not case.inputs[0].is_cuda:
            return launches

        def synchronized(call: Callable[[], object]) -> Callable[[], object]:
            def run() -> object:
                result = call()
                torch.cuda.synchronize()
                return result

            return run

        return {direction: synchronized(call) for direction, call in launches.items()}

    def launches(self, case: BenchCase) -> dict[str, Callable[[], object]]:
        """The same calls without synchronization on a GPU, for stopwatches that time the GPU itself."""

        def with_kernels(call: Callable[[], object]) -> Callable[[], object]:
            def run() -> object:
                with self._active():
                    return call()

            return run

        with self._active():
            calls = self.adapt(case).calls(self.function, self.directions)
        return {direction: with_kernels(call) for direction, call in calls.items()}

    def _active(self) -> AbstractContextManager[object]:
        return nullcontext() if self.kernels is None else using(self.kernels)


def is_correct(implementation: Implementation, case: BenchCase, skipped: list[str]) -> bool:
    """Whether results and gradients equal the float64 reference up to rounding; if not, adds a line to `skipped`."""
    error, bound = implementation.error(case), TOLERANCE[case.dtype]
    if error <= bound:
        return True
    skipped.append(
        f"{implementation.impl} {case.describe()} ({implementation.variant}): "
        f"wrong, relative error {error:.1e} above {bound:.0e}"
    )
    return False
