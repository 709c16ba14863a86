"""Fused against separate kernels: the code that is timed, and the fields of the record."""

from dataclasses import asdict, replace

import pytest
import torch

import mhc
from autotune.decision import fused_vs_separate as separate
from autotune.processes.tasks import FUSED, SEPARATE
from autotune.processes.worker import TaskFailed
from autotune.processes.workers import Workers
from tiles.cache.cache import KernelCache, Key
from tiles.compiler.compile import compile_kernel
from tiles.kernels.registry import kernel_spec, kernel_specs
from tiles.kernels.spec import Problem
from tiles.runtime.loaded_kernel import is_result
from tiles.target import detect_device

DEVICE = detect_device("cpu")
PROBLEM = Problem("pre", "backward", 2, 16, "float32", tokens=64)
FUSED_SPECS = [spec for spec in kernel_specs().values() if spec.separate]


class Recorded:
    """Workers that compile nothing real and know how long everything takes."""

    threads = 1

    def __init__(self, fused_ms, separate_ms):
        self.times = {FUSED: fused_ms, SEPARATE: separate_ms}
        self.parts = {}

    def compile(self, problem, schedules, target):
        return [
            type("Built", (), {"binary": f"default {problem.op}.{problem.direction}".encode()})() for _ in schedules
        ]

    def compare_separate(self, problem, fused, parts, seed):
        self.parts = parts
        return self.times


@pytest.mark.parametrize(("separate_ms", "wins"), [([1.0] * 12, True), ([1.99] * 12, False), ([3.0] * 12, False)])
def test_separate_kernels_win_beyond_the_noise_only(tmp_path, separate_ms, wins):
    workers = Recorded([2.0] * 12, separate_ms)
    said = separate.compare_with_separate(PROBLEM, b"fused", KernelCache(tmp_path), DEVICE, workers, 0)
    assert said == {
        "separate_ms": separate_ms[0],
        "separate_ratio": pytest.approx(2 / separate_ms[0]),
        "separate_wins": wins,
    }


@pytest.mark.parametrize("at", ["compile", "compare_separate"])
def test_separate_kernels_that_fail_are_not_compared(tmp_path, monkeypatch, at):
    workers, failure = Recorded([2.0] * 12, [1.0] * 12), TaskFailed("CompileError: no")

    def fails(*arguments):
        if at == "compile":
            return [failure]
        raise failure

    monkeypatch.setattr(workers, at, fails)
    assert separate.compare_with_separate(PROBLEM, b"fused", KernelCache(tmp_path), DEVICE, workers, 0) == {}


def test_separate_kernels_are_the_tuned_ones_where_there_are_some(tmp_path):
    cache = KernelCache(tmp_path)
    part = replace(PROBLEM, op="aggregate")
    schedule = asdict(kernel_spec("aggregate", "backward").default(part, DEVICE.target))
    cache.put(Key.of(part, DEVICE), schedule, b"tuned aggregate.backward", "source", {}, {})
    workers = Recorded([1.0] * 12, [1.0] * 12)
    separate.compare_with_separate(PROBLEM, b"fused", cache, DEVICE, workers, 0)
    assert workers.parts == {
        ("coefficients", "forward"): b"default coefficients.forward",
        ("aggregate", "backward"): b"tuned aggregate.backward",
        ("coefficients", "backward"): b"default coefficients.backward",
        ("project", "backward"): b"default project.backward",
    }


@pytest.mark.parametrize("spec", FUSED_SPECS, ids=lambda spec: spec.name)
def test_separate_work_is_the_fused_kernels_work(spec):
    """On the references, in float64: the same results, and the parts that it says it runs."""
    problem = Problem(spec.op, spec.direction, 3, 16)
    values = {
        name: value.double() if isinstance(value, torch.Tensor) else value
        for name, value in spec.inputs(problem, 5, 0).items()
    }
    wanted = spec.reference(problem, values)
    ran = set()

    def run(op, direction, given):
        ran.add((op, direction))
        part = replace(problem, op=op, direction=direction)
        of = kernel_spec(op, direction)
        arguments = of.arguments(part)
        names = [argument.name for argument in arguments if argument.role in ("input", "scalar")]
        results = of.reference(part, dict(zip(names, given, strict=True)))
        return tuple(results[argument.name] for argument in arguments if argument.name in results)

    found = spec.separate.call(run, *values.values())
    names = [argument.name for argument in spec.arguments(problem) if is_result(argument)]
    assert ran == set(spec.separate.parts)
    for name, actual in zip(names, found, strict=True):
        torch.testing.assert_close(actual, wanted[name])


@pytest.mark.slow
def test_a_real_fused_kernel_is_compared(tmp_path):
    problem = replace(PROBLEM, direction="forward")
    schedule = kernel_spec("pre", "forward").default(problem, DEVICE.target)
    with Workers() as workers:
        (built,) = workers.compile(problem, [schedule], DEVICE.target)
        found = separate.compare_with_separate(problem, built.binary, KernelCache(tmp_path), DEVICE, workers, 0)
    assert found["separate_ms"] > 0
    assert found["separate_ratio"] > 0
    assert isinstance(found["separate_wins"], bool)


@pytest.mark.parametrize("wins", [True, False])
def test_the_module_runs_what_the_record_says(tmp_path, wins, monkeypatch):
    monkeypatch.setenv("MHC_TUNE_CACHE", str(tmp_path / "default"))
    cache = KernelCache(tmp_path / "tuned")
    problem = replace(PROBLEM, direction="forward")
    schedule = kernel_spec("pre", "forward").default(problem, DEVICE.target)
    built = compile_kernel(problem, schedule, DEVICE.target)
    cache.put(Key.of(problem, DEVICE), asdict(schedule), built.binary, built.source, {"separate_wins": wins}, {})
    monkeypatch.setenv("CXX", "no-such-compiler")  # what is not in the cache runs on the reference
    x, phi = torch.randn(64, 2, 16), torch.randn(8, 32)
    with mhc.using(mhc.Kernels.from_path(cache.folder)) as kernels, torch.no_grad():
        mhc.functional.pre(x, phi, torch.ones(3), torch.zeros(8))
        ran = {row.op: row.runs for row in kernels.report()}
    assert ran["pre"] == ("separate" if wins else "tuned")
    assert ("project" in ran) == wins
