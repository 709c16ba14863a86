"""Hostile packs: whatever a file says, it is refused with one line or holds only what was packed."""

import json
import random
import stat
import struct
import tracemalloc
import warnings
import zipfile
from dataclasses import asdict, replace

import pytest

from tiles.cache import record
from tiles.cache.cache import KernelCache, Key
from tiles.errors import BadInput
from tiles.kernels.registry import kernel_spec, kernel_specs
from tiles.kernels.spec import Problem
from tiles.pack import zip_format as archive
from tiles.pack.pack import Pack, write_pack
from tiles.target import Device

DEVICE = Device("cpu", "A CPU", "x86-64")
PROBLEMS = [Problem("merge", direction, 4, 64, "float32", 128) for direction in ("forward", "backward")]


@pytest.fixture
def cache(tmp_path):
    cache = KernelCache(tmp_path / "cache")
    for index, problem in enumerate(PROBLEMS):
        schedule = asdict(kernel_spec(problem.op, problem.direction).default(problem, DEVICE.target))
        binary = random.Random(index).randbytes(500)
        cache.put(Key.of(problem, DEVICE), schedule, binary, f"// {index}", {"tuned_ms": 1.5}, {"host": "a"})
    return cache


@pytest.fixture
def packed(cache, tmp_path):
    """A pack without a signature, as every change would break it: an attacker leaves it out."""
    path = tmp_path / "kernels.mhcpack"
    write_pack(cache, path, signed=False)
    return path


def entries_of(path):
    """The pack's entries by name, for building an altered one."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(path, entries, **attributes):
    """Write entries ([(name, bytes)] or a dict) as a zip; attributes are set on every ZipInfo."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of duplicate names, which are the point here
        for name, content in entries.items() if isinstance(entries, dict) else entries:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            for key, value in attributes.items():
                setattr(info, key, value)
            archive.writestr(info, content)


def edited(path, change):
    """Rewrite a pack with `change` applied to its parsed manifest."""
    entries = entries_of(path)
    manifest = json.loads(entries["manifest.json"])
    change(manifest)
    zipped(path, entries | {"manifest.json": json.dumps(manifest).encode()})


def refused(path):
    """The one line with which a pack is refused."""
    with pytest.raises(BadInput) as caught:
        Pack(path)
    line = str(caught.value)
    assert line.startswith(f"{path.name}: ")
    assert "\n" not in line
    assert "\x1b" not in line
    return line


def test_missing_folder_and_other_files_are_refused(tmp_path, packed):
    with pytest.raises(BadInput, match=r"a pack must be a readable file, got .*none.mhcpack"):
        Pack(tmp_path / "none.mhcpack")
    with pytest.raises(BadInput, match="a pack must be a readable file"):
        Pack(tmp_path)
    for content in (b"", b"PK", b"not a zip at all" * 100, packed.read_bytes()[:-1], packed.read_bytes() + b"x"):
        packed.write_bytes(content)
        refused(packed)
    zipped(packed, {"readme.txt": b"a zip"})
    assert "must hold manifest.json" in refused(packed)


def test_another_format_is_refused_by_name(packed):
    for number in (0, 3, True, "2", 10**30):
        edited(packed, lambda manifest, number=number: manifest.update(format=number, layout="new"))
        assert "format must be 1 or 2, got " in refused(packed)


HOSTILE_NAMES = [
    "../escape.so", "/absolute.so", "binaries/../../x.so", "binaries/", "C:\\x.so", "binaries/x.so", "extra",
    "binaries/" + "a" * 300 + ".so", "MANIFEST.JSON", "binaries\\x.so", "bin\x1b[2Jaries/x", ".", "", "é.so",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_foreign_names_are_refused(packed, name):
    entries = entries_of(packed)
    zipped(packed, entries | {name: b"x"})
    refused(packed)
    binary = next(entry for entry in entries if entry.startswith("binaries/"))
    zipped(packed, {name if entry == binary else entry: content for entry, content in entries.items()})
    refused(packed)


def test_links_folders_and_devices_are_refused(packed):
    for kind in (stat.S_IFLNK, stat.S_IFDIR, stat.S_IFIFO, stat.S_IFCHR):
        entries = entries_of(packed)
        zipped(packed, entries, external_attr=(kind | 0o777) << 16)
        assert "plain files only" in refused(packed)


def test_duplicate_names_are_refused(packed):
    entries = entries_of(packed)
    zipped(packed, [*entries.items(), ("manifest.json", entries["manifest.json"])])
    assert "twice" in refused(packed)
    zipped(packed, entries)
    edited(packed, lambda manifest: manifest["records"].append(manifest["records"][0]))
    assert "once each" in refused(packed)


def test_missing_and_swapped_files_are_refused(packed):
    entries = entries_of(packed)
    for name in entries:
        zipped(packed, {entry: content for entry, content in entries.items() if entry != name})
        assert "must hold" in refused(packed)
    for folder in ("binaries/", "sources/"):
        first, second = [name for name in entries if name.startswith(folder)][:2]
        zipped(packed, entries | {first: entries[second], second: entries[first]})
        refused(packed)


def test_other_compression_methods_and_encryption_are_refused(packed):
    entries = entries_of(packed)
    zipped(packed, entries, compress_type=zipfile.ZIP_LZMA)
    assert "plain files only" in refused(packed)
    zipped(packed, entries)
    content = bytearray(packed.read_bytes())
    at = content.index(b"PK\x01\x02")
    content[at + 8] |= 1  # the flag for encryption, in the directory
    packed.write_bytes(content)
    assert "plain files only" in refused(packed)


def test_a_zip_with_something_before_or_after_it_is_refused(packed):
    whole = packed.read_bytes()
    packed.write_bytes(b"#!/bin/sh\n" + whole)
    assert "another layout" in refused(packed)
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("manifest.json", b"{}")
        archive.comment = b"a comment"
    refused(packed)
    packed.write_bytes(whole[:-22] + b"PK\x06\x07" + bytes(16) + whole[-22:])
    refused(packed)


def test_bombs_are_refused_before_they_unfold(packed):
    entries = entries_of(packed)
    binary = next(name for name in entries if name.startswith("binaries/"))
    for name in ("manifest.json", binary):
        zipped(packed, entries | {name: bytes(20_000_000)})
        tracemalloc.start()
        assert "must unpack to at most" in refused(packed)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
        tracemalloc.stop()


def test_bombs_that_lie_about_their_size_are_cut_off(packed):
    entries = entries_of(packed)
    binary = next(name for name in entries if name.startswith("binaries/"))
    zipped(packed, entries | {binary: bytes(20_000_000)})
    content, name = bytearray(packed.read_bytes()), binary.encode()
    for signature, before, size_at in (
        (b"PK\x03\x04", content.index(name), 22),
        (b"PK\x01\x02", content.rindex(name), 24),
    ):
        struct.pack_into("<L", content, content.rindex(signature, 0, before) + size_at, 500)
    packed.write_bytes(content)
    tracemalloc.start()
    assert "Bad CRC-32" in refused(packed)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_too_many_entries_are_refused_before_the_directory_is_read(packed, monkeypatch):
    monkeypatch.setattr(archive, "MAX_RECORDS", 0)
    monkeypatch.setattr(zipfile, "ZipFile", None)
    assert "at most 0 kernels" in refused(packed)


def test_a_directory_larger_than_its_entries_is_refused(packed):
    whole = packed.read_bytes()
    padding = bytes(100_000)
    *start, length, offset, comment = struct.unpack("<4s4H2LH", whole[-22:])
    packed.write_bytes(whole[:-22] + padding + struct.pack("<4s4H2LH", *start, length + len(padding), offset, comment))
    assert "at most 10000 kernels" in refused(packed)


HOSTILE_VALUES = [
    None, True, -1, 0, 3, 2**70, 1e308, "", "x", "../../etc/passwd", "a\nb", "\x1b[2J", "\ud800", "x" * 100_000, [], {},
    [[[[]]]], {"kind": "cpu"}, "0" * 64,
]  # fmt: skip


def leaves(value, path=()):
    """Paths to all values inside parsed JSON."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in inner:
        yield from leaves(child, (*path, name))


def assert_refused_or_right(path, originals):
    """A mutated pack is refused with one line, or holds only keys and binaries that were packed."""
    try:
        pack = Pack(path)
    except BadInput as error:
        refusal = str(error)
    else:
        refusal = ""
    assert "\n" not in refusal
    if refusal:
        return
    with pack:
        assert pack.created_by.isprintable()
        for found in pack.records():
            assert pack.binary(found) == originals[found.key]
            record.check_schedule(found)


@pytest.fixture
def originals(cache):
    """The packed binaries by key."""
    return {stored.key: cache.binary_path(stored).read_bytes() for stored in cache.records()}


def test_manifests_with_hostile_values(packed, originals):
    whole = packed.read_bytes()
    manifest = json.loads(entries_of(packed)["manifest.json"])
    draw = random.Random(1)
    for path in leaves(manifest | {"records": manifest["records"][:1]}):
        for value in draw.sample(HOSTILE_VALUES, 4) if path else ():

            def change(values, path=path, value=value):
                for name in path[:-1]:
                    values = values[name]
                values[path[-1]] = value

            packed.write_bytes(whole)
            edited(packed, change)
            assert_refused_or_right(packed, originals)


MANY = [
    b"[" + b"{}," * 5_000_000 + b"{}]",
    b'{"a":[' + b'"b",' * 4_000_000 + b"1]}",
    b"[" * 200_000,
    b'{"format":' + b"9" * 10_000_000 + b"}",
    b'{"format":1.' + b"9" * 10_000_000 + b"}",
    b'["' + b"\\u00e9" * 2_000_000 + b'"]',
    b'{"' + b"x" * 15_000_000 + b'": 1}',
]


@pytest.mark.parametrize("text", MANY, ids=range(len(MANY)))
def test_huge_manifests_are_refused_before_they_are_read(packed, text):
    with zipfile.ZipFile(packed, "w") as stored:
        stored.writestr("manifest.json", text)  # not compressed: its ratio is 1
    tracemalloc.start()
    refused(packed)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[]", "null", "{}", '{"format": NaN}', "\ufeff{}"])
def test_manifests_that_are_no_manifest(packed, text):
    zipped(packed, entries_of(packed) | {"manifest.json": text.encode()})
    refused(packed)


def test_damaged_bytes(packed, originals):
    whole = packed.read_bytes()
    draw = random.Random(2)
    for _ in range(300):
        content = bytearray(whole)
        first, last = sorted(draw.randrange(len(whole)) for _ in range(2))
        kind = draw.choice(["flip", "flip", "flip", "cut", "delete", "zero", "repeat", "directory"])
        if kind == "flip":
            for _ in range(draw.choice([1, 1, 3])):
                content[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del content[first:]
        elif kind == "delete":
            del content[first:last]
        elif kind == "zero":
            content[first:last] = bytes(last - first)
        elif kind == "repeat":
            content[first:first] = content[first:last]
        else:
            start = whole.index(b"PK\x01\x02")
            content[draw.randrange(start, len(whole))] = draw.randrange(256)
        packed.write_bytes(content)
        assert_refused_or_right(packed, originals)


def test_schedules_of_this_version_are_held_to_the_kernels_rules(packed):
    def unknown_field(manifest):
        manifest["records"][0]["record"]["schedule"]["surprise"] = 1

    edited(packed, unknown_field)
    assert "must have its fields, got unknown ['surprise'], missing []" in refused(packed)


def test_invalid_schedules_are_refused_with_the_kernels_own_sentence(packed, monkeypatch):
    spec = replace(kernel_spec("merge", "forward"), why_invalid=lambda *_: "block_width must divide the width")
    monkeypatch.setattr(record, "kernel_spec", lambda op, direction: spec)
    assert "block_width must divide the width" in refused(packed)


@pytest.mark.parametrize("spec", kernel_specs().values(), ids=lambda spec: spec.name)
@pytest.mark.parametrize("value", [0, -1, 3, 2**53])
def test_hostile_schedules_get_a_verdict_not_a_crash(spec, value):
    problem = spec.canonical(Problem(spec.op, spec.direction, 4, 64, "bfloat16", 128))
    values = asdict(spec.default(problem, DEVICE.target))
    for name in values:
        if type(values[name]) is int:
            why = spec.why_invalid(problem, spec.schedule_from(values | {name: value}), DEVICE.target)
            assert why is None or "\n" not in why


def test_a_key_that_is_not_canonical_is_refused(packed, monkeypatch):
    canonical = Key.of
    monkeypatch.setattr(Key, "of", lambda problem, device: replace(canonical(problem, device), rounds=3))
    assert "must be canonical" in refused(packed)
