"""Recording of a space: every member of a pool is compiled, verified and timed, across interruptions."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from autotune.decision.shootout import shootout
from autotune.measuring.timing import paired_ratio
from autotune.processes.tasks import DEFAULT, TUNED
from autotune.processes.worker import TaskFailed
from autotune.processes.workers import Workers
from autotune.recorded.confirmation import confirmed, contenders, disturbed, spread
from autotune.recorded.findings import Findings, Line
from autotune.recorded.spaces import RecordedSpace, write_space
from autotune.search.pool import Pool, enumerate_pool
from autotune.search.tuning_case import source_digest
from autotune.study.provenance import provenance
from tiles.cache.cache import Key
from tiles.compiler.compile import Artifact
from tiles.errors import BadInput
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import KernelSpec, Problem
from tiles.target import Device


def record(
    problem: Problem,
    device: Device,
    out: Path,
    workers: Workers,
    *,
    on_member: Callable[[int, int, int], None] | None = None,
) -> RecordedSpace:
    """Measure the whole pool of a problem and write it to `out`; calls `on_member(done, failed, all)` for each member.

    Members are timed against the default schedule in interleaved rounds, those of equal generated code once. A member's
    milliseconds are the default's median over the whole sweep divided by the paired ratio, which cancels the machine's
    drift. Those timed while the machine was busy with something else are timed once more. Then the fastest meet again
    in longer rounds side by side, which replace their timings, until the fastest of all is a confirmed one
    (`confirmation`). Findings are kept in `out`.part at once; the same call resumes from there.

    Raises:
        BadInput: `out` is there already or cannot be written, or its part was begun for something else.
        TaskFailed: the default schedule does not work here.
    """
    spec = kernel_spec(problem.op, problem.direction)
    pool = enumerate_pool(spec, problem, device.target)
    key = Key.of(problem, device)
    about = {
        "problem": asdict(problem),
        "device": device.as_dict(),
        "threads": workers.threads,
        "toolchain": key.toolchain,
        "sources": key.sources,
    }
    if out.exists():
        raise BadInput(f"a recorded space must go to a new file, {out} exists: move it away or choose another name")
    part = out.with_name(f"{out.name}.part")
    try:
        with Findings(part, {"pool": pool.digest, **about}, len(pool)) as found:
            sweep = _Sweep(problem, spec, pool, device, workers, found, on_member or (lambda *_: None))
            sweep.run()
            sweep.repeat()
            sweep.confirm()
        space = _space(problem, pool, found.of, about)
        write_space(space, out)
        part.unlink()
    except OSError as error:
        raise BadInput(
            f"a recorded space must be written to {out}, got {error.strerror}: what was measured is kept in {part}; "
            "mend it, then run the same command again"
        ) from error
    return space


class _Sweep:
    """One call of `record`."""

    def __init__(
        self,
        problem: Problem,
        spec: KernelSpec,
        pool: Pool,
        device: Device,
        workers: Workers,
        found: Findings,
        on_member: Callable[[int, int, int], None],
    ) -> None:
        self.problem, self.spec, self.pool, self.device = problem, spec, pool, device
        self.workers, self.found, self.on_member = workers, found, on_member
        self.by_source = found.by_source()

    def run(self) -> None:
        """Measure what is missing, the default first."""
        pool = self.pool
        left = [pool.default, *(member for member in range(len(pool)) if member != pool.default)]
        left = [member for member in left if member not in self.found.of]
        self._report_progress()
        if not left:
            return
        default = self._default()
        together = self.workers.compilers
        for first in range(0, len(left), together):
            members = left[first : first + together]
            for member, built in zip(members, self._compile(members), strict=True):
                self.found.keep({member: self._evaluate(member, built, default)})
                self._report_progress()

    def repeat(self) -> None:
        """Time once more what was timed while the machine was busy with something else."""
        members = disturbed(self.found.of)
        if not members:
            return
        default = self._default()
        for member in members:
            source = self.found.of[member]["source"]
            del self.by_source[source]
            said = self._evaluate(member, self._compile([member])[0], default)
            self.found.keep(self._of_same_code({source: said}))
            self._report_progress()

    def confirm(self) -> None:
        """Time the fastest members again, side by side, until the fastest of all is confirmed."""
        while members := contenders(self.found.of):
            self.found.keep(self._meeting(members))
            self._report_progress()

    def _meeting(self, members: Sequence[int]) -> dict[int, Line]:
        """New findings of all members whose code is that of one of `members`."""
        default = str(self.pool.default)
        built = {str(member): made for member, made in zip(members, self._compile(members), strict=True)}
        binaries = {default: self._default().binary}
        binaries |= {name: made.binary for name, made in built.items() if isinstance(made, Artifact)}
        # They were verified by the code of an earlier call, perhaps: here they are verified on other inputs.
        times = shootout(self.problem, binaries, default, list(binaries), self.workers, len(self.pool))
        said: dict[str, Line] = {}
        for member in members:
            name, source = str(member), self.found.of[member]["source"]
            failed = {"reason": "fails when it meets the fastest again"}
            said[source] = confirmed(times, default, name, source) if name in times else failed
        return self._of_same_code(said)

    def _of_same_code(self, said: Mapping[str, Line]) -> dict[int, Line]:
        """The finding of each generated code as that of all its members."""
        return {member: said[line["source"]] for member, line in self.found.of.items() if line.get("source") in said}

    def _default(self) -> Artifact:
        built = self._compile([self.pool.default])[0]
        if isinstance(built, TaskFailed):
            raise built
        return built

    def _compile(self, members: Sequence[int]) -> list[Artifact | TaskFailed]:
        schedules = [self.spec.schedule_from(self.pool.values(member)) for member in members]
        return self.workers.compile(self.problem, schedules, self.device.target)

    def _evaluate(self, member: int, built: Artifact | TaskFailed, default: Artifact) -> Line:
        try:
            if isinstance(built, TaskFailed):
                raise built
            source = source_digest(built)
            return self.by_source.get(source) or self._time(member, built, default, source)
        except TaskFailed as failure:
            if member == self.pool.default:
                raise
            return {"reason": str(failure)}

    def _time(self, member: int, built: Artifact, default: Artifact, source: str) -> Line:
        times = self.workers.assess(self.problem, built.binary, default.binary, member)
        tuned = times[TUNED]
        self.by_source[source] = {
            "ratio": 1.0 if member == self.pool.default else paired_ratio(times[DEFAULT], tuned).median,
            "default_ms": statistics.median(times[DEFAULT]),
            **spread(tuned),
            "rounds": len(tuned),
            "source": source,
        }
        return self.by_source[source]

    def _report_progress(self) -> None:
        failed = sum("reason" in said for said in self.found.of.values())
        self.on_member(len(self.found.of), failed, len(self.pool))


def _space(problem: Problem, pool: Pool, found: Mapping[int, Line], about: Mapping[str, Any]) -> RecordedSpace:
    lines = [found[member] for member in range(len(pool))]
    timed = [said for said in lines if "ratio" in said]
    default_ms = statistics.median(said["default_ms"] for said in timed)
    return RecordedSpace(
        name=problem.describe(),
        pool=pool,
        ms=tuple(default_ms / said["ratio"] if "ratio" in said else None for said in lines),
        reasons={member: said["reason"] for member, said in found.items() if "reason" in said},
        has_default=True,
        spread=tuple((said["low"], said["high"]) if "ratio" in said else None for said in lines),
        sources=tuple(said.get("source") for said in lines),
        about={
            **about,
            "rounds": min(said["rounds"] for said in timed),
            "confirmed": [member for member, said in enumerate(lines) if said.get("confirmed")],
            "made": provenance(commit=_commit()),
        },
    )


def _commit() -> str:
    """The commit of this project's checkout, or an empty text without one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        said = subprocess.run(command, check=False, capture_output=True, text=True)
    except OSError:
        return ""
    return said.stdout.strip()
