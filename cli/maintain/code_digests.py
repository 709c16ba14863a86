"""Digests of generated code up to names: `python -m cli.maintain.code_digests OUT.json`, before and after a change.

Two sources have the same digest if they differ only in names, comments, white space, and the layout of shared memory
(`tiles.compiler.canonical_source`). `python -m cli.maintain.code_digests BEFORE.json AFTER.json` lists what differs.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, cast

from rich.progress import track

from tiles.compiler.canonical_source import stable_form
from tiles.compiler.compile import CompileError, generate_source
from tiles.kernels.registry import kernel_specs
from tiles.kernels.spec import Direction, KernelSpec, Problem
from tiles.target import Target

TARGETS = ("cpu:x86-64-v4", "cuda:sm_80", "cuda:sm_90a")
STREAMS, WIDTHS, DTYPES, TOKENS = (1, 2, 4, 8, 16), (64, 1280), ("float32", "bfloat16"), (16, 4096)
SAMPLES = 2
"""Random schedules of each space, besides the default one."""

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_WORD = re.compile(r"[A-Za-z_]\w*")


def without_names(source: str) -> str:
    """The source with every name replaced by the number of its first use."""
    numbers: dict[str, str] = {}
    text = _COMMENT.sub("", stable_form(source))
    return " ".join(_WORD.sub(lambda word: numbers.setdefault(word[0], f"n{len(numbers)}"), text).split())


def digest(source: str) -> str:
    """Digest of a source up to names."""
    return hashlib.sha256(without_names(source).encode()).hexdigest()[:16]


def schedules(spec: KernelSpec, problem: Problem, target: Target) -> Iterator[Any]:
    """The default schedule, then random ones of the space, which do not depend on the names of fields."""
    default = spec.default(problem, target)
    yield default
    drawn = random.Random(f"{spec.name} {problem.describe()} {target}")
    values = list(spec.space(problem, target).values())
    found = 0
    for _ in range(200):
        schedule = type(default)(*(drawn.choice(options) for options in values))
        if spec.why_invalid(problem, schedule, target) is None:
            yield schedule
            found += 1
        if found == SAMPLES:
            return


def digests(case: tuple[str, str, str, int, int, str, int]) -> dict[str, str]:
    """Of one problem on one target: number of the schedule -> digest of its code, or `refused` by the compiler."""
    named, op, direction, streams, width, dtype, tokens = case
    kind, _, arch = named.partition(":")
    target = Target(cast("Any", kind), arch)
    spec = kernel_specs()[op, direction]
    problem = spec.canonical(Problem(op, cast("Direction", direction), streams, width, dtype, tokens))
    found = {}
    for number, schedule in enumerate(schedules(spec, problem, target)):
        try:
            found[str(number)] = digest(generate_source(spec, problem, schedule, target))
        except CompileError:
            found[str(number)] = "refused"
    return found


def collect(out: Path) -> None:
    """Write the digests of all cases to `out`."""
    cases = [
        (target, op, direction, streams, width, dtype, tokens)
        for target in TARGETS
        for op, direction in kernel_specs()
        for streams in STREAMS
        for width in WIDTHS
        for dtype in DTYPES
        for tokens in TOKENS
    ]
    with ProcessPoolExecutor(2) as pool:
        found = list(track(pool.map(digests, cases, chunksize=8), "generating", len(cases)))
    rows = {
        " ".join(map(str, case)) + f" schedule {number}": digest
        for case, of_case in zip(cases, found, strict=True)
        for number, digest in of_case.items()
    }
    out.write_text(json.dumps(rows, indent=0) + "\n", encoding="utf-8")


def compare(before: Path, after: Path) -> list[str]:
    """The cases whose digests differ, or that only one of the two files holds."""
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (before, after))
    return sorted(case for case in old | new if old.get(case) != new.get(case))


def main(paths: list[str]) -> None:
    """Collect into one file, or compare two."""
    if len(paths) == 1:
        collect(Path(paths[0]))
    elif len(paths) == 2:
        for case in compare(Path(paths[0]), Path(paths[1])):
            sys.stdout.write(f"{case}\n")
    else:
        sys.exit("usage: python -m cli.maintain.code_digests OUT.json, or BEFORE.json AFTER.json")


if __name__ == "__main__":
    main(sys.argv[1:])
