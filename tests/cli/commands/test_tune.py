"""The command tune, with a tuner that is scripted: what it shows, keeps, and exits with."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import NoWorkers, write_config
from typer.testing import CliRunner

from autotune.events import ProblemFinished, ProblemStarted, ShootoutStarted, TrialDone, TrialFailed
from autotune.measuring.roofline import Roofline
from autotune.tuner import TuneFailed
from cli.commands import tune as command
from cli.main import app
from cli.ui.options import MIXING_OPS
from tiles.cache.cache import KernelCache, Key
from tiles.kernels.spec import Problem
from tiles.target import Device

MEASUREMENT = {
    "tuned_ms": 0.5,
    "default_ms": 1.0,
    "ratio": 2.0,
    "bytes": 1000,
    "gb_per_s": 5.0,
    "copy_gb_per_s": 10.0,
    "percent_of_copy": 50.0,
    "percent_of_limit": 75.0,
    "threads": 2,
    "trials": 3,
    "default_kept": False,
}


SHAPE = ("--streams", "2", "--width", "64", "--dtype", "float32")


class Script:
    """Stands in for `autotune.tuner.tune`: emits all events, stores a record; `at` raises at the n-th problem.

    Each says that it took so many `seconds` and why it `stopped`.
    """

    def __init__(
        self,
        at: int | None = None,
        raises: BaseException | None = None,
        seconds: float = 0.2,
        stopped: str = "trials",
    ) -> None:
        self.at, self.raises, self.seconds, self.stopped = at, raises, seconds, stopped
        self.calls: list[tuple[Problem, dict[str, Any]]] = []

    def __call__(self, problem: Problem, device: Device, cache: KernelCache, **options: Any) -> None:
        self.calls.append((problem, options))
        report: Callable[[Any], None] = options["on_event"]
        report(ProblemStarted(problem, pool=5, trials=3, evaluated=0, roofline=Roofline(10.0, 50.0)))
        if self.raises and len(self.calls) == self.at:
            if isinstance(self.raises, KeyboardInterrupt):
                report(ProblemFinished(problem, None, "interrupted", 0, 0.1))
            raise self.raises
        report(TrialDone(problem, 0, {}, 1.0, 1.0, 25.0, 37.5, 0.5, 2.0, 50.0, 75.0))
        report(TrialFailed(problem, 1, {}, "does not compile"))
        report(ShootoutStarted(problem, ({}, {})))
        record = cache.put(Key.of(problem, device), {"block": 1}, b"code", "text", MEASUREMENT, {})
        report(ProblemFinished(problem, record, self.stopped, 1, self.seconds))


@pytest.fixture
def tuning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    def run(script: Script, *more: str, shape: Sequence[str] = SHAPE) -> Any:
        monkeypatch.setattr(command, "tune_kernel", script)
        monkeypatch.setattr(command, "Workers", lambda **_: NoWorkers())
        given = ["--target", "cpu", "--tokens", "32", *shape, "--cache", str(tmp_path), *more]
        return CliRunner().invoke(app, ["tune", *given])

    return run


def test_each_kernel_is_reported_with_its_gain(tuning: Callable[..., Any], tmp_path: Path) -> None:
    script = Script()
    result = tuning(script, "--trials", "7", "--seed", "3")
    assert result.exit_code == 0, result.stderr
    assert len(KernelCache(tmp_path).records()) == len(script.calls)
    line = next(line for line in result.stderr.splitlines() if line.startswith("merge backward"))
    assert "0.5 ms, 2.00x the default, 50% of copy bandwidth, 75% of the limit" in line
    assert "1 failed" in line
    assert "block=1" in result.stdout
    assert "% of limit" in result.stdout
    assert {(options["trials"], options["seed"]) for _, options in script.calls} == {(7, 3)}


def test_json_is_one_object_and_progress_goes_elsewhere(tuning: Callable[..., Any]) -> None:
    result = tuning(Script(), "--json")
    printed = json.loads(result.stdout)
    assert {"device", "threads", "copy_gb_per_s", "results", "interrupted", "failed"} <= set(printed)
    assert (printed["copy_gb_per_s"], printed["gflops_peak"]) == (10.0, 50.0)
    assert printed["results"][0]["record"]["measurement"] == MEASUREMENT
    assert "of copy bandwidth" in result.stderr


def test_an_interrupted_run_keeps_what_is_finished(tuning: Callable[..., Any], tmp_path: Path) -> None:
    script = Script(at=3, raises=KeyboardInterrupt())
    result = tuning(script)
    assert result.exit_code == 130
    assert len(script.calls) == 3
    assert len(KernelCache(tmp_path).records()) == 2
    last = result.stderr.splitlines()[-1]
    assert "interrupted: 2 of" in last
    assert "run the same command to continue" in last


def test_json_of_an_interrupted_run_says_so(tuning: Callable[..., Any]) -> None:
    printed = json.loads(tuning(Script(at=2, raises=KeyboardInterrupt()), "--json").stdout)
    assert printed["interrupted"] is True
    assert [entry["record"] is None for entry in printed["results"]] == [False, True]


def test_a_kernel_that_fails_does_not_stop_the_others(tuning: Callable[..., Any]) -> None:
    script = Script(at=2, raises=TuneFailed("merge: the default schedule fails"))
    result = tuning(script)
    assert result.exit_code == 1
    assert "FAILED: merge: the default schedule fails" in result.stderr
    assert len(script.calls) > 3


def test_seconds_are_shared_by_the_kernels(tuning: Callable[..., Any]) -> None:
    script = Script()
    assert tuning(script, "--seconds", "60").exit_code == 0
    shares = [options["seconds"] for _, options in script.calls]
    assert shares[0] == pytest.approx(60 / len(shares), rel=0.1)
    assert shares[-1] == pytest.approx(60, rel=0.1)


def test_what_a_kernel_takes_beside_its_search_is_left_for_those_after_it(tuning: Callable[..., Any]) -> None:
    script = Script(seconds=5.0, stopped="time")
    assert tuning(script, "--seconds", "60").exit_code == 0
    shares = [options["seconds"] for _, options in script.calls]
    assert shares[1] == pytest.approx(60 / (len(shares) - 1) - (5 - shares[0]), rel=0.1)


def test_without_seconds_only_trials_limit(tuning: Callable[..., Any]) -> None:
    script = Script()
    assert tuning(script).exit_code == 0
    assert all(options.get("seconds") is None for _, options in script.calls)


def test_a_models_kernels_are_tuned_and_the_reasons_told(tuning: Callable[..., Any], tmp_path: Path) -> None:
    script, path = Script(), write_config(tmp_path, hc_sinkhorn_iters=7)
    result = tuning(script, shape=("--model", str(tmp_path)))
    assert result.exit_code == 0, result.stderr
    problems = [problem for problem, _ in script.calls]
    assert {problem.op for problem in problems} == set(MIXING_OPS) - {"sinkhorn", "single_pass"}
    fused = [problem for problem in problems if problem.op in ("pre", "step")]
    assert fused == [Problem(each.op, each.direction, 2, 64, "float32", 32, rounds=7) for each in fused]
    lines = result.stderr.splitlines()
    assert lines[0] == f"{path}: 2 streams of width 64, 7 Sinkhorn rounds (model_type deepseek_v4)"
    assert lines[1] == "float32: its dtype"
    assert lines[2] == "pre, step: a sublayer of it reads the streams through its own pre"
    assert lines[5].startswith(f"tuning {len(problems)} kernels on ")


def test_single_pass_models_have_their_boundary_tuned(tuning: Callable[..., Any]) -> None:
    script = Script()
    assert tuning(script, shape=("--model", "deepseek-v4.1-flash", "--op", "single_pass")).exit_code == 0
    assert [problem for problem, _ in script.calls] == [
        Problem("single_pass", direction, 4, 5120, "bfloat16", 32) for direction in ("forward", "backward")
    ]


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (
            ("--model", "deepseek-v4-pro", "--width", "4096"),
            "--width must be 7168, which deepseek-v4-pro has, got 4096",
        ),
        (("--model", "deepseek-v4-pro", "--op", "single_pass"), "op must be one of "),
        (("--model", "zai-org/GLM-5.3-Flash"), "models are not downloaded"),
    ],
)
def test_a_model_that_cannot_be_tuned_is_one_line(
    tuning: Callable[..., Any], shape: tuple[str, ...], said: str
) -> None:
    script = Script()
    result = tuning(script, shape=shape)
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines()), script.calls) == (2, "", 1, [])
    assert said in result.stderr
