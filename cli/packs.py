"""`mhc-tune export`, `import` and `inspect`: kernels that travel, and what a folder or pack holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli.options import CacheOption, JsonOption, cache_at, existing_cache
from cli.output import say, show, show_json
from cli.render import records_table
from tiles.cache import KernelCache
from tiles.compile import Artifact, compile_kernel
from tiles.errors import BadInput
from tiles.pack import Pack, import_pack, write_pack
from tiles.record import Record, record_dict
from tiles.registry import kernel_spec

PATH_HELP = "A kernel cache folder or a .mhcpack file."


def export(
    out: Annotated[Path, typer.Argument(metavar="OUT.mhcpack", help="The file to write; replaced if it exists.")],
    cache: CacheOption = None,
) -> None:
    """Write all tuned kernels, with their compiled code, to one file.

    Training code loads it with mhc.load_kernels("OUT.mhcpack"): no compiler and no TileLang needed there.
    """
    source = existing_cache(cache)
    written = write_pack(source, out)
    warn(source.complaints)
    say(f"wrote {len(written)} kernels, {out.stat().st_size / 1024:.0f} KiB, to {out}")


def import_(
    path: Annotated[Path, typer.Argument(metavar="IN.mhcpack", help="A file that mhc-tune export wrote.")],
    cache: CacheOption = None,
    trust_binaries: Annotated[
        bool,
        typer.Option(
            "--trust-binaries",
            help="Copy the compiled code as it is. It runs with your rights: do this only for packs you trust.",
        ),
    ] = False,
) -> None:
    """Bring the kernels of a pack into your kernel cache.

    Tuned schedules are taken as data and compiled here, unless you trust the pack's binaries. Exits with 1 when a
    kernel could not be imported.
    """
    target = cache_at(cache)
    done = import_pack(path, target, trust_binaries=trust_binaries, recompile=_recompile)
    for record, how in done:
        say(f"{record.key.problem.describe()}: {how}")
    skipped = sum(how.startswith("skipped") for _, how in done)
    say(f"{len(done) - skipped} of {len(done)} kernels are in {target.folder}")
    if skipped:
        raise typer.Exit(1)


def inspect(
    path: Annotated[Path, typer.Argument(help=PATH_HELP)],
    json: JsonOption = False,
) -> None:
    """Show what a kernel cache folder or a pack holds: shapes, device, schedules and measured gains."""
    shelf = open_shelf(path)
    records = shelf.records()
    warn(shelf.complaints)
    if json:
        show_json({"path": str(path), "records": [_described(record) for record in records]})
    else:
        show(records_table(records, str(path)))


def open_shelf(path: Path) -> KernelCache | Pack:
    """The folder or pack at `path`; raises `BadInput` where there is none."""
    if path.is_dir():
        return KernelCache(path)
    if not path.exists():
        raise BadInput(f"PATH must be a kernel cache folder or a .mhcpack file, found nothing at {path}: check it")
    return Pack(path)


def warn(complaints: list[str]) -> None:
    """Say which entries of a cache were ignored, and why."""
    for complaint in complaints:
        say(f"warning: {complaint}")


def _recompile(record: Record) -> Artifact:
    problem = record.key.problem
    schedule = kernel_spec(problem.op, problem.direction).schedule_from(record.schedule)
    return compile_kernel(problem, schedule, record.key.device.target)


def _described(record: Record) -> dict[str, Any]:
    return record_dict(record) | {"digest": record.key.digest}
