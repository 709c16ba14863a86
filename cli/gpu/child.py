"""A child process of `mhc-tune gpu`: `python -m cli.gpu.child TASK.json` does a task and writes its results.

A task has a `kind` (see `TASKS`), `target`, `shape`, `cache` folder and result file (`out`). Results are on disk after
every op, so that a process that dies loses one op. Implementations in `without` are left out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from autotune.measuring.roofline import Roofline
from cli.bench import command as bench
from cli.bench import fastest_torch, our_kernels
from cli.bench.fastest_torch import FastestTorch
from cli.gpu import block, build, numerics
from cli.gpu.plan import DTYPE
from cli.ui.options import measured_device
from tiles.cache.cache import write_atomically
from tiles.errors import first_line
from tiles.target import Device

CONTEXT_BROKEN = 3
"""Exit code after the GPU's context broke: the remaining ops need another process."""

TIME_LIMIT = 90.0
"""Seconds for torch.compile on one variant."""


class TaskResults:
    """The results of a task, written to a file after every change."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.values: dict[str, Any] = {"ops": {}, "doing": None, "without": {}}

    def update(self, **values: Any) -> None:
        """Set values of the results."""
        self.values |= values
        write_atomically(self._path, json.dumps(self.values, allow_nan=False).encode())

    def run_op(self, op: str, do: Callable[[], dict[str, Any]], *, context_broken: Callable[[], bool]) -> None:
        """Measure one op and keep its result, or why it failed. Ends the process if the GPU's context broke."""
        self.update(doing=op)
        try:
            found = do()
        except bench.ContextBroken as error:
            self.update(without={error.impl: error.why})
            sys.exit(CONTEXT_BROKEN)
        except Exception as error:
            found = {"failed": f"{type(error).__name__}: {first_line(error)}"}
        self.update(ops=self.values["ops"] | {op: found}, doing=None)
        if context_broken():
            sys.exit(CONTEXT_BROKEN)


def run(task: Mapping[str, Any]) -> None:
    """Do a task and write its results."""
    device = measured_device(task["target"])
    results = TaskResults(Path(task["out"]))
    TASKS[task["kind"]](task, device, results)


def _bench(task: Mapping[str, Any], device: Device, results: TaskResults) -> None:
    """Rows of every op of `timings`, and the reasons for missing ones."""
    fastest_torch.TIME_LIMIT = TIME_LIMIT
    streams, width, tokens = task["shape"]
    roofline, folder, fastest = Roofline.measure(device.kind), Path(task["cache"]), FastestTorch(streams, width, DTYPE)
    results.update(roofline={"copy_gb_per_s": roofline.copy_gb_per_s, "gflops_peak": roofline.gflops})
    build.compile_defaults(device, (streams, width, tokens), [timing["op"] for timing in task["timings"]])
    for timing in task["timings"]:
        op, without = timing["op"], task["without"]
        skipped = [f"{impl} {op}: {why}" for impl, why in without.items()]
        impls = [impl for impl in timing["impls"] if impl not in without]
        schedules = [our_kernels.parse_override(text) for text in timing["schedules"]]
        about = (op, timing["directions"], impls, schedules, fastest, roofline, skipped)
        do = partial(_rows, skipped, device, folder, (streams, width, tokens, DTYPE), *about)
        results.run_op(op, do, context_broken=partial(_context_broken, device))


def _rows(skipped: list[str], *about: Any) -> dict[str, Any]:
    rows = bench.measure_op(*about)
    return {"rows": rows, "skipped": list(dict.fromkeys(skipped))}


def _numerics(task: Mapping[str, Any], device: Device, results: TaskResults) -> None:
    """Errors of every op against float64, and whether its results repeat bit for bit."""
    build.compile_defaults(device, task["shape"], task["ops"])
    streams, width, tokens = task["shape"]
    for op in task["ops"]:
        about = (task["impl"], op, streams, width, tokens, DTYPE, device, Path(task["cache"]))
        results.run_op(op, partial(numerics.check_op, *about), context_broken=partial(_context_broken, device))


def _block(task: Mapping[str, Any], device: Device, results: TaskResults) -> None:
    """A transformer's training step with and without mHC."""
    build.compile_defaults(device, task["shape"], ["layer", "step"])
    results.run_op(
        "block", partial(block.measure, device, Path(task["cache"])), context_broken=partial(_context_broken, device)
    )


TASKS: Mapping[str, Callable[[Mapping[str, Any], Device, TaskResults], None]] = {
    "bench": _bench,
    "numerics": _numerics,
    "block": _block,
}


def _context_broken(device: Device) -> bool:
    """Whether the GPU's context is unusable for this process."""
    if device.kind == "cpu":
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:
        return True
    return False


if __name__ == "__main__":
    run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
