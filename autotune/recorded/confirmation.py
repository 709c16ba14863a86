"""Confirmation of a sweep: what was timed on a busy machine is timed again, and the fastest meet side by side.

The fastest of many noisy timings is faster than it is: the more members, the luckier the best of them. And where
another program has the processor, two kernels take the same time, that of waiting for it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from autotune.measuring.timing import paired_ratio
from autotune.recorded.findings import Line

MARGIN = 0.05
"""Members within this share of the fastest one's time meet it: about the noise of one short timing."""

MOST = 20
"""Members that meet, or fewer; more only where all of those turn out slower than one that was not among them."""

BUSY = 1.5
"""A timing was disturbed where the default took this many times its median: virtual machines wander by a third."""


def disturbed(found: Mapping[int, Line]) -> list[int]:
    """The members that were timed while the machine was busy with something else, one of each generated code.

    Confirmed ones met the fastest under equal conditions: they stay.
    """
    usual = statistics.median(said["default_ms"] for said in found.values() if "ratio" in said)
    codes: dict[str, int] = {}
    for member, said in found.items():
        if "ratio" in said and "confirmed" not in said and said["default_ms"] > BUSY * usual:
            codes.setdefault(said["source"], member)
    return list(codes.values())


def contenders(found: Mapping[int, Line]) -> list[int]:
    """The members to time again side by side, fastest first, one of each generated code; none where that is done.

    The fastest after a meeting may be one that was not in it: ask again until there is none.
    """
    codes: dict[str, int] = {}
    for member, said in found.items():
        if "ratio" in said:
            codes.setdefault(said["source"], member)
    fastest = sorted(codes.values(), key=lambda member: -found[member]["ratio"])
    least = found[fastest[0]]["ratio"] * (1 - MARGIN)
    known = [member for member in fastest if "confirmed" in found[member]]
    new = [member for member in fastest if "confirmed" not in found[member] and found[member]["ratio"] >= least]
    room = MOST - len(known) if fastest[0] in known else MOST
    return new[: max(0, room)]


def confirmed(times: Mapping[str, Sequence[float]], default: str, name: str, source: str) -> Line:
    """The finding of the member `name` from the rounds of a meeting, in which `default` took part."""
    rounds = times[name]
    return {
        "ratio": paired_ratio(times[default], rounds).median,
        "default_ms": statistics.median(times[default]),
        **spread(rounds),
        "rounds": len(rounds),
        "source": source,
        "confirmed": True,
    }


def spread(rounds: Sequence[float]) -> dict[str, float]:
    """The quartiles `low` and `high` of the rounds, over their median."""
    low, middle, high = statistics.quantiles(rounds, n=4, method="inclusive")
    return {"low": low / middle, "high": high / middle}
