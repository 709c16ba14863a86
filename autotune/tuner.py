"""The search for the fastest correct schedule of one kernel on one device."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from autotune.events import Event, FinalistsMeet, ProblemFinished, ProblemStarted, TrialDone, TrialFailed
from autotune.final import decide, floor_ms, measurement, provenance, worth_it
from autotune.measure import paired_ratio
from autotune.pool import Pool, enumerate_pool
from autotune.rival import weigh
from autotune.search import PoolSampler
from autotune.storage import claim, open_study
from autotune.tasks import DEFAULT, TUNED
from autotune.trials import FOUND, REASON, Found, fastest_first, settled, unseen
from autotune.worker import TaskFailed
from autotune.workers import COMPILERS, Workers
from tiles.cache import KernelCache, Key, Record
from tiles.compile import Artifact
from tiles.errors import BadInput
from tiles.family import KernelSpec, Problem, Traffic
from tiles.registry import kernel_spec
from tiles.target import Device

FINALISTS = 3

CONCLUDED = "concluded"
"""Study attribute: how many trials were settled when the winner was written, and why the search had stopped."""

ROOFLINE = "roofline"
"""Why a search stopped that the roofline left nothing to find."""

NOISE_BOUNDS = (0.01, 0.05)
"""What is believed of the noise that the default's measurement against itself shows."""


NO_RIVAL: Mapping[str, float | bool] = {}
"""What is said of separate kernels where there are none, or where there was no time to compare."""


class TuneFailed(RuntimeError):
    """The default schedule does not compile, is wrong or does not run, so there is nothing to measure against."""


@dataclass(frozen=True)
class TuneResult:
    """What a search came to: the record in the cache, settled and failed trials of all runs, why it stopped."""

    record: Record
    trials: int
    failed: int
    stopped: str


def tune(
    problem: Problem,
    device: Device,
    cache: KernelCache,
    *,
    trials: int = 16,
    seconds: float | None = None,
    storage: str | None = None,
    seed: int = 0,
    on_event: Callable[[Event], None] | None = None,
    workers: Workers | None = None,
) -> TuneResult:
    """Search for at most `trials` schedules, or about `seconds`, and put the winner into `cache`.

    The winner is the default schedule unless another one beats it beyond the noise. Trials are kept (a journal in the
    cache folder, or the database at the URL `storage`): a second call goes on where the first one ended, and does
    nothing where that had finished. `workers` may be shared by several calls.

    Raises:
        BadInput: a device that is not a CPU, or trials or tokens below 1.
        TuneFailed: the default schedule itself does not work here.
        KeyboardInterrupt: Ctrl-C; what was finished is kept, and the best of it is in the cache.
    """
    if device.kind != "cpu":
        raise BadInput(f"tuning measures on this machine's CPU, got {device.kind} {device.name}: pass target cpu")
    if trials < 1 or problem.tokens < 1:
        raise BadInput(f"trials and tokens must be at least 1, got {trials} and {problem.tokens}: pass larger ones")
    spec = kernel_spec(problem.op, problem.direction)
    key, pool = Key.of(problem, device), enumerate_pool(spec, problem, device.target)
    with ExitStack() as stack:
        shared = workers or stack.enter_context(Workers())
        # Numbers taken with another thread count belong to another study.
        suffix = hashlib.sha256(f"{pool.digest} {shared.threads}".encode()).hexdigest()[:8]
        sampler = PoolSampler(pool, budget=trials, seed=seed)
        study = open_study(f"{spec.name}-{key.digest}-{suffix}", cache.folder / "studies", storage, sampler)
        report = on_event or (lambda event: None)
        return _Search(problem, spec, key, pool, study, shared, cache, trials, seed, report).run(seconds)


@dataclass
class _Search:
    """One call of `tune`."""

    problem: Problem
    spec: KernelSpec
    key: Key
    pool: Pool
    study: Study
    workers: Workers
    cache: KernelCache
    trials: int
    seed: int
    report: Callable[[Event], None]
    started: float = field(default_factory=time.monotonic)
    artifacts: dict[int, Artifact | TaskFailed] = field(default_factory=dict)
    verified: set[str] = field(default_factory=set)  # digests of code that was assessed in this call

    def run(self, seconds: float | None) -> TuneResult:
        record, stopped = self.cache.get(self.key), "finished before"
        if record is None or not self._concluded():
            try:
                roofline = self.workers.roofline()
                self.report(ProblemStarted(self.problem, len(self.pool), self.trials, len(self._settled()), roofline))
                stopped = self._search(seconds)
                record = self._conclude()
            except KeyboardInterrupt:
                self._report_finished(self._save_best_of_this_run() or record, "interrupted")
                raise
            self.study.set_user_attr(CONCLUDED, {"trials": len(self._settled()), "stopped": stopped})
        failed = self._report_finished(record, stopped)
        return TuneResult(record, len(self._settled()), failed, stopped)

    def _concluded(self) -> bool:
        """Whether an earlier call has done all that this one would do."""
        concluded = self.study.user_attrs.get(CONCLUDED, {"trials": 0, "stopped": ""})
        return concluded["trials"] >= self.trials or concluded["stopped"] in ("pool swept", ROOFLINE)

    def _settled(self) -> list[FrozenTrial]:
        return [trial for trial in self.study.get_trials(deepcopy=False) if settled(trial)]

    def _measured(self) -> list[FrozenTrial]:
        return fastest_first(self.study.get_trials(deepcopy=False))

    def _search(self, seconds: float | None) -> str:
        """Ask, compile, verify, time and tell, until one of the reasons to stop holds; returns it."""
        while True:
            trials = self.study.get_trials(deepcopy=False)
            measured, left = fastest_first(trials), len(unseen(self.pool, trials))
            more = min(COMPILERS, left, self.trials - len(self._settled()))
            if left == 0:
                return "pool swept"
            if more <= 0:
                return "trials"
            if measured and seconds is not None and time.monotonic() - self.started > seconds:
                return "time"
            if measured and self._at_roofline(measured):
                return ROOFLINE
            self._batch(more)

    def _batch(self, count: int) -> None:
        """Compile `count` schedules side by side, then assess one after the other: nothing is timed meanwhile."""
        asked = []
        for _ in range(count):
            trial = self.study.ask(dict(self.pool.distributions))
            claim(trial)
            asked.append((trial, self._member(trial.params)))
        self._compile([self.pool.default, *(member for _, member in asked)])
        for trial, member in asked:
            self._assess(trial, member)

    def _member(self, params: dict[str, Any]) -> int:
        member = self.pool.member(params)
        assert member is not None, "the sampler proposes members, and the study's name tells the pool"
        return member

    def _compile(self, members: Sequence[int]) -> None:
        missing = [member for member in dict.fromkeys(members) if member not in self.artifacts]
        schedules = [self.spec.schedule(**self.pool.values(member)) for member in missing]
        done = self.workers.compile(self.problem, schedules, self.key.device.target)
        self.artifacts |= dict(zip(missing, done, strict=True))

    def _artifact(self, member: int) -> Artifact:
        artifact = self.artifacts[member]
        if isinstance(artifact, TaskFailed):
            raise artifact
        return artifact

    def _default(self) -> Artifact:
        try:
            return self._artifact(self.pool.default)
        except TaskFailed as failure:
            raise self._default_fails(failure) from failure

    def _default_fails(self, failure: TaskFailed) -> TuneFailed:
        return TuneFailed(f"{self.problem.describe()}: the default schedule fails: {failure}")

    def _assess(self, trial: Trial, member: int) -> None:
        default = self._default()
        try:
            artifact = self._artifact(member)
            found = self._twin(artifact) or self._timed(artifact, default, trial.number)
        except TaskFailed as failure:
            self._fail(trial, member, failure)
            return
        trial.set_user_attr(FOUND, found.as_dict())
        self.study.tell(trial, 1 / found.ratio)
        self._report_done(trial.number, member, found)

    def _timed(self, artifact: Artifact, default: Artifact, number: int) -> Found:
        """Verify and time a kernel."""
        times = self.workers.assess(self.problem, artifact.binary, default.binary, self._fresh_seed(number))
        self.verified.add(_digest(artifact))
        ratio = paired_ratio(times[DEFAULT], times[TUNED])
        return Found(
            ms=statistics.median(times[TUNED]),
            default_ms=statistics.median(times[DEFAULT]),
            # Against itself only the bounds say something: they are the noise.
            ratio=1.0 if artifact is default else ratio.median,
            low=ratio.low,
            high=ratio.high,
            source=_digest(artifact),
        )

    def _fresh_seed(self, number: int) -> int:
        """Every trial draws inputs of its own; the factor keeps searches of different seeds apart."""
        return self.seed * 1_000_003 + number

    def _twin(self, artifact: Artifact) -> Found | None:
        """What was found for the same generated code under another schedule: it is timed once."""
        for other in sorted(self._measured(), key=lambda trial: trial.number):
            found = Found.of(other)
            if found.source == _digest(artifact):
                return replace(found, same_as=other.number)
        return None

    def _fail(self, trial: Trial, member: int, failure: TaskFailed) -> None:
        if member == self.pool.default:
            # Told without a reason, so that the next call asks it again: there is no search without it.
            self.study.tell(trial, state=TrialState.FAIL)
            raise self._default_fails(failure) from failure
        trial.set_user_attr(REASON, str(failure))
        self.study.tell(trial, state=TrialState.FAIL)
        self.report(TrialFailed(self.problem, trial.number, self.pool.values(member), str(failure)))

    def _at_roofline(self, measured: Sequence[FrozenTrial]) -> bool:
        """Whether what the best leaves up to the roofline is less than the noise.

        A time far below it says that something slowed the machine while the roofline was measured: that is no reason.
        """
        defaults = [trial for trial in measured if self._member(trial.params) == self.pool.default]
        if not defaults:
            return False
        itself, (least, most) = Found.of(defaults[0]), NOISE_BOUNDS
        noise = min(most, max(least, (itself.high - itself.low) / 2))
        return abs(Found.of(measured[0]).ms / floor_ms(self._traffic(), self.workers.roofline()) - 1) <= noise

    def _conclude(self) -> Record:
        """Let the fastest schedules meet the default, and put the winner into the cache."""
        finalists = self._finalists()
        self._compile([self.pool.default, *finalists])
        self.report(FinalistsMeet(self.problem, tuple(self.pool.values(member) for member in finalists)))
        seed = self._fresh_seed(len(self._settled()))
        try:
            entrants = {member: self._artifact(member) for member in (self.pool.default, *finalists)}
            binaries = {str(member): artifact.binary for member, artifact in entrants.items()}
            # A trial of an earlier call says nothing about what today's compiler makes of its code.
            unverified = [str(name) for name, artifact in entrants.items() if _digest(artifact) not in self.verified]
            times = self.workers.compare(self.problem, binaries, unverified, seed)
            winner, tuned_ms, default_ms, ratio = decide(str(self.pool.default), times)
            rival = self._weigh_separate(entrants[int(winner)], seed)
        except TaskFailed as failure:
            raise TuneFailed(f"{self.problem.describe()}: the finalists fail: {failure}") from failure
        return self._put(int(winner), tuned_ms, default_ms, ratio, rival)

    def _weigh_separate(self, artifact: Artifact, seed: int) -> dict[str, float | bool]:
        """For a fused kernel: whether the separate kernels are faster."""
        if self.spec.separate is None:
            return {}
        return weigh(self.problem, artifact.binary, self.cache, self.key.device, self.workers, seed)

    def _finalists(self) -> list[int]:
        """The fastest members, at most `FINALISTS`, of code that is neither the default's nor a faster one's."""
        members: dict[str, int] = {}
        for trial in self._measured():
            member = self._member(trial.params)
            if member == self.pool.default:
                break
            members.setdefault(Found.of(trial).source, member)
        return list(members.values())[:FINALISTS]

    def _save_best_of_this_run(self) -> Record | None:
        """After Ctrl-C: judge by the trials themselves, and take the best that was verified in this call."""
        for trial in self._measured():
            member, found = self._member(trial.params), Found.of(trial)
            if found.source not in self.verified:
                continue
            if member == self.pool.default:
                return self._put_if_better(member, found.ms, found.ms, 1.0)
            if worth_it(found.low):
                return self._put_if_better(member, found.ms, found.default_ms, found.ratio)
        return None

    def _put_if_better(self, member: int, tuned_ms: float, default_ms: float, ratio: float) -> Record:
        before = self.cache.get(self.key)
        if before is not None and before.measurement["ratio"] >= ratio:
            return before
        return self._put(member, tuned_ms, default_ms, ratio)

    def _report_done(self, number: int, member: int, found: Found) -> None:
        best = Found.of(self._measured()[0])
        self.report(
            TrialDone(
                problem=self.problem,
                number=number,
                schedule=self.pool.values(member),
                ms=found.ms,
                ratio=found.ratio,
                percent_of_copy=self._percent_of_copy(found.ms),
                percent_of_limit=self._percent_of_limit(found.ms),
                best_ms=best.ms,
                best_ratio=best.ratio,
                best_percent_of_copy=self._percent_of_copy(best.ms),
                best_percent_of_limit=self._percent_of_limit(best.ms),
                same_as=found.same_as,
            )
        )

    def _report_finished(self, record: Record | None, stopped: str) -> int:
        failed = sum(trial.state == TrialState.FAIL for trial in self._settled())
        self.report(ProblemFinished(self.problem, record, stopped, failed, time.monotonic() - self.started))
        return failed

    def _traffic(self) -> Traffic:
        return self.spec.traffic(self.problem, self.problem.tokens)

    def _percent_of_copy(self, ms: float) -> float:
        return 100 * self._traffic().bytes / ms / 1e6 / self.workers.roofline().copy_gb_per_s

    def _percent_of_limit(self, ms: float) -> float:
        return 100 * self.workers.roofline().limit_ms(self._traffic()) / ms

    def _put(
        self,
        member: int,
        tuned_ms: float,
        default_ms: float,
        ratio: float,
        rival: Mapping[str, float | bool] = NO_RIVAL,
    ) -> Record:
        artifact = self._artifact(member)
        measured = measurement(
            tuned_ms=tuned_ms,
            default_ms=default_ms,
            ratio=ratio,
            traffic=self._traffic(),
            roofline=self.workers.roofline(),
            threads=self.workers.threads,
            trials=len(self._settled()),
            default_kept=member == self.pool.default,
        )
        measured |= rival
        made = provenance(seed=self.seed, study=self.study.study_name)
        return self.cache.put(self.key, self.pool.values(member), artifact.binary, artifact.source, measured, made)


def _digest(artifact: Artifact) -> str:
    return hashlib.sha256(artifact.source.encode()).hexdigest()
