"""Pruning removes what nothing reads, and never what a sound record points at, whatever others do meanwhile."""

import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import tiles.cache.prune
from tiles.cache.cache import KernelCache, binary_name, source_name
from tiles.cache.prune import prune
from tiles.cache.record import Key
from tiles.errors import BadInput
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.target import Device

HERE = Device("cpu", "This CPU", "x86-64-v3")
PROBLEM = Problem("merge", "forward", 4, 64, tokens=1024)
SCHEDULE = asdict(kernel_spec("merge", "forward").default(PROBLEM, HERE.target))


@pytest.fixture
def cache(tmp_path):
    return KernelCache(tmp_path / "cache")


def put(cache, binary=b"code", *, tokens=1024, **changes):
    key = replace(Key.of(replace(PROBLEM, tokens=tokens), HERE), **changes)
    return cache.put(key, SCHEDULE, binary, "source of " + binary.decode(), {}, {})


def age(folder, seconds=7200):
    """Make all files of a folder older."""
    for path in folder.rglob("*"):
        if path.is_file():
            moment = time.time() - seconds
            os.utime(path, (moment, moment))


def names(folder):
    return {path.name for path in folder.iterdir() if path.is_file()}


def files_of(record):
    return {f"{record.key.digest}.json", binary_name(record), source_name(record)}


def test_superseded_files_go_and_current_ones_stay(cache):
    put(cache, b"old")
    newest = put(cache, b"new")
    other = put(cache, b"other", tokens=64)
    age(cache.folder)
    removed = prune(cache.folder)
    assert len(removed) == 2
    assert {file.why for file in removed} == {"superseded by a newer kernel"}
    assert sum(file.size for file in removed) == len(b"old") + len(b"source of old")
    assert names(cache.folder) == files_of(newest) | files_of(other)
    assert prune(cache.folder) == []
    assert cache.records() == sorted((newest, other), key=lambda record: record.key.digest)


def test_a_dry_run_says_the_same_and_removes_nothing(cache):
    put(cache, b"old")
    put(cache, b"new")
    age(cache.folder)
    before = names(cache.folder)
    planned = prune(cache.folder, dry_run=True)
    assert names(cache.folder) == before
    assert planned == prune(cache.folder)


def test_what_is_young_stays(cache):
    put(cache, b"old")
    age(cache.folder)
    put(cache, b"new")  # a reader may have read the old record a moment ago
    put(cache, b"new")
    (cache.folder / ".x.json.1.aa.tmp").write_bytes(b"being written")
    (cache.folder / f"{'0' * 32}.json").write_bytes(b"no JSON")
    assert prune(cache.folder) == []
    assert len(prune(cache.folder, grace_seconds=-1)) == 4


@pytest.mark.parametrize("harm", ["cut", "no binary", "other binary", "wrong name", "no JSON"])
def test_corrupt_entries_go(cache, harm):
    sound, broken = put(cache, b"sound", tokens=64), put(cache, b"broken")
    entry, binary = cache.folder / f"{broken.key.digest}.json", cache.folder / binary_name(broken)
    if harm == "cut":
        entry.write_bytes(entry.read_bytes()[:-9])
    elif harm == "no binary":
        binary.unlink()
    elif harm == "other binary":
        binary.write_bytes(b"BROKEN")
    elif harm == "wrong name":
        entry.rename(entry.with_name(f"{'0' * 32}.json"))
    else:
        entry.write_bytes(b"[" * 5000)
    age(cache.folder)
    assert prune(cache.folder)
    assert names(cache.folder) == files_of(sound)


def test_records_of_other_formats_stay_with_their_files(cache):
    record = put(cache)
    entry = cache.folder / f"{record.key.digest}.json"
    values = json.loads(entry.read_bytes())
    values["key"]["format"] = 99
    values["new field"] = []
    entry.write_text(json.dumps(values), encoding="utf-8")
    age(cache.folder)
    assert prune(cache.folder, stale=True) == []


def test_stale_kernels_go_on_request_only(cache):
    stale = [put(cache, toolchain="0.1.14"), put(cache, sources="0" * 16)]
    current = put(cache)
    age(cache.folder)
    assert prune(cache.folder) == []
    assert len(prune(cache.folder, stale=True)) == 3 * len(stale)
    assert names(cache.folder) == files_of(current)


def test_left_over_temporary_files_and_orphans_go(cache):
    record = put(cache)
    (cache.folder / f".{'0' * 32}.json.77.0123456789abcdef.tmp").write_bytes(b"part")
    (cache.folder / f"{'0' * 32}-{'0' * 16}.so").write_bytes(b"orphan")
    age(cache.folder)
    assert {file.why for file in prune(cache.folder)} == {
        "left over by a process that was stopped",
        "no record points at it",
    }
    assert names(cache.folder) == files_of(record)


def test_compiled_schedules_are_pruned_too(cache):
    for place in ("defaults", "recompiled"):
        put(KernelCache(cache.folder / place), b"old")
        put(KernelCache(cache.folder / place), b"new")
    age(cache.folder)
    assert len(prune(cache.folder)) == 4


def test_other_peoples_files_links_and_folders_stay(cache, tmp_path):
    put(cache)
    (cache.folder / "notes.txt").write_text("mine", encoding="utf-8")
    (cache.folder / "studies").mkdir()
    (cache.folder / "studies" / "x.tmp").write_bytes(b"journal")
    (tmp_path / "elsewhere").write_bytes(b"x")
    (cache.folder / f"{'0' * 32}-{'0' * 16}.so").symlink_to(tmp_path / "elsewhere")
    (cache.folder / f"{'0' * 32}.json").symlink_to(tmp_path / "elsewhere")
    age(cache.folder)
    before = names(cache.folder)
    assert prune(cache.folder, stale=True) == []
    assert names(cache.folder) == before


def test_what_a_writer_brings_back_meanwhile_stays(cache, monkeypatch):
    """A → B → A: the old binary of A is listed as superseded, and written anew before it is removed."""
    put(cache, b"A")
    put(cache, b"B")
    age(cache.folder)
    wanted = []

    def write_first(file):
        if not wanted:
            wanted.append(put(cache, b"A"))
        return remove(file)

    remove = tiles.cache.prune._remove
    monkeypatch.setattr(tiles.cache.prune, "_remove", write_first)
    monkeypatch.setattr(os, "link", None)  # nothing was moved, so that nothing has to be put back
    prune(cache.folder)
    assert cache.records() == wanted
    assert files_of(wanted[0]) <= names(cache.folder)
    assert cache.source(wanted[0]) == "source of A"


def test_a_file_that_is_replaced_at_the_last_moment_is_put_back(cache, monkeypatch):
    put(cache, b"A")
    put(cache, b"B")
    age(cache.folder)
    rename, wanted = Path.rename, []

    def write_then_rename(path, target):
        if not wanted:
            wanted.append(put(cache, b"A"))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", write_then_rename)
    prune(cache.folder)
    monkeypatch.undo()
    assert cache.records() == wanted
    assert files_of(wanted[0]) <= names(cache.folder)
    assert not [name for name in names(cache.folder) if name.endswith(".tmp")]


def test_a_corrupt_record_that_is_tuned_again_meanwhile_stays(cache, monkeypatch):
    record = put(cache)
    (cache.folder / f"{record.key.digest}.json").write_bytes(b"no JSON")
    age(cache.folder)
    sound = tiles.cache.prune._valid_record

    def tuned_again(path):
        try:
            return sound(path)
        finally:
            put(cache)

    monkeypatch.setattr(tiles.cache.prune, "_valid_record", tuned_again)
    assert prune(cache.folder) == []
    assert cache.records() == [record]


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(BadInput, match="must be a folder, found none at"):
        prune(tmp_path / "none")


def test_a_folder_that_cannot_be_changed_is_refused(cache, monkeypatch):
    put(cache, b"old")
    put(cache, b"new")
    age(cache.folder)

    def read_only(self, target):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "rename", read_only)
    with pytest.raises(BadInput, match=r"must be writable, got .* \(Read-only file system\)"):
        prune(cache.folder)
