"""Tasks for worker processes: some answer, some misbehave."""

import ctypes
import os
import resource
import signal
import subprocess
import sys
import tempfile
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


def die_once(folder, sent):
    """Leaves word and is killed; a second run answers how often it was run."""
    (Path(folder) / f"{os.getpid()}").touch()
    runs = len(list(Path(folder).iterdir()))
    if runs == 1:
        os.kill(os.getpid(), sent)
        time.sleep(1000)
    return runs


def leave_child_and_die(pid_file):
    child = subprocess.Popen(["sleep", "1000"])
    Path(pid_file).write_text(f"{child.pid}")
    os.abort()


def limits():
    """(writable memory, file size, whom the system ends first)"""
    adjusted = int(Path("/proc/self/oom_score_adj").read_text())
    return resource.getrlimit(resource.RLIMIT_DATA)[0], resource.getrlimit(resource.RLIMIT_FSIZE)[0], adjusted


def child_limit():
    """The limit that a compiler, say, has."""
    program = "import resource; print(resource.getrlimit(resource.RLIMIT_DATA)[0])"
    return int(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)


def allocate(size):
    return len(bytearray(size))


def allocate_tensor(size):
    import torch

    return torch.zeros(size, dtype=torch.int8).sum().item()


def temporary_folder():
    return tempfile.gettempdir()


class Distrusted(Exception):
    poisons = True


def raise_distrusted():
    raise Distrusted("wrote somewhere")


def fail_on_gpu(when):
    """Stands in for a CUDA context: an error that all later calls repeat, noticed by the task or only behind it."""
    import torch

    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    torch.cuda.is_initialized = lambda: True
    torch.cuda.synchronize = synchronize
    if when == "in the task":
        raise RuntimeError("CUDA error: launch failed")


def fail_beside_a_sound_gpu():
    import torch

    torch.cuda.is_initialized = lambda: True
    torch.cuda.synchronize = lambda: None
    raise ValueError("no fault of the GPU")


def unpicklable():
    return lambda: None


def chatter():
    sys.stdout.write("to standard output")
    sys.stderr.write("to standard error")
