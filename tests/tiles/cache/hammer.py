"""One of the processes that use a kernel cache at the same time: `python hammer.py FOLDER SEEN SEED GRACE`.

It writes, reads and prunes in random order until it is killed. What it finds wrong ends it with exit code 1 and a line
on stderr. A binary and its source say which put they belong to, so that a mixture of two would be seen.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from pathlib import Path

from stored import KEY

from tiles.cache.cache import KernelCache, Key, Record
from tiles.cache.prune import prune

KEYS = [dataclasses.replace(KEY, tokens=2**power) for power in range(8)]


def binary_of(label: str, size: int) -> bytes:
    """Bytes that begin with `label` and could belong to nothing else."""
    return label.encode() + b"\n" + random.Random(label).randbytes(size)


def put(cache: KernelCache, key: Key, label: str, size: int) -> None:
    cache.put(key, {"label": label}, binary_of(label, size), label, {"bytes": size}, {})


def why_torn(cache: KernelCache, record: Record) -> str | None:
    """What of an entry does not belong to its record, or None. Raises `CacheCorrupt` where a file is missing."""
    label, size = record.schedule["label"], record.measurement["bytes"]
    if cache.binary_path(record).read_bytes() != binary_of(label, size):
        return f"{label}: another binary"
    if cache.source(record) != label:
        return f"{label}: another source"
    return None


class Process:
    """`grace` seconds are far more than a put or a read takes here, and far fewer than the test."""

    def __init__(self, folder: Path, seen: Path, seed: str, grace: float) -> None:
        self.folder, self.seen, self.seed, self.grace = folder, seen, seed, grace
        self.random = random.Random(seed)
        self.puts = 0
        self.long_lived = KernelCache(folder, lazy=True)

    def go(self) -> None:
        while True:
            self.random.choices([self.write, self.read, self.prune], [5, 5, 1])[0]()

    def write(self) -> None:
        key = self.random.choice(KEYS)
        self.puts += 1
        put(KernelCache(self.folder), key, f"{self.seed}.{self.puts}.{key.tokens}", self.random.randrange(1, 50_000))
        (self.seen / str(key.tokens)).touch()

    def read(self) -> None:
        """All that was once written is there and whole, for a new reader and for one that remembers."""
        written = {int(path.name) for path in self.seen.iterdir()}
        for cache in (KernelCache(self.folder), self.long_lived):
            records = cache.records()
            self.expect(cache.complaints == [], f"complaints {cache.complaints}")
            missing = written - {record.key.tokens for record in records}
            self.expect(not missing, f"lost {missing}")
            for record in records:
                why = why_torn(cache, record)
                self.expect(why is None, f"torn {why}")

    def prune(self) -> None:
        prune(self.folder, grace_seconds=self.grace)

    def expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            raise SystemExit(f"{self.seed}: {otherwise}")


if __name__ == "__main__":
    Process(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], float(sys.argv[4])).go()
