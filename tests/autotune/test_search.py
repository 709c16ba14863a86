"""The sampler: what it proposes, and that it finds more than chance does."""

import random
import statistics

import optuna
import pytest
import toy
from optuna.trial import TrialState

from autotune.pool import Pool, enumerate_pool
from autotune.search import PoolSampler
from autotune.trials import REASON, settled, unseen
from tiles.target import Target

optuna.logging.set_verbosity(optuna.logging.WARNING)


def toy_pool():
    return enumerate_pool(toy.SPEC, toy.PROBLEM, Target("cpu", "x86-64-v3"))


def wide_pool():
    """A valley in 3,000 members, a quarter of the space invalid."""
    space = {"a": tuple(range(20)), "b": tuple(range(20)), "c": tuple(range(10))}
    members = tuple((a, b, c) for a in range(20) for b in range(20) for c in range(10) if (a + b + c) % 4)
    return Pool(space, members, 0)


def valley(values):
    return 1 + abs(values["a"] - 13) + abs(values["b"] - 4) + 3 * abs(values["c"] - 7)


def search(pool, value, budget, seed=0, study=None):
    """Members in the order in which they were asked."""
    study = study or optuna.create_study()
    study.sampler = PoolSampler(pool, budget=budget, seed=seed)
    for _ in range(budget):
        trial = study.ask(pool.distributions)
        study.tell(trial, value(trial.params))
    return [pool.member(trial.params) for trial in study.trials], study.best_value


def test_default_comes_first_and_no_member_twice():
    pool = wide_pool()
    asked, _ = search(pool, valley, 60)
    assert asked[0] == pool.default
    assert len(set(asked)) == 60
    assert None not in asked


def test_a_small_pool_is_swept_whole():
    pool = toy_pool()
    asked, _ = search(pool, lambda values: 1.0, len(pool))
    assert sorted(asked) == list(range(len(pool)))


def test_a_seed_repeats_and_another_differs():
    pool = wide_pool()
    assert search(pool, valley, 20, seed=3)[0] == search(pool, valley, 20, seed=3)[0]
    assert search(pool, valley, 20, seed=3)[0] != search(pool, valley, 20, seed=4)[0]


def test_finds_much_better_schedules_than_chance():
    pool, ours, chance = wide_pool(), [], []
    for seed in range(5):
        ours.append(search(pool, valley, 40, seed)[1])
        draw = random.Random(seed).sample(range(len(pool)), 40)
        chance.append(min(valley(pool.values(member)) for member in draw))
    assert statistics.mean(ours) < 0.7 * statistics.mean(chance)


def test_neighbours_of_the_best_get_their_share():
    """On a plateau with one dip TPE has nothing to go by; the dip's neighbours are still tried."""
    pool = wide_pool()
    dip = pool.members[pool.default]
    asked, _ = search(pool, lambda values: 0.0 if tuple(values.values()) == dip else 1.0, 40)
    close = [member for member in asked[10:] if sum(pool.members[member]) - sum(dip) <= 3]
    assert len(close) >= 8


def test_running_trials_and_failures_with_a_reason_are_not_asked_again_but_cut_short_ones_are():
    pool = toy_pool()
    study = optuna.create_study(sampler=PoolSampler(pool, budget=1000, seed=0))
    running, failed, cut_short = (study.ask(pool.distributions) for _ in range(3))
    failed.set_user_attr(REASON, "does not compile")
    study.tell(failed, state=TrialState.FAIL)
    study.tell(cut_short, state=TrialState.FAIL)
    left = unseen(pool, study.trials)
    assert pool.member(running.params) not in left
    assert pool.member(failed.params) not in left
    assert pool.member(cut_short.params) in left
    assert [settled(trial) for trial in study.trials] == [False, True, False]


def test_goes_on_where_all_that_ran_has_failed():
    pool = wide_pool()
    study = optuna.create_study(sampler=PoolSampler(pool, budget=12, seed=0))
    asked = set()
    for _ in range(12):
        trial = study.ask(pool.distributions)
        asked.add(pool.member(trial.params))
        trial.set_user_attr(REASON, "wrong")
        study.tell(trial, state=TrialState.FAIL)
    assert len(asked) == 12


def test_single_tunables_are_refused():
    study = optuna.create_study(sampler=PoolSampler(toy_pool(), budget=10, seed=0))
    with pytest.raises(RuntimeError, match=r"ask with `study\.ask\(pool\.distributions\)`"):
        study.ask().suggest_int("other", 1, 2)
