"""Significance: the default stays unless it is beaten beyond the noise."""

import math
import random
import statistics

import pytest
import toy

from autotune.decision import significance
from autotune.decision.significance import (
    SELECTION_STRIDE,
    decide,
    finalist_results,
    is_flat,
    judging_rounds,
    lower_bound_ms,
    near_lower_bound,
    selection_rounds,
)
from autotune.measuring.roofline import Roofline
from autotune.measuring.timing import Ratio
from autotune.search.pool import enumerate_pool
from tiles.kernels.spec import Traffic


def times(ms, *, noise=0.02, seed=0, rounds=40):
    draw = random.Random(seed)
    return [ms * (1 + noise * draw.uniform(-1, 1)) for _ in range(rounds)]


def test_a_clear_winner_wins_and_is_measured_by_the_rounds_that_did_not_pick_it():
    tuned = times(2.0, seed=1)
    tuned[::SELECTION_STRIDE] = [1.0] * 14  # lucky in the rounds that pick
    name, tuned_ms, default_ms, ratio = decide("default", {"default": times(4.0), "3": tuned, "4": times(3, seed=2)})
    assert name == "3"
    assert tuned_ms == pytest.approx(2.0, rel=0.02)
    assert default_ms == pytest.approx(4.0, rel=0.02)
    assert ratio == pytest.approx(2.0, rel=0.02)


def on_a_virtual_machine(speeds, seed, *, rounds=60, noise=0.015):
    """Rounds as such a machine times them: it drifts, other guests take it away for a while, single calls are late."""
    draw, drift, stolen = random.Random(seed), 0.0, False
    found, order = {name: [] for name in speeds}, list(speeds)
    for _ in range(rounds):
        drift = 0.95 * drift + draw.gauss(0, 0.015)
        draw.shuffle(order)
        for name in order:
            stolen = draw.random() < (0.7 if stolen else 0.03)
            late = 1 + draw.expovariate(2) if draw.random() < 0.05 else 1
            found[name].append(speeds[name] * math.exp(drift + draw.gauss(0, noise)) * late * (1.3 if stolen else 1))
    return found


@pytest.mark.parametrize("finalists", [1, 3, 8])
def test_of_equal_kernels_the_default_wins_however_many_there_are(finalists, monkeypatch):
    """Without the least gain, so that the statistics alone hold the rate of wrong winners below 2.5 %."""
    monkeypatch.setattr(significance, "LEAST_GAIN", 0.0)
    equals = {str(number): 4.0 for number in range(finalists + 1)}
    wrong = sum(decide("0", on_a_virtual_machine(equals, seed, rounds=30))[0] != "0" for seed in range(400))
    assert wrong <= 18, "P(more than 18 of 400 at 2.5 %) is below 0.5 %"


def test_schedules_that_all_take_the_defaults_time_make_no_difference():
    same = [Ratio(1.0, 0.99, 1.01), Ratio(1.015, 0.97, 1.05), Ratio(0.99, 0.95, 1.0), Ratio(1.0, 0.9, 1.2)]
    assert not is_flat(same), "too few"
    assert is_flat([*same, Ratio(0.985, 0.95, 1.01)])
    assert not is_flat([*same, Ratio(1.03, 0.99, 1.05)]), "3 % may be something to find"
    assert not is_flat([*same, Ratio(1.018, 1.015, 1.02)]), "faster beyond the noise"
    assert not is_flat([*same, Ratio(0.982, 0.98, 0.985)]), "slower beyond the noise"


def test_a_gain_of_three_percent_is_found_and_said_as_it_is():
    speeds = {"0": 4.12, "1": 4.0, "2": 4.08, "3": 4.12}
    found = [decide("0", on_a_virtual_machine(speeds, seed)) for seed in range(100)]
    right = [ratio for name, _, _, ratio in found if name == "1"]
    assert len(right) >= 85
    assert statistics.median(right) == pytest.approx(1.03, abs=0.005)


def test_what_is_a_little_slower_never_wins():
    speeds = {"0": 4.0, "1": 4.04, "2": 4.08}
    assert all(decide("0", on_a_virtual_machine(speeds, seed))[0] == "0" for seed in range(200))


def test_rounds_pick_or_judge():
    rounds = list(range(10))
    assert list(selection_rounds(rounds)) == [0, 3, 6, 9]
    assert sorted([*selection_rounds(rounds), *judging_rounds(rounds)]) == rounds


@pytest.mark.parametrize(
    ("ratio", "stop"),
    [
        (Ratio(2.0, 1.98, 2.02), True),
        (Ratio(1.9, 1.7, 2.0), False),  # it may leave 18 %
        (Ratio(1.5, 1.49, 1.51), False),
        (Ratio(2.6, 2.5, 2.7), False),  # nothing is that far above the roofline
        (Ratio(2.01, 1.97, 2.3), True),
        (Ratio(2.0, 0.0, math.inf), False),
    ],
)
def test_a_search_stops_where_the_lower_confidence_bound_reaches_the_roofline(ratio, stop):
    assert near_lower_bound(4.0, ratio, bound=2.0, noise=0.02) is stop


def test_luck_in_the_picking_rounds_alone_is_not_enough():
    lucky = times(4.0)
    lucky[::SELECTION_STRIDE] = [1.0] * 14
    assert decide("default", {"default": times(4.0, seed=1), "3": lucky}) == (
        "default",
        pytest.approx(4.0, rel=0.02),
        pytest.approx(4.0, rel=0.02),
        1.0,
    )


def test_a_gain_below_one_percent_is_not_taken():
    assert decide("default", {"default": [4.0] * 40, "3": [3.98] * 40})[0] == "default"
    assert decide("default", {"default": [4.0] * 40, "3": [3.9] * 40})[0] == "3"


def test_the_default_alone_is_kept():
    assert decide("default", {"default": [4.0] * 40}) == ("default", 4.0, 4.0, 1.0)


def test_the_lower_bound_is_bytes_over_bandwidth_and_lower_for_what_mostly_reads():
    roofline = Roofline(10.0, 50.0)
    assert lower_bound_ms(Traffic(500_000, 500_000, 0), roofline) == pytest.approx(0.1)
    assert lower_bound_ms(Traffic(1_000_000, 0, 0), roofline) == pytest.approx(0.1 / 1.5)
    assert lower_bound_ms(Traffic(0, 1_000_000, 0), roofline) == pytest.approx(0.1)


def test_the_lower_bound_is_the_operations_where_they_take_longer_than_the_bytes():
    roofline = Roofline(10.0, 50.0)
    assert lower_bound_ms(Traffic(500_000, 500_000, 4_000_000), roofline) == pytest.approx(0.1)
    assert lower_bound_ms(Traffic(500_000, 500_000, 20_000_000), roofline) == pytest.approx(0.4)


def test_finalist_results_of_few_rounds_have_no_bounds():
    pool = enumerate_pool(toy.SPEC, toy.PROBLEM, toy.DEVICE.target)
    other = 0 if pool.default else 1
    rows = finalist_results(pool, {str(pool.default): [2.0] * 6, str(other): [1.0] * 6})
    assert [(row["default"], row["ratio"], row["low"], row["high"]) for row in rows] == [
        (True, 1.0, None, None),
        (False, 2.0, None, None),
    ]
