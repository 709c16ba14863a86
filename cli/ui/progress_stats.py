"""Statistics of a tuning run from the tuner's events: trials done, rate, time left, best so far, failures."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable

from autotune.events import (
    BucketShootoutStarted,
    Event,
    ProblemFinished,
    ProblemStarted,
    ShootoutStarted,
    TrialDone,
    TrialFailed,
)
from autotune.processes.reasons import kind_of
from cli.ui.render import number


class ProgressStats:
    """Counts the events of one run over `problems` problems with an optional time budget of `seconds`.

    Rates and estimates come from this run's own trials, not from those of earlier runs; there is none before the first
    trial.
    """

    def __init__(
        self, problems: int, seconds: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.problems, self.finished = problems, 0
        self.current: ProblemStarted | None = None
        self.done = 0
        self._clock, self._seconds = clock, seconds
        self._started = self._current_started = clock()
        self._problems_worked = 0.0  # before the current problem, in problems' worth of this run's trials
        self._best: TrialDone | None = None
        self._reasons: Counter[str] = Counter()
        self._finalists = 0
        self._comparing = ""

    def update(self, event: Event) -> None:
        """Count one event; events that do not matter here are ignored."""
        if isinstance(event, ProblemStarted):
            self._close()  # a problem whose default schedule fails ends without an event
            self.current, self._current_started = event, self._clock()
            self.done, self._best, self._finalists = 0, None, 0
            self._reasons.clear()
        elif isinstance(event, TrialDone):
            self.done += 1
            self._best = event
        elif isinstance(event, TrialFailed):
            self.done += 1
            self._reasons[kind_of(event.reason)] += 1
        elif isinstance(event, ShootoutStarted):
            self._finalists = len(event.schedules)
        elif isinstance(event, ProblemFinished):
            if self.current is None:  # an earlier run finished it: nothing was started
                self.finished += 1
            self._close()
        elif isinstance(event, BucketShootoutStarted):
            self._comparing = f"comparing {event.schedules} schedules at {len(event.problems)} token counts"
        if not isinstance(event, BucketShootoutStarted):
            self._comparing = ""

    @property
    def trials(self) -> int:
        """The most trials that the current problem gets."""
        return min(self.current.trials, self.current.pool) if self.current else 0

    @property
    def evaluated(self) -> int:
        """Trials of the current problem that are done, in this run and in earlier ones."""
        return min(self.trials, self.current.evaluated + self.done) if self.current else 0

    def per_minute(self) -> float | None:
        """Trials per minute of the current problem."""
        seconds = self._clock() - self._current_started
        return 60 * self.done / seconds if self.done and seconds > 0 else None

    def left_here(self) -> str:
        """Time left for the current problem's trials, at most its share of the time budget."""
        rate, limit = self.per_minute(), None
        if self._seconds is not None:
            end = self._started + self._seconds
            share = (end - self._current_started) / max(1, self.problems - self.finished)
            limit = self._current_started + share - self._clock()
        return _left(None if rate is None else 60 * (self.trials - self.evaluated) / rate, limit)

    def left_in_all(self) -> str:
        """Time left for the run, if the remaining problems take as long as those that are done."""
        worked = self._problems_worked + self._share(self.done)
        elapsed = self._clock() - self._started
        left = self.problems - self.finished - (self._share(self.evaluated) if self.current else 0.0)
        return _left(
            elapsed / worked * left if worked > 0 else None, None if self._seconds is None else self._seconds - elapsed
        )

    def all_line(self) -> str:
        """Progress of the whole run."""
        elapsed = duration(self._clock() - self._started)
        comparing = f"; {self._comparing}" if self._comparing else ""
        return f"{self.finished} of {self.problems} problems, {elapsed} elapsed{self.left_in_all()}{comparing}"

    def trials_line(self) -> str:
        """Trials of the current problem: done, per minute, time left."""
        if self._finalists:
            return f"{self.evaluated} of {self.trials} trials, {self._finalists} finalists against the default"
        rate = self.per_minute()
        speed = "" if rate is None else f", {number(rate)} a minute"
        return f"{self.evaluated} of {self.trials} trials{speed}{self.left_here()}"

    def best_line(self) -> str:
        """The fastest schedule of the current problem so far."""
        best = self._best
        if best is None:
            return "nothing verified yet" if self.evaluated == self.done else "continues an earlier run"
        return (
            f"best {number(best.best_ms)} ms, {best.best_ratio:.2f}x the default, "
            f"{best.best_percent_of_copy:.0f}% of copy bandwidth, {best.best_percent_of_limit:.0f}% of the limit"
        )

    def failures_line(self) -> str:
        """This run's failures of the current problem by kind; empty where there are none."""
        return failures(dict(self._reasons.most_common()))

    def _share(self, trials: int) -> float:
        return trials / self.trials if self.trials else 0.0

    def _close(self) -> None:
        if self.current is not None:
            # A search that stops early did a problem's worth of work, less what earlier runs had done.
            self._problems_worked += max(self._share(self.done), 1 - self._share(self.current.evaluated))
            self.finished += 1
            self.current = None


def failures(reasons: dict[str, int]) -> str:
    """Failures by kind, e.g. `3 failed (does not compile 2, crashed 1)`; empty where there are none."""
    if not reasons:
        return ""
    kinds = ", ".join(f"{kind} {count}" for kind, count in reasons.items())
    return f"{sum(reasons.values())} failed ({kinds})"


def duration(seconds: float) -> str:
    """A time in s, min or h, to about two digits."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds == math.inf:
        return "no limit"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _left(estimate: float | None, limit: float | None) -> str:
    """The text for the time that is left: an estimate, or a limit where that is shorter; both in seconds."""
    if limit is not None and limit <= 0:
        return ", time is up"
    if limit is not None and (estimate is None or estimate > limit):
        return f", at most {duration(limit)} left"
    return "" if estimate is None else f", about {duration(estimate)} left"
