"""A cache of kernels that are made up, for the tests of packs."""

import random
from dataclasses import asdict, replace

from tiles.cache.cache import KernelCache, Key
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.target import Device

DEVICE = Device("cpu", "A CPU", "x86-64")
PROBLEMS = [Problem("merge", direction, 4, 64, "float32", 128) for direction in ("forward", "backward")]
PROBLEMS.append(Problem("aggregate", "forward", 2, 64, "bfloat16", 32))
MEASURED, FROM = {"tuned_ms": 1.5, "ratio": 1.2}, {"host": "a"}


def fill(cache, problem, binary, **changes):
    """Store a kernel with its default schedule; `changes` are to the key."""
    schedule = asdict(kernel_spec(problem.op, problem.direction).default(problem, DEVICE.target))
    return cache.put(replace(Key.of(problem, DEVICE), **changes), schedule, binary, f"// {binary!r}", MEASURED, FROM)


def filled(folder):
    """A cache with a made-up binary for each of `PROBLEMS`."""
    cache = KernelCache(folder)
    for index, problem in enumerate(PROBLEMS):
        fill(cache, problem, random.Random(index).randbytes(500))
    return cache
