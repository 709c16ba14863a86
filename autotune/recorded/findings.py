"""The file of a sweep's findings: each is kept as soon as it is there, and a killed sweep goes on from it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from tiles.errors import BadInput

Line = dict[str, Any]
"""The finding of one member: `reason`, or `ratio`, `default_ms`, `low`, `high`, `rounds` and `source`.

`confirmed` is true where the member was timed again (`confirmation`).
"""


class Findings:
    """What is known of each member of a pool: {member: finding}, and the file that holds it. A context manager.

    A line of the file is {member: finding} of what was found together: it is kept whole or not at all. A later finding
    of a member replaces an earlier one.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], members: int) -> None:
        """Open the file of a sweep, which `header` describes, and read it; raises `BadInput` for another one's."""
        self._path, self._members = path, members
        self._file = _opened(path, json.dumps(header).encode() + b"\n")
        self.of: dict[int, Line] = {}
        try:
            for line in self._file:
                self.of |= self._parsed(line)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Findings:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def keep(self, found: Mapping[int, Line]) -> None:
        """Add findings; they are on the disk when this returns."""
        self._file.write(json.dumps(found).encode() + b"\n")
        _flush(self._file)
        self.of |= found

    def by_source(self) -> dict[str, Line]:
        """The finding of each generated code that runs."""
        return {said["source"]: said for said in self.of.values() if "source" in said}

    def _parsed(self, line: bytes) -> dict[int, Line]:
        try:
            return {range(self._members)[int(member)]: dict(said) for member, said in json.loads(line).items()}
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise BadInput(
                f"{self._path} must hold findings by member on each line, got {line[:40]!r}: move it away to begin anew"
            ) from error


def _opened(path: Path, header: bytes) -> IO[bytes]:
    """The file behind its header; a partial last line is cut off."""
    file = path.open("a+b")
    try:
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        if b"\n" not in content:
            file.write(header)
            _flush(file)
        elif not content.startswith(header):
            raise BadInput(
                f"{path} must belong to this sweep, it is of another problem, device, pool, thread count or "
                "version: move it away to begin anew"
            )
        file.seek(len(header))
    except BaseException:
        file.close()
        raise
    return file


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
