"""The command compile: real compilers, and a stand-in of the workers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from cli_helpers import write_config
from typer.testing import CliRunner

from autotune.processes.worker import TaskFailed
from autotune.processes.workers import Job
from autotune.sass.bytes_in_flight import KernelLook
from autotune.sass.disassembler import find_disassembler
from cli.commands import compile as command
from cli.main import app
from cli.ui.options import MIXING_OPS
from tiles.compiler.compile import Artifact
from tiles.kernels.registry import kernel_specs

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
SMALL = ["--streams", "2", "--width", "64", "--dtype", "bfloat16"]


def compiled(*arguments: str) -> tuple[int, dict]:
    done = CliRunner().invoke(app, ["compile", *SMALL, *arguments, "--json"])
    return done.exit_code, json.loads(done.stdout)


@pytest.mark.slow
@needs_nvcc
def test_a_gpu_that_is_not_there_is_compiled_for_and_its_resources_are_told() -> None:
    code, found = compiled("--target", "cuda:sm_90a", "--op", "merge")
    assert code == 0
    assert found["targets"] == ["cuda:sm_90a"]
    assert [row["direction"] for row in found["results"]] == ["forward", "backward"]
    for row in found["results"]:
        assert 16 <= row["registers"] <= 255
        assert row["spilled_bytes"] == 0
        assert 0 < row["occupancy_percent"] <= 100
        assert row["limited_by"] in ("warps", "blocks", "registers", "shared memory")
        if find_disassembler():
            assert row["in_flight_ratio"] == row["kernels"][0]["ratio"] > 0
            assert row["kernels"][0]["registers"] == row["registers"]
    forward = found["results"][0]
    assert forward["bytes_per_token"] == 2 * 64 * (2 + 1 + 2) + 4 * (4 + 2)  # x, f, x' in bfloat16; res, post


def test_default_schedules_are_compiled_for_this_cpu() -> None:
    code, found = compiled("--target", "cpu", "--op", "sinkhorn")
    assert code == 0
    assert [row["direction"] for row in found["results"]] == ["forward", "backward"]
    assert all(row["code_bytes"] > 0 and "registers" not in row for row in found["results"])


def test_an_unknown_op_is_refused() -> None:
    done = CliRunner().invoke(app, ["compile", "--target", "cpu", "--op", "nonsense"])
    assert done.exit_code == 2
    assert "op must be one of" in done.stderr


class FakeWorkers:
    """Compiles everything to the same resources, but one kernel; sinkhorn's forward spills beside its default."""

    def __enter__(self) -> FakeWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def compile_each(self, jobs: Sequence[Job]) -> Iterator[Artifact | TaskFailed]:
        for problem, schedule, target in jobs:
            kernel = problem.op, problem.direction
            if kernel == ("merge", "backward"):
                yield TaskFailed("CompileError: the compiler's words")
                continue
            usual = kernel_specs()[kernel].default(problem, target)
            spilled = 12 if kernel == ("sinkhorn", "forward") and schedule != usual else 0
            details = {"registers": 77, "spill_stores": spilled, "spill_loads": 0, "threads": 128}
            details |= {"static_shared_bytes": 1234, "dynamic_shared_bytes": 0}
            yield Artifact(target, "", b"code", details)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "Workers", FakeWorkers)
    monkeypatch.setattr(command, "why_no_compiler", lambda target: None)
    monkeypatch.setenv("COLUMNS", "220")


@pytest.mark.usefixtures("fake")
def test_more_schedules_of_the_pool_come_after_the_default() -> None:
    code, found = compiled("--target", "cpu", "--op", "sinkhorn", "--schedules", "3")
    assert code == 0
    forward = [row["schedule"] for row in found["results"] if row["direction"] == "forward"]
    assert len(forward) == len({schedule["block_tokens"] for schedule in forward}) == 3
    assert compiled("--target", "cpu", "--op", "sinkhorn")[1]["results"][0]["schedule"] == forward[0]


@pytest.mark.usefixtures("fake")
def test_one_that_does_not_compile_is_told_and_the_others_are_shown() -> None:
    done = CliRunner().invoke(app, ["compile", "--target", "cuda:sm_90a", *SMALL])
    assert done.exit_code == 1
    assert "the compiler's words" in done.stderr
    assert "merge backward n=2 C=64 bfloat16 for cuda:sm_90a" in done.stderr
    assert done.stdout.count("1234") == 2 * len(MIXING_OPS) - 1


def looked(artifact: Artifact, tokens: int) -> list[KernelLook]:
    """Of a call on `tokens`: a kernel that reads streams, then one that reads coefficients."""
    assert artifact.binary == b"code"
    held = {"threads": 128, "registers": 77, "shared_bytes": 0, "resident_blocks": 4, "resident_warps": 16}
    held |= {"blocks": tokens, "wave_blocks": 528, "waves": tokens / 528, "bulk": 0, "in_loop": True, "barriers": 2}
    held |= {"needed_bytes": 40000, "thread_loads": 4}
    streams = {"load_bytes": {16: 64}, "thread_bytes": 64, "in_flight_bytes": 32768, "ratio": 0.819}
    others = {"load_bytes": {4: 16}, "thread_bytes": 16, "in_flight_bytes": 8192, "ratio": 0.205}
    return [KernelLook("streams", **held, **streams), KernelLook("others", **held, **others)]


@pytest.mark.usefixtures("fake")
def test_bytes_in_flight_are_told_of_every_kernel_and_the_table_shows_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "look", looked)
    given = ["--target", "cuda:sm_90a", "--target", "cpu", "--op", "sinkhorn", "--tokens", "64"]
    code, found = compiled(*given)
    assert code == 0
    assert found["in_flight_assumes"] == {
        "cuda:sm_90a": {"name": "H200", "bandwidth": 4.8e12, "multiprocessors": 132, "latency_seconds": 1.1e-6}
    }
    gpu, cpu = found["results"][:2], found["results"][2:]
    assert all("kernels" not in row and "in_flight_ratio" not in row for row in cpu)
    for row in gpu:
        assert row["in_flight_ratio"] == 0.819
        assert [(each["name"], each["load_bytes"], each["blocks"]) for each in row["kernels"]] == [
            ("streams", {"16": 64}, 64),
            ("others", {"4": 16}, 64),
        ]
    done = CliRunner().invoke(app, ["compile", *SMALL, *given])
    assert done.stdout.count("in flight / need:") == 1
    assert done.stdout.count("0.819") == 2
    assert "bytes in flight" not in done.stderr


@pytest.mark.usefixtures("fake")
def test_without_a_look_the_reason_is_said_once() -> None:
    done = CliRunner().invoke(app, ["compile", *SMALL, "--target", "cuda:sm_90a", "--op", "sinkhorn", "--json"])
    assert done.exit_code == 0
    assert done.stderr.count("no look at bytes in flight: the library carries no CUDA code") == 1
    found = json.loads(done.stdout)
    assert "in_flight_assumes" not in found
    assert not any("kernels" in row or "in_flight_ratio" in row for row in found["results"])


@pytest.mark.usefixtures("fake")
def test_several_targets_and_shapes_are_summed_up_each() -> None:
    many = ["--target", "cuda:sm_80", "--target", "cuda:sm_100a", "--streams", "1", "--op", "sinkhorn"]
    done = CliRunner().invoke(app, ["compile", *SMALL, *many, "--schedules", "3"])
    assert done.exit_code == 0
    for target in ("cuda:sm_80", "cuda:sm_100a"):
        # Two stream counts, two directions, three schedules; the two others of each forward spill.
        said = f"{target}: 12 compiled, 0 failed, 4 spill, 4 would be dropped; at most 77 registers a thread and 1234 "
        assert said in " ".join(done.stderr.split())
        assert f"schedules for {target}" in done.stdout
    code, found = compiled(*many, "--schedules", "3")
    assert code == 0
    assert found["targets"] == ["cuda:sm_80", "cuda:sm_100a"]
    assert [row["target"] for row in found["results"]] == ["cuda:sm_80"] * 12 + ["cuda:sm_100a"] * 12
    dropped = [row for row in found["results"] if "dropped" in row]
    assert len(dropped) == 8
    assert all(row["dropped"].startswith("Spills: 12 bytes") and row["direction"] == "forward" for row in dropped)
    assert {row["bytes_per_token"] for row in found["results"]} == {8.0, 12.0, 32.0, 48.0}


@pytest.mark.usefixtures("fake")
def test_a_models_kernels_are_compiled(tmp_path: Path) -> None:
    write_config(tmp_path, model_type="deepseek_v41", hc_sinkhorn_iters=7)
    given = ["--target", "cuda:sm_90a", "--model", str(tmp_path), "--json"]
    done = CliRunner().invoke(app, ["compile", *given])
    rows = json.loads(done.stdout)["results"]
    assert {row["op"] for row in rows} == set(MIXING_OPS) - {"sinkhorn", "pre", "step"}
    assert {(row["streams"], row["width"], row["dtype"]) for row in rows} == {(2, 64, "float32")}
    assert {row["rounds"] for row in rows if row["op"] in ("single_pass", "coefficients")} == {7}
    assert "single_pass: a sublayer of it reads the streams through the pre of the sublayer before" in done.stderr
