"""Load time of kernels: from `load_kernels` to the end of the first call in a fresh process, and a warm look-up."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tiles.cache.cache import KernelCache
from tiles.kernels.spec import Problem
from tiles.pack.pack import write_pack

OP = "load"
"""Its name for `--op`."""

PROCESSES = 7
"""Fresh processes for the pack, and as many for the folder."""

TIME_LIMIT = 120.0
"""Seconds for one process, with its imports."""

CHILD = """
import json, sys, time
import torch, mhc
from tiles.kernels.spec import Problem
from tiles.kernels.registry import kernel_spec
from tiles.runtime.loaded_kernel import is_given

path, threads, problem = sys.argv[1], int(sys.argv[2]), Problem(**json.loads(sys.argv[3]))
torch.set_num_threads(threads)
spec = kernel_spec(problem.op, problem.direction)
values = spec.inputs(problem, problem.tokens, 0)
inputs = [values[argument.name] for argument in spec.arguments(problem) if is_given(argument)]
shape = problem.op, problem.direction, problem.streams, problem.width, problem.rounds

start = time.perf_counter()
kernels = mhc.load_kernels(path)
loaded = time.perf_counter()
kernels.run(*shape, inputs)
called = time.perf_counter()

repeats = 20_000
started = time.perf_counter()
for _ in range(repeats):
    kernels.look_up(*shape, inputs[0])
looked_up = (time.perf_counter() - started) / repeats

(row,) = kernels.report()
measured = {"load_ms": 1e3 * (loaded - start), "total_ms": 1e3 * (called - start), "look_up_us": 1e6 * looked_up}
print(json.dumps(measured | {"runs": row.runs, "why": row.why}))
"""


def measure(folder: Path, shape: tuple[int, int, int, str], skipped: list[str]) -> list[dict[str, Any]]:
    """One row for the kernels as a pack and one for the folder: median times to load them (ms), to the end of the first
    call (ms), and of a warm look-up (us).

    The first call is merge at `shape` (streams, width, tokens, dtype). Where no tuned kernel would run, which would
    measure something else, `skipped` gets a line instead.
    """
    streams, width, tokens, dtype = shape
    problem = Problem("merge", "forward", streams, width, dtype, tokens)
    cache = KernelCache(folder)
    with _as_pack(cache) as pack:
        paths = {"pack": pack, "folder": folder}
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in paths}
        for _ in range(PROCESSES):
            for name, path in paths.items():
                runs[name].append(_load(path, problem))
    rows = []
    for name, found in runs.items():
        other = next((run for run in found if run["runs"] != "tuned"), None)
        if other:
            skipped.append(f"{OP} {name} {problem.describe()}: would run {other['runs']}: {other['why']}")
        else:
            rows.append(_row(name, found, len(cache.records())) | asdict(problem))
    return rows


def _row(name: str, found: Sequence[dict[str, Any]], kernels: int) -> dict[str, Any]:
    medians = {of: statistics.median(run[of] for run in found) for of in ("load_ms", "total_ms", "look_up_us")}
    return {"from": name, "kernels": kernels, "processes": len(found)} | medians


@contextmanager
def _as_pack(cache: KernelCache) -> Iterator[Path]:
    """The cache's kernels in one pack, signed as by `mhc-tune export`."""
    with tempfile.TemporaryDirectory(prefix="mhc-tune-") as folder:
        pack = Path(folder) / "kernels.mhcpack"
        write_pack(cache, pack)
        yield pack


def _load(path: Path, problem: Problem) -> dict[str, Any]:
    """Measure in a fresh process, after it has imported torch and mhc and made the inputs."""
    command = [
        sys.executable,
        "-c",
        CHILD,
        str(path),
        str(torch.get_num_threads()),
        json.dumps(asdict(problem)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIME_LIMIT)
    if done.returncode != 0:
        raise RuntimeError(f"a process that loads {path.name} failed: {done.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
