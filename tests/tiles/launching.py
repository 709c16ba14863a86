"""Runs launchers against the fake driver."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tiles.compiler.cuda_launcher import IMAGE, Plan, with_cuda_launcher
from tiles.kernels.spec import Argument

HERE = Path(__file__).parent
WORKSPACE = 0xF0000
"""Where jobs say that their workspace is."""


IMAGE_BYTES = bytes(range(1, 17))
"""What stands for a cubin."""


def build_launcher(folder: Path, plan: Plan, arguments: Sequence[Argument]) -> Path:
    """A library of the host part alone."""
    folder.mkdir(exist_ok=True)
    (folder / IMAGE).write_bytes(IMAGE_BYTES)
    (folder / "kernel.cpp").write_text(with_cuda_launcher("this is no C++ at all", plan, arguments))
    command = ["g++", "-std=c++17", "-Wall", "-Werror", "-fPIC", "-shared", "kernel.cpp", "-o", "kernel.so"]
    subprocess.run([*command, "-ldl", "-pthread"], cwd=folder, check=True)
    return folder / "kernel.so"


def build_driver(folder: Path, *options: str) -> str:
    """The fake, under the real one's SONAME. It uses CUDA's own header where there is one."""
    path = folder / "libcuda.so.1"
    include = [f"-I{found}" for found in Path("/usr/local").glob("cuda*/include")]
    command = ["g++", "-std=c++17", "-fPIC", "-shared", "-Wl,-soname,libcuda.so.1", *include, *options]
    subprocess.run([*command, str(HERE / "fake_driver.cpp"), "-o", str(path)], check=True)
    return str(path)


def launched(driver: str, jobs: list[dict]) -> list[list[dict]]:
    done = subprocess.run(
        [sys.executable, str(HERE / "fake_launch.py"), driver],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def call(tokens: int | None, stream: int = 0, device: int = 0, **more: int) -> dict:
    """A call from a thread whose context is of the tensors' device; of `mhc_load` where there are no tokens."""
    given = {"tokens": tokens, "stream": stream, "device": device, "context": device}
    return given | {"thread": 0, "failure": 0, "capturing": 0} | more


def job(library: str, *calls: dict | int, **more) -> dict:
    """Calls of a library; `parameters` tells how many a kernel takes, by name."""
    return {
        "library": library,
        "tensors": [0xA000, 0xB000],
        "scalars": [0.5],
        "parameters": {},
        "workspace": WORKSPACE,
        "calls": [call(given) if isinstance(given, int) else given for given in calls],
    } | more
