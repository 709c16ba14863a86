"""Ways to damage, forge and booby-trap a pack. Each takes the original packs and a random source."""

from __future__ import annotations

import hashlib
import io
import json
import random
import stat
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

Entries = dict[str, bytes]

HOSTILE_VALUES = [
    None, True, -1, 0, 3, 2**70, 1e308, -0.0, "", "x", "../../etc/passwd", "a\nb", "\x1b[2J", "\ud800", "\u202e",
    "[red]x", "x" * 70_000, [], {}, [[[[]]]], {"kind": "cpu"}, "0" * 64, "ed25519:" + "0" * 64, "9" * 5000,
]  # fmt: skip
HOSTILE_NAMES = [
    "../escape.so", "../../escape.so", "/tmp/mhc-tune-escape.so", "/absolute.so", "binaries/../../x.so", "binaries/",
    "C:\\x.so", "binaries/x.so", "extra", "binaries/" + "a" * 300 + ".so", "MANIFEST.JSON", "binaries\\x.so",
    "b\x1b[2J/x", ".", "..", "", "é.so", "binaries/\x00.so", "signature.json", "manifest.json", "con", "~/x.so",
    "$HOME/x.so", "a" * 60_000,
]  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A file to open. `forged`: it may hold code of its own, in good order, which then must not be trusted."""

    content: bytes
    forged: bool = False


class Originals:
    """Sound packs, and what is in them."""

    def __init__(self, packs: list[bytes]) -> None:
        self.packs = packs
        self.entries = [read(pack) for pack in packs]


def read(pack: bytes) -> Entries:
    with zipfile.ZipFile(io.BytesIO(pack)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(entries: Entries | list[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED, **attributes: Any) -> bytes:
    """Entries as a zip; attributes are set on every ZipInfo."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of duplicate names, which are the point
        for name, content in entries.items() if isinstance(entries, dict) else entries:
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            for key, value in attributes.items():
                setattr(info, key, value)
            archive.writestr(info, content)
    return file.getvalue()


def with_manifest(entries: Entries, manifest: Any) -> Entries:
    return entries | {"manifest.json": json.dumps(manifest).encode()}


def without_signature(entries: Entries) -> Entries:
    return {name: content for name, content in entries.items() if name != "signature.json"}


def flip(originals: Originals, draw: random.Random) -> Mutant:
    content = bytearray(draw.choice(originals.packs))
    for _ in range(draw.choice([1, 1, 1, 2, 16])):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return Mutant(bytes(content))


def cut_or_pad(originals: Originals, draw: random.Random) -> Mutant:
    whole = draw.choice(originals.packs)
    first, last = sorted(draw.randrange(len(whole)) for _ in range(2))
    return Mutant(
        draw.choice(
            [
                whole[:first],
                whole[last:],
                whole[:first] + whole[last:],
                whole[:first] + bytes(last - first) + whole[last:],
                whole[:first] + whole[first:last] * 2 + whole[last:],
                whole + draw.randbytes(draw.randrange(1, 100)),
                draw.randbytes(draw.randrange(1, 100)) + whole,
                whole + draw.choice(originals.packs),
            ]
        )
    )


def directory(originals: Originals, draw: random.Random) -> Mutant:
    """Bytes of the zip's own fields: headers, directory and its end."""
    content = bytearray(draw.choice(originals.packs))
    signature = draw.choice([b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"])
    places = [at for at in range(len(content)) if content.startswith(signature, at)]
    for _ in range(draw.choice([1, 1, 2, 4])):
        at = draw.choice(places) + 4 + draw.randrange(18 if signature == b"PK\x05\x06" else 42)
        if draw.random() < 0.5:
            content[min(at, len(content) - 1)] = draw.randrange(256)
        elif at + 4 <= len(content):
            struct.pack_into("<L", content, at, draw.choice([0, 1, 0xFFFF, 2**31, 2**32 - 1, draw.randrange(2**20)]))
    return Mutant(bytes(content))


def swap(originals: Originals, draw: random.Random) -> Mutant:
    """Contents change places, within a pack or between two."""
    entries, other = dict(draw.choice(originals.entries)), draw.choice(originals.entries)
    one, two = draw.choice(list(entries)), draw.choice(list(other))
    entries[one] = other[two]
    if draw.random() < 0.5:
        entries.pop(draw.choice(list(entries)))
    elif draw.random() < 0.5:
        entries |= {two: other[two]}
    return Mutant(zipped(entries))


def names(originals: Originals, draw: random.Random) -> Mutant:
    entries = list(draw.choice(originals.entries).items())
    hostile = draw.choice(HOSTILE_NAMES)
    if draw.random() < 0.5:
        entries.insert(draw.randrange(len(entries) + 1), (hostile, draw.randbytes(10)))
    else:
        at = draw.randrange(len(entries))
        entries[at] = (hostile, entries[at][1])
    return Mutant(zipped(entries))


def kinds(originals: Originals, draw: random.Random) -> Mutant:
    """Links, folders, devices, odd methods, flags, extra fields and comments."""
    entries = draw.choice(originals.entries)
    if draw.random() < 0.3:
        target = draw.choice([b"/etc/passwd", b"../../x", b"manifest.json"])
        entries = entries | {draw.choice(list(entries)): target}
    attributes = draw.choice(
        [
            {"external_attr": (draw.choice([stat.S_IFLNK, stat.S_IFDIR, stat.S_IFIFO, stat.S_IFBLK]) | 0o777) << 16},
            {"comment": draw.randbytes(40)},
            {"extra": struct.pack("<HH", draw.choice([1, 0x7075, 0x5855]), 8) + draw.randbytes(8)},
            {"create_system": draw.randrange(256)},
            {"extract_version": draw.choice([20, 45, 63, 255])},
        ]
    )
    method = draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    return Mutant(zipped(entries, method, **attributes))


BOMB = 300 * 2**20
"""Bytes that a bomb unfolds to: more than a process that opens packs may take."""


@cache
def deflated_zeros() -> tuple[bytes, int]:
    """`BOMB` zeros as a raw deflate stream of 0.1 % of that, and their CRC-32."""
    squeeze, crc, piece = zlib.compressobj(9, zlib.DEFLATED, -15), 0, bytes(2**20)
    parts = []
    for _ in range(BOMB // len(piece)):
        parts.append(squeeze.compress(piece))
        crc = zlib.crc32(piece, crc)
    return b"".join([*parts, squeeze.flush()]), crc


def bomb(originals: Originals, draw: random.Random) -> Mutant:
    """Much from little: zeros, sizes that lie, and entries that share their bytes."""
    entries = draw.choice(originals.entries)
    name = draw.choice(list(entries))
    zeros, crc = deflated_zeros()
    content = bytearray(zipped(entries | {name: zeros}, zipfile.ZIP_STORED))
    stated = draw.choice([BOMB, len(entries[name]), 2**26, 2**30, 2**32 - 2, draw.randrange(BOMB)])
    header, listed = content.index(name.encode()) - 30, content.rindex(name.encode()) - 46
    for at, method, checksum, size in ((header, 8, 14, 22), (listed, 10, 16, 24)):
        struct.pack_into("<H", content, at + method, zipfile.ZIP_DEFLATED)
        struct.pack_into("<L", content, at + checksum, crc)
        struct.pack_into("<L", content, at + size, stated)
    if draw.random() < 0.3:
        for at in range(listed + 46, len(content) - 46):
            if content.startswith(b"PK\x01\x02", at):
                struct.pack_into("<L", content, at + 42, header)
    return Mutant(bytes(content))


def huge_json(originals: Originals, draw: random.Random) -> Mutant:
    size = draw.choice([1_000, 50_000, 400_000, 2_000_000])
    text = draw.choice(
        [
            lambda: b"[" * size,
            lambda: b'{"a":' * (size // 5),
            lambda: b"[" * (size // 2) + b"]" * (size // 2),
            lambda: b'{"format":' + b"9" * size + b"}",
            lambda: b'{"format":1.' + b"9" * size + b"}",
            lambda: b'{"format":1e' + b"9" * size + b"}",
            lambda: b"[" + b"{}," * (size // 3) + b"{}]",
            lambda: b'{"format":2,"created_by":"x","records":[' + b"0," * (size // 2) + b"0]}",
            lambda: b'{"format":2,"created_by":"' + b"\\ud800" * (size // 6) + b'","records":[]}',
            lambda: b'{"format":2,"created_by":"' + b"\\u0041" * (size // 6) + b'","records":[]}',
            lambda: b"{" + b",".join(b'"%d":0' % index for index in range(size // 10)) + b"}",
            lambda: b'{"format":NaN}',
            lambda: draw.randbytes(min(size, 50_000)),
        ]
    )()
    name = draw.choice(["manifest.json", "manifest.json", "manifest.json", "signature.json"])
    entries = draw.choice(originals.entries) | {name: text}
    return Mutant(zipped(entries, draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])))


def values(originals: Originals, draw: random.Random) -> Mutant:
    """A hostile value in the manifest or the signature."""
    entries = draw.choice(originals.entries)
    name = draw.choice(["manifest.json", "manifest.json", "manifest.json", "signature.json"])
    parsed = json.loads(entries.get(name, "{}"))
    path = draw.choice([path for path in leaves(parsed) if path] or [("key",)])
    inner = parsed
    for step in path[:-1]:
        inner = inner[step]
    if draw.random() < 0.8:
        inner[path[-1]] = draw.choice(HOSTILE_VALUES)
    elif isinstance(inner, dict):
        inner[draw.choice(["more", "", "__class__", "\x1b"])] = draw.choice(HOSTILE_VALUES)
    changed = entries | {name: json.dumps(parsed).encode()}
    return Mutant(zipped(without_signature(changed) if draw.random() < 0.7 else changed))


def forged(originals: Originals, draw: random.Random) -> Mutant:
    """Other code or another schedule with every name and checksum made to fit: only the signature tells."""
    entries = dict(draw.choice(originals.entries))
    manifest = json.loads(entries["manifest.json"])
    record = draw.choice(manifest["records"])["record"]
    old = record["sha256"]
    place = next(name for name in entries if name.startswith("binaries/") and f"-{old[:16]}." in name)
    evil = b"\x7fELF" + draw.randbytes(draw.randrange(1, 200))
    record["sha256"], record["size"] = hashlib.sha256(evil).hexdigest(), len(evil)
    stem = place.split("/")[1].rsplit(".", 1)[0]
    fitting = stem.replace(old[:16], record["sha256"][:16])
    entries = {name.replace(stem, fitting): content for name, content in entries.items()}
    entries[place.replace(stem, fitting)] = evil
    changed = with_manifest(entries, manifest)
    how = draw.choice(["kept", "none", "stranger", "claimed", "borrowed"])
    if how == "none":
        changed = without_signature(changed)
    elif how == "stranger":
        changed["signature.json"] = signed(changed["manifest.json"], draw)
    elif how == "claimed":  # a stranger's signature under a name that is trusted
        mine = json.loads(originals.entries[0]["signature.json"])
        theirs = json.loads(signed(changed["manifest.json"], draw))
        changed["signature.json"] = json.dumps(theirs | {"key": mine["key"]}).encode()
    elif how == "borrowed":
        changed["signature.json"] = originals.entries[0]["signature.json"]
    return Mutant(zipped(changed), forged=True)


def signed(manifest: bytes, draw: random.Random) -> bytes:
    """A stranger's signature."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Ed25519PrivateKey.from_private_bytes(draw.randbytes(32))
    value = private.sign(b"mhc-tune pack manifest\n" + manifest).hex()
    return json.dumps({"key": f"ed25519:{private.public_key().public_bytes_raw().hex()}", "value": value}).encode()


def repacked(originals: Originals, draw: random.Random) -> Mutant:
    """The same contents in another zip: nothing is wrong with it."""
    entries = list(draw.choice(originals.entries).items())
    draw.shuffle(entries)
    return Mutant(zipped(entries, draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])))


def noise(originals: Originals, draw: random.Random) -> Mutant:
    return Mutant(draw.choice([b"", b"PK", b"PK\x05\x06"]) + draw.randbytes(draw.randrange(200)))


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to all values inside parsed JSON."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(leaf for name, child in inner for leaf in leaves(child, (*path, name)))]


MUTATIONS: dict[Callable[[Originals, random.Random], Mutant], int] = {
    flip: 25, cut_or_pad: 10, directory: 15, swap: 6, names: 7, kinds: 6, bomb: 3, huge_json: 4, values: 14, forged: 6,
    repacked: 3, noise: 1,
}  # fmt: skip
"""Each with its share, in percent."""


def mutant(originals: Originals, draw: random.Random) -> tuple[str, Mutant]:
    (make,) = draw.choices(list(MUTATIONS), list(MUTATIONS.values()))
    return make.__name__, make(originals, draw)
