"""Timing of interleaved calls, and confidence intervals of their ratios."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from autotune.measuring.stopwatch import CpuStopwatch, Stopwatch


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    stopwatch: Stopwatch | None = None,
    rounds: int = 20,
    seconds: float = math.inf,
    least: int = 5,
    warmup: int = 1,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Time calls against each other: {name: milliseconds of each round}, all lists equally long.

    Each round runs every call once, on cold caches, in an order shuffled by `seed`, so that the machine's drift affects
    all alike. Stops after `rounds`, or after `seconds` once there are `least` rounds. `warmup` rounds run first and do
    not count. Without a `stopwatch` the calls run on the CPU.
    """
    stopwatch = stopwatch or CpuStopwatch()
    prepared = {name: stopwatch.prepared(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(seed)
    for _ in range(warmup):
        for name in order:
            prepared[name]()
    deadline = time.perf_counter() + seconds
    for done in range(rounds):
        if done >= least and time.perf_counter() > deadline:
            break
        shuffle.shuffle(order)
        for name in order:
            times[name].append(stopwatch.milliseconds(prepared[name]))
    stopwatch.observe(list(prepared.values()))
    return times


@dataclass(frozen=True)
class Ratio:
    """A speed-up: the median of paired ratios, and the bounds of its 95 % confidence interval."""

    median: float
    low: float
    high: float


def paired_ratio(slow_ms: Sequence[float], fast_ms: Sequence[float]) -> Ratio:
    """slow/fast over rounds timed together.

    The bounds are those of the sign test, exact and distribution-free: the k-th smallest and the k-th largest ratio,
    with k the largest number for which fewer than k heads in n fair flips have a probability of at most 2.5 %.
    Fewer than six rounds bound nothing.
    """
    ratios = sorted(slow / fast for slow, fast in zip(slow_ms, fast_ms, strict=True))
    outside, below = -1, 0.0
    while (below := below + math.comb(len(ratios), outside + 1) / 2 ** len(ratios)) <= 0.025:
        outside += 1
    median = statistics.median(ratios)
    if outside < 0:
        return Ratio(median, 0.0, math.inf)
    return Ratio(median, ratios[outside], ratios[-1 - outside])
