"""`mhc-tune verify`: are the kernels of a folder or pack whole, and right on this device?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from autotune.measuring import verify as numerics
from autotune.processes.worker import TaskFailed, Worker
from cli.commands.packs import PATH_HELP, TrustOption, open_shelf, warn
from cli.ui.options import JsonOption
from cli.ui.output import say, show_json
from tiles.cache.cache import KernelCache
from tiles.cache.record import Record
from tiles.errors import BadInput
from tiles.kernels.spec import Problem
from tiles.pack.pack import Pack
from tiles.runtime.loaded_kernel import LoadedKernel
from tiles.target import cuda_available, detect_device, why_cannot_run

MOST_TOKENS = 512
"""Tokens of the largest check: enough for several slices a thread, few enough for the float64 reference."""

PATIENCE = 300.0
"""Seconds that the check of one kernel may take."""


@dataclass(frozen=True)
class Verdict:
    """One kernel: right; whole, but not run here; or wrong. `why` says what is wrong, or why it was not run."""

    kernel: str
    digest: str
    verdict: Literal["right", "not run", "failed"]
    why: str | None = None


class NotRun(Exception):
    """A kernel's numerics cannot or may not be checked here; the text says why."""


def verify(
    path: Annotated[Path, typer.Argument(help=PATH_HELP)],
    trust_binaries: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Check every kernel's checksum, then run it here and compare with a float64 reference.

    Kernels of another device or version get the checksum alone, and so does code that you have no reason to trust
    (see mhc-tune keys). Exits with 1 when a check fails.
    """
    shelf = open_shelf(path)
    records = shelf.records()
    warn(shelf.complaints)
    if not records and not shelf.complaints:
        raise BadInput(f"PATH must hold kernels, found none in {path}: run mhc-tune tune")
    untrusted = None if trust_binaries else shelf.why_untrusted
    verdicts: list[Verdict] = []
    worker = Worker()  # what a kernel does to its process is no harm here
    try:
        for record in records:
            verdicts.append(_verdict(shelf, record, untrusted, worker))
            say(_line(verdicts[-1]))
    finally:
        worker.kill()
    count = {name: sum(one.verdict == name for one in verdicts) for name in ("right", "not run", "failed")}
    count["failed"] += len(shelf.complaints)
    say(
        f"{len(records) + len(shelf.complaints)} kernels: {count['right']} right, {count['not run']} not run, "
        f"{count['failed']} failed"
    )
    if json:
        kernels = [asdict(one) for one in verdicts]
        show_json({"path": str(path), **count, "kernels": kernels, "corrupt": list(shelf.complaints)})
    if count["failed"]:
        raise typer.Exit(1)


def _verdict(shelf: KernelCache | Pack, record: Record, untrusted: str | None, worker: Worker) -> Verdict:
    name, digest = record.key.problem.describe(), record.key.digest
    try:
        binary = _runnable(shelf, record, untrusted)
        worker.call(PATIENCE, check_numerics, binary, record.key.problem, torch.get_num_threads())
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


def _runnable(shelf: KernelCache | Pack, record: Record, untrusted: str | None) -> Path:
    """A kernel's binary, its checksum checked; raises `BadInput` where that is wrong, and `NotRun`."""
    binary, key = shelf.binary_path(record), record.key
    if why := key.why_not_current:
        raise NotRun(f"{why}; tune it again")
    if key.device.kind == "cuda" and not cuda_available():
        raise NotRun("no NVIDIA GPU is visible")
    if why := why_cannot_run(key.device.arch, detect_device(key.device.kind)):
        raise NotRun(why)
    if untrusted:
        raise NotRun(f"{untrusted}; or say --trust-binaries")
    return binary


def check_numerics(binary: Path, problem: Problem, threads: int) -> None:
    """Run a kernel against its float64 reference; raises what is wrong. A task for a `Worker`."""
    torch.set_num_threads(threads)
    tokens = min(problem.tokens, MOST_TOKENS)
    kernel = LoadedKernel(binary, problem)
    numerics.verify(kernel, numerics.inputs_for(kernel, tokens, 0), tokens, seed=0)
