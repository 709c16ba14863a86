"""What to try next: an Optuna sampler that only ever proposes unseen members of a pool."""

from __future__ import annotations

import random
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from autotune.pool import Pool
from autotune.trials import fastest_first, unseen

NEIGHBOUR_EVERY = 3
"""One proposal in this many, after the warm-up, is a neighbour of the best."""


class PoolSampler(BaseSampler):
    """Proposes the default schedule, then random members, then TPE's choices and neighbours of the best.

    A TPE proposal that is invalid or was seen moves to the nearest unseen member, so that a pool no larger than the
    budget is swept whole. Ask with `study.ask(pool.distributions)`, and only while `unseen` is not empty.
    """

    def __init__(self, pool: Pool, *, budget: int, seed: int) -> None:
        self._pool = pool
        self._warmup = max(4, budget // 4)
        self._seed = seed
        self._tpe = TPESampler(seed=seed, n_startup_trials=0, multivariate=True)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All tunables are sampled together."""
        return dict(self._pool.distributions)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The tunables of the next member to try."""
        others = [other for other in study.get_trials(deepcopy=False) if other.number != trial.number]
        left = unseen(self._pool, others)
        if self._pool.default in left:
            return self._pool.values(self._pool.default)
        tried = len(self._pool) - len(left)
        # Seeded by how many were tried, so that a resumed search does not repeat the draws of its first part.
        draw = random.Random(f"{self._seed} {tried}")
        best = fastest_first(others)[:1]
        if tried < self._warmup or not best:
            return self._pool.values(draw.choice(sorted(left)))
        if tried % NEIGHBOUR_EVERY == 0:
            return self._pool.values(draw.choice(self._pool.nearest(best[0].params, left)))
        proposal = self._tpe.sample_relative(study, trial, search_space)
        return self._pool.values(draw.choice(self._pool.nearest(proposal, left)))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Not used: a tunable by itself says nothing about validity."""
        raise RuntimeError(f"{param_name} is not a tunable of this pool: ask with `study.ask(pool.distributions)`")
