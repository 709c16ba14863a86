"""Trials of a study: their results, their states, and the pool members that they cover."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from optuna.trial import FrozenTrial, Trial, TrialState

from autotune.search.pool import Pool

REASON = "reason"
"""Trial attribute: why a schedule failed. A failed trial without it was cut short, and its schedule is asked again."""

RESULT = "found"
"""Trial attribute: the `TrialResult` as plain data."""


@dataclass(frozen=True)
class TrialResult:
    """The timing of a verified schedule. The trial's value is 1/`ratio`.

    Fields:
        ms, default_ms: medians of this schedule and of the default, timed together.
        ratio, low, high: speed-up over the default and its confidence interval (`timing.paired_ratio`).
        source: SHA-256 of the generated code.
        same_as: number of the trial with the same code, whose timing this is, or None.
    """

    ms: float
    default_ms: float
    ratio: float
    low: float
    high: float
    source: str
    same_as: int | None = None

    @classmethod
    def of(cls, trial: FrozenTrial) -> TrialResult:
        """The result of a complete trial."""
        return cls(**trial.user_attrs[RESULT])

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the trial's attribute."""
        return asdict(self)


def evaluated(trial: FrozenTrial) -> bool:
    """Whether a trial's schedule was measured or failed for a reason of its own."""
    return trial.state == TrialState.COMPLETE or (trial.state == TrialState.FAIL and REASON in trial.user_attrs)


def claimed(trial: FrozenTrial) -> bool:
    """Whether a trial's schedule is evaluated or running."""
    return evaluated(trial) or trial.state == TrialState.RUNNING


def unclaimed(pool: Pool, trials: Iterable[FrozenTrial]) -> set[int]:
    """The members that no trial has evaluated or is running."""
    # A trial that another process is just creating lacks tunables: it is no member yet.
    return set(range(len(pool))) - {pool.member(trial.params) for trial in trials if claimed(trial)}


def member_of(trial: FrozenTrial | Trial, pool: Pool) -> int:
    """The pool member of a trial that has all its tunables."""
    member = pool.member(trial.params)
    assert member is not None, "the sampler proposes members, and the study's name tells the pool"
    return member


def fastest_first(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """The measured trials by value; of equal ones the older first."""
    measured = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return sorted(measured, key=lambda trial: (trial.value, trial.number))
