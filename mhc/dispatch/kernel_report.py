"""The kernel report: what runs for every op, and why."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from typing import Literal

from tiles.kernels.spec import EVERY_TOKENS, Direction

Runs = Literal["tuned", "recompiled", "shipped", "default", "separate", "reference"]


@dataclass(frozen=True)
class Row:
    """One op that has run.

    `runs` is `tuned` (a tuned kernel), `recompiled` (a stored schedule compiled here, as its own binary may not be
    loaded), `shipped` (a schedule of this package), `default` (the default schedule), `separate` (a fused op run as
    separate kernels, which have rows of their own) or `reference` (torch). `tokens` is the token bucket, the next power
    of two, or `EVERY_TOKENS` with batch invariance; `why` is one sentence.
    """

    op: str
    direction: Direction
    streams: int
    width: int
    dtype: str
    tokens: int
    rounds: int
    device: str
    runs: Runs
    why: str


class KernelReport(tuple[Row, ...]):
    """Rows in the order in which the ops first ran; `print` shows a table."""

    __slots__ = ()

    def __str__(self) -> str:
        if not self:
            return "no mhc op has run yet"
        cells_of = [["every" if value == EVERY_TOKENS else str(value) for value in astuple(row)] for row in self]
        lines = [[field.name for field in fields(Row)], *cells_of]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        cells = ((cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
        return "\n".join("  ".join(line).rstrip() for line in cells)


class WarmUpReport(KernelReport):
    """The rows of what `mhc.warm_up` has loaded; `print` shows them, and what is missing in a last line."""

    __slots__ = ()

    @property
    def missing(self) -> tuple[Row, ...]:
        """Those that no tuned kernel serves: a schedule was compiled here, or torch runs."""
        return tuple(row for row in self if row.runs not in ("tuned", "separate"))

    def __str__(self) -> str:
        kernels, missing = [row for row in self if row.runs != "separate"], self.missing
        if not missing:
            return f"{super().__str__()}\nall {len(kernels)} kernels are tuned and loaded"
        kinds = ", ".join(f"{sum(row.runs == runs for row in missing)} {runs}" for runs in _kinds(missing))
        lacking = "; ".join(dict.fromkeys(f"{row.op} {row.direction}" for row in missing))
        return f"{super().__str__()}\n{len(missing)} of {len(kernels)} kernels are not tuned ({kinds}): {lacking}"


def _kinds(rows: tuple[Row, ...]) -> list[Runs]:
    return list(dict.fromkeys(row.runs for row in rows))
