"""Signed packs: what a signature covers, and what becomes of a pack that was changed after it was signed."""

import json
import random
import zipfile
from dataclasses import asdict

import pytest
from mutations import read, with_manifest, without_signature, zipped

from tiles.cache.cache import CacheCorrupt, KernelCache, Key, binary_name
from tiles.errors import BadInput
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.pack.pack import Pack, write_pack
from tiles.target import Device

DEVICE = Device("cpu", "A CPU", "x86-64")


@pytest.fixture
def packed(tmp_path):
    """A signed pack of two kernels, larger than what is read from a file at once."""
    cache = KernelCache(tmp_path / "cache")
    for direction in ("forward", "backward"):
        problem = Problem("merge", direction, 4, 64, "float32", 128)
        schedule = asdict(kernel_spec(problem.op, direction).default(problem, DEVICE.target))
        binary = random.Random(direction).randbytes(50_000)
        cache.put(Key.of(problem, DEVICE), schedule, binary, "//", {"tuned_ms": 1.5}, {"host": "a"})
    path = tmp_path / "kernels.mhcpack"
    write_pack(cache, path)
    return path


@pytest.fixture
def entries(packed):
    return read(packed.read_bytes())


def refused(path, *, lazy=False):
    with pytest.raises(BadInput) as caught, Pack(path, lazy=lazy) as pack:
        pack.why_untrusted  # noqa: B018
    line = str(caught.value)
    assert line.startswith(f"{path.name}: ")
    assert line.isprintable()
    return line


def changed_manifest(entries):
    """The manifest with another time of the same length."""
    other = entries["manifest.json"].replace(b'"tuned_ms":1.5', b'"tuned_ms":9.5')
    assert other != entries["manifest.json"]
    return other


def test_a_signed_pack_is_trusted_by_its_signer_alone(packed, tmp_path, monkeypatch):
    with Pack(packed) as pack:
        assert pack.why_untrusted is None
        assert pack.signed_by.startswith("ed25519:")
        signer = pack.signed_by
    monkeypatch.setenv("MHC_TUNE_KEYS", str(tmp_path / "of somebody else"))
    with Pack(packed) as pack:
        assert pack.why_untrusted == f"it is signed by {signer}, which you have not listed (see mhc-tune keys)"


@pytest.mark.parametrize("lazy", [True, False])
def test_another_manifest_is_refused(packed, entries, lazy):
    packed.write_bytes(zipped(entries | {"manifest.json": changed_manifest(entries)}))
    assert "its content must match its signature and does not" in refused(packed, lazy=lazy)


def test_the_signature_has_to_be_of_what_was_read_and_not_of_what_the_file_holds_later(packed, entries):
    packed.write_bytes(zipped(entries | {"manifest.json": changed_manifest(entries)}, zipfile.ZIP_STORED))
    with Pack(packed, lazy=True) as pack:
        packed.write_bytes(zipped(entries, zipfile.ZIP_STORED))  # the same file, now sound
        with Pack(packed) as sound:
            assert sound.why_untrusted is None
        with pytest.raises(BadInput, match="must match its signature"):
            pack.why_untrusted  # noqa: B018


def test_changed_code_is_never_handed_out(packed, entries):
    victim = next(name for name in entries if name.startswith("binaries/"))
    packed.write_bytes(zipped(entries | {victim: entries[victim][:-1] + b"?"}))
    assert "must match its record's SHA-256" in refused(packed)
    with Pack(packed, lazy=True) as pack:
        assert pack.why_untrusted is None  # the manifest is as it was signed
        (wrong,) = [record for record in pack.records() if victim.endswith(binary_name(record))]
        with pytest.raises(CacheCorrupt):
            pack.binary_path(wrong)


def test_without_its_signature_a_pack_is_data(packed, entries):
    packed.write_bytes(zipped(without_signature(entries)))
    with Pack(packed) as pack:
        assert (pack.signed_by, pack.why_untrusted) == (None, "it is not signed")
        assert len(pack.records()) == 2


def test_a_signature_does_not_fit_fewer_kernels(packed, entries):
    manifest = json.loads(entries["manifest.json"])
    left = manifest["records"].pop()["record"]["sha256"][:16]
    kept = {name: content for name, content in entries.items() if left not in name}
    packed.write_bytes(zipped(with_manifest(kept, manifest)))
    assert "its content must match its signature" in refused(packed)


@pytest.mark.parametrize(
    "change",
    [
        {"key": "ed25519:"},
        {"key": 1},
        {"value": "zz" * 64},
        {"value": ""},
        {"value": "0" * 126},
        {"value": None},
        {"more": 1},
        {"value": "0" * 2000},
    ],
)
def test_signatures_of_odd_form_are_refused(packed, entries, change):
    signature = json.loads(entries["signature.json"]) | change
    packed.write_bytes(zipped(entries | {"signature.json": json.dumps(signature).encode()}))
    refused(packed, lazy=True)


@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 1000, b"\xff", b"{}"])
def test_signatures_that_are_none_are_refused(packed, entries, content):
    packed.write_bytes(zipped(entries | {"signature.json": content}))
    refused(packed, lazy=True)
