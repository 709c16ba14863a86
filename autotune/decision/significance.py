"""Statistical significance: whether a schedule beats the default beyond the noise, or has reached the roofline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from autotune.measuring.roofline import Roofline
from autotune.measuring.timing import Ratio, paired_ratio
from autotune.search.pool import Pool
from tiles.kernels.spec import Traffic

LEAST_GAIN = 0.01
"""Least speed-up over the default at the lower end of the confidence interval: less may come from where code happens to
lie in memory."""


FLAT_SCHEDULES, FLAT_SPREAD = 5, 0.02
"""A kernel's schedule does not matter where so many, tried far apart, are within this share of the default's time and
within the noise."""

SELECTION_STRIDE = 3
"""One in so many rounds selects the fastest; the others judge it."""


def selection_rounds(rounds: Sequence[float]) -> Sequence[float]:
    """The rounds that select the fastest."""
    return rounds[::SELECTION_STRIDE]


def judging_rounds(rounds: Sequence[float]) -> Sequence[float]:
    """The rounds that judge it: the rounds that selected it are biased in its favour."""
    return [ms for number, ms in enumerate(rounds) if number % SELECTION_STRIDE]


def decide(default: str, times: Mapping[str, Sequence[float]]) -> tuple[str, float, float, float]:
    """Choose from {name: milliseconds of each round, timed together}: (name, its ms, the default's ms, their ratio).

    Some rounds select the fastest, the others judge it, and it wins over `default` beyond the noise only. Only one is
    judged, so that with equally fast schedules the default loses in at most 2.5 % of all cases: in shuffled rounds each
    of two equals is as likely to come out faster, whatever the noise.
    """
    selecting = {name: selection_rounds(rounds) for name, rounds in times.items()}
    pick = max(times, key=lambda name: paired_ratio(selecting[default], selecting[name]).median)
    judged = {name: judging_rounds(times[name]) for name in (default, pick)}
    default_ms = statistics.median(judged[default])
    ratio = paired_ratio(judged[default], judged[pick])
    if pick == default or not is_significant(ratio.low):
        return default, default_ms, default_ms, 1.0
    return pick, statistics.median(judged[pick]), default_ms, ratio.median


def is_significant(low: float) -> bool:
    """Whether a speed-up with the lower confidence bound `low` is beyond `LEAST_GAIN`."""
    return low > 1 + LEAST_GAIN


def is_flat(ratios: Sequence[Ratio]) -> bool:
    """Whether schedules of different code (the default among them) show no difference: their speed-ups are about 1."""

    def like_the_default(ratio: Ratio) -> bool:
        return abs(ratio.median - 1) <= FLAT_SPREAD and ratio.low <= 1 + LEAST_GAIN and ratio.high >= 1 - LEAST_GAIN

    return len(ratios) >= FLAT_SCHEDULES and all(map(like_the_default, ratios))


def lower_bound_ms(traffic: Traffic, roofline: Roofline) -> float:
    """A cautious `Roofline.limit_ms`: a kernel that takes no longer cannot be improved.

    A CPU reads a line before it writes it, so a copy of B bytes moves 3B where 2B are counted. The lower of both counts
    is taken: a kernel that mostly reads can be faster than a copy by the usual count.
    """
    moved = min(traffic.bytes, (traffic.read + 2 * traffic.written) / 1.5)
    return max(moved / roofline.copy_gb_per_s, traffic.flops / roofline.gflops) / 1e6


def near_lower_bound(default_ms: float, ratio: Ratio, bound: float, noise: float) -> bool:
    """Whether a schedule is within `noise` (a fraction) of the time `bound` (ms).

    `ratio` is its speed-up over the default, of which the lower confidence bound counts. A schedule that beats the
    bound by more than the noise shows that the roofline was measured too low: that is no reason to stop.
    """
    most = default_ms / bound
    return most <= (1 + noise) * ratio.low and most >= (1 - noise) * ratio.median


def finalist_results(pool: Pool, times: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Results of the finalists against the default, from {member: milliseconds of each round, timed together}.

    Over the `judging_rounds`: median times (ms), and the ratio default/finalist with the bounds of its 95 % confidence
    interval, None where there are too few rounds for one.
    """
    judged = {int(member): judging_rounds(rounds) for member, rounds in times.items()}
    rows = []
    for member, rounds in judged.items():
        ratio = paired_ratio(judged[pool.default], rounds)
        bounded = math.isfinite(ratio.high)
        rows.append(
            {
                "schedule": pool.values(member),
                "default": member == pool.default,
                "ms": statistics.median(rounds),
                "ratio": ratio.median,
                "low": ratio.low if bounded else None,
                "high": ratio.high if bounded else None,
            }
        )
    return rows
