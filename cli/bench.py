"""`mhc-tune bench`: tuned kernels against default schedules, eager torch and torch.compile, timed in one run."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from autotune.measure import Roofline, interleaved
from cli import choice, loading, ours, peers, yardsticks
from cli.cases import DIRECTIONS, OPS, Case, make_case
from cli.choice import Choice
from cli.contenders import Contender
from cli.options import (
    DEFAULT_DTYPE,
    DEFAULT_STREAMS,
    DEFAULT_TOKENS,
    DEFAULT_WIDTH,
    CacheOption,
    DtypeOption,
    JsonOption,
    StreamsOption,
    TargetOption,
    TokensOption,
    WidthOption,
    existing_cache,
    known_choices,
    measured_device,
)
from cli.output import say, show, show_json, stdout_kept_free
from cli.render import bench_table, device_text, load_table
from tiles.errors import BadInput
from tiles.family import Problem
from tiles.target import Device

IMPLS = (*ours.KERNELS, *choice.IMPLS, *peers.NAMES, *yardsticks.NAMES)

ROUNDS, SECONDS = 30, 12.0
"""Rounds of each measurement, cut short after this many seconds once there are five."""

RETAINED = ("backward",)
PASSES = (("forward", "both"), RETAINED)
"""A backward by itself is timed on a graph that is kept. Code that torch compiles for that may not reuse the graph's
buffers ("donated buffers"), which costs it time, so it is compiled separately."""

SEED = 0

Shape = tuple[int, int, int, str]
"""Streams, width, tokens, dtype."""


TIMED = (*OPS, loading.OP)
OpOption = Annotated[list[str], typer.Option("--op", help=f"Of {', '.join(TIMED)}; default: all. May repeat.")]
DirectionOption = Annotated[
    list[str], typer.Option("--direction", help=f"Of {', '.join(DIRECTIONS)}; default: all. May repeat.")
]
DEFAULT_OPS, DEFAULT_DIRECTIONS = list(TIMED), list(DIRECTIONS)


def bench(
    target: TargetOption = "auto",
    streams: StreamsOption = DEFAULT_STREAMS,
    width: WidthOption = DEFAULT_WIDTH,
    tokens: TokensOption = DEFAULT_TOKENS,
    dtype: DtypeOption = DEFAULT_DTYPE,
    op: OpOption = DEFAULT_OPS,
    direction: DirectionOption = DEFAULT_DIRECTIONS,
    cache: CacheOption = None,
    json: JsonOption = False,
) -> None:
    """Time tuned kernels against default schedules, eager torch and torch.compile.

    Times each op, the fused passes pre and step, the layer around an identity sublayer, and a stack of 8 layers, all
    implementations of one interleaved, with the same inputs, at the same thread count. "separate" are the tuned kernels
    without the fused passes. Eager and compile are the fastest of several forms that were tried; every implementation
    is checked against a float64 reference before it is timed. Takes some minutes, most of them for torch.compile.

    "load" times fresh processes from mhc.load_kernels to the end of the first call, and a warm look-up.
    """
    device = measured_device(target)
    if device.kind == "cuda":
        raise BadInput(f"bench compares implementations on the CPU only, got {target}: use cpu; tune measures on GPUs")
    known_choices("op", op, TIMED)
    known_choices("direction", direction, DIRECTIONS)
    shapes = _shapes(streams, width, tokens, dtype)
    folder = existing_cache(cache).folder
    with stdout_kept_free(json):
        report = run(device, folder, shapes, op, direction, IMPLS)
    impls = [impl for impl in IMPLS if any(row["impl"] == impl for row in report["results"])]
    limits = f"copy {report['copy_gb_per_s']:.1f} GB/s, {report['gflops_peak']:.0f} GFLOP/s"
    title = f"{device_text(device)}, {report['threads']} threads, {limits}"
    if report["results"]:
        show(bench_table(report["results"], title, impls), on_stderr=json)
    if report["load"]:
        show(load_table(report["load"]), on_stderr=json)
    for line in report["skipped"]:
        say(f"skipped: {line}")
    if json:
        show_json(report)


def run(
    device: Device,
    folder: Path,
    shapes: Sequence[Shape],
    ops: Sequence[str],
    directions: Sequence[str],
    impls: Sequence[str],
) -> dict[str, Any]:
    """Measure the ops at every shape with the kernels in `folder`; what `--json` prints."""
    results: list[dict[str, Any]] = []
    skipped: list[str] = []
    load = loading.measure(folder, shapes[0], skipped) if loading.OP in ops else []
    roofline = Roofline.measure()
    for n, width, count, dtype in shapes:
        fastest = Choice(n, width, dtype)
        for op in (op for op in OPS if op in ops):
            case = make_case(op, n, width, count, dtype, SEED)
            for timed in filter(None, ([d for d in together if d in directions] for together in PASSES)):
                say(f"{case.describe()}: {' and '.join(timed)}")
                torch.compiler.reset()
                torch._functorch.config.donated_buffer = tuple(timed) != RETAINED
                found = list(_contenders(case, timed, impls, folder, fastest, skipped))
                results += _measure(case, found, timed, roofline)
                del found
                gc.collect()
    return {
        "device": device.as_dict(),
        "threads": torch.get_num_threads(),
        "copy_gb_per_s": roofline.copy_gb_per_s,
        "gflops_peak": roofline.gflops,
        "torch": torch.__version__,
        "results": results,
        "load": load,
        "skipped": list(dict.fromkeys(skipped)),
    }


def _shapes(streams: list[int], widths: list[int], tokens: list[int], dtypes: list[str]) -> list[Shape]:
    """All combinations; raises `BadInput` for one that no kernel takes."""
    shapes = [(n, width, count, dtype) for n, width, count, dtype in product(streams, widths, tokens, dtypes)]
    for n, width, count, dtype in shapes:
        Problem("merge", "forward", n, width, dtype, count)
        if count < 1:
            raise BadInput(f"bench needs at least one token, got {count}: pass 1 or more")
    return shapes


def _contenders(
    case: Case, directions: Sequence[str], impls: Sequence[str], folder: Path, fastest: Choice, skipped: list[str]
) -> Iterator[Contender]:
    """All implementations that are asked for and run here; `skipped` gets a line for each other one."""
    for impl in impls:
        if impl in ours.KERNELS:
            yield from ours.contender(impl, case, directions, folder, skipped)
        elif impl in choice.IMPLS:
            yield from fastest.fastest(impl, case, directions, skipped)
        elif impl in yardsticks.NAMES:
            yield from yardsticks.contender(impl, case, directions)
        else:
            yield from peers.contender(impl, case, directions, skipped)


def _measure(
    case: Case, found: Sequence[Contender], directions: Sequence[str], roofline: Roofline
) -> list[dict[str, Any]]:
    """One row an implementation and direction; those of one direction are timed in interleaved rounds."""
    calls: dict[str, dict[str, Callable[[], object]]] = {direction: {} for direction in directions}
    forms: dict[str, dict[str, str]] = {direction: {} for direction in directions}
    for contender in found:
        timed = contender.calls(case)
        for direction in contender.directions:
            calls[direction][contender.impl] = timed[direction]
            forms[direction][contender.impl] = contender.chosen
    rows = []
    for direction in directions:
        times = interleaved(calls[direction], rounds=ROUNDS, seconds=SECONDS)
        for impl, milliseconds in times.items():
            rows.append(
                {"op": case.op, "direction": direction}
                | {"streams": case.streams, "width": case.width, "tokens": case.tokens, "dtype": case.dtype}
                | {"impl": impl, "form": forms[direction][impl], "rounds": len(milliseconds)}
                | _rates(case, direction, statistics.median(milliseconds), roofline)
            )
    return rows


def _rates(case: Case, direction: str, median_ms: float, roofline: Roofline) -> dict[str, float]:
    """A median time against what the case must move and compute at least."""
    traffic = case.traffic[direction]
    limit_ms = roofline.limit_ms(traffic)
    return {
        "median_ms": median_ms,
        "bytes": traffic.bytes,
        "gb_per_s": traffic.bytes / median_ms / 1e6,
        "flops": traffic.flops,
        "limit_ms": limit_ms,
        "percent_of_limit": 100 * limit_ms / median_ms,
    }
