"""Searches on recorded spaces: ours and baselines, each as its users would write it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, TPESampler
from optuna.trial import TrialState

from autotune.recorded.spaces import RecordedSpace
from autotune.search.pool import Pool
from autotune.search.sampler import PoolSampler
from autotune.search.trials import REASON
from tiles.errors import BadInput

Search = Callable[[RecordedSpace, int, int], list[int | None]]
"""(space, trials, seed) -> the member of each trial in order, None for one that is not in the pool."""


def start(space: RecordedSpace, seed: int) -> int:
    """The first member of a search: the space's default, or a random member where there is none."""
    return space.pool.default if space.has_default else random.Random(f"start {seed}").randrange(len(space.pool))


def ours(space: RecordedSpace, trials: int, seed: int) -> list[int | None]:
    """`PoolSampler`, until the pool is swept."""
    pool = space.starting_at(start(space, seed))
    study = _study(PoolSampler(pool, budget=trials, seed=seed))
    asked: list[int | None] = []
    for _ in range(min(trials, len(pool))):
        trial = study.ask(dict(pool.distributions))
        member = pool.member(trial.params)
        asked.append(member)
        _tell(study, trial, space, member)
    return asked


def tpe(space: RecordedSpace, trials: int, seed: int) -> list[int | None]:
    """Optuna's TPE with its defaults, on ordinal integers: repeated and invalid configurations cost trials."""
    return _optuna_search(TPESampler(seed=seed), space, trials, seed)


def gp(space: RecordedSpace, trials: int, seed: int) -> list[int | None]:
    """Optuna's Gaussian process with its defaults, on the same integers. Raises `BadInput` without SciPy."""
    _needs_scipy()
    return _optuna_search(GPSampler(seed=seed), space, trials, seed)


def gp_pool(space: RecordedSpace, trials: int, seed: int) -> list[int | None]:
    """`gp` with each proposal moved to the nearest member that was not tried: like ours it repeats none."""
    _needs_scipy()
    distributions, pool = _ordinal(space), space.pool
    study, left = _study(GPSampler(seed=seed)), set(range(len(pool)))
    asked: list[int | None] = []
    while left and len(asked) < trials:
        trial = study.ask(dict(distributions))
        study.tell(trial, state=TrialState.FAIL)  # of which the sampler takes no notice: what was tried is added
        at = pool.nearest(_values(space, trial.params), left)[0] if asked else start(space, seed)
        left.remove(at)
        asked.append(at)
        if (ms := space.ms[at]) is not None:
            params = _params(space, at)
            study.add_trial(optuna.trial.create_trial(params=params, distributions=dict(distributions), value=ms))
    return asked


def random_search(space: RecordedSpace, trials: int, seed: int) -> list[int | None]:
    """Random search without repetition."""
    first = start(space, seed)
    others = [member for member in range(len(space.pool)) if member != first]
    drawn = random.Random(seed).sample(others, min(trials - 1, len(others)))
    return [first, *drawn]


def hill_climbing(space: RecordedSpace, trials: int, seed: int) -> list[int | None]:
    """Hill climbing with random restarts: move to the first better neighbour, tried in random order.

    Members that were tried before cost no trial.
    """
    draw, tried = random.Random(seed), dict[int, float]()
    trials = min(trials, len(space.pool))

    def time_of(member: int) -> float:
        if member not in tried and len(tried) < trials:
            ms = space.ms[member]
            tried[member] = float("inf") if ms is None else ms
        return tried.get(member, float("inf"))

    here = start(space, seed)
    time_of(here)
    while len(tried) < trials:
        nearby = neighbours(space.pool, here)
        draw.shuffle(nearby)
        better = next((member for member in nearby if time_of(member) < tried[here]), None)
        if better is None:
            better = draw.choice([member for member in range(len(space.pool)) if member not in tried] or [here])
            time_of(better)
        here = better if better in tried else here
    return list(tried)


def neighbours(pool: Pool, member: int) -> list[int]:
    """The members that differ in one tunable."""
    values = pool.values(member)
    changed = ({**values, name: other} for name, choices in pool.space.items() for other in choices)
    found = (pool.member(other) for other in changed if other != values)
    return [other for other in found if other is not None]


SAMPLERS: Mapping[str, Search] = {
    "ours": ours,
    "tpe": tpe,
    "random": random_search,
    "local": hill_climbing,
    "gp": gp,
    "gp-pool": gp_pool,
}


def _optuna_search(sampler: BaseSampler, space: RecordedSpace, trials: int, seed: int) -> list[int | None]:
    study, distributions = _study(sampler), _ordinal(space)
    study.enqueue_trial(_params(space, start(space, seed)))
    asked = []
    for _ in range(trials):
        trial = study.ask(dict(distributions))
        asked.append(space.pool.member(_values(space, trial.params)))
        _tell(study, trial, space, asked[-1])
    return asked


def _needs_scipy() -> None:
    if find_spec("scipy") is None:
        raise BadInput("Optuna's GPSampler needs SciPy, which is not installed: pip install scipy")


def _ordinal(space: RecordedSpace) -> dict[str, BaseDistribution]:
    """The tunables as Optuna's own samplers take them best: numbers by their rank."""
    return {
        name: IntDistribution(0, len(values) - 1) if _is_number(values) else CategoricalDistribution(values)
        for name, values in space.pool.space.items()
    }


def _values(space: RecordedSpace, params: Mapping[str, Any]) -> dict[str, Any]:
    """The tunables that `_ordinal` parameters stand for."""
    tunables = space.pool.space
    return {name: tunables[name][at] if _is_number(tunables[name]) else at for name, at in params.items()}


def _params(space: RecordedSpace, member: int) -> dict[str, Any]:
    """The `_ordinal` parameters of a member."""
    tunables = space.pool.space
    return {
        name: tunables[name].index(value) if _is_number(tunables[name]) else value
        for name, value in space.pool.values(member).items()
    }


def _is_number(values: tuple[Any, ...]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _study(sampler: BaseSampler) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(sampler=sampler)


def _tell(study: optuna.Study, trial: optuna.Trial, space: RecordedSpace, member: int | None) -> None:
    ms = None if member is None else space.ms[member]
    if ms is None:
        trial.set_user_attr(REASON, "invalid" if member is None else space.reasons[member])
        study.tell(trial, state=TrialState.FAIL)
    else:
        study.tell(trial, ms)
