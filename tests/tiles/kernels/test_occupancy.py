"""Occupancy against CUDA's own calculator, `cuda_occupancy.h`, where the toolkit is installed."""

from __future__ import annotations

import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest

from tiles.kernels.limits import scratch_bytes
from tiles.kernels.occupancy import multiprocessor, occupancy
from tiles.target import CUDA_ARCHS, Target

KERNELS = list(
    product((32, 64, 96, 128, 320, 512, 1024), (16, 40, 64, 72, 96, 161, 255), (0, 1000, 24640, 49152, 98304))
)

CALCULATOR = """
#include <cstdio>
#include "cuda_occupancy.h"
int main() {
  int major, minor, warps, blocks, shared, optin, threads, registers, used;
  while (scanf("%d %d %d %d %d %d", &major, &minor, &warps, &blocks, &shared, &optin) == 6 &&
         scanf("%d %d %d", &threads, &registers, &used) == 3) {
    cudaOccDeviceProp device = {};
    device.computeMajor = major, device.computeMinor = minor, device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = 32 * warps, device.regsPerBlock = 65536, device.regsPerMultiprocessor = 65536;
    device.warpSize = 32, device.sharedMemPerBlock = 49152, device.sharedMemPerMultiprocessor = shared;
    device.numSms = 1, device.sharedMemPerBlockOptin = optin, device.reservedSharedMemPerBlock = 1024;
    cudaOccFuncAttributes kernel = {};
    kernel.maxThreadsPerBlock = 1024, kernel.numRegs = registers, kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN, kernel.maxDynamicSharedSizeBytes = used;
    cudaOccDeviceState state = {};
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    int failed = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, used);
    printf("%d\\n", failed ? -1 : result.activeBlocksPerMultiprocessor);
  }
}
"""


@pytest.fixture(scope="module")
def calculator(tmp_path_factory):
    headers = list(Path("/usr/local").glob("cuda*/include/cuda_occupancy.h"))
    if not headers or shutil.which("g++") is None:
        pytest.skip("cuda_occupancy.h or g++ is not here: there is nothing to compare with")
    folder = tmp_path_factory.mktemp("occupancy")
    (folder / "main.cpp").write_text(CALCULATOR)
    subprocess.run(["g++", f"-I{headers[0].parent}", "main.cpp", "-o", "calculator"], cwd=folder, check=True)
    return folder / "calculator"


@pytest.mark.parametrize("arch", [arch for arch in CUDA_ARCHS if arch not in ("sm_90", "sm_100")])
def test_blocks_equal_those_of_cudas_calculator(calculator, arch):
    limits, digits = multiprocessor(arch), arch.removeprefix("sm_").rstrip("a")
    kernels = [kernel for kernel in KERNELS if kernel[2] <= limits.shared_bytes - 1024]
    lines = (
        f"{digits[:-1]} {digits[-1]} {limits.warps} {limits.blocks} {limits.shared_bytes} {limits.shared_bytes - 1024} "
        f"{threads} {registers} {shared}"
        for threads, registers, shared in kernels
    )
    done = subprocess.run([calculator], input="\n".join(lines), capture_output=True, text=True, check=True)
    wanted = [int(line) for line in done.stdout.split()]
    assert len(wanted) == len(kernels)
    for kernel, want in zip(kernels, wanted, strict=True):
        assert occupancy(arch, *kernel).blocks == want, kernel


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="ptxas is not on PATH")
@pytest.mark.parametrize("arch", CUDA_ARCHS)
def test_warps_and_blocks_are_the_most_that_ptxas_takes(arch, tmp_path):
    """It warns of a kernel that asks for more threads or blocks to be resident than a multiprocessor holds."""
    limits = multiprocessor(arch)
    asked = {
        "as_many_blocks": (32, limits.blocks),
        "more_blocks": (32, limits.blocks + 1),
        "as_many_warps": (512, limits.warps // 16),
        "more_warps": (512, limits.warps // 16 + 1),
    }
    entries = (
        f".visible .entry {name}() .maxntid {threads}, 1, 1 .minnctapersm {blocks} {{ ret; }}"
        for name, (threads, blocks) in asked.items()
    )
    (tmp_path / "k.ptx").write_text("\n".join([f".version 9.0\n.target {arch}\n.address_size 64", *entries]))
    said = subprocess.run(["ptxas", f"-arch={arch}", "k.ptx"], cwd=tmp_path, capture_output=True, text=True, check=True)
    warned = {name for name in asked if f"for entry {name} is out of range" in said.stdout + said.stderr}
    assert warned == {"more_blocks", "more_warps"}


@pytest.mark.parametrize("arch", CUDA_ARCHS)
def test_a_block_may_have_what_a_multiprocessor_has_less_the_systems_part(arch):
    assert scratch_bytes(Target("cuda", arch)) == multiprocessor(arch).shared_bytes - 1024


@pytest.mark.parametrize("arch", CUDA_ARCHS)
def test_every_architecture_has_limits_and_shares_lie_between_none_and_all(arch):
    for kernel in KERNELS:
        found = occupancy(arch, *kernel)
        assert 0 <= found.percent <= 100
        assert found.warps <= multiprocessor(arch).warps


def test_what_limits_is_named():
    assert occupancy("sm_90a", 128, 32, 0).limited_by == "warps"
    assert occupancy("sm_90a", 32, 32, 0).limited_by == "blocks"
    assert occupancy("sm_90a", 128, 200, 0).limited_by == "registers"
    assert occupancy("sm_90a", 128, 32, 100_000).limited_by == "shared memory"
