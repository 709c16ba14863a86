"""`mhc-tune bench`: tuned kernels against default schedules, eager torch and torch.compile, timed in one run."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from autotune.measuring.roofline import Roofline
from autotune.measuring.stopwatch import QueuedStopwatch, queued_stopwatch_for
from autotune.measuring.timing import interleaved
from cli.bench import fastest_torch as choice
from cli.bench import hardware_limits as yardsticks
from cli.bench import load_time as loading
from cli.bench import our_kernels as ours
from cli.bench import peers
from cli.bench.cases import DIRECTIONS, OPS, Case, make_case
from cli.bench.fastest_torch import Choice
from cli.bench.implementation import Contender
from cli.ui.options import (
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
from cli.ui.output import say, show, show_json, stdout_kept_free
from cli.ui.render import bench_table, device_text, load_table
from tiles.errors import BadInput, first_line
from tiles.kernels.spec import Problem
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
ScheduleOption = Annotated[
    list[str],
    typer.Option(
        "--schedule", help="One more implementation, as LABEL:OP.DIRECTION=JSON: default schedules but for that one."
    ),
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
    schedule: ScheduleOption = [],  # noqa: B006  # typer's way to say that there is none
    json: JsonOption = False,
) -> None:
    """Time tuned kernels against default schedules, eager torch, torch.compile and public kernels.

    Times each op, the fused passes pre and step, the layer around an identity sublayer, and a stack of 8 layers, all
    implementations of one interleaved, with the same inputs, at the same thread count. "separate" are the tuned kernels
    without the fused passes. Eager and compile are the fastest of several forms that were tried; every implementation
    is checked against a float64 reference before it is timed. Takes some minutes, most of them for torch.compile.

    "load" times fresh processes from mhc.load_kernels to the end of the first call, and a warm look-up, on a CPU.
    `--schedule 'wide:merge.forward={"threads": 256}'` times one schedule more; tunables that it does not name are the
    default's.
    """
    device = measured_device(target)
    known_choices("op", op, TIMED)
    known_choices("direction", direction, DIRECTIONS)
    shapes = _shapes(streams, width, tokens, dtype)
    folder = existing_cache(cache).folder
    overrides = [ours.override(text) for text in schedule]
    with stdout_kept_free(json):
        report = run(device, folder, shapes, op, direction, IMPLS, overrides)
    labels = [*IMPLS, *(override.label for override in overrides)]
    impls = [impl for impl in labels if any(row["impl"] == impl for row in report["results"])]
    limits = f"copy {report['copy_gb_per_s']:.1f} GB/s, {report['gflops_peak']:.0f} GFLOP/s"
    where = f"{report['threads']} threads, " if device.kind == "cpu" else ""
    title = f"{device_text(device)}, {where}{limits}"
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
    overrides: Sequence[ours.Override] = (),
) -> dict[str, Any]:
    """Measure the ops at every shape with the kernels in `folder`; what `--json` prints."""
    results: list[dict[str, Any]] = []
    skipped: list[str] = []
    load: list[dict[str, Any]] = []
    if loading.OP in ops and device.kind == "cpu":
        load = loading.measure(folder, shapes[0], skipped)
    elif loading.OP in ops:
        skipped.append(f"{loading.OP}: is timed on a CPU only")
    roofline = Roofline.measure(device.kind)
    for shape in shapes:
        fastest = Choice(shape[0], shape[1], shape[3])
        for op in (op for op in OPS if op in ops):
            results += measure_op(device, folder, shape, op, directions, impls, overrides, fastest, roofline, skipped)
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


def measure_op(
    device: Device,
    folder: Path,
    shape: Shape,
    op: str,
    directions: Sequence[str],
    impls: Sequence[str],
    overrides: Sequence[ours.Override],
    fastest: Choice,
    roofline: Roofline,
    skipped: list[str],
) -> list[dict[str, Any]]:
    """Rows of one op at one shape; `skipped` gets a line for each implementation that has none."""
    streams, width, tokens, dtype = shape
    rows: list[dict[str, Any]] = []
    case = make_case(op, streams, width, tokens, dtype, SEED, torch.device(device.kind))
    for timed in filter(None, ([d for d in together if d in directions] for together in PASSES)):
        say(f"{case.describe()}: {' and '.join(timed)}")
        torch.compiler.reset()
        torch._functorch.config.donated_buffer = tuple(timed) != RETAINED
        found = list(_contenders(case, timed, impls, folder, fastest, skipped))
        found += [made for wanted in overrides for made in ours.overridden(wanted, case, timed, skipped)]
        rows += _measure(case, found, timed, roofline)
        del found
        gc.collect()
        if device.kind == "cuda":
            torch.cuda.empty_cache()
    return rows


def _shapes(streams: list[int], widths: list[int], tokens: list[int], dtypes: list[str]) -> list[Shape]:
    """All combinations; raises `BadInput` for one that no kernel takes."""
    shapes = [(n, width, count, dtype) for n, width, count, dtype in product(streams, widths, tokens, dtypes)]
    for n, width, count, dtype in shapes:
        Problem("merge", "forward", n, width, dtype, count)
        if count < 1:
            raise BadInput(f"bench needs at least one token, got {count}: pass 1 or more")
    return shapes


class Poisoned(Exception):
    """An implementation broke the GPU's context: nothing else runs in this process. `impl` says which."""

    def __init__(self, impl: str, why: str) -> None:
        super().__init__(f"{impl}: {why}")
        self.impl, self.why = impl, why


def _contenders(
    case: Case, directions: Sequence[str], impls: Sequence[str], folder: Path, fastest: Choice, skipped: list[str]
) -> Iterator[Contender]:
    """All implementations that are asked for and run here; `skipped` gets a line for each other one.

    Whatever goes wrong in one is a reason, never an error, but for a broken GPU (`Poisoned`).
    """
    makers: Mapping[str, Callable[[str], Iterator[Contender]]] = {
        **dict.fromkeys(ours.KERNELS, lambda impl: ours.contender(impl, case, directions, folder, skipped)),
        **dict.fromkeys(choice.IMPLS, lambda impl: fastest.fastest(impl, case, directions, skipped)),
        **dict.fromkeys(yardsticks.NAMES, lambda impl: yardsticks.contender(impl, case, directions)),
        **dict.fromkeys(peers.NAMES, lambda impl: peers.contender(impl, case, directions, skipped)),
    }
    for impl in impls:
        try:
            yield from list(makers[impl](impl))
        except Exception as error:
            skipped.append(f"{impl} {case.describe()}: {type(error).__name__}: {first_line(error)}")
        if case.inputs[0].is_cuda:
            try:
                torch.cuda.synchronize()
            except Exception as error:
                raise Poisoned(impl, first_line(error)) from error


def _measure(
    case: Case, found: Sequence[Contender], directions: Sequence[str], roofline: Roofline
) -> list[dict[str, Any]]:
    """One row an implementation and direction; those of one direction are timed in interleaved rounds.

    On a GPU a row also has the CPU's time for one call, in microseconds, and the `Stopwatch.conditions`.
    """
    calls: dict[str, dict[str, Callable[[], object]]] = {direction: {} for direction in directions}
    forms: dict[str, dict[str, str]] = {direction: {} for direction in directions}
    for contender in found:
        timed = contender.launches(case)
        for direction in contender.directions:
            calls[direction][contender.impl] = timed[direction]
            forms[direction][contender.impl] = contender.chosen
    rows = []
    for direction in directions:
        stopwatch = queued_stopwatch_for(case.inputs[0].device)
        times = interleaved(calls[direction], stopwatch=stopwatch, rounds=ROUNDS, seconds=SECONDS)
        for impl, milliseconds in times.items():
            host = stopwatch.host_seconds[calls[direction][impl]] if isinstance(stopwatch, QueuedStopwatch) else None
            rows.append(
                {"op": case.op, "direction": direction}
                | {"streams": case.streams, "width": case.width, "tokens": case.tokens, "dtype": case.dtype}
                | {"impl": impl, "form": forms[direction][impl], "rounds": len(milliseconds)}
                | _rates(case, direction, statistics.median(milliseconds), roofline)
                | ({} if host is None else {"host_us": 1e6 * host, "conditions": dict(stopwatch.conditions)})
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
        "percent_of_copy": 100 * traffic.bytes / median_ms / 1e6 / roofline.copy_gb_per_s,
        "flops": traffic.flops,
        "limit_ms": limit_ms,
        "percent_of_limit": 100 * limit_ms / median_ms,
    }
