"""`mhc-tune report`: what studies found out, as one page that needs nothing else, or as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from cli.commands.packs import warn
from cli.report.charts import charts, contestants, require_matplotlib
from cli.report.studies import Found, find_studies
from cli.report.study_summary import IMPORTANCE, findings
from cli.ui.options import CacheOption, JsonOption, cache_at
from cli.ui.output import messages, say, show_json
from cli.ui.render import SHAPE, number, schedule_text
from tiles.cache.cache import write_atomically
from tiles.errors import BadInput

CAPTIONS = {
    "history": "History: each trial's ratio with its bounds, and the best so far.",
    "intervals": "Against the default, with 95 % confidence intervals: the letters are those of the table below.",
    "roofline": "Roofline: the chosen schedule (dot) and all trials (dashes) under the device's limits.",
    "importance": f"Importance by {IMPORTANCE}.",
}


def report(
    study: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="STUDY",
            help="A study's name or its beginning, a journal file, or a cache folder; default: all studies.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The HTML page to write; replaced if it exists. Default: report.html."),
    ] = None,
    cache: CacheOption = None,
    storage: Annotated[
        str | None, typer.Option("--storage", help="Database URL where the trials are; default: the cache folder.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show what tuning found out: one HTML page with history, importance, roofline, intervals and all trials.

    With --json the same facts are printed as data, and the page is written only where --out names it.
    """
    page = out if out is not None or json else Path("report.html")
    if page is not None:
        require_matplotlib()
    found, complaints = find_studies(study or [], cache_at(cache), storage)
    facts = _facts(found, complaints, alone=len(found) + len(complaints) == 1)
    warn(complaints)
    if page is not None:
        _write(page, _page(facts, complaints))
        what = "1 study" if len(facts) == 1 else f"{len(facts)} studies"
        say(f"wrote {what}, {page.stat().st_size / 1024:.0f} KiB, to {page}")
    if json:
        show_json({"studies": facts, "left_out": complaints})


def _facts(found: Sequence[Found], complaints: list[str], *, alone: bool) -> list[dict[str, Any]]:
    """The findings of each study; among several, one that the tuner did not make is complained of and left out."""
    facts = []
    for one in found:
        try:
            facts.append(findings(one))
        except BadInput as error:
            if alone:
                raise
            complaints.append(str(error))
    if not facts:
        raise BadInput(f"there must be a study that can be read, got none: {complaints[0]}")
    return sorted(facts, key=_shape)


def _shape(study: Mapping[str, Any]) -> tuple[Any, ...]:
    """What studies are ordered by; those that do not say what they tune come last."""
    about = study["about"]
    return (0, *(about["problem"][name] for name in SHAPE)) if about else (1, study["title"])


def _page(facts: Sequence[Mapping[str, Any]], complaints: Sequence[str]) -> str:
    """The page's HTML. What comes from files is escaped; charts are ours."""
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
            "contestants": contestants(study),
            "tunables": list(dict.fromkeys(name for trial in study["trials"] for name in trial["schedule"])),
            "default": study["about"] and study["about"]["default"],
            "ordered": _fastest_first(study["trials"]),
        }
        for place, study in enumerate(track(facts, "charts", console=messages, transient=True, disable=silent))
    ]
    title = f"Tuned: {studies[0]['title']}" if len(studies) == 1 else "Tuned kernels"
    written = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
    template = environment.get_template("report.html")
    return template.render(title=title, written=written, studies=studies, complaints=complaints, captions=CAPTIONS)


def _fastest_first(trials: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """All but those that were cut short, which say nothing."""
    telling = (trial for trial in trials if trial["state"] != "cut short")
    return sorted(telling, key=lambda trial: (-trial.get("ratio", 0.0), trial["number"]))


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
