"""The fewest candidates that serve everybody: an exact set cover, with its ties broken."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations


def choose(serving: Sequence[Mapping[str, float]], defaults: Sequence[str]) -> list[str]:
    """One candidate for each bucket, few in all, from {candidate that serves it: its loss} and default of each bucket.

    The smallest set that covers all buckets, by trying all; on ties the one whose members serve most buckets, then the
    one with more defaults. Each bucket takes the member that serves most buckets, then the default, then the fastest.
    """
    names = dict.fromkeys(name for of_bucket in serving for name in of_bucket)
    serves = {name: frozenset(at for at, of in enumerate(serving) if name in of) for name in names}
    loss = {name: statistics.fmean(of[name] for of in serving if name in of) for name in names}
    # Of those that serve the same buckets one is enough, and none is needed that serves fewer than another.
    representative: dict[frozenset[int], str] = {}
    for name in sorted(names, key=lambda name: (name not in defaults, loss[name])):
        representative.setdefault(serves[name], name)
    useful = [name for served, name in representative.items() if not any(served < other for other in representative)]
    cover = max(
        _smallest_covers(useful, serves, len(serving)),
        key=lambda names: (sum(len(serves[name]) for name in names), sum(name in defaults for name in names)),
    )
    return [
        min((name for name in cover if name in of), key=lambda name: (-len(serves[name]), name != default, of[name]))
        for of, default in zip(serving, defaults, strict=True)
    ]


def _smallest_covers(names: Sequence[str], serves: Mapping[str, frozenset[int]], buckets: int) -> list[tuple[str, ...]]:
    for size in range(1, buckets + 1):
        covers = [some for some in combinations(names, size) if _count(serves, some) == buckets]
        if covers:
            return covers
    raise AssertionError("the fastest of a bucket serves it")


def _count(serves: Mapping[str, frozenset[int]], names: Sequence[str]) -> int:
    """How many buckets these serve together."""
    return len(frozenset[int]().union(*(serves[name] for name in names)))
