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

from tiles.compiler.cuda_launcher import MISALIGNED, Launch, Plan
from tiles.errors import BadInput
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.runtime import cuda_status
from tiles.runtime.loaded_kernel import LoadedKernel, LoadError, is_given

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on PATH: no launcher can be built")

PROBLEM = Problem("pre", "backward", 2, 8, "bfloat16")
TOKENS = 5
ARGUMENTS = kernel_spec(PROBLEM.op, PROBLEM.direction).arguments(PROBLEM)
TENSORS = tuple(argument.name for argument in ARGUMENTS if not argument.is_scalar)
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


@pytest.fixture
def calls(kernel, monkeypatch):
    """The addresses that the launcher gets, by name; like the real one it refuses those that vectors do not fit."""
    seen: list[dict[str, int]] = []

    def launch(pointers: Any, scalars: Any, tokens: int, stream: int, space: int, device: Any) -> int:
        seen.append(dict(zip(TENSORS, pointers, strict=True)))
        return MISALIGNED if any(address % 32 for address in pointers) else 0

    monkeypatch.setattr(kernel, "_launch", launch)
    return seen


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous, from an odd element on."""
    around = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
    around[1:] = tensor.flatten()
    return around[1:].view(tensor.shape)


def test_inputs_that_begin_at_an_odd_offset_are_copied(kernel, calls):
    given = dict(zip(TENSORS, inputs(kernel), strict=False))
    given["x"] = shifted(given["x"])
    kernel.run(tuple(given.values()), TOKENS, 1)
    refused, taken = calls
    assert refused["x"] == given["x"].data_ptr()
    assert {name for name in TENSORS if refused[name] != taken[name]} == {"x"}


def test_a_tensor_that_is_updated_in_place_is_not_copied_but_refused(kernel, calls):
    given = list(inputs(kernel))
    (place,) = (at for at, argument in enumerate(filter(is_given, kernel.arguments)) if argument.role == "updated")
    given[place] = shifted(given[place])
    said = (
        r"^pre\.backward: dx is written in place and must begin at a multiple of 32 bytes, got one that begins \d+ .*$"
    )
    with pytest.raises(BadInput, match=said):
        kernel.run(tuple(given), TOKENS, 1)


@pytest.mark.parametrize("status", [-1, -2, 200, 209, 222])
def test_code_that_never_loads_here_is_a_load_error(kernel, monkeypatch, status):
    library = SimpleNamespace(mhc_load=lambda device: status, mhc_toolkit=lambda: 13000)
    monkeypatch.setattr(kernel, "_library", library)
    monkeypatch.setattr(cuda_status, "driver_version", lambda: 12040)
    with pytest.raises(LoadError, match="driver"):
        kernel.load(torch.device("cuda", 3))


@pytest.mark.parametrize("status", [0, 2, 900], ids=["loaded", "out of memory", "in a capture"])
def test_code_is_loaded_on_the_tensors_device_and_what_may_pass_is_left_to_the_call(kernel, monkeypatch, status):
    devices: list[int] = []
    monkeypatch.setattr(kernel, "_library", SimpleNamespace(mhc_load=lambda device: devices.append(device) or status))
    kernel.load(torch.device("cuda", 3))
    assert devices == [3]


def test_the_toolkit_is_not_known_where_the_compiler_did_not_tell(kernel):
    assert kernel.toolkit == 0
