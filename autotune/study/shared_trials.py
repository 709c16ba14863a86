"""The trials of a study as one of its workers sees them: who works on what, what is settled, what is left.

Several workers, on any number of machines, may share a study. None waits for a lock: each asks, and where two took the
same member, both see it and the lower trial number keeps it.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from autotune.search.pool import Pool
from autotune.search.trials import FOUND, REASON, Found, fastest_first, settled, taken, unseen
from autotune.study.heartbeat import OWNER, Lease
from tiles.errors import BadInput

LOOK_SECONDS = 0.02
"""Between two looks at a trial whose owner is choosing this moment."""


@dataclass(frozen=True)
class Standing:
    """Where a search stands.

    Fields:
        measured: the trials that were measured, the fastest first.
        news: what other workers have settled since the last look.
        left: how many members no trial has settled and nobody is at work on.
        room: how many more trials the budget allows, those at work counted.
        elsewhere: how many trials other workers are at work on.
    """

    measured: list[FrozenTrial]
    news: list[FrozenTrial]
    left: int
    room: int
    elsewhere: int


class Ledger:
    """Asks for members that nobody else has, and tells what became of them. `close` frees what was not told."""

    def __init__(self, study: Study, pool: Pool, budget: int) -> None:
        self.study = study
        self._pool = pool
        self._budget = budget
        self._lease = Lease()
        self._known = {trial.number for trial in self.settled()}
        study.sampler = _Owned(study.sampler, self._lease.owner)

    def close(self) -> None:
        """Let others have at once what this run was at work on."""
        for trial in self._lease.held:
            with suppress(BadInput):  # a storage that fails has been told of: others will see that we are gone
                self.give_up(trial)
        self._lease.close()

    def settled(self) -> list[FrozenTrial]:
        """The trials that say something about their schedule."""
        return [trial for trial in self._trials() if settled(trial)]

    def measured(self) -> list[FrozenTrial]:
        """The trials that were measured, the fastest first."""
        return fastest_first(self._trials())

    def look(self) -> Standing:
        """Where the search stands; trials whose owner is gone are freed first."""
        trials = self._trials()
        gone = [trial for trial in trials if self._gone(trial)]
        for trial in gone:
            self._set_state(trial.number, TrialState.FAIL)
        if gone:
            trials = self._trials()
        news = [trial for trial in trials if settled(trial) and trial.number not in self._known]
        self._known |= {trial.number for trial in news}
        running = [trial for trial in trials if trial.state == TrialState.RUNNING]
        return Standing(
            measured=fastest_first(trials),
            news=news,
            left=len(unseen(self._pool, trials)),
            room=self._budget - sum(taken(trial) for trial in trials),
            elsewhere=sum(not self._lease.mine(trial) for trial in running),
        )

    def ask(self) -> tuple[Trial, int] | None:
        """A trial and its member, which nobody else is at work on; None where others took all that was left."""
        while True:
            trial = self.study.ask(dict(self._pool.distributions))
            self._lease.hold(trial)
            member = self._pool.member(trial.params)
            assert member is not None, "the sampler proposes members, and the study's name tells the pool"
            before = self._before(trial)
            if before is not None and len(before) < self._budget and member not in before:
                return trial, member
            self.give_up(trial)
            standing = self.look()
            if standing.left == 0 or standing.room <= 0:
                return None

    def complete(self, trial: Trial, found: Found) -> bool:
        """Tell what was found; False where the trial is no longer ours (we were silent for too long)."""
        return self._tell(trial, {FOUND: found.as_dict()}, TrialState.COMPLETE, 1 / found.ratio)

    def fail(self, trial: Trial, reason: str) -> bool:
        """Tell why its schedule does not work, so that it is never asked again; False as in `complete`."""
        return self._tell(trial, {REASON: reason}, TrialState.FAIL)

    def give_up(self, trial: Trial) -> bool:
        """Tell that nothing was found out: the trial counts nowhere, and its schedule may be asked again."""
        return self._tell(trial, {}, TrialState.FAIL)

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _before(self, trial: Trial) -> list[int | None] | None:
        """The members of all that stood before our trial did, the same whoever asks; None where ours was freed."""
        while True:
            trials = self._trials()
            before = [other for other in trials[: trial.number] if taken(other) and not self._gone(other)]
            # One without all its tunables may yet become ours.
            if all(len(other.params) == len(self._pool.space) for other in before):
                break
            time.sleep(LOOK_SECONDS)
        if trials[trial.number].state != TrialState.RUNNING:
            return None  # others took us for dead
        return [self._pool.member(other.params) for other in before]

    def _gone(self, trial: FrozenTrial) -> bool:
        return trial.state == TrialState.RUNNING and not self._lease.mine(trial) and self._lease.abandoned(trial)

    def _tell(self, trial: Trial, attributes: dict[str, Any], state: TrialState, value: float | None = None) -> bool:
        self._lease.let_go(trial)
        self._known.add(trial.number)
        try:
            for name, given in attributes.items():
                trial.set_user_attr(name, given)
        except UpdateFinishedTrialError:
            return False
        return self._set_state(trial.number, state, value)

    def _set_state(self, number: int, state: TrialState, value: float | None = None) -> bool:
        try:
            told = self.study.tell(number, value, state=state, skip_if_finished=True)
        except UpdateFinishedTrialError:  # another worker freed it this moment
            return False
        return told.state == state and (value is None or told.value == value)


class _Owned(BaseSampler):
    """A sampler whose trials carry their owner from the first moment, before they have tunables."""

    def __init__(self, sampler: BaseSampler, owner: dict[str, Any]) -> None:
        self._sampler, self._owner = sampler, owner

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        study._storage.set_trial_user_attr(trial._trial_id, OWNER, self._owner)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)
