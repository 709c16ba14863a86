"""Kinds of failure of schedules, recognised in the reasons, which are free text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from autotune.processes.resource_limits import OUT_OF_MEMORY

OTHER = "other errors"

_KINDS = {
    "out of memory": OUT_OF_MEMORY,
    "took too long": re.compile(r"took longer than|did not start within"),
    "does not compile": re.compile(r"CompileError|compile_kernel ended its process"),
    "wrong result": re.compile(r"WrongResult"),
    "does not fit": re.compile(r"^DoesNotFit: "),
    "spills registers": re.compile(r"^Spills: "),
    "crashed": re.compile(r"ended its process|closed its connection"),
}
"""The first that matches counts: a compiler that runs out of memory, say, ends its process too."""


def kind_of(reason: str) -> str:
    """The kind of failure of a trial's reason."""
    return next((kind for kind, pattern in _KINDS.items() if pattern.search(reason)), OTHER)


def by_kind(reasons: Iterable[str]) -> dict[str, int]:
    """The number of reasons of each kind, the most frequent first."""
    return dict(Counter(map(kind_of, reasons)).most_common())
