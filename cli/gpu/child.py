"""What `mhc-tune gpu` runs in a process of its own: `python -m cli.gpu.child TASK.json`, which writes its results.

A task says what to do (`kind`, see `TASKS`), where (`target`, `shape`), with which `cache`, and where to write (`out`).
Results are on disk after every op, so that a process that dies loses one. Implementations in `without` are left out.
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
from cli.bench import fastest_torch as choice
from cli.bench import our_kernels as ours
from cli.bench.fastest_torch import Choice
from cli.gpu import block, build, numerics
from cli.gpu.plan import DTYPE
from cli.ui.options import measured_device
from tiles.cache.cache import write_atomically
from tiles.errors import first_line
from tiles.target import Device

BROKEN = 3
"""Exit code where the GPU's context broke: what is left needs another process."""

PATIENCE = 90.0
"""Seconds that torch's compiler may take for one form."""


class Progress:
    """The results of a task, written after every change."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.values: dict[str, Any] = {"ops": {}, "doing": None, "without": {}}

    def put(self, **values: Any) -> None:
        """Add to the results, or replace."""
        self.values |= values
        write_atomically(self._path, json.dumps(self.values, allow_nan=False).encode())

    def each(self, op: str, do: Callable[[], dict[str, Any]], *, broken: Callable[[], bool]) -> None:
        """Do one op's part and keep what it gives, or why it failed. Ends the process where the GPU broke."""
        self.put(doing=op)
        try:
            found = do()
        except bench.Poisoned as error:
            self.put(without={error.impl: error.why})
            sys.exit(BROKEN)
        except Exception as error:
            found = {"failed": f"{type(error).__name__}: {first_line(error)}"}
        self.put(ops=self.values["ops"] | {op: found}, doing=None)
        if broken():
            sys.exit(BROKEN)


def run(task: Mapping[str, Any]) -> None:
    """Do a task."""
    device = measured_device(task["target"])
    progress = Progress(Path(task["out"]))
    TASKS[task["kind"]](task, device, progress)


def _bench(task: Mapping[str, Any], device: Device, progress: Progress) -> None:
    """Rows of every op of `timings`, and why there are no others."""
    choice.PATIENCE = PATIENCE
    streams, width, tokens = task["shape"]
    roofline, folder, fastest = Roofline.measure(device.kind), Path(task["cache"]), Choice(streams, width, DTYPE)
    progress.put(roofline={"copy_gb_per_s": roofline.copy_gb_per_s, "gflops_peak": roofline.gflops})
    build.defaults(device, (streams, width, tokens), [timing["op"] for timing in task["timings"]])
    for timing in task["timings"]:
        op, without = timing["op"], task["without"]
        skipped = [f"{impl} {op}: {why}" for impl, why in without.items()]
        impls = [impl for impl in timing["impls"] if impl not in without]
        schedules = [ours.override(text) for text in timing["schedules"]]
        about = (op, timing["directions"], impls, schedules, fastest, roofline, skipped)
        do = partial(_rows, skipped, device, folder, (streams, width, tokens, DTYPE), *about)
        progress.each(op, do, broken=partial(_broken, device))


def _rows(skipped: list[str], *about: Any) -> dict[str, Any]:
    rows = bench.measure_op(*about)
    return {"rows": rows, "skipped": list(dict.fromkeys(skipped))}


def _numerics(task: Mapping[str, Any], device: Device, progress: Progress) -> None:
    """How far every op is from float64, and whether it repeats bit for bit."""
    build.defaults(device, task["shape"], task["ops"])
    streams, width, tokens = task["shape"]
    for op in task["ops"]:
        about = (task["impl"], op, streams, width, tokens, DTYPE, device, Path(task["cache"]))
        progress.each(op, partial(numerics.of_op, *about), broken=partial(_broken, device))


def _block(task: Mapping[str, Any], device: Device, progress: Progress) -> None:
    """A transformer's step with and without mHC."""
    build.defaults(device, task["shape"], ["layer", "step"])
    progress.each("block", partial(block.measure, device, Path(task["cache"])), broken=partial(_broken, device))


TASKS: Mapping[str, Callable[[Mapping[str, Any], Device, Progress], None]] = {
    "bench": _bench,
    "numerics": _numerics,
    "block": _block,
}


def _broken(device: Device) -> bool:
    """Whether the GPU does nothing more for this process."""
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
