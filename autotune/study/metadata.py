"""Metadata of a study, as attributes of plain data that are understood without the kernel cache."""

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

METADATA = "about"
"""Study attribute: what is tuned, on what device, with which versions, and the limits of both (`study_metadata`)."""

CONCLUSION = "concluded"
"""Study attribute: number of evaluated trials when the winner was written, reason to stop, the winner's schedule and
measurement, and the finalists (`significance.finalist_results`)."""


def study_metadata(
    problem: Problem, device: Device, pool: Pool, traffic: Traffic, roofline: Roofline, threads: int
) -> dict[str, Any]:
    """The value of `METADATA`; rates are in 1e9 a second."""
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
    """Raise `BadInput` where a study's `stored` metadata (None for a new study) is another search's.

    Studies' names differ by search, so such a study was renamed or copied by hand.
    """
    for field in ("problem", "device", "threads", "pool_digest"):
        if stored is not None and field in stored and stored[field] != mine[field]:
            raise BadInput(
                f"study {name} must be of this search's {field}, got {stored[field]} where {mine[field]} is searched: "
                "move it away, or use another storage"
            )
