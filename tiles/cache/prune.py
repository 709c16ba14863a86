"""Removes from a kernel cache what nothing will read again, while other processes read and write it.

No locks: network file systems do not agree on them. It is safe by order instead. Files are listed first and the records
read afterwards; `KernelCache.put` writes a kernel's files anew before the record that points at them. So a file that is
still the one that was listed, and that its record did not name, is named by none. A file is renamed before it is
removed, and put back if it turns out to be another one than was listed. What is younger than a grace period stays: a
reader that has just read an old record goes on to read its binary.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tiles.cache.cache import TEMPORARY_SUFFIX, CacheCorrupt, binary_name, checked_binary, source_name
from tiles.cache.compiled_here import SUBFOLDERS
from tiles.cache.record import FORMAT, MAX_RECORD_BYTES, Record, from_json, record_from_dict
from tiles.errors import BadInput

GRACE_SECONDS = 3600.0
"""Longer than any process takes from reading a record to loading its binary, or to write a file."""

_RECORD = re.compile(r"(?P<key>[0-9a-f]{32})\.json")
_CONTENT = re.compile(r"(?P<key>[0-9a-f]{32})-[0-9a-f]{16}\.(so|cpp|cu)")


@dataclass(frozen=True)
class Pruned:
    """A file that was removed, or would be: its size in bytes and why."""

    path: Path
    size: int
    why: str


def prune(
    folder: Path, *, stale: bool = False, dry_run: bool = False, grace_seconds: float = GRACE_SECONDS
) -> list[Pruned]:
    """Remove superseded binaries and sources, corrupt entries and left-over temporary files from a kernel cache.

    With `stale` also the kernels of other sources or another TileLang, whose schedules go with them. Never what a sound
    record points at, nor records of other formats. Returns what was removed. Raises `BadInput` for a folder that is
    none or cannot be changed.
    """
    if not folder.is_dir():
        raise BadInput(f"a cache to prune must be a folder, found none at {folder}: check --cache")
    removed = []
    for place in (folder, *(folder / name for name in SUBFOLDERS)):
        for file, why in _superfluous(place, stale=stale, before=time.time() - grace_seconds):
            if dry_run or _remove(file):
                removed.append(Pruned(file.path, file.size, why))
    return removed


@dataclass(frozen=True)
class _File:
    """A file as it was listed."""

    path: Path
    inode: int
    changed_ns: int
    size: int

    def is_before(self, moment: float) -> bool:
        return self.changed_ns < moment * 1e9

    def same_as(self, status: os.stat_result) -> bool:
        return (self.inode, self.changed_ns) == (status.st_ino, status.st_mtime_ns)


def _superfluous(folder: Path, *, stale: bool, before: float) -> Iterator[tuple[_File, str]]:
    """What may go from one folder, with the reason."""
    files = _listed(folder)
    by_key: dict[str, list[_File]] = {}
    for file in files.values():
        if match := _CONTENT.fullmatch(file.path.name):
            by_key.setdefault(match["key"], []).append(file)
    for name in [name for name in files if _RECORD.fullmatch(name)]:
        yield from _of_record(files[name], by_key.pop(name[:32], []), stale, before)
    # Without a record when they were listed; one may have come since.
    for key, contents in by_key.items():
        if not (folder / f"{key}.json").exists():
            yield from ((file, "no record points at it") for file in contents if file.is_before(before))
    for name, file in files.items():
        if name.startswith(".") and name.endswith(TEMPORARY_SUFFIX) and file.is_before(before):
            yield file, "left over by a process that was stopped"


def _of_record(entry: _File, contents: list[_File], stale: bool, before: float) -> Iterator[tuple[_File, str]]:
    """What may go of one key: its record, and those of its binaries and sources that the record does not name."""
    if not entry.is_before(before):
        return
    try:
        record = _sound(entry.path)
    except BadInput as error:
        yield entry, str(error)
        yield from ((file, "its record is corrupt") for file in contents if file.is_before(before))
        return
    except OSError:
        return
    if record is None:
        return
    if stale and not record.key.current:
        yield entry, "it is of other sources or another TileLang"
        yield from ((file, "its record is stale") for file in contents if file.is_before(before))
        return
    named = (binary_name(record), source_name(record))
    for file in contents:
        if file.path.name not in named and file.is_before(before):
            yield file, "superseded by a newer kernel"


def _sound(path: Path) -> Record | None:
    """The record in a file, its binary checked; None for one of another format. Raises `BadInput` for a corrupt one,
    and OSError where that cannot be told."""
    with path.open("rb") as file:
        text = file.read(MAX_RECORD_BYTES + 1)
    values = from_json(text)
    key = values.get("key") if isinstance(values, dict) else None
    if isinstance(key, dict) and isinstance(key.get("format"), int) and key["format"] != FORMAT:
        return None
    record = record_from_dict(values)
    if path.name != f"{record.key.digest}.json":
        raise CacheCorrupt(f"its key belongs in {record.key.digest}.json")
    binary = path.with_name(binary_name(record))
    try:
        with binary.open("rb") as file:
            checked_binary(record, file.read(record.size + 1))
    except FileNotFoundError:
        raise CacheCorrupt(f"its binary {binary.name} is missing") from None
    return record


def _listed(folder: Path) -> dict[str, _File]:
    """The plain files of a folder by name; no links."""
    found: dict[str, _File] = {}
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except FileNotFoundError:
        return found
    except OSError as error:
        raise BadInput(f"a cache to prune must be readable, got {folder} ({error.strerror}): check --cache") from error
    for entry in entries:
        with suppress(FileNotFoundError):
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISREG(status.st_mode):
                found[entry.name] = _File(Path(entry.path), status.st_ino, status.st_mtime_ns, status.st_size)
    return found


def _remove(file: _File) -> bool:
    """Remove a file if it still is the one that was listed."""
    aside = file.path.with_name(f".{file.path.name}.{os.getpid()}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")
    try:
        if not file.same_as(file.path.lstat()):
            return False
        file.path.rename(aside)
        if file.same_as(aside.lstat()):
            aside.unlink()
            return True
        with suppress(FileExistsError):  # an even newer one is there by now
            os.link(aside, file.path)
        aside.unlink()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise BadInput(
            f"a cache to prune must be writable, got {file.path.parent} ({error.strerror}): choose another folder"
        ) from error
    return False
