"""Packs of older versions: what was exported then is read now, or refused in one line."""

import json
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from tiles.cache.cache import KernelCache
from tiles.errors import BadInput
from tiles.pack import zip_format as archive
from tiles.pack.import_pack import import_pack
from tiles.pack.pack import Pack, write_pack

FORMAT_1 = Path(__file__).parent / "data" / "format-1.mhcpack"
"""Two kernels, merge at n = 4 and width 64, as the code wrote them before packs could be signed."""


@pytest.fixture
def pack():
    with Pack(FORMAT_1) as pack:
        yield pack


def test_format_1_is_read(pack):
    assert json.loads(zipfile.ZipFile(FORMAT_1).read("manifest.json"))["format"] == 1
    assert [(record.key.op, record.key.direction, record.key.width) for record in pack.records()] == [
        ("merge", "forward", 64),
        ("merge", "backward", 64),
    ]
    for record in pack.records():
        assert record.schedule == {"block_width": 64, "threads": 0}
        assert record.measurement["ratio"] == 2.0
        assert pack.binary(record).startswith(b"\x7fELF")
        assert pack.source(record).startswith("// tilelang target: ")


def test_format_1_is_not_signed_so_its_code_is_not_trusted(pack, tmp_path):
    assert (pack.signed_by, pack.why_untrusted) == (None, "it is not signed")
    compiled = SimpleNamespace(binary=b"compiled here", source="", made_with={})
    cache = KernelCache(tmp_path)
    imported = import_pack(
        pack, cache, trust_binaries=False, recompile=lambda records: [compiled for record in records]
    )
    assert len(imported) == 2
    assert "copied" not in {how for _, how in imported}


def test_format_1_is_exported_again_as_the_newest(pack, tmp_path):
    cache = KernelCache(tmp_path / "cache")
    for record in pack.records():
        content = pack.binary(record), pack.source(record)
        cache.put(record.key, record.schedule, *content, record.measurement, record.provenance)
    write_pack(cache, tmp_path / "new.mhcpack")
    with zipfile.ZipFile(tmp_path / "new.mhcpack") as written:
        assert json.loads(written.read("manifest.json"))["format"] == archive.FORMAT == 2
    with Pack(tmp_path / "new.mhcpack") as new:
        assert new.records() == pack.records()
        assert new.why_untrusted is None


@pytest.mark.parametrize("number", [0, 3, 99])
def test_a_format_of_which_nothing_is_known_is_refused_in_one_line(tmp_path, number):
    path = tmp_path / "odd.mhcpack"
    shutil.copy(FORMAT_1, path)
    with zipfile.ZipFile(FORMAT_1) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content.replace(b'"format":1,"records"', b'"format":%d,"records"' % number))
    with pytest.raises(BadInput, match=rf"^odd.mhcpack: a pack's format must be 1 or 2, got {number}: ") as caught:
        Pack(path)
    assert "\n" not in str(caught.value)
