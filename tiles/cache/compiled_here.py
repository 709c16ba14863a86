"""Schedules compiled on the machine that runs them, and kept, so that the next process finds them."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from tiles.cache.cache import CacheCorrupt, KernelCache, Key, default_folder
from tiles.compiler import compile as compiler
from tiles.errors import BadInput
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.target import Device

Shelf = Literal["defaults", "recompiled"]
"""Folders inside the default cache folder, apart from tuned kernels, so that neither hides the other: the default
schedules, and those of other versions, of packs whose code is not trusted, and of the wheel."""

SHELVES: tuple[Shelf, ...] = get_args(Shelf)


class Built(NamedTuple):
    """A compiled kernel's file, whether an earlier call compiled it, and why it could not be kept, if so."""

    path: Path
    earlier: bool
    not_kept: str | None = None


def built_earlier(problem: Problem, schedule: Mapping[str, Any], here: Device, shelf: Shelf) -> Built | None:
    """The kernel of this schedule as this version compiled it before, for any token count; None where it has not."""
    wanted = Key.of(problem, here)
    private = [_private()] if _private.cache_info().currsize else []
    for kernels in (_kept(default_folder() / shelf), *private):
        if kernels.why_untrusted:
            continue
        for record in kernels.records():
            if replace(record.key, tokens=wanted.tokens) == wanted and record.schedule == schedule:
                try:
                    return Built(kernels.binary_path(record), earlier=True)
                except CacheCorrupt:
                    continue
    return None


def build(problem: Problem, schedule: Mapping[str, Any], here: Device, shelf: Shelf, torch_version: str) -> Built:
    """Compile a schedule for this machine and keep it; where the folder cannot be written, for this process alone.

    Raises what `tiles.compiler.compile.compile_kernel` raises.
    """
    made = kernel_spec(problem.op, problem.direction).schedule_from(schedule)
    artifact = compiler.compile_kernel(problem, made, here.target)
    provenance = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "torch": torch_version}
    entry: Any = (Key.of(problem, here), asdict(made), artifact.binary, artifact.source, {}, provenance)
    kept = _kept(default_folder() / shelf)
    if why := kept.why_untrusted:
        not_kept = why
    else:
        try:
            return Built(kept.binary_path(kept.put(*entry)), earlier=False)
        except BadInput as error:
            not_kept = str(error)
    private = _private()
    return Built(private.binary_path(private.put(*entry)), earlier=False, not_kept=not_kept)


@cache
def _kept(folder: Path) -> KernelCache:
    """One object a folder, as it remembers what it has read."""
    return KernelCache(folder, lazy=True)


@cache
def _private() -> KernelCache:
    """Where this process keeps what it can keep nowhere else; the folder goes when the process ends."""
    folder = tempfile.mkdtemp(prefix="mhc-tune-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return _kept(Path(folder))
