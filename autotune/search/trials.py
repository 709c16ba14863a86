"""What the trials of a study say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from autotune.search.pool import Pool

REASON = "reason"
"""Trial attribute: why a schedule failed. A failed trial without it was cut short and may be asked again."""

FOUND = "found"
"""Trial attribute: what was found out about a schedule, a `Found` as plain data."""


@dataclass(frozen=True)
class Found:
    """A verified schedule's timing. A trial's value is 1/`ratio`.

    Fields:
        ms, default_ms: medians of this schedule and of the default, timed together.
        ratio, low, high: how many times faster than the default, and the bounds of that (`timing.paired_ratio`).
        source: SHA-256 of the generated code.
        same_as: number of the trial that had the same code and whose timing this is, or None.
    """

    ms: float
    default_ms: float
    ratio: float
    low: float
    high: float
    source: str
    same_as: int | None = None

    @classmethod
    def of(cls, trial: FrozenTrial) -> Found:
        """What a complete trial found."""
        return cls(**trial.user_attrs[FOUND])

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the trial's attribute."""
        return asdict(self)


def settled(trial: FrozenTrial) -> bool:
    """Whether a trial says something about its schedule: it was measured, or it failed for a reason."""
    return trial.state == TrialState.COMPLETE or (trial.state == TrialState.FAIL and REASON in trial.user_attrs)


def taken(trial: FrozenTrial) -> bool:
    """Whether a trial's schedule is settled or somebody is at work on it."""
    return settled(trial) or trial.state == TrialState.RUNNING


def unseen(pool: Pool, trials: Iterable[FrozenTrial]) -> set[int]:
    """The members that no trial has settled and none is at work on."""
    # A trial that another process has created this moment does not have all its tunables yet: it is no member.
    return set(range(len(pool))) - {pool.member(trial.params) for trial in trials if taken(trial)}


def fastest_first(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that were measured, by value; the older one first where two are equal."""
    measured = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return sorted(measured, key=lambda trial: (trial.value, trial.number))
