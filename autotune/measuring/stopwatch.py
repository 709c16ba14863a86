"""Stopwatches for calls on cold caches: the CPU's clock, or CUDA events around a graph or a queued call."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

import torch

Call = Callable[[], object]

FALLBACK_CACHE_BYTES = 32 * 2**20
"""Size of the last-level cache where the system does not report it."""


class Stopwatch(Protocol):
    """Times calls on one device."""

    conditions: dict[str, float]
    """The device's state when last asked (`observe`), stored with the times; may be empty."""

    def prepared(self, call: Call) -> Call:
        """The call that is timed in place of `call`: the same work, prepared once."""

    def milliseconds(self, prepared: Call) -> float:
        """The time of one run on cold caches."""

    def observe(self, prepared: Sequence[Call]) -> None:
        """Read the device's `conditions` while it runs these calls."""


def stopwatch_for(device: torch.device) -> Stopwatch:
    """The stopwatch for work on tensors of this device, the current one of its kind."""
    return CudaStopwatch() if device.type == "cuda" else CpuStopwatch()


def queued_stopwatch_for(device: torch.device) -> Stopwatch:
    """The same for calls that cannot be captured, such as autograd's (`QueuedStopwatch`)."""
    return QueuedStopwatch() if device.type == "cuda" else CpuStopwatch()


class CpuStopwatch:
    """The clock of this process. A CPU has no `conditions`: a virtual machine's clock rates say little."""

    def __init__(self) -> None:
        self.conditions: dict[str, float] = {}

    def prepared(self, call: Call) -> Call:
        """The call itself."""
        return call

    def milliseconds(self, prepared: Call) -> float:
        """Wall-clock time."""
        evict_caches()
        start = time.perf_counter_ns()
        prepared()
        return (time.perf_counter_ns() - start) / 1e6

    def observe(self, prepared: Sequence[Call]) -> None:
        """Does nothing."""


@cache
def last_level_cache_bytes() -> int:
    """The size of the largest cache of the first CPU."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    texts = [path.read_text(encoding="ascii").strip() for path in sizes]
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    known = [int(text[:-1]) * units[text[-1]] for text in texts if text and text[-1] in units]
    return max(known, default=FALLBACK_CACHE_BYTES)


@cache
def _eviction_buffer() -> torch.Tensor:
    # Not zeros, which may all be one page mapped many times.
    return torch.ones(2 * last_level_cache_bytes() // 4)


def evict_caches() -> None:
    """Read twice the size of the last-level cache; writing would leave write-backs to the next call."""
    _eviction_buffer().sum()


FLUSH = 4
"""How many times the L2 cache is overwritten. That takes the GPU longer (60 µs on an H200) than the CPU takes to queue
the events and the graph, so that the GPU does not wait for the CPU between the events."""

WARM_UP = 3
"""Runs before the capture, in which libraries choose algorithms and allocate workspaces."""

CLOCKS = {"clocks.sm": "sm_mhz", "clocks.mem": "memory_mhz", "temperature.gpu": "celsius"}

REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""nvidia-smi's names, new and old, for the bit mask of reasons for the current clocks."""

THROTTLED = 0x4 | 0x8 | 0x20 | 0x40 | 0x80
"""The bits of NVML's nvmlClocksEventReasons that slow a GPU down: power cap, hardware slowdown, software and hardware
thermal slowdown, power brake. The others mean that it idles or that its clocks were set."""

NVIDIA_SMI_SECONDS = 20.0
"""Time limit of nvidia-smi."""


class CudaStopwatch:
    """CUDA events around the replay of a graph, without the CPU's share of a launch.

    A call must launch all its work on torch's current stream, allocate through torch alone and not wait for the GPU, so
    that it can be captured.
    """

    def __init__(self) -> None:
        self.conditions: dict[str, float] = {}
        properties = torch.cuda.get_device_properties()
        self._uuid = f"GPU-{str(properties.uuid).removeprefix('GPU-')}"
        self._written = torch.empty(FLUSH * properties.L2_cache_size, dtype=torch.int8, device="cuda")
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def prepared(self, call: Call) -> Call:
        """The replay of a graph of the call; raises what capturing raises."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                call()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def milliseconds(self, prepared: Call) -> float:
        """Time between two events, with all of the L2 cache overwritten before the first."""
        self._written.zero_()
        return self._between_events(prepared)

    def _between_events(self, prepared: Call) -> float:
        self._start.record()
        prepared()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end)

    def observe(self, prepared: Sequence[Call]) -> None:
        """`sm_mhz`, `memory_mhz`, `celsius` and `throttled` (0 or 1), as far as nvidia-smi knows them.

        Read while the calls repeat: an idle GPU lowers its clocks within a second.
        """
        said = next(
            filter(None, (self._nvidia_smi_under_load([*CLOCKS, reasons], prepared) for reasons in REASONS)), ""
        )
        self.conditions = parse_conditions(said) if said else {}

    def _nvidia_smi_under_load(self, fields: Sequence[str], prepared: Sequence[Call]) -> str:
        """The output of nvidia-smi while the calls repeat; empty where it is missing, fails or hangs."""
        query = f"--query-gpu={','.join(fields)}"
        command = ["nvidia-smi", f"--id={self._uuid}", query, "--format=csv,noheader,nounits"]
        try:
            asked = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:
            return ""
        with asked:
            deadline = time.monotonic() + NVIDIA_SMI_SECONDS
            try:
                while asked.poll() is None and time.monotonic() < deadline:
                    for call in prepared:
                        self.milliseconds(call)
            finally:
                asked.kill()
            said = asked.stdout.read() if asked.stdout else ""
        return said.strip() if asked.returncode == 0 else ""


CLOCK = 2e9
"""Hz, at least the clock of today's GPUs: converts a wait from seconds to cycles."""

AHEAD, LEAST_AHEAD = 2.0, 50e-6
"""The GPU waits for so many times the CPU's queueing time of the call, plus so many seconds."""


class QueuedStopwatch(CudaStopwatch):
    """CUDA events around queued calls that cannot be captured: autograd's, other libraries'.

    A call must launch all its work on torch's current stream and must not wait for the GPU. The GPU is kept waiting
    until the CPU has queued all of the call, so that the time excludes the CPU's share of the launches. `host_seconds`
    has that share for every prepared call: the CPU's time to queue it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.host_seconds: dict[Call, float] = {}

    def prepared(self, call: Call) -> Call:
        """The call itself, after warm-up runs of compilers and libraries."""
        for _ in range(WARM_UP):
            call()
        self.host_seconds[call] = min(_queueing_seconds(call) for _ in range(WARM_UP))
        return call

    def milliseconds(self, prepared: Call) -> float:
        """Time between two events, with all of the L2 cache overwritten before the first."""
        self._written.zero_()
        torch.cuda._sleep(int(CLOCK * (AHEAD * self.host_seconds[prepared] + LEAST_AHEAD)))
        return self._between_events(prepared)


def _queueing_seconds(call: Call) -> float:
    """Seconds that the CPU takes to queue a call to an idle GPU."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return taken


def parse_conditions(said: str) -> dict[str, float]:
    """Parse nvidia-smi's line of the fields of `CLOCKS` and a bit mask, without "[N/A]" and such."""
    *clocks, mask = [text.strip() for text in said.splitlines()[0].split(",")]
    found = {name: float(text) for name, text in zip(CLOCKS.values(), clocks, strict=True) if text.isdecimal()}
    if mask.startswith("0x"):
        found["throttled"] = float(bool(int(mask, 16) & THROTTLED))
    return found
