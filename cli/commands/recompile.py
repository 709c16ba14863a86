"""Compilation of records' schedules in separate processes with limited memory, as schedules may come from anywhere."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from autotune.processes.resource_limits import MEMORY_SHARE, memory_bytes
from autotune.processes.worker import TaskFailed, Worker
from cli.ui.output import say
from tiles.cache.record import Record
from tiles.compiler.compile import Artifact, CompileError, compile_kernel
from tiles.kernels.registry import kernel_spec

SECONDS = 120.0
"""Time limit for one kernel; a typical one takes two."""


def recompile(records: Sequence[Record]) -> Iterator[Artifact | Exception]:
    """Compile each record's schedule for its device; yields in order the artifact or a `CompileError`."""
    if not records:
        return
    say(f"compiling {len(records)} kernels, some seconds each")
    count = min(len(records), os.cpu_count() or 1)
    workers = [Worker(memory=int(MEMORY_SHARE * memory_bytes()) // count) for _ in range(count)]
    try:
        for first in range(0, len(records), count):
            some = records[first : first + count]
            for worker, record in zip(workers, some, strict=False):
                problem = record.key.problem
                schedule = kernel_spec(problem.op, problem.direction).schedule_from(record.schedule)
                worker.start(compile_kernel, problem, schedule, record.key.device.target)
            for worker, record in zip(workers, some, strict=False):
                try:
                    yield worker.finish(SECONDS)
                except TaskFailed as failure:
                    yield CompileError(f"{record.key.problem.describe()}: {failure}")
    finally:
        for worker in workers:
            worker.kill()
