"""Stability of a deep, narrow byte-level transformer with each residual connection: loss, gradient norm, map gains.

    python -m mhc.examples.stability RUNS.jsonl

60 connections (30 blocks of attention and MLP), 4 streams; every step records the loss, the gradient's norm and the
gains of the composite residual map. Runs that differ in the residual only see the same batches. One line a run; runs
that the file already holds are skipped, so that an interrupted command resumes. Plotted by
`mhc.examples.stability_plot`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch

import mhc
from mhc.diagnostics import Measures, Watch, backward_gain, composites, forward_gain
from mhc.diagnostics.log import finite
from mhc.examples.model import Residual, Size
from mhc.examples.train_bytes import (
    Run,
    build,
    kernels_for,
    standard_library,
    training,
    validation_loss,
    where_it_ran,
)
from tiles.cache.cache import write_atomically

DEEP = Size(blocks=30, width=64, heads=4, context=64, streams=4)
PEAK_RATES = (1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2)


def plan() -> list[Run]:
    """Every run: all residuals of a seed, then the next seed, then the next learning rate."""
    return [
        Run(residual, steps=300, seed=seed, batch=4, size=DEEP, peak_rate=rate)
        for rate in PEAK_RATES
        for seed in SEEDS
        for residual in get_args(Residual)
    ]


def record(run: Run, text: torch.Tensor) -> dict[str, Any]:
    """Train one run; stops early where the loss is no longer finite. Plain data: a list entry a step.

    `composite_forward` and `composite_backward` are the largest over all layers l of the gain of the map from layer l
    to the last, mean over tokens (`mhc.diagnostics`); `layers` holds all measures at the last step.
    """
    model = build(run)
    columns: dict[str, list[float]] = {
        name: [] for name in ("loss", "gradient_norm", "composite_forward", "composite_backward")
    }
    with Watch(model) as watch:
        for step in training(model, run, text):
            measured = (step.loss, step.gradient_norm, *worst_gains(list(watch.layers().values())))
            for column, value in zip(columns.values(), measured, strict=True):
                column.append(float(f"{value:.6g}"))
            if not math.isfinite(step.loss):
                break
        last = watch.measure() if watch.layers() else None
        held_out = validation_loss(model, text, run)
    kernels = sorted({row.runs for row in mhc.kernel_report()})
    result = {**columns, "validation_loss": held_out, "layers": last and at_the_end(last), "kernels": kernels}
    return {"run": asdict(run), **where_it_ran(), **finite(result)}


@torch.no_grad()
def worst_gains(layers: Sequence[torch.Tensor]) -> tuple[float, float]:
    """The largest forward and backward gain of any composite; 1 without maps: the plain residual is the identity."""
    if not layers:
        return 1.0, 1.0
    maps = torch.stack(composites(layers)).flatten(1, -3)
    return forward_gain(maps).mean(1).max().item(), backward_gain(maps).mean(1).max().item()


def at_the_end(measures: Measures) -> dict[str, Any]:
    """All measures of every layer, and `composite`, the map from the first layer to the last, row by row."""
    lists = {**measures.series(), "composite": measures.composites[0].flatten().tolist()}
    return {name: [float(f"{value:.6g}") for value in values] for name, values in lists.items()}


def read(path: Path) -> list[dict[str, Any]]:
    """The records in a file, none where it is missing."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; 0 when done, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m mhc.examples.stability", description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, metavar="RUNS.jsonl", help="one line a run, added to what is there")
    parser.add_argument("--kernels", metavar="PACK", help="pack or cache folder; none: torch (default: user's cache)")
    chosen = parser.parse_args(arguments)
    records, text = read(chosen.runs), standard_library()
    try:
        kernels = kernels_for(chosen.kernels)
    except mhc.BadInput as error:
        print(error, file=sys.stderr)
        return 2
    done = [held["run"] for held in records]
    for number, run in enumerate(runs := plan(), start=1):
        if asdict(run) in done:
            continue
        with mhc.using(kernels):
            records.append(record(run, text))
        write_atomically(chosen.runs, "".join(json.dumps(held) + "\n" for held in records).encode())
        gains = [max(filter(None, records[-1][f"composite_{way}"])) for way in ("forward", "backward")]
        print(
            f"{number:3d} of {len(runs)}  {run.residual:5s} rate {run.peak_rate:g} seed {run.seed}  "
            f"loss {records[-1]['loss'][-1]}  largest gains {gains[0]:.3g} {gains[1]:.3g}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
