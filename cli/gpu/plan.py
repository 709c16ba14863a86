"""What `mhc-tune gpu` does, the most telling first: as plain data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

from cli.bench import peers

STREAMS, WIDTHS, TOKENS, DTYPE = (2, 4, 8), (1280, 2560, 4096, 7168), (1, 64, 4096, 16384), "bfloat16"
TELLING = (4, 2560, 4096)
FEW = 64
"""Tokens up to which a call is one of decoding."""

Kind = Literal["numerics", "tests", "tune", "bench", "block", "sanitizer"]

SECONDS: Mapping[Kind, tuple[float, float]] = {
    "numerics": (30, 120),
    "tests": (45, 240),
    "tune": (45, 90),
    "bench": (30, 240),
    "block": (30, 120),
    "sanitizer": (45, 150),
}
"""Seconds that an item is worth starting with, and the most that it gets."""

MEASURED = ("layer", "merge", "project", "aggregate", "pre", "step", "coefficients")
"""The most telling op first."""

OURS = ("tuned", "default")


@dataclass(frozen=True)
class Timing:
    """What is timed of one op: in which directions, by which implementations, with which schedules besides."""

    op: str
    directions: tuple[str, ...]
    impls: tuple[str, ...]
    schedules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Item:
    """One thing to do: resumed, timed out and reported by itself. A shape is streams, width, tokens; `impl` says whose
    numerics."""

    kind: Kind
    shape: tuple[int, int, int] = TELLING
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
    def least(self) -> float:
        """Seconds that it is worth starting with."""
        return SECONDS[self.kind][0]

    @property
    def most(self) -> float:
        """Seconds that it gets at most: twice as many at the most telling shape."""
        return SECONDS[self.kind][1] * (2 if self.shape == TELLING and self.kind in ("tune", "bench") else 1)


def plan() -> list[Item]:
    """All items in order: is it right, then the most telling shape, a transformer's step, and the other shapes."""
    first, *others = shapes()
    tune, bench = _at(first)
    default, tuned = (Item("numerics", first, MEASURED, impl) for impl in ("default", "tuned"))
    items = [default, Item("tests"), tune, tuned, bench, Item("block"), Item("sanitizer")]
    return items + [item for shape in others for item in _at(shape)]


def shapes() -> list[tuple[int, int, int]]:
    """Every shape: those that differ from `TELLING` in one thing first, by width, streams, then tokens."""

    def far(shape: tuple[int, int, int]) -> tuple[int, ...]:
        streams, width, tokens = (a != b for a, b in zip(shape, TELLING, strict=True))
        order = {4096: 0, 64: 1, 1: 2, 16384: 3}
        return streams + width + tokens, order.get(shape[2], 4) if tokens else 0, streams, width

    return sorted(product(STREAMS, WIDTHS, TOKENS), key=far)


def _at(shape: tuple[int, int, int]) -> tuple[Item, Item]:
    """Tune one shape, then time it."""
    timings = tuple(timing(op, shape) for op in _timed_ops(shape))
    return Item("tune", shape, ops=_tuned_ops(shape)), Item("bench", shape, timings=timings)


def _tuned_ops(shape: tuple[int, int, int]) -> tuple[str, ...]:
    """The kernels of what is timed; fused ones meet the separate ones, which therefore come before them."""
    if shape == TELLING:
        return ("merge", "project", "aggregate", "coefficients", "pre", "step")
    return ("merge", "pre") if shape[2] <= FEW else ("merge", "project", "aggregate", "pre")


def _timed_ops(shape: tuple[int, int, int]) -> tuple[str, ...]:
    if shape == TELLING:
        return MEASURED
    return ("pre", "layer") if shape[2] <= FEW else ("layer", "merge", "project", "aggregate")


def timing(op: str, shape: tuple[int, int, int]) -> Timing:
    """What is timed of an op at a shape. Compiling with torch takes long: ops by themselves at one shape alone."""
    directions = ("forward", "both") if op == "layer" or shape[2] <= FEW else ("forward", "backward")
    compiled = ("compile",) if op == "layer" or (shape == TELLING and op in ("merge", "project", "aggregate")) else ()
    schedules = unsplit() if op == "pre" and shape[2] <= FEW else ()
    return Timing(op, directions, (*OURS, *peers.NAMES, "eager", *compiled, "copy"), schedules)


def unsplit() -> tuple[str, ...]:
    """The schedule of pre that leaves the dot products of a token to one thread block."""
    return (f"unsplit:pre.forward={json.dumps({'splits': 1})}",)
