"""Comparison of a fused kernel with the separate kernels that do the same work."""

from __future__ import annotations

import statistics
from dataclasses import replace

from autotune.decision.significance import is_significant
from autotune.measuring.timing import paired_ratio
from autotune.processes.tasks import FUSED, SEPARATE
from autotune.processes.worker import TaskFailed
from autotune.processes.workers import Workers
from tiles.cache.cache import KernelCache, Key
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.target import Device


def compare_with_separate(
    problem: Problem, fused: bytes, cache: KernelCache, device: Device, workers: Workers, seed: int
) -> dict[str, float | bool]:
    """Time a fused kernel against the separate ones as they run in training, with results allocated by every call.

    Returns fields of a record: `separate_ms`, `separate_ratio` (fused/separate, the median of pairs) and
    `separate_wins`, whether that is beyond the noise. Returns none where a separate kernel fails.
    """
    separate = kernel_spec(problem.op, problem.direction).separate
    assert separate
    problems = {(op, direction): replace(problem, op=op, direction=direction) for op, direction in separate.parts}
    try:
        parts = {part: _best(of_part, cache, device, workers) for part, of_part in problems.items()}
        times = workers.compare_separate(problem, fused, parts, seed)
    except TaskFailed:
        return {}
    ratio = paired_ratio(times[FUSED], times[SEPARATE])
    return {
        "separate_ms": statistics.median(times[SEPARATE]),
        "separate_ratio": ratio.median,
        "separate_wins": is_significant(ratio.low),
    }


def _best(problem: Problem, cache: KernelCache, device: Device, workers: Workers) -> bytes:
    """The tuned kernel of a problem, or its default schedule where it has not been tuned; raises `TaskFailed`."""
    record = cache.get(Key.of(problem, device))
    if record is not None:
        return cache.binary_path(record).read_bytes()
    spec = kernel_spec(problem.op, problem.direction)
    problem = spec.canonical(problem)
    (built,) = workers.compile(problem, [spec.default(problem, device.target)], device.target)
    if isinstance(built, TaskFailed):
        raise built
    return built.binary
