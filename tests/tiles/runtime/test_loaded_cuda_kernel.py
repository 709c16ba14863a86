"""How a CUDA kernel is called: torch's side of it, on CPU tensors, with a launcher that no driver is behind."""

from __future__ import annotations

import shutil
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launching import build_launcher

from tiles.compiler.cuda_launcher import Launch, Plan
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.runtime.loaded_kernel import LoadedKernel

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on PATH: no launcher can be built")

PROBLEM = Problem("pre", "backward", 2, 8, "bfloat16")
TOKENS = 5
ARGUMENTS = kernel_spec(PROBLEM.op, PROBLEM.direction).arguments(PROBLEM)
TENSORS = tuple(argument.name for argument in ARGUMENTS if argument.role != "scalar")
LAUNCH = Launch("toy", (*TENSORS, "between"), ("tokens", "1", "1"), (32, 1, 1), 0)


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """A kernel that needs workspace."""
    path = build_launcher(tmp_path, Plan((LAUNCH,), (("between", "4 * tokens"),)), ARGUMENTS)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    made = LoadedKernel(path, PROBLEM)
    assert made.kind == "cuda"
    return made


def inputs(kernel: LoadedKernel) -> tuple[Any, ...]:
    return tuple(kernel.spec.inputs(PROBLEM, TOKENS, 0).values())


def test_the_workspace_lives_until_the_launch_returns(kernel, monkeypatch):
    """A launch releases the GIL: another thread's call on the same stream must not get this memory."""
    made: list[weakref.ref[torch.Tensor]] = []
    empty = torch.empty

    def watched(*size: Any, **more: Any) -> torch.Tensor:
        tensor = empty(*size, **more)
        if more["dtype"] == torch.uint8:
            made.append(weakref.ref(tensor))
        return tensor

    def launch(pointers: Any, scalars: Any, tokens: int, stream: int, space: int, device: Any) -> int:
        (held,) = made
        assert held() is not None, "the workspace is dropped before the launch"
        assert space == held().data_ptr()
        return 0

    monkeypatch.setattr(torch, "empty", watched)
    monkeypatch.setattr(kernel, "_launch", launch)
    kernel.run(inputs(kernel), TOKENS, 1)
    assert made
    assert made[0]() is None
