"""Update of tiles/cache/shipped.json, the schedules in the wheel: `python -m cli.maintain.update_shipped
results/*/kernels*.json`.

For each device and problem the newest measurement is kept, if today's kernels accept its schedule.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import typer

from cli.ui.output import say
from tiles.cache import shipped
from tiles.cache.record import Key, Record, check_schedule, from_json, record_from_dict
from tiles.errors import BadInput

KEPT = ("default_kept", "default_ms", "ratio", "separate_ratio", "separate_wins", "threads", "tuned_ms")
"""The values of a measurement that are shipped."""


@dataclass(frozen=True)
class MeasuredRecord:
    """A record, the file that it comes from, and the last commit that changed the file."""

    record: Record
    file: str
    commit: str

    @property
    def date(self) -> str:
        """The date of the measurement."""
        return str(self.record.provenance.get("date", ""))[:10]


def update_shipped(files: list[Path], out: Path = shipped.FILE) -> None:
    """Write the schedules of FILES, which `mhc-tune inspect --json` made, to tiles/cache/shipped.json."""
    newest: dict[Key, MeasuredRecord] = {}
    for file in files:
        kept = list(_valid(_measured(file)))
        say(f"{file}: {len(kept)} schedules")
        for measured in sorted(kept, key=attrgetter("date")):
            other = newest.setdefault(measured.record.key, measured)
            if measured.date >= other.date:
                newest[measured.record.key] = measured
    out.write_text(_text(list(newest.values())), encoding="utf-8")
    say(f"wrote {len(newest)} schedules, {out.stat().st_size / 1024:.0f} KiB, to {out}")


def _measured(file: Path) -> list[MeasuredRecord]:
    try:
        values = from_json(file.read_bytes())
        records = [
            record_from_dict({name: entry[name] for name in entry if name != "digest"}) for entry in values["records"]
        ]
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"FILES must come from mhc-tune inspect --json, got {file} ({error!r}): make it again") from None
    return [MeasuredRecord(record, file.as_posix(), _commit(file)) for record in records]


def _commit(file: Path) -> str:
    """The last commit that changed a file; empty if git has none."""
    command = ["git", "log", "-1", "--format=%h", "--", file.name]
    return subprocess.run(command, cwd=file.parent, capture_output=True, text=True, check=False).stdout.strip()


def _valid(found: Iterable[MeasuredRecord]) -> Iterable[MeasuredRecord]:
    """The records that today's kernels accept, under today's keys; prints a line for each other one."""
    for measured in found:
        record = measured.record
        try:
            today = replace(record, key=Key.of(record.key.problem, record.key.device))
            check_schedule(today)
        except BadInput as error:
            say(f"{measured.file}: left out, {error}")
        else:
            yield replace(measured, record=today)


def _text(found: Sequence[MeasuredRecord]) -> str:
    """One schedule per line, ordered by device and problem, so that a new measurement changes few lines."""
    sources = sorted({_source(measured) for measured in found})
    rows = [_row(measured, sources.index(_source(measured))) for measured in found]
    rows.sort(key=lambda row: [row[name] for name in ("source", *shipped.PROBLEM)])
    head = [f'"format": {shipped.FORMAT}', f'"sources": {_lines(map(json.loads, sources))}']
    return "{" + ",\n".join([*head, f'"schedules": {_lines(rows)}']) + "}\n"


def _source(measured: MeasuredRecord) -> str:
    """The source of a schedule as JSON text, which can be compared and sorted."""
    device = measured.record.key.device.as_dict()
    return json.dumps({"file": measured.file, "commit": measured.commit, "device": device})


def _row(measured: MeasuredRecord, source: int) -> dict[str, Any]:
    record = measured.record
    return {
        "source": source,
        **{name: getattr(record.key, name) for name in shipped.PROBLEM},
        "schedule": dict(sorted(record.schedule.items())),
        "measurement": {name: _short(record.measurement[name]) for name in KEPT if name in record.measurement},
        "date": measured.date,
    }


def _short(value: float) -> float:
    """Four significant digits of a measured number."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _lines(values: Iterable[Any]) -> str:
    return "[\n" + ",\n".join(json.dumps(value) for value in values) + "\n]"


if __name__ == "__main__":
    try:
        typer.run(update_shipped)
    except BadInput as error:
        say(f"error: {error}")
        raise SystemExit(2) from None
