"""Real processes and binaries: bad kernels give a reason for failure and never a crash of the tuner."""

import errno
import os
import signal
from pathlib import Path

import pytest
import torch
import worker_tasks
from faults import HEADER, PROBLEM, RIGHT, built

from autotune.processes.tasks import DEFAULT, TUNED, Timings
from autotune.processes.worker import TaskFailed
from autotune.processes.workers import Workers
from tiles.errors import BadInput
from tiles.kernels.spec import Problem


def binary(tmp_path, body):
    """A shared library with a kernel's entry that does `body`."""
    text = tmp_path / "kernel.cpp"
    text.write_text(f"{HEADER}{body} return 0; }}")
    return built(text)


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


WRONG = RIGHT.replace("t * 2 + 1", "t * 2")
OUTSIDE = r"^WrongResult: u at 1 tokens .* wrote outside of the result$"
SLOW = pytest.mark.slow  # a new process each; test_verify.py and test_worker.py find these faults in one process


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        pytest.param(WRONG, r"^WrongResult: u at 1 tokens", id="wrong value", marks=SLOW),
        pytest.param("return 7;", r"^RuntimeError: aggregate\.forward failed: the kernel returned 7", id="status"),
        pytest.param("*(volatile int *)0 = 1;", r"^assess ended its process: SIGSEGV", id="segmentation fault"),
        pytest.param(
            "", r"^WrongResult: u at 1 tokens in 1 slices: 64 of 64 .* got nan", id="does nothing", marks=SLOW
        ),
        pytest.param(RIGHT + "if (tokens > 0) u[tokens * 64] = 0;", OUTSIDE, id="out of bounds", marks=SLOW),
        pytest.param(RIGHT + "if (tokens > 0) u[-1] = 0;", OUTSIDE, id="before", marks=SLOW),
        pytest.param(
            RIGHT + "if (tokens > 0) ((float *)x)[3] += 1;",
            r"^WrongResult: x .* wrote to an input",
            id="input",
            marks=SLOW,
        ),
        pytest.param("abort();", r"^assess ended its process: SIGABRT", id="abort", marks=SLOW),
        pytest.param("_exit(5);", r"^assess ended its process: exit code 5", id="exit", marks=SLOW),
    ],
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


def test_a_process_that_ran_a_wrong_kernel_measures_no_other(workers, tmp_path):
    right = binary(tmp_path, RIGHT)
    workers.assess(PROBLEM, right, right, seed=1)
    before = workers._measurer._process
    with pytest.raises(TaskFailed, match="wrote outside"):
        workers.assess(PROBLEM, binary(tmp_path, RIGHT + "if (tokens > 0) u[tokens * 64] = 0;"), right, seed=1)
    assert before.returncode == -signal.SIGKILL
    workers.assess(PROBLEM, right, right, seed=1)
    assert workers._measurer._process is not before


def test_compilers_share_the_memory_that_the_measuring_process_has_alone():
    with Workers(memory=6 * 2**30) as workers:
        limits = [worker.call(60, worker_tasks.limits)[0] for worker in (*workers._compilers, workers._measurer)]
    assert limits == [3 * 2**30, 3 * 2**30, 6 * 2**30]


@pytest.mark.parametrize(
    ("cores", "gibibytes", "compilers"), [(1, 64, 2), (16, 96, 8), (12, 96, 6), (64, 20, 5), (64, 2, 2)]
)
def test_as_many_compile_at_a_time_as_have_two_cores_and_some_memory(monkeypatch, cores, gibibytes, compilers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    with Workers(memory=gibibytes * 2**30) as workers:
        assert workers.compilers == len(workers._compilers) == compilers


def test_a_full_disk_is_said_and_leaves_no_half_kernel(tmp_path, monkeypatch):
    with Workers() as workers:
        folder = Path(workers._scratch.name)

        def full(path, data):
            path.touch()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", full)
            with pytest.raises(BadInput, match=r"No space left on device\): make room there or set TMPDIR") as caught:
                workers._file(b"a kernel")
        assert "\n" not in str(caught.value)
        assert not list(folder.glob("*.so"))
        assert workers._file(b"a kernel").read_bytes() == b"a kernel"


def test_conditions_are_those_of_the_last_measurement(tmp_path):
    with Workers() as workers:
        workers._measurer.call = lambda *task: Timings({"a": [1.0]}, {"sm_mhz": 1980.0})
        assert workers.compare(PROBLEM, {"a": b"code"}, [], seed=1) == {"a": [1.0]}
        assert workers.conditions == {"sm_mhz": 1980.0}


def test_what_is_no_library_is_a_reason(workers):
    with pytest.raises(TaskFailed, match=r"^LoadError: "):
        workers.assess(PROBLEM, b"no library", b"", seed=1)


def test_the_measuring_process_has_the_given_number_of_threads(tmp_path):
    report = binary(tmp_path, RIGHT + "if (tokens == 4096) exit(40 + slices);")
    problem = Problem("aggregate", "forward", 2, 64, tokens=4096)
    threads = torch.get_num_threads() + 1
    with Workers(threads=threads) as workers, pytest.raises(TaskFailed, match=f"exit code {40 + threads}"):
        workers.assess(problem, report, report, seed=1)


def test_leaving_ends_all_processes_and_removes_their_files(tmp_path):
    with Workers() as workers:
        workers.assess(PROBLEM, binary(tmp_path, RIGHT), binary(tmp_path, RIGHT), seed=1)
        process, folder = workers._measurer._process, Path(workers._scratch.name)
        assert any(folder.iterdir())
    assert process.returncode is not None
    assert not folder.exists()
