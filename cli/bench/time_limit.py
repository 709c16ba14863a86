"""A time limit for what may take very long, such as compiling a large graph."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TooSlow(BaseException):
    """The time is up. No `Exception`, as `KeyboardInterrupt` is none: compilers catch those and go on."""


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Raise `TooSlow` in the block when it takes longer than `seconds`; in a process's main thread alone.

    Another timer that was running goes on afterwards.
    """

    def give_up(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"not ready after {seconds:g} s")

    started = time.monotonic()
    before = signal.signal(signal.SIGALRM, give_up)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(0.001, left - (time.monotonic() - started)), interval)
