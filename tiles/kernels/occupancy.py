"""Occupancy: how many warps of a kernel fit a multiprocessor, from what the compiler reports, without a GPU.

The limits are those of the CUDA programming guide (technical specifications by compute capability) and of the occupancy
calculator in CUDA's `cuda_occupancy.h`: registers are given to whole warps in units of 256, shared memory to blocks in
units of 128 bytes, and every block takes 1 KiB of shared memory for the system.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
REGISTER_FILE = 64 * 1024
"""32-bit registers of a multiprocessor."""

REGISTER_UNIT, SHARED_UNIT, SYSTEM_SHARED = 256, 128, 1024
PARTITIONS = 4
"""A multiprocessor's registers lie in four parts, and a warp's all in one."""


@dataclass(frozen=True)
class Multiprocessor:
    """What one multiprocessor holds at a time: warps, thread blocks, bytes of shared memory."""

    warps: int
    blocks: int
    shared_bytes: int


_LIMITS = {
    "80": Multiprocessor(64, 32, 164 * 1024),
    "86": Multiprocessor(48, 16, 100 * 1024),
    "87": Multiprocessor(48, 16, 164 * 1024),
    "89": Multiprocessor(48, 24, 100 * 1024),
    "90": Multiprocessor(64, 32, 228 * 1024),
    "100": Multiprocessor(64, 32, 228 * 1024),
    "103": Multiprocessor(64, 32, 228 * 1024),
    "110": Multiprocessor(48, 24, 228 * 1024),
    "120": Multiprocessor(48, 24, 100 * 1024),
    "121": Multiprocessor(48, 24, 100 * 1024),
}


@dataclass(frozen=True)
class Occupancy:
    """Resident thread blocks and warps of a multiprocessor, their share of the most warps, and what limits them."""

    blocks: int
    warps: int
    percent: float
    limited_by: str


def multiprocessor(arch: str) -> Multiprocessor:
    """The limits of an architecture such as sm_90a."""
    return _LIMITS[arch.removeprefix("sm_").rstrip("a")]


def occupancy(arch: str, threads: int, registers: int, shared_bytes: int) -> Occupancy:
    """Of a kernel with so many threads a block, registers a thread and bytes of shared memory a block."""
    limits, warps = multiprocessor(arch), -(-threads // WARP)
    by_registers = limits.blocks
    if registers:
        warp_registers = _rounded(registers * WARP, REGISTER_UNIT)
        by_registers = REGISTER_FILE // PARTITIONS // warp_registers * PARTITIONS // warps
    fits = {
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
        "registers": by_registers,
        "shared memory": limits.shared_bytes // (_rounded(shared_bytes, SHARED_UNIT) + SYSTEM_SHARED),
    }
    least = min(fits, key=lambda limit: fits[limit])
    blocks = fits[least]
    return Occupancy(blocks, blocks * warps, 100 * blocks * warps / limits.warps, least)


def _rounded(value: int, unit: int) -> int:
    return -(-value // unit) * unit
