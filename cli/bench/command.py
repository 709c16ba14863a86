"""`mhc-tune bench`: tuned kernels compared with default schedules, eager torch, torch.compile and peers in one run."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from autotune.measuring.roofline import Roofline
from autotune.measuring.stopwatch import QueuedStopwatch, queued_stopwatch_for
from autotune.measuring.timing import interleaved, narrow
from cli.bench import fastest_torch, hardware_limits, load_time, our_kernels, peers
from cli.bench.cases import DIRECTIONS, OPS, BenchCase, make_case
from cli.bench.fastest_torch import FastestTorch
from cli.bench.implementation import Implementation
from cli.bench.precompile import Precompilers
from cli.ui import options
from cli.ui.options import cache_at, check_choices, existing_cache, measured_device
from cli.ui.output import say, show, show_json, stdout_to_stderr
from cli.ui.render import bench_tables, device_text, load_table
from cli.ui.shapes import Shapes, shapes
from tiles.errors import BadInput, first_line
from tiles.kernels.spec import PAPER_ROUNDS, Problem
from tiles.target import Device

IMPLS = (*our_kernels.KERNELS, *fastest_torch.IMPLS, *peers.NAMES, *hardware_limits.NAMES)

ROUNDS, SECONDS = 30, 12.0
"""Rounds of each measurement; they end after this many seconds once there are five."""

NARROW = 0.04
"""They also end where every ratio to the first implementation has an interval no wider than this share of it."""

BACKWARD_ALONE = ("backward",)
DIRECTION_GROUPS = (("forward", "both"), BACKWARD_ALONE)
"""Directions that are compiled and timed together. A backward alone runs on a retained graph: code compiled for it may
not reuse the graph's buffers ("donated buffers"), which makes it slower, so it is compiled separately."""

SEED = 0

Shape = tuple[int, int, int, str]
"""Streams, width, tokens, dtype."""

ON_REQUEST = ("invariant", fastest_torch.FLOAT32)
"""Implementations that few caches hold, or few ask for."""

BENCH_OPS, DEFAULT_DIRECTIONS = [*OPS, load_time.OP], list(DIRECTIONS)
DEFAULT_IMPLS = [impl for impl in IMPLS if impl not in ON_REQUEST]
OpOption = Annotated[
    list[str] | None, typer.Option("--op", help=f"Op: {', '.join(BENCH_OPS)}. May repeat.", show_default="all")
]
DirectionOption = Annotated[
    list[str], typer.Option("--direction", help=f"Direction: {', '.join(DIRECTIONS)}. May repeat.", show_default="all")
]
ImplOption = Annotated[
    list[str],
    typer.Option(
        "--impl",
        help=f"Implementation: {', '.join(IMPLS)}. May repeat.",
        show_default=f"all that run here, but {' and '.join(ON_REQUEST)}",
    ),
]
ScheduleOption = Annotated[
    list[str],
    typer.Option(
        "--schedule",
        help="Also time default schedules except for this one, given as LABEL:OP.DIRECTION=JSON. May repeat.",
    ),
]


def bench(
    target: options.TargetOption = "auto",
    model: options.ModelOption = None,
    streams: options.StreamsOption = None,
    width: options.WidthOption = None,
    tokens: options.TokensOption = options.DEFAULT_TOKENS,
    dtype: options.DtypeOption = None,
    op: OpOption = None,
    direction: DirectionOption = DEFAULT_DIRECTIONS,
    impl: ImplOption = DEFAULT_IMPLS,
    cache: options.CacheOption = None,
    schedule: ScheduleOption = [],  # noqa: B006 - typer only reads it
    json: options.JsonOption = False,
) -> None:
    """Time tuned kernels, default schedules, eager torch, torch.compile and public kernels.

    Times each single op, the fused ops pre, step and single_pass, a layer (around an identity sublayer) and a stack of
    8 layers. All implementations of an op get the same inputs and thread count and are timed in interleaved rounds,
    after a check against a float64 reference. "separate" is the tuned kernels without fused ones, and of pre_norm,
    which is compared where it is named, the tuned pre and torch's norm; "eager" and "compile" are each the fastest of
    several variants, of which some round phi and the coefficients where streams are bfloat16 or float16, and
    "compile-float32" is the fastest that does not; "invariant" is what `tune --batch-invariant` has chosen. Takes
    minutes, mostly for torch.compile.

    "load" measures, on a CPU, fresh processes from mhc.load_kernels to the end of the first call, and a warm look-up.
    `--schedule 'wide:merge.forward={"threads": 256}'` adds an implementation named "wide"; tunables that are not given
    keep their defaults.
    """
    device = measured_device(target)
    found = shapes(model, streams, width, dtype, op, BENCH_OPS)
    check_choices("direction", direction, DIRECTIONS)
    check_choices("impl", impl, [*DEFAULT_IMPLS, *ON_REQUEST])
    measured = _shapes(found, tokens)
    tuned = our_kernels.OF_CACHE.intersection(impl) or load_time.OP in found.ops
    folder = (existing_cache if tuned else cache_at)(cache).folder
    overrides = [our_kernels.parse_override(text) for text in schedule]
    for reason in found.reasons():
        say(reason)
    with stdout_to_stderr(json):
        report = run(
            device, folder, measured, found.ops, direction, [name for name in IMPLS if name in impl], overrides
        )
    _show(device, report, [*IMPLS, *(override.label for override in overrides)], on_stderr=json)
    if json:
        show_json(report)


def _show(device: Device, report: Mapping[str, Any], labels: Sequence[str], *, on_stderr: bool) -> None:
    """Print the tables of a report, and in one line what was left out."""
    impls = [impl for impl in labels if any(row["impl"] == impl for row in report["results"])]
    limits = f"copy {report['copy_gb_per_s']:.1f} GB/s, {report['gflops_peak']:.0f} GFLOP/s"
    where = device_text(device) + (f", {report['threads']} threads" if device.kind == "cpu" else "")
    for table in bench_tables(report["results"], where, limits, impls):
        show(table, on_stderr=on_stderr)
    if report["load"]:
        show(load_table(report["load"]), on_stderr=on_stderr)
    if report["skipped"]:
        say(f"left out: {'; '.join(report['skipped'])}")


def run(
    device: Device,
    folder: Path,
    shapes: Sequence[Shape],
    ops: Sequence[str],
    directions: Sequence[str],
    impls: Sequence[str],
    overrides: Sequence[our_kernels.ScheduleOverride] = (),
) -> dict[str, Any]:
    """Measure the ops at every shape with the kernels in `folder`; returns what `--json` prints."""
    results: list[dict[str, Any]] = []
    skipped: list[str] = []
    load: list[dict[str, Any]] = []
    if load_time.OP in ops and device.kind == "cpu":
        load = load_time.measure(folder, shapes[0], skipped)
    elif load_time.OP in ops:
        skipped.append(f"{load_time.OP}: is measured on a CPU only")
    roofline = Roofline.measure(device.kind)
    with ExitStack() as stack:
        precompilers = stack.enter_context(Precompilers()) if device.kind == "cpu" else None
        for shape in shapes:
            fastest = FastestTorch(shape[0], shape[1], shape[3], precompilers)
            for op in (op for op in OPS if op in ops):
                about = (directions, impls, overrides, fastest, roofline, skipped)
                results += measure_op(device, folder, shape, op, *about)
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
    overrides: Sequence[our_kernels.ScheduleOverride],
    fastest: FastestTorch,
    roofline: Roofline,
    skipped: list[str],
) -> list[dict[str, Any]]:
    """Rows of one op at one shape; `skipped` gets a line for each implementation without one."""
    streams, width, tokens, dtype = shape
    rows: list[dict[str, Any]] = []
    case = make_case(op, streams, width, tokens, dtype, SEED, torch.device(device.kind))
    for timed in filter(None, ([d for d in group if d in directions] for group in DIRECTION_GROUPS)):
        say(f"{case.describe()}: {' and '.join(timed)}")
        torch.compiler.reset()
        torch._functorch.config.donated_buffer = tuple(timed) != BACKWARD_ALONE
        found = list(_implementations(case, timed, impls, folder, fastest, skipped))
        found += [made for override in overrides for made in our_kernels.with_override(override, case, timed, skipped)]
        rows += _measure(case, found, timed, roofline)
        del found
        gc.collect()
        if device.kind == "cuda":
            torch.cuda.empty_cache()
    return rows


def _shapes(found: Shapes, tokens: list[int]) -> list[Shape]:
    """All combinations; raises `BadInput` for one that no kernel supports, or rounds that are not compared."""
    if found.rounds != PAPER_ROUNDS:
        text = f"got {found.rounds}: give --streams, --width and --dtype instead of --model"
        raise BadInput(f"bench compares maps of {PAPER_ROUNDS} Sinkhorn rounds, {text}")
    combined = list(product(found.streams, found.widths, tokens, found.dtypes))
    for n, width, count, dtype in combined:
        Problem("merge", "forward", n, width, dtype, count)
        if count < 1:
            raise BadInput(f"bench needs at least one token, got {count}: pass 1 or more")
    return combined


class ContextBroken(Exception):
    """The implementation `impl` broke the GPU's context: nothing more can run in this process."""

    def __init__(self, impl: str, why: str) -> None:
        super().__init__(f"{impl}: {why}")
        self.impl, self.why = impl, why


def _implementations(
    case: BenchCase,
    directions: Sequence[str],
    impls: Sequence[str],
    folder: Path,
    fastest: FastestTorch,
    skipped: list[str],
) -> Iterator[Implementation]:
    """The requested implementations that run here; `skipped` gets a line for each other one.

    An exception in one of them is such a line, unless the GPU's context is broken: that raises `ContextBroken`.
    """
    makers: Mapping[str, Callable[[str], Iterator[Implementation]]] = {
        **dict.fromkeys(
            our_kernels.KERNELS, lambda impl: our_kernels.implementations(impl, case, directions, folder, skipped)
        ),
        **dict.fromkeys(fastest_torch.IMPLS, lambda impl: fastest.implementations(impl, case, directions, skipped)),
        **dict.fromkeys(hardware_limits.NAMES, lambda impl: hardware_limits.implementations(impl, case, directions)),
        **dict.fromkeys(peers.NAMES, lambda impl: peers.implementations(impl, case, directions, skipped)),
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
                raise ContextBroken(impl, first_line(error)) from error


def _measure(
    case: BenchCase, found: Sequence[Implementation], directions: Sequence[str], roofline: Roofline
) -> list[dict[str, Any]]:
    """One row per implementation and direction; those of one direction are timed in interleaved rounds.

    On a GPU a row also has the host's time per call (`host_us`) and the `Stopwatch.conditions`.
    """
    calls: dict[str, dict[str, Callable[[], object]]] = {direction: {} for direction in directions}
    variants: dict[str, dict[str, str]] = {direction: {} for direction in directions}
    for made in found:
        launches = made.launches(case)
        for direction in made.directions:
            calls[direction][made.impl] = launches[direction]
            variants[direction][made.impl] = made.variant
    rows = []
    for direction in directions:
        stopwatch = queued_stopwatch_for(case.inputs[0].device)
        limits: dict[str, Any] = {"rounds": ROUNDS, "seconds": SECONDS, "enough": lambda times: narrow(times, NARROW)}
        times = interleaved(calls[direction], stopwatch=stopwatch, **limits)
        for impl, milliseconds in times.items():
            host = stopwatch.host_seconds[calls[direction][impl]] if isinstance(stopwatch, QueuedStopwatch) else None
            rows.append(
                {"op": case.op, "direction": direction}
                | {"streams": case.streams, "width": case.width, "tokens": case.tokens, "dtype": case.dtype}
                | {"impl": impl, "form": variants[direction][impl], "rounds": len(milliseconds)}
                | _rates(case, direction, statistics.median(milliseconds), roofline)
                | ({} if host is None else {"host_us": 1e6 * host, "conditions": dict(stopwatch.conditions)})
            )
    return rows


def _rates(case: BenchCase, direction: str, median_ms: float, roofline: Roofline) -> dict[str, float]:
    """A median time compared with the least that the case must move and compute."""
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
