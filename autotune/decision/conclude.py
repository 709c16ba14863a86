"""How a search ends: the fastest schedules meet the default, and the winner goes into the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.trial import FrozenTrial

from autotune.decision.fused_vs_separate import weigh
from autotune.decision.shootout import shootout
from autotune.decision.significance import decide, standings, worth_it
from autotune.events import Event, FinalistsMeet
from autotune.processes.worker import TaskFailed
from autotune.search.case import Case, digest
from autotune.search.trials import Found
from autotune.study.provenance import measurement, provenance
from autotune.study.shared_trials import Ledger
from tiles.cache.cache import KernelCache, Record
from tiles.compiler.compile import Artifact

FINALISTS = 3

NO_RIVAL: Mapping[str, float | bool] = {}
"""What is said of separate kernels where there are none, or where there was no time to compare."""


@dataclass
class Conclusion:
    """The end of one search. `standings` tells how the finalists did, once they have met (`final.standings`)."""

    case: Case
    ledger: Ledger
    cache: KernelCache
    report: Callable[[Event], None]
    standings: list[dict[str, Any]] = field(default_factory=list)

    def conclude(self) -> Record:
        """Let the fastest schedules meet the default, and put the winner into the cache; raises `TuneFailed`."""
        case, finalists = self.case, self._finalists(self.ledger.measured())
        case.compile([case.pool.default, *finalists])
        self.report(FinalistsMeet(case.problem, tuple(case.pool.values(member) for member in finalists)))
        seed = case.fresh_seed(len(self.ledger.settled()))
        try:
            entrants = {member: case.artifact(member) for member in (case.pool.default, *finalists)}
            binaries = {str(member): artifact.binary for member, artifact in entrants.items()}
            # A trial of an earlier call, or of another machine, says nothing about what the compiler makes of its code
            # here and today.
            unverified = [str(name) for name, artifact in entrants.items() if digest(artifact) not in case.verified]
            default = str(case.pool.default)
            times = shootout(case.problem, binaries, default, unverified, case.workers, seed)
            conditions = case.workers.conditions
            self.standings = standings(case.pool, times)
            winner, tuned_ms, default_ms, ratio = decide(default, times)
            rival = self._weigh_separate(entrants[int(winner)], seed)
        except TaskFailed as failure:
            raise case.failed(f"the finalists fail: {failure}") from failure
        return self._put(int(winner), tuned_ms, default_ms, ratio, {**rival, **conditions})

    def save_best_of_this_run(self) -> Record | None:
        """After Ctrl-C: judge by the trials themselves, and take the best that was verified in this call."""
        for trial in self.ledger.measured():
            member, found = self.case.member(trial), Found.of(trial)
            if found.source not in self.case.verified or not self.case.compiled(member):
                continue
            if member == self.case.pool.default:
                return self._put_if_better(member, found.ms, found.ms, 1.0)
            if worth_it(found.low):
                return self._put_if_better(member, found.ms, found.default_ms, found.ratio)
        return None

    def _finalists(self, measured: Sequence[FrozenTrial]) -> list[int]:
        """The fastest members, at most `FINALISTS`, of code that is neither the default's nor a faster one's."""
        members: dict[str, int] = {}
        for trial in measured:
            member = self.case.member(trial)
            if member == self.case.pool.default:
                break
            members.setdefault(Found.of(trial).source, member)
        return list(members.values())[:FINALISTS]

    def _weigh_separate(self, artifact: Artifact, seed: int) -> Mapping[str, float | bool]:
        """For a fused kernel: whether the separate kernels are faster."""
        if self.case.spec.separate is None:
            return NO_RIVAL
        return weigh(self.case.problem, artifact.binary, self.cache, self.case.key.device, self.case.workers, seed)

    def _put_if_better(self, member: int, tuned_ms: float, default_ms: float, ratio: float) -> Record:
        before = self.cache.get(self.case.key)
        if before is not None and before.measurement["ratio"] >= ratio:
            return before
        return self._put(member, tuned_ms, default_ms, ratio)

    def _put(
        self,
        member: int,
        tuned_ms: float,
        default_ms: float,
        ratio: float,
        rival: Mapping[str, float | bool] = NO_RIVAL,
    ) -> Record:
        case = self.case
        artifact = case.artifact(member)
        measured = measurement(
            tuned_ms=tuned_ms,
            default_ms=default_ms,
            ratio=ratio,
            traffic=case.traffic,
            roofline=case.workers.roofline(),
            threads=case.workers.threads,
            trials=len(self.ledger.settled()),
            default_kept=member == case.pool.default,
        )
        measured |= rival
        made = provenance(seed=case.seed, study=self.ledger.study.study_name)
        return self.cache.put(case.key, case.pool.values(member), artifact.binary, artifact.source, measured, made)
