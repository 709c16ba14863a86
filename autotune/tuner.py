"""The search for the fastest correct schedule of one kernel on one device."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from optuna.trial import FrozenTrial, Trial, TrialState

from autotune.decision.conclude import Conclusion
from autotune.decision.significance import is_flat, lower_bound_ms, near_lower_bound
from autotune.events import Event, ProblemFinished, ProblemStarted, TrialDone, TrialFailed
from autotune.measuring.resource_check import why_rejected
from autotune.measuring.timing import Ratio, paired_ratio
from autotune.processes.reasons import by_kind
from autotune.processes.tasks import DEFAULT, TUNED
from autotune.processes.worker import TaskFailed
from autotune.processes.workers import Workers
from autotune.search.pool import enumerate_pool
from autotune.search.sampler import PoolSampler
from autotune.search.transfer import Neighbour, seeds
from autotune.search.trials import REASON, TrialResult
from autotune.search.tuning_case import TuneFailed, TuningCase, is_machine_fault, machine_fault, source_digest
from autotune.study.metadata import CONCLUSION, METADATA, check_same_search, study_metadata
from autotune.study.shared_trials import SearchState, SharedTrials
from autotune.study.storage import open_study
from tiles.cache.cache import KernelCache, Key, Record
from tiles.compiler.compile import Artifact
from tiles.errors import BadInput
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.target import Device

__all__ = ["TuneFailed", "TuneResult", "tune"]

ROOFLINE = "roofline"
"""Why a search stopped: the best trial is within the noise of the roofline."""

FLAT = "no difference"
"""Why a search stopped: no schedule differs from the default by more than the noise."""

NOISE_BOUNDS = (0.01, 0.05)
"""Bounds of the relative noise that is estimated from the default timed against itself."""

POLL_SECONDS = 0.2
"""Between two polls of the trials that other workers run."""


@dataclass(frozen=True)
class TuneResult:
    """The record in the cache, the numbers of evaluated and failed trials of all runs, why the search stopped, and the
    finalists' results (`significance.finalist_results`)."""

    record: Record
    trials: int
    failed: int
    stopped: str
    finalists: tuple[Mapping[str, Any], ...] = ()


def tune(
    problem: Problem,
    device: Device,
    cache: KernelCache,
    *,
    trials: int = 16,
    seconds: float | None = None,
    storage: str | None = None,
    seed: int = 0,
    advice: Iterable[Neighbour] = (),
    on_event: Callable[[Event], None] | None = None,
    workers: Workers | None = None,
) -> TuneResult:
    """Search for at most `trials` schedules, or about `seconds`, and put the winner into `cache`.

    The winner is the default schedule unless another one beats it beyond the noise. Trials are stored (a journal in the
    cache folder, or the database at the URL `storage`): a second call resumes the first, and does nothing where that
    had finished. Concurrent calls, on any number of equal devices, share the trials; each measures on its own device
    and writes a winner into its own cache. `workers`, for the device's kind, may be shared by calls of one process. The
    search is warm-started with the cache's schedules for other problems and with `advice` (`transfer.seeds`). A
    schedule whose compiled code cannot win (`resource_check.why_rejected`) fails without being run, but the default.

    Raises:
        BadInput: trials or tokens below 1, trials or a cache that cannot be written.
        TuneFailed: the default schedule itself does not work here.
        KeyboardInterrupt: Ctrl-C; finished trials are kept, and the best of them is in the cache.
    """
    if trials < 1 or problem.tokens < 1:
        raise BadInput(f"trials and tokens must be at least 1, got {trials} and {problem.tokens}: pass larger ones")
    spec = kernel_spec(problem.op, problem.direction)
    key, pool = Key.of(problem, device), enumerate_pool(spec, problem, device.target)
    with ExitStack() as stack:
        processes = workers or stack.enter_context(Workers(kind=device.kind))
        # Timings of another thread count belong to another study.
        suffix = hashlib.sha256(f"{pool.digest} {processes.threads}".encode()).hexdigest()[:8]
        first = seeds(spec, key, pool, (*cache.records(), *advice), trials=trials)
        sampler = PoolSampler(pool, budget=trials, seed=seed, first=first)
        study = open_study(f"{spec.name}-{key.digest}-{suffix}", cache.folder / "studies", storage, sampler)
        shared = SharedTrials(study, pool, trials)
        stack.callback(shared.close)
        case, report = TuningCase(problem, spec, key, pool, processes, seed), on_event or (lambda event: None)
        return _Search(case, shared, cache, trials, report).run(seconds)


@dataclass
class _Search:
    """One call of `tune`."""

    case: TuningCase
    shared: SharedTrials
    cache: KernelCache
    trials: int
    report: Callable[[Event], None]
    started: float = field(default_factory=time.monotonic)
    best: TrialResult | None = None

    def run(self, seconds: float | None) -> TuneResult:
        record, stopped = self.cache.get(self.case.key), "finished before"
        if record is None or not self._concluded(record):
            conclusion = Conclusion(self.case, self.shared, self.cache, self.report)
            try:
                self._begin()
                stopped = self._search(seconds)
                record = conclusion.conclude()
            except KeyboardInterrupt:
                self._report_finished(conclusion.save_best_of_this_run() or record, "interrupted")
                raise
            winner = {"schedule": record.schedule, "measurement": record.measurement}
            found = {"trials": len(self.shared.evaluated()), "finalists": conclusion.finalist_results}
            self.shared.study.set_user_attr(CONCLUSION, {**found, "stopped": stopped, **winner})
        failed = self._report_finished(record, stopped)
        finalists = self.shared.study.user_attrs[CONCLUSION].get("finalists", ())
        return TuneResult(record, len(self.shared.evaluated()), failed, stopped, tuple(finalists))

    def _concluded(self, record: Record) -> bool:
        """Whether an earlier call has done all that this one would do, and `record` is its result."""
        concluded = self.shared.study.user_attrs.get(CONCLUSION, {"trials": 0, "stopped": ""})
        if record.measurement.get("trials", 0) < concluded["trials"]:
            return False  # another worker has gone on since
        return concluded["trials"] >= self.trials or concluded["stopped"] in ("pool swept", ROOFLINE, FLAT)

    def _begin(self) -> None:
        case, roofline, study = self.case, self.case.workers.roofline(), self.shared.study
        mine = study_metadata(case.problem, case.key.device, case.pool, case.traffic, roofline, case.workers.threads)
        check_same_search(study.study_name, study.user_attrs.get(METADATA), mine)
        done = len(self.shared.evaluated())
        self.report(ProblemStarted(case.problem, len(case.pool), self.trials, done, roofline))
        study.set_user_attr(METADATA, mine)

    def _search(self, seconds: float | None) -> str:
        """Ask, compile, verify, time and tell, until there is a reason to stop; return it."""
        while True:
            state = self.shared.poll()
            self._update(state)
            if state.running_elsewhere == 0 and state.remaining == 0:
                return "pool swept"
            if state.running_elsewhere == 0 and state.budget_left <= 0:
                return "trials"
            if state.measured and seconds is not None and time.monotonic() - self.started > seconds:
                return "time"
            if state.measured and self._at_roofline(state.measured):
                return ROOFLINE
            if is_flat(self._ratios(state.measured)):
                return FLAT
            rest = min(state.remaining, state.budget_left)
            if state.running_elsewhere:
                rest = (rest + 1) // 2  # share the last ones, so that all workers end at about the same time
            if not self._batch(min(self.case.workers.compilers, rest)):
                # Other workers run all that is left: their results count, and what they release is evaluated here.
                time.sleep(POLL_SECONDS)

    def _batch(self, count: int) -> int:
        """Compile `count` schedules side by side, then assess one after the other: nothing is timed meanwhile.

        Returns how many were asked: other workers may have claimed some meanwhile.
        """
        asked = [given for given in (self.shared.ask() for _ in range(count)) if given is not None]
        if asked:
            self.case.compile([self.case.pool.default, *(member for _, member in asked)])
        for trial, member in asked:
            self._assess(trial, member)
        return len(asked)

    def _assess(self, trial: Trial, member: int) -> None:
        default = self.case.default()
        try:
            artifact = self.case.artifact(member)
            found = self._same_code(artifact) or self._timed(artifact, default, trial.number)
        except TaskFailed as failure:
            self._fail(trial, member, failure)
            return
        if self.shared.complete(trial, found):
            self._report_done(trial.number, member, found)

    def _timed(self, artifact: Artifact, default: Artifact, number: int) -> TrialResult:
        """Verify and time a kernel, unless its code shows that it cannot win; raises `TaskFailed`."""
        case = self.case
        if artifact is not default and (why := why_rejected(artifact, case.artifacts())):
            raise TaskFailed(why)
        times = case.workers.assess(case.problem, artifact.binary, default.binary, case.input_seed(number))
        case.verified.add(source_digest(artifact))
        ratio = paired_ratio(times[DEFAULT], times[TUNED])
        return TrialResult(
            ms=statistics.median(times[TUNED]),
            default_ms=statistics.median(times[DEFAULT]),
            # Timed against itself, the default shows the noise in its bounds.
            ratio=1.0 if artifact is default else ratio.median,
            low=ratio.low,
            high=ratio.high,
            source=source_digest(artifact),
        )

    def _same_code(self, artifact: Artifact) -> TrialResult | None:
        """The result of another schedule with the same generated code, which is timed once; None without one."""
        for other in sorted(self.shared.measured(), key=lambda trial: trial.number):
            found = TrialResult.of(other)
            if found.source == source_digest(artifact):
                return replace(found, same_as=other.number)
        return None

    def _fail(self, trial: Trial, member: int, failure: TaskFailed) -> None:
        if is_machine_fault(str(failure)):
            raise machine_fault(str(failure)) from failure
        if member == self.case.pool.default:
            # Not told as failed, so that the next call asks it again: every search needs it.
            raise self.case.default_failure(failure) from failure
        if self.shared.fail(trial, str(failure)):
            self._report_failed(trial.number, member, str(failure))

    def _at_roofline(self, measured: Sequence[FrozenTrial]) -> bool:
        """Whether the best trial is within the noise of the roofline (`significance.near_lower_bound`)."""
        defaults = [trial for trial in measured if self.case.member(trial) == self.case.pool.default]
        if not defaults:
            return False
        itself, (least, most) = TrialResult.of(defaults[0]), NOISE_BOUNDS
        noise = min(most, max(least, (itself.high - itself.low) / 2))
        bound = lower_bound_ms(self.case.traffic, self.case.workers.roofline())
        best = TrialResult.of(measured[0])
        return near_lower_bound(best.default_ms, Ratio(best.ratio, best.low, best.high), bound, noise)

    @staticmethod
    def _ratios(measured: Sequence[FrozenTrial]) -> list[Ratio]:
        """The speed-ups of the measured schedules, once for each code."""
        found = {result.source: result for result in map(TrialResult.of, measured)}
        return [Ratio(result.ratio, result.low, result.high) for result in found.values()]

    def _update(self, state: SearchState) -> None:
        """Update the best trial, and report what other workers have evaluated since the last poll."""
        if state.measured:
            self.best = TrialResult.of(state.measured[0])
        for trial in state.new:
            member = self.case.member(trial)
            if trial.state == TrialState.COMPLETE:
                self._report_done(trial.number, member, TrialResult.of(trial))
            else:
                self._report_failed(trial.number, member, trial.user_attrs[REASON])

    def _report_failed(self, number: int, member: int, reason: str) -> None:
        self.report(TrialFailed(self.case.problem, number, self.case.pool.values(member), reason))

    def _report_done(self, number: int, member: int, found: TrialResult) -> None:
        case = self.case
        if self.best is None or found.ratio > self.best.ratio:
            self.best = found
        best = self.best
        self.report(
            TrialDone(
                problem=case.problem,
                number=number,
                schedule=case.pool.values(member),
                ms=found.ms,
                ratio=found.ratio,
                percent_of_copy=case.percent_of_copy(found.ms),
                percent_of_limit=case.percent_of_limit(found.ms),
                best_ms=best.ms,
                best_ratio=best.ratio,
                best_percent_of_copy=case.percent_of_copy(best.ms),
                best_percent_of_limit=case.percent_of_limit(best.ms),
                same_as=found.same_as,
            )
        )

    def _report_finished(self, record: Record | None, stopped: str) -> int:
        reasons = [trial.user_attrs[REASON] for trial in self.shared.evaluated() if trial.state == TrialState.FAIL]
        seconds = time.monotonic() - self.started
        self.report(ProblemFinished(self.case.problem, record, stopped, len(reasons), seconds, by_kind(reasons)))
        return len(reasons)
