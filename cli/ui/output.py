"""Output of the commands: results on stdout; progress, warnings and messages on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli.ui.fit import fitted, full_width

messages = Console(stderr=True)


def say(text: str) -> None:
    """Print a message on stderr. Control characters, which file names may contain, are shown as `?`."""
    typer.echo("".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text), err=True)


def warn(warnings: Iterable[str]) -> None:
    """Print warnings, such as the entries of a cache that were ignored and why, on stderr."""
    for warning in warnings:
        say(f"warning: {warning}")


def show(table: Table, *, on_stderr: bool = False) -> None:
    """Print a whole table, on stdout unless that is kept for JSON: in a file or a pipe as wide as it needs."""
    console = Console(stderr=on_stderr, markup=False, emoji=False)  # names from packs are plain text
    above, below = (str(text or "") for text in (table.title, table.caption))
    table.title = table.caption = None  # beside the table, as they may be wider
    if not console.is_terminal:
        console.width = max(full_width(table), *map(cell_len, (*above.splitlines(), *below.splitlines())))
    with console.capture() as captured:
        for part in (Text(above, style="table.title"), fitted(table, console.width), Text(below)):
            console.print(part)
    typer.echo("\n".join(line.rstrip() for line in captured.get().strip("\n").splitlines()), err=on_stderr)


def show_json(values: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout; raises `ValueError` for infinities and NaN, which JSON does not have."""
    typer.echo(json.dumps(values, indent=1, allow_nan=False))


@contextmanager
def stdout_to_stderr(enabled: bool = True) -> Iterator[None]:
    """Redirect what libraries, compilers and child processes print on stdout, so that `--json` output stays valid."""
    if not enabled:
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
