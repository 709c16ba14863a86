"""The worker processes of a tuner: several compile in parallel, one measures while they are idle."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from autotune.measuring.roofline import Roofline
from autotune.processes import tasks
from autotune.processes.resource_limits import MEMORY_SHARE, memory_bytes
from autotune.processes.worker import TaskFailed, Worker
from tiles.compiler.compile import Artifact, compile_kernel
from tiles.errors import BadInput
from tiles.kernels.spec import Direction, Problem
from tiles.target import Target

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_COMPILERS = 8
"""Schedules compiled at a time: a search learns nothing from one before all of them are measured."""

MIN_COMPILER_BYTES = 4 << 30
"""Least memory of a compiler where more than two share it."""

Job = tuple[Problem, Any, Target]
"""A compile job: a problem, a schedule of its kernel, and the target."""


class Workers:
    """Compile and measure kernels in processes that stay alive from one problem to the next.

    A kernel fails that takes longer than `compile_seconds` or `measure_seconds`, or needs more than `memory` bytes, by
    default `MEMORY_SHARE` of the machine's, which parallel compilers divide. There is a compiler for every two cores,
    at least two. Kernels run on this machine's CPU or, for the `kind` cuda, on its current GPU, with `threads` host
    threads, by default those of torch in this process. A context manager: leaving it ends the processes.
    """

    compiler: Callable[[Problem, Any, Target], Artifact] = staticmethod(compile_kernel)

    def __init__(
        self,
        *,
        kind: Literal["cpu", "cuda"] = "cpu",
        threads: int | None = None,
        compile_seconds: float = 120,
        measure_seconds: float = 60,
        memory: int | None = None,
    ) -> None:
        import torch

        self._kind = kind
        self.threads = threads or torch.get_num_threads()
        self._compile_seconds = compile_seconds
        self._measure_seconds = measure_seconds
        memory = memory or int(MEMORY_SHARE * memory_bytes())
        # Holds all temporary files, also those of compilers that were killed.
        self._scratch = tempfile.TemporaryDirectory(prefix="mhc-tune-", ignore_cleanup_errors=True)
        folder = Path(self._scratch.name)
        self.compilers = max(2, min(MAX_COMPILERS, len(os.sched_getaffinity(0)) // 2, memory // MIN_COMPILER_BYTES))
        """Number of schedules compiled at a time."""
        self._compilers = [Worker(memory=memory // self.compilers, folder=folder) for _ in range(self.compilers)]
        self._measurer = Worker(memory=memory, folder=folder)
        self._roofline: Roofline | None = None
        self.conditions: Mapping[str, float] = {}
        """The device's state during the last measurement (`Stopwatch.conditions`)."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all processes and remove their files."""
        for worker in (*self._compilers, self._measurer):
            worker.kill()
        self._scratch.cleanup()

    def compile(self, problem: Problem, schedules: Sequence[Any], target: Target) -> list[Artifact | TaskFailed]:
        """Compile every schedule: an artifact or a failure for each."""
        return list(self.compile_each([(problem, schedule, target) for schedule in schedules]))

    def compile_each(self, jobs: Sequence[Job]) -> Iterator[Artifact | TaskFailed]:
        """The artifact or failure of every job, in order."""
        for first in range(0, len(jobs), self.compilers):
            yield from self._compile_some(jobs[first : first + self.compilers])

    def _compile_some(self, jobs: Sequence[Job]) -> list[Artifact | TaskFailed]:
        busy = self._compilers[: len(jobs)]
        done: list[Artifact | TaskFailed] = []
        try:
            for worker, job in zip(busy, jobs, strict=True):
                worker.start(self.compiler, *job)
            for worker in busy:
                try:
                    done.append(worker.finish(self._compile_seconds))
                except TaskFailed as failure:
                    done.append(failure)
        except BaseException:
            for worker in busy:
                worker.kill()
            raise
        return done

    def roofline(self) -> Roofline:
        """The roofline of this machine, measured once."""
        if self._roofline is None:
            self._roofline = self._measure(1, tasks.roofline, self._kind)
        assert self._roofline
        return self._roofline

    def assess(self, problem: Problem, tuned: bytes, default: bytes, seed: int) -> dict[str, list[float]]:
        """Verify a kernel and time it against the default; see `tasks.assess`. Raises `TaskFailed`."""
        paths = self._file(tuned), self._file(default)
        return self._timed(1, tasks.assess, problem, *paths, seed)

    def compare(
        self, problem: Problem, binaries: Mapping[str, bytes], unverified: Sequence[str], seed: int
    ) -> dict[str, list[float]]:
        """Time kernels against each other; see `tasks.compare`. Raises `TaskFailed`."""
        paths = {name: self._file(binary) for name, binary in binaries.items()}
        return self._timed(len(paths), tasks.compare, problem, paths, unverified, seed)

    def compare_separate(
        self, problem: Problem, fused: bytes, parts: Mapping[tuple[str, Direction], bytes], seed: int
    ) -> dict[str, list[float]]:
        """Time a fused kernel against separate ones; see `tasks.compare_separate`. Raises `TaskFailed`."""
        paths = {part: self._file(binary) for part, binary in parts.items()}
        return self._timed(2, tasks.compare_separate, problem, self._file(fused), paths, seed)

    def _timed(self, kernels: int, function: Callable[..., Any], *arguments: Any) -> dict[str, list[float]]:
        timed: tasks.Timings = self._measure(kernels, function, *arguments)
        self.conditions = timed.conditions
        return timed.times

    def _measure(self, kernels: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a task that measures so many `kernels`, each with its own time limit."""
        return self._measurer.call(kernels * self._measure_seconds, function, *arguments, self.threads)

    def _file(self, binary: bytes) -> Path:
        path = Path(self._scratch.name) / f"{hashlib.sha256(binary).hexdigest()}.so"
        if not path.exists():
            begun = path.with_suffix(".part")
            try:
                begun.write_bytes(binary)
                begun.rename(path)
            except OSError as error:
                raise BadInput(
                    f"compiled kernels must fit in the folder of temporary files, got {path.parent.parent} "
                    f"({error.strerror}): make room there or set TMPDIR to another folder"
                ) from error
        return path
