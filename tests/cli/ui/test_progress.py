"""The progress display: on a terminal of any width, and line by line without one."""

import io
import time

import pytest
from rich.console import Console
from tuner_events import done, failed, finished, started

from cli.ui.progress import TuneProgress, finished_line


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
