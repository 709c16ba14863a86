"""Whole searches over faulty kernels: each fault gives its reason, and no process or file is left."""

import os
import re
import secrets
import signal
import tempfile
import threading
import time
from pathlib import Path

import faults
import pytest

from autotune import tuner
from autotune.events import TrialDone, TrialFailed
from autotune.processes.workers import Workers
from autotune.tuner import tune
from tiles.cache.cache import KernelCache
from tiles.target import detect_device

DEVICE = detect_device("cpu")

MEASURE, COMPILE = 2, 10
"""Seconds that those that hang are given, and what is compiled beside them; the others get `PATIENCE`."""

PATIENCE = 300

GIGABYTES_4 = 4 * 2**30

REASONS = {
    "wrong": r"WrongResult: u at 1 tokens in 1 slices: \d+ of 64 elements are beyond rtol .*",
    "nan": r"WrongResult: u at 131 tokens in 3 slices: .* got nan where the reference has .*",
    "past-the-end": r"WrongResult: u at 1 tokens in 1 slices: wrote outside of the result",
    "segmentation-fault": r"assess ended its process: SIGSEGV",
    "abort": r"assess ended its process: SIGABRT",
    "endless-loop": rf"assess took longer than {MEASURE} s and was killed",
    "30-GB": r"out of memory: assess ended its process: SIGABRT - what\(\): +std::bad_alloc",
    "killed-twice": r"assess ended its process: SIGKILL, twice",
    "compiler-hangs": rf"compile_faulty took longer than {COMPILE} s and was killed",
    "compiler-takes-30-GB": r"out of memory: MemoryError",
    "does-not-compile": r"RuntimeError: g\+\+ failed: .* error: .*",
}

FINE = {"slow", "right", "killed-once", "compiler-killed-once"}

SAMPLE = ("slow", "right", "past-the-end", "compiler-killed-once", "does-not-compile")
"""Faults that are over soon: the others are told apart in test_worker.py and test_verify.py, and all meet in the slow
tier."""


class FaultyWorkers(Workers):
    compiler = staticmethod(faults.compile_faulty)

    def compile(self, problem, schedules, target):
        hangs = faults.Fault("compiler-hangs") in schedules
        self._compile_seconds = COMPILE if hangs else PATIENCE
        return super().compile(problem, schedules, target)

    def assess(self, problem, tuned, default, seed):
        self._measure_seconds = MEASURE if faults.ENDLESS in tuned else PATIENCE
        try:
            return super().assess(problem, tuned, default, seed)
        finally:
            self._measure_seconds = PATIENCE


@pytest.fixture
def mark(monkeypatch, tmp_path, names):
    """Environment of all processes that the test starts; temporary files are in `tmp_path / "temporary"`."""
    mark = secrets.token_hex(8)
    for name in ("temporary", "faults"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("FAULTS_MARK", mark)
    monkeypatch.setenv(faults.FOLDER, str(tmp_path / "faults"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tuner, "kernel_spec", lambda op, direction: faults.spec_of(names))
    return mark


def running(mark):
    """The processes that carry a mark, by what they run."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"FAULTS_MARK={mark}".encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:80]
        except OSError:  # it has ended
            continue
    return found


def kill_who_leaves_word(folder, ended):
    """Kill each process whose id appears in a file of this folder, as somebody at a terminal might."""
    killed = set()
    while not ended.is_set():
        for word in [path for path in folder.iterdir() if "." not in path.name]:
            for line in word.read_text().splitlines(keepends=True):
                if line.endswith("\n") and (word, line) not in killed:
                    killed.add((word, line))
                    os.kill(int(line), signal.SIGKILL)
        time.sleep(0.05)


@pytest.fixture
def killer(tmp_path, mark):
    ended = threading.Event()
    thread = threading.Thread(target=kill_who_leaves_word, args=(tmp_path / "faults", ended))
    thread.start()
    yield
    ended.set()
    thread.join()


@pytest.mark.parametrize("names", [SAMPLE, pytest.param(tuple(faults.BODIES), marks=pytest.mark.slow)], ids=len)
def test_a_search_over_faults_ends_right_and_leaves_nothing(tmp_path, mark, killer, names):
    cache, events = KernelCache(tmp_path / "cache"), []
    with FaultyWorkers(threads=1, measure_seconds=PATIENCE, memory=GIGABYTES_4) as workers:
        result = tune(faults.PROBLEM, DEVICE, cache, trials=100, workers=workers, on_event=events.append)
        assert running(mark), "the check below looks at the right thing"
        assert list((tmp_path / "temporary").iterdir())
        again = tune(faults.PROBLEM, DEVICE, cache, trials=100, workers=workers, on_event=events.append)
    assert running(mark) == {}
    assert list((tmp_path / "temporary").iterdir()) == []

    failed = [(event.schedule["name"], event.reason) for event in events if isinstance(event, TrialFailed)]
    assert sorted(name for name, _ in failed) == sorted(set(REASONS) & set(names))
    assert {name: reason for name, reason in failed if not re.fullmatch(REASONS[name], reason)} == {}
    done = [event.schedule["name"] for event in events if isinstance(event, TrialDone)]
    assert sorted(done) == sorted(FINE & set(names))
    assert set(REASONS) | FINE == set(faults.BODIES)
    assert (result.stopped, result.trials, result.failed) == ("pool swept", len(names), len(failed))
    assert result.record.schedule["name"] in FINE - {"slow"}
    assert result.record.measurement["ratio"] > 1
    assert again.stopped == "finished before"
