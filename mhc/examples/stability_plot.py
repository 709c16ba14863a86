"""Plots and table of the runs that `mhc.examples.stability` recorded.

    python -m mhc.examples.stability_plot RUNS.jsonl FOLDER

Writes curves-RATE.png (loss, gradient norm, composite gains over the steps: median and range of all seeds) for every
learning rate, layers.png (composite gains over the layers at the last step) and composites.png (the map through all
layers at the last step); prints a table in Markdown. Needs matplotlib, which mhc itself does not.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from mhc.diagnostics.plot import draw_mapping
from mhc.examples.stability import read

Record = dict[str, Any]

COLOURS = {"plain": "tab:grey", "hc": "tab:red", "mhc": "tab:blue", "single-pass": "tab:green"}
CURVES = {
    "loss": "training loss, nats a byte",
    "gradient_norm": "gradient norm before clipping",
    "composite_forward": "largest composite gain, forward",
    "composite_backward": "largest composite gain, backward",
}
LAST_STEPS = 20
"""The training loss in the table is the mean of so many."""


def main(runs: str, folder: str) -> None:
    """Write the plots, print the table."""
    records, out = read(Path(runs)), Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    for rate in sorted({rate_of(record) for record in records}):
        plot_curves([record for record in records if rate_of(record) == rate], out / f"curves-{rate:g}.png")
    plot_layers(records, out / "layers.png")
    plot_composites(records, out / "composites.png")
    print("\n".join(table(records)))


def table(records: list[Record]) -> Iterable[str]:
    """One row for every learning rate and residual: median over the seeds (smallest to largest)."""
    columns: dict[str, Callable[[Record], float]] = {
        f"training loss, last {LAST_STEPS} steps": lambda record: statistics.fmean(
            numbers(record["loss"])[-LAST_STEPS:]
        ),
        "validation loss": lambda record: number(record["validation_loss"]),
        "largest gradient norm": lambda record: max(numbers(record["gradient_norm"])),
        "largest gain forward": lambda record: max(numbers(record["composite_forward"])),
        "largest gain backward": lambda record: max(numbers(record["composite_backward"])),
    }
    yield "| rate | residual | seeds | " + " | ".join(columns) + " |"
    yield "|---|---|---|" + "---|" * len(columns)
    for rate in sorted({rate_of(record) for record in records}):
        for residual in COLOURS:
            group = select(records, rate, residual)
            if group:
                cells = (spread([value(record) for record in group]) for value in columns.values())
                yield f"| {rate:g} | {residual} | {len(group)} | " + " | ".join(cells) + " |"


def spread(values: list[float]) -> str:
    """Median (smallest to largest) with four digits."""
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def plot_curves(records: list[Record], path: Path) -> None:
    """One panel a curve, one colour a residual: the median of the seeds as a line in the band of all of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    for panel, (key, label) in zip(figure.subplots(2, 2).flat, CURVES.items(), strict=True):
        for residual, colour in COLOURS.items():
            runs = [numbers(record[key]) for record in records if record["run"]["residual"] == residual]
            if runs:
                by_step = list(zip(*runs, strict=False))  # up to the first end, where a run diverged
                panel.plot([statistics.median(step) for step in by_step], color=colour, label=residual, linewidth=1)
                low, high = [min(step) for step in by_step], [max(step) for step in by_step]
                panel.fill_between(range(len(by_step)), low, high, color=colour, alpha=0.25, linewidth=0)
        panel.set(xlabel="step", ylabel=label, yscale="linear" if key == "loss" else "log")
        panel.legend()
    figure.suptitle(f"peak learning rate {rate_of(records[0]):g}: median and range of the seeds")
    figure.savefig(path, dpi=130)


def plot_layers(records: list[Record], path: Path) -> None:
    """Composite gains from each layer to the last at the last step, one line a seed (figures 3 and 7 of 2512.24880)."""
    from matplotlib.figure import Figure

    rates = sorted({rate_of(record) for record in records})
    figure = Figure(figsize=(10, 3.2 * len(rates)), layout="constrained")
    for row, rate in zip(figure.subplots(len(rates), 2, squeeze=False), rates, strict=True):
        for panel, key in zip(row, ("composite_forward", "composite_backward"), strict=True):
            for residual, colour in COLOURS.items():
                label: str | None = residual
                for record in select(records, rate, residual):
                    if record["layers"]:
                        panel.plot(numbers(record["layers"][key]), color=colour, label=label, linewidth=1)
                        label = None  # named once
            panel.set(
                title=f"rate {rate:g}", xlabel="layer l", ylabel=CURVES[key].replace("largest ", ""), yscale="log"
            )
            panel.legend()
    figure.savefig(path, dpi=130)


def plot_composites(records: list[Record], path: Path) -> None:
    """The map through all layers at the last step, mean over tokens, of every run with maps (figure 8 there)."""
    from matplotlib.figure import Figure

    rows = [group for rate in sorted({rate_of(record) for record in records}) if (group := with_maps(records, rate))]
    across = max(len(group) for group in rows)
    figure = Figure(figsize=(2.6 * across, 2.9 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), across, squeeze=False)
    for row, group in zip(panels, rows, strict=True):
        for panel in row[len(group) :]:
            panel.set_axis_off()
        for panel, record in zip(row, group, strict=False):
            run, flat = record["run"], torch.tensor(numbers(record["layers"]["composite"]))
            title = f"{run['residual']}, rate {rate_of(record):g},\nseed {run['seed']}"
            draw_mapping(panel, title, flat.view(run["size"]["streams"], -1))
    figure.savefig(path, dpi=110)


def with_maps(records: list[Record], rate: float) -> list[Record]:
    """The runs of a learning rate that recorded maps, by residual."""
    return [record for residual in COLOURS for record in select(records, rate, residual) if record["layers"]]


def select(records: list[Record], rate: float, residual: str) -> list[Record]:
    """The runs of a learning rate and residual, every seed."""
    return [record for record in records if rate_of(record) == rate and record["run"]["residual"] == residual]


def rate_of(record: Record) -> float:
    """The peak learning rate of a run."""
    return record["run"]["peak_rate"]


def number(value: float | None) -> float:
    """A recorded number; null is one that was not finite, where a run diverged."""
    return math.inf if value is None else value


def numbers(values: list[float | None]) -> list[float]:
    """Recorded numbers."""
    return [number(value) for value in values]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m mhc.examples.stability_plot RUNS.jsonl FOLDER")
    main(*sys.argv[1:])
