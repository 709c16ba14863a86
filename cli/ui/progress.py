"""The display of `mhc-tune tune`: live on a terminal; elsewhere a line now and then, and one for each problem's end."""

from __future__ import annotations

import threading
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from autotune.buckets.choose import MAX_SLOWDOWN
from autotune.events import BucketSchedulesChosen, Event, ProblemFinished
from cli.ui.output import messages, say
from cli.ui.progress_stats import Tally, failures
from cli.ui.render import number

BAR_WIDTH = 24

SIGN_OF_LIFE_SECONDS = 30.0
"""Without a terminal, a problem that takes longer says how it stands this often."""


class TuneProgress:
    """Shows the tuner's events for a run over `problems` problems that may take `seconds`, if that is given."""

    def __init__(
        self,
        problems: int,
        seconds: float | None = None,
        *,
        every: float = SIGN_OF_LIFE_SECONDS,
        console: Console = messages,
    ) -> None:
        self._tally = Tally(problems, seconds)
        self._lock = threading.Lock()  # the display has a thread of its own, as events may be minutes apart
        self._console = console
        self._live = Live(console=console, get_renderable=self._picture, refresh_per_second=4, transient=True)
        self._every, self._over = every, threading.Event()
        self._pulse = threading.Thread(target=self._say_now_and_then, daemon=True)
        self._spoke = False

    def __enter__(self) -> TuneProgress:
        if self._console.is_terminal:
            self._live.start()
        else:
            self._pulse.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()
        else:
            self._over.set()
            self._pulse.join()

    def __call__(self, event: Event) -> None:
        """Take in one event."""
        with self._lock:
            self._tally.take(event)
            self._spoke = self._spoke or isinstance(event, ProblemFinished)
        if isinstance(event, ProblemFinished):
            self._print(finished_line(event))
        elif isinstance(event, BucketSchedulesChosen):
            self._print(served_line(event))

    def _print(self, line: str) -> None:
        if self._console.is_terminal:
            self._console.print(line, highlight=False, markup=False)
        else:
            say(line)

    def _picture(self) -> RenderableType:
        with self._lock:
            tally = self._tally
            if tally.current is None:
                return tally.all_line()
            bar = Table.grid(padding=(0, 1))
            bar.add_row(ProgressBar(tally.trials, tally.settled, width=BAR_WIDTH), tally.trials_line())
            lines = (tally.best_line(), tally.failures_line(), tally.all_line())
            return Group(tally.current.problem.describe(), bar, *filter(None, lines))

    def _say_now_and_then(self) -> None:
        while not self._over.wait(self._every):
            with self._lock:
                line, quiet = self._line(), not self._spoke
                self._spoke = False
            if quiet:
                say(line)

    def _line(self) -> str:
        tally = self._tally
        if tally.current is None:
            return tally.all_line()
        here = (tally.trials_line(), tally.best_line(), tally.failures_line(), tally.all_line())
        return f"{tally.current.problem.describe()}: {'; '.join(filter(None, here))}"


def served_line(event: BucketSchedulesChosen) -> str:
    """How many schedules serve several token counts, on one line."""
    first, count = event.problems[0], event.schedules
    shape, tokens = first.describe().rpartition(" T=")[0], ", ".join(str(problem.tokens) for problem in event.problems)
    # More than that is a default schedule's alone, where nothing beats it beyond the noise.
    noise = ", which is within the noise" if event.worst > MAX_SLOWDOWN else ""
    return (
        f"{shape}: {count} schedule{'s' if count > 1 else ''} for T={tokens}, "
        f"at most {100 * (event.worst - 1):.1f}% slower than the best at each{noise} ({event.seconds:.0f} s)"
    )


def finished_line(event: ProblemFinished) -> str:
    """What became of one problem, on one line."""
    failed = failures(dict(event.reasons)) or (f"{event.failed} failed" if event.failed else "")
    ending = ", ".join(filter(None, (event.stopped, f"{event.seconds:.0f} s", failed)))
    if event.record is None:
        return f"{event.problem.describe()}: nothing verified ({ending})"
    measured = event.record.measurement
    gain = "the default stays" if measured["default_kept"] else f"{measured['ratio']:.2f}x the default"
    return (
        f"{event.problem.describe()}: {number(measured['tuned_ms'])} ms, {gain}, "
        f"{measured['percent_of_copy']:.0f}% of copy bandwidth, "
        f"{number(measured.get('percent_of_limit'))}% of the limit ({ending})"
    )
