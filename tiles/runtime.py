"""Loads a compiled kernel and calls it on torch tensors: no tilelang, no compiler."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
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

    Calling it takes the inputs, scalars and updated tensors of `spec.arguments(problem)` in that order (contiguous CPU
    tensors, any token count) and returns a tuple of all results in that order; partials come summed over slices.
    """

    def __init__(self, path: Path, problem: Problem) -> None:
        self.problem = problem
        self.spec: KernelSpec = kernel_spec(problem.op, problem.direction)
        self.arguments = self.spec.arguments(problem)
        self._launch = _entry(path)
        self._given = [argument for argument in self.arguments if is_given(argument)]
        self._tensors = [argument for argument in self.arguments if argument.role != "scalar"]
        self._scalars = [argument for argument in self.arguments if argument.role == "scalar"]
        self._pointers: Any = ctypes.c_void_p * len(self._tensors)
        self._floats: Any = ctypes.c_float * len(self._scalars)
        self._token_bytes = max(1, sum(arg.nbytes(2) - arg.nbytes(1) for arg in self._tensors))
        self._expected = lru_cache(maxsize=64)(self._shapes)

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
        values = {argument.name: value for argument, value in zip(self._given, inputs, strict=True)}
        results: dict[str, torch.Tensor] = {}
        for argument in self._tensors:
            if argument.role == "updated":
                results[argument.name] = values[argument.name]  # type: ignore[assignment]
            elif argument.role != "input":
                results[argument.name] = empty_result(argument, tokens, slices)
        self.launch(values, results, tokens, slices)
        return tuple(
            summed(results[argument.name]) if argument.role == "partial" else results[argument.name]
            for argument in self._tensors
            if argument.role != "input"
        )

    def launch(self, inputs: dict[str, Value], results: dict[str, torch.Tensor], tokens: int, slices: int) -> None:
        """Write `results` (partials shaped [slices, ...]) from `inputs`; the caller owns every tensor."""
        tensors: dict[str, Any] = inputs | results
        pointers = self._pointers(*[tensors[argument.name].data_ptr() for argument in self._tensors])
        scalars = self._floats(*[tensors[argument.name] for argument in self._scalars])
        status = self._launch(pointers, scalars, tokens, slices)
        if status != 0:
            raise RuntimeError(f"{self.spec.name} returned {status}: rebuild the kernel cache with `mhc-tune tune`")

    def _tokens(self, inputs: Sequence[Value]) -> int:
        """The token count, after checking every input against its argument: a wrong pointer would corrupt memory."""
        first = inputs[0]
        tokens: int = first.shape[0] if isinstance(first, torch.Tensor) and first.dim() else 0
        for argument, (shape, dtype), value in zip(self._given, self._expected(tokens), inputs, strict=True):
            if argument.role == "scalar":
                continue
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"{self.spec.name}: {argument.name} must be a tensor, got {value!r}")
            if value.shape != shape or value.dtype != dtype or not value.is_cpu or not value.is_contiguous():
                raise ValueError(
                    f"{self.spec.name}: {argument.name} must be a contiguous {argument.dtype} CPU tensor of shape "
                    f"{shape}, got {value.dtype} {tuple(value.shape)} on {value.device}"
                )
        return tokens

    def _shapes(self, tokens: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """What every given argument must look like."""
        return [(argument.sized(tokens), DTYPES[argument.dtype]) for argument in self._given]


def is_given(argument: Argument) -> bool:
    """Whether the caller passes this argument."""
    return argument.role in ("input", "scalar", "updated")


def is_result(argument: Argument) -> bool:
    """Whether the kernel writes this argument."""
    return argument.role in ("updated", "output", "partial")


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
    given = [argument.name for argument in arguments if is_given(argument)]
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
