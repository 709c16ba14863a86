"""Real processes and real binaries: bad kernels are a reason and never a crash of the tuner."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from autotune.tasks import DEFAULT, TUNED
from autotune.worker import TaskFailed
from autotune.workers import Workers
from tiles.family import Problem

PROBLEM = Problem("aggregate", "forward", 2, 64, tokens=64)

# u[t, c] = Σ_i pre[t, i] x[t, i, c], on one slice of tokens.
RIGHT = """
  const float *x = (float *)tensors[0], *pre = (float *)tensors[1];
  float *u = (float *)tensors[2];
  for (int64_t t = 0; t < tokens; ++t)
    for (int c = 0; c < 64; ++c)
      u[t * 64 + c] = pre[t * 2] * x[t * 128 + c] + pre[t * 2 + 1] * x[t * 128 + 64 + c];
"""


def binary(tmp_path, body):
    """A shared library with a kernel's entry that does `body`."""
    text, library = tmp_path / "kernel.cpp", tmp_path / "kernel.so"
    text.write_text(
        "#include <stdint.h>\n#include <stdlib.h>\n#include <unistd.h>\n"
        'extern "C" int32_t mhc_launch(void **tensors, const float *scalars, int64_t tokens, int32_t slices) {'
        f"{body} return 0; }}"
    )
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "c++"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", str(text), "-o", str(library)], check=True)
    return library.read_bytes()


@pytest.fixture(scope="module")
def workers():
    with Workers() as workers:
        yield workers


def test_a_right_kernel_is_timed_against_the_default(workers, tmp_path):
    right = binary(tmp_path, RIGHT)
    slow = binary(tmp_path, RIGHT + "usleep(2000);")
    times = workers.assess(PROBLEM, right, slow, seed=1)
    assert set(times) == {TUNED, DEFAULT}
    assert len(times[TUNED]) == len(times[DEFAULT]) >= 6
    assert min(times[DEFAULT]) >= 2
    assert set(workers.compare(PROBLEM, {"a": right, "b": slow, "c": right}, ["b"], seed=1)) == {"a", "b", "c"}
    with pytest.raises(TaskFailed, match=r"^WrongResult: "):
        workers.compare(PROBLEM, {"a": right, "b": binary(tmp_path, "")}, ["b"], seed=1)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("", r"^WrongResult: u at 1 tokens in 1 slices: 64 of 64 elements .* got nan"),
        (RIGHT.replace("t * 2 + 1", "t * 2"), r"^WrongResult: u at 1 tokens"),
        (RIGHT + "if (tokens > 0) u[tokens * 64] = 0;", r"^WrongResult: u at 1 tokens .* wrote outside of the result$"),
        ("return 7;", r"^RuntimeError: aggregate\.forward returned 7"),
        ("abort();", r"^assess ended its process: SIGABRT"),
        ("*(volatile int *)0 = 1;", r"^assess ended its process: SIGSEGV"),
        ("_exit(5);", r"^assess ended its process: exit code 5"),
    ],
    ids=["does nothing", "wrong value", "out of bounds", "status", "abort", "segmentation fault", "exit"],
)
def test_a_bad_kernel_is_a_reason_and_the_next_one_is_measured(workers, tmp_path, body, reason):
    right = binary(tmp_path, RIGHT)
    with pytest.raises(TaskFailed, match=reason):
        workers.assess(PROBLEM, binary(tmp_path, body), right, seed=1)
    assert workers.assess(PROBLEM, right, right, seed=1)


def test_a_kernel_that_hangs_is_killed(tmp_path):
    with Workers(measure_seconds=15) as workers:
        workers.roofline()  # starts the process and imports torch
        workers._measure_seconds = 1
        with pytest.raises(TaskFailed, match=r"^assess took longer than 1 s and was killed$"):
            workers.assess(PROBLEM, binary(tmp_path, "for (;;) usleep(1000);"), b"", seed=1)


def test_what_is_no_library_is_a_reason(workers):
    with pytest.raises(TaskFailed, match=r"^LoadError: "):
        workers.assess(PROBLEM, b"no library", b"", seed=1)


def test_the_measuring_process_has_the_same_number_of_threads(tmp_path):
    report = binary(tmp_path, RIGHT + "if (tokens == 4096) exit(40 + slices);")
    problem = Problem("aggregate", "forward", 2, 64, tokens=4096)
    for threads in (torch.get_num_threads(), torch.get_num_threads() + 1):
        with Workers(threads=threads) as workers, pytest.raises(TaskFailed, match=f"exit code {40 + threads}"):
            workers.assess(problem, report, report, seed=1)


def test_leaving_ends_all_processes_and_removes_their_files(tmp_path):
    with Workers() as workers:
        workers.assess(PROBLEM, binary(tmp_path, RIGHT), binary(tmp_path, RIGHT), seed=1)
        process, folder = workers._measurer._process, Path(workers._scratch.name)
        assert any(folder.iterdir())
    assert process.returncode is not None
    assert not folder.exists()
