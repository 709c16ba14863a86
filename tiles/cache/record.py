"""Keys and records: what identifies a tuned kernel (`Key`), and the data stored about it (`Record`)."""

from __future__ import annotations

import hashlib
import json
import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tiles.compiler.toolchain import TILELANG, sources_hash
from tiles.errors import BadInput
from tiles.kernels.registry import kernel_spec, kernel_specs
from tiles.kernels.spec import Direction, Problem
from tiles.target import Device

FORMAT = 1
"""Version of the record's fields. A reader takes its own version only."""

MAX_RECORD_BYTES = 64 * 1024
"""A record's JSON stays below this; a tuner's record is about 1 KB."""

MAX_INT = 2**53
"""Integers beyond this do not survive JSON readers that hold numbers as float64."""

_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_ARCH = re.compile(r"[A-Za-z0-9_-]{1,32}")
_VERSION = re.compile(r"[A-Za-z0-9.+_-]{1,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

_DEVICE_FIELDS = {"kind": str, "name": str, "arch": str, "units": int, "l2_bytes": int}
_KEY_FIELDS = {
    "op": str,
    "direction": str,
    "streams": int,
    "width": int,
    "dtype": str,
    "tokens": int,
    "rounds": int,
    "device": dict,
    "toolchain": str,
    "sources": str,
    "format": int,
}
_RECORD_FIELDS = {"key": dict, "schedule": dict, "sha256": str, "size": int, "measurement": dict, "provenance": dict}


def token_bucket(tokens: int) -> int:
    """The smallest power of two that is at least `tokens`; 1 for 0 tokens."""
    return 1 << max(0, tokens - 1).bit_length()


@dataclass(frozen=True)
class Key:
    """Everything that decides a kernel's best schedule and its code. `tokens` is the token bucket, a power of two."""

    op: str
    direction: Direction
    streams: int
    width: int
    dtype: str
    tokens: int
    rounds: int
    device: Device
    toolchain: str
    sources: str
    format: int = FORMAT

    @classmethod
    def of(cls, problem: Problem, device: Device) -> Key:
        """The key of a problem on a device with this version's sources; `BadInput` for an op that no family has."""
        decisive = kernel_spec(problem.op, problem.direction).canonical(problem)
        return cls(
            op=problem.op,
            direction=problem.direction,
            streams=decisive.streams,
            width=decisive.width,
            dtype=decisive.dtype,
            tokens=token_bucket(problem.tokens),
            rounds=decisive.rounds,
            device=device,
            toolchain=TILELANG,
            sources=sources_hash(problem.op),
        )

    @property
    def problem(self) -> Problem:
        """The problem that was tuned: the bucket stands for the token count."""
        return Problem(self.op, self.direction, self.streams, self.width, self.dtype, self.tokens, self.rounds)

    @property
    def current(self) -> bool:
        """Whether this version's sources and toolchain made the kernel: only then may its code be called."""
        return self.why_not_current is None

    @property
    def why_not_current(self) -> str | None:
        """Why the kernel's code may be called differently than this version calls it, or None."""
        if self.format != FORMAT:
            return f"it is in format {self.format}, this version's is {FORMAT}"
        if self.toolchain != TILELANG:
            return f"it was made with TileLang {self.toolchain}, this version uses {TILELANG}"
        if (self.op, self.direction) not in kernel_specs() or self.sources != sources_hash(self.op):
            return "it was made from other kernel sources than this version's"
        return None

    @cached_property
    def digest(self) -> str:
        """32 hexadecimal digits that name this key's files."""
        return hashlib.sha256(to_json(_key_dict(self))).hexdigest()[:32]


@dataclass(frozen=True)
class Record:
    """One tuned kernel: its schedule, the SHA-256 and size (bytes) of its binary, its measurement and provenance.

    `schedule` and `provenance` hold plain scalars, `measurement` finite numbers and booleans.
    """

    key: Key
    schedule: dict[str, Any]
    sha256: str
    size: int
    measurement: dict[str, Any]
    provenance: dict[str, Any]


def to_json(values: Mapping[str, Any]) -> bytes:
    """Canonical JSON (sorted names, ASCII, no spaces): equal values give equal bytes. `BadInput` for non-plain data."""
    try:
        return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise BadInput(f"a record holds plain finite data only, got {error}: convert it before storing") from None


def from_json(text: bytes) -> Any:
    """Parse JSON that may be damaged or hostile; `BadInput` for anything but strict UTF-8 JSON."""
    try:
        return json.loads(text.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"a record must be JSON, got {error}: tune or export it again") from None


def record_dict(record: Record) -> dict[str, Any]:
    """Plain data for JSON; `record_from_dict` reads it."""
    return {
        "key": _key_dict(record.key),
        "schedule": dict(record.schedule),
        "sha256": record.sha256,
        "size": record.size,
        "measurement": dict(record.measurement),
        "provenance": dict(record.provenance),
    }


def record_from_dict(values: object) -> Record:
    """The record in parsed JSON, with every field's type and range checked; `BadInput` names the first wrong one."""
    check_format(values.get("key") if isinstance(values, dict) else None)
    fields = check_fields(values, _RECORD_FIELDS, "a record")
    for name in ("schedule", "measurement", "provenance"):
        check_scalars(fields[name], name, (int, float, bool) if name == "measurement" else (str, int, float, bool))
    for name, value in fields["schedule"].items():
        _check_text(name, _NAME, "a tunable's name")
        if isinstance(value, str):
            _check_text(value, _VERSION, "a tunable")
    _check_text(fields["sha256"], _SHA256, "sha256")
    _check_range(fields["size"], "size")
    return Record(**(fields | {"key": _key_from(fields["key"])}))


def check_format(values: object) -> None:
    """Raise `BadInput` unless `values` has this `FORMAT`. Checked first, as other formats have other fields."""
    found = values.get("format") if isinstance(values, dict) else None
    if type(found) is not int or found != FORMAT:
        raise BadInput(f"format must be {FORMAT}, got {shown(found)}: tune or export it again with this version")


def check_fields(values: object, fields: Mapping[str, type], what: str) -> dict[str, Any]:
    """`values` as a dict with exactly these fields of exactly these types (bool is no int), else `BadInput`."""
    if not isinstance(values, dict) or set(values) != set(fields):
        raise BadInput(f"{what} must have the fields {', '.join(fields)}, got {shown(values)}: tune or export it again")
    for name, kind in fields.items():
        if type(values[name]) is not kind:
            raise BadInput(
                f"{name} of {what} must be {kind.__name__}, got {shown(values[name])}: tune or export it again"
            )
    return values


def check_scalars(values: Mapping[str, Any], what: str, kinds: tuple[type, ...]) -> None:
    """Raise `BadInput` unless every value is of one of `kinds`, strings are printable and numbers finite."""
    for name, value in values.items():
        bad_text = any(_UNPRINTABLE.search(text) for text in (name, value) if isinstance(text, str))
        bad_number = type(value) in (int, float) and (not math.isfinite(value) or abs(value) > MAX_INT)
        if not isinstance(name, str) or type(value) not in kinds or bad_text or bad_number:
            raise BadInput(
                f"{what} must hold plain values ({', '.join(kind.__name__ for kind in kinds)}), "
                f"got {shown(name)} = {shown(value)}: tune or export it again"
            )


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2  # of a whole manifest, records within records would fill the screen


def shown(value: object) -> str:
    """A short, printable form of an untrusted value, for one-line messages."""
    return _UNPRINTABLE.sub("?", _SHORT.repr(value))


def check_schedule(record: Record) -> None:
    """Raise `BadInput`, with the kernel's own sentence, for a schedule that the record's kernel does not take."""
    problem = record.key.problem
    spec = kernel_spec(problem.op, problem.direction)
    why = spec.why_invalid(problem, spec.schedule_from(record.schedule), record.key.device.target)
    if why:
        raise BadInput(f"{problem.describe()}: {why}")


def _key_dict(key: Key) -> dict[str, Any]:
    return {name: getattr(key, name) for name in _KEY_FIELDS} | {"device": key.device.as_dict()}


def _key_from(values: object) -> Key:
    fields = check_fields(values, _KEY_FIELDS, "a key")
    device = check_fields(fields["device"], _DEVICE_FIELDS, "a device")
    _check_text(fields["op"], _NAME, "op")
    _check_text(fields["dtype"], _NAME, "dtype")
    _check_text(fields["toolchain"], _VERSION, "toolchain")
    _check_text(fields["sources"], _VERSION, "sources")
    _check_text(device["arch"], _ARCH, "arch")
    check_scalars(device, "device", (str, int))
    for name in ("width", "tokens"):
        _check_range(fields[name], name)
    for name in ("units", "l2_bytes"):
        _check_range(device[name], name)
    _check_choice(fields["direction"], ("forward", "backward"), "direction")
    _check_choice(device["kind"], ("cpu", "cuda"), "kind")
    key = Key(**(fields | {"device": Device(**device)}))
    if token_bucket(key.problem.tokens) != key.tokens:
        raise BadInput(f"tokens of a key must be a power of two, got {key.tokens}: tune or export it again")
    return key


def _check_text(value: str, pattern: re.Pattern[str], what: str) -> None:
    if not pattern.fullmatch(value):
        raise BadInput(f"{what} must match {pattern.pattern}, got {shown(value)}: tune or export it again")


def _check_range(value: int, what: str) -> None:
    if not 0 <= value <= MAX_INT:
        raise BadInput(f"{what} must be in 0..{MAX_INT}, got {shown(value)}: tune or export it again")


def _check_choice(value: str, choices: tuple[str, ...], what: str) -> None:
    if value not in choices:
        raise BadInput(f"{what} must be one of {', '.join(choices)}, got {shown(value)}: tune or export it again")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
