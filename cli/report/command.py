"""`mhc-tune report`: the results of studies as one self-contained HTML page, or as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from cli.report.charts import charts, finalists, require_matplotlib
from cli.report.studies import StoredStudy, find_studies
from cli.report.study_summary import IMPORTANCE, summarize
from cli.ui.options import CacheOption, JsonOption, cache_at
from cli.ui.output import messages, say, show_json, warn
from cli.ui.render import SHAPE, number, schedule_text
from tiles.cache.cache import write_atomically
from tiles.errors import BadInput

CAPTIONS = {
    "history": "History: each trial's ratio with its confidence interval, and the best so far.",
    "intervals": "Ratio to the default with 95 % confidence intervals; letters as in the table below.",
    "roofline": "Roofline: the chosen schedule (dot) and all trials (dashes) below the device's limits.",
    "importance": f"Importance by {IMPORTANCE}.",
}


def report(
    study: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="STUDY",
            help="A study's name or the beginning of it, a journal file, or a cache folder.",
            show_default="all studies",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The HTML page to write; replaced if it exists.", show_default="report.html"),
    ] = None,
    cache: CacheOption = None,
    storage: Annotated[
        str | None, typer.Option("--storage", help="Database URL of the studies.", show_default="the cache folder")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Write an HTML page about tuning studies: trials, intervals, roofline and importance of tunables.

    With --json the same data are printed, and the page is written only if --out is given. The page's charts need
    matplotlib.
    """
    page = out if out is not None or json else Path("report.html")
    if page is not None:
        require_matplotlib()
    stored, warnings = find_studies(study or [], cache_at(cache), storage)
    summaries = _summaries(stored, warnings, alone=len(stored) + len(warnings) == 1)
    warn(warnings)
    if page is not None:
        _write(page, _page(summaries, warnings))
        what = "1 study" if len(summaries) == 1 else f"{len(summaries)} studies"
        say(f"wrote {what}, {page.stat().st_size / 1024:.0f} KiB, to {page}")
    if json:
        show_json({"studies": summaries, "left_out": warnings})


def _summaries(stored: Sequence[StoredStudy], warnings: list[str], *, alone: bool) -> list[dict[str, Any]]:
    """The summaries, sorted by shape. A study that the tuner did not make raises if `alone`, else it is left out."""
    summaries = []
    for one in stored:
        try:
            summaries.append(summarize(one))
        except BadInput as error:
            if alone:
                raise
            warnings.append(str(error))
    if not summaries:
        raise BadInput(f"a report needs a study that can be read, got none: {warnings[0]}")
    return sorted(summaries, key=_shape)


def _shape(study: Mapping[str, Any]) -> tuple[Any, ...]:
    """The sort key of a study; those without metadata come last."""
    about = study["about"]
    return (0, *(about["problem"][name] for name in SHAPE)) if about else (1, study["title"])


def _page(summaries: Sequence[Mapping[str, Any]], warnings: Sequence[str]) -> str:
    """The page's HTML. Text from files is escaped; charts are made here."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "times": _times, "percent": _percent, "schedule": schedule_text}
    silent = not messages.is_terminal
    studies = [
        {
            **study,
            "charts": {name: Markup(svg) for name, svg in charts(study, place).items()},
            "finalists": finalists(study),
            "tunables": list(dict.fromkeys(name for trial in study["trials"] for name in trial["schedule"])),
            "default": study["about"] and study["about"]["default"],
            "ordered": _fastest_first(study["trials"]),
        }
        for place, study in enumerate(track(summaries, "charts", console=messages, transient=True, disable=silent))
    ]
    title = f"Tuned: {studies[0]['title']}" if len(studies) == 1 else "Tuned kernels"
    written = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
    template = environment.get_template("report.html")
    return template.render(title=title, written=written, studies=studies, warnings=warnings, captions=CAPTIONS)


def _fastest_first(trials: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """All trials except interrupted ones, which have no result."""
    ended = (trial for trial in trials if trial["state"] != "cut short")
    return sorted(ended, key=lambda trial: (-trial.get("ratio", 0.0), trial["number"]))


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _write(path: Path, page: str) -> None:
    try:
        write_atomically(path, page.encode())
    except OSError as error:
        raise BadInput(
            f"--out must be a file that can be written, got {path} ({error.strerror}): choose another"
        ) from error
