"""The comparison of boundaries."""

import json
import math

import pytest

import mhc
from cli.maintain import compare_boundaries


def test_a_cell_is_a_row_with_an_interval_and_the_means_are_geometric(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_boundaries, "CELLS", ((2, 16, 3, "float32"), (1, 8, 2, "bfloat16")))
    monkeypatch.setattr(compare_boundaries, "ROUNDS", 6)
    monkeypatch.setattr(mhc.Kernels, "defaults", mhc.Kernels.reference)
    compare_boundaries.main(tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert [(row["streams"], row["tokens"], row["rounds"]) for row in found["rows"]] == [(2, 3, 6), (1, 2, 6)]
    for row in found["rows"]:
        assert row["low"] <= row["ratio"] <= row["high"]
        assert min(row["step_ms"], row["single_pass_ms"]) > 0
    assert found["geometric_mean"] == pytest.approx(math.sqrt(math.prod(row["ratio"] for row in found["rows"])))
    assert found["device"]["kind"] == "cpu"
