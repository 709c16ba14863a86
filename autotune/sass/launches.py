"""Launches of an artifact's kernels, read back from its source: blocks, threads and shared memory for a token count.

`tiles.compiler.cuda_launcher` writes them there; an artifact keeps no other list of its kernels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

from tiles.compiler.cuda_launcher import SUM_KERNEL

_NAMES = re.compile(r"^const char \*const names\[\d+\] = \{(.*)\};", re.MULTILINE)
_SHARED = re.compile(r"^const int shared_bytes\[\d+\] = \{(.*)\};", re.MULTILINE)
_LAUNCH = re.compile(r"const unsigned grid\[3\] = \{(.*)\}, block\[3\] = \{(.*)\};(?:.*\n)*?.*failed = run\((\d+),")
_CHUNK = re.compile(r"const int64_t tokens = (\d+) && all >")
_SPLITS = re.compile(r"worth = tokens / (\d+);\n.*worth > (\d+) \?")
_ARITHMETIC = re.compile(r"(?:tokens|splits|[\d+\-*/() ])+")


@dataclass(frozen=True)
class Launch:
    """How one kernel is launched: its symbol, thread blocks, and a block's threads and dynamic shared memory."""

    kernel: str
    blocks: int
    threads: int
    dynamic_shared_bytes: int


def launches(source: str, tokens: int) -> list[Launch]:
    """The kernels that a call on so many tokens launches, in order, with the blocks of its first chunk."""
    names, shared = _list(_NAMES, source), _list(_SHARED, source)
    (chunk,), (split_tokens, most_splits) = _numbers(_CHUNK, source), _numbers(_SPLITS, source)
    chunks = -(-tokens // chunk) if chunk else 1
    taken = min(tokens, chunk) if chunk else tokens
    splits = min(max(1, taken // split_tokens), most_splits)
    found = [
        Launch(
            kernel=names[int(index)].strip('"'),
            blocks=prod(_value(extent, taken, splits) for extent in grid.split(", ")),
            threads=prod(map(int, block.split(", "))),
            dynamic_shared_bytes=int(shared[int(index)]),
        )
        for grid, block, index in _LAUNCH.findall(source)
    ]
    return [launch for launch in found if launch.kernel != SUM_KERNEL or chunks * splits > 1]


def _list(form: re.Pattern[str], source: str) -> list[str]:
    found = form.search(source)
    return found[1].split(", ") if found else []


def _numbers(form: re.Pattern[str], source: str) -> list[int]:
    found = form.search(source)
    assert found, form.pattern
    return list(map(int, found.groups()))


def _value(extent: str, tokens: int, splits: int) -> int:
    """A C expression of integers, `tokens` and `splits`, none of them negative."""
    plain = extent.replace("(unsigned)", "").replace("INT64_C", "")
    if not _ARITHMETIC.fullmatch(plain):
        raise ValueError(f"a launch extent must be arithmetic over tokens and splits, got {extent}")
    return int(eval(plain.replace("/", "//"), {"__builtins__": {}}, {"tokens": tokens, "splits": splits}))
