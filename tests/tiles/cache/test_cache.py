"""The kernel cache: what is stored comes back whole, and what is damaged is a miss that is said aloud."""

import dataclasses
import json
import sys

import pytest
from stored import DEVICE, KEY, SCHEDULE, put

from tiles.cache.cache import (
    CacheCorrupt,
    KernelCache,
    Key,
    binary_name,
    default_folder,
    source_name,
    token_bucket,
)
from tiles.cache.record import record_dict, record_from_dict
from tiles.errors import BadInput
from tiles.kernels.registry import kernel_spec, kernel_specs
from tiles.kernels.spec import Problem
from tiles.target import Device


@pytest.fixture
def cache(tmp_path):
    return KernelCache(tmp_path / "cache")


@pytest.mark.parametrize(("tokens", "bucket"), [(0, 1), (1, 1), (2, 2), (3, 4), (2048, 2048), (2049, 4096)])
def test_bucket_is_the_next_power_of_two(tokens, bucket):
    assert token_bucket(tokens) == bucket


def test_default_folder_is_the_environments_then_the_platforms(monkeypatch, tmp_path):
    monkeypatch.setenv("MHC_TUNE_CACHE", str(tmp_path))
    assert default_folder() == tmp_path
    monkeypatch.delenv("MHC_TUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "mhc-tune"


def test_the_default_folder_without_platformdirs_is_the_same(monkeypatch, tmp_path):
    monkeypatch.delenv("MHC_TUNE_CACHE", raising=False)
    for home in (None, str(tmp_path / "xdg")):
        if home:
            monkeypatch.setenv("XDG_CACHE_HOME", home)
        else:
            monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        wanted = default_folder()
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "platformdirs", None)
            assert default_folder() == wanted


def test_key_is_the_canonical_problem_in_its_token_bucket():
    problem = Problem("merge", "forward", 4, 64, "bfloat16", tokens=100, rounds=7)
    key = Key.of(problem, DEVICE)
    decisive = kernel_spec("merge", "forward").canonical(problem)
    assert key.tokens == 128
    assert key.problem == dataclasses.replace(decisive, tokens=128)
    assert key == Key.of(dataclasses.replace(problem, tokens=65), DEVICE)
    assert key == Key.of(key.problem, DEVICE)


@pytest.mark.parametrize("spec", kernel_specs().values(), ids=lambda spec: spec.name)
def test_the_key_of_a_keys_problem_is_that_key(spec):
    key = Key.of(Problem(spec.op, spec.direction, 3, 72, "float16", tokens=100, rounds=7), DEVICE)
    assert Key.of(key.problem, DEVICE) == key
    assert key.tokens == 128


def test_every_field_of_the_key_changes_the_digest():
    other = {
        "op": "aggregate", "direction": "backward", "streams": 5, "width": 72, "dtype": "float16", "tokens": 256,
        "rounds": 19, "device": Device("cpu", "B CPU", "x86-64-v3"), "toolchain": "0.1.16", "sources": "ffff",
        "format": 2,
    }  # fmt: skip
    assert set(other) == {field.name for field in dataclasses.fields(Key)}
    digests = {dataclasses.replace(KEY, **{name: value}).digest for name, value in other.items()}
    assert len(digests | {KEY.digest}) == len(other) + 1


def test_what_is_put_comes_back(cache):
    record = put(cache)
    fresh = KernelCache(cache.folder)
    assert fresh.get(KEY) == record
    assert fresh.records() == [record]
    assert fresh.binary_path(record).read_bytes() == b"\x7fELF code"
    assert fresh.binary_path(record).suffix == ".so"
    assert fresh.source(record) == "int f();\n"
    assert (record.schedule, record.measurement["tuned_ms"], record.provenance) == (SCHEDULE, 1.5, {"host": "a"})
    assert fresh.complaints == []


def test_a_missing_folder_or_key_is_a_plain_miss(cache):
    assert (cache.records(), cache.get(KEY), cache.complaints) == ([], None, [])
    put(cache)
    assert cache.get(dataclasses.replace(KEY, tokens=64)) is None
    assert cache.complaints == []


def test_tuning_again_replaces_the_record_and_leaves_the_loaded_binary(cache):
    old, new = put(cache), put(cache, binary=b"faster", tuned_ms=1.0)
    assert cache.records() == [new]
    assert cache.binary_path(new).read_bytes() == b"faster"
    assert cache.binary_path(old).read_bytes() == b"\x7fELF code"


@pytest.mark.parametrize(
    "values",
    [
        {"provenance": {"host": {"nested": 1}}},
        {"provenance": {"host": "two\nlines"}},
        {"provenance": {"host": "x" * 70_000}},
        {"measurement": {"tuned_ms": float("nan")}},
        {"measurement": {"tuned_ms": "1.5"}},
        {"schedule": {"block": (1, 2)}},
        {"schedule": {"block": object()}},
    ],
)
def test_put_refuses_what_readers_would_refuse(cache, values):
    given = {"schedule": SCHEDULE, "measurement": {}, "provenance": {}} | values
    with pytest.raises(BadInput) as caught:
        cache.put(KEY, given["schedule"], b"code", "", given["measurement"], given["provenance"])
    assert "\n" not in str(caught.value)
    assert cache.records() == []


def test_a_folder_that_cannot_be_written_is_bad_input(tmp_path):
    (tmp_path / "file").write_text("")
    cache = KernelCache(tmp_path / "file" / "cache")
    with pytest.raises(BadInput, match="must be writable"):
        put(cache)
    assert cache.get(KEY) is None
    assert cache.records() == []
    assert cache.complaints


def test_reading_needs_no_write_permission_and_writes_nothing(cache):
    record = put(cache)
    for path in cache.folder.iterdir():
        path.chmod(0o444)
    cache.folder.chmod(0o555)
    before = [(path.name, path.stat().st_mtime_ns) for path in sorted(cache.folder.iterdir())]
    reader = KernelCache(cache.folder)
    assert reader.records() == [record]
    assert reader.binary_path(record).exists()
    assert [(path.name, path.stat().st_mtime_ns) for path in sorted(cache.folder.iterdir())] == before
    cache.folder.chmod(0o755)


def edit(path, *names, value):
    """Set one field of a record's JSON."""
    values = json.loads(path.read_text())
    inner = values
    for name in names[:-1]:
        inner = inner[name]
    inner[names[-1]] = value
    path.write_text(json.dumps(values))


DAMAGE = {
    "empty": lambda json_path, binary: json_path.write_bytes(b""),
    "truncated": lambda json_path, binary: json_path.write_bytes(json_path.read_bytes()[:-20]),
    "not text": lambda json_path, binary: json_path.write_bytes(b"\xff\xfe\x00"),
    "deep": lambda json_path, binary: json_path.write_text("[" * 60_000),
    "huge": lambda json_path, binary: json_path.write_text(json_path.read_text() + " " * 100_000),
    "a list": lambda json_path, binary: json_path.write_text("[]"),
    "a number": lambda json_path, binary: json_path.write_text("1"),
    "key is text": lambda json_path, binary: edit(json_path, "key", value="x"),
    "format": lambda json_path, binary: edit(json_path, "key", "format", value=2),
    "format is true": lambda json_path, binary: edit(json_path, "key", "format", value=True),
    "extra field": lambda json_path, binary: edit(json_path, "more", value=1),
    "streams is text": lambda json_path, binary: edit(json_path, "key", "streams", value="4"),
    "streams is true": lambda json_path, binary: edit(json_path, "key", "streams", value=True),
    "width": lambda json_path, binary: edit(json_path, "key", "width", value=63),
    "tokens": lambda json_path, binary: edit(json_path, "key", "tokens", value=100),
    "other key": lambda json_path, binary: edit(json_path, "key", "tokens", value=256),
    "direction": lambda json_path, binary: edit(json_path, "key", "direction", value="sideways"),
    "op escapes": lambda json_path, binary: edit(json_path, "key", "op", value="../merge"),
    "device": lambda json_path, binary: edit(json_path, "key", "device", value={"kind": "cpu"}),
    "device kind": lambda json_path, binary: edit(json_path, "key", "device", "kind", value="tpu"),
    "arch": lambda json_path, binary: edit(json_path, "key", "device", "arch", value=""),
    "infinite": lambda json_path, binary: edit(json_path, "measurement", "tuned_ms", value=float("inf")),
    "escape sequence": lambda json_path, binary: edit(json_path, "provenance", "host", value="\x1b[2J"),
    "schedule": lambda json_path, binary: edit(json_path, "schedule", "block", value=[1]),
    "sha256": lambda json_path, binary: edit(json_path, "sha256", value="0" * 64),
    "sha256 escapes": lambda json_path, binary: edit(json_path, "sha256", value="../../" + "0" * 58),
    "size": lambda json_path, binary: edit(json_path, "size", value=-1),
    "binary missing": lambda json_path, binary: binary.unlink(),
    "binary cut": lambda json_path, binary: binary.write_bytes(binary.read_bytes()[:-1]),
    "binary longer": lambda json_path, binary: binary.write_bytes(binary.read_bytes() + b"x"),
    "binary changed": lambda json_path, binary: binary.write_bytes(b"\x7fELF codf"),
    "binary a folder": lambda json_path, binary: (binary.unlink(), binary.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_corrupt_entry_is_a_miss_said_once(cache, damage):
    other = put(cache, dataclasses.replace(KEY, direction="backward"))
    record = put(cache)
    damage(cache.folder / f"{KEY.digest}.json", cache.folder / binary_name(record))
    assert cache.get(KEY) is None
    assert cache.records() == [other]
    assert len(cache.complaints) == 1
    assert cache.complaints[0].startswith(f"{KEY.digest}.json: ignored, ")
    assert "\n" not in cache.complaints[0]
    assert "\x1b" not in cache.complaints[0]


def test_an_entry_under_another_keys_name_is_a_miss(cache):
    other = dataclasses.replace(KEY, tokens=256)
    put(cache)
    (cache.folder / f"{KEY.digest}.json").rename(cache.folder / f"{other.digest}.json")
    assert cache.get(other) is None
    assert cache.records() == []
    assert "its key belongs in" in cache.complaints[0]


@pytest.mark.parametrize(
    ("names", "value", "rule"),
    [
        (("key", "streams"), True, "streams of a key must be int, got True"),
        (("size",), 1.0, "size of a record must be int, got 1.0"),
        (("key", "tokens"), 100, "tokens of a key must be a power of two, got 100"),
        (("key", "streams"), 17, "streams must be in 1..16, got 17"),
        (("key", "width"), 2**60, "width must be in 0..9007199254740992"),
        (("key", "op"), "../merge", "op must match"),
        (("measurement", "ratio"), 1e999, "measurement must hold plain values"),
        (("measurement", "ratio"), 2**70, "measurement must hold plain values"),
        (("measurement", "ratio"), "1", "measurement must hold plain values"),
        (("provenance", "host"), None, "provenance must hold plain values"),
        (("provenance", "a\nb"), 1, "provenance must hold plain values"),
    ],
)
def test_a_record_is_checked_field_by_field(cache, names, value, rule):
    values = record_dict(put(cache))
    inner = values
    for name in names[:-1]:
        inner = inner[name]
    inner[names[-1]] = value
    with pytest.raises(BadInput) as caught:
        record_from_dict(values)
    assert str(caught.value).startswith(rule)
    assert "\n" not in str(caught.value)


def test_tuning_again_heals_a_corrupt_entry(cache):
    record = put(cache)
    (cache.folder / binary_name(record)).write_bytes(b"")
    assert cache.get(KEY) is None
    assert put(cache) == cache.get(KEY)


def test_a_binary_that_changes_after_the_record_was_read_is_refused(cache):
    record = put(cache)
    (cache.folder / binary_name(record)).write_bytes(b"\x7fELF evil")
    with pytest.raises(CacheCorrupt, match="SHA-256"):
        cache.binary_path(record)
    (cache.folder / source_name(record)).unlink()
    with pytest.raises(CacheCorrupt, match="cannot be read"):
        cache.source(record)


def test_a_lazy_cache_checks_a_binary_when_it_is_asked_for(cache):
    record = put(cache)
    (cache.folder / binary_name(record)).write_bytes(b"\x7fELF evil")
    lazy = KernelCache(cache.folder, lazy=True)
    assert (lazy.get(KEY), lazy.records(), lazy.complaints) == (record, [record], [])
    with pytest.raises(CacheCorrupt, match="SHA-256"):
        lazy.binary_path(record)
    (cache.folder / binary_name(record)).unlink()
    assert lazy.records() == []
    assert "is missing" in lazy.complaints[0]


def test_what_another_process_changed_is_read_anew(cache):
    reader = KernelCache(cache.folder)
    for step in range(3):
        record = put(cache, binary=b"%d" % step, tuned_ms=step)
        assert reader.records() == [record]
        assert reader.get(KEY) == record
    (cache.folder / f"{KEY.digest}.json").unlink()
    assert (reader.records(), reader.get(KEY), reader.complaints) == ([], None, [])


def test_what_has_not_changed_is_not_parsed_again(cache, monkeypatch):
    record = put(cache)
    reader = KernelCache(cache.folder)
    assert reader.records() == [record]
    monkeypatch.setattr("tiles.cache.cache.record_from_dict", lambda values: pytest.fail("parsed again"))
    assert (reader.records(), reader.get(KEY)) == ([record], record)
