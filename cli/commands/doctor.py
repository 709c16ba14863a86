"""`mhc-tune doctor`: a check of this machine's device, compilers and kernel cache."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
import typer

from cli.ui.output import show
from cli.ui.render import device_text, table
from tiles.cache.cache import KernelCache, default_folder
from tiles.compiler.compile import why_no_compiler
from tiles.compiler.toolchain import TILELANG
from tiles.target import Target, cuda_available, detect_device


@dataclass(frozen=True)
class Finding:
    """One line of the report; `remedy` says what to do if something does not work."""

    what: str
    found: str
    remedy: str | None = None


def doctor() -> None:
    """Check this machine's device, compilers and kernel cache, and say how to fix what does not work.

    Exits with 1 when kernels cannot be tuned here.
    """
    findings = list(_findings())
    report = table("mhc-tune doctor", ("", "what", "found"), ())
    report.add_column("what to do", overflow="fold")
    for finding in findings:
        report.add_row("no" if finding.remedy else "ok", finding.what, finding.found, finding.remedy or "")
    show(report)
    needed = ("TileLang", "compiler for this CPU", "cache folder")
    if any(finding.remedy for finding in findings if finding.what in needed):
        raise typer.Exit(1)


def _findings() -> Iterator[Finding]:
    cpu = detect_device("cpu")
    yield Finding("Python", platform.python_version())
    yield Finding("torch", torch.__version__)
    yield _tilelang()
    yield Finding("CPU", device_text(cpu))
    yield Finding("threads", f"{torch.get_num_threads()} of {os.cpu_count()}")
    yield _compiler("compiler for this CPU", cpu.target)
    yield _gpu()
    yield _compiler("compiler for GPUs", Target("cuda", "sm_90a"))
    yield _cache_folder()


def _tilelang() -> Finding:
    try:
        found = version("tilelang")
    except PackageNotFoundError:
        return Finding("TileLang", "not installed", f"to tune or compile: pip install tilelang=={TILELANG}")
    wrong = found != TILELANG
    remedy = f"kernels need {TILELANG}: pip install tilelang=={TILELANG}" if wrong else None
    return Finding("TileLang", found, remedy)


def _compiler(what: str, target: Target) -> Finding:
    why = why_no_compiler(target)
    return Finding(what, "missing" if why else f"builds for {target}", why)


def _gpu() -> Finding:
    if not cuda_available():
        return Finding("GPU", "none visible to torch: kernels run on the CPU")
    return Finding("GPU", device_text(detect_device("cuda")))


def _cache_folder() -> Finding:
    folder = default_folder()
    cache = KernelCache(folder)
    found = f"{folder}: {len(cache.records())} kernels"
    if cache.complaints:
        return Finding("cache folder", found, f"{len(cache.complaints)} entries are corrupt: mhc-tune verify {folder}")
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        return Finding("cache folder", found, "it cannot be written: set MHC_TUNE_CACHE to a folder that can")
    return Finding("cache folder", found)
