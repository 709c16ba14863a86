"""A script: the command `mhc-tune` on the toy kernel, with measurements of TOY_SECONDS each.

So that the whole command runs, in processes of its own, without a compiler.
"""

import os
import sys
import time
from pathlib import Path

import toy

from autotune import tuner
from autotune.study import database, heartbeat
from cli import main
from cli.commands import tune as command
from tiles.cache.cache import Key

GATE = os.environ.get("TOY_GATE")
SECONDS = float(os.environ.get("TOY_SECONDS", "0"))


def wait_at_the_gate() -> None:
    """Where TOY_GATE names a file: say beside it that this process is ready, and wait until the file is there."""
    if GATE:
        Path(f"{GATE}.{os.getpid()}").touch()
        while not Path(GATE).exists():
            time.sleep(0.01)


class Workers(toy.ToyWorkers):
    """Every measurement takes its time, which loads no machine."""

    def __init__(self, *, kind: str = "cpu") -> None:
        super().__init__(noise=0.0)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def roofline(self):
        wait_at_the_gate()
        return super().roofline()

    def assess(self, *given):
        time.sleep(SECONDS)
        return super().assess(*given)


def patch() -> None:
    """Put the toy kernel in place of the real ones."""
    tuner.kernel_spec = lambda op, direction: toy.SPEC
    Key.of = toy.key_of
    command.problems = lambda *given: [toy.PROBLEM]
    command.measured_device = lambda target: toy.DEVICE
    command.why_no_compiler = lambda target: None
    command.shipped_records = lambda: ()
    command.Workers = Workers
    heartbeat.HEARTBEAT_SECONDS, heartbeat.LEASE_SECONDS = 0.5, 5.0
    database.RETRY_SECONDS = float(os.environ.get("TOY_PATIENCE", "60"))


if __name__ == "__main__":
    patch()
    main.app(args=sys.argv[1:], prog_name="mhc-tune")
