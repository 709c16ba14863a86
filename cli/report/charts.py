"""Charts of a report as inline SVG. Colours are the page's CSS variables, so that they follow light and dark mode."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tiles.errors import BadInput

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"ink": "#010101", "soft": "#020202", "line": "#030303", "accent": "#040404", "bad": "#050505"}
"""CSS variable of the page -> the placeholder colour that matplotlib draws with, replaced in the SVG."""

INK, SOFT, LINE, ACCENT, BAD = COLOURS.values()

SIZE = (4.6, 2.7)
"""Inches at 72 dpi: narrow enough for a phone without shrinking the text."""

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mhc-tune",
    "font.size": 9,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "axes.unicode_minus": False,
    "text.parse_math": False,  # text from files
}


def charts(summary: Mapping[str, Any], number: int) -> dict[str, str]:
    """{name: SVG} of the charts that a study's summary has data for; `number` makes their ids unique.

    Raises `BadInput` if matplotlib is missing.
    """
    drawings = {"history": _history, "intervals": _intervals, "roofline": _roofline, "importance": _importance}
    drawn = {}
    for name, draw in drawings.items():
        svg = _svg(draw, summary, f"s{number}-{name}-")
        if svg:
            drawn[name] = svg
    return drawn


def require_matplotlib() -> None:
    """Raise `BadInput` if matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise BadInput(
            f"charts need matplotlib, got {error}: run pip install matplotlib jinja2, or use --json"
        ) from error


def _svg(draw: Any, summary: Mapping[str, Any], prefix: str) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        if not draw(axes, summary):
            return ""
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return _themed(svg[svg.index("<svg") :], prefix)


def _themed(svg: str, prefix: str) -> str:
    """The SVG with the page's colours and fonts, and with ids that are unique on the page."""
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r'\b(id="|href="#)', rf"\g<1>{prefix}", svg).replace("url(#", f"url(#{prefix}")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    return re.sub(r"font-family: [^;]*; ", "", svg)


def _history(axes: Axes, summary: Mapping[str, Any]) -> bool:
    """Every trial's ratio with its interval, and the best so far; failures at the bottom."""
    from matplotlib.ticker import MaxNLocator

    measured = [trial for trial in summary["trials"] if trial["state"] == "measured"]
    failed = [trial["number"] for trial in summary["trials"] if trial["state"] == "failed"]
    if not measured:
        return False
    numbers, ratios = [trial["number"] for trial in measured], [trial["ratio"] for trial in measured]
    best = [max(ratios[: done + 1]) for done in range(len(ratios))]
    axes.axhline(1, color=LINE, linewidth=1)
    bars = _error_bars(measured)
    axes.errorbar(numbers, ratios, yerr=bars, fmt="o", color=SOFT, markersize=2.5, elinewidth=0.6, label="measured")
    axes.step([*numbers, summary["trials"][-1]["number"]], [*best, best[-1]], where="post", color=ACCENT, label="best")
    if failed:
        axes.plot(failed, [0] * len(failed), "x", color=BAD, markersize=4, label="failed", clip_on=False)
    axes.set_ylim(0, 1.1 * max(trial["high"] or trial["ratio"] for trial in measured))
    axes.set(xlabel="trial", ylabel="times faster than the default")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=8, loc="lower right", ncols=3)
    return True


def _intervals(axes: Axes, summary: Mapping[str, Any]) -> bool:
    """The finalists' ratios to the default with their 95 % confidence intervals."""
    rows = list(reversed(finalists(summary)))
    if not rows:
        return False
    for height, row in enumerate(rows):
        colour = ACCENT if row["chosen"] else SOFT
        axes.errorbar(row["ratio"], height, xerr=_error_bars([row]), fmt="o", color=colour, markersize=4, capsize=3)
    axes.axvline(1, color=LINE, linewidth=1)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("times faster than the default")
    return True


def finalists(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The finalists by letter, fastest first: those of the shoot-out except the default, which all are compared with.

    A study without a shoot-out, or of an older version, shows its fastest trials instead.
    """
    conclusion = summary["conclusion"]
    rows = [row for row in conclusion["finalists"] if not row["default"]] if conclusion else []
    if not rows:
        chosen = None if conclusion is None or conclusion["default_kept"] else conclusion["schedule"]
        measured = (trial for trial in summary["trials"] if trial["state"] == "measured" and trial["ratio"] > 1)
        best = sorted(measured, key=lambda trial: trial["ratio"], reverse=True)[:3]
        rows = [trial | {"chosen": trial["schedule"] == chosen} for trial in best]
    ordered = sorted(rows, key=lambda row: row["ratio"], reverse=True)
    return [row | {"name": chr(ord("A") + place)} for place, row in enumerate(ordered)]


def _roofline(axes: Axes, summary: Mapping[str, Any]) -> bool:
    """The kernel below copy bandwidth and the arithmetic peak."""
    about = summary["about"]
    if not about or not about["bytes"] or not about["flops"]:
        return False
    intensity, ridge = about["flops"] / about["bytes"], about["gflops_peak"] / about["copy_gb_per_s"]
    left, right = min(intensity, ridge) / 8, max(intensity, ridge) * 8
    roof = [(left, left * about["copy_gb_per_s"]), (ridge, about["gflops_peak"]), (right, about["gflops_peak"])]
    axes.loglog(*zip(*roof, strict=True), color=INK, linewidth=1.2)
    rates = [about["flops"] / trial["ms"] / 1e6 for trial in summary["trials"] if trial["state"] == "measured"]
    axes.plot([intensity] * len(rates), rates, "_", color=SOFT, markersize=9)
    conclusion = summary["conclusion"]
    if conclusion:
        axes.plot(intensity, about["flops"] / conclusion["tuned_ms"] / 1e6, "o", color=ACCENT, markersize=6)
    axes.annotate(
        f"copy {about['copy_gb_per_s']:.3g} GB/s", roof[0], (14, -4), textcoords="offset points", color=SOFT, fontsize=8
    )
    axes.annotate(
        f"peak {about['gflops_peak']:.3g} GFLOP/s",
        roof[2],
        (0, 4),
        textcoords="offset points",
        ha="right",
        color=SOFT,
        fontsize=8,
    )
    axes.set(xlabel="operations a byte", ylabel="GFLOP/s")
    axes.minorticks_off()
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(top=4 * about["gflops_peak"])
    return True


def _importance(axes: Axes, summary: Mapping[str, Any]) -> bool:
    shares = summary["importance"]["shares"]
    if not shares:
        return False
    names = sorted(shares, key=shares.__getitem__)
    axes.barh([name[:24] for name in names], [100 * shares[name] for name in names], color=ACCENT, height=0.6)
    axes.set_xlabel("% of importance")
    return True


def _error_bars(rows: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Lengths of error bars below and above; zero where there is no bound."""
    below = [max(0.0, row["ratio"] - row["low"]) if row["low"] is not None else 0.0 for row in rows]
    above = [max(0.0, row["high"] - row["ratio"]) if row["high"] is not None else 0.0 for row in rows]
    return [below, above]
