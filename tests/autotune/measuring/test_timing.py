"""Timing: order and number of calls, and confidence intervals of ratios."""

import math
import random

import pytest

from autotune.measuring import stopwatch
from autotune.measuring.timing import Ratio, interleaved, narrow, paired_ratio


@pytest.fixture
def calls(monkeypatch):
    """Records calls in order, with an eviction as "evict"."""
    log = []
    monkeypatch.setattr(stopwatch, "evict_caches", lambda: log.append("evict"))
    return log, {name: (lambda name=name: log.append(name)) for name in "abc"}


def test_each_round_runs_every_call_once_on_cold_caches(calls):
    log, functions = calls
    times = interleaved(functions, rounds=8, warmup=2, seed=1)
    assert [len(times[name]) for name in "abc"] == [8, 8, 8]
    assert all(ms >= 0 for name in "abc" for ms in times[name])
    assert log[:6] == list("abcabc")
    timed = log[6:]
    assert timed[::2] == ["evict"] * 24
    rounds = ["".join(timed[first + 1 : first + 6 : 2]) for first in range(0, 48, 6)]
    assert all(sorted(order) == list("abc") for order in rounds)
    assert len(set(rounds)) > 1, "the order is shuffled"


def test_time_limit_leaves_the_least_number_of_rounds(calls):
    _, functions = calls
    assert len(interleaved(functions, rounds=50, seconds=-1, least=6)["a"]) == 6
    assert len(interleaved(functions, rounds=4, seconds=-1, least=6)["a"]) == 4


def test_rounds_end_where_the_times_are_enough(calls):
    _, functions = calls
    said = []

    def enough(times):
        said.append({len(rounds) for rounds in times.values()})
        return said[-1] == {9}

    assert len(interleaved(functions, rounds=50, least=6, enough=enough)["a"]) == 9
    assert said == [{6}, {7}, {8}, {9}]


def test_intervals_are_narrow_where_times_scatter_little_whichever_is_faster():
    steady, doubled = [1.0] * 12, [2.0] * 12
    assert narrow({"a": steady, "b": doubled, "c": steady}, 0.01)
    assert narrow({"a": steady}, 0.01)
    assert not narrow({"a": steady, "b": doubled, "c": [1.0, 1.1] * 6}, 0.01)
    assert not narrow({"a": steady[:5], "b": doubled[:5]}, 0.01), "five rounds bound nothing"


class Stopwatch:
    """Takes each call to last as long as it says."""

    def __init__(self):
        self.conditions, self.log = {}, []

    def prepared(self, call):
        self.log.append("prepared")
        return call

    def milliseconds(self, call):
        return call()

    def observe(self, calls):
        self.log.append([call() for call in calls])


def test_a_stopwatch_prepares_each_call_once_times_it_and_asks_the_device_at_the_end():
    watch = Stopwatch()
    times = interleaved({"a": lambda: 3.0, "b": lambda: 4.0}, stopwatch=watch, rounds=3)
    assert times == {"a": [3.0] * 3, "b": [4.0] * 3}
    assert watch.log == ["prepared", "prepared", [3.0, 4.0]]


def test_paired_ratio_bounds_are_the_sign_tests():
    ratios = list(range(1, 16))
    # For n = 15 the 4th smallest and largest: P(at most 3 heads of 15) = 1.76 %, at most 4: 5.9 %.
    assert paired_ratio(ratios, [1.0] * 15) == Ratio(8, 4, 12)
    assert paired_ratio([2.0] * 6, [1.0] * 6) == Ratio(2, 2, 2)
    assert paired_ratio([2.0] * 5, [1.0] * 5) == Ratio(2, 0.0, math.inf)


def test_paired_ratio_covers_the_truth_as_often_as_it_says():
    draw, covered = random.Random(0), 0
    for _ in range(400):
        fast = [draw.lognormvariate(0, 0.2) for _ in range(21)]
        slow = [1.1 * draw.lognormvariate(0, 0.2) for _ in range(21)]
        found = paired_ratio(slow, fast)
        covered += found.low <= 1.1 <= found.high
    assert covered / 400 > 0.93


def test_pairing_takes_out_what_slows_both():
    drift = [1 + 10 * (step % 7) for step in range(21)]
    found = paired_ratio([1.1 * slow for slow in drift], drift)
    assert found.low == pytest.approx(1.1)
    assert found.high == pytest.approx(1.1)
