"""Measurement and provenance of a record."""

import sys

import pytest

from autotune.measuring.roofline import Roofline
from autotune.study.provenance import measurement, provenance
from tiles.kernels.spec import Traffic


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


def test_passwords_are_not_kept(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mhc-tune", "tune", "--storage", "postgresql+psycopg://me:secret@host/db"])
    assert provenance()["command"] == "mhc-tune tune --storage postgresql+psycopg://me:***@host/db"
