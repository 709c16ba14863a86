"""Compiling forms in plain torch side by side, in processes of their own, before anything is timed.

torch keeps what it compiles in a folder of the user (`TORCHINDUCTOR_CACHE_DIR`), where the process that times finds it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from autotune.processes.resource_limits import MEMORY_SHARE, memory_bytes
from autotune.processes.worker import TaskFailed, Worker
from cli.bench.torch_composites import forms
from cli.bench.torch_ops import OpFunction
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_PROCESSES = 4
"""Each takes a gigabyte, and an op has few forms."""


class Precompilers:
    """Processes that compile forms, one a core. A context manager: leaving it ends them."""

    def __init__(self) -> None:
        count = min(MAX_PROCESSES, len(os.sched_getaffinity(0)))
        self._workers = [Worker(memory=int(MEMORY_SHARE * memory_bytes()) // count) for _ in range(count)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.kill()

    def compile(self, problem: Problem, names: Sequence[str], directions: Sequence[str], seconds: float) -> None:
        """Compile the forms `names` of the problem's op side by side, for at most so many `seconds` each.

        What fails here fails again where it is to run, and is reported there.
        """
        shares = [names[place :: len(self._workers)] for place in range(min(len(names), len(self._workers)))]
        for worker, share in zip(self._workers, shares, strict=False):
            worker.start(compile_forms, problem, share, tuple(directions), torch.get_num_threads())
        for worker, share in zip(self._workers, shares, strict=False):
            with suppress(TaskFailed):
                worker.finish(seconds * len(share))


def compile_forms(problem: Problem, names: Sequence[str], directions: Sequence[str], threads: int) -> None:
    """Compile forms of an op for the calls that will be timed: forward and backward, forward alone, or both."""
    torch.set_num_threads(threads)
    torch._inductor.config.compile_threads = 1  # the other processes have the other cores
    inputs = _inputs(problem)
    known = forms("compile", problem.op, problem.streams, problem.width, problem.dtype)
    for name in names:
        torch.compiler.reset()
        with suppress(Exception):  # a compiler may raise anything
            _compile(known[name], inputs, directions)


def _inputs(problem: Problem) -> list[torch.Tensor]:
    """Inputs of an op, of the shapes and dtypes that a case has; a layer has those of pre."""
    problem = replace(problem, op="pre") if problem.op == "layer" else problem
    spec = kernel_spec(problem.op, "forward")
    values = spec.inputs(problem, problem.tokens, 0)
    return [values[arg.name].requires_grad_() for arg in spec.arguments(problem) if arg.role == "input"]


def _compile(function: OpFunction, inputs: Sequence[torch.Tensor], directions: Sequence[str]) -> None:
    compiled = torch.compile(function, dynamic=False, fullgraph=True)
    if set(directions) != {"forward"}:
        results = compiled(*inputs)
        torch.autograd.grad(results, inputs, tuple(torch.ones_like(result) for result in results))
    if "forward" in directions:
        with torch.no_grad():
            compiled(*inputs)
