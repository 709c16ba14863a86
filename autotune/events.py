"""What the tuner reports while it works: plain data that a display renders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autotune.measuring.roofline import Roofline
from tiles.cache.cache import Record
from tiles.kernels.spec import Problem


@dataclass(frozen=True)
class ProblemStarted:
    """A search begins, or goes on: `settled` of `trials` trials were done by earlier runs, `pool` schedules exist."""

    problem: Problem
    pool: int
    trials: int
    settled: int
    roofline: Roofline


@dataclass(frozen=True)
class TrialDone:
    """A schedule was verified and timed.

    `ratio` is the default's time over this one's, measured together (above 1 is faster than the default);
    `percent_of_copy` is the rate of the bytes it must move against the device's copy bandwidth, `percent_of_limit` the
    least time that the roofline allows against its own. The `best_` fields are those of the best trial so far.
    `same_as` is the number of the trial that had generated the same code, if any: its timing holds, nothing was run.
    """

    problem: Problem
    number: int
    schedule: Mapping[str, Any]
    ms: float
    ratio: float
    percent_of_copy: float
    percent_of_limit: float
    best_ms: float
    best_ratio: float
    best_percent_of_copy: float
    best_percent_of_limit: float
    same_as: int | None = None


@dataclass(frozen=True)
class TrialFailed:
    """A schedule did not compile, was wrong, crashed or hung; it is never asked again."""

    problem: Problem
    number: int
    schedule: Mapping[str, Any]
    reason: str


@dataclass(frozen=True)
class FinalistsMeet:
    """The fastest schedules meet the default in a paired comparison."""

    problem: Problem
    schedules: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class ProblemFinished:
    """A record is in the cache (`record` is None when the search was interrupted before anything was verified).

    `stopped` says why the search ended: "trials", "pool swept", "time", "roofline", "interrupted", or
    "finished before" where nothing was left to do. `reasons` counts the failures by kind.
    """

    problem: Problem
    record: Record | None
    stopped: str
    failed: int
    seconds: float
    reasons: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class BucketsMeet:
    """So many `schedules` are compared on every one of the problems, which differ in tokens only."""

    problems: tuple[Problem, ...]
    schedules: int


@dataclass(frozen=True)
class BucketsServed:
    """Few schedules were chosen for problems that differ in tokens only: their new records, in the same order.

    `worst` is the most that any of them takes, as a multiple of the fastest schedule's time there.
    """

    problems: tuple[Problem, ...]
    records: tuple[Record, ...]
    worst: float
    seconds: float

    @property
    def schedules(self) -> int:
        """How many different ones serve."""
        return len({str(sorted(record.schedule.items())) for record in self.records})


Event = ProblemStarted | TrialDone | TrialFailed | FinalistsMeet | ProblemFinished | BucketsMeet | BucketsServed
