"""The score, against its definition."""

import itertools
import random
import statistics

import pytest
import toy_space

from autotune.recorded.score import best_so_far, calculated_random_search, score, trials_to
from autotune.recorded.spaces import RecordedSpace
from autotune.search.pool import Pool


def tiny(*, default: bool) -> RecordedSpace:
    ms = (5.0, None, 2.0, 9.0, 1.0)
    pool = Pool({"a": (1, 2, 3, 4, 5)}, tuple((at,) for at in range(5)), 0)
    return RecordedSpace("tiny", pool, ms, {1: "fails"}, has_default=default)


@pytest.mark.parametrize("default", [False, True])
def test_random_search_is_the_mean_over_all_its_orders(default):
    space = tiny(default=default)
    orders = list(itertools.permutations(range(5)))
    if default:
        orders = [order for order in orders if order[0] == space.pool.default]
    exact = [statistics.fmean(at) for at in zip(*(best_so_far(space, order) for order in orders), strict=True)]
    assert calculated_random_search(space, 5) == pytest.approx(exact)


def test_random_search_of_a_large_space_agrees_with_drawing():
    space = toy_space.bowl(default=False)
    draw = random.Random(0)
    runs = [best_so_far(space, draw.sample(range(len(space.pool)), 30)) for _ in range(3000)]
    drawn = [statistics.fmean(at) for at in zip(*runs, strict=True)]
    assert calculated_random_search(space, 30) == pytest.approx(drawn, rel=0.02)


def test_until_something_runs_the_slowest_stands_in():
    assert best_so_far(tiny(default=False), [1, None, 3, 2, 0]) == [9, 9, 9, 2, 2]


def test_score_is_one_at_the_optimum_and_nought_for_random_search():
    space = toy_space.bowl(default=False)
    assert score(space, [[space.optimum] * 20]) == 1
    assert score(space, [calculated_random_search(space, 20)]) == pytest.approx(0, abs=1e-12)
    baseline = calculated_random_search(space, 2)
    halfway = [(at + space.optimum) / 2 for at in baseline]
    assert score(space, [halfway, halfway]) == pytest.approx(0.5)
    assert score(space, [[space.worst] * 20]) < 0


def test_trials_at_which_random_search_is_done_do_not_count():
    space = tiny(default=False)
    assert score(space, [[9.0, 1.0, 1.0, 1.0, 1.0]]) < 1
    assert score(space, [[1.0] * 5]) == 1


def test_trials_to_a_share_of_the_speed():
    space = tiny(default=False)
    assert trials_to(space, [5.0, 1.06, 1.05, 1.0], 0.95) == 3
    assert trials_to(space, [5.0, 1.06, 1.05, 1.0], 0.99) == 4
    assert trials_to(space, [5.0, 2.0], 0.95) is None
