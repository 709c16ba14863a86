"""Comparison of residual connections: losses and step times of the byte-level transformer.

    python -m mhc.examples.compare_residuals --kernels tuned.mhcpack --json OUT.json

Contenders: `plain` (the usual residual), `hc` and `mhc` on the kernels that are given, and `mhc-eager` on the torch
reference. All see the same batches. They take turns, each step in another order, so that a busy machine slows all
equally; step times are medians. Plotted by `mhc.examples.plot_loss`.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

import mhc
from mhc.examples.model import Residual
from mhc.examples.train_bytes import (
    Outcome,
    Run,
    Step,
    as_json,
    build,
    kernels_for,
    parser_for,
    standard_library,
    training,
    validation_loss,
)
from tiles.cache.cache import write_atomically

CONTENDERS: dict[str, Residual] = {"plain": "plain", "hc": "hc", "mhc": "mhc", "mhc-eager": "mhc"}
EAGER = "mhc-eager"


def compare(run: Run, text: torch.Tensor, kernels: mhc.Kernels) -> dict[str, Outcome]:
    """Train all contenders from scratch with the run's seed and steps; prints about twenty lines of progress."""
    runs = {name: replace(run, residual=residual) for name, residual in CONTENDERS.items()}
    on = dict.fromkeys(runs, kernels) | {EAGER: mhc.Kernels.reference()}
    models = {name: build(one) for name, one in runs.items()}
    turns = {name: training(models[name], one, text) for name, one in runs.items()}
    steps: dict[str, list[Step]] = {name: [] for name in runs}
    order = list(runs)
    for number in range(run.steps):
        for name in order:
            with mhc.using(on[name]):
                steps[name].append(next(turns[name]))
        order = [*order[1:], order[0]]
        if number % max(1, run.steps // 20) == 0:
            losses = "  ".join(f"{name} {steps[name][-1].loss:.4f}" for name in runs)
            print(f"step {number + 1:5d} of {run.steps}  {losses}", flush=True)
    outcomes = {}
    for name, one in runs.items():
        with mhc.using(on[name]):
            outcomes[name] = Outcome(steps[name], validation_loss(models[name], text, one), mhc.kernel_report())
    return outcomes


def extra_time(medians: dict[str, float]) -> float:
    """mHC's time beyond the plain residual's on the given kernels, as a share of that on the torch reference."""
    return (medians["mhc"] - medians["plain"]) / (medians[EAGER] - medians["plain"])


def summary(run: Run, outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """Plain data: the runs as `train_bytes --json` has them, the median step times, mHC's extra time."""
    medians = {name: outcome.median_ms() for name, outcome in outcomes.items()}
    runs = {name: as_json(replace(run, residual=CONTENDERS[name]), outcome) for name, outcome in outcomes.items()}
    return {"runs": runs, "median_step_ms": medians, "extra_time_of_eager": extra_time(medians)}


def table(outcomes: dict[str, Outcome]) -> str:
    """Markdown: losses and the median step time with its quartiles."""
    lines = ["| residual | training loss | validation loss | ms a step (quartiles) |", "|---|---|---|---|"]
    for name, outcome in outcomes.items():
        times = [step.ms for step in outcome.steps[1:] or outcome.steps]
        low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
        losses = f"{outcome.steps[-1].loss:.4f} | {outcome.validation_loss:.4f}"
        lines.append(f"| {name} | {losses} | {middle:.1f} ({low:.1f} to {high:.1f}) |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; 0 when done, 2 for bad input."""
    chosen = parser_for("compare_residuals", __doc__).parse_args(arguments)
    run = Run(steps=chosen.steps, seed=chosen.seed)
    try:
        if run.steps < 2:
            raise mhc.BadInput(f"--steps must be at least 2, got {run.steps}: the first one loads the kernels")
        outcomes = compare(run, standard_library(), kernels_for(chosen.kernels))
    except mhc.BadInput as error:
        print(error, file=sys.stderr)
        return 2
    found = summary(run, outcomes)
    if chosen.json:
        write_atomically(chosen.json, json.dumps(found, indent=1).encode())
    share = found["extra_time_of_eager"]
    print(f"\n{outcomes['mhc'].report}\n\n{table(outcomes)}\n\nmhc's extra time: {share:.0%} of mhc-eager's")
    return 0


if __name__ == "__main__":
    sys.exit(main())
