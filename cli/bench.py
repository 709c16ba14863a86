"""`mhc-tune bench`: tuned kernels against default schedules, eager torch and torch.compile, timed in one run."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from autotune.measure import copy_bandwidth, interleaved
from cli import cases, contenders
from cli.cases import OPS, Case
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
    measured_device,
)
from cli.output import say, show, show_json, stdout_kept_free
from cli.render import bench_table, device_text
from mhc.kernels import Kernels
from tiles.errors import BadInput
from tiles.family import Problem
from tiles.target import Device

ROUNDS, SECONDS = 30, 12.0
"""Rounds of each measurement, cut short after this many seconds once there are five."""

RETAINED = ("backward",)
PASSES = (("forward", "both"), RETAINED)
"""A backward by itself is timed on a graph that is kept. Code that torch compiles for that may not reuse the graph's
buffers ("donated buffers"), which costs it time, so it is compiled separately."""

SEED = 0


def bench(
    target: TargetOption = "auto",
    streams: StreamsOption = DEFAULT_STREAMS,
    width: WidthOption = DEFAULT_WIDTH,
    tokens: TokensOption = DEFAULT_TOKENS,
    dtype: DtypeOption = DEFAULT_DTYPE,
    cache: CacheOption = None,
    json: JsonOption = False,
) -> None:
    """Time tuned kernels against default schedules, eager torch and torch.compile.

    Times each op and the layer (the four ops around an identity sublayer), with the same inputs, interleaved, at the
    same thread count. Eager and compile are the fastest of several forms that were tried; every implementation is
    checked against a float64 reference before it is timed. Takes some minutes, most of them for torch.compile.
    """
    device = measured_device(target)
    folder = existing_cache(cache).folder
    with stdout_kept_free(json):
        report = run(device, folder, streams, width, tokens, dtype, contenders.IMPLS)
    impls = list(dict.fromkeys(row["impl"] for row in report["results"]))
    title = f"{device_text(device)}, {report['threads']} threads, copy {report['copy_gb_per_s']:.1f} GB/s"
    show(bench_table(report["results"], title, impls), on_stderr=json)
    for line in report["skipped"]:
        say(f"skipped: {line}")
    if json:
        show_json(report)


def run(
    device: Device,
    folder: Path,
    streams: list[int],
    widths: list[int],
    tokens: list[int],
    dtypes: list[str],
    impls: Sequence[str],
) -> dict[str, Any]:
    """Measure every op and the layer at every shape; what `--json` prints."""
    results: list[dict[str, Any]] = []
    skipped: list[str] = []
    copy = copy_bandwidth()
    for n, width, count, dtype in product(streams, widths, tokens, dtypes):
        Problem("merge", "forward", n, width, dtype, count)  # checks the shape, and says what is wrong with it
        if count < 1:
            raise BadInput(f"bench needs at least one token, got {count}: pass 1 or more")
        kernels = {"tuned": Kernels.from_path(folder), "default": Kernels.defaults()}
        forms = contenders.Forms(n, width, dtype, impls)
        for op in (*OPS, "layer"):
            case = _case(op, n, width, count, dtype)
            for directions in PASSES:
                say(f"{case.describe()}: {' and '.join(directions)}")
                torch.compiler.reset()
                torch._functorch.config.donated_buffer = directions != RETAINED
                found = list(forms.contenders(case, directions, kernels, skipped))
                results += _measure(case, found, directions)
                del found
                gc.collect()
    return {
        "device": device.as_dict(),
        "threads": torch.get_num_threads(),
        "copy_gb_per_s": copy,
        "torch": torch.__version__,
        "results": results,
        "skipped": list(dict.fromkeys(skipped)),
    }


def _case(op: str, streams: int, width: int, tokens: int, dtype: str) -> Case:
    if op == "layer":
        return cases.layer_case(streams, width, tokens, dtype, SEED)
    return cases.op_case(op, streams, width, tokens, dtype, SEED)


def _measure(case: Case, found: Sequence[Contender], directions: Sequence[str]) -> list[dict[str, Any]]:
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
            median = statistics.median(milliseconds)
            rows.append(
                {
                    "op": case.op,
                    "direction": direction,
                    "streams": case.streams,
                    "width": case.width,
                    "tokens": case.tokens,
                    "dtype": case.dtype,
                    "impl": impl,
                    "form": forms[direction][impl],
                    "median_ms": median,
                    "rounds": len(milliseconds),
                    "bytes": case.traffic[direction],
                    "gb_per_s": case.traffic[direction] / median / 1e6,
                }
            )
    return rows
