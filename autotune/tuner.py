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
from autotune.decision.significance import at_floor, floor_ms
from autotune.events import Event, ProblemFinished, ProblemStarted, TrialDone, TrialFailed
from autotune.measuring.resource_check import why_cannot_win
from autotune.measuring.timing import Ratio, paired_ratio
from autotune.processes.reasons import by_kind
from autotune.processes.tasks import DEFAULT, TUNED
from autotune.processes.worker import TaskFailed
from autotune.processes.workers import Workers
from autotune.search.case import Case, TuneFailed, digest, is_environment, mend
from autotune.search.pool import enumerate_pool
from autotune.search.sampler import PoolSampler
from autotune.search.transfer import Neighbour, seeds
from autotune.search.trials import REASON, Found
from autotune.study.metadata import ABOUT, CONCLUDED, about, check_same_search
from autotune.study.shared_trials import Ledger, Standing
from autotune.study.storage import open_study
from tiles.cache.cache import KernelCache, Key, Record
from tiles.compiler.compile import Artifact
from tiles.errors import BadInput
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.target import Device

__all__ = ["TuneFailed", "TuneResult", "tune"]

ROOFLINE = "roofline"
"""Why a search stopped that the roofline left nothing to find."""

NOISE_BOUNDS = (0.01, 0.05)
"""What is believed of the noise that the default's measurement against itself shows."""

WAIT_SECONDS = 0.2
"""Between two looks at trials that other workers have not finished."""


@dataclass(frozen=True)
class TuneResult:
    """What a search came to: the record in the cache, settled and failed trials of all runs, why it stopped, and how
    the finalists did (`final.standings`)."""

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

    The winner is the default schedule unless another one beats it beyond the noise. Trials are kept (a journal in the
    cache folder, or the database at the URL `storage`): a second call goes on where the first one ended, and does
    nothing where that had finished. Calls that run at the same time, on any number of equal devices, share the trials;
    each measures on its own device only, and puts a winner into its own cache. `workers` may be shared by several calls
    of one process; they are for the device's kind. What the cache holds for other problems, and `advice`, say what to
    try first (`transfer.seeds`). A schedule whose compiled code shows that it cannot win (`look.why_cannot_win`) fails
    without being run; the default schedule is always run.

    Raises:
        BadInput: trials or tokens below 1, trials or a cache that cannot be written.
        TuneFailed: the default schedule itself does not work here.
        KeyboardInterrupt: Ctrl-C; what was finished is kept, and the best of it is in the cache.
    """
    if trials < 1 or problem.tokens < 1:
        raise BadInput(f"trials and tokens must be at least 1, got {trials} and {problem.tokens}: pass larger ones")
    spec = kernel_spec(problem.op, problem.direction)
    key, pool = Key.of(problem, device), enumerate_pool(spec, problem, device.target)
    with ExitStack() as stack:
        shared = workers or stack.enter_context(Workers(kind=device.kind))
        # Numbers taken with another thread count belong to another study.
        suffix = hashlib.sha256(f"{pool.digest} {shared.threads}".encode()).hexdigest()[:8]
        first = seeds(spec, key, pool, (*cache.records(), *advice), trials=trials)
        sampler = PoolSampler(pool, budget=trials, seed=seed, first=first)
        study = open_study(f"{spec.name}-{key.digest}-{suffix}", cache.folder / "studies", storage, sampler)
        ledger = Ledger(study, pool, trials)
        stack.callback(ledger.close)
        case, report = Case(problem, spec, key, pool, shared, seed), on_event or (lambda event: None)
        return _Search(case, ledger, cache, trials, report).run(seconds)


@dataclass
class _Search:
    """One call of `tune`."""

    case: Case
    ledger: Ledger
    cache: KernelCache
    trials: int
    report: Callable[[Event], None]
    started: float = field(default_factory=time.monotonic)
    best: Found | None = None

    def run(self, seconds: float | None) -> TuneResult:
        record, stopped = self.cache.get(self.case.key), "finished before"
        if record is None or not self._concluded(record):
            conclusion = Conclusion(self.case, self.ledger, self.cache, self.report)
            try:
                self._begin()
                stopped = self._search(seconds)
                record = conclusion.conclude()
            except KeyboardInterrupt:
                self._report_finished(conclusion.save_best_of_this_run() or record, "interrupted")
                raise
            winner = {"schedule": record.schedule, "measurement": record.measurement}
            ending = {"trials": len(self.ledger.settled()), "stopped": stopped, "finalists": conclusion.standings}
            self.ledger.study.set_user_attr(CONCLUDED, ending | winner)
        failed = self._report_finished(record, stopped)
        finalists = self.ledger.study.user_attrs[CONCLUDED].get("finalists", ())
        return TuneResult(record, len(self.ledger.settled()), failed, stopped, tuple(finalists))

    def _concluded(self, record: Record) -> bool:
        """Whether an earlier call has done all that this one would do, and `record` came of it."""
        concluded = self.ledger.study.user_attrs.get(CONCLUDED, {"trials": 0, "stopped": ""})
        if record.measurement.get("trials", 0) < concluded["trials"]:
            return False  # another worker went on since
        return concluded["trials"] >= self.trials or concluded["stopped"] in ("pool swept", ROOFLINE)

    def _begin(self) -> None:
        case, roofline, study = self.case, self.case.workers.roofline(), self.ledger.study
        mine = about(case.problem, case.key.device, case.pool, case.traffic, roofline, case.workers.threads)
        check_same_search(study.study_name, study.user_attrs.get(ABOUT), mine)
        done = len(self.ledger.settled())
        self.report(ProblemStarted(case.problem, len(case.pool), self.trials, done, roofline))
        study.set_user_attr(ABOUT, mine)

    def _search(self, seconds: float | None) -> str:
        """Ask, compile, verify, time and tell, until one of the reasons to stop holds; returns it."""
        while True:
            standing = self.ledger.look()
            self._note(standing)
            if standing.elsewhere == 0 and standing.left == 0:
                return "pool swept"
            if standing.elsewhere == 0 and standing.room <= 0:
                return "trials"
            if standing.measured and seconds is not None and time.monotonic() - self.started > seconds:
                return "time"
            if standing.measured and self._at_roofline(standing.measured):
                return ROOFLINE
            rest = min(standing.left, standing.room)
            if standing.elsewhere:
                rest = (rest + 1) // 2  # the last ones are shared, so that all end at about the same time
            if not self._batch(min(self.case.workers.compilers, rest)):
                # Other workers have all that is left: what they find counts, and what they drop is to be done here.
                time.sleep(WAIT_SECONDS)

    def _batch(self, count: int) -> int:
        """Compile `count` schedules side by side, then assess one after the other: nothing is timed meanwhile.

        Returns how many there were: other workers may have taken some this moment.
        """
        asked = [given for given in (self.ledger.ask() for _ in range(count)) if given is not None]
        if asked:
            self.case.compile([self.case.pool.default, *(member for _, member in asked)])
        for trial, member in asked:
            self._assess(trial, member)
        return len(asked)

    def _assess(self, trial: Trial, member: int) -> None:
        default = self.case.default()
        try:
            artifact = self.case.artifact(member)
            found = self._twin(artifact) or self._timed(artifact, default, trial.number)
        except TaskFailed as failure:
            self._fail(trial, member, failure)
            return
        if self.ledger.complete(trial, found):
            self._report_done(trial.number, member, found)

    def _timed(self, artifact: Artifact, default: Artifact, number: int) -> Found:
        """Verify and time a kernel, unless its code shows that it cannot win; raises `TaskFailed`."""
        case = self.case
        if artifact is not default and (why := why_cannot_win(artifact, case.artifacts())):
            raise TaskFailed(why)
        times = case.workers.assess(case.problem, artifact.binary, default.binary, case.fresh_seed(number))
        case.verified.add(digest(artifact))
        ratio = paired_ratio(times[DEFAULT], times[TUNED])
        return Found(
            ms=statistics.median(times[TUNED]),
            default_ms=statistics.median(times[DEFAULT]),
            # Against itself only the bounds say something: they are the noise.
            ratio=1.0 if artifact is default else ratio.median,
            low=ratio.low,
            high=ratio.high,
            source=digest(artifact),
        )

    def _twin(self, artifact: Artifact) -> Found | None:
        """What was found for the same generated code under another schedule: it is timed once."""
        for other in sorted(self.ledger.measured(), key=lambda trial: trial.number):
            found = Found.of(other)
            if found.source == digest(artifact):
                return replace(found, same_as=other.number)
        return None

    def _fail(self, trial: Trial, member: int, failure: TaskFailed) -> None:
        if is_environment(str(failure)):
            raise BadInput(mend(str(failure))) from failure
        if member == self.case.pool.default:
            # Not told as failed, so that the next call asks it again: there is no search without it.
            raise self.case.default_fails(failure) from failure
        if self.ledger.fail(trial, str(failure)):
            self._report_failed(trial.number, member, str(failure))

    def _at_roofline(self, measured: Sequence[FrozenTrial]) -> bool:
        """Whether what the best leaves up to the roofline is less than the noise (`final.at_floor`)."""
        defaults = [trial for trial in measured if self.case.member(trial) == self.case.pool.default]
        if not defaults:
            return False
        itself, (least, most) = Found.of(defaults[0]), NOISE_BOUNDS
        noise = min(most, max(least, (itself.high - itself.low) / 2))
        floor = floor_ms(self.case.traffic, self.case.workers.roofline())
        best = Found.of(measured[0])
        return at_floor(best.default_ms, Ratio(best.ratio, best.low, best.high), floor, noise)

    def _note(self, standing: Standing) -> None:
        """Remember the best, and tell of what other workers have settled."""
        if standing.measured:
            self.best = Found.of(standing.measured[0])
        for trial in standing.news:
            member = self.case.member(trial)
            if trial.state == TrialState.COMPLETE:
                self._report_done(trial.number, member, Found.of(trial))
            else:
                self._report_failed(trial.number, member, trial.user_attrs[REASON])

    def _report_failed(self, number: int, member: int, reason: str) -> None:
        self.report(TrialFailed(self.case.problem, number, self.case.pool.values(member), reason))

    def _report_done(self, number: int, member: int, found: Found) -> None:
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
        reasons = [trial.user_attrs[REASON] for trial in self.ledger.settled() if trial.state == TrialState.FAIL]
        seconds = time.monotonic() - self.started
        self.report(ProblemFinished(self.case.problem, record, stopped, len(reasons), seconds, by_kind(reasons)))
        return len(reasons)
