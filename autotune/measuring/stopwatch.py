"""How one call is timed on cold caches: on the CPU by its clock, on CUDA by events around a graph or a queued call."""

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
"""Taken as the size of the last-level cache where the system does not tell."""


class Stopwatch(Protocol):
    """Times calls on one device."""

    conditions: dict[str, float]
    """What the device said of itself when it was last asked (`observe`), to be kept with the times; may be empty."""

    def prepared(self, call: Call) -> Call:
        """What is timed in place of `call`: the same work, made ready once, before anything is timed."""

    def milliseconds(self, prepared: Call) -> float:
        """The time of one run, which finds none of its data in a cache."""

    def observe(self, prepared: Sequence[Call]) -> None:
        """Ask the device for its `conditions` while it runs these calls."""


def stopwatch_for(device: torch.device) -> Stopwatch:
    """The stopwatch for work on tensors of this device, the current one of its kind."""
    return CudaStopwatch() if device.type == "cuda" else CpuStopwatch()


def queued_stopwatch_for(device: torch.device) -> Stopwatch:
    """The same for calls that are not fit for capture, such as autograd's (`QueuedStopwatch`)."""
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
    # Not zeros: those may all be one page that is mapped many times.
    return torch.ones(2 * last_level_cache_bytes() // 4)


def evict_caches() -> None:
    """Read twice the last-level cache. Reading leaves clean lines: writing would leave write-backs to the next call."""
    _eviction_buffer().sum()


FLUSH = 4
"""How many times the L2 cache is written over. That also takes the GPU longer (60 µs on an H200) than the CPU takes to
queue the events and the graph behind it, so that the GPU does not wait for the CPU between the events."""

WARM_UP = 3
"""Runs before the capture: libraries choose their algorithms and allocate their workspaces then."""

CLOCKS = {"clocks.sm": "sm_mhz", "clocks.mem": "memory_mhz", "temperature.gpu": "celsius"}

REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""Why clocks are what they are, a bit mask: nvidia-smi's name for it, and the one that older drivers know."""

THROTTLED = 0x4 | 0x8 | 0x20 | 0x40 | 0x80
"""The bits of NVML's nvmlClocksEventReasons that slow a GPU down: power cap, hardware slowdown, software and hardware
thermal slowdown, power brake. The others say that it idles or that somebody set its clocks."""

PATIENCE = 20.0
"""Seconds that nvidia-smi may take."""


class CudaStopwatch:
    """Events of the current CUDA device.

    A call must launch all its work on torch's current stream, allocate through torch alone and not wait for the GPU:
    it is captured into a graph, and what is timed is the graph's replay, without the CPU's share of a launch.
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
        """Time between two events, with all of the L2 cache written over before the first."""
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

        Asked while the calls run over and over: an idle GPU lowers its clocks within a second.
        """
        said = next(filter(None, (self._said_under_load([*CLOCKS, reasons], prepared) for reasons in REASONS)), "")
        self.conditions = parsed(said) if said else {}

    def _said_under_load(self, fields: Sequence[str], prepared: Sequence[Call]) -> str:
        """What nvidia-smi prints, or nothing where it is missing, fails or hangs."""
        query = f"--query-gpu={','.join(fields)}"
        command = ["nvidia-smi", f"--id={self._uuid}", query, "--format=csv,noheader,nounits"]
        try:
            asked = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:
            return ""
        with asked:
            deadline = time.monotonic() + PATIENCE
            try:
                while asked.poll() is None and time.monotonic() < deadline:
                    for call in prepared:
                        self.milliseconds(call)
            finally:
                asked.kill()
            said = asked.stdout.read() if asked.stdout else ""
        return said.strip() if asked.returncode == 0 else ""


CLOCK = 2e9
"""Hz, at least the clock of a GPU of today: so many cycles a second are waited where a wait is given in seconds."""

AHEAD, LEAST_AHEAD = 2.0, 50e-6
"""The GPU waits for so many times the seconds that queueing the call took the CPU, and for so many seconds more."""


class QueuedStopwatch(CudaStopwatch):
    """Events of the current CUDA device around calls that need not be fit for capture: autograd's, other libraries'.

    A call must launch all its work on torch's current stream and must not wait for the GPU. The GPU is kept waiting
    until the CPU has queued all of the call, so that the CPU's share of the launches is not in the time.
    `host_seconds` has that share, for every call that was prepared: the CPU's time for a call whose work the GPU does
    not begin meanwhile.
    """

    def __init__(self) -> None:
        super().__init__()
        self.host_seconds: dict[Call, float] = {}

    def prepared(self, call: Call) -> Call:
        """The call itself, after a few runs: compilers and libraries are ready then."""
        for _ in range(WARM_UP):
            call()
        self.host_seconds[call] = min(_queueing_seconds(call) for _ in range(WARM_UP))
        return call

    def milliseconds(self, prepared: Call) -> float:
        """Time between two events, with all of the L2 cache written over before the first."""
        self._written.zero_()
        torch.cuda._sleep(int(CLOCK * (AHEAD * self.host_seconds[prepared] + LEAST_AHEAD)))
        return self._between_events(prepared)


def _queueing_seconds(call: Call) -> float:
    """What the CPU takes for a call; the GPU has nothing else to do."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return taken


def parsed(said: str) -> dict[str, float]:
    """One line of nvidia-smi for the fields of `CLOCKS` and a bit mask, by our names; "[N/A]" and such are left out."""
    *clocks, mask = [text.strip() for text in said.splitlines()[0].split(",")]
    found = {name: float(text) for name, text in zip(CLOCKS.values(), clocks, strict=True) if text.isdecimal()}
    if mask.startswith("0x"):
        found["throttled"] = float(bool(int(mask, 16) & THROTTLED))
    return found
