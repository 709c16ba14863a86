"""One-file export of a kernel cache, `*.mhcpack`: written whole, opened with every check, imported with caution."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Protocol

from tiles.archive import Archive, packed
from tiles.cache import KernelCache, binary_name, write_atomically
from tiles.compile import CompileError
from tiles.errors import BadInput
from tiles.record import Key, Record, check_schedule


class Compiled(Protocol):
    """What a recompilation gives back; `tiles.compile.Artifact` is one."""

    @property
    def binary(self) -> bytes:
        """The compiled code."""

    @property
    def source(self) -> str:
        """The text that it was compiled from."""


def write_pack(cache: KernelCache, out: Path, records: Iterable[Record] | None = None) -> list[Record]:
    """Export `records`, by default all of the cache, to `out`; returns what was written.

    The file appears whole or not at all, and equal caches give equal bytes. Raises `BadInput` when there is nothing
    to export and `CacheCorrupt` when an entry fails its check.
    """
    chosen = sorted(cache.records() if records is None else records, key=lambda record: record.key.digest)
    if not chosen:
        raise BadInput(f"a pack must hold at least one kernel, got none in {cache.folder}: tune some first")
    kernels = ((record, cache.binary_path(record).read_bytes(), cache.source(record)) for record in chosen)
    content = packed(_created_by(), kernels)
    try:
        write_atomically(Path(out), content)
    except OSError as error:
        raise BadInput(f"the pack must be writable, got {out} ({error.strerror}): choose another path") from error
    return chosen


class Pack:
    """A pack, open for reading; it can be used where a `KernelCache` is read.

    Opening checks everything in it and raises `BadInput` for a file that is missing, damaged, no pack, or of another
    format. Binaries are extracted when asked for, to a private folder that goes when the pack is closed, is no longer
    referred to, or the process ends.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.complaints: list[str] = []
        self._folder: Path | None = None
        self._held = ExitStack()
        weakref.finalize(self, self._held.close)
        try:
            file = self._held.enter_context(self.path.open("rb"))
        except OSError as error:
            raise BadInput(f"a pack must be a readable file, got {path} ({error.strerror}): check the path") from error
        try:
            self._archive = Archive(file)
        except BadInput as error:
            self.close()
            raise BadInput(f"{self.path.name}: {error}") from error

    @property
    def created_by(self) -> str:
        """The package and version that wrote the pack, for people to read."""
        return self._archive.created_by

    def records(self) -> list[Record]:
        """All records, ordered by digest."""
        return self._archive.records()

    def binary(self, record: Record) -> bytes:
        """The binary's bytes; raises `CacheCorrupt` if the file has changed."""
        return self._archive.binary(record)

    def source(self, record: Record) -> str:
        """The generated source, for people to read; raises `CacheCorrupt` if the file has changed."""
        return self._archive.source(record)

    def binary_path(self, record: Record) -> Path:
        """The binary as a file to load while the pack is open; raises `CacheCorrupt` if the pack has changed."""
        content = self.binary(record)
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="mhcpack-"))  # mode 0700
            self._held.callback(shutil.rmtree, self._folder, ignore_errors=True)
        path = self._folder / binary_name(record)
        if not path.exists():
            write_atomically(path, content)
        return path

    def close(self) -> None:
        """Close the file and remove extracted binaries; code that was loaded stays loaded."""
        self._held.close()

    def __enter__(self) -> Pack:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def import_pack(
    path: Path, cache: KernelCache, *, trust_binaries: bool, recompile: Callable[[Record], Compiled]
) -> list[tuple[Record, str]]:
    """Bring a pack's kernels into a cache; returns each record with what became of it.

    Schedules are data, binaries are code: without `trust_binaries` every kernel is compiled here, by `recompile`. A
    kernel of other sources or another toolchain is always compiled, as its code may be called differently. The second
    item is "copied", "recompiled", "kept: ..." where the cache has this kernel already, or "skipped: ...".
    """
    with Pack(path) as pack:
        current_first = sorted(pack.records(), key=lambda record: not record.key.current)
        return [_import_one(pack, record, cache, trust_binaries, recompile) for record in current_first]


def _import_one(
    pack: Pack, record: Record, cache: KernelCache, trust_binaries: bool, recompile: Callable[[Record], Compiled]
) -> tuple[Record, str]:
    try:
        wanted = replace(record, key=Key.of(record.key.problem, record.key.device))
        check_schedule(wanted)
        held = cache.get(wanted.key)
        if held is not None:
            return held, "kept: the cache already holds a kernel for this key"
        if trust_binaries and wanted.key == record.key:
            binary, source, how = pack.binary(record), pack.source(record), "copied"
        else:
            compiled = recompile(wanted)
            binary, source, how = compiled.binary, compiled.source, "recompiled"
    except (BadInput, CompileError) as error:
        return record, f"skipped: {error}"
    provenance = record.provenance | {"imported": how}
    stored = cache.put(wanted.key, record.schedule, binary, source, record.measurement, provenance)
    return stored, how


def _created_by() -> str:
    try:
        return f"mhc-tune {version('mhc-tune')}"
    except PackageNotFoundError:
        return "mhc-tune"
