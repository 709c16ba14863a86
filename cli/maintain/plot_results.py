"""Plots and tables for results/ and README: `python -m cli.maintain.plot_results scaling OUT.json OUT.png`,
`gains CACHE`, `replay IN.json OUT.png`, or `speedup FOLDER OUT.png`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from cli.bench.command import Shape, run
from tiles.cache.cache import KernelCache, Record
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.target import detect_device

OPS = ("project", "coefficients", "aggregate", "merge", "pre", "step", "single_pass")

STREAMS, DTYPE = 4, "float32"
TOKENS = (40, 126, 400, 1264, 4000)
WIDTHS = (64, 200, 640, 2024, 6400)
FIXED_TOKENS, FIXED_WIDTH = 512, 1280

app = typer.Typer(help=__doc__, add_completion=False)


@app.command()
def scaling(data: Path, image: Path) -> None:
    """Time forward and backward of every op on default schedules over two decades of tokens and of width; plot them."""
    by_tokens: list[Shape] = [(STREAMS, FIXED_WIDTH, tokens, DTYPE) for tokens in TOKENS]
    by_width: list[Shape] = [(STREAMS, width, FIXED_TOKENS, DTYPE) for width in WIDTHS]
    report = run(detect_device("cpu"), Path(), [*by_tokens, *by_width], OPS, ("both",), ("default",))
    data.write_text(json.dumps(report, indent=1), encoding="utf-8")
    plot_scaling(report["results"], image)


def plot_scaling(rows: Sequence[dict[str, Any]], image: Path) -> None:
    """Plot milliseconds over tokens and over width, both axes logarithmic, with a line of slope one."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    fixed = {"tokens": ("width", FIXED_WIDTH), "width": ("tokens", FIXED_TOKENS)}
    for axis, (along, (other, value)) in zip(axes, fixed.items(), strict=True):
        for op in OPS:
            line = sorted((row[along], row["median_ms"]) for row in rows if row["op"] == op and row[other] == value)
            axis.loglog(*zip(*line, strict=True), marker="o", label=op)
        first, last = min(row[along] for row in rows), max(row[along] for row in rows)
        axis.loglog((first, last), (0.2, 0.2 * last / first), "k:", label="linear")
        axis.set(xlabel=f"{along} ({other} {value})", title=f"n = {STREAMS}, {DTYPE}, forward and backward")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("ms")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(image, dpi=110)


@app.command()
def replay(data: Path, image: Path) -> None:
    """Plot the output of `mhc-tune replay --json`: best time over trials, for every sampler and random search."""
    try:
        rows = json.loads(data.read_text(encoding="utf-8"))["results"]
        if not rows:
            raise ValueError("no results")
        plot_replay(rows, image)
    except (OSError, ValueError, LookupError, TypeError) as error:
        typer.echo(
            f"error: {data} must hold the output of mhc-tune replay --json, got {error!r}: run it again", err=True
        )
        raise typer.Exit(2) from error


def plot_replay(rows: Sequence[dict[str, Any]], image: Path) -> None:
    """One panel per space: median of best time over optimum, and the exact expectation of random search."""
    plt = _pyplot()
    spaces = list(dict.fromkeys(row["space"] for row in rows))
    columns = min(3, len(spaces))
    lines = -(-len(spaces) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.6 * lines), squeeze=False)
    for axis in axes.flat[len(spaces) :]:
        axis.set_visible(False)
    for axis, space in zip(axes.flat, spaces, strict=False):
        shown = [row for row in rows if row["space"] == space]
        for row in shown:
            axis.plot(range(1, len(row["curve"]) + 1), row["curve"], label=row["sampler"])
        expected = shown[0]["random_curve"]
        axis.plot(range(1, len(expected) + 1), expected, "k:", label="random, calculated")
        axis.axhline(1, color="gray", linewidth=0.5)
        axis.set(title=f"{space}, {shown[0]['members']} members", xlabel="trials", ylabel="best time / optimum")
        axis.title.set_fontsize(8)
    axes.flat[0].legend()
    figure.tight_layout()
    figure.savefig(image, dpi=110)
    plt.close(figure)


def _pyplot() -> Any:
    """Pyplot, which draws to files only. Imported here because matplotlib is an extra."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


@app.command()
def gains(cache: Path) -> None:
    """Print a table (Markdown) of the speed-up of fused kernels: predicted from bytes, and as the tuner measured it."""
    typer.echo("\n".join(gain_table(KernelCache(cache).records())))


def gain_table(records: Iterable[Record]) -> list[str]:
    """One line per fused kernel that was compared with the separate ones."""
    lines = [
        "| kernel | n | width | tokens | dtype | predicted | measured | chosen |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found = [record for record in records if "separate_ratio" in record.measurement]
    for record in sorted(found, key=lambda record: _order(record.key.problem)):
        problem, said = record.key.problem, record.measurement
        measured, chosen = 1 / said["separate_ratio"], "separate" if said["separate_wins"] else "fused"
        lines.append(
            f"| {problem.op} {problem.direction} | {problem.streams} | {problem.width} | {problem.tokens} "
            f"| {problem.dtype} | {predicted_gain(problem):.2f} | {measured:.2f} | {chosen} |"
        )
    return lines


def _order(problem: Problem) -> tuple[Any, ...]:
    return problem.op, problem.direction == "backward", problem.dtype, problem.streams, problem.width, problem.tokens


@app.command()
def speedup(folder: Path, image: Path) -> None:
    """Plot the speed-up of tuned kernels over torch, from bench.json and stack-*.json in `folder`."""
    files = (folder / "bench.json", *sorted(folder.glob("stack-*.json")))
    plot_speedup([row for file in files for row in json.loads(file.read_text(encoding="utf-8"))["results"]], image)


def speedups(rows: Iterable[dict[str, Any]], dtype: str, baseline: str) -> dict[str, float]:
    """{op: time of `baseline` (eager, compile) / time of the tuned kernels}, forward and backward together."""
    ms = {
        (row["op"], row["impl"]): row["median_ms"]
        for row in rows
        if (row["dtype"], row["direction"]) == (dtype, "both")
    }
    return {op: ms[op, baseline] / ms[op, "tuned"] for op, impl in ms if impl == "tuned" and (op, baseline) in ms}


def plot_speedup(rows: Sequence[dict[str, Any]], image: Path) -> None:
    """One panel per dtype, two bars per op: over eager torch and over torch.compile."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True)
    for axis, dtype in zip(axes, ("bfloat16", "float32"), strict=True):
        for side, (baseline, name) in enumerate((("eager", "than eager torch"), ("compile", "than torch.compile"))):
            found = speedups(rows, dtype, baseline)
            places = [place + 0.4 * side - 0.2 for place in range(len(found))]
            bars = axis.bar(places, found.values(), 0.4, label=name)
            axis.bar_label(bars, fmt="%.1f", fontsize=8)
        axis.set_xticks(range(len(found)), found, fontsize=8)
        axis.axhline(1, color="gray", linewidth=0.8)
        axis.margins(y=0.1)
        axis.set_title(f"{dtype}, forward and backward")
    axes[0].set_ylabel("times faster with tuned kernels")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(image, dpi=90)
    plt.close(figure)


def predicted_gain(problem: Problem) -> float:
    """Bytes that `tiles.kernels.fused.separate` moves, sums of gradients included, over those of the fused kernel."""
    spec = kernel_spec(problem.op, problem.direction)
    assert spec.separate
    parts = (replace(problem, op=op, direction=direction) for op, direction in spec.separate.parts)
    moved = sum(kernel_spec(part.op, part.direction).traffic(part, problem.tokens).bytes for part in parts)
    if problem.direction == "backward":
        # Two gradients of x are added to a third: each addition reads two and writes one. step copies the third first.
        x = next(argument for argument in spec.arguments(problem) if argument.name == "x")
        moved += (2 * 3 + (2 if problem.op == "step" else 0)) * x.nbytes(problem.tokens)
    return moved / spec.traffic(problem, problem.tokens).bytes


if __name__ == "__main__":
    app()
