"""A kernel to store in a cache: a made-up key, schedule and binary."""

from __future__ import annotations

from tiles.cache.cache import KernelCache, Key, Record
from tiles.target import Device

DEVICE = Device("cpu", "A CPU", "x86-64-v3")
KEY = Key("merge", "forward", 4, 64, "float32", 128, 20, DEVICE, "0.1.15", "0123abcd")
SCHEDULE = {"block_width": 64, "unroll": True}


def put(cache: KernelCache, key: Key = KEY, binary: bytes = b"\x7fELF code", tuned_ms: float = 1.5) -> Record:
    return cache.put(key, SCHEDULE, binary, "int f();\n", {"tuned_ms": tuned_ms, "default_kept": False}, {"host": "a"})
