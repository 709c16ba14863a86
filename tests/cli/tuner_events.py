"""Events of a tuner, for tests of what is shown of them."""

from typing import Any

from autotune.events import ProblemFinished, ProblemStarted, TrialDone, TrialFailed
from autotune.measuring.roofline import Roofline
from tiles.kernels.spec import Problem

PROBLEM = Problem("merge", "forward", 4, 1280, tokens=2048)


def started(trials: int = 40, evaluated: int = 0, pool: int = 100) -> ProblemStarted:
    return ProblemStarted(PROBLEM, pool, trials, evaluated, Roofline(10.0, 50.0))


def done(number: int = 0) -> TrialDone:
    return TrialDone(PROBLEM, number, {}, 0.6, 1.0, 50.0, 55.0, 0.5, 1.25, 60.0, 66.0)


def failed(reason: str) -> TrialFailed:
    return TrialFailed(PROBLEM, 1, {}, reason)


def finished(**more: Any) -> ProblemFinished:
    return ProblemFinished(PROBLEM, None, "trials", more.pop("failed", 0), 12.0, **more)
