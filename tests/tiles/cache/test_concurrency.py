"""Many processes on one cache folder, killed at random: no reader sees a torn entry and nothing is lost."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import hammer
import pytest

import tiles
from tiles.cache.cache import KernelCache
from tiles.cache.prune import prune

ROOT = Path(tiles.__file__).parents[1]
SEED = 0


def start(folder: Path, seen: Path, log: Path, seed: int, grace: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, hammer.__file__, str(folder), str(seen), str(seed), str(grace)]
    with log.open("ab") as errors:
        return subprocess.Popen(command, stderr=errors, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize(
    ("processes", "seconds", "grace"), [(4, 7, 4), pytest.param(16, 120, 10, marks=pytest.mark.slow)]
)
def test_processes_that_write_read_prune_and_die_at_random(
    tmp_path: Path, processes: int, seconds: float, grace: float
) -> None:
    sys.stdout.write(f"seed {SEED}\n")
    folder, seen, log = tmp_path / "cache", tmp_path / "seen", tmp_path / "log"
    seen.mkdir()
    draw = random.Random(SEED)
    running = [start(folder, seen, log, SEED + number, grace) for number in range(processes)]
    kills = 0
    try:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(draw.uniform(0.1, 0.5))
            victim = draw.randrange(processes)
            assert all(process.poll() is None for process in running), log.read_text()
            running[victim].kill()
            running[victim].wait()
            kills += 1
            running[victim] = start(folder, seen, log, SEED + processes + kills, grace)
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert log.read_text() == ""
    assert len(list(seen.iterdir())) == len(hammer.KEYS)

    left = sorted(path.name for path in folder.iterdir())
    removed = prune(folder, grace_seconds=0)
    assert {path.path.name for path in removed} <= set(left)
    cache = KernelCache(folder)
    assert {record.key for record in cache.records()} == set(hammer.KEYS)
    assert cache.complaints == []
    assert [hammer.why_torn(cache, record) for record in cache.records()] == [None] * len(hammer.KEYS)
    assert len(list(folder.iterdir())) == 3 * len(hammer.KEYS), "the record, its binary and its source alone are left"
    verified = subprocess.run(
        [sys.executable, "-c", "from cli.main import app; app()", "verify", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert verified.returncode == 0, verified.stderr
    assert verified.stderr.count("checksum right") == len(hammer.KEYS)


def test_the_hammer_sees_a_torn_entry(tmp_path: Path) -> None:
    """The test above would fail on a mixture of two puts whose checksums agree."""
    cache = KernelCache(tmp_path)
    cache.put(hammer.KEY, {"label": "a"}, hammer.binary_of("b", 10), "a", {"bytes": 10}, {})
    (record,) = cache.records()
    assert hammer.why_torn(cache, record) == "a: another binary"
    cache.put(hammer.KEY, {"label": "a"}, hammer.binary_of("a", 10), "b", {"bytes": 10}, {})
    (record,) = cache.records()
    assert hammer.why_torn(cache, record) == "a: another source"
    process = hammer.Process(tmp_path, tmp_path / "seen", "0", 10)
    process.seen.mkdir()
    with pytest.raises(SystemExit):
        process.read()
