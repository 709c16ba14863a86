"""Plots of the measures as in arXiv 2512.24880. Need matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mhc.diagnostics.watch import Measures


def plot_gains(measures: Measures, path: str | Path) -> None:
    """Plot gains over the layers: of each layer, and of the composite from each to the last (figure 3 of the paper)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots(1, 2)
    curves = [
        ("one layer", measures.forward, measures.backward),
        ("composite, from layer l to the last", measures.composite_forward, measures.composite_backward),
    ]
    for panel, (title, forward, backward) in zip(axes, curves, strict=True):
        panel.plot(forward, label="forward (row sums)")
        panel.plot(backward, label="backward (column sums)", linestyle="--")
        panel.set(title=title, xlabel="layer l", ylabel="Amax gain, mean over tokens", yscale="log")
        panel.legend()
    figure.savefig(path, dpi=150)


def plot_mappings(measures: Measures, path: str | Path) -> None:
    """Plot maps averaged over tokens (figure 8 of the paper): of the first, middle and last layer, and the composites
    from the first and from the middle layer to the last. Row sums (forward gain) and column sums (backward gain) are
    the tick labels.
    """
    from matplotlib.figure import Figure

    last = len(measures.names) - 1
    maps = {f"layer {place}": measures.mappings[place] for place in (0, last // 2, last)}
    maps |= {f"layers {place} to {last}": measures.composites[place] for place in (0, last // 2)}
    figure = Figure(figsize=(3 * len(maps), 3.2), layout="constrained")
    for panel, (title, mapping) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
        draw_mapping(panel, title, mapping)
    figure.savefig(path, dpi=150)


def draw_mapping(panel: Any, title: str, mapping: torch.Tensor) -> None:
    """Draw a map as a grid of colours with its numbers."""
    streams, largest = len(mapping), float(mapping.abs().max())
    panel.imshow(mapping.tolist(), cmap="RdBu", vmin=-largest, vmax=largest)
    if streams <= 8:  # more would not be legible
        for row in range(streams):
            for column in range(streams):
                value = float(mapping[row, column])
                colour = "white" if abs(value) > 0.6 * largest else "black"
                panel.text(column, row, short(value), ha="center", va="center", color=colour, fontsize=8)
    rows, columns = mapping.sum(1).tolist(), mapping.sum(0).tolist()
    panel.set_yticks(range(streams), [short(total) for total in rows], fontsize=8)
    panel.set_xticks(range(streams), [short(total) for total in columns], fontsize=8)
    panel.set(title=title, ylabel="row sums", xlabel="column sums")


def short(value: float) -> str:
    """A number in at most six characters, so that neighbours do not overlap: two decimals where it is small."""
    size = abs(value)
    if size >= 999.5:
        return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
    return f"{value:.{2 if size < 9.995 else 1 if size < 99.95 else 0}f}"
