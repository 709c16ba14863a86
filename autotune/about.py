"""What a study says of itself, as attributes of plain data: whoever opens it needs no kernel cache to understand it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from autotune.final import judging, provenance
from autotune.measure import Roofline, paired_ratio
from autotune.pool import Pool
from tiles.errors import BadInput
from tiles.family import Problem, Traffic
from tiles.target import Device

ABOUT = "about"
"""Study attribute: what is tuned, on what device, with which versions, and the limits of both (`about`)."""

CONCLUDED = "concluded"
"""Study attribute: how many trials were settled when the winner was written, why the search had stopped, the winner's
schedule and measurement, and how all finalists did (`standings`)."""


def about(
    problem: Problem, device: Device, pool: Pool, traffic: Traffic, roofline: Roofline, threads: int
) -> dict[str, Any]:
    """The value of `ABOUT`; rates are in 1e9 a second."""
    return {
        "problem": asdict(problem),
        "device": device.as_dict(),
        "threads": threads,
        "pool": len(pool),
        "pool_digest": pool.digest,
        "default": pool.values(pool.default),
        "bytes": traffic.bytes,
        "flops": traffic.flops,
        "copy_gb_per_s": roofline.copy_gb_per_s,
        "gflops_peak": roofline.gflops,
        "limit_ms": roofline.limit_ms(traffic),
        **provenance(),
    }


def standings(pool: Pool, times: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """How the finalists did against the default, from {member: milliseconds of each round, timed together}.

    Of the rounds that judge (`final.judging`): median times (ms), and the ratio default/finalist with the bounds of its
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


def check_same_search(name: str, stored: Mapping[str, Any] | None, mine: Mapping[str, Any]) -> None:
    """Raise `BadInput` where a study says of itself (`stored`, None for a new one) that it is another search's.

    Its name tells them apart, so this is a study that was renamed or copied by hand.
    """
    for field in ("problem", "device", "threads", "pool_digest"):
        if stored is not None and field in stored and stored[field] != mine[field]:
            raise BadInput(
                f"study {name} must be of this search's {field}, got {stored[field]} where {mine[field]} is searched: "
                "move it away, or use another storage"
            )
