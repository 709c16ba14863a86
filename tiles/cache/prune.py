"""Pruning: deletion of what nothing will read again from a kernel cache, while other processes read and write it.

It takes no locks, as network file systems implement them differently, and is safe by order. Files are listed first and
records read afterwards; `KernelCache.put` writes a kernel's files before the record that points at them. So a file that
is still the one that was listed, and that its record did not name, is named by none. A file is renamed before it is
deleted, and put back if it is not the one that was listed. Files younger than a grace period stay: a reader that has
just read an old record goes on to read its binary.
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
"""More than any process takes from reading a record to loading its binary, or to write a file."""

_RECORD = re.compile(r"(?P<key>[0-9a-f]{32})\.json")
_CONTENT = re.compile(r"(?P<key>[0-9a-f]{32})-[0-9a-f]{16}\.(so|cpp|cu)")


@dataclass(frozen=True)
class PrunedFile:
    """A file that was removed, or would be: its size in bytes and why."""

    path: Path
    size: int
    why: str


def prune(
    folder: Path, *, stale: bool = False, dry_run: bool = False, grace_seconds: float = GRACE_SECONDS
) -> list[PrunedFile]:
    """Remove superseded binaries and sources, corrupt entries and left-over temporary files from a kernel cache.

    With `stale` also kernels of other sources or another TileLang, with their schedules. What a valid record points at
    stays, and so do records of other formats. Returns what was removed. Raises `BadInput` for a folder that does not
    exist or cannot be changed.
    """
    if not folder.is_dir():
        raise BadInput(f"a cache to prune must be a folder, found none at {folder}: check --cache")
    removed = []
    for place in (folder, *(folder / name for name in SUBFOLDERS)):
        for file, why in _unneeded_files(place, stale=stale, before=time.time() - grace_seconds):
            if dry_run or _remove(file):
                removed.append(PrunedFile(file.path, file.size, why))
    return removed


@dataclass(frozen=True)
class _ListedFile:
    """A file as it was listed."""

    path: Path
    inode: int
    changed_ns: int
    size: int

    def is_before(self, moment: float) -> bool:
        return self.changed_ns < moment * 1e9

    def same_as(self, status: os.stat_result) -> bool:
        return (self.inode, self.changed_ns) == (status.st_ino, status.st_mtime_ns)


def _unneeded_files(folder: Path, *, stale: bool, before: float) -> Iterator[tuple[_ListedFile, str]]:
    """The files of one folder that may go, each with the reason."""
    files = _listed(folder)
    by_key: dict[str, list[_ListedFile]] = {}
    for file in files.values():
        if match := _CONTENT.fullmatch(file.path.name):
            by_key.setdefault(match["key"], []).append(file)
    for name in [name for name in files if _RECORD.fullmatch(name)]:
        yield from _unneeded_of_key(files[name], by_key.pop(name[:32], []), stale, before)
    # Without a record when they were listed; one may have come since.
    for key, contents in by_key.items():
        if not (folder / f"{key}.json").exists():
            yield from ((file, "no record points at it") for file in contents if file.is_before(before))
    for name, file in files.items():
        if name.startswith(".") and name.endswith(TEMPORARY_SUFFIX) and file.is_before(before):
            yield file, "left over by a process that was stopped"


def _unneeded_of_key(
    entry: _ListedFile, contents: list[_ListedFile], stale: bool, before: float
) -> Iterator[tuple[_ListedFile, str]]:
    """The files of one key that may go: its record, and the binaries and sources that the record does not name."""
    if not entry.is_before(before):
        return
    try:
        record = _valid_record(entry.path)
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


def _valid_record(path: Path) -> Record | None:
    """The record in a file, with its binary checked; None for one of another format. Raises `BadInput` for a corrupt
    one, and OSError for one that cannot be read."""
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


def _listed(folder: Path) -> dict[str, _ListedFile]:
    """The plain files of a folder by name, without links."""
    found: dict[str, _ListedFile] = {}
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
                found[entry.name] = _ListedFile(Path(entry.path), status.st_ino, status.st_mtime_ns, status.st_size)
    return found


def _remove(file: _ListedFile) -> bool:
    """Remove a file if it is still the one that was listed; whether it was removed."""
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
