"""Look-up of stored schedules: those that serve a problem on a device, the best first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

from tiles.cache.record import Key
from tiles.errors import BadInput
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import EVERY_TOKENS, Problem
from tiles.target import Device, why_cannot_run

Match = Literal["exact", "nearest bucket", "sibling device"]


class MeasuredRecord(Protocol):
    """A measured schedule: a `tiles.cache.record.Record`, or a shipped one, which has no code."""

    @property
    def key(self) -> Key:
        """The problem and device that it was measured for, and the version that compiled it."""

    @property
    def schedule(self) -> Mapping[str, Any]:
        """The tunables by name."""

    @property
    def measurement(self) -> Mapping[str, Any]:
        """The tuner's figures; times in ms."""


RecordT = TypeVar("RecordT", bound=MeasuredRecord)


@dataclass(frozen=True)
class Candidate(Generic[RecordT]):
    """A record that may serve a problem: how well its key matches, and one sentence that says so.

    `why_recompile` says why the record's own code may not be called, so that its schedule has to be compiled here;
    `why_refused` why it does not serve at all. Both are None for code that is ready to run.
    """

    record: RecordT
    match: Match
    why: str
    why_recompile: str | None
    why_refused: str | None


def candidates(
    records: Iterable[RecordT], problem: Problem, device: Device, why_no_code: str | None = None
) -> list[Candidate[RecordT]]:
    """All records for a problem, the best first; those with a `why_refused` are among them.

    First those of this device, exact before the nearest token bucket; then those of its siblings, which are devices of
    the same kind whose code runs here. Programs take any token count, so another bucket's schedule is correct, only
    perhaps slower. Code that is ready goes before a schedule that has to be compiled. `why_no_code` says why no
    record's own code may be called.
    """
    wanted = Key.of(problem, device)
    found = [
        _candidate(record, problem, wanted, why_no_code)
        for record in records
        if _must_match(record.key) == _must_match(wanted)
    ]
    return sorted(found, key=lambda candidate: _rank(candidate, wanted))


def _must_match(key: Key) -> tuple[Any, ...]:
    """The fields of a key that have to be equal."""
    return (key.op, key.direction, key.streams, key.width, key.dtype, key.rounds, key.device.kind)


def _candidate(record: RecordT, problem: Problem, wanted: Key, why_no_code: str | None) -> Candidate[RecordT]:
    why_recompile = record.key.why_not_current or why_no_code
    why_refused = why_cannot_run(record.key.device.arch, wanted.device)
    if why_refused is None and why_recompile is not None:
        why_refused = _why_invalid(record.schedule, problem, wanted.device)
    match, why = _match(record.key, wanted)
    return Candidate(record, match, why, why_recompile, why_refused)


def _rank(candidate: Candidate[Any], wanted: Key) -> tuple[Any, ...]:
    """Sort key, nearest first: this device, ready code, its architecture, its name, then buckets by |log2|, the larger
    on a tie."""
    key = candidate.record.key
    device, here = key.device, wanted.device
    steps = abs(key.tokens.bit_length() - wanted.tokens.bit_length())
    nearness = (device.arch != here.arch, device.name != here.name, steps, -key.tokens, key.digest)
    return (device != here, candidate.why_recompile is not None, *nearness)


def _why_invalid(values: Mapping[str, Any], problem: Problem, device: Device) -> str | None:
    """Why this version does not take a schedule on this device, or None."""
    spec = kernel_spec(problem.op, problem.direction)
    try:
        schedule = spec.schedule_from(values)
        return spec.why_invalid(spec.canonical(problem), schedule, device.target)
    except BadInput as error:
        return str(error)


def _match(found: Key, wanted: Key) -> tuple[Match, str]:
    tuned = f"tuned for {_count(found.tokens)}"
    if (found.device, found.tokens) == (wanted.device, wanted.tokens):
        return "exact", f"{tuned} on this device, {found.device.name}"
    if found.device == wanted.device:
        wish = "one for every token count" if wanted.tokens == EVERY_TOKENS else f"the {wanted.tokens} wanted"
        return "nearest bucket", f"{tuned} on this device, the nearest to {wish}"
    why = (
        f"{tuned} on {found.device.name} ({found.device.arch}), for {_wanted(wanted.tokens)} "
        f"on this device, {wanted.device.name} ({wanted.device.arch})"
    )
    return "sibling device", why


def _wanted(tokens: int) -> str:
    return "every token count" if tokens == EVERY_TOKENS else f"the {tokens} tokens wanted"


def _count(tokens: int) -> str:
    return "every token count" if tokens == EVERY_TOKENS else f"{tokens} tokens"
