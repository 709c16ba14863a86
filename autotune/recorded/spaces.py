"""Recorded spaces: the measured time of every member of a pool, in memory and in our file format."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from autotune.search.pool import Pool
from tiles.cache.cache import write_atomically

FORMAT = "mhc-tune space"
VERSION = 1


@dataclass(frozen=True)
class RecordedSpace:
    """An exhaustively measured pool.

    Fields:
        name: for people.
        pool: the members. Its default counts only where `has_default`: other tools' files have none.
        ms: per member the median milliseconds, or None where it failed.
        reasons: {member: why it failed}.
        spread: per member the quartiles (low, high) of its rounds, over the median, or None where unknown.
        sources: per member the SHA-256 of its generated code, or None where unknown.
        about: device, problem, versions and other metadata, plain data.
    """

    name: str
    pool: Pool
    ms: tuple[float | None, ...]
    reasons: Mapping[int, str]
    has_default: bool
    spread: tuple[tuple[float, float] | None, ...] = ()
    sources: tuple[str | None, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def optimum(self) -> float:
        """The least milliseconds of all members."""
        return min(ms for ms in self.ms if ms is not None)

    @property
    def worst(self) -> float:
        """The most milliseconds of all members that run."""
        return max(ms for ms in self.ms if ms is not None)

    def starting_at(self, member: int) -> Pool:
        """The pool with another default."""
        return replace(self.pool, default=member)


def write_space(space: RecordedSpace, path: Path) -> None:
    """Write the space as gzipped JSON, atomically."""
    data = {
        "format": FORMAT,
        "version": VERSION,
        "name": space.name,
        "about": dict(space.about),
        "tunables": {name: list(values) for name, values in space.pool.space.items()},
        "default": space.pool.default if space.has_default else None,
        "members": [list(steps) for steps in space.pool.members],
        "ms": list(space.ms),
        "spread": [part and list(part) for part in space.spread],
        "sources": list(space.sources),
        "failed": {str(member): reason for member, reason in space.reasons.items()},
    }
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    # No time stamp in the file: equal spaces are equal bytes.
    write_atomically(path, gzip.compress(text.encode(), mtime=0))


def space_from(data: Mapping[str, Any]) -> RecordedSpace:
    """The space of an object written by `write_space`; raises ValueError, TypeError or LookupError for any other."""
    if data["version"] != VERSION:
        raise ValueError(f"version {data['version']!r} of the format")
    tunables = {str(name): tuple(values) for name, values in data["tunables"].items()}
    members = tuple(tuple(steps) for steps in data["members"])
    for steps in members:
        if len(steps) != len(tunables) or not all(
            type(step) is int and 0 <= step < len(values) for step, values in zip(steps, tunables.values(), strict=True)
        ):
            raise ValueError(f"a member {list(steps)!r} outside of the tunables")
    default = data["default"]
    if default is not None and not (type(default) is int and 0 <= default < len(members)):
        raise ValueError(f"the default {default!r}")
    ms = tuple(None if value is None else milliseconds(value) for value in data["ms"])
    sources = tuple(data["sources"])
    spread = tuple(part and (float(part[0]), float(part[1])) for part in data["spread"])
    if len(ms) != len(members) or any(len(column) not in (0, len(members)) for column in (sources, spread)):
        raise ValueError(f"columns of {len(ms)}, {len(sources)} and {len(spread)} rows for {len(members)} members")
    return RecordedSpace(
        name=str(data["name"]),
        pool=Pool(tunables, members, default or 0),
        ms=ms,
        reasons={int(member): str(reason) for member, reason in data["failed"].items()},
        has_default=default is not None,
        spread=spread,
        sources=sources,
        about=dict(data["about"]),
    )


def milliseconds(value: Any) -> float:
    """A measured time; raises ValueError for what cannot be one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"the time {value!r}")
    return float(value)
