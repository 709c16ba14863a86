"""Parallel compilation of default schedules before anything is timed; one after another they would take minutes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context

import torch

from cli.gpu.plan import DTYPE
from tiles.cache.compiled_here import compile_and_store, find_compiled
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Direction, Problem
from tiles.target import Device

KERNELS = {"layer": ("pre", "merge"), "stack": ("pre", "step", "merge"), "step": ("step", "pre", "merge")}
"""The kernels that run for ops that have no kernel of their own, or more than one."""

DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


def compile_defaults(device: Device, shape: Sequence[int], ops: Sequence[str]) -> None:
    """Compile and keep the default schedules that these ops run. Failures are ignored: the op itself reports them."""
    streams, width, tokens = shape
    kernels = dict.fromkeys((kernel, way) for op in ops for kernel in KERNELS.get(op, (op,)) for way in DIRECTIONS)
    problems = [Problem(op, direction, streams, width, DTYPE, tokens) for op, direction in kernels]
    missing = [
        problem for problem in problems if find_compiled(problem, _default(problem, device), device, "defaults") is None
    ]
    if len(missing) < 2 or device.kind == "cpu":
        return
    with ProcessPoolExecutor(min(len(missing), os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        for done in [pool.submit(_compile, problem, device) for problem in missing]:
            done.exception()


def _compile(problem: Problem, device: Device) -> None:
    compile_and_store(problem, _default(problem, device), device, "defaults", torch.__version__)


def _default(problem: Problem, device: Device) -> dict[str, object]:
    return asdict(kernel_spec(problem.op, problem.direction).default(problem, device.target))
