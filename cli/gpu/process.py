"""Processes with a time limit, whose own children end with them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from autotune.processes.worker import kill_group

ROOT = Path(__file__).parents[2]
"""The checkout: where tests lie, and what `python -m cli.main` is found in."""

GRACE = 15.0
"""Seconds between the request to end (Ctrl-C, after which tune keeps what it has) and the end."""


def run(
    command: Sequence[str], seconds: float, log: Path, environment: Mapping[str, str], stdout: Path | None = None
) -> int | None:
    """The exit code, or None where it was ended after `seconds`. Output goes to the end of `log`."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    given = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", **environment}
    with log.open("ab") as said, (stdout or log).open("wb" if stdout else "ab") as results:
        process = subprocess.Popen(command, cwd=ROOT, env=given, stdout=results, stderr=said, start_new_session=True)
        try:
            return process.wait(timeout=max(0.0, seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE)
            return None
        finally:
            kill_group(process)


def python(*arguments: str) -> list[str]:
    """A command that runs this Python."""
    return [sys.executable, *arguments]
