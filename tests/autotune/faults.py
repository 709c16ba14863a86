"""Faulty kernels as real shared objects: a schedule names a fault, and compiles to code with it.

All claim to be aggregate forward at n = 2, C = 64.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path

from tiles.compiler.compile import Artifact
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem

PROBLEM = Problem("aggregate", "forward", 2, 64, tokens=64)

FOLDER = "FAULTS_FOLDER"
"""Environment variable: where faults leave word of what they do."""

HEADER = """
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
extern "C" int32_t mhc_launch(void **tensors, const float *scalars, int64_t tokens, int32_t slices) {
"""

# u[t, c] = Σ_i pre[t, i] x[t, i, c], on one slice of tokens.
RIGHT = """
  const float *x = (float *)tensors[0], *pre = (float *)tensors[1];
  float *u = (float *)tensors[2];
  for (int64_t t = 0; t < tokens; ++t)
    for (int c = 0; c < 64; ++c)
      u[t * 64 + c] = pre[t * 2] * x[t * 128 + c] + pre[t * 2 + 1] * x[t * 128 + 64 + c];
"""

SLOW = RIGHT + "usleep(2000);"

ENDLESS = b"this kernel never ends"
"""Stands in its binary."""

WAIT_TO_BE_KILLED = """
  FILE *word = fopen("FOLDER/NAME", "a");
  fprintf(word, "%d\\n", (int)getpid());
  fclose(word);
  for (;;) sleep(1);
"""

BODIES = {
    "slow": SLOW,
    "right": RIGHT,
    "wrong": RIGHT.replace("t * 2 + 1", "t * 2"),
    "nan": RIGHT + "if (tokens > 1) u[64] = 0.0f / 0.0f * x[0];",
    "past-the-end": RIGHT + "if (tokens > 0) u[tokens * 64 + 5] += 1;",
    "segmentation-fault": "*(volatile int *)0 = 1;",
    "abort": "abort();",
    "endless-loop": f'static volatile char forever[] = "{ENDLESS.decode()}"; while (forever[0]) {{}}',
    "30-GB": """
  const size_t size = 30ull << 30;
  volatile char *all = new char[size];
  for (size_t byte = 0; byte < size; byte += 4096) all[byte] = 1;
""",
    "killed-once": 'if (access("FOLDER/NAME", F_OK) != 0) {' + WAIT_TO_BE_KILLED + "}" + RIGHT,
    "killed-twice": WAIT_TO_BE_KILLED,
    # What goes wrong in these is the compiler.
    "compiler-hangs": RIGHT,
    "compiler-killed-once": RIGHT + ";",
    "compiler-takes-30-GB": RIGHT,
    "does-not-compile": "no such thing;",
}


@dataclass(frozen=True)
class Fault:
    """The schedule."""

    name: str


def spec_of(names):
    """The kernel whose schedules are these faults; the default is `slow`."""
    return replace(
        kernel_spec("aggregate", "forward"),
        schedules=(Fault,),
        default=lambda problem, target: Fault("slow"),
        space=lambda problem, target: {"name": names},
        why_invalid=lambda problem, schedule, target: None,
    )


def code(name: str) -> str:
    """The C++ text of a faulty kernel."""
    body = BODIES[name].replace("FOLDER", os.environ.get(FOLDER, "")).replace("NAME", name)
    return f"{HEADER}{body}\n  return 0;\n}}\n"


def compile_faulty(problem, schedule, target):
    """In place of `tiles.compiler.compile.compile_kernel`, run by worker processes."""
    folder = Path(os.environ[FOLDER])
    if schedule.name == "compiler-hangs":
        # g++ waits for its cc1plus, which waits for a writer of the pipe.
        os.mkfifo(folder / "never.cpp")
        built(folder / "never.cpp")
    if schedule.name == "compiler-killed-once" and not (folder / schedule.name).exists():
        (folder / schedule.name).write_text(f"{os.getpid()}\n")
        time.sleep(1000)
    if schedule.name == "compiler-takes-30-GB":
        bytearray(30 * 2**30)
    text = folder / f"{schedule.name}.cpp"
    text.write_text(code(schedule.name))
    return Artifact(target, text.read_text(), built(text))


def built(text: Path) -> bytes:
    """The shared library that a C++ file makes."""
    library = text.with_suffix(".so")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "c++"
    command = [compiler, "-shared", "-fPIC", "-O1", str(text), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"g++ failed: {done.stderr}")
    return library.read_bytes()
