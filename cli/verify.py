"""`mhc-tune verify`: are the kernels of a folder or pack whole, and right on this device?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autotune import verify as numerics
from cli.output import say
from cli.packs import PATH_HELP, open_shelf, warn
from tiles.cache import KernelCache, Key
from tiles.errors import BadInput
from tiles.pack import Pack
from tiles.record import Record
from tiles.registry import kernel_spec
from tiles.runtime import LoadedKernel, LoadError
from tiles.target import detect_device, why_cannot_run

MOST_TOKENS = 512
"""Tokens of the largest check: enough for several slices a thread, few enough for the float64 reference."""


class NotForHere(Exception):
    """A record is of another device or version: its numerics cannot be checked here; the text says why."""


def verify(path: Annotated[Path, typer.Argument(help=PATH_HELP)]) -> None:
    """Check every kernel's checksum, then run it here and compare with a float64 reference.

    This runs the compiled code that PATH holds. Kernels of another device or version get the checksum alone. Exits
    with 1 when a check fails.
    """
    shelf = open_shelf(path)
    records = shelf.records()
    warn(shelf.complaints)
    if not records and not shelf.complaints:
        raise BadInput(f"PATH must hold kernels, found none in {path}: run mhc-tune tune")
    failed = len(shelf.complaints)
    for record in records:
        name = record.key.problem.describe()
        try:
            _check(shelf, record)
        except NotForHere as why:
            say(f"{name}: checksum right, not run: {why}")
        except (numerics.WrongResult, LoadError, BadInput) as error:
            failed += 1
            say(f"{name}: FAILED: {error}")
        else:
            say(f"{name}: right")
    say(f"{len(records) + len(shelf.complaints)} kernels, {failed} failed")
    if failed:
        raise typer.Exit(1)


def _check(shelf: KernelCache | Pack, record: Record) -> None:
    """Raise what is wrong with one kernel; the checksum is checked on the way."""
    binary = shelf.binary_path(record)
    key, problem = record.key, record.key.problem
    ours = Key.of(problem, key.device)
    if (ours.sources, ours.toolchain) != (key.sources, key.toolchain):
        raise NotForHere("it is of another version of mhc-tune; tune it again")
    if key.device.kind == "cuda":
        raise NotForHere("this version runs kernels on CPUs only")
    if why := why_cannot_run(key.device.arch, detect_device("cpu")):
        raise NotForHere(why)
    tokens = min(problem.tokens, MOST_TOKENS)
    inputs = kernel_spec(problem.op, problem.direction).inputs(problem, tokens, 0)
    numerics.verify(LoadedKernel(binary, problem), inputs, tokens, seed=0)
