"""The roofline: its measurement, and the time limit of a kernel's traffic."""

import itertools
from types import SimpleNamespace

import pytest

from autotune.measuring import roofline
from autotune.measuring.roofline import CHANNELS, PIXELS, SIDE, TAPS, Roofline, arithmetic_peak, copy_bandwidth
from tiles.kernels.spec import Traffic


def test_copy_bandwidth_is_that_of_the_fastest_copy(monkeypatch):
    monkeypatch.setattr(roofline, "last_level_cache_bytes", lambda: 2**20)
    instants = iter([0.0, 4.0, 10.0, 10.5, 20.0, 27.0])
    monkeypatch.setattr(roofline, "time", SimpleNamespace(perf_counter=lambda: next(instants)))
    assert copy_bandwidth(repeats=3) == pytest.approx(2 * 64 * 2**20 / 0.5 / 1e9)


def test_copy_bandwidth_is_a_rate(monkeypatch):
    monkeypatch.setattr(roofline, "last_level_cache_bytes", lambda: 2**20)
    assert 0.01 < copy_bandwidth(repeats=3) < 100_000


@pytest.mark.parametrize(
    ("product", "convolution"), [((4.0, 0.5, 7.0), (9.0, 9.0, 9.0)), ((9.0, 9.0, 9.0), (4.0, 7.0, 0.5))]
)
def test_the_arithmetic_peak_is_that_of_the_fastest_call(monkeypatch, product, convolution):
    instants = iter([instant for ms in (*product, *convolution) for instant in (0.0, ms)])
    monkeypatch.setattr(roofline, "time", SimpleNamespace(perf_counter=lambda: next(instants)))
    flops = 2 * SIDE**3 if 0.5 in product else 2 * PIXELS**2 * CHANNELS**2 * TAPS**2
    assert arithmetic_peak(repeats=3) == pytest.approx(flops / 0.5 / 1e9)


def test_a_busy_machine_is_not_kept_long(monkeypatch):
    instants = itertools.count(0.0, 1.0)
    monkeypatch.setattr(roofline, "time", SimpleNamespace(perf_counter=lambda: next(instants)))
    calls = []
    assert roofline._fastest(lambda: calls.append(1), 100) == 1.0
    assert len(calls) == 1 + roofline.MIN_REPEATS
    monkeypatch.setattr(roofline, "MAX_SECONDS", 50.0)
    roofline._fastest(lambda: calls.append(1), 100)
    assert len(calls) == 1 + roofline.MIN_REPEATS + 1 + 50


def test_a_roofline_is_measured_in_giga():
    measured = Roofline.measure()
    assert 0.1 < measured.copy_gb_per_s < 100_000
    assert 0.1 < measured.gflops < 1_000_000


def test_the_limit_is_the_slower_of_bytes_and_operations():
    limits = Roofline(copy_gb_per_s=20.0, gflops=50.0)
    assert limits.limit_ms(Traffic(30_000_000, 10_000_000, 0)) == pytest.approx(2.0)
    assert limits.limit_ms(Traffic(30_000_000, 10_000_000, 99_000_000)) == pytest.approx(2.0)
    assert limits.limit_ms(Traffic(30_000_000, 10_000_000, 200_000_000)) == pytest.approx(4.0)
