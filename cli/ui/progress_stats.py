"""What the tuner's events come to: trials done, how fast, how long it will take, the best so far, what failed."""

from __future__ import annotations

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


class Tally:
    """Counts events of one run over `problems` problems that may take `seconds` in all.

    Estimates look at this run alone: what earlier runs did took no time now. There are none until a trial is done.
    """

    def __init__(
        self, problems: int, seconds: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.problems, self.finished = problems, 0
        self.current: ProblemStarted | None = None
        self.done = 0
        self._clock, self._seconds = clock, seconds
        self._started = self._current_started = clock()
        self._worked = 0.0  # problems' worth of trials that this run did before the current problem
        self._best: TrialDone | None = None
        self._reasons: Counter[str] = Counter()
        self._finalists = 0
        self._meeting = ""

    def take(self, event: Event) -> None:
        """Count one event; those that say nothing here are passed over."""
        if isinstance(event, ProblemStarted):
            self._close()  # a problem whose default fails ends without an event
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
            if self.current is None:  # finished before: nothing was started
                self.finished += 1
            self._close()
        elif isinstance(event, BucketShootoutStarted):
            self._meeting = f"comparing {event.schedules} schedules at {len(event.problems)} token counts"
        if not isinstance(event, BucketShootoutStarted):
            self._meeting = ""

    @property
    def trials(self) -> int:
        """How many trials the current problem has at most."""
        return min(self.current.trials, self.current.pool) if self.current else 0

    @property
    def settled(self) -> int:
        """How many trials of the current problem are done, those of earlier runs included."""
        return min(self.trials, self.current.evaluated + self.done) if self.current else 0

    def per_minute(self) -> float | None:
        """Trials a minute of the current problem."""
        seconds = self._clock() - self._current_started
        return 60 * self.done / seconds if self.done and seconds > 0 else None

    def left_here(self) -> str:
        """How long the current problem's trials will still take, and no longer than its share of the time."""
        rate, limit = self.per_minute(), None
        if self._seconds is not None:
            end = self._started + self._seconds
            share = (end - self._current_started) / max(1, self.problems - self.finished)
            limit = self._current_started + share - self._clock()
        return _left(None if rate is None else 60 * (self.trials - self.settled) / rate, limit)

    def left_in_all(self) -> str:
        """How long the run will still take, if what is left takes as long as what was done, problem by problem."""
        worked = self._worked + self._share(self.done)
        gone = self._clock() - self._started
        left = self.problems - self.finished - (self._share(self.settled) if self.current else 0.0)
        return _left(
            gone / worked * left if worked > 0 else None, None if self._seconds is None else self._seconds - gone
        )

    def all_line(self) -> str:
        """The run as a whole."""
        gone = duration(self._clock() - self._started)
        meeting = f"; {self._meeting}" if self._meeting else ""
        return f"{self.finished} of {self.problems} problems, {gone} gone{self.left_in_all()}{meeting}"

    def trials_line(self) -> str:
        """The current problem's trials."""
        if self._finalists:
            return f"{self.settled} of {self.trials} trials, {self._finalists} finalists meet the default"
        rate = self.per_minute()
        speed = "" if rate is None else f", {number(rate)} a minute"
        return f"{self.settled} of {self.trials} trials{speed}{self.left_here()}"

    def best_line(self) -> str:
        """The current problem's best so far."""
        best = self._best
        if best is None:
            return "nothing verified yet" if self.settled == self.done else "goes on where an earlier run ended"
        return (
            f"best {number(best.best_ms)} ms, {best.best_ratio:.2f}x the default, "
            f"{best.best_percent_of_copy:.0f}% of copy bandwidth, {best.best_percent_of_limit:.0f}% of the limit"
        )

    def failures_line(self) -> str:
        """The current problem's failures of this run by reason; empty where there are none."""
        return failures(dict(self._reasons.most_common()))

    def _share(self, trials: int) -> float:
        return trials / self.trials if self.trials else 0.0

    def _close(self) -> None:
        if self.current is not None:
            # A search that stops early did a problem's worth of work, less what earlier runs had done.
            self._worked += max(self._share(self.done), 1 - self._share(self.current.evaluated))
            self.finished += 1
            self.current = None


def failures(reasons: dict[str, int]) -> str:
    """Failures counted by kind, e.g. `3 failed (does not compile 2, crashed 1)`; empty where there are none."""
    if not reasons:
        return ""
    kinds = ", ".join(f"{kind} {count}" for kind, count in reasons.items())
    return f"{sum(reasons.values())} failed ({kinds})"


def duration(seconds: float) -> str:
    """A time for people, to two digits or so."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _left(guess: float | None, limit: float | None) -> str:
    """Seconds that are left, guessed from what was done, and at most."""
    if limit is not None and limit <= 0:
        return ", time is up"
    if limit is not None and (guess is None or guess > limit):
        return f", at most {duration(limit)} left"
    return "" if guess is None else f", about {duration(guess)} left"
