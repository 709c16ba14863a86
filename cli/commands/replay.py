"""`mhc-tune replay`: searches against recorded spaces, ours beside others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from autotune.recorded.replay import replay_all
from autotune.recorded.samplers import SAMPLERS
from cli.ui.options import JsonOption, known_choices
from cli.ui.output import messages, show, show_json
from cli.ui.render import number, table

USUAL = ["ours", "tpe", "random", "local"]


def replay(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Of mhc-tune record, Kernel Tuner caches, or T4.")
    ],
    sampler: Annotated[
        list[str], typer.Option("--sampler", help=f"Of {', '.join(SAMPLERS)}; default: all but gp. May repeat.")
    ] = USUAL,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Configurations to try, failing ones included.")] = 100,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Searches for each file and sampler.")] = 25,
    json: JsonOption = False,
) -> None:
    """Replay searches on recorded spaces: how near to the optimum they come, and how soon.

    Nothing is compiled or measured. A search starts at the default schedule, or at a random member where the file knows
    none. The score is 0 for random search (its exact expectation) and 1 for finding the optimum at once.
    """
    known_choices("sampler", sampler, list(SAMPLERS))
    samplers = list(dict.fromkeys(sampler))
    bars = Progress(
        TextColumn("searches"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=messages,
        disable=not messages.is_terminal,
        transient=True,
    )
    bar = bars.add_task("", total=len(files) * len(samplers) * seeds)
    with bars:
        rows = replay_all(files, samplers, trials, seeds, lambda: bars.advance(bar))
    if json:
        show_json({"trials": trials, "seeds": seeds, "results": rows})
    else:
        show(replay_table(rows))


def replay_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row a space and sampler."""
    title = (
        f"time found / optimum over {rows[0]['seeds']} seeds; trials to 95 % and 99 % of the optimum's speed, medians"
    )
    numbers = (
        "members",
        "trials",
        "median",
        "quartiles",
        "to 95 %",
        "to 99 %",
        "score",
        "repeated",
        "outside",
        "ms/trial",
    )
    made = table(title, ("space", "sampler"), numbers)
    for row in rows:
        found = row["found"]
        made.add_row(
            row["space"].replace("[", "\\["),
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
