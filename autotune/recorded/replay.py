"""Replay of searches on recorded spaces, over several seeds in parallel, with summaries."""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from autotune.recorded.foreign import read_space
from autotune.recorded.samplers import SAMPLERS
from autotune.recorded.score import best_so_far, calculated_random_search, score, trials_to
from autotune.recorded.spaces import RecordedSpace


@dataclass(frozen=True)
class Run:
    """One search with one seed: the member of each trial (None outside of the pool), and the sampler's seconds."""

    members: tuple[int | None, ...]
    seconds: float

    @property
    def duplicates(self) -> int:
        """Trials whose member an earlier one had tried."""
        tried = [member for member in self.members if member is not None]
        return len(tried) - len(set(tried))


def replay(space: RecordedSpace, sampler: str, trials: int, seed: int) -> Run:
    """Run one of `SAMPLERS` for `trials` trials."""
    began = time.perf_counter()
    members = SAMPLERS[sampler](space, trials, seed)
    return Run(tuple(members), time.perf_counter() - began)


def replay_all(
    files: Sequence[Path], samplers: Sequence[str], trials: int, seeds: int, on_run: Callable[[], None] | None = None
) -> list[dict[str, Any]]:
    """Replay every sampler on every file with the seeds 0, 1, ... in a process per core; summaries, plain data.

    `on_run` is called after each run. Raises `BadInput` for a file that holds no space.
    """
    spaces = [read_space(path) for path in files]
    jobs = [(file, sampler, seed) for seed in range(seeds) for file in range(len(files)) for sampler in samplers]
    runs: dict[tuple[int, str, int], Run] = {}
    context = get_context("spawn")  # torch does not survive a fork
    with (
        _one_thread_each(),
        ProcessPoolExecutor(min(os.cpu_count() or 1, len(jobs)), context, _ignore_interrupts) as processes,
    ):
        waiting = {processes.submit(_replay_file, files[job[0]].resolve(), job[1], trials, job[2]): job for job in jobs}
        try:
            for done in as_completed(waiting):
                runs[waiting[done]] = done.result()
                if on_run:
                    on_run()
        except BaseException:
            processes.shutdown(wait=False, cancel_futures=True)
            raise
    return [
        summary(space, sampler, [runs[file, sampler, seed] for seed in range(seeds)], trials)
        for file, space in enumerate(spaces)
        for sampler in samplers
    ]


def summary(space: RecordedSpace, sampler: str, runs: Sequence[Run], trials: int) -> dict[str, Any]:
    """Summary over several seeds. Times are multiples of the optimum's.

    `found` are the quartiles after all trials; `to_95` and `to_99` the median trial that reached that percentage of the
    optimum's speed, None where half of the seeds did not. `curve` is the median after each trial, `random_curve` the
    expectation of random search; `score` is `score.score`. `outside` counts trials outside of the pool.
    """
    trials = min(trials, len(space.pool))
    found = [best_so_far(space, run.members[:trials]) for run in runs]
    shares = [[ms / space.optimum for ms in one] for one in found]
    low, middle, high = _quartiles([one[-1] for one in shares])
    return {
        "space": space.name,
        "members": len(space.pool),
        "failing": len(space.reasons),
        "sampler": sampler,
        "trials": trials,
        "seeds": len(runs),
        "found": {"low": low, "median": middle, "high": high},
        "to_95": _median_reached([trials_to(space, one, 0.95) for one in found]),
        "to_99": _median_reached([trials_to(space, one, 0.99) for one in found]),
        "score": score(space, found),
        "duplicates": sum(run.duplicates for run in runs),
        "outside": sum(member is None for run in runs for member in run.members),
        "ms_per_trial": 1e3 * statistics.fmean(run.seconds / max(1, len(run.members)) for run in runs),
        "curve": [statistics.median(at) for at in zip(*shares, strict=True)],
        "random_curve": [ms / space.optimum for ms in calculated_random_search(space, trials)],
    }


def _quartiles(values: Sequence[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3


def _median_reached(trials: Sequence[int | None]) -> int | None:
    reached = sorted(trial for trial in trials if trial is not None)
    middle = (len(trials) - 1) // 2
    return reached[middle] if middle < len(reached) else None


@cache
def _space(path: Path) -> RecordedSpace:
    return read_space(path)


def _replay_file(path: Path, sampler: str, trials: int, seed: int) -> Run:
    return replay(_space(path), sampler, trials, seed)


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Start processes with one compute thread each, as there is one process per core."""
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
