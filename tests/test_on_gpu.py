"""The kernels on a visible NVIDIA GPU: numerics, streams and graphs, the tuner, the functional ops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mhc
from autotune.tuner import tune
from autotune.verify import inputs_for, verify
from mhc.kernels import Kernels, using
from tiles.cache import KernelCache
from tiles.compile import compile_kernel
from tiles.family import Problem
from tiles.registry import kernel_specs
from tiles.runtime import LoadedKernel
from tiles.target import detect_device

pytestmark = pytest.mark.gpu

CASES = [
    (*kernel, streams, dtype)
    for kernel in kernel_specs()
    for streams, dtype in ((4, "bfloat16"), (2, "float32"), (1, "float16"), (8, "bfloat16"))
]


def built(problem: Problem, folder: Path) -> LoadedKernel:
    target = detect_device("cuda").target
    spec = kernel_specs()[problem.op, problem.direction]
    problem = spec.canonical(problem)
    path = folder / "kernel.so"
    path.write_bytes(compile_kernel(problem, spec.default(problem, target), target).binary)
    return LoadedKernel(path, problem)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_the_default_schedule_is_right_and_writes_nowhere_else(case, tmp_path):
    op, direction, streams, dtype = case
    kernel = built(Problem(op, direction, streams, 264, dtype, tokens=300), tmp_path)
    verify(kernel, inputs_for(kernel, 300, 0), 300, seed=0)


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
