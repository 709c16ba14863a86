"""Digests of generated code, up to names: `python -m cli.maintain.code_digests OUT.json`, before and after a change.

Two texts have one digest where they differ in nothing but names and comments, in how a process lays out shared memory
(`tiles.compiler.canonical_source`), and in white space. `python -m cli.maintain.code_digests A.json B.json` compares.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from rich.progress import track

from tiles.compiler.canonical_source import canonical_source
from tiles.compiler.compile import generate_source
from tiles.kernels.registry import kernel_specs
from tiles.kernels.spec import Problem
from tiles.target import Target

TARGETS = (Target("cpu", "x86-64-v4"), Target("cuda", "sm_90a"))
STREAMS = (1, 4, 9)
SHAPES = ((64, "float32", 16), (1280, "bfloat16", 4096))
"""Width, dtype and tokens."""

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_EXTERN = re.compile(r'#ifdef __cplusplus\nextern "C"\n#endif\n[^\n]*;\n')
_PARAMETERS = re.compile(r"_kernel(?:_\d+)?\([^()]*\)|parameters\[\] = \{[^{}]*\};")
"""Lists whose order is that of their names."""

_WORD = re.compile(r"(?P<type>\w+\*? (?:__restrict__ )?)?(?P<name>[A-Za-z_]\w*)")
_NO_TYPES = ("return", "else", "case", "goto")


def without_names(source: str) -> str:
    """The text with every name replaced by a number: a new one where it is declared."""
    numbers: dict[str, int] = {}
    declared = 0

    def numbered(word: re.Match[str]) -> str:
        nonlocal declared
        kind, name = word["type"] or "", word["name"]
        if name not in numbers or (kind and kind.split()[0] not in _NO_TYPES):
            numbers[name] = declared
            declared += 1
        return f"{kind}n{numbers[name]}"

    text = _PARAMETERS.sub("", _EXTERN.sub("", _COMMENT.sub("", canonical_source(source))))
    return " ".join(_WORD.sub(numbered, text).split())


def digest(source: str) -> str:
    """16 hexadecimal digits, equal for texts that differ in names, comments and white space alone."""
    return hashlib.sha256(without_names(source).encode()).hexdigest()[:16]


def of_default(case: tuple[Problem, Target]) -> str:
    """The digest of the code of a problem's default schedule."""
    problem, target = case
    spec = kernel_specs()[problem.op, problem.direction]
    problem = spec.canonical(problem)
    return digest(generate_source(spec, problem, spec.default(problem, target), target))


def collect(out: Path) -> None:
    """Write the digests of all kernels to `out`."""
    cases = [
        (Problem(spec.op, spec.direction, streams, width, dtype, tokens), target)
        for target in TARGETS
        for spec in kernel_specs().values()
        if target.kind in spec.targets
        for streams in STREAMS
        for width, dtype, tokens in SHAPES
    ]
    with ProcessPoolExecutor(2) as pool:
        found = list(track(pool.map(of_default, cases, chunksize=4), "generating", len(cases)))
    rows = {f"{problem.describe()} {target}": made for (problem, target), made in zip(cases, found, strict=True)}
    out.write_text(json.dumps(rows, indent=0) + "\n", encoding="utf-8")


def compare(before: Path, after: Path) -> list[str]:
    """The kernels whose code differs by more than names, or that one of the two files lacks."""
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (before, after))
    return sorted(case for case in old | new if old.get(case) != new.get(case))


def main(paths: list[str]) -> None:
    """Collect into one file, or compare two."""
    if len(paths) == 1:
        collect(Path(paths[0]))
    elif len(paths) == 2:
        sys.stdout.write("".join(f"{case}\n" for case in compare(Path(paths[0]), Path(paths[1]))))
    else:
        sys.exit("usage: python -m cli.maintain.code_digests OUT.json, or BEFORE.json AFTER.json")


if __name__ == "__main__":
    main(sys.argv[1:])
