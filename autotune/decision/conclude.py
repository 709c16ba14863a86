"""The conclusion of a search: the shootout of the fastest schedules and the default, and the winner's record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.trial import FrozenTrial

from autotune.decision.fused_vs_separate import compare_with_separate
from autotune.decision.shootout import shootout
from autotune.decision.significance import decide, finalist_results, is_significant
from autotune.events import Event, ShootoutStarted
from autotune.processes.worker import TaskFailed
from autotune.search.trials import TrialResult
from autotune.search.tuning_case import TuningCase, source_digest, tuning_error
from autotune.study.provenance import measurement, provenance
from autotune.study.shared_trials import SharedTrials
from tiles.cache.cache import KernelCache, Record
from tiles.cache.compiled_here import Subfolder
from tiles.compiler.compile import Artifact

FINALISTS = 3

DEFAULTS: Subfolder = "defaults"

Fields = Mapping[str, float | bool]


@dataclass
class Conclusion:
    """The decision of one search. `finalist_results` are those of the shootout (`significance.finalist_results`)."""

    case: TuningCase
    shared: SharedTrials
    cache: KernelCache
    report: Callable[[Event], None]
    finalist_results: list[dict[str, Any]] = field(default_factory=list)

    def conclude(self) -> Record:
        """Time the fastest schedules against the default, and put the winner into the cache; raises `TuneFailed`."""
        case, finalists = self.case, self._finalists(self.shared.measured())
        case.compile([case.pool.default, *finalists])
        self.report(ShootoutStarted(case.problem, tuple(case.pool.values(member) for member in finalists)))
        seed = case.input_seed(len(self.shared.evaluated()))
        try:
            entrants = {member: case.artifact(member) for member in (case.pool.default, *finalists)}
            binaries = {str(member): artifact.binary for member, artifact in entrants.items()}
            # A trial of an earlier call or of another machine does not verify the code that is compiled here and now.
            unverified = [str(name) for name, built in entrants.items() if source_digest(built) not in case.verified]
            default = str(case.pool.default)
            times = shootout(case.problem, binaries, default, unverified, case.workers, seed)
            conditions = case.workers.conditions
            self.finalist_results = finalist_results(case.pool, times)
            winner, tuned_ms, default_ms, ratio = decide(default, times)
            separate = self._compare_with_separate(entrants[int(winner)], seed)
        except TaskFailed as failure:
            raise tuning_error(case.problem, f"the finalists fail: {failure}") from failure
        self._keep_default()
        return self._put(int(winner), tuned_ms, default_ms, ratio, {**separate, **conditions})

    def _keep_default(self) -> None:
        """Keep the default schedule's code where it is looked for, so that nobody compiles it again."""
        case = self.case
        built, values = case.artifact(case.pool.default), case.pool.values(case.pool.default)
        made = provenance(seed=case.seed, study=self.shared.study.study_name, **built.made_with)
        KernelCache(self.cache.folder / DEFAULTS, lazy=True).put(case.key, values, built.binary, built.source, {}, made)

    def save_best_of_this_run(self) -> Record | None:
        """After Ctrl-C: write the best trial that was verified in this call and beats the default."""
        for trial in self.shared.measured():
            member, found = self.case.member(trial), TrialResult.of(trial)
            if found.source not in self.case.verified or not self.case.compiled(member):
                continue
            if member == self.case.pool.default:
                return self._put_if_better(member, found.ms, found.ms, 1.0)
            if is_significant(found.low):
                return self._put_if_better(member, found.ms, found.default_ms, found.ratio)
        return None

    def _finalists(self, measured: Sequence[FrozenTrial]) -> list[int]:
        """The fastest members, at most `FINALISTS`, of distinct code; only those that may beat the default."""
        members: dict[str, int] = {}
        for trial in measured:
            member = self.case.member(trial)
            if member == self.case.pool.default:
                break
            found = TrialResult.of(trial)
            if is_significant(found.high):
                members.setdefault(found.source, member)
        return list(members.values())[:FINALISTS]

    def _compare_with_separate(self, artifact: Artifact, seed: int) -> Fields:
        """For a fused kernel: the comparison with the separate kernels."""
        case = self.case
        if case.spec.separate is None:
            return {}
        return compare_with_separate(case.problem, artifact.binary, self.cache, case.key.device, case.workers, seed)

    def _put_if_better(self, member: int, tuned_ms: float, default_ms: float, ratio: float) -> Record:
        before = self.cache.get(self.case.key)
        if before is not None and before.measurement["ratio"] >= ratio:
            return before
        return self._put(member, tuned_ms, default_ms, ratio, {})

    def _put(self, member: int, tuned_ms: float, default_ms: float, ratio: float, more: Fields) -> Record:
        """Write a record, with `more` fields of its measurement."""
        case = self.case
        artifact = case.artifact(member)
        measured = measurement(
            tuned_ms=tuned_ms,
            default_ms=default_ms,
            ratio=ratio,
            traffic=case.traffic,
            roofline=case.workers.roofline(),
            threads=case.workers.threads,
            trials=len(self.shared.evaluated()),
            default_kept=member == case.pool.default,
        )
        made = provenance(seed=case.seed, study=self.shared.study.study_name, **artifact.made_with)
        values = case.pool.values(member)
        return self.cache.put(case.key, values, artifact.binary, artifact.source, {**measured, **more}, made)
