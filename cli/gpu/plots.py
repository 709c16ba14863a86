"""Plots of the results of `mhc-tune gpu`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.gpu.plan import DECODE_TOKENS, MAIN_SHAPE
from cli.gpu.table import SHAPE, Row, by_impl, measured_rows, our_row
from cli.ui.output import say

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOTTED = ("tuned", "default", "tile-kernels", "liger", "compile", "eager")


def write(values: Mapping[str, Any], folder: Path) -> None:
    """Write the plots that there is data for: shares of copy bandwidth, layer over width, pre over few tokens."""
    try:
        import matplotlib
    except ImportError:
        say("no plots: matplotlib is not installed: pip install matplotlib")
        return
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = measured_rows(values)
    for name, drawing in {"shares": _shares, "widths": _widths, "tokens": _tokens}.items():
        figure, axes = plt.subplots(figsize=(7, 4))
        if drawing(axes, rows):
            axes.set_title(f"{values['device']['name']}: {axes.get_title()}", fontsize=10)
            figure.tight_layout()
            figure.savefig(folder / f"{name}.png", dpi=110)
        plt.close(figure)


def _shares(axes: Axes, rows: Sequence[Row]) -> bool:
    """Our kernels' share of the copy bandwidth by op, at the main shape."""
    here = [row for row in rows if (row["streams"], row["width"], row["tokens"]) == MAIN_SHAPE]
    shares = {
        f"{op} {direction}": our["percent_of_copy"]
        for (op, direction), impls in by_impl(here, ("op", "direction")).items()
        if (our := our_row(impls))
    }
    axes.barh(list(reversed(shares)), list(reversed(shares.values())), height=0.6)
    axes.axvline(100, color="gray", linewidth=0.8)
    axes.set(xlabel="% of the copy bandwidth", title="n = {}, width {}, {} tokens, bfloat16".format(*MAIN_SHAPE))
    return bool(shares)


def _widths(axes: Axes, rows: Sequence[Row]) -> bool:
    """The layer, forward and backward, over width."""
    streams, _, tokens = MAIN_SHAPE
    here = [row for row in rows if (row["op"], row["direction"]) == ("layer", "both")]
    here = [row for row in here if (row["streams"], row["tokens"]) == (streams, tokens)]
    _lines(axes, here, "width", 1.0)
    axes.set(xlabel="width", ylabel="ms", title=f"layer, forward and backward, n = {streams}, {tokens} tokens")
    return bool(here)


def _tokens(axes: Axes, rows: Sequence[Row]) -> bool:
    """pre, forward, over few tokens."""
    streams, width, _ = MAIN_SHAPE
    here = [
        row for row in rows if (row["op"], row["direction"]) == ("pre", "forward") and row["tokens"] <= DECODE_TOKENS
    ]
    here = [row for row in here if (row["streams"], row["width"]) == (streams, width)]
    _lines(axes, here, "tokens", 1e3)
    axes.set(xlabel="tokens", ylabel="us", title=f"pre, forward, n = {streams}, width {width}")
    return bool(here)


def _lines(axes: Axes, rows: Sequence[Row], along: str, scale: float) -> None:
    """One line per implementation, both axes logarithmic."""
    by_shape = by_impl(rows, SHAPE).values()
    for impl in (*PLOTTED, "unsplit"):
        points = sorted((impls[impl][along], scale * impls[impl]["median_ms"]) for impls in by_shape if impl in impls)
        if points:
            axes.loglog(*zip(*points, strict=True), marker="o", label=impl)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
