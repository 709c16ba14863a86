"""Runs CUDA text on this CPU, thread by thread, and watches what the threads do.

g++ compiles the text against the headers in `emulator`; its own launcher calls it; the emulator runs it in place of
NVIDIA's driver, every thread of a block as a coroutine. What threads share is checked as compute-sanitizer would:
races, waits that are missing, memory that is not theirs, barriers that not all reach.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tiles.compiler.cuda_launcher import ALIGNMENT, IMAGE, Plan, with_cuda_launcher
from tiles.kernels.reference_inputs import DTYPES
from tiles.kernels.spec import Argument
from tiles.runtime.loaded_kernel import flags_of, is_result

HERE = Path(__file__).parent
EMULATOR = HERE / "emulator"
HEADER = "device.h"
_NUMBERS = itertools.count()
_FOUND = 66
_GUARD = 4096
"""Bytes between tensors that belong to nobody."""

_KERNEL = re.compile(r'^extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\([^)]*\) {', re.MULTILINE)
_PLACE = re.compile(r"@line (\d+)|@pc (0x[0-9a-f]+)")
_SHARED = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];")

# Instrumentation without its library: the emulator is told of every access, of a whole vector at once.
# Like nvcc it lets a text take the address of a temporary, as TileLang does for vectors of 32 bytes.
_DEVICE = ("-std=c++17", "-O1", "-fno-tree-sra", "-g1", "-w", "-fPIC", "-fpermissive", "-fno-strict-aliasing")
_DEVICE += ("-fsanitize=thread",)
_HOST = ("-std=c++17", "-fPIC")
# Jumps between stacks look wrong to a fortified longjmp.
_RUNTIME = ("-std=c++17", "-O2", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-Wl,-soname,libcuda.so.1")


class Found(AssertionError):
    """What the emulator says of a kernel, in one line."""


@dataclass(frozen=True)
class Way:
    """One way to run the same text: the order of threads and blocks, and whether asynchronous work is done at once or
    as late as its waits allow."""

    seed: int
    late: bool


WAYS = (Way(1, late=False), Way(2, late=True))


@dataclass(frozen=True)
class Movement:
    """What the warps of a kernel move between one place of the text and one tensor, or "shared" memory.

    Lanes of a warp that come to the place for the same time make one of the `requests`; `bytes` is what the lanes ask
    for. `taken` counts what that takes, 32-byte sectors of global memory or rounds of all 32 banks of shared memory;
    `least` what the requests' distinct bytes would fill.
    """

    kernel: str
    line: str
    tensor: str
    writes: bool
    requests: int
    lanes: int
    bytes: int
    least: int
    taken: int


def build_emulator(folder: Path) -> Path:
    """The library that stands in for NVIDIA's driver; the precompiled header of all texts lies beside it."""
    path, header = folder / "libcuda.so.1", folder / HEADER
    _run(["g++", *_RUNTIME, *map(str, sorted(EMULATOR.glob("*.cpp"))), "-o", str(path), "-ldl"])
    header.write_text(f'#include "{EMULATOR / HEADER}"\n')
    _run(["g++", *_DEVICE, "-x", "c++-header", str(header), "-o", f"{header}.gch"])
    return path


class Emulation:
    """A CUDA text that runs here.

    `overlapping`: tensors that thread blocks change in place while others may read there, which drop what they read;
    the order of blocks is by chance, so that results show whether they do.
    """

    def __init__(
        self,
        folder: Path,
        emulator: Path,
        text: str,
        plan: Plan,
        arguments: Sequence[Argument],
        overlapping: Sequence[str] = (),
    ) -> None:
        self._emulator, self._plan, self._overlapping = emulator, plan, overlapping
        self._arguments = arguments
        self._folder = folder / f"emulation-{next(_NUMBERS)}"
        self._folder.mkdir()
        self._library = _build(self._folder, emulator.with_name(HEADER), with_cuda_launcher(text, plan, arguments))

    def run(
        self, inputs: dict[str, Any], tokens: int, way: Way = WAYS[0], *, past: Mapping[str, int] | None = None
    ) -> dict[str, torch.Tensor]:
        """All results, which start out as NaN like all memory that nobody has written; raises `Found`.

        The tensors in `past` begin so many bytes past where vectors fit.
        """
        return self._run(inputs, tokens, way, False, past or {})[0]

    def movements(self, inputs: dict[str, Any], tokens: int) -> list[Movement]:
        """What a run moves; raises `Found`."""
        return self._run(inputs, tokens, WAYS[0], True, {})[1]

    def _run(
        self, inputs: dict[str, Any], tokens: int, way: Way, counted: bool, past: Mapping[str, int]
    ) -> tuple[dict[str, torch.Tensor], list[Movement]]:
        arguments = [argument for argument in self._arguments if not argument.is_scalar]
        values = {argument.name: _value(argument, inputs, tokens) for argument in arguments}
        places, end = [], _GUARD
        for argument in arguments:
            size, begin = values[argument.name].nbytes, end + past.get(argument.name, 0)
            places.append((argument.name, begin, size, is_result(argument), argument.name in self._overlapping))
            end = _padded(begin + size) + _GUARD
        memory = torch.full((end,), 0xFF, dtype=torch.uint8)
        for name, at, size, *_ in places:
            memory[at : at + size] = values[name].contiguous().flatten().view(torch.uint8)
        file = self._folder / "memory"
        file.write_bytes(memory.numpy().tobytes())
        values_of = inputs | {flag: float(updated in inputs) for flag, updated in flags_of(self._arguments).items()}
        scalars = [values_of[argument.name] for argument in self._arguments if argument.is_scalar]
        job = {"tensors": places, "scalars": scalars, "tokens": tokens, "memory": str(file), "counted": counted}
        job |= self._workspace(tokens)
        said = self._call(job, way)
        memory = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
        results = {
            name: memory[at : at + size].clone().view(values[name].dtype).view(values[name].shape)
            for name, at, size, is_written, _ in places
            if is_written
        }
        tensors = ["shared", *(name for name, *_ in (*places, *job["workspace"]))]
        return results, [self._movement(line.split(), tensors) for line in said.splitlines()]

    def _movement(self, told: list[str], tensors: list[str]) -> Movement:
        kernel, site, tensor, writes, *counts = told
        number = int(site)
        place = f"@line {number & 0x7FFFFFFF}" if number >> 31 else f"@pc {number:#x}"
        line = _PLACE.sub(self._line, place)
        return Movement(kernel, line, tensors[int(tensor)], writes == "1", *map(int, counts))

    def _workspace(self, tokens: int) -> dict[str, Any]:
        """The tensors in it, cut as the launcher cuts it."""
        chunk = min(tokens, self._plan.chunk_tokens or tokens)
        chunks = -(-tokens // chunk) if chunk else 1
        most = self._plan.most_splits if self._plan.splits else 1
        parts = chunks * max(1, min(most, chunk // self._plan.split_tokens))
        sizes = [(name, _c_value(size, tokens=chunk)) for name, size in self._plan.workspace]
        for argument in self._arguments:
            if argument.role == "partial" and self._plan.splits:
                sizes.append((f"of_{argument.name}", parts * argument.nbytes(1) if parts > 1 else 0))
        places, end = [], 0
        for name, size in sizes:
            places.append((name, end, size, True, name in self._overlapping))
            end += _padded(size)
        return {"workspace": places, "workspace_bytes": end}

    def _call(self, job: dict[str, Any], way: Way) -> str:
        """What the child says."""
        job |= {"driver": str(self._emulator), "library": str(self._library), "seed": way.seed, "late": way.late}
        done = subprocess.run(
            [sys.executable, "-S", "-E", str(HERE / "emulated_child.py")],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == _FOUND:
            raise Found(_PLACE.sub(self._line, done.stderr.strip()))
        assert done.returncode == 0, f"status {done.returncode}: {done.stderr[-2000:]}"
        return done.stdout

    def _line(self, place: re.Match[str]) -> str:
        """A line of the text, for its number or a place in the library, which is behind a call."""
        if place[1]:
            return f"line {place[1]}"
        said = _run(["addr2line", "-i", "-e", str(self._library), hex(int(place[2], 16) - 1)])
        lines = re.findall(r"kernel\.cu:(\d+)", said)
        return f"line {lines[-1]}" if lines else said.split()[0]


def _value(argument: Argument, inputs: dict[str, Any], tokens: int) -> torch.Tensor:
    if argument.name in inputs:
        return inputs[argument.name]
    return torch.full(argument.sized(tokens), torch.nan, dtype=DTYPES[argument.dtype])


def _padded(size: int) -> int:
    """Where the next tensor may begin."""
    return -(-size // 256) * 256


def _c_value(expression: str, **names: int) -> int:
    """A C expression of whole numbers that are not negative."""
    return int(eval(expression.replace("/", "//"), {"INT64_C": int, **names}))


def _build(folder: Path, header: Path, source: str) -> Path:
    """The kernels, compiled as CUDA, and the launcher, compiled as C++, in one library."""
    library = folder / "kernel.so"
    device, _, host = source.partition("\n#else\n")
    announced = "".join(f"EMULATED_KERNEL({name})\n" for name in dict.fromkeys(_KERNEL.findall(device)))
    # Lines keep their numbers, so that a finding tells the text's own.
    device = re.sub(r"^#include <tl_templates/.*", "", device, flags=re.MULTILINE)
    device = _SHARED.sub(r"\1 *\2 = (\1 *)emulated_shared;", device)
    assert "__shared__" not in device, "static shared memory is not emulated"
    (folder / "kernel.cu").write_text(f"{device}\n{announced}#endif\n")
    # The launcher refuses misaligned tensors; here they reach the kernel, whose accesses are watched.
    unaligned = host.replace(f"% {ALIGNMENT})", "% 1)")
    assert unaligned != host
    (folder / "host.cpp").write_text(unaligned.rpartition("#endif")[0])
    (folder / IMAGE).write_bytes(b"no cubin")
    device_command = ["g++", *_DEVICE, "-include", str(header), "-x", "c++", "-c", "kernel.cu"]
    _run([*device_command, "-o", "kernel.o"], folder)
    _run(["g++", *_HOST, "-shared", "kernel.o", "host.cpp", "-o", str(library), "-ldl", "-pthread"], folder)
    return library


def _run(command: list[str], folder: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr[:3000]}"
    return done.stdout
