"""A worker process that runs tasks one after another; a crash or hang of a task does not harm the owner.

It is a fresh interpreter, because torch and OpenMP do not survive a fork. It leads its own session, so that Ctrl-C does
not reach it and killing its process group also ends the compilers that it started.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from autotune.processes.resource_limits import MEMORY_SHARE, is_out_of_memory, limit_resources, memory_bytes, oom_kills
from tiles.errors import one_line

REASON_LENGTH = 400
"""Characters to which the reason of a failure is cut."""

START_SECONDS = 300.0
"""Time limit for starting a process and importing a task's code, which is not part of the task's own time."""

END_SECONDS = 4.0
"""How long to wait for a killed process. One that waits for a broken driver may never end."""

SIGNALS = {number.value: number.name for number in signal.Signals}

FROM_OUTSIDE = {signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT}
"""Signals that end a process from outside, by no fault of its task."""


class TaskFailed(Exception):
    """A task raised, its worker died, or it took too long; the text is the reason in one line."""


class _Killed(TaskFailed):
    """A worker was ended from outside."""


class Worker:
    """One process, started at the first task and restarted after a failure that it did not survive.

    It may take `memory` bytes, by default `MEMORY_SHARE` of the machine's. Its temporary files go to `folder` (default:
    the system's), which the worker removes when its owner is gone.
    """

    def __init__(self, *, memory: int | None = None, folder: Path | None = None) -> None:
        self._memory = memory or int(MEMORY_SHARE * memory_bytes())
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[Any, Any] | None = None
        self._output: IO[bytes] | None = None
        self._task: tuple[Callable[..., Any], tuple[Any, ...]] = (print, ())
        self._kills_before = 0

    def call(self, seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(*arguments)` in the worker; see `finish`."""
        self.start(function, *arguments)
        return self.finish(seconds)

    def start(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Send a task: a function that the worker can import, and arguments that can be pickled."""
        self._task = function, arguments
        task = pickle.dumps(self._task)
        if self._process is None or self._has_ended():
            self._spawn()
        assert self._connection
        self._kills_before = oom_kills()
        try:
            self._connection.send_bytes(task)
        except ConnectionError:  # it has just died, not of this task
            self._spawn()
            self._connection.send_bytes(task)

    def finish(self, seconds: float) -> Any:
        """The result of the task started last; raises `TaskFailed`, and kills a worker that exceeds `seconds`.

        A task whose worker was ended from outside is started once more.
        """
        try:
            return self._result(seconds)
        except _Killed:
            function, arguments = self._task
            self.start(function, *arguments)
        try:
            return self._result(seconds)
        except _Killed as again:
            raise TaskFailed(f"{again}, twice") from None

    def _result(self, seconds: float) -> Any:
        name = self._task[0].__name__
        try:
            # time.monotonic is one clock for all processes.
            began = self._receive(START_SECONDS, f"{name} did not start within {START_SECONDS:g} s")
            left = began + seconds - time.monotonic()
            done, value, fit = self._receive(left, f"{name} took longer than {seconds:g} s")
        except (EOFError, ConnectionError):
            raise self._exit_reason() from None
        except TaskFailed:
            raise
        except BaseException:
            # Ctrl-C, say: the pending answer must not be taken for that of the next task.
            self.kill()
            raise
        if not fit:
            self.kill()
        if not done:
            raise TaskFailed(value)
        return value

    def _receive(self, seconds: float, late: str) -> Any:
        assert self._connection
        if not self._connection.poll(max(0.0, seconds)):
            self.kill()
            raise TaskFailed(f"{late} and was killed")
        return pickle.loads(self._connection.recv_bytes())

    def kill(self) -> None:
        """Kill the process and all that it started."""
        if self._process is None or self._connection is None or self._output is None:
            return
        kill_group(self._process)
        self._connection.close()
        self._output.close()
        self._process = self._connection = self._output = None

    def _spawn(self) -> None:
        self.kill()
        self._connection, theirs = Pipe()
        # Tasks' output stays out of the owner's; its last line explains a crash.
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        arguments = f"{theirs.fileno()}, {self._memory}, {str(self._folder or '')!r}"
        folder = {} if self._folder is None else {"TMPDIR": str(self._folder)}
        path = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from autotune.processes.worker import worker_main; worker_main({arguments})"],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | folder | {"PYTHONPATH": path},
        )
        theirs.close()

    def _has_ended(self) -> bool:
        """Whether the process has ended; it stays a zombie, its id taken, until `kill` reaps it."""
        assert self._process
        try:
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # the owner was started with SIGCHLD ignored
            return True

    def _exit_reason(self) -> TaskFailed:
        """The exit status of the process and the last line that it printed."""
        assert self._process
        assert self._output
        name, process = self._task[0].__name__, self._process
        deadline = time.monotonic() + END_SECONDS
        while not self._has_ended() and time.monotonic() < deadline:
            time.sleep(0.01)
        printed = _last_line(self._output)
        self.kill()
        code = -signal.SIGKILL if process.returncode is None else process.returncode
        how = SIGNALS.get(-code, f"exit code {code}")
        reason = _reason(" - ".join([f"{name} ended its process: {how}", *printed]))
        if code == -signal.SIGKILL and oom_kills() > self._kills_before:
            return TaskFailed(f"out of memory: the system ended the process of {name}")
        if is_out_of_memory(reason):
            return TaskFailed(f"out of memory: {reason}")
        return _Killed(reason) if -code in FROM_OUTSIDE else TaskFailed(reason)


def _last_line(output: IO[bytes]) -> list[str]:
    """The last non-blank line, as a list of one or none."""
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - 4096))
    return output.read().decode(errors="replace").strip().splitlines()[-1:]


def worker_main(descriptor: int, memory: int, folder: str) -> None:
    """The worker's side: answer tasks until the owner is gone; then remove `folder`, unless it has no name."""
    limit_resources(memory)
    os.set_inheritable(descriptor, False)
    connection: Connection[Any, Any] = Connection(descriptor)
    tasks: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive_tasks, args=(connection, tasks, folder), daemon=True).start()
    while True:
        connection.send_bytes(_run_task(tasks.get(), connection))


def _receive_tasks(connection: Connection[Any, Any], tasks: queue.SimpleQueue[bytes], folder: str) -> None:
    """Receive tasks, in a thread, so that even a worker that hangs ends with its owner."""
    try:
        while True:
            tasks.put(connection.recv_bytes())
    except (EOFError, OSError):
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        os.killpg(os.getpgrp(), signal.SIGKILL)


def _run_task(task: bytes, connection: Connection[Any, Any]) -> bytes:
    """Run a task: (True, result) or (False, reason), and whether this process is fit for another task, pickled.

    Sends the time after importing the task's code and before running it. Waits for the task's work on a GPU, so that
    an error there is not taken for the next task's. An error with the attribute `poisons` makes the process unfit.
    """
    try:
        try:
            function, arguments = pickle.loads(task)
        finally:
            connection.send_bytes(pickle.dumps(time.monotonic()))
        value = function(*arguments)
        _end_cuda_work()
        return pickle.dumps((True, value, True))
    except Exception as error:
        reason = one_line(error)
        reason = f"out of memory: {reason}" if is_out_of_memory(reason) else reason
        return pickle.dumps((False, _reason(reason), not getattr(error, "poisons", False) and not _cuda_is_broken()))


def _end_cuda_work() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _cuda_is_broken() -> bool:
    """Whether a sticky CUDA error, such as an illegal address, makes every later call of this process fail."""
    try:
        _end_cuda_work()
    except RuntimeError:
        return True
    return False


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that was started with `start_new_session`, and all that it started; wait `END_SECONDS` for it."""
    # Before wait(), also where the process has ended: what it started may not have, and until then its id cannot have
    # passed to somebody else.
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it was started this moment and does not lead its group yet, or nothing of it is left
        process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)


def _reason(error: BaseException | str) -> str:
    """An error in one line, cut to `REASON_LENGTH`."""
    joined = one_line(error)
    return joined if len(joined) <= REASON_LENGTH else joined[: REASON_LENGTH - 1] + "…"
