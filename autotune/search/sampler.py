"""What to try next: an Optuna sampler that only ever proposes unseen members of a pool."""

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
    bent_logarithms,
    chance_to_work,
    encode,
    expected_improvement,
    rates,
    squared_distances,
)
from autotune.search.trials import settled, unseen

WARMUP = 10
"""Members, the default and `first` among them, that are tried before a model is asked; a quarter of a small budget."""

CANDIDATES = 64
"""Random members of which the warm-up takes the one farthest from all that were tried."""


class PoolSampler(BaseSampler):
    """Proposes the default schedule, then `first`, then members far apart, then those of most expected improvement.

    The expectation is that of a Gaussian process (`surrogate`) at every unseen member, on the scales of log
    time and of speed in turn, times the probability that it works; trials that still run count with
    the time that is expected of them. No member is proposed twice, so that a pool no larger than the budget is swept
    whole. A proposal depends on the seed and on what the trials say, and on nothing else: a search that is resumed
    goes on as if it had not stopped. Ask with `study.ask(pool.distributions)`, and only while `unseen` is not empty.

    The default comes first, and the members of `first` right after it, in their order.
    """

    def __init__(self, pool: Pool, *, budget: int, seed: int, first: Sequence[int] = ()) -> None:
        self._pool = pool
        self._warmup = max(4, min(WARMUP, budget // 4))
        self._seed = seed
        self._first = (pool.default, *first)

    @cached_property
    def _features(self) -> Array:
        return encode(self._pool)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All tunables are sampled together."""
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
        """Not used: a tunable by itself says nothing about validity."""
        raise RuntimeError(f"{param_name} is not a tunable of this pool: ask with `study.ask(pool.distributions)`")

    def _next(self, others: Sequence[FrozenTrial]) -> int:
        left = unseen(self._pool, others)
        if not left:  # other workers took the last ones this moment: what is asked now will not stand
            return self._pool.default
        for member in self._first:
            if member in left:
                return member
        candidates = numpy.array(sorted(left))
        tried = len(self._pool) - len(left)
        measured = {self._member(other): other.value for other in others if other.state == TrialState.COMPLETE}
        if tried < self._warmup or len(measured) < 2:
            return self._far_from_all(candidates, tried)
        # A trial that another process has created this moment is no member yet.
        asked = (self._pool.member(other.params) for other in others if other.state == TrialState.RUNNING)
        running = [member for member in asked if member is not None]
        failed = {self._member(other) for other in others if settled(other)} - set(measured)
        # What looks best on the one scale is seldom what does on the other: in turn they get stuck less often.
        scale = rates if tried % 2 else bent_logarithms
        values = scale(numpy.array(list(measured.values()), float))
        return self._most_promising(candidates, list(measured), values, sorted(set(running)), sorted(failed))

    def _member(self, trial: FrozenTrial) -> int:
        member = self._pool.member(trial.params)
        assert member is not None, "every trial of a pool's study has the tunables of a member"
        return member

    def _far_from_all(self, candidates: Array, tried: int) -> int:
        """Of some members, drawn by the seed and how many were tried, the one whose nearest neighbour is farthest."""
        drawn = random.Random(f"{self._seed} {tried}").sample(range(len(candidates)), min(CANDIDATES, len(candidates)))
        some = candidates[drawn]
        seen = numpy.setdiff1d(numpy.arange(len(self._pool)), candidates)
        if len(seen) == 0:
            return int(some[0])
        nearest = squared_distances(self._features[some], self._features[seen]).min(axis=1)
        return int(some[nearest.argmax()])

    def _most_promising(
        self, candidates: Array, measured: list[int], values: Array, running: list[int], failed: list[int]
    ) -> int:
        x = self._features
        model = Surrogate.fitted(x[measured], values)
        if running:
            model = model.believing(x[running])
        mean, deviation = model.predict(x[candidates])
        hope = expected_improvement(mean, deviation, float(values.min()))
        if failed:
            known = [*measured, *failed]
            hope *= chance_to_work(x[known], numpy.arange(len(known)) < len(measured), x[candidates])
        if hope.max() <= 0:  # none is expected to be better by anything that a float can hold
            return int(candidates[mean.argmin()])
        return int(candidates[hope.argmax()])
