"""What a study says of itself, as attributes of plain data: whoever opens it needs no kernel cache to understand it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from autotune.measuring.roofline import Roofline
from autotune.search.pool import Pool
from autotune.study.provenance import provenance
from tiles.errors import BadInput
from tiles.kernels.spec import Problem, Traffic
from tiles.target import Device

ABOUT = "about"
"""Study attribute: what is tuned, on what device, with which versions, and the limits of both (`about`)."""

CONCLUDED = "concluded"
"""Study attribute: how many trials were settled when the winner was written, why the search had stopped, the winner's
schedule and measurement, and how all finalists did (`final.standings`)."""


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
