"""Transfer learning: schedules tuned for other shapes and devices warm-start a new search.

They are tried and timed like any other: a misleading neighbour costs its trials and decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Protocol

from autotune.search.pool import Pool
from tiles.cache.record import Key
from tiles.kernels.spec import DTYPE_BYTES, KernelSpec

MAX_SEEDS = 4
"""At most so many schedules of neighbours start a search."""

TRIALS_PER_SEED = 4
"""And at most one in this many of its trials."""


class Neighbour(Protocol):
    """A tuned schedule: a cache's record, or one that ships with the package."""

    @property
    def key(self) -> Key:
        """The problem and the device that it was tuned for."""

    @property
    def schedule(self) -> dict[str, Any]:
        """The tunables."""


def seeds(spec: KernelSpec, key: Key, pool: Pool, neighbours: Iterable[Neighbour], *, trials: int) -> list[int]:
    """The members of `pool` to try first, nearest neighbour first, at most `MAX_SEEDS` and `trials`/`TRIALS_PER_SEED`.

    Only neighbours of the same op and direction on a device of the same kind count. Their schedules are data: other
    sources and toolchains serve too, as long as the tunables have the same names. A neighbour that kept its default is
    left out, as every search tries the default anyway.
    """
    most, members = min(MAX_SEEDS, trials // TRIALS_PER_SEED), dict[int, None]()
    same_kernel = (neighbour for neighbour in neighbours if _same_kernel(neighbour.key, key))
    for neighbour in sorted(same_kernel, key=lambda neighbour: distance(neighbour.key, key)):
        if len(members) >= most:
            break
        member = None if _is_default(spec, neighbour) else nearest_member(pool, neighbour.schedule)
        if member is not None and member != pool.default:
            members[member] = None
    return list(members)


def distance(other: Key, key: Key) -> tuple[bool, bool, float, bool, str]:
    """A sort key, nearer neighbours first: this device, its architecture, then by how many doublings the shapes differ.

    Of two at the same distance, one of the current sources comes first.
    """
    doublings = sum(
        abs(math.log2(max(1, there) / max(1, here)))
        for there, here in (
            (other.tokens, key.tokens),
            (other.width, key.width),
            (other.streams, key.streams),
            (DTYPE_BYTES[other.dtype], DTYPE_BYTES[key.dtype]),
        )
    )
    current = (other.toolchain, other.sources) == (key.toolchain, key.sources)
    return other.device != key.device, other.device.arch != key.device.arch, doublings, not current, other.digest


def nearest_member(pool: Pool, schedule: dict[str, Any]) -> int | None:
    """The member nearest to a schedule of another problem, or None where its tunables are not this pool's.

    A value that is not in this pool moves to the nearest in log scale; where the combination is invalid, the member the
    fewest steps away is taken.
    """
    if set(schedule) != set(pool.space):
        return None
    values = {}
    for name, choices in pool.space.items():
        value = schedule[name]
        if type(value) is not type(choices[0]) or (isinstance(value, str) and value not in choices):
            return None
        values[name] = value if value in choices else min(choices, key=lambda choice: _octaves(choice, value))
    return pool.nearest(values, range(len(pool)))[0]


def _octaves(left: float, right: float) -> float:
    """The distance of two tunables in log2 scale, of 1 + value, as some are 0; negative values count as 0."""
    return abs(math.log2((1 + max(0, left)) / (1 + max(0, right))))


def _same_kernel(other: Key, key: Key) -> bool:
    return (other.op, other.direction, other.device.kind) == (key.op, key.direction, key.device.kind)


def _is_default(spec: KernelSpec, neighbour: Neighbour) -> bool:
    key = neighbour.key
    return bool(asdict(spec.default(key.problem, key.device.target)) == neighbour.schedule)
