"""Tasks that worker processes run on kernels: verify and time. They compile with `compile_kernel` itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from autotune.measuring.roofline import Roofline
from autotune.measuring.stopwatch import stopwatch_for
from autotune.measuring.timing import interleaved, narrow, paired_ratio
from autotune.measuring.verify import init_updated, inputs_for, verify
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Direction, Problem
from tiles.runtime.loaded_kernel import LoadedKernel, empty_result, is_result

Times = Mapping[str, Sequence[float]]
"""Milliseconds of each round by name."""


@dataclass(frozen=True)
class TimingBudget:
    """Limits of a timing: at most `rounds` or about `seconds`, and at least `least` rounds."""

    rounds: int
    seconds: float
    least: int


# Fewer than six rounds give no confidence interval; of the shootout's only some judge (`significance.judging_rounds`).
TRIAL = TimingBudget(rounds=15, seconds=0.8, least=6)
SHOOTOUT = TimingBudget(rounds=60, seconds=4.0, least=12)
SHOOTOUT_KERNELS = 4  # of more kernels the seconds grow in proportion, so that each has as many rounds
NARROW = 0.01
"""Width of the intervals, as a share of the ratio, at which the rounds of a shootout end."""


@dataclass(frozen=True)
class Timings:
    """Milliseconds of each round by name, timed together, and the device's state meanwhile (`Stopwatch.conditions`)."""

    times: dict[str, list[float]]
    conditions: dict[str, float]


TUNED, DEFAULT = "tuned", "default"
FUSED, SEPARATE = "fused", "separate"


def roofline(kind: Literal["cpu", "cuda"], threads: int) -> Roofline:
    """See `Roofline.measure`."""
    torch.set_num_threads(threads)
    return Roofline.measure(kind)


def assess(problem: Problem, tuned: Path, default: Path, seed: int, threads: int) -> Timings:
    """Verify the kernel `tuned`, then time it against the kernel `default`, on inputs drawn from `seed`.

    Times come under `TUNED` and `DEFAULT`; raises `verify.WrongResult`.
    """
    torch.set_num_threads(threads)
    kernel = _load(tuned, problem)
    inputs = inputs_for(kernel, problem.tokens, seed)
    verify(kernel, inputs, problem.tokens, seed)
    kernels = {DEFAULT: _load(default, problem), TUNED: kernel}
    return _time(kernels, problem, inputs, seed, TRIAL)


def compare(problem: Problem, paths: Mapping[str, Path], unverified: Sequence[str], seed: int, threads: int) -> Timings:
    """Time kernels against each other, more often than `assess` does.

    Those in `unverified` are verified first; raises `verify.WrongResult`.
    """
    torch.set_num_threads(threads)
    kernels = {name: _load(path, problem) for name, path in paths.items()}
    inputs = inputs_for(next(iter(kernels.values())), problem.tokens, seed)
    for name in unverified:
        verify(kernels[name], inputs, problem.tokens, seed)
    seconds = SHOOTOUT.seconds * max(1, len(kernels) / SHOOTOUT_KERNELS)
    effort = replace(SHOOTOUT, seconds=seconds)
    return _time(kernels, problem, inputs, seed, effort, lambda times: narrow(times, NARROW))


def compare_separate(
    problem: Problem, fused: Path, parts: Mapping[tuple[str, Direction], Path], seed: int, threads: int
) -> Timings:
    """Time a fused kernel against `parts`, the kernels that together do its work; all are verified already.

    Times come under `FUSED` and `SEPARATE`. The rounds end where the fused kernel is the faster one beyond the noise.
    """
    torch.set_num_threads(threads)
    kernel = _load(fused, problem)
    separate = kernel.spec.separate
    assert separate
    loaded = {
        (op, direction): _load(path, kernel_spec(op, direction).canonical(replace(problem, op=op, direction=direction)))
        for (op, direction), path in parts.items()
    }

    def run(op: str, direction: Direction, given: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        return loaded[op, direction](*given)

    inputs = tuple(inputs_for(kernel, problem.tokens, seed).values())
    calls: dict[str, Callable[[], object]] = {
        FUSED: lambda: kernel(*inputs),
        SEPARATE: lambda: separate.call(run, *inputs),
    }
    return _interleaved(calls, inputs, seed, SHOOTOUT, fused_is_faster)


def fused_is_faster(times: Times) -> bool:
    """Whether the separate kernels have lost against the fused one beyond the noise."""
    return paired_ratio(times[FUSED], times[SEPARATE]).high < 1


@cache
def _load(path: Path, problem: Problem) -> LoadedKernel:
    """Load a file once: its name is the digest of its content."""
    return LoadedKernel(path, problem)


def _time(
    kernels: Mapping[str, LoadedKernel],
    problem: Problem,
    inputs: dict[str, Any],
    seed: int,
    effort: TimingBudget,
    enough: Callable[[Times], bool] | None = None,
) -> Timings:
    """Time kernels on the same memory, so that its placement favours none."""
    kernel = next(iter(kernels.values()))
    tokens, slices = problem.tokens, kernel.slices(problem.tokens)
    results = {arg.name: empty_result(arg, tokens, slices, kernel.device) for arg in kernel.arguments if is_result(arg)}
    init_updated(kernel, inputs, results)  # they grow from call to call, which does not change the time

    def call(kernel: LoadedKernel) -> Callable[[], object]:
        return lambda: kernel.launch(inputs, results, tokens, slices)

    calls = {name: call(kernel) for name, kernel in kernels.items()}
    return _interleaved(calls, tuple(inputs.values()), seed, effort, enough)


def _interleaved(
    calls: Mapping[str, Callable[[], object]],
    inputs: tuple[Any, ...],
    seed: int,
    effort: TimingBudget,
    enough: Callable[[Times], bool] | None,
) -> Timings:
    """Time calls on the device that their inputs are on."""
    stopwatch = stopwatch_for(next(value.device for value in inputs if isinstance(value, torch.Tensor)))
    times = interleaved(calls, stopwatch=stopwatch, seed=seed, enough=enough, **asdict(effort))
    return Timings(times, stopwatch.conditions)
