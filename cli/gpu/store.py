"""The results of `mhc-tune gpu`: one JSON file that is rewritten after every item and continued by later calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiles.cache.cache import write_atomically
from tiles.errors import BadInput
from tiles.target import Device

FORMAT = 1


class Store:
    """Results of items by name: `status` (done, partial, failed, skipped), `seconds`, `why`, and measurements."""

    def __init__(self, path: Path, device: Device) -> None:
        self.path = path
        self.values: dict[str, Any] = {"format": FORMAT, "device": device.as_dict(), "about": {}, "items": {}}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise BadInput(f"{path} must hold results of mhc-tune gpu, got {error}: move it away") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT or found.get("device") != device.as_dict():
            other = found.get("device") if isinstance(found, dict) else found
            raise BadInput(f"{path} must hold results of this device, {device.name}, got {other}: choose another --out")
        self.values = found

    def get(self, name: str) -> dict[str, Any]:
        """The result of an item; empty if it was never started."""
        found: dict[str, Any] = self.values["items"].get(name, {})
        return found

    def put(self, name: str, result: dict[str, Any]) -> None:
        """Store an item's result; it is on disk when this returns."""
        self.values["items"][name] = result
        self.write()

    def write(self) -> None:
        """Write all results atomically."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(self.values, indent=1, allow_nan=False).encode())
