"""Opens mutated packs in a process that may take 512 MB and write to one folder only; prints what became of them.

Half of that is torch, which comes with the kernels' rules: opening packs must do with the other half.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from mutations import Mutant, Originals, mutant

from tiles.cache.cache import CacheCorrupt
from tiles.cache.record import check_schedule
from tiles.errors import BadInput
from tiles.pack.pack import Pack

MEMORY = 256 * 2**20
"""What the address space may grow by. All libraries are mapped by then: sound packs have been opened."""

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def confine(folder: Path) -> None:
    """Limit the address space, and end the process when it makes a file outside of `folder`."""
    mapped = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        made = {"os.mkdir": 0, "os.symlink": 1, "os.link": 1, "os.rename": 1}.get(event)
        if event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[2] & WRITING:
            made = 0
        if made is not None and not Path(os.fsdecode(arguments[made])).resolve().is_relative_to(folder):
            sys.stderr.write(f"{event} outside of its folder: {arguments}\n")
            sys.stderr.flush()
            os._exit(3)

    sys.addaudithook(watch)


def check(path: Path, case: Mutant, known: dict[str, tuple[Any, bytes]], *, lazy: bool) -> str:
    """Open a mutant; what became of it, or an AssertionError."""
    try:
        with Pack(path, lazy=lazy) as pack:
            trusted = pack.why_untrusted is None
            assert pack.created_by.isprintable()
            right = True
            for record in pack.records():
                if record.key.current:
                    check_schedule(record)
                original, code = known.get(record.key.digest, (None, b""))
                try:
                    binary = pack.binary_path(record).read_bytes()
                except CacheCorrupt:
                    assert lazy
                    continue
                right = right and binary == code
                assert not trusted or (record == original and binary == code), record
            assert right or case.forged
            assert not (case.forged and trusted)
            return "right" if right and trusted else "untrusted"
    except BadInput as error:
        line = str(error)
        assert "\n" not in line
        assert line.isprintable()
        assert len(line) < 1000, line[:2000]
        return "refused"


def main(seed: int, count: int, packs: list[Path], folder: Path) -> None:
    originals = Originals([pack.read_bytes() for pack in packs])
    known = {}
    for path in packs:
        with Pack(path) as pack:
            known |= {record.key.digest: (record, pack.binary(record)) for record in pack.records()}
    confine(folder)
    path = folder / "mutant.mhcpack"
    counts: Counter[str] = Counter()
    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        name, case = mutant(originals, draw)
        path.write_bytes(case.content)
        try:
            became = check(path, case, known, lazy=draw.random() < 0.5)
        except BaseException:
            sys.stderr.write(f"seed {seed}, mutant {number}: {name}\n")
            raise
        counts[f"{name} {became}"] += 1
    path.unlink()
    sys.stdout.write(json.dumps({"counts": counts, "kilobytes": kilobytes()}))


def kilobytes() -> int:
    """The most memory that this program had. `ru_maxrss` would also count that of the process it was forked from."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), [Path(name) for name in sys.argv[4:]], Path(sys.argv[3]))
