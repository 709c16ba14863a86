"""An Optuna sampler that proposes unclaimed members of a pool by expected improvement."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from autotune.search.pool import Pool
from autotune.search.surrogate import (
    Array,
    Surrogate,
    compressed_logs,
    encode,
    expected_improvement,
    probability_of_feasibility,
    speeds,
    squared_distances,
)
from autotune.search.trials import evaluated, member_of, unclaimed

STARTUP_TRIALS = 10
"""Trials before the model is used, the default and `first` included; a quarter of a small budget."""

CANDIDATES = 64
"""Random members of which a startup trial takes the one farthest from all that were tried."""


class PoolSampler(BaseSampler):
    """Proposes the default schedule, then `first`, then members far apart, then those of most expected improvement.

    The acquisition function is the expected improvement of a Gaussian process (`surrogate`) at every unclaimed member,
    on the scales of log time and of speed in turn, times the probability of feasibility; running trials count with
    their predicted time. No member is proposed twice, so that a pool no larger than the budget is swept. A proposal
    depends on the seed and on the trials only: a resumed search goes on as if it had not stopped. Ask with
    `study.ask(pool.distributions)`, and only while `unclaimed` is not empty.
    """

    def __init__(self, pool: Pool, *, budget: int, seed: int, first: Sequence[int] = ()) -> None:
        self._pool = pool
        self._startup_trials = max(4, min(STARTUP_TRIALS, budget // 4))
        self._seed = seed
        self._first = (pool.default, *first)

    @cached_property
    def _features(self) -> Array:
        return encode(self._pool)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All tunables: they are sampled jointly."""
        return dict(self._pool.distributions)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The tunables of the next member to try."""
        others = [other for other in study.get_trials(deepcopy=False) if other.number != trial.number]
        return self._pool.values(self._next(others))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Raise: validity is a property of all tunables together."""
        raise RuntimeError(f"{param_name} is not a tunable of this pool: ask with `study.ask(pool.distributions)`")

    def _next(self, others: Sequence[FrozenTrial]) -> int:
        left = unclaimed(self._pool, others)
        if not left:  # other workers have just claimed the last ones: this trial will be released
            return self._pool.default
        for member in self._first:
            if member in left:
                return member
        candidates = numpy.array(sorted(left))
        tried = len(self._pool) - len(left)
        measured = {member_of(other, self._pool): other.value for other in others if other.state == TrialState.COMPLETE}
        if tried < self._startup_trials or len(measured) < 2:
            return self._farthest_point(candidates, tried)
        # A trial that another process is just creating is no member yet.
        asked = (self._pool.member(other.params) for other in others if other.state == TrialState.RUNNING)
        running = [member for member in asked if member is not None]
        failed = {member_of(other, self._pool) for other in others if evaluated(other)} - set(measured)
        # The two scales seldom agree on the best candidate: taken in turn they get stuck less often.
        scale = speeds if tried % 2 else compressed_logs
        values = scale(numpy.array(list(measured.values()), float))
        return self._most_expected_improvement(candidates, list(measured), values, sorted(set(running)), sorted(failed))

    def _farthest_point(self, candidates: Array, tried: int) -> int:
        """Of `CANDIDATES` random members, drawn by seed and `tried`, the one farthest from its nearest tried member."""
        drawn = random.Random(f"{self._seed} {tried}").sample(range(len(candidates)), min(CANDIDATES, len(candidates)))
        some = candidates[drawn]
        seen = numpy.setdiff1d(numpy.arange(len(self._pool)), candidates)
        if len(seen) == 0:
            return int(some[0])
        nearest = squared_distances(self._features[some], self._features[seen]).min(axis=1)
        return int(some[nearest.argmax()])

    def _most_expected_improvement(
        self, candidates: Array, measured: list[int], values: Array, running: list[int], failed: list[int]
    ) -> int:
        x = self._features
        model = Surrogate.fitted(x[measured], values)
        if running:
            model = model.with_pending(x[running])
        mean, deviation = model.predict(x[candidates])
        # What is not measured has a nugget of its own to be won: without it a rugged valley looks known as soon as some
        # of its members are, and the search leaves it for where nothing is known.
        deviation = numpy.sqrt(deviation**2 + model.nugget)
        acquisition = expected_improvement(mean, deviation, float(values.min()))
        if failed:
            known = [*measured, *failed]
            acquisition *= probability_of_feasibility(x[known], numpy.arange(len(known)) < len(measured), x[candidates])
        if acquisition.max() <= 0:  # the expected improvements underflow
            return int(candidates[mean.argmin()])
        return int(candidates[acquisition.argmax()])
