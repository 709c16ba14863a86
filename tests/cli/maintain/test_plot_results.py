"""The table of what fusing gains, and the picture of how cost grows."""

import json
from dataclasses import asdict

import pytest
from typer.testing import CliRunner

from cli.bench.cases import FUSED_PASSES, OPS
from cli.maintain import plot_results
from tiles.cache.cache import KernelCache, Key
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.target import detect_device

DEVICE = detect_device("cpu")


def put(cache, op, direction, measurement):
    problem = Problem(op, direction, 4, 1280, "float32", tokens=2048)
    schedule = asdict(kernel_spec(op, direction).default(problem, DEVICE.target))
    cache.put(Key.of(problem, DEVICE), schedule, b"code", "source", measurement, {})


def test_gains_are_told_for_the_fused_kernels_alone(tmp_path):
    cache = KernelCache(tmp_path)
    put(cache, "merge", "forward", {"tuned_ms": 1.0})
    put(cache, "pre", "forward", {"separate_ratio": 0.5, "separate_wins": False})
    put(cache, "step", "backward", {"separate_ratio": 1.25, "separate_wins": True})
    said = CliRunner().invoke(plot_results.app, ["gains", str(tmp_path)])
    assert said.exit_code == 0
    lines = said.output.strip().splitlines()
    assert lines[2].startswith("| pre forward | 4 | 1280 | 2048 | float32 |")
    assert lines[2].endswith("| 2.00 | fused |")
    assert lines[3].endswith("| 0.80 | separate |")
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("op", "direction", "gain"),
    [("pre", "forward", 9 / 5), ("single_pass", "forward", 18 / 10), ("single_pass", "backward", 64 / 15)],
)
def test_bytes_predict_the_gain_of_reading_x_once(op, direction, gain):
    """Without coefficients: for pre forward (n + n + 1)C against (n + 1)C; for single_pass (4n + 2)C against (2n + 2)C,
    and (15n + 4)C, with the additions of three gradients, against (3n + 3)C."""
    problem = Problem(op, direction, 4, 2560, "float32", tokens=100_000)
    assert plot_results.predicted_gain(problem) == pytest.approx(gain, rel=0.01)


def test_every_op_with_a_kernel_is_scaled():
    assert set(plot_results.OPS) == set(OPS) - {*FUSED_PASSES, "pre_norm"}


@pytest.mark.slow
def test_scaling_measures_and_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(plot_results, "TOKENS", (8, 16))
    monkeypatch.setattr(plot_results, "WIDTHS", (16, 24))
    monkeypatch.setattr(plot_results, "FIXED_WIDTH", 16)
    monkeypatch.setattr(plot_results, "FIXED_TOKENS", 8)
    monkeypatch.setattr(plot_results, "OPS", ("aggregate",))
    monkeypatch.setenv("MHC_TUNE_CACHE", str(tmp_path / "cache"))
    data, picture = tmp_path / "scaling.json", tmp_path / "scaling.png"
    said = CliRunner().invoke(plot_results.app, ["scaling", str(data), str(picture)])
    assert said.exit_code == 0, said.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert '"impl": "default"' in data.read_text()


def test_speedups_are_times_over_those_of_the_tuned_kernels(tmp_path):
    times = {("layer", "tuned"): 2.0, ("layer", "eager"): 10.0, ("layer", "compile"): 3.0}
    rows = [
        {"op": op, "impl": impl, "dtype": dtype, "direction": direction, "median_ms": ms * (direction == "both" or 7)}
        for (op, impl), ms in times.items()
        for dtype in ("bfloat16", "float32")
        for direction in ("forward", "both")
    ]
    assert plot_results.speedups(rows, "float32", "eager") == {"layer": 5.0}
    assert plot_results.speedups(rows, "float32", "a peer") == {}, "what was left out has no bar"
    (tmp_path / "bench.json").write_text(json.dumps({"results": rows}))
    said = CliRunner().invoke(plot_results.app, ["speedup", str(tmp_path), str(tmp_path / "out.png")])
    assert said.exit_code == 0, said.output
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"results": [{}]}', '{"results": []}'])
def test_a_figure_of_something_else_gets_one_line(tmp_path, content):
    data = tmp_path / "replay.json"
    data.write_text(content)
    said = CliRunner().invoke(plot_results.app, ["replay", str(data), str(tmp_path / "out.png")])
    assert said.exit_code == 2
    assert "mhc-tune replay --json" in said.output
    assert len(said.output.strip().splitlines()) == 1
