"""Compiling kernels for the tests of tiles: in two processes, each kernel once."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from tiles.compiler.compile import compile_kernel
from tiles.kernels.registry import kernel_specs
from tiles.kernels.spec import Problem
from tiles.runtime.loaded_kernel import LoadedKernel
from tiles.target import Target, parse_target

Job = tuple[Problem, Any]


def default_job(problem: Problem) -> Job:
    """A kernel with its default schedule on this CPU."""
    spec = kernel_specs()[problem.op, problem.direction]
    problem = spec.canonical(problem)
    return problem, spec.default(problem, parse_target("cpu"))


def build(folder: Path, jobs: list[Job]) -> dict[Job, LoadedKernel]:
    """Every job's kernel, loaded."""
    distinct = list(dict.fromkeys(jobs))
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        binaries = list(pool.map(partial(_compile, parse_target("cpu")), distinct))
    kernels = {}
    for index, (job, binary) in enumerate(zip(distinct, binaries, strict=True)):
        path = folder / f"{index}.so"
        path.write_bytes(binary)
        kernels[job] = LoadedKernel(path, job[0])
    return kernels


def _compile(target: Target, job: Job) -> bytes:
    return compile_kernel(*job, target).binary
