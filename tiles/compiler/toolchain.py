"""The versions that generated code depends on besides the problem: TileLang's, and a digest of this package's
sources."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from tiles.kernels.registry import families

TILELANG = "0.1.15"
"""The pinned TileLang release. It is a constant, so that loading a pack needs no TileLang installed."""

SHARED_FOLDERS = (".", "lang", "compiler", "kernels")
"""Folders of `tiles` whose modules all families share. Cache, packs and runtime come after the code is made."""

ROOT = Path(__file__).parents[1]


@cache
def sources_hash(op: str) -> str:
    """A digest of every module that can decide the code of `op`: 16 hexadecimal digits."""
    return hash_sources(op, ROOT)


def hash_sources(op: str, root: Path) -> str:
    """The digest of `op` for the package `tiles` that lies in `root`.

    It covers whole folders: the shared ones, and those of the op's family and of the families that it is made of.
    """
    family = next(family for family in families() if any(spec.op == op for spec in family.kernels))
    files = [file for folder in SHARED_FOLDERS for file in (root / folder).glob("*.py")]
    files += [file for name in (family.name, *family.parts) for file in (root / "kernels" / name).rglob("*.py")]
    digest = hashlib.sha256()
    for name, file in sorted((file.relative_to(root).as_posix(), file) for file in files):
        digest.update(name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
