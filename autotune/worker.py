"""A process that runs one task after another and may crash, hang or be killed without harm to its owner.

It is a fresh interpreter and no fork, because torch and OpenMP do not survive one. It leads a session of its own, so
that Ctrl-C does not reach it and killing its group takes along the compilers that it has started.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

REASON_LENGTH = 400
"""Characters of a failure's reason that are kept."""


class TaskFailed(Exception):
    """A task raised, its worker died, or it took too long; the text is the reason, in one line."""


class Worker:
    """One process, started at the first task and again after a failure that it did not survive."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[Any, Any] | None = None
        self._output: IO[bytes] | None = None
        self._task = ""

    def call(self, seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(*arguments)` in the worker; see `finish`."""
        self.start(function, *arguments)
        return self.finish(seconds)

    def start(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Hand over a task: a function that the worker can import, and arguments that can be pickled."""
        self._task = function.__name__
        task = pickle.dumps((function, arguments))
        if self._process is None or self._process.poll() is not None:
            self._spawn()
        assert self._connection
        try:
            self._connection.send_bytes(task)
        except ConnectionError:  # it died this moment, before it had anything to do with the task
            self._spawn()
            self._connection.send_bytes(task)

    def finish(self, seconds: float) -> Any:
        """The result of the task that was started last; raises `TaskFailed`, and kills a worker that is too slow."""
        assert self._connection
        try:
            if not self._connection.poll(seconds):
                self.kill()
                raise TaskFailed(f"{self._task} took longer than {seconds:g} s and was killed")
            done, value = pickle.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionError):
            raise TaskFailed(f"{self._task} ended its process: {self._epitaph()}") from None
        except TaskFailed:
            raise
        except BaseException:
            # Ctrl-C, say: an answer that nobody waits for must not meet the next task.
            self.kill()
            raise
        if not done:
            raise TaskFailed(value)
        return value

    def kill(self) -> None:
        """End the process and all that it started."""
        if self._process is None or self._connection is None or self._output is None:
            return
        # Before wait(): until then the process id cannot have passed to somebody else.
        if self._process.returncode is None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                self._process.kill()
        self._process.wait()
        self._connection.close()
        self._output.close()
        self._process = self._connection = self._output = None

    def _spawn(self) -> None:
        self.kill()
        self._connection, theirs = Pipe()
        # What tasks print must not end up in the owner's output; its last line explains a crash.
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from autotune.worker import serve; serve({theirs.fileno()})"],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)},
        )
        theirs.close()

    def _epitaph(self) -> str:
        """How the process ended and the last line that it printed."""
        assert self._process
        assert self._output
        code = self._process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self._output.seek(0)
        printed = self._output.read().decode(errors="replace").strip().splitlines()
        self.kill()
        return one_line(" - ".join([how, *printed[-1:]]))


def serve(descriptor: int) -> None:
    """The worker's side: answer tasks until the owner is gone."""
    connection: Connection[Any, Any] = Connection(descriptor)
    tasks: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, tasks), daemon=True).start()
    while True:
        connection.send_bytes(_answer(tasks.get()))


def _listen(connection: Connection[Any, Any], tasks: queue.SimpleQueue[bytes]) -> None:
    """Take in tasks. A thread of its own, so that a worker that hangs does not outlive an owner that was killed."""
    try:
        while True:
            tasks.put(connection.recv_bytes())
    except (EOFError, OSError):
        os.killpg(os.getpgrp(), signal.SIGKILL)


def _answer(task: bytes) -> bytes:
    """(True, result) or (False, reason), pickled."""
    try:
        function, arguments = pickle.loads(task)
        return pickle.dumps((True, function(*arguments)))
    except Exception as error:  # whatever a task raises is its answer
        return pickle.dumps((False, one_line(f"{type(error).__name__}: {error}")))


def one_line(text: str) -> str:
    """The text without line breaks, cut to `REASON_LENGTH`."""
    joined = " ".join(text.split())
    return joined if len(joined) <= REASON_LENGTH else joined[: REASON_LENGTH - 1] + "…"
