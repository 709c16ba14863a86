"""Why schedules fail, by kind: the reasons themselves are sentences, each its own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

OTHER = "other errors"

_KINDS = {
    "out of memory": re.compile(r"out of memory|MemoryError|bad_alloc|Cannot allocate memory", re.IGNORECASE),
    "took too long": re.compile(r"took longer than|did not start within"),
    "does not compile": re.compile(r"CompileError|compile_kernel ended its process"),
    "wrong result": re.compile(r"WrongResult"),
    "does not fit": re.compile(r"^DoesNotFit: "),
    "spills registers": re.compile(r"^Spills: "),
    "crashed": re.compile(r"ended its process|closed its connection"),
}
"""In this order: a compiler that runs out of memory, say, ends its process too."""


def kind_of(reason: str) -> str:
    """The kind of failure that a trial's reason tells of."""
    return next((kind for kind, pattern in _KINDS.items() if pattern.search(reason)), OTHER)


def by_kind(reasons: Iterable[str]) -> dict[str, int]:
    """How many of the reasons are of each kind, the most frequent first."""
    return dict(Counter(map(kind_of, reasons)).most_common())
