"""The time limit of a block of code."""

import signal
import time

import pytest

from cli.bench.time_limit import TimeLimitExceeded, time_limit


def test_a_time_limit_ends_with_its_block_and_leaves_other_timers_alone() -> None:
    rang: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: rang.append(number))
    left, interval = signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with time_limit(5):
            pass
        with pytest.raises(TimeLimitExceeded, match=r"^not ready after 0\.01 s$"), time_limit(0.01):
            time.sleep(1)
        time.sleep(0.5)
        assert len(rang) == 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, before)
