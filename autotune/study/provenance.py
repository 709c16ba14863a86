"""Measurement and provenance of a record: how fast its kernel is, and where and when it was made."""

from __future__ import annotations

import platform
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from autotune.measuring.roofline import Roofline
from autotune.study.redact import without_password
from tiles.compiler.toolchain import TILELANG
from tiles.kernels.spec import Traffic


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
    """The measurement of a record. `ratio` is default/tuned, the median of pairs; rates are in 1e9 a second.

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
    """Where, when and with which versions a record is made, and `more` fields."""
    command = without_password(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "host": platform.node(),
        "tilelang": TILELANG,
        "torch": str(torch.__version__),
        "command": "".join(letter if letter.isprintable() else " " for letter in command)[:1000],
        **more,
    }
