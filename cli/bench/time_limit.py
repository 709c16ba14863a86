"""A time limit for a block of code that may take very long, such as compiling a large graph."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TimeLimitExceeded(BaseException):
    """The time is up. A `BaseException` like `KeyboardInterrupt`, as compilers catch every `Exception` and continue."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeLimitExceeded` in the block after `seconds`. Works in a process's main thread only.

    A timer that was running before continues afterwards.
    """

    def expire(number: int, frame: FrameType | None) -> None:
        raise TimeLimitExceeded(f"not ready after {seconds:g} s")

    started = time.monotonic()
    before = signal.signal(signal.SIGALRM, expire)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(0.001, left - (time.monotonic() - started)), interval)
