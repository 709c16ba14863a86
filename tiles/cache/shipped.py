"""Shipped schedules: measured before this package was built, for those who have not tuned their own device.

`shipped.json` is made by `python -m cli.maintain.update_shipped` from the records in results/. It holds no code: a
schedule is compiled where it is used, from this version's sources.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tiles.cache.record import Key
from tiles.kernels.spec import Problem
from tiles.target import Device

FORMAT = 1
PROBLEM = ("op", "direction", "streams", "width", "dtype", "tokens", "rounds")
FILE = Path(__file__).with_name("shipped.json")


@dataclass(frozen=True)
class ShippedRecord:
    """A measured schedule under the key that it would have if it were tuned today.

    `measurement` is as in a record (times in ms); `provenance` says when, from which file and at which commit.
    """

    key: Key
    schedule: dict[str, Any]
    measurement: dict[str, Any]
    provenance: dict[str, Any]


@cache
def shipped_records() -> tuple[ShippedRecord, ...]:
    """All shipped schedules; each is valid for its problem and device."""
    values = json.loads(FILE.read_text(encoding="utf-8"))
    assert values["format"] == FORMAT
    return tuple(_shipped(entry, values["sources"][entry["source"]]) for entry in values["schedules"])


def _shipped(entry: dict[str, Any], source: dict[str, Any]) -> ShippedRecord:
    key = Key.of(Problem(**{name: entry[name] for name in PROBLEM}), Device(**source["device"]))
    provenance = {"date": entry["date"], "file": source["file"], "commit": source["commit"]}
    return ShippedRecord(key, entry["schedule"], entry["measurement"], provenance)
