"""The command tune with several token counts: the order, what is chosen for them, and what is shown of it."""

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from autotune.events import BucketSchedulesChosen, BucketShootoutStarted, ProblemFinished
from autotune.search.tuning_case import TuneFailed
from autotune.tuner import TuneResult
from cli.commands import tune as command
from cli.main import app
from cli.ui.progress_stats import ProgressStats
from tiles.cache.cache import KernelCache, Key, Record
from tiles.cache.shipped import shipped_records
from tiles.kernels.spec import Problem
from tiles.target import Device

MEASUREMENT = {
    "tuned_ms": 0.5,
    "default_ms": 1.0,
    "ratio": 2.0,
    "percent_of_copy": 50.0,
    "percent_of_limit": 75.0,
    "default_kept": False,
}


class Buckets:
    """Stands in for the tuner and for `choose_schedules`, which finds that block 2 serves every bucket."""

    def __init__(self) -> None:
        self.order: list[Problem] = []
        self.served: list[tuple[Problem, ...]] = []
        self.options: dict[str, Any] = {}
        self.fails = False
        self.worst = 1.0123
        self.batch_invariant = False

    def tune(self, problem: Problem, device: Device, cache: KernelCache, **options: Any) -> TuneResult:
        self.order.append(problem)
        self.options = options
        record = cache.put(Key.of(problem, device), {"block": 1}, b"code", "text", MEASUREMENT, {})
        options["on_event"](ProblemFinished(problem, record, "trials", 0, 0.2))
        return TuneResult(record, 3, 0, "trials")

    def choose_schedules(
        self,
        results: Mapping[Problem, TuneResult],
        device: Device,
        cache: KernelCache,
        workers: Any,
        *,
        seed: int,
        batch_invariant: bool,
        on_event: Callable[[Any], None],
    ) -> tuple[Record, ...]:
        self.batch_invariant = batch_invariant
        if self.fails:
            raise TuneFailed("the schedules cannot be compared: no")
        self.served.append(tuple(results))
        on_event(BucketShootoutStarted(tuple(results), 4))
        records = tuple(
            cache.put(result.record.key, {"block": 2}, b"code 2", "text", MEASUREMENT | {"ratio": 3.0}, {})
            for result in results.values()
        )
        on_event(BucketSchedulesChosen(tuple(results), records, self.worst, 5.0))
        return records


@pytest.fixture
def buckets(monkeypatch: pytest.MonkeyPatch) -> Buckets:
    made = Buckets()
    monkeypatch.setattr(command, "tune_kernel", made.tune)
    monkeypatch.setattr(command, "choose_schedules", made.choose_schedules)
    monkeypatch.setattr(command, "Workers", lambda **_: nullcontext())
    return made


def run(folder: Path, *more: str) -> Any:
    shape = ["--target", "cpu", "--streams", "2", "--width", "64", "--dtype", "float32", "--op", "merge"]
    return CliRunner().invoke(app, ["tune", *shape, "--cache", str(folder), *more])


def test_buckets_are_tuned_from_the_median_and_then_served_together(buckets: Buckets, tmp_path: Path) -> None:
    result = run(tmp_path, "--tokens", "32", "--tokens", "512", "--tokens", "64")
    assert result.exit_code == 0, result.stderr
    assert [(problem.direction, problem.tokens) for problem in buckets.order] == [
        *(("forward", tokens) for tokens in (64, 32, 512)),
        *(("backward", tokens) for tokens in (64, 32, 512)),
    ]
    assert [{replace(problem, tokens=0) for problem in group} for group in buckets.served] == [
        {Problem("merge", direction, 2, 64, tokens=0)} for direction in ("forward", "backward")
    ]
    assert buckets.options["advice"] == shipped_records()
    lines = result.stderr.splitlines()
    assert (
        "merge forward n=2 C=64 float32: 1 schedule for T=64, 32, 512, at most 1.2% slower than the best at each (5 s)"
        in lines
    )
    assert "block=2" in result.stdout
    assert "block=1" not in result.stdout


def test_batch_invariance_is_passed_on_for_one_token_count_too(buckets: Buckets, tmp_path: Path) -> None:
    assert run(tmp_path, "--tokens", "32", "--batch-invariant").exit_code == 0
    assert [len(group) for group in buckets.served] == [1, 1]
    assert buckets.batch_invariant
    assert run(tmp_path, "--tokens", "32", "--tokens", "64").exit_code == 0
    assert not buckets.batch_invariant


def test_a_default_that_nothing_beats_beyond_the_noise_may_be_further_from_the_best(
    buckets: Buckets, tmp_path: Path
) -> None:
    buckets.worst = 1.05
    said = run(tmp_path, "--tokens", "32", "--tokens", "64").stderr
    assert "T=32, 64, at most 5.0% slower than the best at each, which is within the noise (5 s)" in said


def test_json_holds_the_records_that_were_chosen(buckets: Buckets, tmp_path: Path) -> None:
    printed = json.loads(run(tmp_path, "--tokens", "32", "--tokens", "64", "--json").stdout)
    assert [entry["record"]["schedule"] for entry in printed["results"]] == [{"block": 2}] * 4
    assert [
        (entry["direction"], entry["tokens"], entry["schedules"], entry["worst"]) for entry in printed["buckets"]
    ] == [
        ("forward", [32, 64], 1, 1.0123),
        ("backward", [32, 64], 1, 1.0123),
    ]


def test_one_token_count_has_nothing_to_share(buckets: Buckets, tmp_path: Path) -> None:
    printed = json.loads(run(tmp_path, "--tokens", "32", "--json").stdout)
    assert buckets.served == printed["buckets"] == []


def test_buckets_that_cannot_be_compared_fail_the_run_and_keep_their_records(buckets: Buckets, tmp_path: Path) -> None:
    buckets.fails = True
    result = run(tmp_path, "--tokens", "32", "--tokens", "64")
    assert result.exit_code == 1
    assert "FAILED: the schedules cannot be compared: no" in result.stderr
    assert len(buckets.order) == 4
    assert "block=1" in result.stdout


def test_while_schedules_are_compared_the_display_says_so() -> None:
    stats, problems = ProgressStats(2), tuple(Problem("merge", "forward", 2, 64, tokens=tokens) for tokens in (32, 64))
    stats.update(BucketShootoutStarted(problems, 4))
    assert stats.all_line().endswith("; comparing 4 schedules at 2 token counts")
    stats.update(BucketSchedulesChosen(problems, (), 1.0, 5.0))
    assert "comparing" not in stats.all_line()
