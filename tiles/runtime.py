"""Loads a compiled kernel and calls it on torch tensors: no tilelang, no compiler."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tiles.family import Argument, KernelSpec, Problem
from tiles.launcher import ENTRY
from tiles.memory import POOL
from tiles.reference import DTYPES
from tiles.registry import kernel_spec

Value = torch.Tensor | float

ONE_THREAD_BYTES = 64 * 1024
"""A slice of tokens smaller than this does not pay for waking another thread (about 5 µs at 10 GB/s)."""


class LoadError(RuntimeError):
    """A binary does not load here; the text says why."""


class LoadedKernel:
    """A kernel ready to run on this machine's CPU.

    Calling it takes the inputs and scalars of `spec.arguments(problem)` in that order (contiguous CPU tensors, any
    token count) and returns a tuple of the outputs and partials in that order; partials come summed over slices.
    """

    def __init__(self, path: Path, problem: Problem) -> None:
        self.problem = problem
        self.spec: KernelSpec = kernel_spec(problem.op, problem.direction)
        self.arguments = self.spec.arguments(problem)
        self._launch = _entry(path)
        self._given = [argument for argument in self.arguments if argument.role in ("input", "scalar")]
        self._tensors = [argument for argument in self.arguments if argument.role != "scalar"]
        self._token_bytes = max(1, sum(arg.nbytes(2) - arg.nbytes(1) for arg in self._tensors))

    def __call__(self, *inputs: Value) -> tuple[torch.Tensor, ...]:
        """Run on as many slices of tokens as torch has threads, fewer when there is little to do."""
        tokens = self._tokens(inputs)
        return self.run(inputs, tokens, self.slices(tokens))

    def slices(self, tokens: int) -> int:
        """How many slices a call on `tokens` tokens is split into."""
        worth = tokens * self._token_bytes // ONE_THREAD_BYTES
        return max(1, min(torch.get_num_threads(), tokens, worth))

    def run(self, inputs: Sequence[Value], tokens: int, slices: int) -> tuple[torch.Tensor, ...]:
        """Run on exactly `slices` slices."""
        results = {arg.name: empty_result(arg, tokens, slices) for arg in self.arguments if is_result(arg)}
        self.launch(dict(zip((arg.name for arg in self._given), inputs, strict=True)), results, tokens, slices)
        return tuple(
            summed(results[arg.name]) if arg.role == "partial" else results[arg.name]
            for arg in self.arguments
            if is_result(arg)
        )

    def launch(self, inputs: dict[str, Value], results: dict[str, torch.Tensor], tokens: int, slices: int) -> None:
        """Write `results` (partials shaped [slices, ...]) from `inputs`; the caller owns every tensor."""
        pointers: list[int] = []
        scalars: list[float] = []
        for argument in self.arguments:
            if argument.role == "scalar":
                scalars.append(float(inputs[argument.name]))
                continue
            value = results[argument.name] if is_result(argument) else inputs[argument.name]
            assert isinstance(value, torch.Tensor)
            pointers.append(value.data_ptr())
        status = self._launch(
            (ctypes.c_void_p * len(pointers))(*pointers), (ctypes.c_float * len(scalars))(*scalars), tokens, slices
        )
        if status != 0:
            raise RuntimeError(f"{self.spec.name} returned {status}: rebuild the kernel cache with `mhc-tune tune`")

    def _tokens(self, inputs: Sequence[Value]) -> int:
        """The token count, after checking every input against its argument: a wrong pointer would corrupt memory."""
        tokens: int | None = None
        for argument, value in zip(self._given, inputs, strict=True):
            if argument.role == "scalar":
                continue
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"{self.spec.name}: {argument.name} must be a tensor, got {value!r}")
            if tokens is None:
                tokens = value.shape[0]
            if (
                value.shape != argument.sized(tokens)
                or value.dtype != DTYPES[argument.dtype]
                or value.device.type != "cpu"
                or not value.is_contiguous()
            ):
                raise ValueError(
                    f"{self.spec.name}: {argument.name} must be a contiguous {argument.dtype} CPU tensor of shape "
                    f"{argument.sized(tokens)}, got {value.dtype} {tuple(value.shape)} on {value.device}"
                )
        assert tokens is not None
        return tokens


def is_result(argument: Argument) -> bool:
    """Whether the kernel writes this argument."""
    return argument.role in ("output", "partial")


def empty_result(argument: Argument, tokens: int, slices: int) -> torch.Tensor:
    """Uninitialised memory for a result; a partial gets one row per slice."""
    shape = argument.sized(tokens)
    return POOL.empty((slices, *shape) if argument.role == "partial" else shape, DTYPES[argument.dtype])


def summed(partials: torch.Tensor) -> torch.Tensor:
    """The sum over slices, added in slice order so that it repeats bit for bit."""
    total = partials[0]
    for part in partials[1:]:
        total = total.add_(part)
    return total


def run_reference(problem: Problem, *inputs: Value) -> tuple[torch.Tensor, ...]:
    """The torch reference with a kernel's calling convention; any device."""
    spec = kernel_spec(problem.op, problem.direction)
    arguments = spec.arguments(problem)
    given = [argument.name for argument in arguments if argument.role in ("input", "scalar")]
    results = spec.reference(problem, dict(zip(given, inputs, strict=True)))
    return tuple(results[argument.name] for argument in arguments if is_result(argument))


def _entry(path: Path) -> Any:  # ctypes has no public name for a foreign function's type
    """The launcher of a shared library. It needs OpenMP's symbols, which torch brought into the process."""
    try:
        library = ctypes.CDLL(str(path))
        launch = getattr(library, ENTRY)
    except (OSError, AttributeError) as error:
        raise LoadError(f"{path.name} does not load: {error}") from error
    launch.argtypes = (ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_float), ctypes.c_int64, ctypes.c_int32)
    launch.restype = ctypes.c_int32
    return launch
