"""The resource check of compiled CUDA code: alone, in the tuner, and with a real compiler."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace

import pytest
import toy

from autotune import tuner
from autotune.events import ProblemFinished, TrialDone, TrialFailed
from autotune.measuring.resource_check import ResourceUsage, resource_usage, why_rejected
from autotune.processes.worker import TaskFailed
from autotune.processes.workers import Workers
from autotune.tuner import tune
from tiles.cache.cache import KernelCache, Key
from tiles.compiler.compile import Artifact
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.target import Device, Target

HOPPER = Target("cuda", "sm_90a")
GPU = Device("cuda", "toy GPU", "sm_90a", 132, 50 * 2**20)


def compiled(
    text: str = "code", *, registers=64, spilled=0, threads=128, static=0, dynamic=0, target=HOPPER
) -> Artifact:
    details = {"registers": registers, "threads": threads, "stack": spilled}
    details |= {"spill_stores": spilled, "spill_loads": spilled}
    details |= {"static_shared_bytes": static, "dynamic_shared_bytes": dynamic}
    return Artifact(target, text, text.encode(), details)


def test_resource_usage_adds_up_what_the_compiler_reports():
    assert resource_usage(compiled(registers=128, spilled=8, static=1000, dynamic=3000)) == ResourceUsage(
        threads=128,
        registers=128,
        spilled_bytes=16,
        shared_bytes=4000,
        resident_blocks=4,
        occupancy_percent=25.0,
        limited_by="registers",
    )


def test_code_for_a_cpu_has_no_resource_usage():
    cpu = Artifact(Target("cpu", "x86-64-v3"), "", b"")
    assert resource_usage(cpu) is None
    assert why_rejected(cpu, [cpu]) is None


@pytest.mark.parametrize(
    ("given", "limit"),
    [
        (compiled(threads=1024, registers=255), "registers"),
        (compiled(dynamic=227 * 1024 + 128), "shared memory"),
        (compiled(dynamic=164 * 1024, target=Target("cuda", "sm_80")), "shared memory"),
        (compiled(dynamic=100 * 1024, target=Target("cuda", "sm_89")), "shared memory"),
    ],
    ids=["registers", "sm_90a", "sm_80", "sm_89"],
)
def test_what_does_not_fit_a_multiprocessor_cannot_win(given, limit):
    why = why_rejected(given, [])
    assert why is not None
    assert why.startswith("DoesNotFit: ")
    assert why.endswith(f"too much {limit}")
    assert "\n" not in why


@pytest.mark.parametrize("given", [compiled(threads=1024, registers=64), compiled(dynamic=227 * 1024)])
def test_what_just_fits_may_win(given):
    assert why_rejected(given, [given]) is None


def test_spilling_is_held_against_a_schedule_only_where_another_does_without():
    spills, clean, unfit = compiled(spilled=4), compiled(), compiled(dynamic=2**20)
    assert why_rejected(spills, []) is None
    assert why_rejected(spills, [spills, compiled(spilled=400)]) is None
    assert why_rejected(spills, [unfit]) is None
    assert why_rejected(clean, [clean, spills]) is None
    why = why_rejected(spills, [spills, clean])
    assert why is not None
    assert why.startswith("Spills: 8 bytes ")
    assert "64 registers a thread" in why


class CheckedWorkers(toy.ToyWorkers):
    """The toy's kernels as if for a GPU: `details_of` says what the compiler reports of a schedule."""

    def __init__(self, details_of):
        super().__init__()
        self.details_of = details_of

    def compile(self, problem, schedules, target):
        done = super().compile(problem, schedules, target)
        return [
            each if isinstance(each, TaskFailed) else replace(each, details=self.details_of(schedule).details)
            for schedule, each in zip(schedules, done, strict=True)
        ]


@pytest.fixture
def search(monkeypatch, tmp_path):
    monkeypatch.setattr(tuner, "kernel_spec", lambda op, direction: toy.SPEC)
    monkeypatch.setattr(Key, "of", toy.key_of)

    def run(workers, **options):
        events = []
        result = tune(toy.PROBLEM, GPU, KernelCache(tmp_path), workers=workers, on_event=events.append, **options)
        return result, events

    return run


def large_blocks_fail(schedule):
    """Blocks of 16 spill, those of 32 need too much shared memory."""
    spilled = 100 if schedule.block == 16 else 0
    return compiled(spilled=spilled, dynamic=2**18 if schedule.block == 32 else 0)


def of_kind(events, kind):
    return [event for event in events if isinstance(event, kind)]


def test_the_tuner_rejects_what_cannot_win_unmeasured_and_says_why(search):
    workers = CheckedWorkers(large_blocks_fail)
    result, events = search(workers, trials=100)
    failed = {toy.ToySchedule(**event.schedule): event.reason for event in of_kind(events, TrialFailed)}
    assert {schedule for schedule, why in failed.items() if why.startswith("Spills: 200 bytes")} == {
        toy.ToySchedule(16, unroll, packed) for unroll in (1, 2, 4) for packed in (False, True)
    }
    assert {schedule for schedule, why in failed.items() if why.startswith("DoesNotFit: ")} == {
        toy.ToySchedule(32, unroll, packed) for unroll in (1, 2) for packed in (False, True)
    }
    assert result.failed == len(failed) == 10
    assert {eval(code)["block"] for code in workers.assessed} == {1, 2, 4, 8}
    assert result.record.schedule == {"block": 8, "unroll": 2, "packed": True}
    (ended,) = of_kind(events, ProblemFinished)
    assert ended.reasons == {"spills registers": 6, "does not fit": 4}


def test_rejected_schedules_are_not_asked_again_by_the_next_call(search):
    search(CheckedWorkers(large_blocks_fail), trials=20)
    again = CheckedWorkers(large_blocks_fail)
    result, events = search(again, trials=100)
    assert result.failed == 10
    assert len(of_kind(events, TrialFailed) + of_kind(events, TrialDone)) == 34 - 20


def test_the_default_is_never_rejected(search):
    def only_the_default_spills(schedule):
        return compiled(spilled=100 if schedule == toy.DEFAULT_SCHEDULE else 0)

    workers = CheckedWorkers(only_the_default_spills)
    result, events = search(workers, trials=100)
    assert of_kind(events, TrialFailed) == []
    assert toy.code(toy.DEFAULT_SCHEDULE) in workers.assessed
    assert result.record.schedule == asdict(toy.BEST)


def test_where_all_schedules_spill_all_are_measured(search):
    result, events = search(CheckedWorkers(lambda schedule: compiled(spilled=100)), trials=100)
    assert of_kind(events, TrialFailed) == []
    assert result.record.schedule == asdict(toy.BEST)


@pytest.mark.slow  # tests/tiles/compiler/test_cuda.py compiles with workers as well
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_a_compile_worker_reports_the_resources():
    """The code comes from another process than the one that looks; no GPU is there."""
    problem, spec = Problem("merge", "forward", 2, 64, "bfloat16"), kernel_spec("merge", "forward")
    with Workers() as workers:
        (artifact,) = workers.compile(problem, [spec.default(problem, HOPPER)], HOPPER)
    assert isinstance(artifact, Artifact)
    seen = resource_usage(artifact)
    assert seen is not None
    assert (seen.threads, seen.spilled_bytes) == (spec.default(problem, HOPPER).threads, 0)
    assert 16 <= seen.registers <= 255
    assert seen.resident_blocks >= 1
    assert why_rejected(artifact, [artifact]) is None
    spilling = replace(artifact, details=artifact.details | {"spill_stores": 40})
    assert "40 bytes of registers" in str(why_rejected(spilling, [spilling, artifact]))
