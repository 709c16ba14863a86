"""What generated code depends on besides the problem: TileLang's version and this package's own sources."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from tiles.registry import families

TILELANG = "0.1.15"
"""The pinned TileLang release. It is a constant, so that loading a pack needs no TileLang installed."""

SHARED_SOURCES = (
    "dialect.py",
    "compile.py",
    "launcher.py",
    "cuda_launcher.py",
    "limits.py",
    "prelude.py",
    "rows.py",
    "values.py",
)
"""Files outside the families' folders that decide generated code."""


@cache
def sources_hash(op: str) -> str:
    """A digest of every file that decides the code of `op`: the folders of its family and of the family's parts, and
    what families share."""
    family = next(family for family in families() if any(spec.op == op for spec in family.kernels))
    root = Path(__file__).parent
    files = [root / name for name in SHARED_SOURCES]
    for folder in (family.name, *family.parts):
        files += sorted((root / folder).glob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
