"""Which stored schedules serve a problem on a device, and in which order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

from tiles.cache.record import FORMAT, Key
from tiles.compiler.toolchain import TILELANG, sources_hash
from tiles.errors import BadInput
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.target import Device, why_cannot_run

How = Literal["exact", "nearest bucket", "sibling device"]


class Offer(Protocol):
    """A measured schedule: a `tiles.cache.record.Record`, or a shipped one that has no code."""

    @property
    def key(self) -> Key:
        """What it was measured for."""

    @property
    def schedule(self) -> Mapping[str, Any]:
        """The tunables by name."""

    @property
    def measurement(self) -> Mapping[str, Any]:
        """What the tuner measured."""


Offered = TypeVar("Offered", bound=Offer)


@dataclass(frozen=True)
class Candidate(Generic[Offered]):
    """An offer for a problem: how near it is, and one sentence for people that says so.

    `rebuild` says why its own code may not be called, so that its schedule has to be compiled here; `refused` why it
    does not serve at all. Both are None for code that is ready to run.
    """

    offer: Offered
    how: How
    why: str
    rebuild: str | None
    refused: str | None


def candidates(
    offers: Iterable[Offered], problem: Problem, device: Device, without_code: str | None = None
) -> list[Candidate[Offered]]:
    """All offers for a problem, the best first; those that are `refused` are among them.

    First those of this device, exact before the nearest token bucket; then those of its siblings, which are devices of
    the same kind whose code runs here. Programs take any token count, so another bucket's schedule is right, only
    perhaps slower. Code that is ready goes before a schedule that has to be compiled. `without_code` says why no
    offer's own code may be called.
    """
    wanted = Key.of(problem, device)
    found = [
        _candidate(offer, problem, wanted, without_code)
        for offer in offers
        if _question(offer.key) == _question(wanted)
    ]
    return sorted(found, key=lambda candidate: _rank(candidate, wanted))


def _question(key: Key) -> tuple[Any, ...]:
    """What an offer must have been measured for."""
    return (key.op, key.direction, key.streams, key.width, key.dtype, key.rounds, key.device.kind)


def _candidate(offer: Offered, problem: Problem, wanted: Key, without_code: str | None) -> Candidate[Offered]:
    rebuild = _why_not_current(offer.key) or without_code
    refused = why_cannot_run(offer.key.device.arch, wanted.device)
    if refused is None and rebuild is not None:
        refused = _why_invalid(offer.schedule, problem, wanted.device)
    how, why = _explained(offer.key, wanted)
    return Candidate(offer, how, why, rebuild, refused)


def _rank(candidate: Candidate[Any], wanted: Key) -> tuple[Any, ...]:
    """Sorts nearer offers first: this device, ready code, its architecture, its name, then buckets by |log2|, the
    larger on a tie."""
    key = candidate.offer.key
    device, here = key.device, wanted.device
    steps = abs(key.tokens.bit_length() - wanted.tokens.bit_length())
    nearness = (device.arch != here.arch, device.name != here.name, steps, -key.tokens, key.digest)
    return (device != here, candidate.rebuild is not None, *nearness)


def _why_not_current(key: Key) -> str | None:
    """Why a kernel's code may be called differently than this version calls it, or None."""
    if key.format != FORMAT:
        return f"it is in format {key.format}, this version's is {FORMAT}"
    if key.toolchain != TILELANG:
        return f"it was made with TileLang {key.toolchain}, this version uses {TILELANG}"
    if key.sources != sources_hash(key.op):
        return "it was made from other kernel sources than this version's"
    return None


def _why_invalid(values: Mapping[str, Any], problem: Problem, device: Device) -> str | None:
    """Why this version does not take a schedule on this device, or None."""
    spec = kernel_spec(problem.op, problem.direction)
    try:
        schedule = spec.schedule_from(values)
        return spec.why_invalid(spec.canonical(problem), schedule, device.target)
    except BadInput as error:
        return str(error)


def _explained(found: Key, wanted: Key) -> tuple[How, str]:
    if (found.device, found.tokens) == (wanted.device, wanted.tokens):
        return "exact", f"tuned for {found.tokens} tokens on this device, {found.device.name}"
    if found.device == wanted.device:
        why = f"tuned for {found.tokens} tokens on this device, the nearest to the {wanted.tokens} wanted"
        return "nearest bucket", why
    why = (
        f"tuned for {found.tokens} tokens on {found.device.name} ({found.device.arch}), for the {wanted.tokens} tokens "
        f"wanted on this device, {wanted.device.name} ({wanted.device.arch})"
    )
    return "sibling device", why
