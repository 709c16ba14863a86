"""The comparison of boundaries between sublayers, `step` and `single_pass`, for results/: `python -m
cli.maintain.compare_boundaries OUT.json`. `mhc-tune bench` times one op after another, and machines drift in between.
"""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import torch
import typer

from autotune.measuring.timing import interleaved, narrow, paired_ratio
from cli.bench.cases import make_case
from cli.bench.our_kernels import op_function
from mhc.dispatch.kernels import Kernels, using
from tiles.target import detect_device

BOUNDARIES = ("step", "single_pass")
CELLS = tuple(itertools.product((2, 4, 8), (1280, 2560), (64, 2048), ("bfloat16", "float32")))
"""Streams, width, tokens, dtype."""

ROUNDS, SECONDS, NARROW = 60, 12.0, 0.05
"""What ends a cell: rounds, seconds, or an interval of the ratio of 5 %."""


def main(out: Path) -> None:
    """Time forward and backward of both on default schedules in interleaved rounds; write one row a cell."""
    device, rows = detect_device("cpu"), []
    with using(Kernels.defaults()):
        for cell in CELLS:
            rows.append(compared(*cell))
            typer.echo("n={} C={} T={} {}: ".format(*cell) + f"{rows[-1]['ratio']:.2f}", err=True)
    mean = statistics.geometric_mean(row["ratio"] for row in rows)
    found = {"device": device.as_dict(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    out.write_text(json.dumps({**found, "geometric_mean": mean, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def compared(streams: int, width: int, tokens: int, dtype: str) -> dict[str, Any]:
    """Milliseconds of forward and backward of both, and the ratio of step's to single_pass's with its 95 % interval."""
    cases = {op: make_case(op, streams, width, tokens, dtype, seed=0) for op in BOUNDARIES}
    calls = {op: case.calls(op_function(case), ("both",))["both"] for op, case in cases.items()}
    times = interleaved(calls, rounds=ROUNDS, seconds=SECONDS, enough=lambda times: narrow(times, NARROW), warmup=2)
    ratio = paired_ratio(times["step"], times["single_pass"])
    return {
        **{"streams": streams, "width": width, "tokens": tokens, "dtype": dtype, "rounds": len(times["step"])},
        **{f"{op}_ms": statistics.median(times[op]) for op in BOUNDARIES},
        **{"ratio": ratio.median, "low": ratio.low, "high": ratio.high},
    }


if __name__ == "__main__":
    typer.run(main)
