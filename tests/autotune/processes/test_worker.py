"""Worker processes: crashes, hangs and other misbehaviour of tasks do not harm the owner."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import worker_tasks as tasks

from autotune.processes import resource_limits
from autotune.processes.worker import REASON_LENGTH, TaskFailed, Worker

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


def test_one_process_of_its_own_session_runs_all_tasks(worker):
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
        (tasks.kill_self, (), "kill_self ended its process: SIGKILL, twice"),
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


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_task_whose_worker_was_killed_from_outside_is_run_once_more(worker, tmp_path, sent):
    assert worker.call(PATIENCE, tasks.die_once, str(tmp_path), sent) == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_a_crash_is_not_run_again(worker, tmp_path):
    with pytest.raises(TaskFailed, match=r"^die_once ended its process: SIGSEGV$"):
        worker.call(PATIENCE, tasks.die_once, str(tmp_path), signal.SIGSEGV)
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_crashed_task_started_ends_as_well(worker, tmp_path):
    with pytest.raises(TaskFailed, match=r"SIGABRT"):
        worker.call(PATIENCE, tasks.leave_child_and_die, str(tmp_path / "pid"))
    wait_for(lambda: not alive(int((tmp_path / "pid").read_text())))


def test_a_task_s_time_begins_when_its_process_has_started(worker, tmp_path, monkeypatch):
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(1.5)\ndef answer():\n    return 42")
    monkeypatch.syspath_prepend(tmp_path)
    import slow_to_import

    assert worker.call(1.0, slow_to_import.answer) == 42


def test_several_that_hang_are_all_ended_in_the_time_of_one():
    workers = [Worker() for _ in range(4)]
    try:
        for worker in workers:
            worker.call(PATIENCE, tasks.add, 0, 0)
        start = time.monotonic()
        for worker in workers:
            worker.start(tasks.hang)
        for worker in workers:
            with pytest.raises(TaskFailed, match=r"took longer than 2 s"):
                worker.finish(2.0)
        assert time.monotonic() - start < 7, "one after the other takes 8 s"
    finally:
        for worker in workers:
            worker.kill()


def test_memory_is_limited_for_it_and_what_it_starts():
    worker = Worker(memory=3 * 2**30)
    try:
        assert worker.call(PATIENCE, tasks.limits) == (3 * 2**30, resource_limits.MAX_FILE_BYTES, 1000)
        assert worker.call(PATIENCE, tasks.child_limit) == 3 * 2**30
        process = worker.call(PATIENCE, tasks.process_and_session)
        with pytest.raises(TaskFailed, match=r"^out of memory: MemoryError$"):
            worker.call(PATIENCE, tasks.allocate, 30 * 2**30)
        with pytest.raises(TaskFailed, match=r"^out of memory: RuntimeError: .*you tried to allocate 32212254720 byte"):
            worker.call(PATIENCE, tasks.allocate_tensor, 30 * 2**30)
        assert worker.call(PATIENCE, tasks.allocate, 2**20) == 2**20
        assert worker.call(PATIENCE, tasks.process_and_session) == process
    finally:
        worker.kill()


def test_memory_is_limited_by_what_there_is(worker):
    limit, _, _ = worker.call(PATIENCE, tasks.limits)
    assert limit == int(resource_limits.MEMORY_SHARE * resource_limits.memory_bytes())


def test_an_oom_kill_is_reported_as_such(worker, tmp_path, monkeypatch):
    kills = iter([7, 8])
    monkeypatch.setattr("autotune.processes.worker.oom_kills", lambda: next(kills))
    with pytest.raises(TaskFailed, match=r"^out of memory: the system ended the process of die_once$"):
        worker.call(PATIENCE, tasks.die_once, str(tmp_path), signal.SIGKILL)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_process_that_is_not_to_be_trusted_is_replaced(worker):
    process = worker.call(PATIENCE, tasks.process_and_session)
    with pytest.raises(TaskFailed, match=r"^Distrusted: wrote somewhere$"):
        worker.call(PATIENCE, tasks.raise_distrusted)
    assert not alive(process[0])
    assert worker.call(PATIENCE, tasks.process_and_session) != process


@pytest.mark.parametrize(
    ("when", "said"),
    [pytest.param("in the task", "launch failed", marks=pytest.mark.slow), ("behind it", "an illegal memory access")],
)
def test_a_process_whose_gpu_failed_is_replaced(worker, when, said):
    process = worker.call(PATIENCE, tasks.process_and_session)
    with pytest.raises(TaskFailed, match=rf"^RuntimeError: CUDA error: {said}"):
        worker.call(PATIENCE, tasks.fail_on_gpu, when)
    assert worker.call(PATIENCE, tasks.process_and_session) != process


def test_a_process_whose_gpu_is_sound_stays(worker):
    process = worker.call(PATIENCE, tasks.process_and_session)
    with pytest.raises(TaskFailed, match=r"^ValueError: no fault of the GPU$"):
        worker.call(PATIENCE, tasks.fail_beside_a_sound_gpu)
    assert worker.call(PATIENCE, tasks.process_and_session) == process


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


def test_temporary_files_go_to_its_folder(tmp_path):
    worker = Worker(folder=tmp_path)
    try:
        assert worker.call(PATIENCE, tasks.temporary_folder) == str(tmp_path)
    finally:
        worker.kill()
    assert tmp_path.exists()


def test_a_worker_does_not_outlive_an_owner_that_was_killed_nor_do_its_files(tmp_path):
    pids, folder = tmp_path / "pids", tmp_path / "folder"
    folder.mkdir()
    (folder / "kernel.so").touch()
    program = (
        "import sys, worker_tasks\n"
        "from pathlib import Path\n"
        "from autotune.processes.worker import Worker\n"
        "Worker(folder=Path(sys.argv[2])).call(1000, worker_tasks.hang_with_child, sys.argv[1])"
    )
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    owner = subprocess.Popen(
        [sys.executable, "-c", program, str(pids), str(folder)], env=os.environ | {"PYTHONPATH": path}
    )
    try:
        wait_for(lambda: pids.exists() and pids.read_text())
    finally:
        owner.kill()
        owner.wait()
    wait_for(lambda: not any(alive(int(pid)) for pid in pids.read_text().split()))
    assert not folder.exists()
