"""The plan of `mhc-tune gpu` as plain data: its items, the most important first."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

from cli.bench import peers

STREAMS, WIDTHS, TOKENS, DTYPE = (2, 4, 8), (1280, 2560, 4096, 7168), (1, 64, 4096, 16384), "bfloat16"
MAIN_SHAPE = (4, 2560, 4096)
DECODE_TOKENS = 64
"""Most tokens per call in decoding."""

Kind = Literal["numerics", "tests", "tune", "bench", "block", "sanitizer"]

SECONDS: Mapping[Kind, tuple[float, float]] = {
    "numerics": (30, 120),
    "tests": (45, 240),
    "tune": (45, 90),
    "bench": (30, 240),
    "block": (30, 120),
    "sanitizer": (45, 150),
}
"""The least seconds that an item is started with, and the most that it gets."""

TIMED_OPS = ("layer", "merge", "project", "aggregate", "pre", "step", "single_pass", "coefficients")
"""The most important op first."""

OUR_IMPLS = ("tuned", "default")


@dataclass(frozen=True)
class Timing:
    """Timing of one op: its directions, implementations, and additional schedules (as for `mhc-tune bench`)."""

    op: str
    directions: tuple[str, ...]
    impls: tuple[str, ...]
    schedules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Item:
    """One item: resumed, timed out and reported by itself. `shape`: streams, width, tokens; `impl`: whose numerics."""

    kind: Kind
    shape: tuple[int, int, int] = MAIN_SHAPE
    ops: tuple[str, ...] = ()
    impl: str = ""
    timings: tuple[Timing, ...] = field(default=())

    @property
    def name(self) -> str:
        """Its key in the results."""
        streams, width, tokens = self.shape
        what = f"{self.kind} {self.impl}".rstrip()
        return f"{what} n={streams} C={width} T={tokens}" if self.ops or self.timings else what

    @property
    def min_seconds(self) -> float:
        """The least seconds that it is started with."""
        return SECONDS[self.kind][0]

    @property
    def max_seconds(self) -> float:
        """The most seconds that it gets: twice as many at the main shape."""
        return SECONDS[self.kind][1] * (2 if self.shape == MAIN_SHAPE and self.kind in ("tune", "bench") else 1)


def plan() -> list[Item]:
    """All items in order: checks, then the main shape, a transformer's step, and the other shapes."""
    first, *others = shapes()
    tune, bench = _at(first)
    default, tuned = (Item("numerics", first, TIMED_OPS, impl) for impl in ("default", "tuned"))
    items = [default, Item("tests"), tune, tuned, bench, Item("block"), Item("sanitizer")]
    return items + [item for shape in others for item in _at(shape)]


def shapes() -> list[tuple[int, int, int]]:
    """All shapes, those that differ from `MAIN_SHAPE` in one value first: in width, then streams, then tokens."""

    def distance(shape: tuple[int, int, int]) -> tuple[int, ...]:
        streams, width, tokens = (a != b for a, b in zip(shape, MAIN_SHAPE, strict=True))
        order = {4096: 0, 64: 1, 1: 2, 16384: 3}
        return streams + width + tokens, order.get(shape[2], 4) if tokens else 0, streams, width

    return sorted(product(STREAMS, WIDTHS, TOKENS), key=distance)


def _at(shape: tuple[int, int, int]) -> tuple[Item, Item]:
    """Tune one shape, then time it."""
    timings = tuple(timing(op, shape) for op in _timed_ops(shape))
    return Item("tune", shape, ops=_tuned_ops(shape)), Item("bench", shape, timings=timings)


def _tuned_ops(shape: tuple[int, int, int]) -> tuple[str, ...]:
    """The kernels that are timed; separate ones come before the fused ones that are compared with them."""
    if shape == MAIN_SHAPE:
        return ("merge", "project", "aggregate", "coefficients", "pre", "step", "single_pass")
    return ("merge", "pre") if shape[2] <= DECODE_TOKENS else ("merge", "project", "aggregate", "pre")


def _timed_ops(shape: tuple[int, int, int]) -> tuple[str, ...]:
    if shape == MAIN_SHAPE:
        return TIMED_OPS
    return ("pre", "layer") if shape[2] <= DECODE_TOKENS else ("layer", "merge", "project", "aggregate")


def timing(op: str, shape: tuple[int, int, int]) -> Timing:
    """The timing of an op at a shape. torch.compile takes long: single ops are compiled at the main shape only."""
    directions = ("forward", "both") if op == "layer" or shape[2] <= DECODE_TOKENS else ("forward", "backward")
    compiled = (
        ("compile",) if op == "layer" or (shape == MAIN_SHAPE and op in ("merge", "project", "aggregate")) else ()
    )
    schedules = unsplit_schedule() if op == "pre" and shape[2] <= DECODE_TOKENS else ()
    return Timing(op, directions, (*OUR_IMPLS, *peers.NAMES, "eager", *compiled, "copy"), schedules)


def unsplit_schedule() -> tuple[str, ...]:
    """The schedule of pre in which one thread block does all dot products of a token."""
    return (f"unsplit:pre.forward={json.dumps({'splits': 1})}",)
