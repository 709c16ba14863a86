"""`mhc-tune verify`: checksums and numerics of the kernels of a folder or pack."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from autotune.measuring import verify as numerics
from autotune.processes.worker import TaskFailed, Worker
from cli.ui.options import PATH_HELP, JsonOption, TrustOption, cache_or_pack
from cli.ui.output import say, show_json, warn
from tiles.cache.cache import KernelCache
from tiles.cache.record import Record
from tiles.errors import BadInput
from tiles.kernels.spec import Problem
from tiles.pack.pack import Pack
from tiles.runtime.loaded_kernel import LoadedKernel
from tiles.target import cuda_available, detect_device, why_cannot_run

MOST_TOKENS = 512
"""Most tokens of a check: several slices per thread, and few enough for the float64 reference."""

TIME_LIMIT = 300.0
"""Seconds for the check of one kernel."""


@dataclass(frozen=True)
class Verdict:
    """Result of one kernel: correct, not run here (its checksum is), or failed; `why` gives the reason."""

    kernel: str
    digest: str
    verdict: Literal["right", "not run", "failed"]
    why: str | None = None


class NotRun(Exception):
    """The numerics of a kernel cannot or must not be checked here; the text says why."""


def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help=PATH_HELP)],
    trust_binaries: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Check every kernel's checksum, then run it on this device and compare with a float64 reference.

    Kernels of another device or version, and untrusted code (see mhc-tune keys), get the checksum only. Exits with 1
    when a check fails.
    """
    source = cache_or_pack(path)
    records = source.records()
    warn(source.complaints)
    if not records and not source.complaints:
        raise BadInput(f"PATH must hold kernels, found none in {path}: run mhc-tune tune")
    untrusted = None if trust_binaries else source.why_untrusted
    verdicts: list[Verdict] = []
    worker = Worker()  # a kernel that crashes harms only that process
    try:
        for record in records:
            verdicts.append(_verdict(source, record, untrusted, worker))
            say(_line(verdicts[-1]))
    finally:
        worker.kill()
    count = {name: sum(one.verdict == name for one in verdicts) for name in ("right", "not run", "failed")}
    count["failed"] += len(source.complaints)
    say(
        f"{len(records) + len(source.complaints)} kernels: {count['right']} right, {count['not run']} not run, "
        f"{count['failed']} failed"
    )
    if json:
        kernels = [asdict(one) for one in verdicts]
        show_json({"path": str(path), **count, "kernels": kernels, "corrupt": list(source.complaints)})
    if count["failed"]:
        raise typer.Exit(1)


def _verdict(source: KernelCache | Pack, record: Record, untrusted: str | None, worker: Worker) -> Verdict:
    name, digest = record.key.problem.describe(), record.key.digest
    try:
        binary = _runnable(source, record, untrusted)
        worker.call(TIME_LIMIT, check_numerics, binary, record.key.problem, torch.get_num_threads())
    except NotRun as why:
        return Verdict(name, digest, "not run", str(why))
    except (TaskFailed, BadInput) as error:
        return Verdict(name, digest, "failed", str(error))
    return Verdict(name, digest, "right")


def _line(one: Verdict) -> str:
    if one.verdict == "right":
        return f"{one.kernel}: right"
    if one.verdict == "failed":
        return f"{one.kernel}: FAILED: {one.why}"
    return f"{one.kernel}: checksum right, not run: {one.why}"


def _runnable(source: KernelCache | Pack, record: Record, untrusted: str | None) -> Path:
    """The path of a kernel's binary; raises `BadInput` for a wrong checksum, `NotRun` where it must not run."""
    binary, key = source.binary_path(record), record.key
    if why := key.why_not_current:
        raise NotRun(f"{why}; tune it again")
    if key.device.kind == "cuda" and not cuda_available():
        raise NotRun("no NVIDIA GPU is visible")
    if why := why_cannot_run(key.device.arch, detect_device(key.device.kind)):
        raise NotRun(why)
    if untrusted:
        raise NotRun(f"{untrusted}; to run it, say --trust-binaries")
    return binary


def check_numerics(binary: Path, problem: Problem, threads: int) -> None:
    """Run a kernel and compare it with its float64 reference; raises if it is wrong. A task for a `Worker`."""
    torch.set_num_threads(threads)
    tokens = min(problem.tokens, MOST_TOKENS)
    kernel = LoadedKernel(binary, problem)
    numerics.verify(kernel, numerics.inputs_for(kernel, tokens, 0), tokens, seed=0)
