"""C++ functions of CPU programs, compiled and called by themselves."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import torch

from tiles.compiler.compile import CPU_FLAGS


def compiled(source: str, folder: Path) -> ctypes.CDLL:
    """A library of this source, for the machine at hand."""
    text, library = folder / "calls.cpp", folder / "calls.so"
    text.write_text(source)
    subprocess.run(["g++", *CPU_FLAGS, "-shared", "-march=native", str(text), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def pointers(*tensors: torch.Tensor) -> list[ctypes.c_void_p]:
    """Where they begin."""
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
