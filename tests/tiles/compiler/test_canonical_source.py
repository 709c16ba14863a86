"""CUDA text that does not depend on the process that generates it."""

from __future__ import annotations

import subprocess
import sys
from hashlib import sha256

import pytest

from tiles.compiler.canonical_source import canonical_source
from tiles.compiler.compile import generate_source
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.target import Target

TEXT = """__global__ void kernel(float* v_9) {
  extern __shared__ __align__(1024) uchar buf_dyn_shmem[];
  void* FIRST = ((void*)((char*)buf_dyn_shmem + 0));
  void* SECOND = ((void*)((char*)buf_dyn_shmem + 512));
  float v_3[1];
  ((float*)B)[0] = ((float*)A)[0] + v_3[0] + v_10[0];
}
"""


def text(first: str, second: str, a: str, b: str) -> str:
    return TEXT.replace("FIRST", first).replace("SECOND", second).replace("A)", f"{a})").replace("B)", f"{b})")


def test_buffers_are_named_in_the_order_of_their_use_and_places_are_sorted():
    assert canonical_source(text("v", "v_1", a="v", b="v_1")) == (
        "__global__ void kernel(float* v_9) {\n"
        "  extern __shared__ __align__(1024) uchar buf_dyn_shmem[];\n"
        "  // shared at 0 512\n"
        "  float v_3[1];\n"
        "  ((float*)shared_0)[0] = ((float*)shared_1)[0] + v_3[0] + v_10[0];\n"
        "}\n"
    )


def test_a_text_without_shared_memory_stays():
    assert canonical_source("int main() {}\n") == "int main() {}\n"


def test_names_and_places_that_change_from_run_to_run_leave_the_canonical_source_alone():
    forms = {
        canonical_source(text("v", "v_1", a="v", b="v_1")),
        canonical_source(text("v", "v_1", a="v_1", b="v")),
        canonical_source(text("workspace_2", "workspace", a="workspace", b="workspace_2")),
    }
    assert len(forms) == 1
    assert forms != {canonical_source(text("v", "v_1", a="v", b="v_1").replace("+ 512", "+ 1024"))}
    assert forms != {canonical_source(text("v", "v_1", a="v", b="v_1").replace("v_3[0] +", "v_3[0] -"))}


def digests() -> list[str]:
    """Of kernels that keep several buffers in shared memory."""
    found = []
    for op in ("merge", "coefficients"):
        spec, hopper = kernel_spec(op, "backward"), Target("cuda", "sm_90a")
        problem = spec.canonical(Problem(op, "backward", 2, 64, "bfloat16"))
        source = canonical_source(generate_source(spec, problem, spec.default(problem, hopper), hopper))
        found.append(sha256(source.encode()).hexdigest())
    return found


@pytest.mark.slow
def test_two_processes_generate_the_same():
    pytest.importorskip("tilelang")
    script = f"import runpy; junk = [object() for _ in range(12345)]; print(*runpy.run_path({__file__!r})['digests']())"
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    here, there = digests(), other.communicate()[0].split()
    assert other.returncode == 0
    assert len(set(here)) == 2
    assert here == there
