"""Does the best schedule beat the default beyond the noise, and does it leave anything to find?"""

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
"""A schedule has to be faster than the default by this much at the cautious end of the confidence interval: what is
less may as well be where its code happens to lie."""


PICKING = 3
"""Every so many rounds one is for picking the fastest; the others judge it."""


def picking(rounds: Sequence[float]) -> Sequence[float]:
    """The rounds that name the fastest."""
    return rounds[::PICKING]


def judging(rounds: Sequence[float]) -> Sequence[float]:
    """The rounds that judge it: judged by those that it was picked for, the luckiest would look better than it is."""
    return [ms for number, ms in enumerate(rounds) if number % PICKING]


def decide(default: str, times: Mapping[str, Sequence[float]]) -> tuple[str, float, float, float]:
    """Choose from {name: milliseconds of each round, timed together}: (name, its ms, the default's ms, their ratio).

    Some rounds name the fastest, the others judge it, and it wins over `default` beyond the noise only. However many
    there are, one is judged, so that of equally fast ones a wrong one wins in at most 2.5 % of all cases: in rounds of
    shuffled order each of two equals is as likely to come out faster, whatever the noise.
    """
    pick = max(times, key=lambda name: paired_ratio(picking(times[default]), picking(times[name])).median)
    judged = {name: judging(times[name]) for name in (default, pick)}
    default_ms = statistics.median(judged[default])
    ratio = paired_ratio(judged[default], judged[pick])
    if pick == default or not worth_it(ratio.low):
        return default, default_ms, default_ms, 1.0
    return pick, statistics.median(judged[pick]), default_ms, ratio.median


def worth_it(low: float) -> bool:
    """Whether a speed-up whose confidence interval starts at `low` is taken."""
    return low > 1 + LEAST_GAIN


def floor_ms(traffic: Traffic, roofline: Roofline) -> float:
    """`Roofline.limit_ms`, with bytes counted cautiously: where a kernel reaches this, there is nothing left to find.

    A CPU reads a line before it writes it, so a copy of B bytes moves 3B where 2B are counted. The lower of both counts
    is taken: a kernel that mostly reads can be faster than a copy by the usual count.
    """
    moved = min(traffic.bytes, (traffic.read + 2 * traffic.written) / 1.5)
    return max(moved / roofline.copy_gb_per_s, traffic.flops / roofline.gflops) / 1e6


def at_floor(default_ms: float, ratio: Ratio, floor: float, noise: float) -> bool:
    """Whether a schedule leaves less than `noise` (a fraction) up to the time `floor` (ms), as far as can be told.

    `ratio` is how much faster than the default it is, and its cautious end counts. One that is faster than the floor
    by more than the noise says that something slowed the machine while the roofline was measured: that is no reason.
    """
    most = default_ms / floor
    return most <= (1 + noise) * ratio.low and most >= (1 - noise) * ratio.median


def standings(pool: Pool, times: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """How the finalists did against the default, from {member: milliseconds of each round, timed together}.

    Of the rounds that judge (`judging`): median times (ms), and the ratio default/finalist with the bounds of its
    95 % confidence interval, None where there are too few rounds to bound it.
    """
    judged = {int(member): judging(rounds) for member, rounds in times.items()}
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
