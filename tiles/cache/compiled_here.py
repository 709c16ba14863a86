"""Kernels compiled on the machine that runs them, and stored for the next process."""

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

Subfolder = Literal["defaults", "recompiled"]
"""Caches inside the default cache folder, apart from the tuned kernels so that neither hides the other: default
schedules; schedules of other versions, of packs whose code is not trusted, and of the wheel."""

SUBFOLDERS: tuple[Subfolder, ...] = get_args(Subfolder)


class CompiledKernel(NamedTuple):
    """A shared library compiled here: its file, whether it was `cached`, and why it could not be stored, if so."""

    path: Path
    cached: bool
    why_not_stored: str | None = None


def find_compiled(
    problem: Problem, schedule: Mapping[str, Any], here: Device, subfolder: Subfolder
) -> CompiledKernel | None:
    """The kernel of this schedule as this version has compiled it, for any token count; None where it has not."""
    # What is compiled is stored with all fields; a record from before one was added lacks it.
    wanted, schedule = Key.of(problem, here), asdict(_schedule_from(problem, schedule))
    own = [_process_cache()] if _process_cache.cache_info().currsize else []
    for kernels in (_cache_at(default_folder() / subfolder), *own):
        if kernels.why_untrusted:
            continue
        for record in kernels.records():
            if replace(record.key, tokens=wanted.tokens) == wanted and record.schedule == schedule:
                try:
                    return CompiledKernel(kernels.binary_path(record), cached=True)
                except CacheCorrupt:
                    continue
    return None


def compile_and_store(
    problem: Problem, schedule: Mapping[str, Any], here: Device, subfolder: Subfolder, torch_version: str
) -> CompiledKernel:
    """Compile a schedule for this machine and store it; for this process alone where the folder cannot be written.

    Raises what `tiles.compiler.compile.compile_kernel` raises.
    """
    made = _schedule_from(problem, schedule)
    artifact = compiler.compile_kernel(problem, made, here.target)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    provenance = {"date": date, "torch": torch_version, **artifact.made_with}
    entry: Any = (Key.of(problem, here), asdict(made), artifact.binary, artifact.source, {}, provenance)
    kernels = _cache_at(default_folder() / subfolder)
    why = kernels.why_untrusted
    if why is None:
        try:
            return CompiledKernel(kernels.binary_path(kernels.put(*entry)), cached=False)
        except BadInput as error:
            why = str(error)
    own = _process_cache()
    return CompiledKernel(own.binary_path(own.put(*entry)), cached=False, why_not_stored=why)


def _schedule_from(problem: Problem, values: Mapping[str, Any]) -> Any:
    return kernel_spec(problem.op, problem.direction).schedule_from(values)


@cache
def _cache_at(folder: Path) -> KernelCache:
    """One object a folder, as it remembers what it has parsed."""
    return KernelCache(folder, lazy=True)


@cache
def _process_cache() -> KernelCache:
    """A temporary cache for kernels that cannot be stored elsewhere; it is deleted when the process ends."""
    folder = tempfile.mkdtemp(prefix="mhc-tune-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return _cache_at(Path(folder))
