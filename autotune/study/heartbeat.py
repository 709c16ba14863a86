"""Whose a running trial is, and whether its owner still lives.

Optuna's heartbeats serve `Study.optimize` on a database only; here trials are asked and told, in journals as well. So
each running trial carries its owner, and a number that the owner raises every few seconds. On the same machine a dead
owner is seen by its process. Elsewhere it is one whose number stands still, by the watcher's own clock: machines whose
clocks differ agree all the same.
"""

from __future__ import annotations

import os
import platform
import secrets
import threading
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, Trial

OWNER = "owner"
"""Trial attribute: the run at work on it, see `Lease.owner`."""

BEAT = "beat"
"""Trial attribute: a number that its owner raises every `BEAT_SECONDS`."""

BEAT_SECONDS = 5.0

SILENT_SECONDS = 30.0
"""A trial whose `BEAT` was seen to stand still for this long belongs to nobody."""

_runs: set[str] = set()
"""The runs of this process that are not closed."""


@dataclass
class _Watch:
    """How long a trial has been seen silent: only while somebody looked, so that a gap in looking ends no lease."""

    beat: Any
    looked: float
    silent: float = 0.0


class Lease:
    """What one run holds, renewed by a thread until it is let go, and what it has seen of others' trials."""

    def __init__(self) -> None:
        self._run = secrets.token_hex(8)
        self._held: dict[int, Trial] = {}
        self._watched: dict[int, _Watch] = {}
        self._closed = threading.Event()
        self._renewing: threading.Thread | None = None
        _runs.add(self._run)

    @property
    def owner(self) -> dict[str, Any]:
        """The value of `OWNER` for this run's trials."""
        process = os.getpid()
        return {
            "host": _host(),
            "name": platform.node(),
            "process": process,
            "started": _started(process),
            "run": self._run,
        }

    @property
    def held(self) -> list[Trial]:
        """The trials that this run is at work on."""
        return list(self._held.values())

    def hold(self, trial: Trial) -> None:
        """Renew the lease on a trial until `let_go`."""
        self._held[trial.number] = trial
        if self._renewing is None:
            self._renewing = threading.Thread(target=self._renew, daemon=True)
            self._renewing.start()

    def let_go(self, trial: Trial) -> None:
        """Stop renewing: the trial was told."""
        self._held.pop(trial.number, None)

    def close(self) -> None:
        """Stop renewing all."""
        self._closed.set()
        self._held.clear()
        _runs.discard(self._run)

    def mine(self, trial: FrozenTrial) -> bool:
        """Whether this run is at work on a trial."""
        return trial.number in self._held

    def abandoned(self, trial: FrozenTrial) -> bool:
        """Whether the owner of a running trial is gone. Ask again and again: silence shows over time."""
        owner = trial.user_attrs.get(OWNER)
        if isinstance(owner, dict) and owner["host"] == _host():
            if owner["process"] == os.getpid() and owner["started"] == _started(os.getpid()):
                return owner["run"] not in _runs
            if owner["started"] != _started(owner["process"]):
                return True
        # A stopped process is as silent as a machine without power. So is a trial whose owner died before it could
        # put its name down.
        return self._silence(trial) > SILENT_SECONDS

    def _silence(self, trial: FrozenTrial) -> float:
        now, beat = time.monotonic(), trial.user_attrs.get(BEAT)
        watch = self._watched.get(trial.number)
        if watch is None or watch.beat != beat:
            self._watched[trial.number] = _Watch(beat, now)
            return 0.0
        watch.silent += min(now - watch.looked, BEAT_SECONDS)
        watch.looked = now
        return watch.silent

    def _renew(self) -> None:
        beat = 0
        while not self._closed.wait(BEAT_SECONDS):
            beat += 1
            for trial in self.held:
                try:
                    trial.set_user_attr(BEAT, beat)
                except Exception:
                    # Told this moment, or a storage that does not answer: the run itself will meet it and say so.
                    continue


@cache
def _host() -> str:
    """This machine since it was started, and the container in it: where a process id means one process only."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"{platform.node()} {secrets.token_hex(8)}"  # not even our own processes are known: leases alone decide


def _started(process: int) -> str | None:
    """When a process was started (ticks since the machine was), or None where it has ended: ids are used again."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name, in parentheses, may hold anything; what follows is field 3, the state; field 22 is the start.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]
