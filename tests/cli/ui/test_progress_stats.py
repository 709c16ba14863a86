"""Statistics of a tuning run: counts, rates, time left, the best so far, failures."""

import pytest
from cli_helpers import Clock
from tuner_events import PROBLEM, done, failed, finished, started

from autotune.events import Event, ShootoutStarted
from cli.ui.progress_stats import ProgressStats, duration


@pytest.fixture
def clock() -> Clock:
    return Clock()


def stats(clock: Clock, *events: Event, problems: int = 4, seconds: float | None = None) -> ProgressStats:
    made = ProgressStats(problems, seconds, clock)
    for event in events:
        made.update(event)
    return made


def test_rate_and_what_is_left_follow_the_clock(clock: Clock) -> None:
    counted = stats(clock, started(trials=40))
    assert counted.trials_line() == "0 of 40 trials"
    assert counted.all_line() == "0 of 4 problems, 0 s elapsed"
    for number in range(10):
        clock.now += 6
        counted.update(done(number))
    assert counted.trials_line() == "10 of 40 trials, 10 a minute, about 3 min left"
    # A quarter of the first of four problems took a minute, so fifteen quarters are left.
    assert counted.all_line() == "0 of 4 problems, 1 min elapsed, about 15 min left"


def test_a_small_pool_ends_before_the_trials_do(clock: Clock) -> None:
    assert stats(clock, started(trials=40, pool=6), done()).evaluated == 1
    assert stats(clock, started(trials=40, pool=6)).trials_line() == "0 of 6 trials"


def test_the_time_budget_limits_what_is_said_to_be_left(clock: Clock) -> None:
    counted = stats(clock, started(trials=40), problems=4, seconds=120)
    assert counted.trials_line() == "0 of 40 trials, at most 30 s left"
    assert counted.all_line() == "0 of 4 problems, 0 s elapsed, at most 2 min left"
    clock.now += 10
    counted.update(done())
    assert counted.trials_line() == "1 of 40 trials, 6 a minute, at most 20 s left"
    clock.now += 1000
    assert counted.trials_line().endswith(", time is up")


def test_what_earlier_runs_did_counts_as_done_and_not_as_speed(clock: Clock) -> None:
    counted = stats(clock, started(trials=40, evaluated=30), problems=1)
    assert counted.best_line() == "continues an earlier run"
    clock.now += 30
    counted.update(done())
    assert counted.trials_line() == "31 of 40 trials, 2 a minute, about 4 min left"
    assert counted.all_line() == "0 of 1 problems, 30 s elapsed, about 4 min left"


def test_problems_of_an_earlier_run_do_not_make_this_one_look_fast(clock: Clock) -> None:
    counted = stats(clock, finished(), finished(), started(trials=10), problems=4)
    clock.now += 60
    for number in range(5):
        counted.update(done(number))
    assert counted.all_line() == "2 of 4 problems, 1 min elapsed, about 3 min left"


def test_a_problem_whose_default_fails_is_counted(clock: Clock) -> None:
    """It ends with an exception and without an event."""
    assert stats(clock, started(), started()).finished == 1


def test_the_best_so_far_and_the_final(clock: Clock) -> None:
    counted = stats(clock, started(), failed("CompileError: no"))
    assert counted.best_line() == "nothing verified yet"
    counted.update(done())
    assert counted.best_line() == "best 0.5 ms, 1.25x the default, 60% of copy bandwidth, 66% of the limit"
    counted.update(ShootoutStarted(PROBLEM, ({}, {}, {})))
    assert counted.trials_line() == "2 of 40 trials, 3 finalists against the default"
    counted.update(started())
    assert counted.best_line() == "nothing verified yet"


def test_failures_are_counted_by_reason(clock: Clock) -> None:
    reasons = (
        "CompileError: no",
        "WrongResult: y is wrong",
        "CompileError: neither",
        "assess ended its process: SIGSEGV",
    )
    counted = stats(clock, started(), *map(failed, reasons))
    assert counted.failures_line() == "4 failed (does not compile 2, wrong result 1, crashed 1)"
    counted.update(started())
    assert counted.failures_line() == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (90, "2 min"), (3599, "1 h 0 min"), (4800, "1 h 20 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
