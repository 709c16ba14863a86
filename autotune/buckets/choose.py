"""Few schedules for many token counts: a small set, every bucket within 2 % of its best.

A program takes any token count, and how many tokens there are changes little of what is fast. Where one schedule is as
good as another, the one that serves most buckets is taken: fewer distinct binaries, and neighbouring buckets do not
flip between schedules that differ by the noise only.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from autotune.buckets.cover import choose
from autotune.decision.fused_vs_separate import weigh
from autotune.decision.shootout import shootout
from autotune.decision.significance import decide
from autotune.events import BucketsMeet, BucketsServed, Event
from autotune.measuring.timing import paired_ratio
from autotune.processes.worker import TaskFailed
from autotune.processes.workers import Workers
from autotune.search.case import TuneFailed, is_environment, mend
from autotune.study.provenance import measurement, provenance
from autotune.tuner import TuneResult
from tiles.cache.cache import KernelCache, Key, Record
from tiles.compiler.compile import Artifact
from tiles.errors import BadInput
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.target import Device

WITHIN = 1.02
"""A schedule serves a bucket where it takes at most this many times what the fastest one takes there."""

NEAR = 1.05
"""Finalists that were this close to the first of them are measured on the other buckets as well."""

BUCKETS = "buckets"
"""In a record's provenance: the token buckets that were served together. A record that is tuned anew lacks it."""


def groups(problems: Iterable[Problem]) -> list[list[Problem]]:
    """Problems that differ in tokens only, together; in the order of their first ones, so that parts stay before fused.

    In a group the median token count comes first, then what is near to it: each next search starts from neighbours.
    """
    found: dict[Problem, list[Problem]] = {}
    for problem in problems:
        found.setdefault(replace(problem, tokens=0), []).append(problem)
    return [_from_the_median(group) for group in found.values()]


def _from_the_median(group: list[Problem]) -> list[Problem]:
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
class Measured:
    """What was measured in one bucket.

    Fields:
        times: {candidate: milliseconds of each round, timed together}.
        default: which candidate is the default there.
        kept: whether the bucket's own search kept the default.
        conditions: what the device said of itself meanwhile (`stopwatch.Stopwatch`).
    """

    times: Mapping[str, Sequence[float]]
    default: str
    kept: bool
    conditions: Mapping[str, float] = field(default_factory=dict)

    def losses(self) -> dict[str, float]:
        """{candidate: how many times what the fastest takes}, medians of pairs.

        The fastest is named by the rounds that judge it, so it looks a little better than it is: the cautious side.
        """
        default = self.times[self.default]
        best = max(self.times, key=lambda name: paired_ratio(default, self.times[name]).median)
        return {name: paired_ratio(rounds, self.times[best]).median for name, rounds in self.times.items()}

    def serving(self) -> dict[str, float]:
        """The `losses` of those that are within `WITHIN` and not slower than the default beyond the noise.

        The default serves as well where nothing beats it beyond the noise, neither here nor in the bucket's own search.
        """
        default, losses = self.times[self.default], self.losses()
        unbeaten = self.kept and decide(self.default, self.times)[0] == self.default
        return {
            name: loss
            for name, loss in losses.items()
            if (loss <= WITHIN and paired_ratio(default, self.times[name]).high >= 1)
            or (unbeaten and name == self.default)
        }


def serve(
    results: Mapping[Problem, TuneResult],
    device: Device,
    cache: KernelCache,
    workers: Workers,
    *,
    seed: int = 0,
    on_event: Callable[[Event], None] | None = None,
) -> tuple[Record, ...]:
    """Choose few schedules for tuned problems that differ in tokens only, and rewrite their records; returns these.

    Every bucket's default, its winner and the finalists near to it are verified and timed against each other on every
    bucket. The smallest set is taken that leaves every bucket within `WITHIN` of its best, and not slower than its
    default beyond the noise. Nothing is done for one bucket, or where that was done before; a choice that was cut short
    is made again, from the same candidates.

    Raises:
        TuneFailed: kernels cannot be compared, as a default fails.
        BadInput: the disk is full.
    """
    started, buckets = time.monotonic(), _buckets(results, device)
    if len(buckets) < 2 or _served_before(buckets):
        return tuple(bucket.tuned.record for bucket in buckets)
    report, problems = on_event or (lambda event: None), tuple(bucket.problem for bucket in buckets)
    schedules = _candidates(buckets)
    defaults = [str(schedules.index(bucket.default)) for bucket in buckets]
    built = _compiled(problems[0], schedules, defaults, device, workers)
    report(BucketsMeet(problems, len(built)))
    measured = [
        _measured(bucket, built, default, workers, seed) for bucket, default in zip(buckets, defaults, strict=True)
    ]
    chosen = choose([each.serving() for each in measured], defaults)
    writer = _Writer(device, cache, workers, seed, " ".join(str(bucket.key.tokens) for bucket in buckets))
    records = tuple(
        writer.put(bucket, schedules[int(name)], built[name], each, name)
        for bucket, each, name in zip(buckets, measured, chosen, strict=True)
    )
    worst = max(each.losses()[name] for each, name in zip(measured, chosen, strict=True))
    report(BucketsServed(problems, records, worst, time.monotonic() - started))
    return records


def _buckets(results: Mapping[Problem, TuneResult], device: Device) -> list[_Bucket]:
    """One for each token bucket, by size: of token counts in the same bucket the first stands for it."""
    found: dict[Key, _Bucket] = {}
    for problem, result in results.items():
        default = asdict(kernel_spec(problem.op, problem.direction).default(problem, device.target))
        key = Key.of(problem, device)
        found.setdefault(key, _Bucket(problem, key, result, default))
    return sorted(found.values(), key=lambda bucket: bucket.key.tokens)


def _served_before(buckets: Sequence[_Bucket]) -> bool:
    """Whether all records were written by one choice, for these buckets and maybe more."""
    marks = {str(bucket.tuned.record.provenance.get(BUCKETS, "")) for bucket in buckets}
    served = marks.pop().split()
    return not marks and {str(bucket.key.tokens) for bucket in buckets} <= set(served)


def _candidates(buckets: Sequence[_Bucket]) -> list[dict[str, Any]]:
    """The schedules to measure: defaults, winners, finalists near to them; each once, in this order."""
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
    """The schedules of the fastest finalist and of those that took at most `NEAR` times what it took."""
    best = max((row["ratio"] for row in finalists), default=0.0)
    return [row["schedule"] for row in finalists if NEAR * row["ratio"] >= best]


def _compiled(
    problem: Problem,
    schedules: Sequence[dict[str, Any]],
    defaults: Sequence[str],
    device: Device,
    workers: Workers,
) -> dict[str, Artifact]:
    """{position in `schedules`: code, the same for all token counts}; only a default has to compile."""
    schedule_from = kernel_spec(problem.op, problem.direction).schedule_from
    built: dict[str, Artifact] = {}
    for at, artifact in enumerate(
        workers.compile(problem, [schedule_from(values) for values in schedules], device.target)
    ):
        if not isinstance(artifact, TaskFailed):
            built[str(at)] = artifact
        elif str(at) in defaults:
            raise _failed(problem, artifact) from artifact
    return built


def _measured(bucket: _Bucket, built: Mapping[str, Artifact], default: str, workers: Workers, seed: int) -> Measured:
    """Verify and time all candidates on one bucket; those that fail there are left out, so they do not serve it."""
    binaries = {name: artifact.binary for name, artifact in built.items()}
    try:
        times = shootout(bucket.problem, binaries, default, list(binaries), workers, seed)
    except TaskFailed as failure:
        raise _failed(bucket.problem, failure) from failure
    return Measured(times, default, bucket.tuned.record.schedule == bucket.default, workers.conditions)


def _failed(problem: Problem, failure: TaskFailed) -> Exception:
    """What to raise: `TuneFailed`, or `BadInput` where it is not the kernels' fault."""
    text = f"{problem.describe()}: the schedules of its token counts cannot be compared: {failure}"
    return BadInput(mend(text)) if is_environment(text) else TuneFailed(text)


@dataclass(frozen=True)
class _Writer:
    """Puts chosen schedules into the cache, each with what was measured in its bucket."""

    device: Device
    cache: KernelCache
    workers: Workers
    seed: int
    served: str  # all token buckets, for `BUCKETS`

    def put(
        self, bucket: _Bucket, schedule: dict[str, Any], artifact: Artifact, measured: Measured, name: str
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
        found |= {"best_ms": min(medians.values()), **measured.conditions, **self._rival(bucket, schedule, artifact)}
        made = provenance(seed=self.seed, study=before.record.provenance.get("study", "")) | {BUCKETS: self.served}
        return self.cache.put(bucket.key, schedule, artifact.binary, artifact.source, found, made)

    def _rival(self, bucket: _Bucket, schedule: dict[str, Any], artifact: Artifact) -> dict[str, float | bool]:
        """What a fused kernel's record says of the separate kernels; another schedule is weighed against them anew."""
        if kernel_spec(bucket.problem.op, bucket.problem.direction).separate is None:
            return {}
        if schedule == bucket.tuned.record.schedule:
            before = bucket.tuned.record.measurement
            return {name: value for name, value in before.items() if name.startswith("separate_")}
        try:
            return weigh(bucket.problem, artifact.binary, self.cache, self.device, self.workers, self.seed)
        except TaskFailed as failure:
            raise _failed(bucket.problem, failure) from failure
