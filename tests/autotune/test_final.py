"""The last decision: the default ships unless it is beaten beyond the noise."""

import random
import sys

import pytest

from autotune.final import decide, floor_ms, measurement, provenance
from autotune.measure import Roofline
from tiles.family import Traffic


def times(ms, *, noise=0.02, seed=0, rounds=40):
    draw = random.Random(seed)
    return [ms * (1 + noise * draw.uniform(-1, 1)) for _ in range(rounds)]


def test_a_clear_winner_wins_and_is_measured_by_the_rounds_that_did_not_pick_it():
    tuned = times(2.0, seed=1)
    tuned[::2] = [1.0] * 20  # lucky in the rounds that pick
    name, tuned_ms, default_ms, ratio = decide("default", {"default": times(4.0), "3": tuned, "4": times(3, seed=2)})
    assert name == "3"
    assert tuned_ms == pytest.approx(2.0, rel=0.02)
    assert default_ms == pytest.approx(4.0, rel=0.02)
    assert ratio == pytest.approx(2.0, rel=0.02)


def test_the_luckiest_of_many_equals_does_not_win():
    kept = 0
    for seed in range(50):
        field = {str(number): times(4.0, noise=0.1, seed=seed * 100 + number) for number in range(4)}
        kept += decide("0", field)[0] == "0"
    assert kept >= 48


def test_luck_in_the_picking_rounds_alone_is_not_enough():
    lucky = times(4.0)
    lucky[::2] = [1.0] * 20
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


def test_floor_is_bytes_over_bandwidth_and_lower_for_what_mostly_reads():
    roofline = Roofline(10.0, 50.0)
    assert floor_ms(Traffic(500_000, 500_000, 0), roofline) == pytest.approx(0.1)
    assert floor_ms(Traffic(1_000_000, 0, 0), roofline) == pytest.approx(0.1 / 1.5)
    assert floor_ms(Traffic(0, 1_000_000, 0), roofline) == pytest.approx(0.1)


def test_floor_is_the_operations_where_they_take_longer_than_the_bytes():
    roofline = Roofline(10.0, 50.0)
    assert floor_ms(Traffic(500_000, 500_000, 4_000_000), roofline) == pytest.approx(0.1)
    assert floor_ms(Traffic(500_000, 500_000, 20_000_000), roofline) == pytest.approx(0.4)


def test_measurement_counts_rates_in_decimal_gigabytes():
    found = measurement(
        tuned_ms=2.0,
        default_ms=3.0,
        ratio=1.5,
        traffic=Traffic(15_000_000, 5_000_000, 75_000_000),
        roofline=Roofline(20.0, 50.0),
        threads=2,
        trials=9,
        default_kept=False,
    )
    assert found["bytes"] == 20_000_000
    assert found["gb_per_s"] == pytest.approx(10.0)
    assert found["percent_of_copy"] == pytest.approx(50.0)
    assert (found["flops"], found["copy_gb_per_s"], found["gflops_peak"]) == (75_000_000, 20.0, 50.0)
    assert found["limit_ms"] == pytest.approx(1.5)
    assert found["percent_of_limit"] == pytest.approx(75.0)


def test_provenance_has_no_folder_and_no_control_characters(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/mhc-tune", "tune", "two\nlines"])
    assert provenance(seed=3)["command"] == "mhc-tune tune 'two lines'"
    assert provenance(seed=3)["seed"] == 3
