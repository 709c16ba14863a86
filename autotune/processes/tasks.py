"""What worker processes do with kernels: verify and time. Compiling is `tiles.compiler.compile.compile_kernel`
itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from autotune.measuring.roofline import Roofline
from autotune.measuring.stopwatch import stopwatch_for
from autotune.measuring.timing import interleaved
from autotune.measuring.verify import give_updated, inputs_for, verify
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Direction, Problem
from tiles.runtime.loaded_kernel import LoadedKernel, empty_result, is_result


@dataclass(frozen=True)
class Effort:
    """How long to time: at most `rounds`, about `seconds`, but never less than `least` rounds."""

    rounds: int
    seconds: float
    least: int


# Fewer than six rounds bound no confidence interval; only some of the final's rounds judge (`final.judging`).
TRIAL = Effort(rounds=15, seconds=0.8, least=6)
FINAL = Effort(rounds=60, seconds=4.0, least=12)
FINAL_KERNELS = 4  # usually; where more of them meet, the seconds grow with them, so that each has as many rounds


@dataclass(frozen=True)
class Timed:
    """Milliseconds of each round by name, timed together, and the `Stopwatch.conditions` under which they were."""

    times: dict[str, list[float]]
    conditions: dict[str, float]


TUNED, DEFAULT = "tuned", "default"
FUSED, SEPARATE = "fused", "separate"


def roofline(kind: Literal["cpu", "cuda"], threads: int) -> Roofline:
    """See `Roofline.measure`."""
    torch.set_num_threads(threads)
    return Roofline.measure(kind)


def assess(problem: Problem, tuned: Path, default: Path, seed: int, threads: int) -> Timed:
    """Verify the kernel `tuned`, then time it against the kernel `default`, on inputs drawn from `seed`.

    Times come under `TUNED` and `DEFAULT`; raises `verify.WrongResult`.
    """
    torch.set_num_threads(threads)
    kernel = _load(tuned, problem)
    inputs = inputs_for(kernel, problem.tokens, seed)
    verify(kernel, inputs, problem.tokens, seed)
    kernels = {DEFAULT: _load(default, problem), TUNED: kernel}
    return _time(kernels, problem, inputs, seed, TRIAL)


def compare(problem: Problem, paths: Mapping[str, Path], unverified: Sequence[str], seed: int, threads: int) -> Timed:
    """Time kernels against each other, more often than `assess` does.

    Those in `unverified` are verified first; raises `verify.WrongResult`.
    """
    torch.set_num_threads(threads)
    kernels = {name: _load(path, problem) for name, path in paths.items()}
    inputs = inputs_for(next(iter(kernels.values())), problem.tokens, seed)
    for name in unverified:
        verify(kernels[name], inputs, problem.tokens, seed)
    seconds = FINAL.seconds * max(1, len(kernels) / FINAL_KERNELS)
    return _time(kernels, problem, inputs, seed, replace(FINAL, seconds=seconds))


def compare_separate(
    problem: Problem, fused: Path, parts: Mapping[tuple[str, Direction], Path], seed: int, threads: int
) -> Timed:
    """Time a fused kernel against `parts`, the kernels that do its work one after the other; all are verified already.

    Times come under `FUSED` and `SEPARATE`.
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
    return _interleaved(calls, inputs, seed, FINAL)


@cache
def _load(path: Path, problem: Problem) -> LoadedKernel:
    """Once per file: a path is named by its content."""
    return LoadedKernel(path, problem)


def _time(
    kernels: Mapping[str, LoadedKernel],
    problem: Problem,
    inputs: dict[str, Any],
    seed: int,
    effort: Effort,
) -> Timed:
    """All kernels read and write the same memory, so that where it lies favours none."""
    kernel = next(iter(kernels.values()))
    tokens, slices = problem.tokens, kernel.slices(problem.tokens)
    results = {arg.name: empty_result(arg, tokens, slices, kernel.device) for arg in kernel.arguments if is_result(arg)}
    give_updated(kernel, inputs, results)  # they grow from call to call, which costs no time

    def call(kernel: LoadedKernel) -> Callable[[], object]:
        return lambda: kernel.launch(inputs, results, tokens, slices)

    calls = {name: call(kernel) for name, kernel in kernels.items()}
    return _interleaved(calls, tuple(inputs.values()), seed, effort)


def _interleaved(
    calls: Mapping[str, Callable[[], object]], inputs: tuple[Any, ...], seed: int, effort: Effort
) -> Timed:
    """Time calls on the device that their inputs are on."""
    stopwatch = stopwatch_for(next(value.device for value in inputs if isinstance(value, torch.Tensor)))
    times = interleaved(calls, stopwatch=stopwatch, seed=seed, **asdict(effort))
    return Timed(times, stopwatch.conditions)
