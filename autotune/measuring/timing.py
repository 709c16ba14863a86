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
    enough: Callable[[Mapping[str, Sequence[float]]], bool] | None = None,
) -> dict[str, list[float]]:
    """Time calls against each other: {name: milliseconds of each round}, all lists equally long.

    Each round runs every call once, on cold caches, in an order shuffled by `seed`, so that the machine's drift affects
    all alike. Stops after `rounds`; once there are `least` rounds also after `seconds`, or where the times are
    `enough`. `warmup` rounds run first and do not count. Without a `stopwatch` the calls run on the CPU.
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
        if done >= least and (time.perf_counter() > deadline or (enough is not None and enough(times))):
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


def narrow(times: Mapping[str, Sequence[float]], width: float) -> bool:
    """Whether the interval of the ratio of the first to every other is at most `width` of its median wide.

    It depends on how much the times scatter, and not on which are faster: rounds that end by it favour none.
    """
    first, *others = times.values()
    ratios = [paired_ratio(first, other) for other in others]
    return all(ratio.high - ratio.low <= width * ratio.median for ratio in ratios)
