"""NVIDIA's disassembler: where it lies on this machine, and what it prints of a compiled kernel's code.

It reads compiled code and asks no GPU. Nothing here needs it but the look at a kernel's loads
(`autotune.sass.bytes_in_flight`).
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

NAME = "nvdisasm"
PACKAGES = ("nvidia-cuda-nvdisasm", "triton")
"""Python packages that carry one."""

HOW_TO_GET = f"pip install {PACKAGES[0]}, or put the bin folder of a CUDA toolkit on PATH"

_ELF, _CUDA = b"\x7fELF", 190
_HEADER = struct.Struct("<16xHHIQQQIHHHHHH")
"""The header of a 64-bit ELF file: type, machine, version, entry, offsets of segments and sections, flags, its own
size, size and number of segments, then of sections, and where the names are."""


class NotDisassembled(RuntimeError):
    """Code that no disassembler here reads; the text says why in one line."""


def disassembled(library: bytes) -> str:
    """What nvdisasm prints of the CUDA code in an artifact's shared library; raises `NotDisassembled`."""
    cubin = cubin_in(library)
    if cubin is None:
        raise NotDisassembled("the library carries no CUDA code")
    program = find_disassembler()
    if program is None:
        raise NotDisassembled(f"{NAME} is not here: {HOW_TO_GET}")
    with tempfile.TemporaryDirectory(prefix="mhc-tune-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        try:
            done = subprocess.run([program, str(path)], capture_output=True, check=False)
        except OSError as error:
            raise NotDisassembled(f"{program} does not start: {error}") from error
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise NotDisassembled(f"{program} does not read the code: {said[-1]}")
    return done.stdout.decode(errors="replace")


def cubin_in(library: bytes) -> bytes | None:
    """The CUDA code that a shared library carries in its data, or None."""
    at = library.find(_ELF)
    while at >= 0:
        if len(library) >= at + _HEADER.size:
            _, machine, _, _, segments, sections, _, _, *sizes, _ = _HEADER.unpack_from(library, at)
            if machine == _CUDA:
                end = max(segments + sizes[0] * sizes[1], sections + sizes[2] * sizes[3])
                return library[at : at + end]
        at = library.find(_ELF, at + 1)
    return None


@cache
def find_disassembler() -> str | None:
    """The disassembler on PATH, else that of a toolkit, else that of a Python package that is installed."""
    return next((found for place in _places() if (found := shutil.which(place))), None)


def _places() -> Iterator[str]:
    yield NAME
    if nvcc := shutil.which("nvcc"):
        yield str(Path(nvcc).resolve().with_name(NAME))
    if home := os.environ.get("CUDA_HOME"):
        yield str(Path(home) / "bin" / NAME)
    for package in PACKAGES:
        try:
            files = metadata.files(package) or []
        except metadata.PackageNotFoundError:
            continue
        yield from (str(file.locate()) for file in files if file.name == NAME)
