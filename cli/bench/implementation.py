"""One implementation of a case: what is timed, and whether it is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from cli.bench.cases import DIRECTIONS, ROUNDING, Case
from cli.bench.torch_ops import Form
from mhc.dispatch.kernels import Kernels, using


def _as_it_is(case: Case) -> Case:
    return case


@dataclass(frozen=True)
class Contender:
    """One implementation of a case.

    Fields:
        chosen, directions: which form of the implementation it is, and where this form is the fastest.
        kernels: what the ops of `mhc` run meanwhile; None where they are not called.
        adapted: the case as this implementation's users hold it, such as with transposed parameters: what nobody would
            do at every call is not in the time.
    """

    impl: str
    form: Form
    chosen: str
    directions: Sequence[str] = DIRECTIONS
    kernels: Kernels | None = None
    adapted: Callable[[Case], Case] = _as_it_is

    def error(self, case: Case) -> float:
        """See `Case.error`; gradients count where they are timed."""
        with self._active():
            return self.adapted(case).error(self.form, gradients=set(self.directions) != {"forward"})

    def results(self, case: Case) -> tuple[torch.Tensor, ...]:
        """The results of one run, then the gradients of the inputs."""
        case = self.adapted(case)
        with self._active():
            results = self.form(*case.inputs)
            gradients = torch.autograd.grad(results, case.inputs, case.upstream)
        return tuple(tensor.detach() for tensor in (*results, *gradients))

    def calls(self, case: Case) -> dict[str, Callable[[], object]]:
        """See `Case.calls`: with this contender's kernels active, in the backward too. A call ends with its work."""
        started = self.launches(case)
        if not case.inputs[0].is_cuda:
            return started

        def ended(call: Callable[[], object]) -> Callable[[], object]:
            def run() -> object:
                result = call()
                torch.cuda.synchronize()
                return result

            return run

        return {direction: ended(call) for direction, call in started.items()}

    def launches(self, case: Case) -> dict[str, Callable[[], object]]:
        """The same calls, which on a GPU do not wait for their work: for stopwatches that time it there."""

        def pinned(call: Callable[[], object]) -> Callable[[], object]:
            def run() -> object:
                with self._active():
                    return call()

            return run

        with self._active():
            calls = self.adapted(case).calls(self.form, self.directions)
        return {direction: pinned(call) for direction, call in calls.items()}

    def _active(self) -> AbstractContextManager[object]:
        return nullcontext() if self.kernels is None else using(self.kernels)


def is_right(contender: Contender, case: Case, skipped: list[str]) -> bool:
    """Whether results and gradients are those of the float64 reference to rounding; says so in `skipped` if not."""
    error, bound = contender.error(case), ROUNDING[case.dtype]
    if error <= bound:
        return True
    skipped.append(
        f"{contender.impl} {case.describe()} ({contender.chosen}): wrong, relative error {error:.1e} above {bound:.0e}"
    )
    return False
