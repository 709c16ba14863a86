"""Kernels of other sources: schedules are kept and compiled again, code does not run, and one line says why."""

import json
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tiles.cache.cache import KernelCache
from tiles.cache.lookup import candidates
from tiles.cache.record import Key
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.pack.import_pack import import_pack
from tiles.pack.pack import Pack, write_pack
from tiles.target import Device

DATA = Path(__file__).parent / "data"
"""A pack and a cache folder of merge at n = 4 and width 64, as the code wrote them when the modules of `tiles` lay in
one folder: the same keys, fields and files, another digest of sources."""

WHY = "it was made from other kernel sources than this version's"
SCHEDULE = {"block_width": 64, "threads": 0}


@pytest.fixture
def cache(tmp_path):
    with zipfile.ZipFile(DATA / "other-sources-cache.zip") as files:
        files.extractall(tmp_path / "cache")
    return KernelCache(tmp_path / "cache")


@pytest.fixture(params=["cache", "pack"])
def source(request, cache):
    if request.param == "cache":
        yield cache
    else:
        with Pack(DATA / "other-sources.mhcpack") as pack:
            yield pack


def compiled(records):
    """Stands in for the compiler."""
    return [SimpleNamespace(binary=b"compiled here", source="", made_with={}) for _ in records]


def imported(cache, tmp_path, recompile=compiled):
    """The outcomes of importing a signed pack of `cache` by op and direction, and the cache that it came into."""
    write_pack(cache, tmp_path / "signed.mhcpack")
    mine = KernelCache(tmp_path / "mine")
    with Pack(tmp_path / "signed.mhcpack") as pack:
        done = import_pack(pack, mine, trust_binaries=True, recompile=recompile)
    return {record.key.direction: outcome for record, outcome in done}, mine


def test_every_kernel_is_read_and_its_schedule_compiled_again(source):
    records = source.records()
    assert sorted(record.key.direction for record in records) == ["backward", "forward"]
    assert source.complaints == []
    for record in records:
        assert (record.key.current, record.key.why_not_current) == (False, WHY)
        assert source.binary(record).startswith(b"\x7fELF")
        assert source.source(record).startswith("// tilelang target: ")
        (found,) = candidates(records, record.key.problem, record.key.device)
        assert (found.record, found.record.schedule) == (record, SCHEDULE)
        assert (found.match, found.why_recompile, found.why_refused) == ("exact", WHY, None)


def test_import_compiles_the_same_schedules_even_where_the_pack_is_trusted(cache, tmp_path):
    outcomes, mine = imported(cache, tmp_path)
    assert outcomes == {"forward": "recompiled", "backward": "recompiled"}
    before = {record.key.problem: (record.schedule, record.measurement) for record in cache.records()}
    assert {record.key.problem: (record.schedule, record.measurement) for record in mine.records()} == before
    assert all(record.key.current for record in mine.records())


def rename_tunable(cache, direction):
    """Give a stored schedule a field that this version does not know, as a renamed tunable leaves it."""
    (record,) = [record for record in cache.records() if record.key.direction == direction]
    path = cache.folder / f"{record.key.digest}.json"
    values = json.loads(path.read_bytes())
    values["schedule"]["lanes"] = values["schedule"].pop("threads")
    path.write_text(json.dumps(values))


def test_a_schedule_with_unknown_fields_is_skipped_in_one_line_and_hides_no_other(cache, tmp_path):
    rename_tunable(cache, "backward")
    records = cache.records()
    assert (len(records), cache.complaints) == (2, [])
    line = (
        "a schedule of merge.backward must have its fields, got unknown ['lanes'], missing ['threads']: "
        "tune this kernel again"
    )
    for record in records:
        (found,) = candidates(records, record.key.problem, record.key.device)
        assert found.why_refused == (line if record.key.direction == "backward" else None)
    outcomes, mine = imported(cache, tmp_path)
    assert outcomes == {"forward": "recompiled", "backward": f"skipped: {line}"}
    assert [record.key.direction for record in mine.records()] == ["forward"]


def test_a_cuda_schedule_with_renamed_fields_is_refused_by_their_names(tmp_path):
    device = Device("cuda", "NVIDIA H200", "sm_90a", 132, 60 * 2**20)
    cache = KernelCache(tmp_path / "cache")
    for width in (1280, 2560):
        problem = Problem("step", "backward", 4, width, "bfloat16", 1024)
        schedule = asdict(kernel_spec("step", "backward").default(problem, device.target))
        if width == 1280:
            first = sorted(schedule)[0]
            schedule = {"renamed" if name == first else name: value for name, value in schedule.items()}
        cache.put(replace(Key.of(problem, device), sources="0" * 16), schedule, b"code", "", {}, {})
    with Pack(_packed(cache, tmp_path)) as pack:
        found = {
            record.key.width: candidates(pack.records(), record.key.problem, device)[0] for record in pack.records()
        }
    line = f"got unknown ['renamed'], missing ['{first}']: tune this kernel again"
    assert found[1280].why_refused.endswith(line)
    assert "\n" not in found[1280].why_refused
    assert found[2560].why_refused is None


def _packed(cache, tmp_path):
    write_pack(cache, tmp_path / "cuda.mhcpack")
    return tmp_path / "cuda.mhcpack"
