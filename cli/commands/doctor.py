"""`mhc-tune doctor`: tries what tuning, exporting and training need on this machine, and says what to do next."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import typer

from autotune.measuring.cpu_quota import cpu_quota
from cli.ui.output import show
from cli.ui.render import device_text, table
from tiles.cache.cache import KernelCache, Key, default_folder
from tiles.compiler.compile import compile_kernel, why_no_compiler
from tiles.compiler.toolchain import TILELANG
from tiles.errors import BadInput, one_line
from tiles.folders import keys_folder
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.pack.pack import Pack, write_pack
from tiles.pack.signing import own_key
from tiles.runtime.loaded_kernel import LoadedKernel, run_reference
from tiles.target import Target, cuda_available, detect_device

TRIED = Problem("aggregate", "forward", streams=2, width=16, tokens=3)
"""The kernel that is compiled and run: the cheapest."""


@dataclass(frozen=True)
class Finding:
    """One line of the report. `remedy` says what to do where something does not work; nothing `needed` may have one."""

    what: str
    found: str
    remedy: str | None = None
    needed: bool = True


def doctor() -> None:
    """Try this machine: compile and run a kernel, write and read a pack, and say how to fix what does not work.

    Ends with `ready`, or with what to do next and exit code 1 where kernels cannot be tuned here.
    """
    report = table("mhc-tune doctor", ("", "what"), ())
    report.add_column("found", overflow="fold")
    next_step: str | None = None
    for finding in _findings():
        mark = "ok" if finding.remedy is None else "NO" if finding.needed else "-"
        report.add_row(mark, finding.what, "\n".join(filter(None, (finding.found, finding.remedy))))
        next_step = next_step or (finding.remedy if finding.needed else None)
    show(report)
    typer.echo(f"next: {next_step}" if next_step else "ready: mhc-tune tune --help shows what to tune")
    if next_step:
        raise typer.Exit(1)


def _findings() -> Iterator[Finding]:
    cpu = detect_device("cpu")
    yield Finding("Python", platform.python_version())
    yield Finding("torch", torch.__version__)
    yield _tilelang()
    yield Finding("CPU", device_text(cpu))
    yield _threads()
    yield _compiler("compiler for this CPU", cpu.target, needed=True)
    yield _cache_folder()
    yield _keys()
    yield from _tried(cpu.target)
    yield from _gpu()


def _tilelang() -> Finding:
    try:
        found = version("tilelang")
    except PackageNotFoundError:
        return Finding("TileLang", "not installed", f"to tune or compile: pip install tilelang=={TILELANG}")
    wrong = found != TILELANG
    remedy = f"kernels need {TILELANG}: pip install tilelang=={TILELANG}" if wrong else None
    return Finding("TileLang", found, remedy)


def _threads() -> Finding:
    """torch's threads beside the CPUs that this process may use: more threads than CPUs wait for each other."""
    allowed, quota, threads = len(os.sched_getaffinity(0)), cpu_quota(), torch.get_num_threads()
    found = f"{threads} of torch's on {allowed} of {os.cpu_count()} CPUs"
    most = allowed
    if quota is not None:
        found += f", with a quota of {quota:g} CPUs"
        most = min(allowed, max(1, math.floor(quota)))
    remedy = f"kernels would wait for each other's threads: export OMP_NUM_THREADS={most}" if threads > most else None
    return Finding("threads", found, remedy, needed=False)


def _compiler(what: str, target: Target, *, needed: bool) -> Finding:
    why = why_no_compiler(target)
    return Finding(what, "missing" if why else f"builds for {target}", why, needed)


def _cache_folder() -> Finding:
    try:
        folder = default_folder()
    except BadInput as error:
        return Finding("cache folder", "unknown", str(error))
    nearest = _nearest(folder)
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        why = f"{nearest} cannot be written ({error.strerror})"
        return Finding("cache folder", str(folder), f"{why}: set MHC_TUNE_CACHE to a folder that can")
    cache = KernelCache(folder)
    found = f"{folder}: {len(cache.records())} kernels"
    if cache.complaints:
        return Finding("cache folder", found, f"{len(cache.complaints)} entries are corrupt: mhc-tune verify {folder}")
    return Finding("cache folder", found, cache.why_untrusted)


def _nearest(folder: Path) -> Path:
    """The folder itself, or what exists of those above it."""
    return next(parent for parent in (folder, *folder.parents) if os.path.exists(parent))  # noqa: PTH110


def _keys() -> Finding:
    """Whether packs can be signed; without it `export --unsigned` works."""
    remedy = "set MHC_TUNE_KEYS to a folder of your own, or export with --unsigned"
    try:
        folder = keys_folder()
        if folder is None:
            return Finding("signing key", "no home folder to keep it in", remedy, needed=False)
        if own_key(create=False):
            return Finding("signing key", str(folder))
        with tempfile.TemporaryFile(dir=_nearest(folder)):
            return Finding("signing key", f"made at the first export, in {folder}")
    except OSError as error:
        return Finding("signing key", f"{error.filename or 'its folder'}: {error.strerror}", remedy, needed=False)
    except BadInput as error:
        return Finding("signing key", str(error), remedy, needed=False)


def _tried(target: Target) -> Iterator[Finding]:
    """Compile and run a kernel, then write it to a pack and read that."""
    what = "a kernel, compiled and run"
    spec, device = kernel_spec(TRIED.op, TRIED.direction), detect_device("cpu")
    try:
        schedule = spec.default(TRIED, target)
        artifact = compile_kernel(TRIED, schedule, target)
        with tempfile.TemporaryDirectory(prefix="mhc-tune-") as folder:
            cache = KernelCache(Path(folder) / "cache")
            record = cache.put(Key.of(TRIED, device), asdict(schedule), artifact.binary, artifact.source, {}, {})
            inputs = spec.inputs(TRIED, TRIED.tokens, 0).values()
            results = zip(
                LoadedKernel(cache.binary_path(record), TRIED)(*inputs), run_reference(TRIED, *inputs), strict=True
            )
            if not all(torch.allclose(mine, right) for mine, right in results):
                yield Finding(what, "its result is wrong", "report this with the output of mhc-tune doctor")
                return
            yield Finding(what, f"{TRIED.describe()}, right")
            path = Path(folder) / "tried.mhcpack"
            write_pack(cache, path, signed=False)
            with Pack(path) as pack:
                pack.binary(pack.records()[0])
            yield Finding("a pack, written and read", f"{path.stat().st_size} bytes")
    except Exception as error:  # whatever keeps a kernel from running is what this command is to find
        yield Finding(what, "it fails", one_line(error))


def _gpu() -> Iterator[Finding]:
    """The GPU, or what a machine with one needs beside all this."""
    compiler = _compiler("compiler for GPUs", Target("cuda", "sm_90a"), needed=False)
    if cuda_available():
        yield Finding("GPU", device_text(detect_device("cuda")))
        yield compiler
        return
    missing = [] if torch.version.cuda else ["a build of torch for CUDA"]
    missing.append("a GPU that this process may see (CUDA_VISIBLE_DEVICES)" if _has_driver() else "NVIDIA's driver")
    if shutil.which("nvcc") is None:
        missing.append("nvcc of the CUDA toolkit, to tune")
    yield Finding("GPU", f"none: kernels run on the CPU. A GPU host needs also: {', '.join(missing)}")


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
