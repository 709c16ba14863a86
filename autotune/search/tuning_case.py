"""One tuning case: a kernel for a problem on a device, the pool of its schedules, and those compiled so far."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from optuna.trial import FrozenTrial

from autotune.processes.worker import TaskFailed
from autotune.processes.workers import Workers
from autotune.search.pool import Pool
from autotune.search.trials import member_of
from tiles.cache.cache import Key
from tiles.compiler.canonical_source import canonical_source
from tiles.compiler.compile import Artifact
from tiles.errors import BadInput
from tiles.kernels.spec import KernelSpec, Problem, Traffic

MACHINE_FAULTS = ("No space left on device", "Disk quota exceeded", "Read-only file system", "File too large")
"""Error texts of faults of the machine that fail any schedule: the trials are to be asked again when it is mended."""


class TuneFailed(RuntimeError):
    """The default schedule does not compile, is wrong or does not run, so there is no baseline to measure against."""


@dataclass
class TuningCase:
    """One kernel to tune. `verified` holds the digests of generated code that was verified in this call."""

    problem: Problem
    spec: KernelSpec
    key: Key
    pool: Pool
    workers: Workers
    seed: int
    verified: set[str] = field(default_factory=set)
    _artifacts: dict[int, Artifact | TaskFailed] = field(default_factory=dict)

    def compile(self, members: Iterable[int]) -> None:
        """Compile the members that were not compiled before; `artifact` raises what failed."""
        missing = [member for member in dict.fromkeys(members) if member not in self._artifacts]
        schedules = [self.spec.schedule_from(self.pool.values(member)) for member in missing]
        done = self.workers.compile(self.problem, schedules, self.key.device.target)
        self._artifacts |= dict(zip(missing, done, strict=True))

    def artifact(self, member: int) -> Artifact:
        """A compiled schedule; raises `TaskFailed` where it does not compile."""
        artifact = self._artifacts[member]
        if isinstance(artifact, TaskFailed):
            raise artifact
        return artifact

    def artifacts(self) -> list[Artifact]:
        """All code that was compiled in this call."""
        return [artifact for artifact in self._artifacts.values() if isinstance(artifact, Artifact)]

    def compiled(self, member: int) -> bool:
        """Whether a schedule was compiled in this call, with or without success."""
        return member in self._artifacts

    def member(self, trial: FrozenTrial) -> int:
        """The member of a trial that has all its tunables."""
        return member_of(trial, self.pool)

    def default(self) -> Artifact:
        """The default schedule, compiled; raises `TuneFailed`."""
        try:
            return self.artifact(self.pool.default)
        except TaskFailed as failure:
            raise self.default_failure(failure) from failure

    def default_failure(self, failure: TaskFailed) -> Exception:
        """What to raise when it is the default schedule that fails."""
        return tuning_error(self.problem, f"the default schedule fails: {failure}")

    def input_seed(self, number: int) -> int:
        """The seed of a trial's inputs, which are its own; the factor keeps searches of different seeds apart."""
        return self.seed * 1_000_003 + number

    @property
    def traffic(self) -> Traffic:
        """The traffic of a call with the problem's tokens."""
        return self.spec.traffic(self.problem, self.problem.tokens)

    def percent_of_copy(self, ms: float) -> float:
        """The bytes per second as a percentage of the device's copy bandwidth."""
        return 100 * self.traffic.bytes / ms / 1e6 / self.workers.roofline().copy_gb_per_s

    def percent_of_limit(self, ms: float) -> float:
        """The roofline's least time as a percentage of `ms`."""
        return 100 * self.workers.roofline().limit_ms(self.traffic) / ms


def source_digest(artifact: Artifact) -> str:
    """SHA-256 of the generated code in canonical form, the same in every process."""
    return hashlib.sha256(canonical_source(artifact.source).encode()).hexdigest()


def is_machine_fault(reason: str) -> bool:
    """Whether a failure is the machine's fault and not the schedule's."""
    return any(sign in reason for sign in MACHINE_FAULTS)


def machine_fault(reason: str) -> BadInput:
    """The error for a fault of the machine."""
    return BadInput(
        f"tuning needs room for temporary files, got {reason}: what was finished is kept; "
        "make room, then run the same command again"
    )


def tuning_error(problem: Problem, what: str) -> Exception:
    """`TuneFailed`, or `BadInput` where the machine is at fault."""
    text = f"{problem.describe()}: {what}"
    return machine_fault(text) if is_machine_fault(text) else TuneFailed(text)
