"""Stopwatches: the work before and between timed calls. CUDA's order of work is checked on a fake."""

import contextlib
import itertools
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from autotune.measuring import stopwatch
from autotune.measuring.stopwatch import (
    CpuStopwatch,
    CudaStopwatch,
    QueuedStopwatch,
    last_level_cache_bytes,
    parse_conditions,
    queued_stopwatch_for,
    stopwatch_for,
)
from autotune.measuring.timing import interleaved


def test_eviction_reads_more_than_the_last_level_cache():
    assert last_level_cache_bytes() >= 2**18
    stopwatch.evict_caches()
    assert stopwatch._eviction_buffer().nbytes >= 2 * last_level_cache_bytes() - 8


def test_the_cpus_time_is_the_calls_and_not_the_evictions(monkeypatch):
    monkeypatch.setattr(stopwatch, "evict_caches", lambda: time.sleep(0.2))
    watch = CpuStopwatch()
    call = watch.prepared(lambda: time.sleep(0.02))
    assert 20 <= watch.milliseconds(call) < 190
    watch.observe([call])
    assert watch.conditions == {}


def test_tensors_say_which_stopwatch():
    assert isinstance(stopwatch_for(torch.zeros(1).device), CpuStopwatch)
    assert isinstance(queued_stopwatch_for(torch.zeros(1).device), CpuStopwatch)


@pytest.mark.parametrize(
    ("said", "conditions"),
    [
        (
            "1980, 2619, 41, 0x0000000000000000\n",
            {"sm_mhz": 1980, "memory_mhz": 2619, "celsius": 41, "throttled": 0},
        ),
        # Idle (0x1) and clocks that somebody has set (0x2) slow nothing down unasked.
        ("345, 2619, 30, 0x0000000000000003\n", {"sm_mhz": 345, "memory_mhz": 2619, "celsius": 30, "throttled": 0}),
        ("1200, 2619, 88, 0x0000000000000020\n", {"sm_mhz": 1200, "memory_mhz": 2619, "celsius": 88, "throttled": 1}),
        ("1200, 2619, 60, 0x0000000000000005\n", {"sm_mhz": 1200, "memory_mhz": 2619, "celsius": 60, "throttled": 1}),
        ("[N/A], [N/A], 50, [N/A]\n", {"celsius": 50}),
        ("[Unknown Error], 2619, 50, [Not Supported]\n", {"memory_mhz": 2619, "celsius": 50}),
    ],
)
def test_what_nvidia_smi_says(said, conditions):
    assert parse_conditions(said) == conditions


class FakeCuda:
    """Logs the order of work. Each event stands a millisecond behind the one before."""

    def __init__(self, monkeypatch):
        self.log, ticks = [], itertools.count()
        cuda, log = torch.cuda, self.log

        class Stream:
            def wait_stream(self, other):
                log.append("wait")

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                log.append("event")
                self.at = float(next(ticks))

            def synchronize(self):
                log.append("synchronize")

            def elapsed_time(self, end):
                return end.at - self.at

        class Graph:
            def replay(self):
                log.append("replay")

        @contextlib.contextmanager
        def within(name):
            log.append(f"begin {name}")
            yield
            log.append(f"end {name}")

        properties = SimpleNamespace(uuid="1234-5678", L2_cache_size=1000)
        monkeypatch.setattr(cuda, "get_device_properties", lambda: properties)
        monkeypatch.setattr(cuda, "Stream", Stream)
        monkeypatch.setattr(cuda, "current_stream", Stream)
        monkeypatch.setattr(cuda, "Event", Event)
        monkeypatch.setattr(cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(cuda, "stream", lambda stream: within("stream"))
        monkeypatch.setattr(cuda, "graph", lambda graph: within("capture"))
        monkeypatch.setattr(cuda, "synchronize", lambda: log.append("synchronize all"))
        monkeypatch.setattr(cuda, "_sleep", self.sleep)
        monkeypatch.setattr(torch, "empty", self.empty)
        self.cycles = []

    def sleep(self, cycles):
        self.log.append("sleep")
        self.cycles.append(cycles)

    def empty(self, size, *, dtype, device):
        assert device == "cuda"
        self.flushed = size * dtype.itemsize
        return SimpleNamespace(zero_=lambda: self.log.append("flush"))


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


def test_on_cuda_a_call_is_captured_once_and_replayed_behind_a_flush(cuda):
    watch = CudaStopwatch()
    assert cuda.flushed >= 2 * 1000, "more than the L2 cache holds"
    call = watch.prepared(lambda: cuda.log.append("call"))
    assert cuda.log == [
        *("wait", "begin stream", "call", "call", "call", "end stream", "wait"),
        *("begin capture", "call", "end capture"),
    ]
    cuda.log.clear()
    assert watch.milliseconds(call) == 1.0
    assert cuda.log == ["flush", "event", "replay", "event", "synchronize"]


def test_a_queued_call_is_not_captured_and_finds_the_gpu_waiting(cuda):
    def call():
        cuda.log.append("call")
        time.sleep(0.01)

    watch = QueuedStopwatch()
    assert watch.prepared(call) is call
    assert set(cuda.log) == {"call", "synchronize all"}
    assert watch.host_seconds[call] >= 0.01
    cuda.log.clear()
    assert watch.milliseconds(call) == 1.0
    assert cuda.log == ["flush", "sleep", "event", "call", "event", "synchronize"]
    (cycles,) = cuda.cycles
    assert cycles / stopwatch.CLOCK > watch.host_seconds[call], "the GPU waits for longer than queueing takes"


def test_queued_calls_are_interleaved_like_others(cuda):
    calls = {"a": lambda: cuda.log.append("a"), "b": lambda: cuda.log.append("b")}
    watch = QueuedStopwatch()
    assert interleaved(calls, stopwatch=watch, rounds=3) == {"a": [1.0] * 3, "b": [1.0] * 3}
    assert set(watch.host_seconds) == set(calls.values())


def nvidia_smi(monkeypatch, folder, script):
    """Put a program of that name first on PATH; it leaves its arguments in the file `asked`."""
    program = folder / "nvidia-smi"
    program.write_text(f'#!/bin/sh\necho "$@" >>"{folder}/asked"\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder / "asked"


def test_clocks_are_read_under_load_and_kept(cuda, monkeypatch, tmp_path):
    asked = nvidia_smi(monkeypatch, tmp_path, 'sleep 0.3; echo "1980, 2619, 41, 0x0000000000000004"')
    watch = CudaStopwatch()
    times = interleaved({"a": lambda: None, "b": lambda: None}, stopwatch=watch, rounds=2)
    assert times == {"a": [1.0, 1.0], "b": [1.0, 1.0]}
    assert watch.conditions == {"sm_mhz": 1980, "memory_mhz": 2619, "celsius": 41, "throttled": 1}
    assert cuda.log.count("replay") > 2 + 4, "after the rounds it ran on"
    assert asked.read_text().splitlines() == [
        "--id=GPU-1234-5678 --query-gpu=clocks.sm,clocks.mem,temperature.gpu,clocks_event_reasons.active "
        "--format=csv,noheader,nounits"
    ]


def test_an_older_driver_is_asked_by_its_own_names(cuda, monkeypatch, tmp_path):
    answer = 'case "$*" in *event_reasons*) exit 2;; esac; echo "1980, 2619, 41, 0x0000000000000000"'
    asked = nvidia_smi(monkeypatch, tmp_path, answer)
    watch = CudaStopwatch()
    watch.observe([lambda: None])
    assert watch.conditions["throttled"] == 0
    assert len(asked.read_text().splitlines()) == 2


@pytest.mark.parametrize("script", ["exit 9", "exec sleep 1000", "echo"])
def test_an_nvidia_smi_that_fails_or_hangs_leaves_nothing_known(cuda, monkeypatch, tmp_path, script):
    monkeypatch.setattr(stopwatch, "NVIDIA_SMI_SECONDS", 0.2)
    nvidia_smi(monkeypatch, tmp_path, script)
    watch = CudaStopwatch()
    watch.observe([lambda: None])
    assert watch.conditions == {}


def test_a_missing_nvidia_smi_leaves_nothing_known(cuda, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    watch = CudaStopwatch()
    watch.observe([lambda: None])
    assert watch.conditions == {}


def test_a_call_that_fails_meanwhile_leaves_no_process(cuda, monkeypatch, tmp_path):
    nvidia_smi(monkeypatch, tmp_path, f'echo $$ >"{tmp_path}/pid"; exec sleep 1000')

    def fails():
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            raise RuntimeError("CUDA error")

    with pytest.raises(RuntimeError, match="CUDA error"):
        CudaStopwatch().observe([fails])
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


@pytest.mark.gpu
def test_a_real_gpus_copy_takes_as_long_as_its_bandwidth_allows():
    source = torch.ones(2**26, device="cuda")
    target = torch.empty_like(source)
    watch = CudaStopwatch()
    times = interleaved(
        {"one": lambda: target.copy_(source), "four": lambda: [target.copy_(source) for _ in range(4)]},
        stopwatch=watch,
        rounds=10,
    )
    one, four = (sorted(times[name])[5] for name in ("one", "four"))
    assert 0.02 < one < 20, "half a gigabyte is moved: at 25 GB/s to 25 TB/s"
    assert 3 < four / one < 5
    assert watch.conditions.get("sm_mhz", 1) > 0


@pytest.mark.gpu
def test_on_a_real_gpu_a_queued_call_takes_as_long_as_a_captured_one():
    source = torch.ones(2**26, device="cuda")
    target = torch.empty_like(source)
    found = {}
    for watch in (CudaStopwatch(), QueuedStopwatch()):
        times = interleaved({"copy": lambda: target.copy_(source)}, stopwatch=watch, rounds=10)
        found[type(watch)] = sorted(times["copy"])[5]
    assert 0.8 < found[QueuedStopwatch] / found[CudaStopwatch] < 1.25


@pytest.mark.gpu
def test_on_a_real_gpu_the_l2_cache_is_cold():
    size = torch.cuda.get_device_properties().L2_cache_size // 4
    source, target = (
        torch.ones(size, dtype=torch.int8, device="cuda"),
        torch.empty(size, dtype=torch.int8, device="cuda"),
    )
    watch = CudaStopwatch()
    copy = watch.prepared(lambda: target.copy_(source))
    cold = sorted(watch.milliseconds(copy) for _ in range(20))[10]
    watch._written = torch.empty(16, dtype=torch.int8, device="cuda")
    warm = sorted(watch.milliseconds(copy) for _ in range(20))[10]
    assert cold > 1.1 * warm
