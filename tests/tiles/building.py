"""Kernels of this CPU for the tests of tiles, each compiled when a test first asks for it; the number of a sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiles.compiler.compile import compile_kernel
from tiles.compiler.toolchain import sources_hash
from tiles.kernels.registry import kernel_specs
from tiles.kernels.spec import Problem
from tiles.runtime.loaded_kernel import LoadedKernel
from tiles.target import parse_target


class DefaultKernels(dict[Problem, LoadedKernel]):
    """Kernels with their default schedules."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __missing__(self, problem: Problem) -> LoadedKernel:
        """Problems that are one kernel share it."""
        problem = canonical(problem)
        if problem not in self:
            schedule = kernel_specs()[problem.op, problem.direction].default(problem, parse_target("cpu"))
            self[problem] = build(self._folder / f"{len(self)}.so", problem, schedule)
        return self[problem]


def canonical(problem: Problem) -> Problem:
    return kernel_specs()[problem.op, problem.direction].canonical(problem)


def build(path: Path, problem: Problem, schedule: Any) -> LoadedKernel:
    path.write_bytes(compile_kernel(problem, schedule, parse_target("cpu")).binary)
    return LoadedKernel(path, problem)


def sample_of_sources() -> int:
    """A number that changes when the source of a kernel does, and on no other day."""
    return sum(int(sources_hash(op), 16) for op, _ in kernel_specs()) % 1_000_000
