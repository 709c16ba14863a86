"""Workers: what a task may do to its process without harm to the owner."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import worker_tasks as tasks

from autotune.worker import REASON_LENGTH, TaskFailed, Worker

PATIENCE = 60.0


@pytest.fixture
def worker():
    worker = Worker()
    yield worker
    worker.kill()


def alive(process):
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_one_process_of_its_own_session_serves_all_tasks(worker):
    assert worker.call(PATIENCE, tasks.add, 2, 3) == 5
    process, session = worker.call(PATIENCE, tasks.process_and_session)
    assert process == session != os.getpid()
    assert worker.call(PATIENCE, tasks.process_and_session) == (process, session)


def test_an_exception_is_the_answer_and_the_process_lives(worker):
    process = worker.call(PATIENCE, tasks.process_and_session)
    with pytest.raises(TaskFailed, match=r"^ValueError: two lines$"):
        worker.call(PATIENCE, tasks.raise_error, "two\nlines")
    with pytest.raises(TaskFailed, match=r"lambda"):
        worker.call(PATIENCE, tasks.unpicklable)
    assert worker.call(PATIENCE, tasks.process_and_session) == process


def test_reasons_are_cut(worker):
    with pytest.raises(TaskFailed) as caught:
        worker.call(PATIENCE, tasks.raise_error, "x" * 10_000)
    assert len(str(caught.value)) == REASON_LENGTH


@pytest.mark.parametrize(
    ("task", "arguments", "reason"),
    [
        (tasks.exit_at_once, (3,), "exit_at_once ended its process: exit code 3 - last words"),
        (tasks.kill_self, (), "kill_self ended its process: SIGKILL"),
        (tasks.read_null, (), "read_null ended its process: SIGSEGV"),
    ],
)
def test_a_crash_is_a_reason_and_the_next_task_gets_a_new_process(worker, task, arguments, reason):
    with pytest.raises(TaskFailed) as caught:
        worker.call(PATIENCE, task, *arguments)
    assert str(caught.value) == reason
    assert worker.call(PATIENCE, tasks.add, 2, 3) == 5


def test_a_task_that_hangs_is_killed_with_what_it_started(worker, tmp_path):
    worker.call(PATIENCE, tasks.add, 0, 0)
    pids = tmp_path / "pids"
    worker.start(tasks.hang_with_child, str(pids))
    wait_for(lambda: pids.exists() and pids.read_text())
    with pytest.raises(TaskFailed, match=r"^hang_with_child took longer than 0\.1 s and was killed$"):
        worker.finish(0.1)
    wait_for(lambda: not any(alive(int(pid)) for pid in pids.read_text().split()))
    assert worker.call(PATIENCE, tasks.add, 2, 3) == 5


def test_a_worker_that_died_between_tasks_is_replaced(worker):
    process, _ = worker.call(PATIENCE, tasks.process_and_session)
    os.kill(process, signal.SIGKILL)
    os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)  # until then its other threads may still be ending
    assert worker.call(PATIENCE, tasks.add, 2, 3) == 5


def test_an_interruption_discards_the_answer(worker, monkeypatch):
    worker.call(PATIENCE, tasks.add, 0, 0)
    worker.start(tasks.add, "old", "answer")

    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(worker._connection, "poll", interrupted)
    with pytest.raises(KeyboardInterrupt):
        worker.finish(PATIENCE)
    assert worker.call(PATIENCE, tasks.add, 2, 3) == 5


def test_two_workers_work_at_the_same_time(worker):
    other = Worker()
    try:
        worker.start(tasks.add, 1, 1)
        other.start(tasks.add, 2, 2)
        assert (worker.finish(PATIENCE), other.finish(PATIENCE)) == (2, 4)
    finally:
        other.kill()


def test_what_tasks_print_stays_out_of_the_owners_output(worker, capfd):
    worker.call(PATIENCE, tasks.chatter)
    worker.call(PATIENCE, tasks.chatter)
    assert capfd.readouterr() == ("", "")


def test_a_worker_does_not_outlive_an_owner_that_was_killed(tmp_path):
    pids = tmp_path / "pids"
    program = (
        "import sys, worker_tasks\n"
        "from autotune.worker import Worker\n"
        "Worker().call(1000, worker_tasks.hang_with_child, sys.argv[1])"
    )
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    owner = subprocess.Popen([sys.executable, "-c", program, str(pids)], env=os.environ | {"PYTHONPATH": path})
    try:
        wait_for(lambda: pids.exists() and pids.read_text())
    finally:
        owner.kill()
        owner.wait()
    wait_for(lambda: not any(alive(int(pid)) for pid in pids.read_text().split()))
