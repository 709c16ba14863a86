"""Tasks for worker processes: some answer, some misbehave."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def add(left, right):
    return left + right


def process_and_session():
    return os.getpid(), os.getsid(0)


def raise_error(text):
    raise ValueError(text)


def exit_at_once(code):
    sys.stdout.write("last words")
    sys.stdout.flush()
    os._exit(code)


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def read_null():
    ctypes.string_at(0)


def hang(seconds=1000):
    time.sleep(seconds)


def hang_with_child(pid_file):
    """Starts a process of its own, as a compiler driver does, and waits for it."""
    child = subprocess.Popen(["sleep", "1000"])
    Path(pid_file).write_text(f"{os.getpid()} {child.pid}")
    child.wait()


def unpicklable():
    return lambda: None


def chatter():
    sys.stdout.write("to standard output")
    sys.stderr.write("to standard error")
