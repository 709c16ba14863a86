"""Importing packs: code runs here only where it was compiled here or is trusted."""

from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from packing import DEVICE, FROM, MEASURED, PROBLEMS, fill, filled

from tiles.cache.cache import KernelCache, Key
from tiles.compiler.compile import CompileError, compile_kernel
from tiles.errors import BadInput
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.pack.import_pack import import_pack
from tiles.pack.pack import Pack, write_pack
from tiles.runtime.loaded_kernel import LoadedKernel, run_reference
from tiles.target import detect_device


@pytest.fixture
def cache(tmp_path):
    return filled(tmp_path / "cache")


@pytest.fixture
def mine(tmp_path):
    return KernelCache(tmp_path / "mine")


def carry(theirs, mine, recompile, *, signed=False, trust=False):
    """Pack one cache and import it into the other."""
    path = theirs.folder.parent / "carried.mhcpack"
    write_pack(theirs, path, signed=signed)
    with Pack(path) as pack:
        return import_pack(pack, mine, trust_binaries=trust, recompile=recompile)


def compiled(records):
    """Stands in for the compiler."""
    made_with = {"cuda_toolkit": "12.8"}
    return [SimpleNamespace(binary=b"compiled here", source="own source", made_with=made_with) for _ in records]


def never(records):
    assert records == []
    return []


def test_without_trust_every_kernel_is_recompiled(cache, mine):
    seen = []
    imported = carry(cache, mine, lambda records: seen.extend(records) or compiled(records))
    assert [how for _, how in imported] == ["recompiled"] * 3
    assert len(seen) == 3
    for record in mine.records():
        assert mine.binary_path(record).read_bytes() == b"compiled here"
        assert record.provenance == {"host": "a", "imported": "recompiled", "cuda_toolkit": "12.8"}
        assert record.measurement == MEASURED


@pytest.mark.parametrize("why", [{"signed": True}, {"trust": True}])
def test_trusted_binaries_are_copied(cache, mine, why):
    imported = carry(cache, mine, never, **why)
    assert [how for _, how in imported] == ["copied"] * 3
    assert sorted(record.key.digest for record, _ in imported) == [record.key.digest for record in mine.records()]
    for theirs, ours in zip(cache.records(), mine.records(), strict=True):
        assert (theirs.key, theirs.sha256) == (ours.key, ours.sha256)


def test_a_strangers_signature_is_no_trust(cache, mine, tmp_path, monkeypatch):
    path = tmp_path / "theirs.mhcpack"
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("MHC_TUNE_KEYS", str(tmp_path / "their keys"))
        write_pack(cache, path)
    with Pack(path) as pack:
        imported = import_pack(pack, mine, trust_binaries=False, recompile=compiled)
    assert [how for _, how in imported] == ["recompiled"] * 3


@pytest.mark.parametrize("changes", [{"sources": "elsewhere"}, {"toolchain": "0.1.14"}])
def test_other_versions_are_recompiled_even_with_trust(tmp_path, mine, changes):
    theirs = KernelCache(tmp_path / "theirs")
    fill(theirs, PROBLEMS[0], b"their calling convention", **changes)
    imported = carry(theirs, mine, compiled, signed=True, trust=True)
    assert [how for _, how in imported] == ["recompiled"]
    (record,) = mine.records()
    assert record.key == Key.of(PROBLEMS[0], DEVICE)
    assert mine.binary_path(record).read_bytes() == b"compiled here"


def test_what_the_cache_holds_already_is_kept(cache, mine):
    own = fill(mine, PROBLEMS[0], b"tuned here")
    imported = carry(cache, mine, never, trust=True)
    assert sorted(how.split(":")[0] for _, how in imported) == ["copied", "copied", "kept"]
    assert mine.get(own.key) == own


def test_a_kernel_that_does_not_compile_is_skipped_and_the_rest_comes_in(cache, mine):
    def recompile(records):
        for record in records:
            if record.key.op == "aggregate":
                yield CompileError("aggregate: no compiler")
            else:
                yield SimpleNamespace(binary=b"compiled", source="", made_with={})

    imported = carry(cache, mine, recompile)
    assert sorted(how for _, how in imported) == ["recompiled", "recompiled", "skipped: aggregate: no compiler"]
    assert {record.key.op for record in mine.records()} == {"merge"}


def test_kernels_are_stored_as_they_come(cache, mine):
    def interrupted(records):
        yield from compiled(records[:1])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry(cache, mine, interrupted)
    assert len(mine.records()) == 1


def test_another_versions_unknown_kernel_is_listed_and_skipped(tmp_path, mine):
    theirs = KernelCache(tmp_path / "theirs")
    fill(theirs, PROBLEMS[0], b"code", op="swirl", sources="elsewhere")
    theirs.put(replace(Key.of(PROBLEMS[1], DEVICE), sources="elsewhere"), {"old_field": 1}, b"code", "", {}, {})
    (schedule, unknown) = sorted(how for _, how in carry(theirs, mine, never, trust=True))
    assert schedule.startswith(
        "skipped: a schedule of merge.backward must have its fields, got unknown ['old_field'], missing ["
    )
    assert unknown.startswith("skipped: no kernel swirl.forward: choose one of ")
    assert mine.records() == []


@pytest.mark.parametrize("trust", [True, False])
def test_a_kernel_of_this_version_goes_before_an_older_one_of_the_same_problem(tmp_path, mine, trust):
    theirs = KernelCache(tmp_path / "theirs")
    for index in range(8):
        fill(theirs, PROBLEMS[0], b"old", sources=f"old{index}")
    current = fill(theirs, PROBLEMS[0], b"current")
    assert theirs.records()[0] != current  # the order of the digests is not the order of the import
    seen = []
    imported = carry(theirs, mine, lambda records: seen.extend(records) or compiled(records), trust=trust)
    assert sorted(how.split(":")[0] for _, how in imported) == sorted(
        ["copied" if trust else "recompiled"] + ["kept"] * 8
    )
    assert seen == ([] if trust else [current])
    assert mine.get(current.key).sha256 == current.sha256 or not trust


def test_a_folder_that_cannot_be_written_ends_the_import(cache, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(BadInput, match="the cache folder must be writable"):
        carry(cache, KernelCache(tmp_path / "file"), compiled)


def test_a_real_kernel_travels_and_runs(tmp_path, mine):
    device = detect_device("cpu")
    problem = Problem("merge", "forward", 3, 64, "float32", 16)
    spec = kernel_spec(problem.op, problem.direction)
    schedule = spec.default(problem, device.target)
    artifact = compile_kernel(problem, schedule, device.target)
    theirs = KernelCache(tmp_path / "theirs")
    theirs.put(Key.of(problem, device), asdict(schedule), artifact.binary, artifact.source, MEASURED, FROM)

    def recompile(records):
        for record in records:
            assert (record.key.problem, spec.schedule_from(record.schedule)) == (problem, schedule)
            yield artifact

    imported = carry(theirs, mine, recompile)
    assert [how for _, how in imported] == ["recompiled"]
    inputs = tuple(spec.inputs(problem, 16, 0).values())
    (wanted,) = run_reference(problem, *inputs)
    with Pack(tmp_path / "carried.mhcpack") as pack:
        for shelf in (theirs, mine, pack):
            (record,) = shelf.records()
            (result,) = LoadedKernel(shelf.binary_path(record), problem)(*inputs)
            torch.testing.assert_close(result, wanted)
