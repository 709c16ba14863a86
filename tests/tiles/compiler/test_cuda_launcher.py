"""What a CUDA kernel's launcher asks of the driver: a fake driver keeps it. No GPU, and no nvcc, is needed here."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from launching import IMAGE_BYTES, WORKSPACE, build_driver, build_launcher, call, job, launched

from tiles.compiler.compile import CompileError, _plan
from tiles.compiler.cuda_launcher import (
    MISALIGNED,
    NO_DRIVER,
    OLD_DRIVER,
    SUM_KERNEL,
    TOO_MANY_TOKENS,
    Launch,
    Plan,
)
from tiles.kernels.spec import TOKENS, Argument

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on PATH: no launcher can be built")

ARGUMENTS = (
    Argument("x", (TOKENS, 8), "bfloat16", "input"),
    Argument("eps", (), "float32", "scalar"),
    Argument("out", (8,), "float32", "partial"),
)
X, OUT = 0xA000, 0xB000
LAUNCH = Launch(
    kernel="toy_kernel",
    parameters=("out", "x", "eps", "splits", "tokens"),
    grid=("((tokens + INT64_C(15)) / INT64_C(16))", "splits", "1"),
    block=(128, 1, 1),
    shared_bytes=100 * 1024,
)
PLAN = Plan((LAUNCH,), most_splits=3, split_tokens=8)
COUNTS = {"toy_kernel": 5, "first": 3, "second": 4, SUM_KERNEL: 3}


def built(folder: Path, plan: Plan = PLAN) -> str:
    return str(build_launcher(folder, plan, ARGUMENTS))


def test_it_launches_the_named_kernel_of_its_image_on_the_given_stream(driver, tmp_path):
    ((record,),) = launched(driver, [job(built(tmp_path), call(37, 0x55))])
    assert (record["status"], bytes(record["image"])) == (0, IMAGE_BYTES)
    first = record["log"][0]
    assert first["name"] == "toy_kernel"
    assert first["stream"] == 0x55
    assert first["grid"] == [3, 3, 1]
    assert first["block"] == [128, 1, 1]
    assert first["shared"] == 100 * 1024
    assert first["cluster"] == [0, 0, 0]


def test_parameters_arrive_in_the_kernels_order(driver, tmp_path):
    ((record,),) = launched(driver, [job(built(tmp_path), 7, parameters=COUNTS)])
    out, x, eps, splits, tokens = record["log"][0]["parameters"][:5]
    assert (out, x) == (OUT, X)
    assert struct.unpack("<f", struct.pack("<Q", eps)[:4]) == (0.5,)
    assert (splits & 0xFFFFFFFF, tokens & 0xFFFFFFFF) == (1, 7)


def test_splits_follow_the_tokens_and_are_summed_behind_the_kernel(driver, tmp_path):
    """One split writes to the result; more go to the workspace, and one more kernel adds them."""
    (records,) = launched(
        driver, [job(built(tmp_path), *(call(tokens, 0x55) for tokens in (0, 15, 16, 24, 1000)), parameters=COUNTS)]
    )
    assert [len(record["log"]) for record in records] == [0, 1, 2, 2, 2]
    assert [record["bytes"] for record in records] == [0, 0, 256, 256, 256]  # of 2 or 3 splits of 32 bytes
    for record, count in zip(records[2:], (2, 3, 3), strict=True):
        toy, total = record["log"]
        assert toy["grid"][1] == count
        assert toy["parameters"][0] == WORKSPACE
        assert (total["name"], total["grid"], total["block"], total["stream"]) == (
            SUM_KERNEL,
            [1, 1, 1],
            [256, 1, 1],
            0x55,
        )
        of, out, splits = total["parameters"][:3]
        assert (of, out, splits & 0xFFFFFFFF) == (WORKSPACE, OUT, count)


def test_chunks_go_through_all_kernels_one_after_the_other(driver, tmp_path):
    """Two kernels with workspace between them, 20 tokens in chunks of 8; every chunk and split has sums of its own."""
    first = Launch("first", ("x", "between", "tokens"), ("tokens", "1", "1"), (32, 1, 1), 0)
    second = Launch("second", ("out", "between", "x", "splits"), ("splits", "1", "1"), (32, 1, 1), 0)
    plan = Plan((first, second), (("between", "4 * tokens"),), most_splits=2, split_tokens=4, chunk_tokens=8)
    ((record,),) = launched(driver, [job(built(tmp_path, plan), 20, parameters=COUNTS)])
    log = record["log"]
    assert [launch["name"] for launch in log] == ["first", "second"] * 3 + [SUM_KERNEL]
    assert [launch["grid"][0] for launch in log[0:6:2]] == [8, 8, 4]
    assert [launch["parameters"][0] for launch in log[0:6:2]] == [X + 16 * token for token in (0, 8, 16)]
    assert {launch["parameters"][1] for launch in log[:6]} == {WORKSPACE}
    sums = WORKSPACE + 256
    assert [launch["parameters"][0] for launch in log[1:6:2]] == [sums + 2 * 32 * chunk for chunk in range(3)]
    of, out, splits = log[-1]["parameters"][:3]
    assert (of, out, splits & 0xFFFFFFFF) == (sums, OUT, 6)
    assert record["bytes"] == 256 + 256


def test_code_is_loaded_once_and_shared_memory_allowed_once_a_device(driver, tmp_path):
    calls = [call(8, device=device) for device in (0, 0, 5, 0, 5)]
    (records,) = launched(driver, [job(built(tmp_path), *calls)])
    assert [record["libraries"] for record in records] == [1] * 5
    assert [record["attributes"] for record in records] == [1, 1, 2, 2, 2]
    assert [record["launches"] for record in records] == [1, 2, 3, 4, 5]
    last = records[-1]
    assert (last["attribute"], last["attribute_value"], last["attribute_device"]) == (8, 100 * 1024, 5)


def test_little_shared_memory_needs_no_permission(driver, tmp_path):
    small = Launch(LAUNCH.kernel, LAUNCH.parameters, LAUNCH.grid, LAUNCH.block, 48 * 1024)
    ((record,),) = launched(driver, [job(built(tmp_path, Plan((small,))), 16)])
    assert (record["attributes"], record["launches"]) == (0, 1)


def test_clusters_are_asked_for(driver, tmp_path):
    clustered = Launch(LAUNCH.kernel, LAUNCH.parameters, LAUNCH.grid, LAUNCH.block, 0, cluster=(4,))
    ((record,),) = launched(driver, [job(built(tmp_path, Plan((clustered,))), 16)])
    assert record["log"][0]["cluster"] == [4, 1, 1]


def test_kernels_after_a_chunks_first_may_start_while_the_one_before_ends(driver, tmp_path):
    second = replace(LAUNCH, kernel="second", cluster=(2,))
    plan = replace(PLAN, launches=(LAUNCH, second), chunk_tokens=16, use_pdl=1)
    for chosen, wanted in ((plan, [0, 1, 0, 1, 1]), (replace(plan, use_pdl=0), [0] * 5)):
        ((record,),) = launched(driver, [job(built(tmp_path / str(chosen.use_pdl), chosen), 32)])
        assert [launch["overlaps"] for launch in record["log"][:5]] == wanted
        assert [launch["cluster"] for launch in record["log"][:2]] == [[0, 0, 0], [2, 1, 1]]


def test_a_program_that_lost_a_parameters_name_does_not_compile():
    """Its launcher would take the parameter for workspace, which nobody fills."""
    parameters = {name: SimpleNamespace(name=name, dtype="float32", shape=()) for name in ("x", "gate", "out")}
    program = SimpleNamespace(params=list(parameters), buffer_map=parameters, attrs={})
    with pytest.raises(CompileError, match=r"keep its parameters' names, got \['gate'\]: do not assign \['post'\]"):
        _plan(program, SimpleNamespace(functions={}), [*ARGUMENTS, Argument("post", (TOKENS, 4), "float32", "input")])


def test_an_empty_grid_is_not_launched(driver, tmp_path):
    ((record,),) = launched(driver, [job(built(tmp_path), 0)])
    assert (record["status"], record["launches"]) == (0, 0)


def test_a_load_that_failed_is_tried_again(driver, tmp_path):
    """Out of memory (2), say: the error is not kept. The library, once loaded, is not loaded again."""
    calls = [call(16, failure=2), call(16), call(16, device=1, failure=2), call(16, device=1)]
    (records,) = launched(driver, [job(built(tmp_path), *calls)])
    assert [record["status"] for record in records] == [2, 0, 2, 0]
    assert [record["libraries"] for record in records] == [1, 2, 2, 2]
    assert records[-1]["launches"] == 4


def test_what_the_driver_refuses_is_returned_every_time(driver, tmp_path):
    (records,) = launched(driver, [job(built(tmp_path), *[call(16, failure=209)] * 2)])
    assert [record["status"] for record in records] == [209, 209]
    assert records[-1]["launches"] == 0


def test_a_first_call_inside_of_a_capture_fails_and_later_ones_do_not(driver, tmp_path):
    (records,) = launched(driver, [job(built(tmp_path), call(16, capturing=1), 16, call(16, capturing=1))])
    assert [record["status"] for record in records] == [900, 0, 0]


@pytest.mark.parametrize("tokens", [0, 8, None], ids=str)
def test_a_capture_may_be_the_first_to_launch_the_sum_over_splits(driver, tmp_path, tokens):
    """Few tokens are one split: the first call has no sum to launch, and loads that kernel all the same. So does
    `mhc_load`, which launches none."""
    calls = [call(tokens), call(1000, capturing=1), call(tokens, device=1), call(1000, device=1, capturing=1)]
    (records,) = launched(driver, [job(built(tmp_path), *calls)])
    assert [record["status"] for record in records] == [0, 0, 0, 0]
    assert [launch["name"] for launch in records[1]["log"]] == ["toy_kernel", SUM_KERNEL]


def test_drivers_before_cuda_12_4_load_what_is_asked_for(tmp_path):
    """They have no cuFuncLoad."""
    driver = build_driver(tmp_path, "-DWITHOUT_FUNC_LOAD")
    (records,) = launched(driver, [job(built(tmp_path / "kernel"), 8, call(1000, capturing=1))])
    assert [record["status"] for record in records] == [0, 0]


@pytest.mark.parametrize("device", [0, 3])
def test_a_thread_without_a_context_gets_that_of_the_tensors_device(driver, tmp_path, device):
    """Autograd's backward runs in a thread of its own, where torch may not have set a context yet."""
    fresh = call(1000, device=device, context=-1, thread=1)
    (records,) = launched(driver, [job(built(tmp_path), fresh, fresh, call(8, device=1 - device % 2))])
    assert [record["status"] for record in records] == [0, 0, 0]
    assert [record["context"] for record in records] == [device, device, 1 - device % 2]
    assert {launch["device"] for record in records[:2] for launch in record["log"]} == {device}


def test_a_context_of_another_device_is_set_back(driver, tmp_path):
    (records,) = launched(driver, [job(built(tmp_path), *(call(1000, device=2, context=at) for at in (5, 2, 0)))])
    assert [(record["status"], record["context"]) for record in records] == [(0, 5), (0, 2), (0, 0)]
    assert {launch["device"] for record in records for launch in record["log"]} == {2}


@pytest.mark.parametrize("place", [0, 1])
def test_a_tensor_that_vectors_do_not_fit_is_refused(driver, tmp_path, place):
    """A misaligned access on the GPU would end the process's context."""
    for past, status in ((2, MISALIGNED), (16, MISALIGNED), (32, 0)):
        tensors = [X, OUT]
        tensors[place] += past
        ((record,),) = launched(driver, [job(built(tmp_path), 8, tensors=tensors)])
        assert (record["status"], record["launches"]) == (status, int(status == 0))


def test_more_tokens_than_the_kernel_can_count_are_refused(driver, tmp_path):
    ((record,),) = launched(driver, [job(built(tmp_path), 2**31)])
    assert (record["status"], record["launches"]) == (TOO_MANY_TOKENS, 0)


def test_elements_of_all_tokens_in_a_row_are_counted_too(driver, tmp_path):
    plan = Plan((LAUNCH,), token_elements=25)
    (records,) = launched(driver, [job(built(tmp_path, plan), 2**31 // 25, 2**31 // 25 + 1)])
    assert [record["status"] for record in records] == [0, TOO_MANY_TOKENS]


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
        "print(launch(None, None, ctypes.c_int64(1), None, None, 0))"
    )

    def status(driver: str) -> int:
        command = [sys.executable, "-c", code, library, driver]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert status(str(old)) == OLD_DRIVER
    if "libcuda.so.1" not in subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False).stdout:
        assert status("") == NO_DRIVER
