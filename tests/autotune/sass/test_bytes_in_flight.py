"""The look at bytes in flight: its arithmetic on written code, and real code where a compiler and disassembler are."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from sass_text import code_of, printed

from autotune.measuring.resource_check import resource_usage
from autotune.sass import bytes_in_flight
from autotune.sass.bytes_in_flight import GPUS, KernelLook, least_ratio, look, look_at
from autotune.sass.disassembler import NotDisassembled, find_disassembler
from autotune.sass.launches import Launch
from tiles.compiler.compile import Artifact, compile_kernel
from tiles.compiler.cuda_launcher import IMAGE, Plan, with_cuda_launcher
from tiles.compiler.cuda_launcher import Launch as Planned
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import TOKENS, Argument, Problem
from tiles.target import Target

TWO_LOADS = "LDG.E.128 R4, desc[UR4][R2.64]\nLDG.E.128 R8, desc[UR4][R2.64+0x10]\nBAR.SYNC 0x0\nFADD R0, R4, R8\nEXIT"
HOPPER = Target("cuda", "sm_90a")
needs_compiler = pytest.mark.skipif(
    shutil.which("nvcc") is None or find_disassembler() is None, reason="nvcc or nvdisasm is not here"
)


def seen(
    body: str = TWO_LOADS, blocks: int = 10**6, threads: int = 256, shared: int = 0, arch: str = "sm_90a"
) -> KernelLook:
    return look_at(code_of(body), Launch("toy", blocks, threads, shared), arch)


@pytest.mark.parametrize("text", ["", "what another version prints", printed(TWO_LOADS, name="another_kernel")])
def test_what_is_not_understood_is_one_line(monkeypatch, text):
    monkeypatch.setattr(bytes_in_flight, "disassembled", lambda binary: text)
    monkeypatch.setattr(bytes_in_flight, "launches", lambda source, tokens: [Launch("toy", 1, 32, 0)])
    with pytest.raises(NotDisassembled, match="nvdisasm prints what is not understood here: KeyError"):
        look(Artifact(HOPPER, "", b"", {}), 4096)


@pytest.mark.parametrize(("arch", "needed"), [("sm_80", 20370), ("sm_90a", 40000), ("sm_100a", 59459)])
def test_a_multiprocessor_needs_its_share_of_bandwidth_times_latency(arch, needed):
    assert round(GPUS[arch].needed_bytes) == needed


def test_what_all_resident_threads_have_in_flight_is_compared_with_the_need():
    """32 registers: eight blocks of 256 threads fill a multiprocessor, with 32 bytes each."""
    assert seen().as_json() == {
        "name": "toy",
        "threads": 256,
        "registers": 32,
        "shared_bytes": 0,
        "resident_blocks": 8,
        "resident_warps": 64,
        "load_bytes": {16: 32},
        "thread_loads": 2,
        "thread_bytes": 32,
        "in_loop": False,
        "barriers": 1,
        "bulk": 0,
        "blocks": 10**6,
        "wave_blocks": 8 * 132,
        "waves": 946.97,
        "in_flight_bytes": 65536,
        "needed_bytes": 40000,
        "ratio": 1.638,
    }


def test_shared_memory_limits_the_blocks():
    found = seen(shared=100 * 1024)
    assert (found.shared_bytes, found.resident_blocks, found.in_flight_bytes) == (100 * 1024, 2, 2 * 256 * 32)


def test_a_launch_of_less_than_a_wave_has_less_in_flight():
    assert seen(blocks=8 * 132).in_flight_bytes == 65536
    assert (seen(blocks=2 * 132).waves, seen(blocks=2 * 132).in_flight_bytes) == (0.25, 16384)


def test_what_is_not_known_is_left_out():
    unknown = seen(arch="sm_89").as_json()
    assert unknown["in_flight_bytes"] == 6 * 256 * 32
    assert unknown.keys().isdisjoint({"wave_blocks", "waves", "needed_bytes", "ratio"})
    bulk = seen(f"UBLKCP [UR4], [UR6], UR8\n{TWO_LOADS}").as_json()
    assert bulk["bulk"] == 1
    assert bulk.keys().isdisjoint({"thread_bytes", "thread_loads", "in_flight_bytes", "ratio"})


def test_the_least_ratio_is_that_of_a_kernel_that_reads_vectors():
    slow, few = seen(), seen(TWO_LOADS.replace(".128", ""))
    fast = seen(TWO_LOADS.replace("FADD", "LDG.E.128 R12, desc[UR4][R2.64]\nFADD"))
    assert few.ratio < slow.ratio < fast.ratio
    assert least_ratio([few, fast, slow]) == slow.ratio
    assert least_ratio([few]) == few.ratio
    assert least_ratio([seen("UBLKCP [UR4], [UR6], UR8\nEXIT")]) is None
    assert least_ratio([]) is None


PLAN = Plan((Planned("toy", ("x", "tokens"), ("((tokens + INT64_C(3)) / INT64_C(4))", "1", "1"), (128, 1, 1), 2048),))
ARGUMENTS = (Argument("x", (TOKENS, 8), "bfloat16", "input"),)


def test_an_artifact_is_looked_at_kernel_by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed("NOP\nEXIT", "another") + printed(TWO_LOADS, registers=64, shared=1024 + 256)
    monkeypatch.setattr(bytes_in_flight, "disassembled", {b"library": text}.__getitem__)
    artifact = Artifact(HOPPER, with_cuda_launcher("", PLAN, ARGUMENTS), b"library")
    (found,) = look(artifact, 4096)
    assert (found.name, found.threads, found.blocks) == ("toy", 128, 1024)
    assert (found.registers, found.shared_bytes, found.resident_blocks) == (64, 2048 + 256, 8)


TOY = """
extern "C" __global__ void __launch_bounds__(128) toy(float4 *x, int tokens) {
  __shared__ float between[128];
  const float4 *of = x + 2 * (blockIdx.x * 128 + threadIdx.x);
  const float4 one = of[0], two = of[1];
  between[threadIdx.x] = one.x + two.y + one.z * two.w + one.y + two.x;
  __syncthreads();
  x[threadIdx.x].x = between[127 - threadIdx.x] * tokens;
}
"""


def built(folder: Path, arch: str) -> Artifact:
    """A kernel of two loads of 16 bytes and a barrier, with its launcher."""
    source = with_cuda_launcher(TOY, PLAN, ARGUMENTS)
    (folder / "toy.cu").write_text(source)
    subprocess.run(["nvcc", "-cubin", f"-arch={arch}", "toy.cu", "-o", IMAGE], cwd=folder, check=True)
    host = ["g++", "-x", "c++", "-std=c++17", "-fPIC", "-shared", "toy.cu", "-o", "toy.so", "-ldl", "-pthread"]
    subprocess.run(host, cwd=folder, check=True)
    return Artifact(Target("cuda", arch), source, (folder / "toy.so").read_bytes())


@needs_compiler
@pytest.mark.parametrize("arch", ["sm_90a", *(pytest.param(a, marks=pytest.mark.slow) for a in ("sm_80", "sm_100a"))])
def test_compiled_code_is_seen_as_it_was_written(tmp_path: Path, arch: str) -> None:
    (found,) = look(built(tmp_path, arch), 4096)
    assert (found.name, found.threads, found.blocks, found.shared_bytes) == ("toy", 128, 1024, 2048 + 512)
    assert (found.load_bytes, found.thread_loads, found.thread_bytes) == ({16: 32}, 2, 32)
    assert (found.in_loop, found.barriers, found.bulk) == (False, 1, 0)
    assert 8 <= found.registers <= 40


@pytest.mark.slow
@needs_compiler
def test_a_default_schedule_is_seen_with_the_resources_that_the_compiler_reports() -> None:
    problem, spec = Problem("aggregate", "backward", 4, 1280, "bfloat16", 4096), kernel_spec("aggregate", "backward")
    artifact = compile_kernel(problem, spec.default(problem, HOPPER), HOPPER)
    usage = resource_usage(artifact)
    assert usage
    looks = look(artifact, problem.tokens)
    assert (usage.threads, usage.registers, usage.shared_bytes, usage.resident_blocks) in [
        (each.threads, each.registers, each.shared_bytes, each.resident_blocks) for each in looks
    ]
    main = max(looks, key=lambda each: each.thread_bytes or 0)
    assert main.loads_vectors
    assert main.ratio
