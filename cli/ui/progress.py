"""Progress displays: of `mhc-tune tune`, live on a terminal and line by line elsewhere; and plain progress bars."""

from __future__ import annotations

import threading
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table

from autotune.buckets.choose import MAX_SLOWDOWN
from autotune.events import BucketSchedulesChosen, Event, ProblemFinished
from cli.ui.output import messages, say
from cli.ui.progress_stats import ProgressStats, failures
from cli.ui.render import number

BAR_WIDTH = 24

STATUS_SECONDS = 30.0
"""Interval of status lines without a terminal, where a problem takes longer than that."""


def progress_bars(label: str, *columns: ProgressColumn) -> Progress:
    """Bars that show how many steps are done, on a terminal only; `columns` stand between the count and the time."""
    return Progress(
        TextColumn(label),
        BarColumn(bar_width=BAR_WIDTH),
        MofNCompleteColumn(),
        *columns,
        TimeElapsedColumn(),
        console=messages,
        disable=not messages.is_terminal,
        transient=True,
    )


class TuneProgress:
    """Shows the tuner's events of a run over `problems` problems with an optional time budget of `seconds`."""

    def __init__(
        self, problems: int, seconds: float | None = None, *, every: float = STATUS_SECONDS, console: Console = messages
    ) -> None:
        self._stats = ProgressStats(problems, seconds)
        self._lock = threading.Lock()  # events may be minutes apart, so that the display has its own thread
        self._console = console
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=True)
        self._every, self._stopped = every, threading.Event()
        self._printer = threading.Thread(target=self._print_status, daemon=True)
        self._printed = False

    def __enter__(self) -> TuneProgress:
        if self._console.is_terminal:
            self._live.start()
        else:
            self._printer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()
        else:
            self._stopped.set()
            self._printer.join()

    def __call__(self, event: Event) -> None:
        """Process one event."""
        with self._lock:
            self._stats.update(event)
            self._printed = self._printed or isinstance(event, ProblemFinished)
        if isinstance(event, ProblemFinished):
            self._print(finished_line(event))
        elif isinstance(event, BucketSchedulesChosen):
            self._print(served_line(event))

    def _print(self, line: str) -> None:
        if self._console.is_terminal:
            self._console.print(line, highlight=False, markup=False)
        else:
            say(line)

    def _render(self) -> RenderableType:
        with self._lock:
            stats = self._stats
            if stats.current is None:
                return stats.all_line()
            bar = Table.grid(padding=(0, 1))
            bar.add_row(ProgressBar(stats.trials, stats.evaluated, width=BAR_WIDTH), stats.trials_line())
            lines = (stats.best_line(), stats.failures_line(), stats.all_line())
            return Group(stats.current.problem.describe(), bar, *filter(None, lines))

    def _print_status(self) -> None:
        while not self._stopped.wait(self._every):
            with self._lock:
                line, quiet = self._line(), not self._printed
                self._printed = False
            if quiet:
                say(line)

    def _line(self) -> str:
        stats = self._stats
        if stats.current is None:
            return stats.all_line()
        here = (stats.trials_line(), stats.best_line(), stats.failures_line(), stats.all_line())
        return f"{stats.current.problem.describe()}: {'; '.join(filter(None, here))}"


def served_line(event: BucketSchedulesChosen) -> str:
    """One line: how many schedules serve several token counts, and how far they are from the best."""
    first, count = event.problems[0], event.schedules
    shape, tokens = first.describe().rpartition(" T=")[0], ", ".join(str(problem.tokens) for problem in event.problems)
    # Only a default schedule that nothing beats beyond the noise can be slower than that.
    noise = ", which is within the noise" if event.worst > MAX_SLOWDOWN else ""
    return (
        f"{shape}: {count} schedule{'s' if count > 1 else ''} for T={tokens}, "
        f"at most {100 * (event.worst - 1):.1f}% slower than the best at each{noise} ({event.seconds:.0f} s)"
    )


def finished_line(event: ProblemFinished) -> str:
    """One line: the result of one problem."""
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
