"""Roofline of this machine: copy bandwidth and float32 arithmetic, which no kernel can beat by much."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from autotune.measuring.stopwatch import CudaStopwatch, last_level_cache_bytes
from tiles.kernels.spec import Traffic

MIN_REPEATS, MAX_SECONDS = 5, 4.0
"""A limit is measured with at least so many repeats, and no more once they have taken so many seconds."""


def copy_bandwidth(*, repeats: int = 25) -> float:
    """GB/s of `Tensor.copy_` with torch's threads, read and write bytes counted: the fastest of `repeats` copies.

    Searches stop at this limit, so a moment's slowdown of the machine must not lower it.
    """
    size = max(4 * last_level_cache_bytes(), 64 * 2**20)
    source, target = torch.ones(size // 4), torch.ones(size // 4)
    return 2 * size / _fastest(lambda: target.copy_(source), repeats) / 1e9


SIDE = 640
"""Side of the square matrices that arithmetic is measured with: three of them take 5 MB."""

CHANNELS, PIXELS, TAPS = 256, 32, 3
"""Convolution that arithmetic is measured with: channels in and out, output pixels a side, filter taps a side. Images
and weights take 5 MB."""


def arithmetic_peak(*, repeats: int = 100) -> float:
    """GFLOP/s of float32 (1e9 additions or multiplications a second): the fastest arithmetic of torch here.

    The fastest of `repeats` matrix products and as many convolutions, with torch's threads, on operands in cache. Both,
    because they run in different libraries: on AMD processors the matrix products of torch's builds leave half of the
    AVX-512 units idle, which our kernels do not, and convolutions reach the processor's peak.
    """
    left, right = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    product = _fastest(lambda: torch.mm(left, right), repeats)
    side = PIXELS + TAPS - 1
    image = torch.randn(1, CHANNELS, side, side).contiguous(memory_format=torch.channels_last)
    weights = torch.randn(CHANNELS, CHANNELS, TAPS, TAPS).contiguous(memory_format=torch.channels_last)
    convolution = _fastest(lambda: torch.conv2d(image, weights), repeats)
    return max(2 * SIDE**3 / product, 2 * (CHANNELS * PIXELS * TAPS) ** 2 / convolution) / 1e9


def _fastest(call: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest call, after one that is not counted. On a busy machine there are fewer `repeats`."""
    call()
    times: list[float] = []
    while len(times) < repeats and (len(times) < MIN_REPEATS or sum(times) < MAX_SECONDS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


GPU_COPY_BYTES, GPU_SIDE, GPU_REPEATS = 2**30, 8192, 10
"""Measurement of a GPU's limits: bytes of a copy, side of square matrices, calls of each."""


def _of_gpu() -> tuple[float, float]:
    """GB/s of a copy (read and write counted), and GFLOP/s of products of float32 matrices on the tensor cores (TF32):
    the fastest of `GPU_REPEATS` each."""
    source = torch.ones(GPU_COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    copy_ms = _fastest_on_gpu(lambda: target.copy_(source))
    left, right = (torch.randn(GPU_SIDE, GPU_SIDE, device="cuda") for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        product_ms = _fastest_on_gpu(lambda: left @ right)
    finally:
        torch.set_float32_matmul_precision(before)
    return 2 * GPU_COPY_BYTES / copy_ms / 1e6, 2 * GPU_SIDE**3 / product_ms / 1e6


def _fastest_on_gpu(call: Callable[[], object]) -> float:
    """Milliseconds."""
    stopwatch = CudaStopwatch()
    prepared = stopwatch.prepared(call)
    return min(stopwatch.milliseconds(prepared) for _ in range(GPU_REPEATS))


@dataclass(frozen=True)
class Roofline:
    """Limits of this machine: copy bandwidth (GB/s) and float32 arithmetic (GFLOP/s)."""

    copy_gb_per_s: float
    gflops: float

    @classmethod
    def measure(cls, kind: Literal["cpu", "cuda"] = "cpu") -> Roofline:
        """Measure this machine's CPU, with torch's threads, or its current GPU; takes about a second."""
        return cls(copy_bandwidth(), arithmetic_peak()) if kind == "cpu" else cls(*_of_gpu())

    def limit_ms(self, traffic: Traffic) -> float:
        """The least time (ms) for this traffic: its bytes at copy bandwidth, or its operations at the peak."""
        return max(traffic.bytes / self.copy_gb_per_s, traffic.flops / self.gflops) / 1e6
