"""A process that runs one task after another and may crash, hang or be killed without harm to its owner.

It is a fresh interpreter and no fork, because torch and OpenMP do not survive one. It leads a session of its own, so
that Ctrl-C does not reach it and killing its group takes along the compilers that it has started.
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

from autotune.processes.confine import SHARE, confine, for_want_of_memory, kills_for_memory, memory_bytes
from tiles.errors import one_line

REASON_LENGTH = 400
"""Characters of a failure's reason that are kept."""

START_SECONDS = 300.0
"""What a process may take to start and to import a task's code, which is no part of the task's own time."""

END_SECONDS = 4.0
"""What a process that was killed may take to end. One that waits for a broken driver may never end."""

SIGNALS = {number.value: number.name for number in signal.Signals}

FROM_OUTSIDE = {signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT}
"""No fault of a task ends its process like this: somebody else did."""


class TaskFailed(Exception):
    """A task raised, its worker died, or it took too long; the text is the reason, in one line."""


class _Killed(TaskFailed):
    """A worker was ended from outside."""


class Worker:
    """One process, started at the first task and again after a failure that it did not survive.

    It may take `memory` bytes, by default `confine.SHARE` of what there is. Its temporary files go to `folder`, by
    default the system's; it removes that folder when its owner is gone.
    """

    def __init__(self, *, memory: int | None = None, folder: Path | None = None) -> None:
        self._memory = memory or int(SHARE * memory_bytes())
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
        """Hand over a task: a function that the worker can import, and arguments that can be pickled."""
        self._task = function, arguments
        task = pickle.dumps(self._task)
        if self._process is None or self._has_ended():
            self._spawn()
        assert self._connection
        self._kills_before = kills_for_memory()
        try:
            self._connection.send_bytes(task)
        except ConnectionError:  # it died this moment, before it had anything to do with the task
            self._spawn()
            self._connection.send_bytes(task)

    def finish(self, seconds: float) -> Any:
        """The result of the task that was started last; raises `TaskFailed`, and kills a worker that is too slow.

        A worker that somebody else ended says nothing about its task: that is started once more.
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
            # By a clock that all processes share.
            began = self._receive(START_SECONDS, f"{name} did not start within {START_SECONDS:g} s")
            left = began + seconds - time.monotonic()
            done, value, fit = self._receive(left, f"{name} took longer than {seconds:g} s")
        except (EOFError, ConnectionError):
            raise self._epitaph() from None
        except TaskFailed:
            raise
        except BaseException:
            # Ctrl-C, say: an answer that nobody waits for must not meet the next task.
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
        """End the process and all that it started."""
        if self._process is None or self._connection is None or self._output is None:
            return
        kill_group(self._process)
        self._connection.close()
        self._output.close()
        self._process = self._connection = self._output = None

    def _spawn(self) -> None:
        self.kill()
        self._connection, theirs = Pipe()
        # What tasks print must not end up in the owner's output; its last line explains a crash.
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        arguments = f"{theirs.fileno()}, {self._memory}, {str(self._folder or '')!r}"
        folder = {} if self._folder is None else {"TMPDIR": str(self._folder)}
        path = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from autotune.processes.worker import serve; serve({arguments})"],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | folder | {"PYTHONPATH": path},
        )
        theirs.close()

    def _has_ended(self) -> bool:
        """Whether the process has; its id stays taken until `kill` collects it."""
        assert self._process
        try:
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # whoever started the owner had it ignore its children
            return True

    def _epitaph(self) -> TaskFailed:
        """How the process ended and the last line that it printed."""
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
        if code == -signal.SIGKILL and kills_for_memory() > self._kills_before:
            return TaskFailed(f"out of memory: the system ended the process of {name}")
        if for_want_of_memory(reason):
            return TaskFailed(f"out of memory: {reason}")
        return _Killed(reason) if -code in FROM_OUTSIDE else TaskFailed(reason)


def _last_line(output: IO[bytes]) -> list[str]:
    """The last line that is not blank, as a list of one or none."""
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - 4096))
    return output.read().decode(errors="replace").strip().splitlines()[-1:]


def serve(descriptor: int, memory: int, folder: str) -> None:
    """The worker's side: answer tasks until the owner is gone; then remove `folder`, unless it has no name."""
    confine(memory)
    os.set_inheritable(descriptor, False)
    connection: Connection[Any, Any] = Connection(descriptor)
    tasks: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, tasks, folder), daemon=True).start()
    while True:
        connection.send_bytes(_answer(tasks.get(), connection))


def _listen(connection: Connection[Any, Any], tasks: queue.SimpleQueue[bytes], folder: str) -> None:
    """Take in tasks. A thread of its own, so that a worker that hangs does not outlive an owner that was killed."""
    try:
        while True:
            tasks.put(connection.recv_bytes())
    except (EOFError, OSError):
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        os.killpg(os.getpgrp(), signal.SIGKILL)


def _answer(task: bytes, connection: Connection[Any, Any]) -> bytes:
    """(True, result) or (False, reason), and whether this process is fit for another task, pickled.

    Before it runs the task, its code imported, it sends the time. What a task started on a GPU ends with it, so that an
    error there is its own and not the next one's; an error says with `poisons` that its process is not to be trusted
    any more.
    """
    try:
        try:
            function, arguments = pickle.loads(task)
        finally:
            connection.send_bytes(pickle.dumps(time.monotonic()))
        value = function(*arguments)
        _end_cuda_work()
        return pickle.dumps((True, value, True))
    except Exception as error:  # whatever a task raises is its answer
        reason = one_line(error)
        reason = f"out of memory: {reason}" if for_want_of_memory(reason) else reason
        return pickle.dumps((False, _reason(reason), not getattr(error, "poisons", False) and not _cuda_is_broken()))


def _end_cuda_work() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _cuda_is_broken() -> bool:
    """Whether an earlier error, an illegal address say, has made every later CUDA call of this process fail."""
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
