"""The implementations that `mhc-tune bench` compares, and the choice of the fastest torch form."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch

from autotune.measure import interleaved
from cli import peers
from cli.baselines import COMPILED, Form, forms, layer
from cli.cases import DIRECTIONS, OPS, ROUNDING, Case
from mhc import functional
from mhc.kernels import Kernels, using
from mhc.sharing import share

IMPLS = ("tuned", "default", "eager", "compile", *peers.NAMES)

COEFFICIENTS_DTYPE = "float32"

CHOICE_ROUNDS, CHOICE_SECONDS = 5, 3.0


@dataclass(frozen=True)
class Contender:
    """One implementation of a case; `chosen` says which form of it, `directions` where this form is the fastest."""

    impl: str
    form: Form
    chosen: str
    directions: Sequence[str] = DIRECTIONS
    kernels: Kernels | None = None

    def error(self, case: Case) -> float:
        """See `Case.error`."""
        with self._active():
            return case.error(self.form)

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


class Forms:
    """Finds the contenders at one shape. The ops come before the layer, which is made of the forms chosen for them."""

    def __init__(self, streams: int, width: int, dtype: str, impls: Sequence[str]) -> None:
        self._known = {op: forms(op, streams, width, dtype) for op in OPS}
        self._impls = impls
        self._best: dict[str, dict[str, str]] = {"eager": {}, "compile": {}}
        self._streams, self._width = streams, width

    def contenders(
        self, case: Case, directions: Sequence[str], kernels: Mapping[str, Kernels], skipped: list[str]
    ) -> Iterator[Contender]:
        """All implementations that are asked for and run here; `skipped` gets a line for each other one."""
        for impl, chosen in kernels.items():
            if impl in self._impls:
                yield from _kernel_contender(case, impl, chosen, self._functional()[case.op], directions, skipped)
        for impl in ("eager", "compile"):
            if impl in self._impls:
                yield from self._fastest(impl, case, directions, skipped)
        for name in peers.NAMES:
            if name in self._impls:
                form = peers.form(name, case)
                if isinstance(form, str):
                    skipped.append(f"{name} {case.describe()}: {form}")
                elif is_right(peer := Contender(name, form, "its torch reference", directions), case, skipped):
                    yield peer

    def _fastest(self, impl: str, case: Case, directions: Sequence[str], skipped: list[str]) -> Iterator[Contender]:
        """The fastest right form in each direction; a backward by itself is that of the fastest form in both."""
        candidates = self._layer_candidates(impl) if case.op == "layer" else self._candidates(impl, case.op)
        if "both" not in directions:
            candidates = {
                name: form for name, form in candidates.items() if name == self._best[impl].get(case.op, name)
            }
        if impl == "compile":
            candidates = {name: _compiled(form) for name, form in candidates.items()}
        candidates = {
            name: form for name, form in candidates.items() if is_right(Contender(impl, form, name), case, skipped)
        }
        if not candidates:
            return
        medians = _medians(case, candidates, directions) if len(candidates) > 1 else {}
        best = {d: min(candidates, key=lambda name: medians[name][d] if medians else 0) for d in directions}
        if "both" in best:
            self._best[impl][case.op] = best["both"]
        for name, form in candidates.items():
            fastest_in = tuple(direction for direction in directions if best[direction] == name)
            if fastest_in:
                yield Contender(impl, form, name, fastest_in)

    def _candidates(self, impl: str, op: str) -> dict[str, Form]:
        known = self._known[op]
        if impl == "eager":
            return dict(known)
        named = dict.fromkeys((*COMPILED[op], *filter(None, [self._best["eager"].get(op)])))
        return {name: known[name] for name in named if name in known}

    def _layer_candidates(self, impl: str) -> dict[str, Form]:
        """The layer of each op's fastest form; for the compiler, also of eager's."""
        made = {}
        for source in (impl, "eager"):
            chosen = {op: self._best[source][op] for op in OPS if op in self._best[source]}
            if len(chosen) == len(OPS):
                made["; ".join(chosen.values())] = layer({op: self._known[op][name] for op, name in chosen.items()})
        return made

    def _functional(self) -> dict[str, Form]:
        def coefficients(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return functional.coefficients(*values, streams=self._streams, width=self._width)

        parts: dict[str, Form] = {
            "project": functional.project,
            "coefficients": coefficients,
            "aggregate": lambda *values: (functional.aggregate(*values),),
            "merge": lambda *values: (functional.merge(*values),),
        }

        def whole(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            x, *parameters = values
            x_pre, x_merge = share(x, 2)
            u, post, res = functional.pre(x_pre, *parameters)
            return (functional.merge(x_merge, u, res, post),)

        return {**parts, "layer": whole}


def is_right(contender: Contender, case: Case, skipped: list[str]) -> bool:
    """Whether results and gradients are those of the float64 reference to rounding; says so in `skipped` if not."""
    error, bound = contender.error(case), ROUNDING[case.dtype]
    if error <= bound:
        return True
    skipped.append(
        f"{contender.impl} {case.describe()} ({contender.chosen}): wrong, relative error {error:.1e} above {bound:.0e}"
    )
    return False


def _kernel_contender(
    case: Case, impl: str, kernels: Kernels, form: Form, directions: Sequence[str], skipped: list[str]
) -> Iterator[Contender]:
    """The op on `kernels`, unless something else than the kernels that `impl` promises would run."""
    ops = OPS if case.op == "layer" else (case.op,)
    contender = Contender(impl, form, "kernels", directions, kernels)
    if not is_right(contender, case, skipped):
        return
    rows = [row for row in kernels.report() if row.op in ops and row.dtype in (case.dtype, COEFFICIENTS_DTYPE)]
    others = [row for row in rows if row.runs != impl]
    if others:
        first = others[0]
        skipped.append(
            f"{impl} {case.describe()}: {first.op} {first.direction} would run the {first.runs} ({first.why}): "
            "mhc-tune tune makes kernels for this shape and version"
        )
    else:
        yield replace(contender, chosen="; ".join(sorted({row.why for row in rows})))


def _compiled(form: Form) -> Form:
    """Compiled for these shapes alone; a graph break would be an error, not a slow path."""
    return torch.compile(form, dynamic=False, fullgraph=True)


def _medians(case: Case, candidates: Mapping[str, Form], directions: Sequence[str]) -> dict[str, dict[str, float]]:
    """Median times (ms) by form and direction, from a few interleaved rounds."""
    medians: dict[str, dict[str, float]] = {name: {} for name in candidates}
    calls = {name: case.calls(form, directions) for name, form in candidates.items()}
    for direction in directions:
        times = interleaved(
            {name: by_direction[direction] for name, by_direction in calls.items()},
            rounds=CHOICE_ROUNDS,
            seconds=CHOICE_SECONDS,
            least=3,
        )
        for name, milliseconds in times.items():
            medians[name][direction] = statistics.median(milliseconds)
    return medians
