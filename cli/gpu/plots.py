"""Pictures of the results of `mhc-tune gpu`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.gpu.plan import FEW, TELLING
from cli.gpu.table import SHAPE, Row, best_of_ours, by_impl, measured_rows
from cli.ui.output import say

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DRAWN = ("tuned", "default", "tile-kernels", "liger", "compile", "eager")


def draw(values: Mapping[str, Any], folder: Path) -> None:
    """Draw what there is data for: shares of the copy bandwidth, the layer over widths, and few tokens."""
    try:
        import matplotlib
    except ImportError:
        say("no pictures: matplotlib is not installed: pip install matplotlib")
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
    """Our share of the copy bandwidth, by op, at the most telling shape."""
    here = [row for row in rows if (row["streams"], row["width"], row["tokens"]) == TELLING]
    shares = {
        f"{op} {direction}": ours["percent_of_copy"]
        for (op, direction), impls in by_impl(here, ("op", "direction")).items()
        if (ours := best_of_ours(impls))
    }
    axes.barh(list(reversed(shares)), list(reversed(shares.values())), height=0.6)
    axes.axvline(100, color="gray", linewidth=0.8)
    axes.set(xlabel="% of the copy bandwidth", title="n = {}, width {}, {} tokens, bfloat16".format(*TELLING))
    return bool(shares)


def _widths(axes: Axes, rows: Sequence[Row]) -> bool:
    """The layer, forward and backward, over widths."""
    streams, _, tokens = TELLING
    here = [row for row in rows if (row["op"], row["direction"]) == ("layer", "both")]
    here = [row for row in here if (row["streams"], row["tokens"]) == (streams, tokens)]
    _lines(axes, here, "width", 1.0)
    axes.set(xlabel="width", ylabel="ms", title=f"layer, forward and backward, n = {streams}, {tokens} tokens")
    return bool(here)


def _tokens(axes: Axes, rows: Sequence[Row]) -> bool:
    """All that precedes a sublayer, forward, at few tokens."""
    streams, width, _ = TELLING
    here = [row for row in rows if (row["op"], row["direction"]) == ("pre", "forward") and row["tokens"] <= FEW]
    here = [row for row in here if (row["streams"], row["width"]) == (streams, width)]
    _lines(axes, here, "tokens", 1e3)
    axes.set(xlabel="tokens", ylabel="us", title=f"pre, forward, n = {streams}, width {width}")
    return bool(here)


def _lines(axes: Axes, rows: Sequence[Row], along: str, scale: float) -> None:
    """A line for each implementation, both axes logarithmic."""
    by_shape = by_impl(rows, SHAPE).values()
    for impl in (*DRAWN, "unsplit"):
        points = sorted((impls[impl][along], scale * impls[impl]["median_ms"]) for impls in by_shape if impl in impls)
        if points:
            axes.loglog(*zip(*points, strict=True), marker="o", label=impl)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
