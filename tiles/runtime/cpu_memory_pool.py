"""A pool of memory for large CPU results.

A fresh tensor of tens of megabytes costs more in page faults than a kernel takes to fill it, and the C library gives
such memory back to the system at every free. The pool keeps it instead, as torch's allocator for GPUs does: memory
that a tensor no longer uses serves the next result of its size. The pool never holds more than was once in use at the
same time.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from collections import defaultdict

import torch

MIN_POOLED_BYTES = 2**20
"""Smaller results come from torch: the C library keeps those itself."""

HUGE_PAGE_BYTES = 2**21
"""Blocks are whole huge pages (2 MiB), which take one page fault where the system grants them."""


class MemoryPool:
    """Hands out tensors; their memory comes back when the last tensor that shares it is gone. Thread-safe."""

    def __init__(self) -> None:
        # Re-entrant: a garbage collection inside a locked section may free a tensor, which gives its memory back.
        self._lock = threading.RLock()
        self._idle: dict[int, list[mmap.mmap]] = defaultdict(list)
        self._bytes = {"idle": 0, "used": 0, "peak": 0}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised contiguous CPU tensor."""
        count = 1
        for size in shape:
            count *= size
        needed = count * dtype.itemsize
        if needed < MIN_POOLED_BYTES:
            return torch.empty(shape, dtype=dtype)
        block = self._acquire(-(-needed // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES)
        # The tensor's storage keeps `lease` alive, and with `lease` ends the use of the block.
        lease = (ctypes.c_char * needed).from_buffer(block)
        weakref.finalize(lease, self._release, block).atexit = False
        return torch.frombuffer(lease, dtype=dtype).view(shape)

    def stats(self) -> dict[str, int]:
        """Bytes idle, in use, and the most that was ever in use at once."""
        with self._lock:
            return dict(self._bytes)

    def _acquire(self, size: int) -> mmap.mmap:
        with self._lock:
            self._bytes["used"] += size
            self._bytes["peak"] = max(self._bytes["peak"], self._bytes["used"])
            if self._idle[size]:
                self._bytes["idle"] -= size
                return self._idle[size].pop()
            self._trim()
        # Private: a forked process gets a copy of its own, as of any other memory.
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            block.madvise(mmap.MADV_HUGEPAGE)
        return block

    def _release(self, block: mmap.mmap) -> None:
        with self._lock:
            self._bytes["used"] -= len(block)
            self._bytes["idle"] += len(block)
            self._idle[len(block)].append(block)

    def _trim(self) -> None:
        """Let go of idle memory until what is held fits the peak; blocks of sizes no longer asked for go first."""
        for size in sorted(self._idle, key=lambda size: len(self._idle[size])):
            while self._idle[size] and self._bytes["idle"] + self._bytes["used"] > self._bytes["peak"]:
                self._idle[size].pop()
                self._bytes["idle"] -= size


MEMORY_POOL = MemoryPool()
"""The process's pool."""
