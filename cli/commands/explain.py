"""`mhc-tune explain`: which kernel a problem gets, and why not another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer

from cli.commands.packs import TrustOption
from cli.ui.options import CacheOption, JsonOption, existing_cache, known_choices
from cli.ui.output import say, show_json
from cli.ui.render import device_text, schedule_text
from mhc.dispatch.kernels import Kernels
from mhc.dispatch.resolve import Explanation, Resolver
from tiles.cache.cache import token_bucket
from tiles.errors import BadInput
from tiles.kernels.registry import kernel_specs
from tiles.kernels.spec import DTYPES, Direction, Problem
from tiles.target import detect_device

OPS = list(dict.fromkeys(op for op, _ in kernel_specs()))
DIRECTIONS = ("forward", "backward")


def explain(
    path: Annotated[
        Path | None, typer.Argument(metavar="[PATH]", help="What mhc.load_kernels takes: a folder or a .mhcpack file.")
    ] = None,
    op: Annotated[str, typer.Option("--op", help=f"One of {', '.join(OPS)}.")] = "merge",
    direction: Annotated[str, typer.Option("--direction", help="forward or backward.")] = "forward",
    streams: Annotated[int, typer.Option("--streams", help="Residual streams n.")] = 4,
    width: Annotated[int, typer.Option("--width", help="Model width C.")] = 2560,
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens a call (batch x sequence).")] = 4096,
    dtype: Annotated[str, typer.Option("--dtype", help="Of the streams: float32, bfloat16 or float16.")] = "bfloat16",
    cache: CacheOption = None,
    trust_binaries: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Show every kernel that could run a problem, in the order in which they are tried, and which one does.

    Looks in PATH, else in the kernel cache, as training code on this machine would. Nothing is compiled.
    """
    known_choices("op", [op], OPS)
    known_choices("direction", [direction], DIRECTIONS)
    known_choices("dtype", [dtype], DTYPES)
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
                "candidates": [_described(one) for one in found],
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


def _described(one: Explanation) -> dict[str, Any]:
    option = one.candidate
    schedule = None if option.schedule is None else dict(option.schedule)
    return {"kind": option.runs, "why": option.why, "runs": one.runs, "verdict": one.verdict, "schedule": schedule}
