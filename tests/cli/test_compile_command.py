"""`mhc-tune compile` as a user types it."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from autotune.worker import TaskFailed
from cli import compile as command
from cli.main import app
from tiles.compile import Artifact
from tiles.family import Problem
from tiles.registry import kernel_specs
from tiles.target import Target

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
SMALL = ["--streams", "2", "--width", "64", "--dtype", "bfloat16"]


def compiled(*arguments: str) -> tuple[int, dict]:
    done = CliRunner().invoke(app, ["compile", *SMALL, *arguments, "--json"])
    return done.exit_code, json.loads(done.stdout)


@needs_nvcc
def test_a_gpu_that_is_not_there_is_compiled_for_and_its_resources_are_told() -> None:
    code, found = compiled("--target", "cuda:sm_90a", "--op", "merge")
    assert code == 0
    assert found["target"] == "cuda:sm_90a"
    assert [row["direction"] for row in found["results"]] == ["forward", "backward"]
    for row in found["results"]:
        assert 16 <= row["registers"] <= 255
        assert row["spilled_bytes"] == 0
        assert 0 < row["occupancy_percent"] <= 100
        assert row["limited_by"] in ("warps", "blocks", "registers", "shared memory")
    forward = found["results"][0]
    assert forward["bytes_per_token"] == 2 * 64 * (2 + 1 + 2) + 4 * (4 + 2)  # x, f, x' in bfloat16; res, post


def test_more_schedules_of_the_pool_come_after_the_default() -> None:
    code, found = compiled("--target", "cpu", "--op", "sinkhorn", "--schedules", "3")
    assert code == 0
    forward = [row["schedule"] for row in found["results"] if row["direction"] == "forward"]
    assert len(forward) == 3
    assert len({schedule["block_tokens"] for schedule in forward}) == 3
    assert all("registers" not in row for row in found["results"])


def test_an_unknown_op_is_refused() -> None:
    done = CliRunner().invoke(app, ["compile", "--target", "cpu", "--op", "nonsense"])
    assert done.exit_code == 2
    assert "op must be one of" in done.stderr


class FakeWorkers:
    """Compiles everything to the same resources, but one kernel."""

    def __enter__(self) -> FakeWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def compile(self, problem: Problem, schedules: list[object], target: Target) -> list[Artifact | TaskFailed]:
        if (problem.op, problem.direction) == ("merge", "backward"):
            return [TaskFailed("CompileError: the compiler's words") for _ in schedules]
        details = {"registers": 77, "spill_stores": 0, "spill_loads": 0, "threads": 128}
        details |= {"static_shared_bytes": 1234, "dynamic_shared_bytes": 0}
        return [Artifact(target, "", b"code", details) for _ in schedules]


def test_one_that_does_not_compile_is_told_and_the_others_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "Workers", FakeWorkers)
    monkeypatch.setattr(command, "why_no_compiler", lambda target: None)
    monkeypatch.setenv("COLUMNS", "200")
    done = CliRunner().invoke(app, ["compile", "--target", "cuda:sm_90a", *SMALL])
    assert done.exit_code == 1
    assert "the compiler's words" in done.stderr
    assert done.stdout.count("1234") == len(kernel_specs()) - 1
