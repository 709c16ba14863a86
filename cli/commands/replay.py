"""`mhc-tune replay`: search samplers compared on recorded spaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from autotune.recorded.replay import replay_all
from autotune.recorded.samplers import SAMPLERS
from cli.ui.options import JsonOption, check_choices
from cli.ui.output import show, show_json
from cli.ui.progress import progress_bars
from cli.ui.render import number, table

DEFAULT_SAMPLERS = ["ours", "tpe", "random", "local"]


def replay(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="From mhc-tune record, or Kernel Tuner caches, or T4.")
    ],
    sampler: Annotated[
        list[str],
        typer.Option(
            "--sampler", help=f"Sampler: {', '.join(SAMPLERS)}. May repeat.", show_default="all but gp and gp-pool"
        ),
    ] = DEFAULT_SAMPLERS,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Configurations to try, failing ones included.")] = 100,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Searches per file and sampler.")] = 25,
    json: JsonOption = False,
) -> None:
    """Compare search samplers on recorded spaces: how close they come to the optimum, and how soon.

    Nothing is compiled or measured. A search starts at the default schedule, or at a random member where the file has
    none. The score is 0 for random search (its exact expectation) and 1 for finding the optimum at once.
    """
    check_choices("sampler", sampler, list(SAMPLERS))
    samplers = list(dict.fromkeys(sampler))
    bars = progress_bars("searches")
    bar = bars.add_task("", total=len(files) * len(samplers) * seeds)
    with bars:
        rows = replay_all(files, samplers, trials, seeds, lambda: bars.advance(bar))
    if json:
        show_json({"trials": trials, "seeds": seeds, "results": rows})
    else:
        show(replay_table(rows))


def replay_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row per space and sampler."""
    title = (
        f"time found / optimum over {rows[0]['seeds']} seeds; trials to 95 % and 99 % of the optimum's speed, medians"
    )
    found = ("members", "trials", "median", "quartiles", "to 95 %", "to 99 %", "score")
    numbers = (*found, "repeated", "outside", "ms/trial")
    made = table(title, ("space", "sampler"), numbers)
    for row in rows:
        found = row["found"]
        made.add_row(
            row["space"],
            row["sampler"],
            str(row["members"]),
            str(row["trials"]),
            f"{found['median']:.3f}",
            f"{found['low']:.3f}-{found['high']:.3f}",
            *(str(row[name] or "not reached") for name in ("to_95", "to_99")),
            f"{row['score']:.2f}",
            str(row["duplicates"]),
            str(row["outside"]),
            number(row["ms_per_trial"]),
        )
    return made
