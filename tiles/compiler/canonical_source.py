"""The canonical form of generated CUDA source, equal for equal programs whatever process generated them.

TileLang 0.1.15 plans shared memory in the order of names, and gives nameless buffers and the work spaces of reductions
equal ones: which of them comes first depends on addresses. So their names differ from run to run, and buffers of equal
size change places.
"""

from __future__ import annotations

import re

_SHARED = re.compile(r"^ *void\* (\w+) = \(\(void\*\)\(\(char\*\)buf_dyn_shmem \+ (\d+)\)\);\n", re.MULTILINE)


_KERNEL = re.compile(r'^(?=extern "C" __global__)', re.MULTILINE)


def canonical_source(source: str) -> str:
    """The text with each kernel's shared buffers named in the order of their first use, at the same places in ascending
    order.

    It is for comparing and not for compiling: a buffer's place may have become another one's.
    """
    return "".join(_stable(kernel) for kernel in _KERNEL.split(source))


def _stable(source: str) -> str:
    found = list(_SHARED.finditer(source))
    if not found:
        return source
    body = source[found[-1].end() :]
    name = re.compile(rf"\b(?:{'|'.join(buffer[1] for buffer in found)})\b")
    names = {old: f"shared_{number}" for number, old in enumerate(dict.fromkeys(name.findall(body)))}
    places = " ".join(str(place) for place in sorted(int(buffer[2]) for buffer in found))
    return f"{source[: found[0].start()]}  // shared at {places}\n{name.sub(lambda use: names[use[0]], body)}"
