"""The file format of packs: a zip of a manifest, the binaries and the generated sources.

    manifest.json                    format, created_by, and every record with its source's SHA-256 and size
    binaries/<key>-<content>.so      named by the record, as in the cache folder
    sources/<key>-<content>.cpp
    signature.json                   optional: a public key, and its Ed25519 signature of the manifest's bytes

The manifest holds the SHA-256 of all binaries and sources, so a signature of it covers them.
All of it is untrusted input and checked before anything is used: the archive may hold the files that the manifest's
records call for, under the names that this module gives them, and nothing else.
"""

from __future__ import annotations

import hashlib
import io
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from tiles.cache.cache import CacheCorrupt, binary_name, checked_binary, source_name
from tiles.cache.record import (
    MAX_RECORD_BYTES,
    Key,
    Record,
    check_fields,
    check_scalars,
    check_schedule,
    from_json,
    record_dict,
    record_from_dict,
    shown,
    to_json,
)
from tiles.errors import BadInput, one_line
from tiles.pack.signing import Signature

FORMAT = 2
"""Version of this layout; the records in it have a version of their own. Format 1 had no signature."""
READABLE = (1, 2)

MANIFEST, SIGNATURE = "manifest.json", "signature.json"

MAX_RECORDS = 10_000
MAX_MANIFEST = 16 * 2**20
MAX_SIGNATURE = 1024
MAX_BINARY = 64 * 2**20
MAX_SOURCE = 16 * 2**20
MAX_TOTAL = 2**30
"""Limits in bytes after decompression. Kernels are tens of kilobytes each; a full pack of one device some megabytes."""

MAX_RATIO = 300
"""Largest compression ratio. Unrolled sources reach about 50; deflate's own limit is 1032."""

MAX_BRACKETS = 32
"""Most opening brackets in the manifest for each file (a record has 7): bounds the depth and size of the JSON."""

_MANIFEST_FIELDS = {"format": int, "created_by": str, "records": list}
_ENTRY_FIELDS = {"record": dict, "source_sha256": str, "source_size": int}
_SIGNATURE_FIELDS = {"key": str, "value": str}

MAX_DIRECTORY_ENTRY = 256
"""Bytes of one entry in the zip's directory: 46 and a name."""

_HEX = re.compile(r"(?:[0-9a-f]{2})+")

_END = struct.Struct("<4s4H2LH")
"""The zip format's end of central directory: signature, disk, disk, entries, entries, size, offset, comment length."""
_ZIP64_LOCATOR_BYTES = 20

_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    OverflowError,
)
"""What zipfile raises on damaged archives; NotImplementedError is a RuntimeError."""


@dataclass(frozen=True)
class _ManifestEntry:
    """One kernel of the manifest."""

    record: Record
    source_sha256: str
    source_size: int


class PackedKernel(NamedTuple):
    """A kernel as a pack holds it: record, shared library, generated source."""

    record: Record
    binary: bytes
    source: str


def write_zip(created_by: str, kernels: Iterable[PackedKernel], sign: Callable[[bytes], Signature] | None) -> bytes:
    """The bytes of a pack; equal kernels in equal order, signed by the same key or by none, give equal bytes.

    Raises `BadInput` for what a reader would refuse.
    """
    entries, files = [], {}
    for record, binary, text in kernels:
        source = text.encode()
        sizes = {"source_sha256": hashlib.sha256(source).hexdigest(), "source_size": len(source)}
        entries.append({"record": record_dict(record)} | sizes)
        files[_binary_path(record)] = binary
        files[_source_path(record)] = source
    manifest = to_json({"format": FORMAT, "created_by": created_by, "records": entries})
    if sign:
        signature = sign(manifest)
        files[SIGNATURE] = to_json({"key": signature.key, "value": signature.value.hex()})
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in ({MANIFEST: manifest} | files).items():
            archive.writestr(_zip_info(name), content)
    ZipReader(file)
    return file.getvalue()


class ZipReader:
    """A pack's contents, all checked. Raises `BadInput` for a file that is damaged, no pack, or of another format.

    With `lazy`, each binary and source is checked when it is asked for; the caller keeps `file` open until then.
    `manifest` holds the bytes that the records were read from: a signature has to be of these, even if the file has
    changed since.
    """

    def __init__(self, file: BinaryIO, *, lazy: bool = False) -> None:
        try:
            size = _check_directory(file)
            self._zip = zipfile.ZipFile(file)
            self._infos = _checked_infos(self._zip, size)
        except BadInput:
            raise
        except _DAMAGED as error:
            raise BadInput(f"a pack must be a sound zip, got {_brief(error)}: export or copy it again") from error
        self.manifest = self._read_manifest()
        self.created_by, entries = self._parsed(self.manifest)
        self._entries = {entry.record.key.digest: entry for entry in entries}
        self.signature = self._signature()
        expected = {MANIFEST, SIGNATURE} if self.signature else {MANIFEST}
        for record in self.records():
            expected |= {_binary_path(record), _source_path(record)}
        if set(self._infos) != expected or len(self._entries) != len(entries):
            odd = sorted(set(self._infos) ^ expected)
            raise BadInput(f"a pack must hold the files of its records, once each, got {shown(odd)}: export it again")
        for record in () if lazy else self.records():
            self.binary(record)
            self.source(record)

    def records(self) -> list[Record]:
        """All records, ordered by digest."""
        return [self._entries[digest].record for digest in sorted(self._entries)]

    def binary(self, record: Record) -> bytes:
        """The binary, checked against the record's SHA-256; raises `CacheCorrupt`."""
        return checked_binary(record, self._content(_binary_path(record), record.size, MAX_BINARY))

    def source(self, record: Record) -> str:
        """The generated source, checked against the manifest's SHA-256; raises `CacheCorrupt`."""
        entry = self._entries[record.key.digest]
        content = self._content(_source_path(record), entry.source_size, MAX_SOURCE)
        if hashlib.sha256(content).hexdigest() != entry.source_sha256:
            raise CacheCorrupt(f"{source_name(record)} must match its SHA-256 and does not: export it again")
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CacheCorrupt(f"{source_name(record)} must be UTF-8, got {error}: export it again") from error

    def _read_manifest(self) -> bytes:
        if MANIFEST not in self._infos:
            raise BadInput(f"a pack must hold {MANIFEST}, got {shown(list(self._infos))}: export it with mhc-tune")
        limit = min(MAX_MANIFEST, len(self._infos) * MAX_RECORD_BYTES)
        return self._content(MANIFEST, self._infos[MANIFEST].file_size, limit)

    def _parsed(self, manifest: bytes) -> tuple[str, list[_ManifestEntry]]:
        brackets = manifest.count(b"{") + manifest.count(b"[")
        if brackets > MAX_BRACKETS * len(self._infos):
            raise BadInput(f"a manifest must be flat and small, got {brackets} brackets: export the pack again")
        values = from_json(manifest)
        found = values.get("format") if isinstance(values, dict) else None
        if type(found) is not int or found not in READABLE:
            readable = " or ".join(map(str, READABLE))
            raise BadInput(f"a pack's format must be {readable}, got {shown(found)}: export it again with this version")
        fields = check_fields(values, _MANIFEST_FIELDS, "a manifest")
        check_scalars({"created_by": fields["created_by"]}, "a manifest", (str,))
        return fields["created_by"], [_entry_from(entry) for entry in fields["records"]]

    def _signature(self) -> Signature | None:
        """The signature that the pack states; only its form is checked here, the rest in `tiles.pack.signing`."""
        if SIGNATURE not in self._infos:
            return None
        content = from_json(self._content(SIGNATURE, self._infos[SIGNATURE].file_size, MAX_SIGNATURE))
        fields = check_fields(content, _SIGNATURE_FIELDS, "a signature")
        if not _HEX.fullmatch(fields["value"]):
            raise BadInput(f"a signature must be hexadecimal digits, got {shown(fields['value'])}: export it again")
        return Signature(fields["key"], bytes.fromhex(fields["value"]))

    def _content(self, name: str, size: int, limit: int) -> bytes:
        """One file of exactly `size` bytes; reads no further than that, whatever the archive says."""
        info = self._infos.get(name)
        if info is None or info.file_size != size or size > limit:
            raise CacheCorrupt(f"{name} must have {shown(size)} bytes, {limit} at most, and has not: export it again")
        try:
            with self._zip.open(info) as file:
                content = file.read(size + 1)
        except _DAMAGED as error:
            raise CacheCorrupt(f"{name} must be readable, got {_brief(error)}: export or copy it again") from error
        return content


def _entry_from(values: object) -> _ManifestEntry:
    """One kernel of the manifest. Those of other versions follow other rules: import and look-up check them."""
    fields = check_fields(values, _ENTRY_FIELDS, "an entry of the manifest")
    record = record_from_dict(fields["record"])
    if record.key.current:
        if record.key != Key.of(record.key.problem, record.key.device):
            raise BadInput(f"{record.key.problem.describe()}: its key must be canonical and is not: export it again")
        check_schedule(record)
    return _ManifestEntry(record, fields["source_sha256"], fields["source_size"])


def _check_directory(file: BinaryIO) -> int:
    """Check the zip's end record before zipfile reads the directory: not huge, and last in the file.

    Returns the file's size in bytes.
    """
    size = file.seek(0, io.SEEK_END)
    tail = _END.size + _ZIP64_LOCATOR_BYTES
    if size < tail:
        raise BadInput(f"it must be a pack, got a file of {size} bytes: export it again")
    file.seek(-tail, io.SEEK_END)
    end = file.read(tail)
    signature, *disks, here, entries, length, offset, comment = _END.unpack(end[_ZIP64_LOCATOR_BYTES:])
    if signature != b"PK\x05\x06" or end.startswith(b"PK\x06\x07"):
        raise BadInput("it must be a whole pack, got something else or a part of one: export or copy it again")
    if any(disks) or comment or here != entries or offset + length + _END.size != size:
        raise BadInput("its zip directory must end the file, got another layout: export it again")
    if entries > 2 + 2 * MAX_RECORDS or length > entries * MAX_DIRECTORY_ENTRY:
        raise BadInput(f"a pack holds at most {MAX_RECORDS} kernels, got {entries} entries: export fewer")
    return size


def _brief(error: Exception) -> str:
    """zipfile's message, shortened: it may quote a great deal of a damaged file."""
    text = one_line(str(error))
    return text if len(text) <= 100 else f"{text[:100]}..."


def _checked_infos(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The entries of an archive of `size` bytes by name: plain files, no name twice, sizes within the limits."""
    infos = {info.filename: info for info in archive.infolist()}
    if len(infos) != len(archive.infolist()):
        raise BadInput("a pack must not hold a name twice, got duplicates: export it again")
    for info in infos.values():
        linked = stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG)
        encrypted = info.flag_bits & 1
        unknown = info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if linked or encrypted or unknown or info.orig_filename != info.filename:
            raise BadInput(f"a pack holds plain files only, got {shown(info.filename)}: export it again")
    total = sum(info.file_size for info in infos.values())
    packed = min(size, sum(info.compress_size for info in infos.values()))  # entries may claim the same bytes twice
    if total > min(MAX_TOTAL, MAX_RATIO * packed):
        raise BadInput(f"a pack must unpack to at most {MAX_TOTAL} bytes, {MAX_RATIO} a byte, got {total}: split it")
    return infos


def _zip_info(name: str) -> zipfile.ZipInfo:
    """Attributes that depend on nothing but the name: fixed date, plain file, readable by all."""
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    info.compress_type = zipfile.ZIP_DEFLATED
    info.create_system = 3  # Unix
    info.external_attr = (stat.S_IFREG | 0o644) << 16
    return info


def _binary_path(record: Record) -> str:
    return f"binaries/{binary_name(record)}"


def _source_path(record: Record) -> str:
    return f"sources/{source_name(record)}"
