"""Events of the tuner's progress: plain data that a display renders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autotune.measuring.roofline import Roofline
from tiles.cache.cache import Record
from tiles.kernels.spec import Problem


@dataclass(frozen=True)
class ProblemStarted:
    """A search begins or resumes: earlier runs `evaluated` so many of `trials`; the pool has `pool` schedules."""

    problem: Problem
    pool: int
    trials: int
    evaluated: int
    roofline: Roofline


@dataclass(frozen=True)
class TrialDone:
    """A schedule was verified and timed.

    `ratio` is the speed-up over the default, measured together; `percent_of_copy` compares its bytes per second with
    the device's copy bandwidth, `percent_of_limit` its time with the roofline's. The `best_` fields are those of the
    best trial so far. `same_as` is the number of the trial that generated the same code, whose timing is reused.
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
class ShootoutStarted:
    """The shootout begins: the fastest schedules are timed against the default."""

    problem: Problem
    schedules: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class ProblemFinished:
    """The search has ended with a record in the cache (None when interrupted before anything was verified).

    `stopped` is the reason: "trials", "pool swept", "time", "roofline", "no difference", "interrupted",
    or "finished before" where nothing was left to do. `reasons` counts the failures by kind.
    """

    problem: Problem
    record: Record | None
    stopped: str
    failed: int
    seconds: float
    reasons: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class BucketShootoutStarted:
    """The comparison of `schedules` candidates begins on all problems, which differ in tokens only."""

    problems: tuple[Problem, ...]
    schedules: int


@dataclass(frozen=True)
class BucketSchedulesChosen:
    """Few schedules were chosen for problems that differ in tokens only; `records` are in the order of `problems`.

    `worst` is the largest slowdown of a chosen schedule against the fastest on its problem.
    """

    problems: tuple[Problem, ...]
    records: tuple[Record, ...]
    worst: float
    seconds: float

    @property
    def schedules(self) -> int:
        """The number of distinct schedules."""
        return len({str(sorted(record.schedule.items())) for record in self.records})


SearchEvent = ProblemStarted | TrialDone | TrialFailed | ShootoutStarted | ProblemFinished
Event = SearchEvent | BucketShootoutStarted | BucketSchedulesChosen
