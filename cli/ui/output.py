"""Where things are printed: results on stdout, progress and messages on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

import typer
from rich.console import Console, RenderableType

messages = Console(stderr=True)

UNCUT = 200
"""Columns that a table may take where output goes to a file or a pipe, which no window's width should cut."""


def say(text: str) -> None:
    """One line for people, on stderr. What a terminal would obey (file names may hold it) is shown as `?`."""
    typer.echo("".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text), err=True)


def show(renderable: RenderableType, *, on_stderr: bool = False) -> None:
    """Print a table, on stdout unless that is kept for JSON."""
    console = Console(stderr=on_stderr, markup=False, emoji=False)  # names come from packs: they are text, no markup
    if not console.is_terminal:
        console.width = UNCUT
    console.print(renderable)


def show_json(values: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout; infinities and NaN are refused, as JSON has none."""
    typer.echo(json.dumps(values, indent=1, allow_nan=False))


@contextmanager
def stdout_kept_free(wanted: bool = True) -> Iterator[None]:
    """Send to stderr what libraries, compilers and child processes print to stdout, so that `--json` stays pure."""
    if not wanted:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
