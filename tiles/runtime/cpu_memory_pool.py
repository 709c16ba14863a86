"""A memory pool for large CPU results.

A fresh tensor of tens of megabytes costs more in page faults than a kernel takes to fill it, and the C library returns
such memory to the system at every free. The pool caches it, as torch's CUDA allocator does: a block that no tensor uses
serves the next result of its size. The pool never holds more than was once in use at the same time.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from collections import defaultdict
from contextlib import suppress
from math import prod

import torch

MIN_POOLED_BYTES = 2**20
"""Smaller results come from torch: the C library caches those itself."""

HUGE_PAGE_BYTES = 2**21
"""Blocks are whole huge pages, which take one page fault each where the system grants them."""


class MemoryPool:
    """Allocates tensors; a block returns to the pool with the last tensor that shares it. Thread-safe."""

    def __init__(self) -> None:
        # Re-entrant: a garbage collection inside a locked section may free a tensor, which releases its block.
        self._lock = threading.RLock()
        self._idle: dict[int, list[mmap.mmap]] = defaultdict(list)
        self._bytes = {"idle": 0, "used": 0, "peak": 0}

    def pools(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Whether such a tensor has memory of the pool."""
        return prod(shape) * dtype.itemsize >= MIN_POOLED_BYTES

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised contiguous CPU tensor."""
        if not self.pools(shape, dtype):
            return torch.empty(shape, dtype=dtype, device="cpu")
        needed = prod(shape) * dtype.itemsize
        block = self._acquire(-(-needed // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES)
        # The tensor's storage keeps `lease` alive; the block is released when `lease` is collected.
        lease = (ctypes.c_char * needed).from_buffer(block)
        weakref.finalize(lease, self._release, block).atexit = False
        return torch.frombuffer(lease, dtype=dtype).view(shape).detach()  # no view: autograd allows writes to it

    def stats(self) -> dict[str, int]:
        """Bytes idle, bytes in use, and the peak of those in use."""
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
        # Private: a forked process gets a copy, as of any other memory.
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel that was built without transparent huge pages refuses the advice
                block.madvise(mmap.MADV_HUGEPAGE)
        return block

    def _release(self, block: mmap.mmap) -> None:
        with self._lock:
            self._bytes["used"] -= len(block)
            self._bytes["idle"] += len(block)
            self._idle[len(block)].append(block)

    def _trim(self) -> None:
        """Free idle blocks until the pool fits the peak, those of sizes no longer asked for first."""
        for size in sorted(self._idle, key=lambda size: len(self._idle[size])):
            while self._idle[size] and self._bytes["idle"] + self._bytes["used"] > self._bytes["peak"]:
                self._idle[size].pop()
                self._bytes["idle"] -= size


MEMORY_POOL = MemoryPool()
"""The pool of this process."""
