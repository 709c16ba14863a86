"""Trial leases and heartbeats for shared studies.

Optuna's heartbeats serve `Study.optimize` on a database only; here trials are asked and told, in journals as well. So
each running trial carries its owner and a heartbeat, a counter that the owner raises every few seconds. On the same
machine a dead owner is seen by its process. Elsewhere it is one whose heartbeat stands still by the observer's own
clock, so that the machines' clocks need not agree.
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
"""Trial attribute: the run that holds the lease (`Leases.owner`)."""

HEARTBEAT = "beat"
"""Trial attribute: a counter that its owner raises every `HEARTBEAT_SECONDS`."""

HEARTBEAT_SECONDS = 5.0

LEASE_SECONDS = 30.0
"""A lease expires when its `HEARTBEAT` was observed to stand still for this long."""

_open_runs: set[str] = set()
"""The runs of this process that are not closed."""


@dataclass
class _Heartbeat:
    """A trial's last heartbeat and its observed silence (s), to which a long gap between polls adds little."""

    beat: Any
    polled: float
    silent: float = 0.0


class Leases:
    """The leases of one run, renewed by a thread until released, and the heartbeats observed of other runs' trials."""

    def __init__(self) -> None:
        self._run = secrets.token_hex(8)
        self._held: dict[int, Trial] = {}
        self._observed: dict[int, _Heartbeat] = {}
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        _open_runs.add(self._run)

    @property
    def owner(self) -> dict[str, Any]:
        """The value of `OWNER` for this run's trials."""
        process = os.getpid()
        return {
            "host": _host_id(),
            "name": platform.node(),
            "process": process,
            "started": _process_start(process),
            "run": self._run,
        }

    @property
    def held(self) -> list[Trial]:
        """The trials whose leases this run holds."""
        return list(self._held.values())

    def acquire(self, trial: Trial) -> None:
        """Renew the lease on a trial until `let_go`."""
        self._held[trial.number] = trial
        if self._thread is None:
            self._thread = threading.Thread(target=self._renew, daemon=True)
            self._thread.start()

    def release(self, trial: Trial) -> None:
        """Stop renewing the lease: the trial was told."""
        self._held.pop(trial.number, None)

    def close(self) -> None:
        """Release all leases."""
        self._closed.set()
        self._held.clear()
        _open_runs.discard(self._run)

    def holds(self, trial: FrozenTrial) -> bool:
        """Whether this run holds the lease on a trial."""
        return trial.number in self._held

    def expired(self, trial: FrozenTrial) -> bool:
        """Whether the owner of a running trial is gone; silence shows only over repeated calls."""
        owner = trial.user_attrs.get(OWNER)
        if isinstance(owner, dict) and owner["host"] == _host_id():
            if owner["process"] == os.getpid() and owner["started"] == _process_start(os.getpid()):
                return owner["run"] not in _open_runs
            if owner["started"] != _process_start(owner["process"]):
                return True
        # Also a stopped process, and a trial whose owner died before it was written.
        return self._silence(trial) > LEASE_SECONDS

    def _silence(self, trial: FrozenTrial) -> float:
        now, beat = time.monotonic(), trial.user_attrs.get(HEARTBEAT)
        watch = self._observed.get(trial.number)
        if watch is None or watch.beat != beat:
            self._observed[trial.number] = _Heartbeat(beat, now)
            return 0.0
        watch.silent += min(now - watch.polled, HEARTBEAT_SECONDS)
        watch.polled = now
        return watch.silent

    def _renew(self) -> None:
        beat = 0
        while not self._closed.wait(HEARTBEAT_SECONDS):
            beat += 1
            for trial in self.held:
                try:
                    trial.set_user_attr(HEARTBEAT, beat)
                except Exception:
                    # Just told, or a storage that does not answer: the run itself will meet and report that.
                    continue


@cache
def _host_id() -> str:
    """An id of this machine's boot and PID namespace, within which a process id is unique."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"{platform.node()} {secrets.token_hex(8)}"  # processes are not known: heartbeats alone decide


def _process_start(process: int) -> str | None:
    """The start of a process (clock ticks since boot), or None where it has ended: tells reused ids apart."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name, in parentheses, may hold anything; what follows is field 3, the state; field 22 is the start.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]
