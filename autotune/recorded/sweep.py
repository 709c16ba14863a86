"""Recording of a space: every member of a pool is compiled, verified and timed, across interruptions."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from autotune.measuring.timing import paired_ratio
from autotune.processes.tasks import DEFAULT, TUNED
from autotune.processes.worker import TaskFailed
from autotune.processes.workers import Workers
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

Line = dict[str, Any]
"""The finding of one member: `reason`, or `ratio`, `default_ms`, `low`, `high`, `rounds` and `source`."""


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
    drift. Findings are appended to `out`.part one by one; the same call resumes from there.

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
        with _open_findings(part, {"pool": pool.digest, **about}) as file:
            found = _read_findings(file, pool)
            _Sweep(problem, spec, pool, device, workers, file, found, on_member or (lambda *_: None)).run()
        space = _space(problem, pool, found, about)
        write_space(space, out)
        part.unlink()
    except OSError as error:
        raise BadInput(
            f"a recorded space must be written to {out}, got {error.strerror}: what was measured is kept in {part}; "
            "mend it, then run the same command again"
        ) from error
    return space


def _open_findings(part: Path, header: Mapping[str, Any]) -> IO[bytes]:
    """Open the file of findings behind its header, and cut off a partial last line."""
    first = json.dumps(header).encode() + b"\n"
    file = part.open("a+b")
    try:
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        if b"\n" not in content:
            file.write(first)
            _flush(file)
        elif not content.startswith(first):
            raise BadInput(
                f"{part} must belong to this sweep, it is of another problem, device, pool, thread count or "
                "version: move it away to begin anew"
            )
        file.seek(len(first))
    except BaseException:
        file.close()
        raise
    return file


def _read_findings(file: IO[bytes], pool: Pool) -> dict[int, Line]:
    found = {}
    for line in file:
        try:
            said = json.loads(line)
            found[range(len(pool))[said.pop("member")]] = said
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise BadInput(
                f"{file.name} must hold one finding a line, got {line[:40]!r}: move it away to begin anew"
            ) from error
    return found


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


class _Sweep:
    """One call of `record`."""

    def __init__(
        self,
        problem: Problem,
        spec: KernelSpec,
        pool: Pool,
        device: Device,
        workers: Workers,
        file: IO[bytes],
        found: dict[int, Line],
        on_member: Callable[[int, int, int], None],
    ) -> None:
        self.problem, self.spec, self.pool, self.device = problem, spec, pool, device
        self.workers, self.file, self.found, self.on_member = workers, file, found, on_member
        self.by_source = {said["source"]: said for said in found.values() if "source" in said}

    def run(self) -> None:
        """Measure what is missing, the default first."""
        pool = self.pool
        left = [pool.default, *(member for member in range(len(pool)) if member != pool.default)]
        left = [member for member in left if member not in self.found]
        self._report_progress()
        if not left:
            return
        default = self._compile([pool.default])[0]
        if isinstance(default, TaskFailed):
            raise default
        together = self.workers.compilers
        for first in range(0, len(left), together):
            members = left[first : first + together]
            for member, built in zip(members, self._compile(members), strict=True):
                self._append(member, self._evaluate(member, built, default))

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
        low, middle, high = statistics.quantiles(tuned, n=4, method="inclusive")
        self.by_source[source] = {
            "ratio": 1.0 if member == self.pool.default else paired_ratio(times[DEFAULT], tuned).median,
            "default_ms": statistics.median(times[DEFAULT]),
            "low": low / middle,
            "high": high / middle,
            "rounds": len(tuned),
            "source": source,
        }
        return self.by_source[source]

    def _append(self, member: int, said: Line) -> None:
        self.file.write(json.dumps({"member": member, **said}).encode() + b"\n")
        _flush(self.file)
        self.found[member] = said
        self._report_progress()

    def _report_progress(self) -> None:
        failed = sum("reason" in said for said in self.found.values())
        self.on_member(len(self.found), failed, len(self.pool))


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
        about={**about, "rounds": min(said["rounds"] for said in timed), "made": provenance(commit=_commit())},
    )


def _commit() -> str:
    """The commit of this project's checkout, or an empty text without one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        said = subprocess.run(command, check=False, capture_output=True, text=True)
    except OSError:
        return ""
    return said.stdout.strip()
