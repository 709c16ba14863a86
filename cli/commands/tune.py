"""`mhc-tune tune`: search for the fastest correct schedule of every kernel at the given shapes on this device."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from autotune.buckets.choose import choose_schedules, group_by_tokens
from autotune.events import BucketSchedulesChosen, Event, ProblemFinished, ProblemStarted
from autotune.measuring.roofline import Roofline
from autotune.processes.workers import Workers
from autotune.tuner import TuneFailed, TuneResult
from autotune.tuner import tune as tune_kernel
from cli.ui import options
from cli.ui.options import INTERRUPTED, cache_at, measured_device, problems
from cli.ui.output import say, show, show_json, stdout_to_stderr
from cli.ui.progress import TuneProgress
from cli.ui.render import device_text, records_table
from cli.ui.shapes import shapes
from tiles.cache.cache import KernelCache
from tiles.cache.record import record_dict
from tiles.cache.shipped import shipped_records
from tiles.compiler.compile import why_no_compiler
from tiles.errors import BadInput
from tiles.kernels.spec import Problem
from tiles.target import Device


def tune(
    target: options.TargetOption = "auto",
    model: options.ModelOption = None,
    streams: options.StreamsOption = None,
    width: options.WidthOption = None,
    tokens: options.TokensOption = options.DEFAULT_TOKENS,
    dtype: options.DtypeOption = None,
    op: options.OpOption = None,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Most schedules to try for each kernel.")] = 40,
    seconds: Annotated[
        float | None, typer.Option("--seconds", min=0.0, help="Time budget of the whole run, shared by its kernels.")
    ] = None,
    cache: options.CacheOption = None,
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage",
            help="Database URL, for workers on several machines that share trials.",
            show_default="a journal in the cache",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Random seed of the search.")] = 0,
    batch_invariant: Annotated[
        bool,
        typer.Option(
            "--batch-invariant",
            help="Also choose one schedule for every token count, the best over the given; see mhc.batch_invariant.",
        ),
    ] = False,
    json: options.JsonOption = False,
) -> None:
    """Tune all kernels, forward and backward, at the given shapes on this device.

    Every schedule is checked against a float64 reference before it is timed. A kernel keeps its default schedule where
    no other is faster beyond the noise. The fused kernels pre, step and single_pass are tuned last and compared with
    the separate kernels, which run instead where they are faster. For several token counts, a few schedules are chosen
    that are within 2 % of the best at each. Each finished kernel is in the cache at once: after Ctrl-C, run the same
    command to continue. Exits with 1 when a kernel fails.
    """
    device = measured_device(target)
    if why := why_no_compiler(device.target):
        raise BadInput(f"tuning compiles kernels for {device.target}: {why}")
    found, kernels = shapes(model, streams, width, dtype, op), cache_at(cache)
    todo = problems(found.streams, found.widths, tokens, found.dtypes, found.ops, found.rounds)
    for reason in found.reasons():
        say(reason)
    say(f"tuning {len(todo)} kernels on {device_text(device)}, {torch.get_num_threads()} threads")
    with stdout_to_stderr(json):
        run = _Run(todo, device, kernels)
        run.go(trials=trials, seconds=seconds, storage=storage, seed=seed, batch_invariant=batch_invariant)
    if json:
        show_json(run.as_dict())
    else:
        show(records_table([event.record for event in run.finished if event.record], str(kernels.folder)))
    if run.interrupted:
        kept = sum(event.record is not None for event in run.finished)
        say(
            f"interrupted: {kept} of {len(todo)} kernels are kept in {kernels.folder}; run the same command to continue"
        )
        raise typer.Exit(INTERRUPTED)
    if run.failed:
        raise typer.Exit(1)


class _Run:
    """One run over several problems: passes events to the display and keeps the result of each problem."""

    def __init__(self, todo: list[Problem], device: Device, cache: KernelCache) -> None:
        self.todo, self.device, self.cache = todo, device, cache
        self.finished: list[ProblemFinished] = []
        self.failed: dict[str, str] = {}
        self.served: list[BucketSchedulesChosen] = []
        self.started = 0
        self.share = 0.0
        self.beside: list[float] = []
        self.interrupted = False
        self.roofline: Roofline | None = None

    def go(
        self, *, trials: int, seconds: float | None, storage: str | None, seed: int, batch_invariant: bool = False
    ) -> None:
        """Tune one problem after another; the time left of `seconds` is shared evenly by the problems left."""
        deadline = None if seconds is None else time.monotonic() + seconds
        settings: dict[str, Any] = {"trials": trials, "storage": storage, "seed": seed}
        try:
            with TuneProgress(len(self.todo), seconds) as display, Workers(kind=self.device.kind) as workers:

                def on_event(event: Event) -> None:
                    self._record(event)
                    display(event)

                settings |= {"on_event": on_event, "workers": workers, "advice": shipped_records()}
                for group in group_by_tokens(self.todo):
                    self._tune_buckets(group, deadline, settings, batch_invariant)
        except KeyboardInterrupt:
            self.interrupted = True

    def _share(self, deadline: float) -> float:
        """The seconds of the next search: its share of the time left, less what a problem takes beside its search."""
        left = (deadline - time.monotonic()) / (len(self.todo) - self.started)
        return max(0.0, left - statistics.median(self.beside or [0.0]))

    def _tune_buckets(
        self, group: list[Problem], deadline: float | None, settings: dict[str, Any], batch_invariant: bool
    ) -> None:
        """Tune problems that differ in tokens only, then choose a few schedules for all of them."""
        results: dict[Problem, TuneResult] = {}
        for problem in group:
            if deadline is not None:
                self.share = self._share(deadline)
                settings = settings | {"seconds": self.share}
            self.started += 1
            try:
                results[problem] = tune_kernel(problem, self.device, self.cache, **settings)
            except TuneFailed as error:
                self._record_failure(problem, error)
        if len(results) > 1 or (results and batch_invariant):
            try:
                shared = {name: settings[name] for name in ("workers", "seed", "on_event")}
                choose_schedules(results, self.device, self.cache, batch_invariant=batch_invariant, **shared)
            except TuneFailed as error:
                self._record_failure(group[0], error)

    def _record_failure(self, problem: Problem, error: TuneFailed) -> None:
        self.failed[problem.describe()] = str(error)
        say(f"FAILED: {error}")

    def as_dict(self) -> dict[str, Any]:
        """The run as `--json` prints it."""
        return {
            "device": self.device.as_dict(),
            "threads": torch.get_num_threads(),
            "copy_gb_per_s": self.roofline and self.roofline.copy_gb_per_s,
            "gflops_peak": self.roofline and self.roofline.gflops,
            "cache": str(Path(self.cache.folder)),
            "interrupted": self.interrupted,
            "failed": self.failed,
            "results": [
                {
                    **asdict(event.problem),
                    "stopped": event.stopped,
                    "failed_trials": event.failed,
                    "failures": dict(event.reasons),
                    "seconds": event.seconds,
                    "record": None if event.record is None else record_dict(event.record),
                }
                for event in self.finished
            ],
            "buckets": [
                asdict(event.problems[0])
                | {
                    "tokens": [problem.tokens for problem in event.problems],
                    "schedules": event.schedules,
                    "worst": event.worst,
                    "seconds": event.seconds,
                }
                for event in self.served
            ],
        }

    def _record(self, event: Event) -> None:
        if isinstance(event, ProblemStarted):
            self.roofline = event.roofline
        if isinstance(event, ProblemFinished):
            self.finished.append(event)
            if event.stopped == "time":
                self.beside.append(event.seconds - self.share)
        if isinstance(event, BucketSchedulesChosen):
            self.served.append(event)
            newer = {record.key: record for record in event.records}
            self.finished = [
                replace(done, record=newer.get(done.record.key, done.record)) if done.record else done
                for done in self.finished
            ]
