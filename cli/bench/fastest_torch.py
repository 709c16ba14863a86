"""The fastest variant in plain torch, eager or compiled, found by timing the candidates."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

import torch

from autotune.measuring.timing import interleaved
from cli.bench.cases import BenchCase
from cli.bench.implementation import Implementation, is_correct
from cli.bench.precompile import Precompilers
from cli.bench.time_limit import TimeLimitExceeded, time_limit
from cli.bench.torch_composites import SINGLE_OPS, forms
from cli.bench.torch_ops import FUSIBLE, OpFunction
from tiles.errors import first_line
from tiles.kernels.spec import Problem

FLOAT32 = "compile-float32"
"""The fastest compiled variant whose phi and coefficients stay float32, as ours do; where streams are narrower, the
fastest of all may round both."""

IMPLS = ("eager", "compile", FLOAT32)

ROUNDS_BOTH = "native"
"""Names of variants that round what they multiply with to the streams' dtype have this part."""

ROUNDS, SECONDS = 5, 3.0
"""Rounds that decide between variants; they end after this many seconds once there are three."""

TIME_LIMIT = 600.0
"""Seconds for compiling a variant and running it for the first time."""


class FastestTorch:
    """Finds the fastest correct variant of each case at one shape, and remembers it.

    With `precompilers` the compiled ones are compiled side by side.
    """

    def __init__(self, streams: int, width: int, dtype: str, precompilers: Precompilers | None = None) -> None:
        self._shape = (streams, width, dtype)
        self._precompilers = precompilers
        self._best: dict[tuple[str, str, str], str] = {}  # by implementation, op and direction

    def implementations(
        self, impl: str, case: BenchCase, directions: Sequence[str], skipped: list[str]
    ) -> Iterator[Implementation]:
        """The fastest variant in each direction; `skipped` gets a line for each that is wrong, fails or is too slow.

        A backward alone takes the variant that is fastest in "both", if that is known.
        """
        candidates = self._candidates(impl, case.op, directions)
        if "both" not in directions and (known := self._best.get((impl, case.op, "both"))):
            candidates = {known: candidates[known]}
        if impl != "eager" and self._precompilers and len(candidates) > 1:
            problem = Problem(case.op, "forward", case.streams, case.width, case.dtype, case.tokens)
            self._precompilers.compile(problem, list(candidates), directions, TIME_LIMIT)
        made = (Implementation(impl, _compiled(impl, one), name, directions) for name, one in candidates.items())
        running = {candidate.variant: candidate for candidate in made if _runs(candidate, case, skipped)}
        if not running:
            return
        medians = _medians(case, running, directions) if len(running) > 1 else {}
        best = {d: min(running, key=lambda name: medians[name][d] if medians else 0) for d in directions}
        self._best |= {(impl, case.op, direction): name for direction, name in best.items()}
        for name, candidate in running.items():
            fastest_in = tuple(direction for direction in directions if best[direction] == name)
            if fastest_in:
                yield Implementation(impl, candidate.function, name, fastest_in)

    def _candidates(self, impl: str, op: str, directions: Sequence[str]) -> dict[str, OpFunction]:
        """The variants to try by name."""
        known = forms("eager" if impl == "eager" else "compile", op, *self._shape)
        if impl == FLOAT32:
            known = {name: form for name, form in known.items() if ROUNDS_BOTH not in name}
        if op in SINGLE_OPS:
            names = known if impl == "eager" else dict.fromkeys((*FUSIBLE[op], self._best.get(("eager", op, "both"))))
            return {name: known[name] for name in names if name in known}
        if op == "stack":
            # Compiling a stack takes minutes, so it takes the fastest variant of the layer, or else the best known.
            layers = (self._best.get((impl, "layer", direction)) for direction in ("both", *directions))
            name = next((layer for layer in layers if layer), next(iter(known)))
            return {name: known[name]}
        return known


def _compiled(impl: str, function: OpFunction) -> OpFunction:
    """The variant, compiled for these shapes only where it is to be; a graph break is an error, not a slow path."""
    return function if impl == "eager" else torch.compile(function, dynamic=False, fullgraph=True)


def _runs(candidate: Implementation, case: BenchCase, skipped: list[str]) -> bool:
    """Whether a variant is correct and runs in all its directions; if not, `skipped` gets the reason."""
    try:
        with time_limit(TIME_LIMIT):
            if not is_correct(candidate, case, skipped):
                return False
            for call in candidate.calls(case).values():
                call()
    except (Exception, TimeLimitExceeded) as error:  # no failure of a compiler may end the run
        skipped.append(f"{candidate.impl} {case.describe()} ({candidate.variant}): {first_line(error)}")
        return False
    return True


def _medians(
    case: BenchCase, candidates: Mapping[str, Implementation], directions: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Median times (ms) by variant and direction, from a few interleaved rounds."""
    medians: dict[str, dict[str, float]] = {name: {} for name in candidates}
    calls = {name: candidate.calls(case) for name, candidate in candidates.items()}
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
