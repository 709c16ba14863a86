"""What earlier searches found for other shapes and devices, as first schedules of a new search.

They are tried and timed like any other: a neighbour that misleads costs its trials and decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Protocol

from autotune.search.pool import Pool
from tiles.cache.record import Key
from tiles.kernels.spec import DTYPE_BYTES, KernelSpec

MOST = 4
"""So many schedules of neighbours start a search at most."""

SHARE = 4
"""And no more than one in this many of its trials."""


class Neighbour(Protocol):
    """A schedule that was measured somewhere: a cache's record, or one that ships with the package."""

    @property
    def key(self) -> Key:
        """For what and where."""

    @property
    def schedule(self) -> dict[str, Any]:
        """The tunables."""


def seeds(spec: KernelSpec, key: Key, pool: Pool, neighbours: Iterable[Neighbour], *, trials: int) -> list[int]:
    """The members of `pool` to try first, of the nearest neighbour first; at most `MOST`, and `trials` / `SHARE`.

    Neighbours of the same op and direction on a device of the same kind count. Their schedules are data: those of other
    sources and toolchains serve too, as long as the tunables have the same names. One that kept its default schedule
    advises the default, which every search tries anyway.
    """
    most, members = min(MOST, trials // SHARE), dict[int, None]()
    same_kernel = (neighbour for neighbour in neighbours if _same_kernel(neighbour.key, key))
    for neighbour in sorted(same_kernel, key=lambda neighbour: distance(neighbour.key, key)):
        if len(members) >= most:
            break
        member = None if _is_default(spec, neighbour) else nearest_member(pool, neighbour.schedule)
        if member is not None and member != pool.default:
            members[member] = None
    return list(members)


def distance(other: Key, key: Key) -> tuple[bool, bool, float, bool, str]:
    """Sorts nearer neighbours first: this device, its architecture, then how many times the shape doubles or halves.

    Of two at the same distance, one of today's sources comes first.
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

    A value that does not exist here moves to the nearest in log scale; where the values together are not valid, the
    member the fewest steps away stands for them.
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
    """How far apart two tunables are in log scale; one is added because some may be 0, and none should be less."""
    return abs(math.log2((1 + max(0, left)) / (1 + max(0, right))))


def _same_kernel(other: Key, key: Key) -> bool:
    return (other.op, other.direction, other.device.kind) == (key.op, key.direction, key.device.kind)


def _is_default(spec: KernelSpec, neighbour: Neighbour) -> bool:
    key = neighbour.key
    return bool(asdict(spec.default(key.problem, key.device.target)) == neighbour.schedule)
