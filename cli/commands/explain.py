"""`mhc-tune explain`: the kernel that runs for a problem, and why the other candidates do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer

from cli.ui import options
from cli.ui.options import check_choices, existing_cache
from cli.ui.output import say, show_json
from cli.ui.render import device_text, schedule_text
from mhc.dispatch.kernels import Kernels
from mhc.dispatch.resolve import Explanation, Resolver
from tiles.cache.cache import token_bucket
from tiles.errors import BadInput
from tiles.kernels.spec import DTYPES, Direction, Problem
from tiles.target import detect_device

DIRECTIONS = ("forward", "backward")


def explain(
    path: Annotated[
        Path | None, typer.Argument(metavar="[PATH]", help="A folder or .mhcpack file, as for mhc.load_kernels.")
    ] = None,
    op: Annotated[str, typer.Option("--op", help=f"One of {', '.join(options.KERNEL_OPS)}.")] = "merge",
    direction: Annotated[str, typer.Option("--direction", help=f"One of {', '.join(DIRECTIONS)}.")] = "forward",
    streams: Annotated[int, typer.Option("--streams", help="Residual streams n.")] = 4,
    width: Annotated[int, typer.Option("--width", help="Model width C.")] = 2560,
    tokens: Annotated[int, typer.Option("--tokens", help=options.TOKENS_HELP)] = 4096,
    dtype: Annotated[str, typer.Option("--dtype", help=options.DTYPE_HELP)] = "bfloat16",
    cache: options.CacheOption = None,
    trust_binaries: options.TrustOption = False,
    json: options.JsonOption = False,
) -> None:
    """Show which kernel would run for a problem on this machine, and why the other candidates would not.

    Candidates come from PATH, or else from the kernel cache, in the order in which they are tried. Nothing is compiled.
    """
    check_choices("op", [op], options.KERNEL_OPS)
    check_choices("direction", [direction], DIRECTIONS)
    check_choices("dtype", [dtype], DTYPES)
    if path is not None and cache is not None:
        raise BadInput(f"explain takes PATH or --cache, got {path} and {cache}: leave one out")
    problem = Problem(op, cast(Direction, direction), streams, width, dtype, tokens)
    problem = replace(problem, tokens=token_bucket(tokens))
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
