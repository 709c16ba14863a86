"""`mhc-tune prune`: removal of unused files from a kernel cache."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.ui.options import CacheOption, JsonOption
from cli.ui.output import say, show_json
from tiles.cache.cache import default_folder
from tiles.cache.prune import GRACE_SECONDS
from tiles.cache.prune import prune as prune_folder


def prune(
    cache: CacheOption = None,
    stale: Annotated[
        bool,
        typer.Option(
            "--stale", help="Also remove kernels made with other sources or another TileLang, with their schedules."
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")] = False,
    json: JsonOption = False,
) -> None:
    """Remove superseded binaries, corrupt entries and left-over temporary files from a kernel cache.

    Files of valid records stay, and so does everything written within the last hour, as other processes may be using
    the cache.
    """
    folder = cache if cache is not None else default_folder()
    removed = prune_folder(folder, stale=stale, dry_run=dry_run)
    freed = sum(file.size for file in removed)
    if json:
        files = [{"path": str(file.path), "bytes": file.size, "why": file.why} for file in removed]
        show_json({"cache": str(folder), "dry_run": dry_run, "bytes": freed, "files": files})
        return
    for file in removed:
        say(f"{file.path.relative_to(folder)}: {file.why}")
    would = "would free" if dry_run else "freed"
    older = f"files younger than {GRACE_SECONDS / 60:.0f} minutes stay"
    say(f"{would} {freed / 1024:.0f} KiB in {len(removed)} files of {folder}; {older}")
