"""The choice of the fastest form in plain torch: eager, or compiled."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

import torch

from autotune.measuring.timing import interleaved
from cli.bench.cases import Case
from cli.bench.implementation import Contender, is_right
from cli.bench.time_limit import TooSlow, patience
from cli.bench.torch_composites import PARTS, combinations, composed, pre
from cli.bench.torch_ops import COMPILED, Form, forms
from tiles.errors import first_line

IMPLS = ("eager", "compile")

ROUNDS, SECONDS = 5, 3.0
"""Rounds that choose a form, cut short after this many seconds once there are three."""

PATIENCE = 600.0
"""Seconds that a form may take to be compiled and to run for the first time."""


class Choice:
    """Finds the fastest right form of each case at one shape, and remembers what it found."""

    def __init__(self, streams: int, width: int, dtype: str) -> None:
        self._shape = (streams, width, dtype)
        self._best: dict[tuple[str, str, str], str] = {}  # by implementation, op and direction

    def fastest(self, impl: str, case: Case, directions: Sequence[str], skipped: list[str]) -> Iterator[Contender]:
        """The fastest form in each direction; `skipped` gets a line for each form that is wrong, fails or is too slow.

        A backward by itself is that of the fastest form in both, where that is known.
        """
        candidates = self._candidates(impl, case.op, directions)
        if "both" not in directions and (known := self._best.get((impl, case.op, "both"))):
            candidates = {known: candidates[known]}
        made = (Contender(impl, _ready(impl, form), name, directions) for name, form in candidates.items())
        running = {contender.chosen: contender for contender in made if _runs(contender, case, skipped)}
        if not running:
            return
        medians = _medians(case, running, directions) if len(running) > 1 else {}
        best = {d: min(running, key=lambda name: medians[name][d] if medians else 0) for d in directions}
        self._best |= {(impl, case.op, direction): name for direction, name in best.items()}
        for name, contender in running.items():
            fastest_in = tuple(direction for direction in directions if best[direction] == name)
            if fastest_in:
                yield Contender(impl, contender.form, name, fastest_in)

    def _candidates(self, impl: str, op: str, directions: Sequence[str]) -> dict[str, Form]:
        """The forms to try by name."""
        if op in PARTS:
            known = forms(op, *self._shape)
            names = known if impl == "eager" else dict.fromkeys((*COMPILED[op], self._best.get(("eager", op, "both"))))
            return {name: known[name] for name in names if name in known}
        found = {
            name: composed(op, pre(parts), parts["merge"]) for name, parts in combinations(impl, *self._shape).items()
        }
        if op == "stack":
            # Compiling it takes minutes, so it is the layer's fastest form, else the best that is known.
            layers = (self._best.get((impl, "layer", direction)) for direction in ("both", *directions))
            name = next((layer for layer in layers if layer), next(iter(found)))
            return {name: found[name]}
        return found


def _ready(impl: str, form: Form) -> Form:
    """Compiled for these shapes alone; a graph break would be an error, not a slow path."""
    return torch.compile(form, dynamic=False, fullgraph=True) if impl == "compile" else form


def _runs(contender: Contender, case: Case, skipped: list[str]) -> bool:
    """Whether the form is right and runs in all its directions; says in `skipped` what is wrong."""
    try:
        with patience(PATIENCE):
            if not is_right(contender, case, skipped):
                return False
            for call in contender.calls(case).values():
                call()
    except (Exception, TooSlow) as error:  # whatever a compiler does must not end the run
        skipped.append(f"{contender.impl} {case.describe()} ({contender.chosen}): {first_line(error)}")
        return False
    return True


def _medians(case: Case, contenders: Mapping[str, Contender], directions: Sequence[str]) -> dict[str, dict[str, float]]:
    """Median times (ms) by form and direction, from a few interleaved rounds."""
    medians: dict[str, dict[str, float]] = {name: {} for name in contenders}
    calls = {name: contender.calls(case) for name, contender in contenders.items()}
    for direction in directions:
        times = interleaved(
            {name: by_direction[direction] for name, by_direction in calls.items()},
            rounds=ROUNDS,
            seconds=SECONDS,
            least=3,
        )
        for name, milliseconds in times.items():
            medians[name][direction] = statistics.median(milliseconds)
    return medians
