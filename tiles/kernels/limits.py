"""Limits that schedules of all families are held to: block sizes that divide, and storage that a target has."""

from __future__ import annotations

from collections.abc import Callable

from tiles.kernels.spec import DTYPE_BYTES, Problem
from tiles.lang.storage import OWNED_REGISTERS
from tiles.target import Target, compute_capability

SHARED_BYTES = {
    **dict.fromkeys(("sm_80", "sm_87"), 163 * 1024),
    **dict.fromkeys(("sm_86", "sm_89", "sm_120a", "sm_121a"), 99 * 1024),
}
"""Shared memory a block can have, in bytes (CUDA programming guide, technical specifications): a multiprocessor's
(`occupancy.multiprocessor`) less what the system takes of it."""

SHARED_BYTES_HOPPER = 227 * 1024
"""The same for sm_90, sm_100 and sm_110 and their variants."""

STACK_BYTES = 512 * 1024
"""Local arrays a CPU kernel may have: OpenMP's threads can have stacks of 2 MiB."""

MAX_ACCUMULATORS = 160
"""float32 accumulators a CUDA thread may hold; above this the 255 registers spill."""

REGISTER_BLOCK = 8
"""Most rows or columns of a register block (MHC_BLOCK in `tiles.compiler.cpu_prelude`)."""

FEW_REGISTERS = ("x86-64", "x86-64-v2", "x86-64-v3")
"""CPU targets with 16 vector registers; others have 32."""


PAST_CACHES = 16 * 1024 * 1024
"""Bytes of results from which on a CPU's cores may store them past their caches: what reads them next would find little
of them there."""


def nontemporal_choices(problem: Problem, rows: int, target: Target) -> tuple[int, ...]:
    """Whether results of so many rows of the width a token may go past a CPU's caches: the usual choice first."""
    nbytes = problem.tokens * rows * problem.width * DTYPE_BYTES[problem.dtype]
    return (1, 0) if target.kind == "cpu" and nbytes >= PAST_CACHES else (0,)


def why_bad_nontemporal(nontemporal: int, target: Target) -> str | None:
    """The rule for stores past the caches, or None where it holds."""
    if nontemporal == 0 or (nontemporal == 1 and target.kind == "cpu"):
        return None
    return f"nontemporal must be 0, or 1 on a CPU, got {nontemporal} on {target}: choose 0"


FEW_OUTPUTS = 8
"""Those of two streams."""

SMALL_PHI = 1024 * 1024
"""Bytes of phi that an L2 cache of today may hold."""


def dots_block(problem: Problem, target: Target) -> tuple[int, int]:
    """Tokens × outputs of a register block of dot products, which leave registers for their operands: of 32 registers
    the squarest, which reads least for a product, unless there are too few outputs to fill such blocks."""
    if target.arch in FEW_REGISTERS:
        return 6, 2
    return (8, 3) if problem.outputs <= FEW_OUTPUTS else (5, 5)


def dots_width(problem: Problem, target: Target) -> int:
    """Most columns of the streams that are multiplied with phi at a time: more where phi comes from a near cache, and
    registers take long enough to make up for it."""
    near = 4 * problem.outputs * problem.fan_in <= SMALL_PHI
    return 1280 if near and target.arch not in FEW_REGISTERS else 640


LANES = 16
"""float32 lanes of the longest vector of a CPU."""


def token_lanes(tokens: int) -> int:
    """How many tokens' coefficients a CPU computes side by side for a block of so many: whole vectors. What a C
    compiler makes of a remainder may round in another way, and a token's bits would hang on its place in the block."""
    return -(-tokens // LANES) * LANES


def scratch_bytes(target: Target) -> int:
    """Bytes of scratch that a program for `target` may use."""
    if target.kind == "cpu":
        return STACK_BYTES
    return SHARED_BYTES.get(target.arch, SHARED_BYTES_HOPPER)


def owned_scratch(target: Target) -> Callable[[int], int]:
    """Of so many floats that a lane owns, those that are in scratch (`Dialect.per_thread`)."""
    return lambda floats: floats if target.kind == "cpu" or floats > OWNED_REGISTERS else 0


def why_too_much_scratch(needed: int, target: Target) -> str | None:
    """The rule for the bytes of a program's scratch, or None where it holds."""
    limit = scratch_bytes(target)
    if needed <= limit:
        return None
    return f"scratch must be at most {limit} bytes on {target}, got {needed}: choose smaller blocks"


def why_bad_pdl(use_pdl: int, target: Target) -> str | None:
    """The rule for kernels that start while the one before ends, or None where it holds."""
    if use_pdl == 0 or (use_pdl == 1 and supports_pdl(target)):
        return None
    return f"use_pdl must be 0, or 1 on sm_90 and newer, got {use_pdl} on {target}: choose 0"


def supports_pdl(target: Target) -> bool:
    """Whether kernels can wait for each other on the device (programmatic dependent launch, Hopper and newer)."""
    return target.kind == "cuda" and compute_capability(target) >= 90


def why_not_divisor(name: str, block: int, total: int) -> str | None:
    """The rule for a block along a dimension, or None where it holds."""
    if block >= 1 and total % block == 0:
        return None
    return f"{name} must divide {total}, got {block}: choose one of {', '.join(map(str, divisors(total, 8, 2048)))}"


def why_not_multiple(name: str, block: int, part: int) -> str | None:
    """The rule for a block that is cut into parts, or None where it holds."""
    if 1 <= block <= 1024 and block % part == 0:
        return None
    return f"{name} must be a multiple of {part} up to 1024, got {block}: choose {part * max(1, 48 // part)}"


def why_bad_register_block(rows: int, columns: int) -> str | None:
    """The rule for a register block, or None where it holds."""
    if 1 <= rows <= REGISTER_BLOCK and 1 <= columns <= REGISTER_BLOCK:
        return None
    return f"register blocks must be at most {REGISTER_BLOCK} × {REGISTER_BLOCK}, got {rows} × {columns}: choose 6 × 4"


def why_too_many_dots(held: int, target: Target) -> str | None:
    """The rule for dot products that are summed in vector registers, or None where it holds."""
    most = 13 if target.arch in FEW_REGISTERS else 28
    if target.kind != "cpu" or held <= most:
        return None
    return f"dot products in registers must be at most {most} on {target}, got {held}: choose smaller register blocks"


def divisors(total: int, least: int, most: int) -> tuple[int, ...]:
    """The divisors of `total` in least..most that are multiples of 64, or of 8 where there are none, thinned out so
    that each is at least 1.2 times the one before.

    `total` is a multiple of 8, so there is always one: 8 itself stands in where none is in the range.
    """
    for multiple in (64, 8):
        kept: list[int] = []
        for size in range(most - most % multiple, max(least, 1) - 1, -multiple):
            if total % size == 0 and (not kept or 5 * kept[-1] >= 6 * size):
                kept.append(size)
        if kept:
            return tuple(sorted(kept))
    return (8,)


def why_bad_threads(threads: int, target: Target) -> str | None:
    """The rule for CUDA threads a block (0 on a CPU, where the launcher decides), or None where it holds."""
    if target.kind == "cpu":
        return None if threads == 0 else f"threads must be 0 on a CPU, got {threads}: the launcher cuts slices"
    if threads % 32 == 0 and 32 <= threads <= 1024:
        return None
    return f"threads must be a multiple of 32 in 32..1024, got {threads}: choose 128"
