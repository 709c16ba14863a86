"""One implementation of a case: what is timed, and whether it is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from cli.baselines import Form
from cli.cases import DIRECTIONS, ROUNDING, Case
from mhc.kernels import Kernels, using


@dataclass(frozen=True)
class Contender:
    """One implementation of a case; `chosen` says which form of it, `directions` where this form is the fastest."""

    impl: str
    form: Form
    chosen: str
    directions: Sequence[str] = DIRECTIONS
    kernels: Kernels | None = None

    def error(self, case: Case) -> float:
        """See `Case.error`; gradients count where they are timed."""
        with self._active():
            return case.error(self.form, gradients=set(self.directions) != {"forward"})

    def calls(self, case: Case) -> dict[str, Callable[[], object]]:
        """See `Case.calls`: with this contender's kernels active, in the backward too."""

        def pinned(call: Callable[[], object]) -> Callable[[], object]:
            def run() -> object:
                with self._active():
                    return call()

            return run

        with self._active():
            return {direction: pinned(call) for direction, call in case.calls(self.form, self.directions).items()}

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
