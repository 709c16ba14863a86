"""The live display of `mhc-tune tune`: bars on a terminal, and one line for each finished problem everywhere."""

from __future__ import annotations

from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from autotune.events import Event, FinalistsMeet, ProblemFinished, ProblemStarted, TrialDone, TrialFailed
from cli.output import messages, say
from cli.render import number


class TuneProgress:
    """Shows the tuner's events: problems done, trials of the current one, its best so far, failures."""

    def __init__(self, problems: int) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=messages,
            disable=not messages.is_terminal,
            transient=True,
        )
        self._all = self._bars.add_task("problems", total=problems, note="")
        self._one = self._bars.add_task("trials", total=None, note="", visible=False)
        self._best = "nothing verified yet"
        self._failed = 0

    def __enter__(self) -> TuneProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, event: Event) -> None:
        """Take in one event."""
        if isinstance(event, ProblemStarted):
            self._failed, self._best = 0, "nothing verified yet"
            trials = min(event.trials, event.pool)
            self._bars.reset(self._one, total=trials, completed=event.settled, visible=True)
            self._bars.update(self._one, description=event.problem.describe())
        elif isinstance(event, TrialDone):
            self._best = (
                f"best {number(event.best_ms)} ms, {event.best_ratio:.2f}x the default, "
                f"{event.best_percent_of_copy:.0f}% of copy, {event.best_percent_of_limit:.0f}% of the limit"
            )
            self._bars.advance(self._one)
        elif isinstance(event, TrialFailed):
            self._failed += 1
            self._bars.advance(self._one)
        elif isinstance(event, FinalistsMeet):
            self._best += f"; {len(event.schedules)} finalists meet the default"
        else:
            self._finish(event)
        failed = f", {self._failed} failed" if self._failed else ""
        self._bars.update(self._one, note=self._best + failed)

    def _finish(self, event: ProblemFinished) -> None:
        self._bars.advance(self._all)
        line = finished_line(event)
        if messages.is_terminal:
            self._bars.console.print(line, highlight=False)
        else:
            say(line)


def finished_line(event: ProblemFinished) -> str:
    """What became of one problem, on one line."""
    failed = f", {event.failed} failed" if event.failed else ""
    ending = f"{event.stopped}, {event.seconds:.0f} s{failed}"
    if event.record is None:
        return f"{event.problem.describe()}: nothing verified ({ending})"
    measured = event.record.measurement
    gain = "the default stays" if measured["default_kept"] else f"{measured['ratio']:.2f}x the default"
    return (
        f"{event.problem.describe()}: {number(measured['tuned_ms'])} ms, {gain}, "
        f"{measured['percent_of_copy']:.0f}% of copy bandwidth, "
        f"{number(measured.get('percent_of_limit'))}% of the limit ({ending})"
    )
