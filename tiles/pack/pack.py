"""Packs: a kernel cache as one file, `*.mhcpack`, written whole and opened with every check."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType

from tiles.cache.cache import KernelCache, binary_name, write_atomically
from tiles.cache.record import Record
from tiles.errors import BadInput
from tiles.pack.signing import sign, why_untrusted
from tiles.pack.zip_format import PackedKernel, ZipReader, write_zip


def write_pack(
    cache: KernelCache, out: Path, records: Iterable[Record] | None = None, *, signed: bool = True
) -> list[Record]:
    """Export `records`, by default all of the cache, to `out`; returns what was written. See `write_kernels`.

    Raises `BadInput` when there is nothing to export, and for a folder to sign that others may write to.
    """
    chosen = list(cache.records() if records is None else records)
    if not chosen:
        raise BadInput(f"a pack must hold at least one kernel, got none in {cache.folder}: tune some first")
    return write_kernels(out, read_kernels(cache, chosen, to_sign=signed), signed=signed)


def read_kernels(source: KernelCache | Pack, records: Iterable[Record], *, to_sign: bool) -> Iterator[PackedKernel]:
    """Records of a cache or pack with their binaries and sources; raises `CacheCorrupt` for one that fails its check.

    A signature vouches for code: code `to_sign` has to be trusted, else this raises `BadInput`.
    """
    if to_sign and source.why_untrusted:
        where = source.folder if isinstance(source, KernelCache) else source.path
        raise BadInput(
            f"a signature vouches for code, got that of {where} ({source.why_untrusted}): trust it or leave it unsigned"
        )
    for record in records:
        yield PackedKernel(record, source.binary(record), source.source(record))


def write_kernels(out: Path, kernels: Iterable[PackedKernel], *, signed: bool = True) -> list[Record]:
    """Write kernels as a pack, signed with the user's key; returns the records.

    The file appears whole or not at all, and equal kernels give equal bytes. A signature vouches for the code: sign
    only what may run. Raises `BadInput` where the pack cannot be signed or written, and for what a reader would refuse.
    """
    ordered = sorted(kernels, key=lambda kernel: kernel.record.key.digest)
    content = write_zip(_created_by(), ordered, sign if signed else None)
    try:
        write_atomically(Path(out), content)
    except OSError as error:
        raise BadInput(f"the pack must be writable, got {out} ({error.strerror}): choose another path") from error
    return [kernel.record for kernel in ordered]


class Pack:
    """A pack, open for reading, with the reading methods of a `KernelCache`.

    Opening checks everything in it and raises `BadInput` for a file that is missing, damaged, no pack, or of another
    format. A `lazy` pack checks each binary and source when it is asked for, and the signature when `why_untrusted` is.
    `binary_path` extracts to a private folder, which is deleted when the pack is closed or garbage-collected, or the
    process ends.
    """

    def __init__(self, path: Path, *, lazy: bool = False) -> None:
        self.path = Path(path)
        self.complaints: list[str] = []
        self._folder: Path | None = None
        self._resources = ExitStack()
        weakref.finalize(self, self._resources.close)
        try:
            file = self._resources.enter_context(self.path.open("rb"))
        except OSError as error:
            raise BadInput(f"a pack must be a readable file, got {path} ({error.strerror}): check the path") from error
        try:
            self._zip = ZipReader(file, lazy=lazy)
        except BadInput as error:
            self.close()
            raise BadInput(f"{self.path.name}: {error}") from error
        if not lazy:
            self.why_untrusted  # noqa: B018  (raises)

    @property
    def created_by(self) -> str:
        """The package and version that wrote the pack, for people to read."""
        return self._zip.created_by

    @property
    def signed_by(self) -> str | None:
        """The public key that the pack claims to be signed with; `why_untrusted` checks the claim."""
        return self._zip.signature.key if self._zip.signature else None

    @cached_property
    def why_untrusted(self) -> str | None:
        """Why the pack's code may not run unasked, or None where the user's own or a listed key signed it.

        Raises `BadInput` for a signature that is not of this pack: it is damaged or forged, and nothing in it counts.
        """
        try:
            return why_untrusted(self._zip.signature, self._zip.manifest)
        except BadInput as error:
            self.close()
            raise BadInput(f"{self.path.name}: {error}") from error

    def records(self) -> list[Record]:
        """All records, ordered by digest."""
        return self._zip.records()

    def binary(self, record: Record) -> bytes:
        """The binary's bytes; raises `CacheCorrupt` if the file has changed."""
        return self._zip.binary(record)

    def source(self, record: Record) -> str:
        """The generated source, for people to read; raises `CacheCorrupt` if the file has changed."""
        return self._zip.source(record)

    def binary_path(self, record: Record) -> Path:
        """The binary as a file to load while the pack is open; raises `CacheCorrupt` if the pack has changed."""
        content = self.binary(record)
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="mhcpack-"))  # mode 0700
            self._resources.callback(shutil.rmtree, self._folder, ignore_errors=True)
        path = self._folder / binary_name(record)
        if not path.exists():
            write_atomically(path, content)
        return path

    def close(self) -> None:
        """Close the file and remove extracted binaries; code that was loaded stays loaded."""
        self._resources.close()

    def __enter__(self) -> Pack:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _created_by() -> str:
    try:
        return f"mhc-tune {version('mhc-tune')}"
    except PackageNotFoundError:
        return "mhc-tune"
