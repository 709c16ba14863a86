"""`mhc-tune explain`: the kernel that runs for a problem, and why the other candidates do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import torch
import typer

from cli.ui import options
from cli.ui.options import check_choices, existing_cache
from cli.ui.output import say, show_json
from cli.ui.render import device_text, schedule_text
from cli.ui.shapes import shapes
from mhc.dispatch.kernels import Kernels
from mhc.dispatch.resolve import Explanation, Resolver
from tiles.cache.cache import token_bucket
from tiles.errors import BadInput
from tiles.kernels.spec import EVERY_TOKENS, Direction, Problem
from tiles.target import detect_device

T = TypeVar("T")

DIRECTIONS = ("forward", "backward")


def explain(
    path: Annotated[
        Path | None, typer.Argument(metavar="[PATH]", help="A folder or .mhcpack file, as for mhc.load_kernels.")
    ] = None,
    op: Annotated[
        str | None,
        typer.Option(
            "--op",
            help=f"One of {', '.join(options.KERNEL_OPS)}.",
            show_default="merge, or what a boundary of --model runs",
        ),
    ] = None,
    direction: Annotated[str, typer.Option("--direction", help=f"One of {', '.join(DIRECTIONS)}.")] = "forward",
    model: options.ModelOption = None,
    streams: Annotated[int | None, typer.Option("--streams", help="Residual streams n.", show_default="4")] = None,
    width: Annotated[int | None, typer.Option("--width", help="Model width C.", show_default="2560")] = None,
    tokens: Annotated[int, typer.Option("--tokens", help=options.TOKENS_HELP)] = 4096,
    dtype: Annotated[str | None, typer.Option("--dtype", help=options.DTYPE_HELP, show_default="bfloat16")] = None,
    cache: options.CacheOption = None,
    trust_binaries: options.TrustOption = False,
    batch_invariant: Annotated[
        bool,
        typer.Option("--batch-invariant", help="Explain what runs for every token count; see mhc.batch_invariant."),
    ] = False,
    json: options.JsonOption = False,
) -> None:
    """Show which kernel would run for a problem on this machine, and why the other candidates would not.

    Candidates come from PATH, or else from the kernel cache, in the order in which they are tried. Nothing is compiled.
    """
    wanted = shapes(model, _one(streams), _one(width), _one(dtype), _one(op))
    check_choices("direction", [direction], DIRECTIONS)
    if path is not None and cache is not None:
        raise BadInput(f"explain takes PATH or --cache, got {path} and {cache}: leave one out")
    op = op or (wanted.model.boundary if wanted.model else "merge")
    shape = wanted.streams[0], wanted.widths[0], wanted.dtypes[0]
    problem = Problem(op, cast(Direction, direction), *shape, tokens, wanted.rounds)
    problem = replace(problem, tokens=EVERY_TOKENS if batch_invariant else token_bucket(tokens))
    if cache is not None:
        path = existing_cache(cache).folder
    resolver = _resolver(path, trust_binaries)
    found = resolver.explain(problem, torch.device("cpu"))
    chosen = next(one for one in found if one.runs)
    if json:
        show_json(
            {
                "problem": problem.describe(),
                "runs": chosen.candidate.runs,
                "candidates": [_as_json(one) for one in found],
            }
        )
        return
    typer.echo(f"{problem.describe()} on {device_text(detect_device('cpu'))}")
    for place, one in enumerate(found, start=1):
        arrow = "->" if one.runs else "  "
        typer.echo(f"{arrow} {place}. {one.candidate.runs:<11}{one.candidate.why}")
        for line in (one.verdict, _schedule(one)):
            typer.echo(f"{'':17}{line}")
    if chosen.candidate.runs in ("default", "reference") or chosen.candidate.sibling:
        say(resolver.remedy(problem))


def _one(value: T | None) -> list[T] | None:
    return None if value is None else [value]


def _resolver(path: Path | None, trust_binaries: bool) -> Resolver:
    if path is not None:
        return Kernels.from_path(path, trust_binaries=trust_binaries).resolver
    return Kernels.from_default_folder().resolver


def _schedule(one: Explanation) -> str:
    return schedule_text(one.candidate.schedule) if one.candidate.schedule is not None else "no schedule"


def _as_json(one: Explanation) -> dict[str, Any]:
    found = one.candidate
    schedule = None if found.schedule is None else dict(found.schedule)
    return {"kind": found.runs, "why": found.why, "runs": one.runs, "verdict": one.verdict, "schedule": schedule}
