"""The kernel cache: a folder of records, each a JSON file beside the binary and the source that it describes.

    <key>.json               the record, named by its key's digest
    <key>-<content>.so       the binary, named by its own SHA-256 as well
    <key>-<content>.cpp      the generated source

Files are only ever added or replaced whole. A name that carries the content's hash lets a kernel be tuned again, by
several processes at once, while others load it: an old record goes on pointing at its own binary.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tiles.cache.folder_trust import why_folder_untrusted
from tiles.cache.record import (
    FORMAT,
    MAX_RECORD_BYTES,
    Key,
    Record,
    from_json,
    record_dict,
    record_from_dict,
    to_json,
    token_bucket,
)
from tiles.errors import BadInput
from tiles.folders import default_folder

__all__ = [
    "FORMAT",
    "CacheCorrupt",
    "KernelCache",
    "Key",
    "Record",
    "binary_name",
    "checked_binary",
    "default_folder",
    "source_name",
    "token_bucket",
    "write_atomically",
]

BINARY_SUFFIX = ".so"
SOURCE_SUFFIX = {"cpu": ".cpp", "cuda": ".cu"}
TEMPORARY_SUFFIX = ".tmp"
"""Of a file that is being written, or was when its process died; its name starts with a dot."""

NOT_BY_OTHERS = 0o775
"""The mode of folders, before the umask: not even with a umask of zero may everybody write, as code in such a folder is
not trusted (`tiles.cache.folder_trust`)."""

MAX_READS = 5
"""Times that an entry is read where another process replaces it meanwhile."""

_Version = tuple[int, int, int]
"""A version of a file: inode, size, time of the last change (ns)."""


class CacheCorrupt(BadInput):
    """An entry does not hold what its record says."""


class KernelCache:
    """Tuned kernels in a folder. Reading needs no write permission; any number of processes may write.

    A corrupt entry counts as missing; `complaints` holds one line for each that was seen. Binaries are checked as
    records are read, in a `lazy` cache only by `binary` and `binary_path`, so that loading one kernel reads one.
    """

    def __init__(self, folder: Path, *, lazy: bool = False) -> None:
        self.folder = Path(folder)
        self.complaints: list[str] = []
        self._lazy = lazy
        self._parsed: dict[str, tuple[_Version, Record]] = {}

    def put(
        self,
        key: Key,
        schedule: Mapping[str, Any],
        binary: bytes,
        source: str,
        measurement: Mapping[str, Any],
        provenance: Mapping[str, Any],
    ) -> Record:
        """Store a kernel, in place of any older one of the same key; durable when this returns.

        Raises `BadInput` for values that are not plain data and for a folder that cannot be written, or is full: the
        older kernel is then still there.
        """
        sha256 = hashlib.sha256(binary).hexdigest()
        record = Record(key, dict(schedule), sha256, len(binary), dict(measurement), dict(provenance))
        text = to_json(record_dict(record))
        if len(text) > MAX_RECORD_BYTES:
            raise BadInput(f"a record must stay below {MAX_RECORD_BYTES} bytes, got {len(text)}: shorten provenance")
        record = record_from_dict(from_json(text))  # what readers will see, refused now if they would refuse it
        files = {self.folder / binary_name(record): binary, self.folder / source_name(record): source.encode()}
        try:
            self.folder.mkdir(NOT_BY_OTHERS, parents=True, exist_ok=True)
            # The record comes last: where it can be seen, what it points at is already on disk.
            for path, content in files.items():
                write_atomically(path, content)
            write_atomically(self._record_path(key), text)
            # A clean-up elsewhere may have taken a file of the same name for one that nothing points at.
            for path, content in files.items():
                if not path.exists():
                    write_atomically(path, content)
        except OSError as error:
            raise BadInput(
                f"the cache folder must be writable, got {self.folder} ({error.strerror}): choose another folder"
            ) from error
        return record

    def get(self, key: Key) -> Record | None:
        """The record of exactly this key, or None where there is none or it is corrupt."""
        return self._read(self._record_path(key))

    def records(self) -> list[Record]:
        """All valid records, ordered by digest; cheap where nothing has changed since this object read them."""
        try:
            paths = sorted(path for path in self.folder.iterdir() if path.suffix == ".json")
        except FileNotFoundError:
            return []
        except OSError as error:
            self._complain(self.folder, f"cannot be listed: {error.strerror}")
            return []
        found = map(self._read, paths)
        return [record for record in found if record is not None]

    @property
    def why_untrusted(self) -> str | None:
        """Why the folder's code may not run unasked (others than its owner may write to it), or None."""
        return why_folder_untrusted(self.folder)

    def binary(self, record: Record) -> bytes:
        """The binary, checked against the record's size and SHA-256; raises `CacheCorrupt`."""
        path = self.folder / binary_name(record)
        try:
            return checked_binary(record, _read_bounded(path, record.size))
        except OSError as error:
            raise CacheCorrupt(f"{path.name} cannot be read ({error.strerror}): tune this kernel again") from error

    def binary_path(self, record: Record) -> Path:
        """The binary's file, checked now as `binary` does."""
        self.binary(record)
        return self.folder / binary_name(record)

    def source(self, record: Record) -> str:
        """The generated source, for people to read; raises `CacheCorrupt` when it is missing."""
        path = self.folder / source_name(record)
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CacheCorrupt(f"{path.name} cannot be read ({error}): tune this kernel again") from error

    def _record_path(self, key: Key) -> Path:
        return self.folder / f"{key.digest}.json"

    def _read(self, path: Path) -> Record | None:
        """The record in a file, or None with a complaint. A file that was replaced meanwhile is read again."""
        why = ""
        for _ in range(MAX_READS):
            version = None
            try:
                version = _version(path)
                return self._read_version(path, version)
            except FileNotFoundError:
                return None
            except OSError as error:
                why = str(error.strerror)
            except BadInput as error:
                why = str(error)
            with suppress(OSError):
                if _version(path) == version:
                    break
        self._complain(path, why)
        return None

    def _read_version(self, path: Path, version: _Version) -> Record:
        known = self._parsed.get(path.name)
        if known and known[0] == version:
            record = known[1]
        else:
            record = record_from_dict(from_json(_read_bounded(path, MAX_RECORD_BYTES)))
            if path.name != f"{record.key.digest}.json":
                raise CacheCorrupt(f"its key belongs in {record.key.digest}.json: tune this kernel again")
            self._parsed[path.name] = version, record
        if not self._lazy:
            self.binary_path(record)
        elif not (self.folder / binary_name(record)).exists():
            raise CacheCorrupt(f"{binary_name(record)} is missing: tune this kernel again")
        return record

    def _complain(self, path: Path, why: str) -> None:
        line = f"{path.name}: ignored, {why}"
        if line not in self.complaints:
            self.complaints.append(line)


def binary_name(record: Record) -> str:
    """The file name of a record's binary."""
    return _content_name(record) + BINARY_SUFFIX


def source_name(record: Record) -> str:
    """The file name of a record's generated source."""
    return _content_name(record) + SOURCE_SUFFIX[record.key.device.kind]


def checked_binary(record: Record, binary: bytes) -> bytes:
    """`binary`, if it has the record's size and SHA-256; raises `CacheCorrupt`."""
    if len(binary) != record.size or hashlib.sha256(binary).hexdigest() != record.sha256:
        raise CacheCorrupt(f"{binary_name(record)} must match its record's SHA-256 and does not: tune it again")
    return binary


def write_atomically(path: Path, content: bytes, *, mode: int = NOT_BY_OTHERS & 0o666, replace: bool = True) -> None:
    """Write a file so that a crash at any moment leaves the old content or the new one, never a part.

    `mode` is the file's, before the umask. Without `replace` an older file stays: of two writers the first one wins.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")
    try:
        temporary.touch(mode, exist_ok=False)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            temporary.replace(path)
        else:
            with suppress(FileExistsError):
                os.link(temporary, path)
            temporary.unlink()
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where its file system supports that."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(opened)


def _version(path: Path) -> _Version:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _content_name(record: Record) -> str:
    return f"{record.key.digest}-{record.sha256[:16]}"


def _read_bounded(path: Path, limit: int) -> bytes:
    """A file of at most `limit` bytes; raises `CacheCorrupt` for a longer one, without reading all of it."""
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise CacheCorrupt(f"{path.name} must have at most {limit} bytes, got more: tune this kernel again")
    return content
