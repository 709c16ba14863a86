"""A cache folder that several processes use at once, on disks that fill and processes that are killed."""

import errno
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stored import KEY, put

import tiles
from tiles.cache.cache import KernelCache, binary_name, write_atomically
from tiles.errors import BadInput

ROOT, HERE = Path(tiles.__file__).parent.parent, Path(__file__).parent


@pytest.fixture
def cache(tmp_path):
    return KernelCache(tmp_path / "cache")


WRITER = """
import dataclasses, random, sys
from pathlib import Path
from stored import KEY
from tiles.cache.cache import KernelCache

cache, seed = KernelCache(Path(sys.argv[1])), int(sys.argv[2])
draw = random.Random(seed)
for step in range(int(sys.argv[3])):
    key = dataclasses.replace(KEY, tokens=2 ** draw.randrange(4))
    cache.put(key, {"block": step}, draw.randbytes(draw.randrange(1, 20_000)), "source", {"step": step}, {})
    print(key.tokens, step, flush=True)
"""


def writer(tmp_path, seed, steps):
    """A process that keeps putting kernels under four keys, and prints (tokens, step) after each."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "cache"), str(seed), str(steps)]
    path = {"PYTHONPATH": f"{ROOT}:{HERE}"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=path)


def test_killed_writers_leave_every_finished_kernel_sound(tmp_path):
    draw = random.Random(0)
    for attempt in range(4):
        process = writer(tmp_path, attempt, 10**6)
        first = process.stdout.readline()
        time.sleep(draw.uniform(0, 0.06))
        process.send_signal(signal.SIGKILL)
        said = [first, *process.stdout.read().splitlines()]
        process.wait()
        process.stdout.close()
        finished = {int(line.split()[0]): int(line.split()[1]) for line in said if line.count(" ") == 1}
        assert finished
        cache = KernelCache(tmp_path / "cache")
        steps = {record.key.tokens: record.measurement["step"] for record in cache.records()}
        assert cache.complaints == []
        # The step after the last one said may have landed too; nothing that was said may be gone.
        last = max(finished.values())
        assert all(steps[tokens] in (step, last + 1) for tokens, step in finished.items())


def test_writers_of_the_same_keys_at_once_never_mix_their_files(tmp_path):
    processes = [writer(tmp_path, seed, 25) for seed in range(3)]
    cache = KernelCache(tmp_path / "cache")
    while any(process.poll() is None for process in processes):
        cache.records()
    for process in processes:
        assert process.wait() == 0
        process.stdout.close()
    assert {record.key.tokens for record in cache.records()} == {1, 2, 4, 8}
    assert cache.complaints == []
    assert not list(cache.folder.glob(".*"))


def test_a_reader_between_two_puts_and_a_clean_up_gets_the_new_kernel(cache, monkeypatch):
    """The record is read, then replaced, and its old binary removed, before the binary is read."""
    old = put(cache)
    reader = KernelCache(cache.folder)
    check = reader.binary_path

    def replaced_meanwhile(record):
        if record == old:
            put(cache, binary=b"faster", tuned_ms=1.0)
            (cache.folder / binary_name(old)).unlink(missing_ok=True)
        return check(record)

    monkeypatch.setattr(reader, "binary_path", replaced_meanwhile)
    assert reader.get(KEY).measurement["tuned_ms"] == 1.0
    assert reader.complaints == []


def test_a_file_that_a_clean_up_took_before_its_record_came_is_written_again(cache, monkeypatch):
    def write(path, content):
        write_atomically(path, content)
        if path.suffix == ".json":
            next(cache.folder.glob("*.so")).unlink()

    monkeypatch.setattr("tiles.cache.cache.write_atomically", write)
    record = put(cache)
    assert cache.get(KEY) == record
    assert cache.binary_path(record).read_bytes() == b"\x7fELF code"


@pytest.mark.parametrize("fails_at", range(3))
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_older_kernel(cache, monkeypatch, call, fails_at):
    """The binary, the source or the record finds no space: when it is written, made durable, or renamed."""
    old = put(cache)
    calls = 0

    def full(*arguments, **named):
        nonlocal calls
        calls += 1
        if calls == fails_at + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments, **named)

    owner, name = {"write": (Path, "open"), "fsync": (os, "fsync"), "replace": (Path, "replace")}[call]
    original = getattr(owner, name)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(BadInput, match="No space left on device") as caught:
            put(cache, binary=b"faster", tuned_ms=1.0)
    assert "\n" not in str(caught.value)
    assert KernelCache(cache.folder).records() == [old]
    assert not [path for path in cache.folder.iterdir() if path.name.startswith(".")]


FILLED = """
import resource, signal, sys
from pathlib import Path
from stored import KEY
from tiles.cache.cache import KernelCache
from tiles.errors import BadInput

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    KernelCache(Path(sys.argv[1])).put(KEY, {"block": 1}, b"x" * 10_000, "source", {}, {})
except BadInput as error:
    print(error)
"""


def test_a_write_that_the_system_cuts_short_leaves_the_older_kernel(cache, tmp_path):
    old = put(cache)
    command = [sys.executable, "-c", FILLED, str(cache.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": f"{ROOT}:{HERE}"})
    assert "File too large" in done.stdout
    assert KernelCache(cache.folder).records() == [old]
    assert not [path for path in cache.folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(("code", "durable"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_file_system_that_cannot_sync_folders_will_do_but_one_that_fails_is_said(cache, monkeypatch, code, durable):
    sync = os.fsync

    def of_files_only(opened):
        if stat.S_ISDIR(os.fstat(opened).st_mode):
            raise OSError(code, os.strerror(code))
        sync(opened)

    monkeypatch.setattr(os, "fsync", of_files_only)
    if durable:
        assert put(cache) == cache.get(KEY)
    else:
        with pytest.raises(BadInput, match="Input/output error"):
            put(cache)
