"""What a search works on: a kernel for a problem on a device, the pool of its schedules, and those compiled so far."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from optuna.trial import FrozenTrial

from autotune.processes.worker import TaskFailed
from autotune.processes.workers import Workers
from autotune.search.pool import Pool
from tiles.cache.cache import Key
from tiles.compiler.canonical_source import stable_form
from tiles.compiler.compile import Artifact
from tiles.errors import BadInput
from tiles.kernels.spec import KernelSpec, Problem, Traffic

NOT_THE_SCHEDULE = ("No space left on device", "Disk quota exceeded", "Read-only file system", "File too large")
"""What makes any schedule fail: none is to blame, and all are to be asked again when it is mended."""


class TuneFailed(RuntimeError):
    """The default schedule does not compile, is wrong or does not run, so there is nothing to measure against."""


@dataclass
class Case:
    """One kernel to tune. `verified` holds the digests of code that was assessed in this call."""

    problem: Problem
    spec: KernelSpec
    key: Key
    pool: Pool
    workers: Workers
    seed: int
    verified: set[str] = field(default_factory=set)
    _artifacts: dict[int, Artifact | TaskFailed] = field(default_factory=dict)

    def compile(self, members: Iterable[int]) -> None:
        """Compile those that were not compiled before; what fails shows in `artifact`."""
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
        member = self.pool.member(trial.params)
        assert member is not None, "the sampler proposes members, and the study's name tells the pool"
        return member

    def default(self) -> Artifact:
        """The default schedule, compiled; raises `TuneFailed`."""
        try:
            return self.artifact(self.pool.default)
        except TaskFailed as failure:
            raise self.default_fails(failure) from failure

    def default_fails(self, failure: TaskFailed) -> Exception:
        """What to raise when it is the default schedule that fails."""
        return self.failed(f"the default schedule fails: {failure}")

    def failed(self, what: str) -> Exception:
        """`TuneFailed`, or `BadInput` where it is not the kernel's fault."""
        text = f"{self.problem.describe()}: {what}"
        return BadInput(mend(text)) if is_environment(text) else TuneFailed(text)

    def fresh_seed(self, number: int) -> int:
        """Every trial draws inputs of its own; the factor keeps searches of different seeds apart."""
        return self.seed * 1_000_003 + number

    @property
    def traffic(self) -> Traffic:
        """Of a call with the problem's tokens."""
        return self.spec.traffic(self.problem, self.problem.tokens)

    def percent_of_copy(self, ms: float) -> float:
        """The rate of the bytes against the device's copy bandwidth."""
        return 100 * self.traffic.bytes / ms / 1e6 / self.workers.roofline().copy_gb_per_s

    def percent_of_limit(self, ms: float) -> float:
        """The least time that the roofline allows against this one."""
        return 100 * self.workers.roofline().limit_ms(self.traffic) / ms


def digest(artifact: Artifact) -> str:
    """SHA-256 of the generated code, the same from whatever process."""
    return hashlib.sha256(stable_form(artifact.source).encode()).hexdigest()


def is_environment(reason: str) -> bool:
    """Whether a failure says something about the machine and nothing about the schedule."""
    return any(sign in reason for sign in NOT_THE_SCHEDULE)


def mend(reason: str) -> str:
    """The one line for such a failure."""
    return (
        f"tuning needs room for temporary files, got {reason}: what was finished is kept; "
        "make room, then run the same command again"
    )
