"""Packs: what is exported comes back from one file, and is imported with caution."""

import gc
import io
import random
import stat
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from packing import DEVICE, PROBLEMS, fill, filled

import tiles
from tiles.cache.cache import CacheCorrupt, KernelCache, Key
from tiles.errors import BadInput
from tiles.pack.pack import Pack, write_pack


@pytest.fixture
def cache(tmp_path):
    return filled(tmp_path / "cache")


@pytest.fixture
def packed(cache, tmp_path):
    path = tmp_path / "kernels.mhcpack"
    write_pack(cache, path)
    return path


def test_a_pack_holds_what_the_cache_held(cache, packed):
    with Pack(packed) as pack:
        assert pack.records() == cache.records()
        assert pack.created_by.startswith("mhc-tune")
        for record in pack.records():
            assert pack.binary_path(record).read_bytes() == cache.binary_path(record).read_bytes()
            assert pack.source(record) == cache.source(record)


def test_equal_caches_give_equal_bytes(cache, packed, tmp_path):
    again = KernelCache(tmp_path / "again")
    for record in reversed(cache.records()):
        source = cache.source(record)
        binary = cache.binary_path(record).read_bytes()
        again.put(record.key, record.schedule, binary, source, record.measurement, record.provenance)
    write_pack(again, tmp_path / "again.mhcpack")
    assert (tmp_path / "again.mhcpack").read_bytes() == packed.read_bytes()


def test_the_pack_is_a_plain_zip_that_other_tools_read(packed):
    with zipfile.ZipFile(io.BytesIO(packed.read_bytes())) as archive:
        assert archive.testzip() is None
        assert archive.namelist()[0] == "manifest.json"
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_a_choice_of_records_can_be_packed(cache, tmp_path):
    chosen = cache.records()[:1]
    assert write_pack(cache, tmp_path / "one.mhcpack", chosen) == chosen
    with Pack(tmp_path / "one.mhcpack") as pack:
        assert pack.records() == chosen


def test_an_export_that_fails_leaves_the_older_pack(cache, packed):
    before = packed.read_bytes()
    record = cache.records()[0]
    cache.binary_path(record).write_bytes(b"")
    with pytest.raises(CacheCorrupt):
        write_pack(cache, packed, [record])
    with pytest.raises(BadInput, match="must hold at least one kernel"):
        write_pack(KernelCache(cache.folder / "none"), packed)
    with pytest.raises(BadInput, match="must be writable"):
        write_pack(cache, packed / "below" / "a.mhcpack")
    assert packed.read_bytes() == before
    assert sorted(path.name for path in packed.parent.iterdir()) == ["cache", packed.name]


def test_binaries_are_extracted_privately_and_removed(packed):
    pack = Pack(packed)
    paths = [pack.binary_path(record) for record in pack.records()]
    folder = paths[0].parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [pack.binary_path(record) for record in pack.records()] == paths
    pack.close()
    assert not folder.exists()


def test_a_pack_that_is_forgotten_cleans_up(packed):
    pack = Pack(packed)
    folder = pack.binary_path(pack.records()[0]).parent
    del pack
    gc.collect()  # an unclosed file would warn, and warnings are errors
    assert not folder.exists()


def test_extracted_binaries_go_when_the_process_ends(packed):
    code = (
        "import sys; from pathlib import Path; from tiles.pack.pack import Pack\n"
        "pack = Pack(Path(sys.argv[1])); path = pack.binary_path(pack.records()[0])\n"
        "assert path.exists(); print(path)\n"
        "assert not {'tilelang', 'optuna', 'rich', 'typer'} & set(sys.modules)"
    )
    root = Path(tiles.__file__).parent.parent
    command = [sys.executable, "-c", code, str(packed)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert not Path(done.stdout.strip()).parent.exists()


def test_a_pack_changed_after_opening_is_noticed(cache, tmp_path):
    record = fill(cache, PROBLEMS[0], random.Random(9).randbytes(50_000))
    path = tmp_path / "a.mhcpack"
    write_pack(cache, path)
    with Pack(path) as pack:
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
        with pytest.raises(CacheCorrupt):
            pack.binary_path(record)


def test_current_kernels_are_those_of_this_version():
    key = Key.of(PROBLEMS[0], DEVICE)
    assert key.current
    for changes in ({"sources": "other"}, {"toolchain": "0.0.1"}, {"op": "swirl"}):
        assert not replace(key, **changes).current
