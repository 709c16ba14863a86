"""The trials of a study that several workers share: asking, telling, and the state of the search.

Workers may run on any number of machines. None waits for a lock: where two ask for the same member, both see it and the
lower trial number keeps it.
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
from autotune.search.trials import REASON, RESULT, TrialResult, claimed, evaluated, fastest_first, member_of, unclaimed
from autotune.study.heartbeat import OWNER, Leases
from tiles.errors import BadInput

POLL_SECONDS = 0.02
"""Between two polls of a trial whose owner is choosing its tunables."""


@dataclass(frozen=True)
class SearchState:
    """The state of a search.

    Fields:
        measured: the measured trials, the fastest first.
        new: trials that other workers have evaluated since the last poll.
        remaining: number of members that no trial has evaluated or is running.
        budget_left: how many more trials the budget allows; running ones count as spent.
        running_elsewhere: number of trials that other workers are running.
    """

    measured: list[FrozenTrial]
    new: list[FrozenTrial]
    remaining: int
    budget_left: int
    running_elsewhere: int


class SharedTrials:
    """Asks for members that no other worker has claimed, and tells their results. `close` frees what was not told."""

    def __init__(self, study: Study, pool: Pool, budget: int) -> None:
        self.study = study
        self._pool = pool
        self._budget = budget
        self._leases = Leases()
        self._known = {trial.number for trial in self.evaluated()}
        study.sampler = _OwnerSampler(study.sampler, self._leases.owner)

    def close(self) -> None:
        """Release this run's trials, for others to ask at once."""
        for trial in self._leases.held:
            with suppress(BadInput):  # a storage that fails was reported already; others will see the lease expire
                self.release_trial(trial)
        self._leases.close()

    def evaluated(self) -> list[FrozenTrial]:
        """The trials that were measured or failed for a reason."""
        return [trial for trial in self._trials() if evaluated(trial)]

    def measured(self) -> list[FrozenTrial]:
        """The measured trials, the fastest first."""
        return fastest_first(self._trials())

    def poll(self) -> SearchState:
        """The state of the search; trials whose lease has expired are freed first."""
        trials = self._trials()
        gone = [trial for trial in trials if self._abandoned(trial)]
        for trial in gone:
            self._set_state(trial.number, TrialState.FAIL)
        if gone:
            trials = self._trials()
        new = [trial for trial in trials if evaluated(trial) and trial.number not in self._known]
        self._known |= {trial.number for trial in new}
        running = [trial for trial in trials if trial.state == TrialState.RUNNING]
        return SearchState(
            measured=fastest_first(trials),
            new=new,
            remaining=len(unclaimed(self._pool, trials)),
            budget_left=self._budget - sum(claimed(trial) for trial in trials),
            running_elsewhere=sum(not self._leases.holds(trial) for trial in running),
        )

    def ask(self) -> tuple[Trial, int] | None:
        """A trial and its member, which no other worker runs; None where others have claimed all that was left."""
        while True:
            trial = self.study.ask(dict(self._pool.distributions))
            self._leases.acquire(trial)
            member = member_of(trial, self._pool)
            before = self._claimed_before(trial)
            if before is not None and len(before) < self._budget and member not in before:
                return trial, member
            self.release_trial(trial)
            state = self.poll()
            if state.remaining == 0 or state.budget_left <= 0:
                return None

    def complete(self, trial: Trial, found: TrialResult) -> bool:
        """Tell a result; False where the trial is no longer ours, as its lease has expired."""
        return self._tell(trial, {RESULT: found.as_dict()}, TrialState.COMPLETE, 1 / found.ratio)

    def fail(self, trial: Trial, reason: str) -> bool:
        """Tell why the schedule failed, so that it is never asked again; False as in `complete`."""
        return self._tell(trial, {REASON: reason}, TrialState.FAIL)

    def release_trial(self, trial: Trial) -> bool:
        """Tell a trial without a result: it counts nowhere, and its schedule may be asked again."""
        return self._tell(trial, {}, TrialState.FAIL)

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _claimed_before(self, trial: Trial) -> list[int | None] | None:
        """The members claimed before our trial, the same for every worker; None where ours was freed."""
        while True:
            trials = self._trials()
            before = [other for other in trials[: trial.number] if claimed(other) and not self._abandoned(other)]
            # One that still lacks tunables may claim our member.
            if all(len(other.params) == len(self._pool.space) for other in before):
                break
            time.sleep(POLL_SECONDS)
        if trials[trial.number].state != TrialState.RUNNING:
            return None  # our lease had expired
        return [self._pool.member(other.params) for other in before]

    def _abandoned(self, trial: FrozenTrial) -> bool:
        return trial.state == TrialState.RUNNING and not self._leases.holds(trial) and self._leases.expired(trial)

    def _tell(self, trial: Trial, attributes: dict[str, Any], state: TrialState, value: float | None = None) -> bool:
        self._leases.release(trial)
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
        except UpdateFinishedTrialError:  # another worker has just freed it
            return False
        return told.state == state and (value is None or told.value == value)


class _OwnerSampler(BaseSampler):
    """A sampler whose trials carry their owner from the start, before they have tunables."""

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
