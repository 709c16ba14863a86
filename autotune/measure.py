"""Timing on this machine's CPU: cold data, interleaved calls, what a difference is worth, and what the limits are."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from tiles.family import Traffic

FALLBACK_CACHE_BYTES = 32 * 2**20
"""Taken as the size of the last-level cache where the system does not tell."""


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


def copy_bandwidth(*, repeats: int = 25) -> float:
    """GB/s of `Tensor.copy_` with torch's threads, read and write bytes counted: the fastest of `repeats` copies.

    It is a limit that searches stop at, so what slows the machine for a moment must not lower it.
    """
    size = max(4 * last_level_cache_bytes(), 64 * 2**20)
    source, target = torch.ones(size // 4), torch.ones(size // 4)
    return 2 * size / _fastest(lambda: target.copy_(source), repeats) / 1e9


SIDE = 640
"""Of the square matrices that arithmetic is measured with: three of them take 5 MB."""

CHANNELS, PIXELS, TAPS = 256, 32, 3
"""Of the convolution that arithmetic is measured with: channels in and out, resulting pixels, and weights for each, a
side. Images and weights take 5 MB."""


def arithmetic_peak(*, repeats: int = 100) -> float:
    """GFLOP/s of float32 (1e9 additions or multiplications a second), the fastest arithmetic torch shows here.

    That of the fastest of `repeats` matrix products and as many convolutions, with torch's threads, on operands that
    caches hold. Both, because they run in different libraries: on AMD processors matrix products of torch's builds
    leave half of the AVX-512 units idle, which our kernels do not, and convolutions reach what the processor can do.
    """
    left, right = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    product = _fastest(lambda: torch.mm(left, right), repeats)
    side = PIXELS + TAPS - 1
    image = torch.randn(1, CHANNELS, side, side).contiguous(memory_format=torch.channels_last)
    weights = torch.randn(CHANNELS, CHANNELS, TAPS, TAPS).contiguous(memory_format=torch.channels_last)
    convolution = _fastest(lambda: torch.conv2d(image, weights), repeats)
    return max(2 * SIDE**3 / product, 2 * (CHANNELS * PIXELS * TAPS) ** 2 / convolution) / 1e9


def _fastest(call: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest call; one that is not counted goes before."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


@dataclass(frozen=True)
class Roofline:
    """What no kernel can beat by much on this machine: copy bandwidth (GB/s) and float32 arithmetic (GFLOP/s)."""

    copy_gb_per_s: float
    gflops: float

    @classmethod
    def measure(cls) -> Roofline:
        """This machine's, with torch's threads; takes about a second."""
        return cls(copy_bandwidth(), arithmetic_peak())

    def limit_ms(self, traffic: Traffic) -> float:
        """The least time (ms) for this traffic: its bytes at copy bandwidth, or its operations at the peak."""
        return max(traffic.bytes / self.copy_gb_per_s, traffic.flops / self.gflops) / 1e6


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 20,
    seconds: float = math.inf,
    least: int = 5,
    warmup: int = 1,
    cold: bool = True,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Time calls against each other: {name: milliseconds of each round}, all lists equally long.

    Each round runs every call once, in an order shuffled by `seed`, so that what slows the machine for a while slows
    all of them. `cold` evicts the caches before each call. Stops after `rounds`, or after `seconds` once there are
    `least` rounds. `warmup` rounds are run first and not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(seed)
    for _ in range(warmup):
        for name in order:
            calls[name]()
    deadline = time.perf_counter() + seconds
    for done in range(rounds):
        if done >= least and time.perf_counter() > deadline:
            break
        shuffle.shuffle(order)
        for name in order:
            if cold:
                evict_caches()
            start = time.perf_counter_ns()
            calls[name]()
            times[name].append((time.perf_counter_ns() - start) / 1e6)
    return times


@dataclass(frozen=True)
class Ratio:
    """How many times faster: the median of paired ratios, and the bounds of its 95 % confidence interval."""

    median: float
    low: float
    high: float


def paired_ratio(slow_ms: Sequence[float], fast_ms: Sequence[float]) -> Ratio:
    """slow/fast over rounds timed together.

    The bounds are the exact, distribution-free ones of the sign test: the k-th smallest and the k-th largest ratio,
    with k the largest number for which fewer than k heads in n fair flips have a probability of at most 2.5 %.
    Fewer than six rounds bound nothing.
    """
    ratios = sorted(slow / fast for slow, fast in zip(slow_ms, fast_ms, strict=True))
    outside, below = -1, 0.0
    while (below := below + math.comb(len(ratios), outside + 1) / 2 ** len(ratios)) <= 0.025:
        outside += 1
    median = statistics.median(ratios)
    if outside < 0:
        return Ratio(median, 0.0, math.inf)
    return Ratio(median, ratios[outside], ratios[-1 - outside])
