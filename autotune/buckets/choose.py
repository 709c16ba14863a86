"""Choice of few schedules for many token counts: a small set, with every bucket within 2 % of its best.

A kernel takes any token count, and that changes little of which schedule is fast. Of equally good schedules the one
that covers most buckets is taken: fewer distinct binaries, and neighbouring buckets do not flip between schedules that
differ by noise only.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from autotune.buckets.cover import smallest_cover
from autotune.decision.fused_vs_separate import compare_with_separate
from autotune.decision.shootout import shootout
from autotune.decision.significance import decide
from autotune.events import BucketSchedulesChosen, BucketShootoutStarted, Event
from autotune.measuring.timing import paired_ratio
from autotune.processes.worker import TaskFailed
from autotune.processes.workers import Workers
from autotune.search.tuning_case import tuning_error
from autotune.study.provenance import measurement, provenance
from autotune.tuner import TuneResult
from tiles.cache.cache import KernelCache, Key, Record
from tiles.compiler.compile import Artifact
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import EVERY_TOKENS, Problem
from tiles.target import Device

MAX_SLOWDOWN = 1.02
"""Largest acceptable slowdown of a schedule against the fastest one in a bucket."""

NEAR_TIE = 1.05
"""Finalists within this factor of the first are measured on the other buckets as well."""

BUCKETS = "buckets"
"""In a record's provenance: the token buckets that were covered together. A record that is tuned anew lacks it."""


def group_by_tokens(problems: Iterable[Problem]) -> list[list[Problem]]:
    """Group problems that differ in tokens only, in the order of their first ones, so that parts stay before fused.

    A group starts at the median token count and goes outwards, so that each search is warm-started by a neighbour.
    """
    found: dict[Problem, list[Problem]] = {}
    for problem in problems:
        found.setdefault(replace(problem, tokens=0), []).append(problem)
    return [_median_first(group) for group in found.values()]


def _median_first(group: list[Problem]) -> list[Problem]:
    ordered = sorted(group, key=lambda problem: problem.tokens)
    middle = (len(ordered) - 1) / 2
    return [ordered[at] for at in sorted(range(len(ordered)), key=lambda at: abs(at - middle))]


@dataclass(frozen=True)
class _Bucket:
    problem: Problem
    key: Key
    tuned: TuneResult
    default: dict[str, Any]


@dataclass(frozen=True)
class BucketMeasurement:
    """The measurements of one bucket.

    Fields:
        times: {candidate: milliseconds of each round, timed together}.
        default: the candidate that is the bucket's default.
        kept: whether the bucket's own search kept the default.
        conditions: the device's state meanwhile (`Stopwatch.conditions`).
    """

    times: Mapping[str, Sequence[float]]
    default: str
    kept: bool
    conditions: Mapping[str, float] = field(default_factory=dict)

    def slowdowns(self) -> dict[str, float]:
        """{candidate: slowdown against the fastest}, medians of pairs.

        The fastest is selected by the rounds that judge it, which favours it a little: that is the cautious side.
        """
        default = self.times[self.default]
        best = max(self.times, key=lambda name: paired_ratio(default, self.times[name]).median)
        return {name: paired_ratio(rounds, self.times[best]).median for name, rounds in self.times.items()}

    def acceptable(self) -> dict[str, float]:
        """The `slowdowns` of candidates within `MAX_SLOWDOWN` and not slower than the default beyond the noise.

        The default also counts where nothing beats it beyond the noise, neither here nor in the bucket's own search.
        """
        default, slowdowns = self.times[self.default], self.slowdowns()
        unbeaten = self.kept and decide(self.default, self.times)[0] == self.default
        return {
            name: slowdown
            for name, slowdown in slowdowns.items()
            if (slowdown <= MAX_SLOWDOWN and paired_ratio(default, self.times[name]).high >= 1)
            or (unbeaten and name == self.default)
        }


def choose_schedules(
    results: Mapping[Problem, TuneResult],
    device: Device,
    cache: KernelCache,
    workers: Workers,
    *,
    seed: int = 0,
    batch_invariant: bool = False,
    on_event: Callable[[Event], None] | None = None,
) -> tuple[Record, ...]:
    """Choose few schedules for tuned problems that differ in tokens only, and rewrite their records; returns these.

    Every bucket's default, winner and near finalists are verified and timed against each other on every bucket. The
    smallest set is taken that leaves every bucket within `MAX_SLOWDOWN` of its best, and not slower than its default
    beyond the noise. Nothing is done for one bucket, or where the choice was made before; an interrupted choice is made
    again from the same candidates.

    With `batch_invariant`, one more record is written and returned, for every token count: of the candidates that run
    on all buckets, the one that is slowed down least in the mean.

    Raises:
        TuneFailed: a default fails, so that kernels cannot be compared.
        BadInput: the disk is full.
    """
    started, buckets = time.monotonic(), _buckets(results, device)
    served = not batch_invariant or _covers(cache.get(replace(buckets[0].key, tokens=EVERY_TOKENS)), buckets)
    if served and (len(buckets) < 2 or _chosen_before(buckets)):
        return tuple(bucket.tuned.record for bucket in buckets)
    report, problems = on_event or (lambda event: None), tuple(bucket.problem for bucket in buckets)
    schedules = _candidates(buckets)
    defaults = [str(schedules.index(bucket.default)) for bucket in buckets]
    compiled = _compiled(problems[0], schedules, defaults, device, workers)
    report(BucketShootoutStarted(problems, len(compiled)))
    measured = [
        _measure(bucket, compiled, default, workers, seed) for bucket, default in zip(buckets, defaults, strict=True)
    ]
    chosen = smallest_cover([each.acceptable() for each in measured], defaults)
    writer = _Writer(device, cache, workers, seed, " ".join(str(bucket.key.tokens) for bucket in buckets))
    records = tuple(
        writer.put(bucket, schedules[int(name)], compiled[name], each, name)
        for bucket, each, name in zip(buckets, measured, chosen, strict=True)
    )
    if batch_invariant:
        every = _least_slowed(measured)
        at = len(buckets) // 2
        bucket = replace(buckets[at], key=replace(buckets[at].key, tokens=EVERY_TOKENS))
        written = writer.put(bucket, schedules[int(every)], compiled[every], measured[at], every)
        records = (*records, written)
    worst = max(each.slowdowns()[name] for each, name in zip(measured, chosen, strict=True))
    report(BucketSchedulesChosen(problems, records, worst, time.monotonic() - started))
    return records


def _buckets(results: Mapping[Problem, TuneResult], device: Device) -> list[_Bucket]:
    """The token buckets by size, each with the first of its token counts."""
    found: dict[Key, _Bucket] = {}
    for problem, result in results.items():
        default = asdict(kernel_spec(problem.op, problem.direction).default(problem, device.target))
        key = Key.of(problem, device)
        found.setdefault(key, _Bucket(problem, key, result, default))
    return sorted(found.values(), key=lambda bucket: bucket.key.tokens)


def _chosen_before(buckets: Sequence[_Bucket]) -> bool:
    """Whether all records were written by one choice, for at least these buckets."""
    marks = {bucket.tuned.record.provenance.get(BUCKETS) for bucket in buckets}
    return len(marks) == 1 and _covers(buckets[0].tuned.record, buckets)


def _covers(record: Record | None, buckets: Sequence[_Bucket]) -> bool:
    """Whether the record was written by a choice for at least these buckets."""
    chosen = str(record.provenance.get(BUCKETS, "")).split() if record else []
    return {str(bucket.key.tokens) for bucket in buckets} <= set(chosen)


def _least_slowed(measured: Sequence[BucketMeasurement]) -> str:
    """Of the candidates that run on all buckets (the defaults do), the one with the least mean slowdown."""
    slowdowns = [each.slowdowns() for each in measured]
    common = set(slowdowns[0]).intersection(*slowdowns)
    return min(sorted(common, key=int), key=lambda name: statistics.fmean(of[name] for of in slowdowns))


def _candidates(buckets: Sequence[_Bucket]) -> list[dict[str, Any]]:
    """The schedules to measure: defaults, winners, near finalists; each once, in this order."""
    found: list[dict[str, Any]] = []
    for schedule in (
        *(bucket.default for bucket in buckets),
        *(bucket.tuned.record.schedule for bucket in buckets),
        *(schedule for bucket in buckets for schedule in _near_ties(bucket.tuned.finalists)),
    ):
        if schedule not in found:
            found.append(schedule)
    return found


def _near_ties(finalists: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The schedules of the fastest finalist and of those within `NEAR_TIE` of it."""
    best = max((row["ratio"] for row in finalists), default=0.0)
    return [row["schedule"] for row in finalists if NEAR_TIE * row["ratio"] >= best]


def _compiled(
    problem: Problem,
    schedules: Sequence[dict[str, Any]],
    defaults: Sequence[str],
    device: Device,
    workers: Workers,
) -> dict[str, Artifact]:
    """{index in `schedules`: its code, for all token counts}; raises where a default does not compile."""
    schedule_from = kernel_spec(problem.op, problem.direction).schedule_from
    compiled: dict[str, Artifact] = {}
    for at, artifact in enumerate(
        workers.compile(problem, [schedule_from(values) for values in schedules], device.target)
    ):
        if not isinstance(artifact, TaskFailed):
            compiled[str(at)] = artifact
        elif str(at) in defaults:
            raise _incomparable(problem, artifact) from artifact
    return compiled


def _measure(
    bucket: _Bucket, compiled: Mapping[str, Artifact], default: str, workers: Workers, seed: int
) -> BucketMeasurement:
    """Verify and time all candidates on one bucket, without those that fail there."""
    binaries = {name: artifact.binary for name, artifact in compiled.items()}
    try:
        times = shootout(bucket.problem, binaries, default, list(binaries), workers, seed)
    except TaskFailed as failure:
        raise _incomparable(bucket.problem, failure) from failure
    return BucketMeasurement(times, default, bucket.tuned.record.schedule == bucket.default, workers.conditions)


def _incomparable(problem: Problem, failure: TaskFailed) -> Exception:
    return tuning_error(problem, f"the schedules of its token counts cannot be compared: {failure}")


@dataclass(frozen=True)
class _Writer:
    """Writes chosen schedules to the cache, each with its bucket's measurements."""

    device: Device
    cache: KernelCache
    workers: Workers
    seed: int
    buckets: str  # all of them, for `BUCKETS`

    def put(
        self, bucket: _Bucket, schedule: dict[str, Any], artifact: Artifact, measured: BucketMeasurement, name: str
    ) -> Record:
        problem, before = bucket.problem, bucket.tuned
        medians = {name: statistics.median(rounds) for name, rounds in measured.times.items()}
        kept = name == measured.default
        found = measurement(
            tuned_ms=medians[name],
            default_ms=medians[measured.default],
            ratio=1.0 if kept else paired_ratio(measured.times[measured.default], measured.times[name]).median,
            traffic=kernel_spec(problem.op, problem.direction).traffic(problem, problem.tokens),
            roofline=self.workers.roofline(),
            threads=self.workers.threads,
            trials=before.trials,
            default_kept=kept,
        )
        found |= {"best_ms": min(medians.values()), **measured.conditions, **self._separate(bucket, schedule, artifact)}
        made = provenance(seed=self.seed, study=before.record.provenance.get("study", ""), **artifact.made_with)
        made |= {BUCKETS: self.buckets}
        return self.cache.put(bucket.key, schedule, artifact.binary, artifact.source, found, made)

    def _separate(self, bucket: _Bucket, schedule: dict[str, Any], artifact: Artifact) -> dict[str, float | bool]:
        """The fields on separate kernels in a fused kernel's record; a schedule that is new there is compared anew."""
        if kernel_spec(bucket.problem.op, bucket.problem.direction).separate is None:
            return {}
        if schedule == bucket.tuned.record.schedule:
            before = bucket.tuned.record.measurement
            return {name: value for name, value in before.items() if name.startswith("separate_")}
        try:
            return compare_with_separate(
                bucket.problem, artifact.binary, self.cache, self.device, self.workers, self.seed
            )
        except TaskFailed as failure:
            raise _incomparable(bucket.problem, failure) from failure
