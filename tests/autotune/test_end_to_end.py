"""A tiny real problem: compiled by TileLang, verified, timed, stored, resumed, interrupted and killed.

In the fast tier: tests/cli/test_end_to_end.py (the real tuner, Ctrl-C), study/test_kills.py (a toy kernel)."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autotune.events import ProblemStarted, TrialDone
from autotune.processes.workers import Workers
from autotune.tuner import tune
from tiles.cache.cache import KernelCache
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.runtime.loaded_kernel import LoadedKernel, run_reference
from tiles.target import detect_device

pytestmark = pytest.mark.slow

PROBLEM = Problem("project", "forward", 2, 64, "bfloat16", tokens=64)
DEVICE = detect_device("cpu")

HEED_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
"""A test run that was started in the background ignores Ctrl-C, and so would what it starts."""

TUNE = """
import sys
from pathlib import Path
from autotune.events import TrialDone
from autotune.tuner import tune
from tiles.cache.cache import KernelCache
from tiles.kernels.spec import Problem
from tiles.target import detect_device

def show(event):
    if isinstance(event, TrialDone):
        print("trial", event.number, flush=True)

problem = Problem("project", "forward", 2, 64, "bfloat16", tokens=64)
try:
    tune(problem, detect_device("cpu"), KernelCache(Path(sys.argv[1])), trials=1000, on_event=show)
except KeyboardInterrupt:
    print("interrupted")
    sys.exit(130)
"""


@pytest.fixture(scope="module")
def workers():
    with Workers() as workers:
        yield workers


class NoWorkers:
    """Has nothing but a thread count: whoever asks for more fails."""

    threads = torch.get_num_threads()


def test_a_tuned_kernel_computes_what_its_reference_does_and_a_second_run_does_nothing(workers, tmp_path):
    cache, events = KernelCache(tmp_path), []
    result = tune(PROBLEM, DEVICE, cache, trials=3, workers=workers, on_event=events.append)
    assert (result.trials, result.failed) == (3, 0)
    assert [event.number for event in events if isinstance(event, TrialDone)] == [0, 1, 2]
    assert cache.records() == [result.record]
    assert result.record.measurement["tuned_ms"] > 0

    spec = kernel_spec("project", "forward")
    given = list(spec.inputs(PROBLEM, 77, seed=3).values())
    results = LoadedKernel(cache.binary_path(result.record), PROBLEM)(*given)
    for name, got, want in zip("zs", results, run_reference(PROBLEM, *given), strict=True):
        rtol, atol = spec.tolerance(PROBLEM, name)
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol)

    again = tune(PROBLEM, DEVICE, KernelCache(tmp_path), trials=3, workers=NoWorkers())
    assert again.stopped == "finished before"
    assert again.record == result.record


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_run_that_is_ended_keeps_what_it_finished(workers, tmp_path, sent, code):
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    process = subprocess.Popen(
        [sys.executable, "-c", HEED_CTRL_C + TUNE, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    seen = [process.stdout.readline(), process.stdout.readline()]
    process.send_signal(sent)
    printed, complaints = process.communicate(timeout=60)
    assert process.returncode == code, complaints
    assert complaints == ""
    done = len(re.findall(r"trial \d+", "".join([*seen, printed])))
    assert done >= 2

    cache, events = KernelCache(tmp_path), []
    if sent == signal.SIGINT:
        assert printed.endswith("interrupted\n")
        (record,) = cache.records()
        assert cache.binary_path(record).stat().st_size == record.size
    tune(PROBLEM, DEVICE, cache, trials=done + 1, workers=workers, on_event=events.append)
    assert [event.evaluated for event in events if isinstance(event, ProblemStarted)] == [done]
    assert sum(isinstance(event, TrialDone) for event in events) == 1
    assert cache.complaints == []
    assert len(cache.records()) == 1
