"""What `mhc-tune tune` shows while it works: counts, rates, what is left, the best, failures; and signs of life."""

import io
import time
from typing import Any

import pytest
from rich.console import Console

from autotune.events import Event, ProblemFinished, ProblemStarted, ShootoutStarted, TrialDone, TrialFailed
from autotune.measuring.roofline import Roofline
from cli.ui.progress import TuneProgress, finished_line
from cli.ui.progress_stats import Tally, duration
from tiles.kernels.spec import Problem

PROBLEM = Problem("merge", "forward", 4, 1280, tokens=2048)


def started(trials: int = 40, settled: int = 0, pool: int = 100) -> ProblemStarted:
    return ProblemStarted(PROBLEM, pool, trials, settled, Roofline(10.0, 50.0))


def done(number: int = 0) -> TrialDone:
    return TrialDone(PROBLEM, number, {}, 0.6, 1.0, 50.0, 55.0, 0.5, 1.25, 60.0, 66.0)


def failed(reason: str) -> TrialFailed:
    return TrialFailed(PROBLEM, 1, {}, reason)


def finished(**more: Any) -> ProblemFinished:
    return ProblemFinished(PROBLEM, None, "trials", more.pop("failed", 0), 12.0, **more)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def tally(clock: Clock, *events: Event, problems: int = 4, seconds: float | None = None) -> Tally:
    made = Tally(problems, seconds, clock)
    for event in events:
        made.take(event)
    return made


def test_rate_and_what_is_left_follow_the_clock(clock: Clock) -> None:
    counted = tally(clock, started(trials=40))
    assert counted.trials_line() == "0 of 40 trials"
    assert counted.all_line() == "0 of 4 problems, 0 s gone"
    for number in range(10):
        clock.now += 6
        counted.take(done(number))
    assert counted.trials_line() == "10 of 40 trials, 10 a minute, about 3 min left"
    # A quarter of the first of four problems took a minute, so fifteen quarters are left.
    assert counted.all_line() == "0 of 4 problems, 1 min gone, about 15 min left"


def test_a_small_pool_ends_before_the_trials_do(clock: Clock) -> None:
    assert tally(clock, started(trials=40, pool=6), done()).settled == 1
    assert tally(clock, started(trials=40, pool=6)).trials_line() == "0 of 6 trials"


def test_the_time_budget_limits_what_is_said_to_be_left(clock: Clock) -> None:
    counted = tally(clock, started(trials=40), problems=4, seconds=120)
    assert counted.trials_line() == "0 of 40 trials, at most 30 s left"
    assert counted.all_line() == "0 of 4 problems, 0 s gone, at most 2 min left"
    clock.now += 10
    counted.take(done())
    assert counted.trials_line() == "1 of 40 trials, 6 a minute, at most 20 s left"
    clock.now += 1000
    assert counted.trials_line().endswith(", time is up")


def test_what_earlier_runs_did_counts_as_done_and_not_as_speed(clock: Clock) -> None:
    counted = tally(clock, started(trials=40, settled=30), problems=1)
    assert counted.best_line() == "goes on where an earlier run ended"
    clock.now += 30
    counted.take(done())
    assert counted.trials_line() == "31 of 40 trials, 2 a minute, about 4 min left"
    assert counted.all_line() == "0 of 1 problems, 30 s gone, about 4 min left"


def test_problems_of_an_earlier_run_do_not_make_this_one_look_fast(clock: Clock) -> None:
    counted = tally(clock, finished(), finished(), started(trials=10), problems=4)
    clock.now += 60
    for number in range(5):
        counted.take(done(number))
    assert counted.all_line() == "2 of 4 problems, 1 min gone, about 3 min left"


def test_a_problem_whose_default_fails_is_counted(clock: Clock) -> None:
    """It ends with an exception and without an event."""
    assert tally(clock, started(), started()).finished == 1


def test_the_best_so_far_and_the_final(clock: Clock) -> None:
    counted = tally(clock, started(), failed("CompileError: no"))
    assert counted.best_line() == "nothing verified yet"
    counted.take(done())
    assert counted.best_line() == "best 0.5 ms, 1.25x the default, 60% of copy bandwidth, 66% of the limit"
    counted.take(ShootoutStarted(PROBLEM, ({}, {}, {})))
    assert counted.trials_line() == "2 of 40 trials, 3 finalists meet the default"
    counted.take(started())
    assert counted.best_line() == "nothing verified yet"


def test_failures_are_counted_by_reason(clock: Clock) -> None:
    reasons = (
        "CompileError: no",
        "WrongResult: y is wrong",
        "CompileError: neither",
        "assess ended its process: SIGSEGV",
    )
    counted = tally(clock, started(), *map(failed, reasons))
    assert counted.failures_line() == "4 failed (does not compile 2, wrong result 1, crashed 1)"
    counted.take(started())
    assert counted.failures_line() == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (90, "2 min"), (3599, "1 h 0 min"), (4800, "1 h 20 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_end_of_a_problem_tells_failures_by_reason() -> None:
    line = finished_line(finished(failed=3, reasons={"crashed": 2, "out of memory": 1}))
    assert line == (
        "merge forward n=4 C=1280 float32 T=2048: nothing verified "
        "(trials, 12 s, 3 failed (crashed 2, out of memory 1))"
    )


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_terminal_shows_all_of_it_at_any_width(width: int) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, color_system=None)
    with TuneProgress(3, console=console) as display:
        for event in (started(), done(), failed("WrongResult: y")):
            display(event)
        display._live.refresh()
        shown = " ".join(screen.getvalue().split())
        display(finished())
    for part in ("2 of 40 trials", "best 0.5 ms, 1.25x", "66% of the limit", "wrong result 1", "0 of 3 problems"):
        assert part in shown
    assert "nothing verified (trials, 12 s)" in " ".join(screen.getvalue().split())


def test_without_a_terminal_a_long_problem_gives_signs_of_life(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    with TuneProgress(2, every=0.05, console=console) as display:
        display(started())
        display(done())
        said = ""
        deadline = time.monotonic() + 60
        while said.count("1 of 40 trials") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
            said += capsys.readouterr().err
        display(finished())
    line = said.splitlines()[-1]
    assert line.startswith("merge forward n=4 C=1280 float32 T=2048: 1 of 40 trials")
    assert "best 0.5 ms" in line
    assert "0 of 2 problems" in line
    assert "nothing verified" in capsys.readouterr().err


def test_without_a_terminal_short_problems_say_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    with TuneProgress(2, every=60, console=Console(file=io.StringIO(), force_terminal=False)) as display:
        for event in (started(), done(), finished(), started(), done(), finished()):
            display(event)
    assert len(capsys.readouterr().err.splitlines()) == 2
