"""What a CUDA kernel's launcher asks of the driver: a fake driver keeps it. No GPU, and no nvcc, is needed here."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from launching import job, launched

from tiles.cuda_launcher import IMAGE, NO_DRIVER, OLD_DRIVER, TOO_MANY_TOKENS, Launch, with_cuda_launcher
from tiles.family import TOKENS, Argument

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on PATH: no launcher can be built")

ARGUMENTS = (
    Argument("x", (TOKENS, 8), "bfloat16", "input"),
    Argument("eps", (), "float32", "scalar"),
    Argument("out", (8,), "float32", "partial"),
)
LAUNCH = Launch(
    kernel="toy_kernel",
    parameters=("out", "x", "eps", "splits", "tokens"),
    grid=("((tokens + INT64_C(15)) / INT64_C(16))", "splits", "1"),
    block=(128, 1, 1),
    shared_bytes=100 * 1024,
)
IMAGE_BYTES = bytes(range(1, 17))


def built(folder: Path, launch: Launch = LAUNCH) -> str:
    """A library of the host part alone, around bytes that stand for a cubin."""
    folder.mkdir(exist_ok=True)
    (folder / IMAGE).write_bytes(IMAGE_BYTES)
    (folder / "kernel.cpp").write_text(with_cuda_launcher("this is no C++ at all", launch, ARGUMENTS))
    command = ["g++", "-std=c++17", "-Wall", "-Werror", "-fPIC", "-shared", "kernel.cpp", "-o", "kernel.so"]
    subprocess.run([*command, "-ldl", "-pthread"], cwd=folder, check=True)
    return str(folder / "kernel.so")


def test_it_launches_the_named_kernel_of_its_image_on_the_given_stream(driver, tmp_path):
    ((record,),) = launched(driver, [job(built(tmp_path), (37, 3, 0x55, 0))])
    assert record["status"] == 0
    assert (record["name"], bytes(record["image"])) == ("toy_kernel", IMAGE_BYTES)
    assert record["kernel"] == 0x22
    assert record["stream"] == 0x55
    assert record["grid"] == [3, 3, 1]
    assert record["block"] == [128, 1, 1]
    assert record["shared"] == 100 * 1024
    assert record["cluster"] == [0, 0, 0]


def test_parameters_arrive_in_the_kernels_order(driver, tmp_path):
    ((record,),) = launched(driver, [job(built(tmp_path), (37, 3, 0, 0))])
    out, x, eps, splits, tokens = record["parameters"][:5]
    assert (out, x) == (0xB000, 0xA000)
    assert struct.unpack("<f", struct.pack("<Q", eps)[:4]) == (0.5,)
    assert (splits & 0xFFFFFFFF, tokens & 0xFFFFFFFF) == (3, 37)


def test_code_is_loaded_once_and_shared_memory_allowed_once_a_device(driver, tmp_path):
    calls = [(16, 1, 0, 0), (16, 1, 0, 0), (16, 1, 0, 5), (16, 1, 0, 0), (16, 1, 0, 5)]
    (records,) = launched(driver, [job(built(tmp_path), *calls)])
    assert [record["libraries"] for record in records] == [1] * 5
    assert [record["attributes"] for record in records] == [1, 1, 2, 2, 2]
    assert [record["launches"] for record in records] == [1, 2, 3, 4, 5]
    last = records[-1]
    assert (last["attribute"], last["attribute_value"], last["attribute_device"]) == (8, 100 * 1024, 5)


def test_little_shared_memory_needs_no_permission(driver, tmp_path):
    small = Launch(LAUNCH.kernel, LAUNCH.parameters, LAUNCH.grid, LAUNCH.block, 48 * 1024)
    ((record,),) = launched(driver, [job(built(tmp_path, small), (16, 1, 0, 0))])
    assert (record["attributes"], record["launches"]) == (0, 1)


def test_clusters_are_asked_for(driver, tmp_path):
    clustered = Launch(LAUNCH.kernel, LAUNCH.parameters, LAUNCH.grid, LAUNCH.block, 0, cluster=(4,))
    ((record,),) = launched(driver, [job(built(tmp_path, clustered), (16, 1, 0, 0))])
    assert record["cluster"] == [4, 1, 1]


def test_an_empty_grid_is_not_launched(driver, tmp_path):
    ((record,),) = launched(driver, [job(built(tmp_path), (0, 1, 0, 0))])
    assert (record["status"], record["launches"]) == (0, 0)


def test_what_the_driver_refuses_is_returned_every_time(driver, tmp_path):
    (records,) = launched(driver, [job(built(tmp_path), (16, 1, 0, 0), (16, 1, 0, 0), failure=209)])
    assert [record["status"] for record in records] == [209, 209]
    assert records[-1]["launches"] == 0


def test_more_tokens_than_the_kernel_can_count_are_refused(driver, tmp_path):
    ((record,),) = launched(driver, [job(built(tmp_path), (2**31, 1, 0, 0))])
    assert (record["status"], record["launches"]) == (TOO_MANY_TOKENS, 0)


def test_no_driver_and_an_old_driver_are_told_apart(tmp_path):
    """The process that launches has a library path where the driver is a library without the entry points."""
    library = built(tmp_path / "kernel")
    (tmp_path / "old.cpp").write_text("int nothing;")
    old = tmp_path / "libcuda.so.1"
    command = ["g++", "-fPIC", "-shared", "-Wl,-soname,libcuda.so.1", str(tmp_path / "old.cpp"), "-o", str(old)]
    subprocess.run(command, check=True)
    code = (
        "import ctypes, sys\n"
        "if sys.argv[2]: ctypes.CDLL(sys.argv[2])\n"
        "launch = ctypes.CDLL(sys.argv[1]).mhc_launch\n"
        "print(launch(None, None, ctypes.c_int64(1), 1, None))"
    )

    def status(driver: str) -> int:
        command = [sys.executable, "-c", code, library, driver]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert status(str(old)) == OLD_DRIVER
    if "libcuda.so.1" not in subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False).stdout:
        assert status("") == NO_DRIVER
