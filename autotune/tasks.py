"""What worker processes do with kernels: verify and time. Compiling is `tiles.compile.compile_kernel` itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from autotune import measure
from autotune.verify import verify
from tiles.family import Direction, Problem
from tiles.registry import kernel_spec
from tiles.runtime import LoadedKernel, empty_result, is_result


@dataclass(frozen=True)
class Effort:
    """How long to time: at most `rounds`, about `seconds`, but never less than `least` rounds."""

    rounds: int
    seconds: float
    least: int


# With fewer than six rounds a confidence interval has no bounds; only half of the final's rounds judge.
TRIAL = Effort(rounds=15, seconds=0.8, least=6)
FINAL = Effort(rounds=60, seconds=4.0, least=12)

TUNED, DEFAULT = "tuned", "default"
FUSED, SEPARATE = "fused", "separate"


def roofline(threads: int) -> measure.Roofline:
    """See `measure.Roofline`."""
    torch.set_num_threads(threads)
    return measure.Roofline.measure()


def assess(problem: Problem, tuned: Path, default: Path, seed: int, threads: int) -> dict[str, list[float]]:
    """Verify the kernel `tuned`, then time it against the kernel `default`, on inputs drawn from `seed`.

    Returns the milliseconds of each round under `TUNED` and `DEFAULT`; raises `verify.WrongResult`.
    """
    torch.set_num_threads(threads)
    kernel = _load(tuned, problem)
    inputs = kernel.spec.inputs(problem, problem.tokens, seed)
    verify(kernel, inputs, problem.tokens, seed)
    kernels = {DEFAULT: _load(default, problem), TUNED: kernel}
    return _time(kernels, problem, inputs, seed, TRIAL)


def compare(
    problem: Problem, paths: Mapping[str, Path], unverified: Sequence[str], seed: int, threads: int
) -> dict[str, list[float]]:
    """Time kernels against each other, more often than `assess` does: {name: milliseconds of each round}.

    Those in `unverified` are verified first; raises `verify.WrongResult`.
    """
    torch.set_num_threads(threads)
    kernels = {name: _load(path, problem) for name, path in paths.items()}
    inputs = next(iter(kernels.values())).spec.inputs(problem, problem.tokens, seed)
    for name in unverified:
        verify(kernels[name], inputs, problem.tokens, seed)
    return _time(kernels, problem, inputs, seed, FINAL)


def compare_separate(
    problem: Problem, fused: Path, parts: Mapping[tuple[str, Direction], Path], seed: int, threads: int
) -> dict[str, list[float]]:
    """Time a fused kernel against `parts`, the kernels that do its work one after the other; all are verified already.

    Returns the milliseconds of each round under `FUSED` and `SEPARATE`.
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

    inputs = tuple(kernel.spec.inputs(problem, problem.tokens, seed).values())
    calls: dict[str, Callable[[], object]] = {
        FUSED: lambda: kernel(*inputs),
        SEPARATE: lambda: separate.call(run, *inputs),
    }
    return measure.interleaved(calls, seed=seed, **asdict(FINAL))


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
) -> dict[str, list[float]]:
    """All kernels read and write the same memory, so that where it lies favours none."""
    kernel = next(iter(kernels.values()))
    tokens, slices = problem.tokens, kernel.slices(problem.tokens)
    results = {arg.name: empty_result(arg, tokens, slices) for arg in kernel.arguments if is_result(arg)}
    for argument in kernel.arguments:
        if argument.role == "updated":  # it grows from call to call, which costs no time
            results[argument.name].copy_(inputs[argument.name])

    def call(kernel: LoadedKernel) -> Callable[[], object]:
        return lambda: kernel.launch(inputs, results, tokens, slices)

    calls = {name: call(kernel) for name, kernel in kernels.items()}
    return measure.interleaved(calls, seed=seed, **asdict(effort))
