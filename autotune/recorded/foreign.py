"""Readers of recorded spaces: our files, Kernel Tuner's cache files and T4, told apart by content."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import statistics
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from autotune.recorded.spaces import FORMAT, RecordedSpace, milliseconds, space_from
from autotune.search.pool import Pool
from tiles.errors import BadInput, one_line

MOST_BYTES = 512 * 2**20
"""Limit of a file's JSON: ten times the largest spaces in the benchmark hub."""

GZIP, XZ = b"\x1f\x8b", b"\xfd7zXZ\x00"

NEVER_MS = 1e15
"""Kernel Tuner's older cache files mark a failure with a time above this."""


def read_space(path: Path) -> RecordedSpace:
    """Read a file, plain or compressed with gzip or xz; raises `BadInput` for any other content.

    Times are the file's objective in milliseconds. Kernel Tuner's and T4 files have no default configuration, so
    `has_default` is False for them. Of duplicate configurations the last entry counts.
    """
    try:
        data = json.loads(_text(path))
        if not isinstance(data, dict):
            raise ValueError(f"a JSON {type(data).__name__}")
        space = _space(data, path.name)
        if all(ms is None for ms in space.ms):
            raise ValueError(f"{len(space.ms)} configurations and no time")
    except BadInput:
        raise
    except OSError as error:
        raise _refused(path, error.strerror or str(error)) from error
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError, MemoryError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise _refused(path, what or type(error).__name__) from error
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise _refused(path, f"damaged compression: {error}") from error
    return space


def _refused(path: Path, what: str) -> BadInput:
    said = one_line(what)[:200]
    return BadInput(
        "a recorded space must be a file of mhc-tune record, a Kernel Tuner cache file or a T4 file, "
        f"got {path} ({said}): check the path, or record it anew"
    )


def _text(path: Path) -> str:
    raw = path.read_bytes()
    kind: Any = gzip.open if raw.startswith(GZIP) else lzma.open if raw.startswith(XZ) else _as_is
    with kind(io.BytesIO(raw)) as opened:
        content = opened.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES >> 20} MiB of JSON")
    text = content.decode("utf-8").rstrip()
    # Kernel Tuner closes a cache file only at the end of a run: an interrupted one ends after an entry.
    return text.removesuffix(",") + "}}" if text.endswith(",") else text


def _as_is(file: io.BytesIO) -> io.BytesIO:
    return file


def _space(data: Mapping[str, Any], name: str) -> RecordedSpace:
    if data.get("format") == FORMAT:
        return space_from(data)
    if "tune_params_keys" in data:
        return _kernel_tuner(data, name)
    if "results" in data:
        return _t4(data, name)
    raise ValueError("JSON of another kind")


def _kernel_tuner(data: Mapping[str, Any], name: str) -> RecordedSpace:
    """`cache` maps configurations to measurements; the time of a failed one is the error's name."""
    names = [str(key) for key in data["tune_params_keys"]]
    objective = str(data.get("objective", "time"))
    found = []
    for entry in data["cache"].values():
        value = entry[objective]
        why = str(entry.get("__error__", value)) if isinstance(value, str) else _why_no_time(value)
        found.append(({key: entry[key] for key in names}, value, why))
    about = {key: data[key] for key in ("device_name", "kernel_name", "problem_size") if key in data}
    listed = {key: list(values) for key, values in data.get("tune_params", {}).items() if key in names}
    return _gathered(name, names, found, listed, about)


def _t4(data: Mapping[str, Any], name: str) -> RecordedSpace:
    """`results` lists configurations with their validity and measurements."""
    found = []
    for entry in data["results"]:
        objective = next(iter(entry.get("objectives") or ["time"]))
        value: Any = next((part["value"] for part in entry.get("measurements", ()) if part["name"] == objective), None)
        if value is None and entry["times"].get("runtimes"):
            value = statistics.median(entry["times"]["runtimes"])
        invalid = entry.get("invalidity", "correct")
        why = str(invalid) if invalid != "correct" else value if isinstance(value, str) else _why_no_time(value)
        found.append((dict(entry["configuration"]), value, why))
    names = list(dict.fromkeys(key for configuration, _, _ in found for key in configuration))
    return _gathered(name, names, found, {}, {})


def _why_no_time(value: Any) -> str | None:
    try:
        return None if milliseconds(value) < NEVER_MS else f"the time {value!r}"
    except ValueError as error:
        return str(error)


def _gathered(
    name: str,
    names: list[str],
    found: Iterable[tuple[dict[str, Any], Any, str | None]],
    listed: Mapping[str, list[Any]],
    about: Mapping[str, Any],
) -> RecordedSpace:
    """Build a space from (configuration, time, reason without a time)."""
    distinct = {tuple(configuration[key] for key in names): (value, why) for configuration, value, why in found}
    space = {}
    for at, key in enumerate(names):
        used = {configuration[at] for configuration in distinct}
        known = [value for value in dict.fromkeys(listed.get(key, ())) if value in used]
        space[key] = tuple(known) if len(known) == len(used) else tuple(sorted(used, key=_natural))
    steps = {key: {value: step for step, value in enumerate(values)} for key, values in space.items()}
    members = tuple(tuple(steps[key][value] for key, value in zip(names, one, strict=True)) for one in distinct)
    return RecordedSpace(
        name=name,
        pool=Pool(space, members, 0),
        ms=tuple(None if why else float(value) for value, why in distinct.values()),
        reasons={member: why for member, (_, why) in enumerate(distinct.values()) if why},
        has_default=False,
        about=about,
    )


def _natural(value: Any) -> tuple[bool, Any]:
    """A sort key: numbers by value, then texts."""
    return (False, value) if isinstance(value, int | float) else (True, str(value))
