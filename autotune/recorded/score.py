"""Score of a search, against a random search that is calculated instead of drawn.

After Willemsen et al., "A methodology for comparing optimization algorithms for auto-tuning" (2024).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from autotune.recorded.spaces import RecordedSpace


def calculated_random_search(space: RecordedSpace, trials: int) -> list[float]:
    """The expected best milliseconds after 1, 2, ... `trials` random trials without repetition, exactly.

    Of N members, sorted by time, the k-th fastest (from 0) is the best of t drawn ones with probability
    C(N-1-k, t-1) / C(N, t). Where nothing that was drawn runs, the slowest member that runs stands in. In a space that
    has a default the search begins with it, as ours does: one trial is spent, and no result is worse.
    """
    failed = sum(ms is None for ms in space.ms)
    times = sorted(ms for ms in space.ms if ms is not None) + [space.worst] * failed
    if not space.has_default:
        return [_expected_least(times, drawn) for drawn in range(1, trials + 1)]
    default = best_so_far(space, [space.pool.default])[0]
    times.remove(default)
    capped = sorted(min(time, default) for time in times)
    return [default, *(_expected_least(capped, drawn) for drawn in range(1, trials))]


def _expected_least(times: Sequence[float], drawn: int) -> float:
    """The expected least of `drawn` of the sorted `times`; of more than there are, the least of all.

    One rank's probability is the one before it, times the ratio of their binomial coefficients.
    """
    count = len(times)
    if drawn >= count:
        return times[0] if times else 0.0
    expected, chance = 0.0, drawn / count
    for rank, time in enumerate(times[: count - drawn + 1]):
        expected += chance * time
        left = count - 1 - rank
        chance = chance * (left - drawn + 1) / left if left else 0.0
    return expected


def best_so_far(space: RecordedSpace, members: Sequence[int | None]) -> list[float]:
    """The least milliseconds after each trial; None is a trial that tried no member.

    Until one that runs was tried, the slowest member that runs stands in.
    """
    found, least = [], space.worst
    for member in members:
        ms = None if member is None else space.ms[member]
        least = least if ms is None else min(least, ms)
        found.append(least)
    return found


def score(space: RecordedSpace, runs: Sequence[Sequence[float]]) -> float:
    """The mean over t of P(t) = (S_rand(t) - F(t)) / (S_rand(t) - S_opt).

    `runs` holds, for each seed, the best milliseconds after each trial: F is their mean, S_rand the calculated random
    search, S_opt the optimum. 0 is as good as random search, 1 finds the optimum at once. Trials at which random search
    has the optimum for certain do not count.
    """
    baseline = calculated_random_search(space, len(runs[0]))
    gained = [
        (random - statistics.fmean(found)) / (random - space.optimum)
        for random, found in zip(baseline, zip(*runs, strict=True), strict=True)
        if random > space.optimum * (1 + 1e-9)
    ]
    return statistics.fmean(gained) if gained else 0.0


def trials_to(space: RecordedSpace, found: Sequence[float], share: float) -> int | None:
    """The first trial whose best has `share` of the optimum's speed, counted from 1; None where none has."""
    return next((trial for trial, ms in enumerate(found, 1) if space.optimum / ms >= share), None)
