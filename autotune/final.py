"""The end of a search: does the best schedule beat the default beyond the noise, and what is written about it?"""

from __future__ import annotations

import platform
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from autotune.measure import Roofline, paired_ratio
from tiles.family import Traffic
from tiles.toolchain import TILELANG

LEAST_GAIN = 0.01
"""A schedule has to be faster than the default by this much at the cautious end of the confidence interval: what is
less may as well be where its code happens to lie."""


def decide(default: str, times: Mapping[str, Sequence[float]]) -> tuple[str, float, float, float]:
    """Choose from {name: milliseconds of each round, timed together}: (name, its ms, the default's ms, their ratio).

    The even rounds name the fastest, the odd rounds judge it: judged by the rounds that it was picked for, the luckiest
    of several would look better than it is. It wins over `default` beyond the noise only.
    """
    pick = min(times, key=lambda name: statistics.median(times[name][::2]))
    judged = {name: times[name][1::2] for name in (default, pick)}
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


def measurement(
    *,
    tuned_ms: float,
    default_ms: float,
    ratio: float,
    traffic: Traffic,
    roofline: Roofline,
    threads: int,
    trials: int,
    default_kept: bool,
) -> dict[str, Any]:
    """A record's measurement. `ratio` is default/tuned, the median of pairs; rates are in 1e9 a second.

    `percent_of_copy` compares the bytes with copy bandwidth, `percent_of_limit` the time with the roofline's.
    """
    gb_per_s, limit_ms = traffic.bytes / tuned_ms / 1e6, roofline.limit_ms(traffic)
    return {
        "tuned_ms": tuned_ms,
        "default_ms": default_ms,
        "ratio": ratio,
        "bytes": traffic.bytes,
        "gb_per_s": gb_per_s,
        "copy_gb_per_s": roofline.copy_gb_per_s,
        "percent_of_copy": 100 * gb_per_s / roofline.copy_gb_per_s,
        "flops": traffic.flops,
        "gflops_peak": roofline.gflops,
        "limit_ms": limit_ms,
        "percent_of_limit": 100 * limit_ms / tuned_ms,
        "threads": threads,
        "trials": trials,
        "default_kept": default_kept,
    }


def provenance(**more: str | int) -> dict[str, Any]:
    """Where and when a record was made, and `more` that its maker knows."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "host": platform.node(),
        "tilelang": TILELANG,
        "torch": str(torch.__version__),
        "command": "".join(letter if letter.isprintable() else " " for letter in command)[:1000],
        **more,
    }
