"""The kernels on a visible NVIDIA GPU: numerics, streams and graphs, the tuner, the functional ops, the benchmark."""

from __future__ import annotations

import os
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

import mhc
from autotune.measuring.roofline import Roofline
from autotune.measuring.verify import inputs_for, verify
from autotune.tuner import tune
from cli.bench import command as bench
from cli.bench import peers
from cli.bench.cases import make_case
from cli.bench.fastest_torch import FastestTorch
from mhc.dispatch.kernels import Kernels, using
from tiles.cache.cache import KernelCache
from tiles.compiler.compile import Artifact, compile_kernel
from tiles.kernels.limits import supports_pdl
from tiles.kernels.registry import kernel_specs
from tiles.kernels.spec import Direction, Problem
from tiles.runtime.loaded_kernel import LoadedKernel
from tiles.target import Target, detect_device

pytestmark = pytest.mark.gpu

SHAPES = ((4, "bfloat16"), (2, "float32"), (1, "float16"), (8, "bfloat16"))
ON_CUDA = [kernel for kernel, spec in kernel_specs().items() if "cuda" in spec.targets]
CASES = [(*kernel, streams, dtype) for streams, dtype in SHAPES for kernel in ON_CUDA]


def to_compile(problem: Problem) -> tuple[Problem, Any, Target]:
    """The default schedule for this machine's GPU."""
    target = detect_device("cuda").target
    spec = kernel_specs()[problem.op, problem.direction]
    problem = spec.canonical(problem)
    return problem, spec.default(problem, target), target


def problem_of(case: tuple[str, str, int, str]) -> Problem:
    op, direction, streams, dtype = case
    return Problem(op, direction, streams, 264, dtype, tokens=300)


@pytest.fixture(scope="session")
def artifacts(request):
    """All cases that run, compiled side by side: one after another they take minutes."""
    selected = (getattr(item, "callspec", None) for item in request.session.items)
    cases = [found.params["case"] for found in selected if found and found.params.get("case") in CASES]
    with ProcessPoolExecutor(min(len(cases) + 1, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        yield {case: pool.submit(compile_kernel, *to_compile(problem_of(case))) for case in cases}


def loaded(artifact: Artifact, problem: Problem, folder: Path) -> LoadedKernel:
    path = folder / "kernel.so"
    path.write_bytes(artifact.binary)
    return LoadedKernel(path, kernel_specs()[problem.op, problem.direction].canonical(problem))


def built(problem: Problem, folder: Path) -> LoadedKernel:
    return loaded(compile_kernel(*to_compile(problem)), problem, folder)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_the_default_schedule_is_right_and_writes_nowhere_else(
    case: tuple[str, str, int, str], artifacts: dict[tuple[str, str, int, str], Future[Artifact]], tmp_path: Path
):
    kernel = loaded(artifacts[case].result(), problem_of(case), tmp_path)
    verify(kernel, inputs_for(kernel, 300, 0), 300, seed=0)


@pytest.mark.parametrize("op", ["pre", "step", "single_pass"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_kernels_that_overlap_in_chunks_are_right(op: str, direction: Direction, tmp_path: Path):
    problem, schedule, target = to_compile(Problem(op, direction, 4, 1280, "bfloat16", tokens=4096))
    if not supports_pdl(target):
        pytest.skip(f"kernels overlap on sm_90 and newer, not on {target}")
    chosen = replace(schedule, use_pdl=1, chunk_tokens=1024)
    kernel = loaded(compile_kernel(problem, chosen, target), problem, tmp_path)
    for seed in range(5):
        verify(kernel, inputs_for(kernel, 3000, seed), 3000, seed=seed)


def test_results_repeat_bit_for_bit(tmp_path):
    kernel = built(Problem("project", "backward", 4, 1280, "bfloat16", tokens=4096), tmp_path)
    inputs = tuple(inputs_for(kernel, 4096, 0).values())
    for first, second in zip(kernel(*inputs), kernel(*inputs), strict=True):
        assert torch.equal(first, second)


def test_a_call_can_be_captured_and_runs_on_the_current_stream(tmp_path):
    kernel = built(Problem("merge", "forward", 4, 1280, "bfloat16", tokens=512), tmp_path)
    inputs = tuple(inputs_for(kernel, 512, 0).values())
    (wanted,) = kernel(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (captured,) = kernel(*inputs)
    captured.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, wanted)


def test_a_capture_may_need_a_kernel_that_no_call_has_launched(tmp_path):
    """A few tokens are one split, whose sums are not added up."""
    kernel = built(Problem("project", "backward", 4, 1280, "bfloat16", tokens=4096), tmp_path)
    kernel(*inputs_for(kernel, 8, 0).values())
    inputs = tuple(inputs_for(kernel, 4096, 0).values())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernel(*inputs)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, kernel(*inputs)))


def test_a_thread_of_its_own_may_be_the_first_to_call(tmp_path):
    """It has no context of its own, as long as torch finds its memory in a cache."""
    kernel = built(Problem("merge", "forward", 4, 1280, "bfloat16", tokens=512), tmp_path)
    inputs = tuple(inputs_for(kernel, 512, 0).values())
    torch.empty_like(inputs[0])
    with ThreadPoolExecutor(1) as pool:
        (found,) = pool.submit(kernel, *inputs).result()
    assert torch.equal(found, kernel(*inputs)[0])


def test_a_view_from_an_odd_element_on_is_right(tmp_path):
    kernel = built(Problem("merge", "forward", 4, 1280, "bfloat16", tokens=512), tmp_path)
    x, *others = inputs_for(kernel, 512, 0).values()
    around = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    around[1:] = x.flatten()
    assert torch.equal(kernel(around[1:].view(x.shape), *others)[0], kernel(x, *others)[0])


def test_a_layer_equals_the_reference_and_the_report_says_what_ran():
    torch.manual_seed(0)
    block = mhc.HyperConnection(256, 4, torch.nn.Linear(256, 256)).cuda()
    x = torch.randn(3, 50, 4, 256, device="cuda", requires_grad=True)
    results = []
    for kernels in (Kernels.defaults(), Kernels.reference()):
        with using(kernels):
            out = block(x)
            (grad,) = torch.autograd.grad(out.square().mean(), x)
            results.append((out, grad))
            if not results[1:]:
                assert {row.runs for row in kernels.report()} == {"default"}
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-5)


def test_the_tuner_measures_on_the_gpu(tmp_path):
    device = detect_device("cuda")
    found = tune(Problem("merge", "forward", 4, 1280, "bfloat16", tokens=4096), device, KernelCache(tmp_path), trials=3)
    assert found.record.key.device == device
    assert found.record.measurement["tuned_ms"] > 0


@pytest.mark.parametrize("impl", ["default", "eager", *peers.NAMES])
@pytest.mark.parametrize("op", ["merge", "layer"])
def test_the_benchmark_measures_what_is_right(op: str, impl: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A peer may be missing: then the reason is there. What runs is checked against float64 before it is timed."""
    monkeypatch.setattr(bench, "ROUNDS", 5)
    skipped: list[str] = []
    device, shape = detect_device("cuda"), (4, 1280, 1000, "bfloat16")
    about = (FastestTorch(4, 1280, "bfloat16"), Roofline.measure("cuda"), skipped)
    rows = bench.measure_op(device, tmp_path, shape, op, ("forward", "both"), (impl,), (), *about)
    if impl in peers.NAMES and skipped:
        assert skipped[0].startswith(f"{impl} {op}")
        return
    assert [(row["impl"], row["direction"]) for row in rows] == [(impl, "forward"), (impl, "both")], skipped
    assert all(0 < row["percent_of_copy"] < 200 for row in rows)
    assert all(row["host_us"] > 0 for row in rows)


def test_a_backward_by_itself_can_be_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Autograd runs on the stream of the forward, which a captured graph would not allow."""
    monkeypatch.setattr(bench, "ROUNDS", 5)
    device, shape = detect_device("cuda"), (4, 1280, 1000, "bfloat16")
    about = (FastestTorch(4, 1280, "bfloat16"), Roofline.measure("cuda"), [])
    (row,) = bench.measure_op(device, tmp_path, shape, "merge", ("backward",), ("default",), (), *about)
    assert row["median_ms"] > 0


def test_a_case_of_many_tokens_repeats_those_of_a_few():
    case = make_case("merge", 4, 256, 600, "bfloat16", 0, torch.device("cuda"))
    assert case.inputs[0].shape == (600, 4, 256)
    assert torch.equal(case.inputs[0][0], case.inputs[0][251])
    assert case.error(lambda x, f, res, post: (mhc.functional.merge(x, f, res, post),)) < 1e-2
