"""Exact minimum set cover: the fewest candidates that cover all token buckets, with ties broken."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations


def smallest_cover(acceptable: Sequence[Mapping[str, float]], defaults: Sequence[str]) -> list[str]:
    """Choose a candidate for each bucket, the fewest in all, from each bucket's {candidate: slowdown} and default.

    The smallest set that covers all buckets, by trying all; on ties the one whose members cover most buckets, then the
    one with more defaults. Each bucket takes the member that covers most buckets, then the default, then the fastest.
    """
    names = dict.fromkeys(name for of_bucket in acceptable for name in of_bucket)
    covers = {name: frozenset(at for at, of in enumerate(acceptable) if name in of) for name in names}
    slowdown = {name: statistics.fmean(of[name] for of in acceptable if name in of) for name in names}
    # Of candidates that cover the same buckets one is enough, and none is needed that covers a subset of another.
    representative: dict[frozenset[int], str] = {}
    for name in sorted(names, key=lambda name: (name not in defaults, slowdown[name])):
        representative.setdefault(covers[name], name)
    useful = [name for covered, name in representative.items() if not any(covered < other for other in representative)]
    cover = max(
        _smallest_covers(useful, covers, len(acceptable)),
        key=lambda names: (sum(len(covers[name]) for name in names), sum(name in defaults for name in names)),
    )
    return [
        min((name for name in cover if name in of), key=lambda name: (-len(covers[name]), name != default, of[name]))
        for of, default in zip(acceptable, defaults, strict=True)
    ]


def _smallest_covers(names: Sequence[str], covers: Mapping[str, frozenset[int]], buckets: int) -> list[tuple[str, ...]]:
    for size in range(1, buckets + 1):
        found = [some for some in combinations(names, size) if _count(covers, some) == buckets]
        if found:
            return found
    raise AssertionError("the fastest of a bucket covers it")


def _count(covers: Mapping[str, frozenset[int]], names: Sequence[str]) -> int:
    """Number of buckets that these cover together."""
    return len(frozenset[int]().union(*(covers[name] for name in names)))
