"""Small recorded spaces, in memory and as files of other tools."""

from __future__ import annotations

import json
from typing import Any

from autotune.recorded.spaces import RecordedSpace
from autotune.search.pool import Pool


def bowl(*, default: bool = True, sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)) -> RecordedSpace:
    """225 members around one optimum of 1 ms; those whose product is large fail."""
    space = {"block": sizes, "unroll": (1, 2, 3, 4, 5), "layout": ("row", "column", "tile", "swizzle", "none")}
    members = tuple((a, b, c) for a in range(len(sizes)) for b in range(5) for c in range(5))
    times: list[float | None] = [
        None if sizes[a] * (b + 1) > 512 else 1 + 0.3 * abs(a - 5) + 0.4 * abs(b - 2) + 0.5 * (c != 2)
        for a, b, c in members
    ]
    reasons = {member: "out of registers" for member, ms in enumerate(times) if ms is None}
    return RecordedSpace("bowl", Pool(space, members, 4), tuple(times), reasons, has_default=default)


def kernel_tuner(entries: dict[str, Any] | None = None) -> dict[str, Any]:
    """A cache file of Kernel Tuner."""
    cache: dict[str, Any] = {
        "16,1,row": {"bx": 16, "by": 1, "order": "row", "time": 2.5, "times": [2.0, 3.0]},
        "32,1,row": {"bx": 32, "by": 1, "order": "row", "time": 1.25, "times": [1.25]},
        "32,2,col": {"bx": 32, "by": 2, "order": "col", "time": "CompilationFailedConfig"},
        "8,2,col": {"bx": 8, "by": 2, "order": "col", "time": 1e20},
    }
    return {
        "device_name": "a GPU",
        "kernel_name": "toy",
        "problem_size": [64],
        "tune_params_keys": ["bx", "by", "order"],
        "tune_params": {"bx": [8, 16, 32, 64], "by": [1, 2], "order": ["row", "col"]},
        "objective": "time",
        "cache": cache if entries is None else entries,
    }


def t4() -> dict[str, Any]:
    """A T4 results file."""

    def result(bx: int, *, ms: Any = None, runtimes: tuple[float, ...] = (), invalidity: str = "correct") -> Any:
        return {
            "configuration": {"bx": bx, "fast": bx > 8},
            "times": {"runtimes": list(runtimes)},
            "invalidity": invalidity,
            "measurements": [] if ms is None else [{"name": "time", "value": ms, "unit": "ms"}],
            "objectives": ["time"],
        }

    results = [
        result(16, ms=2.0, runtimes=(9.0,)),
        result(8, runtimes=(3.0, 1.0, 8.0)),
        result(32, ms=1.0, invalidity="runtime"),
        result(64, ms="CompilationFailedConfig", invalidity="correct"),
    ]
    return {"schema_version": "1.0.0", "metadata": {}, "results": results}


def text(data: Any) -> bytes:
    return json.dumps(data).encode()
