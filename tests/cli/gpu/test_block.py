"""The training step with and without mHC."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cli.gpu import block as gpu_block
from cli.gpu.plan import MAIN_SHAPE
from mhc.dispatch.kernels import Kernels
from tiles.target import detect_device

CPU = detect_device("cpu")


def row(
    op: str, direction: str, impl: str, ms: float, shape: tuple[int, int, int] = MAIN_SHAPE, **more: Any
) -> dict[str, Any]:
    streams, width, tokens = shape
    return {
        **{"op": op, "direction": direction, "streams": streams, "width": width, "tokens": tokens, "impl": impl},
        **{"median_ms": ms, "gb_per_s": 2000.0, "percent_of_copy": 70.0, "percent_of_limit": 65.0, "host_us": 21.0},
    }


def test_the_transformers_step_is_timed_with_and_without_mhc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kernels, "defaults", Kernels.reference)
    monkeypatch.setattr(gpu_block, "ROUNDS", 2)
    size = gpu_block.NetworkSize(layers=1, streams=2, width=16, heads=2, tokens=8, dtype=torch.float32)
    found = gpu_block.measure(CPU, tmp_path, size)
    assert [row["network"] for row in found["rows"]] == ["plain", "mhc", "mhc, single pass", "mhc, recomputed"]
    plain, with_streams, *_ = found["rows"]
    assert plain["overhead_percent"] == 0
    gain = with_streams["median_ms"] / plain["median_ms"] - 1
    assert with_streams["overhead_percent"] == pytest.approx(100 * gain)
    assert any("merge forward: reference" in ran for ran in found["runs"])
    assert any("single_pass backward: reference" in ran for ran in found["runs"])
