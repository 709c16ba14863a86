"""`mhc-tune export`, `import` and `inspect`: kernels that travel, and what a folder or pack holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli.commands.pack_selection import HERE, Selection, for_levels
from cli.commands.recompile import recompile
from cli.ui.options import CacheOption, JsonOption, cache_at, existing_cache
from cli.ui.output import say, show, show_json, stdout_kept_free
from cli.ui.render import records_table
from tiles.cache.cache import KernelCache
from tiles.cache.record import Record, record_dict
from tiles.errors import BadInput
from tiles.pack.import_pack import import_pack
from tiles.pack.pack import Pack, read_kernels, write_kernels
from tiles.pack.signing import own_key

PATH_HELP = "A kernel cache folder or a .mhcpack file."
TRUST_HELP = "Take compiled code that is not signed by you or a listed key. It runs with your rights: know its maker."

UnsignedOption = Annotated[bool, typer.Option("--unsigned", help="Leave out your signature (see mhc-tune keys).")]
TrustOption = Annotated[bool, typer.Option("--trust-binaries", help=TRUST_HELP)]


def export(
    out: Annotated[Path, typer.Argument(metavar="OUT.mhcpack", help="The file to write; replaced if it exists.")],
    cache: CacheOption = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Take kernels for cpu, cuda or one architecture only. May repeat.")
    ] = None,
    device: Annotated[str, typer.Option(help=f"Take those of devices with this in their name, or {HERE}.")] = "",
    op: Annotated[list[str] | None, typer.Option(help="Take those of one op only. May repeat.")] = None,
    streams: Annotated[list[int] | None, typer.Option(help="Take those of one stream count. May repeat.")] = None,
    width: Annotated[list[int] | None, typer.Option(help="Take those of one width. May repeat.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Take those of one dtype. May repeat.")] = None,
    isa: Annotated[
        list[str] | None,
        typer.Option(help="Compile CPU schedules for this level too (x86-64-v3, say), for other machines. May repeat."),
    ] = None,
    unsigned: UnsignedOption = False,
    json: JsonOption = False,
) -> None:
    """Write tuned kernels, with their compiled code, to one file.

    Training code loads it with mhc.load_kernels("OUT.mhcpack"): no compiler and no TileLang needed there. The file is
    signed with your key. Exits with 1 when a schedule does not compile for a level of --isa.
    """
    source = existing_cache(cache)
    chosen = Selection(target or (), device, op or (), streams or (), width or (), dtype or ()).of(source.records())
    warn(source.complaints)
    kernels = list(read_kernels(source, chosen, to_sign=not unsigned))
    with stdout_kept_free():
        compiled, failed = for_levels(chosen, isa or ())
    written = write_kernels(out, [*kernels, *compiled], signed=not unsigned)
    for failure in failed:
        say(f"FAILED: {failure}")
    signer = None if unsigned else own_key(create=False)
    size = out.stat().st_size
    made = f", {len(compiled)} of them compiled for other levels" if compiled else ""
    by = f"signed by {signer}" if signer else "not signed"
    say(f"wrote {len(written)} kernels{made}, {size / 1024:.0f} KiB, to {out}, {by}")
    if json:
        records = [described(record) for record in written]
        show_json({"path": str(out), "bytes": size, "signed_by": signer, "records": records, "failed": failed})
    if failed:
        raise typer.Exit(1)


def import_(
    path: Annotated[Path, typer.Argument(metavar="IN.mhcpack", help="A file that mhc-tune export wrote.")],
    cache: CacheOption = None,
    trust_binaries: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Bring the kernels of a pack into your kernel cache.

    Tuned schedules are taken as data and compiled here. Compiled code is copied where you or a key that you have
    listed (mhc-tune keys) signed the pack. Exits with 1 when a kernel could not be imported.
    """
    target = cache_at(cache)
    with Pack(path, lazy=True) as pack, stdout_kept_free():
        why = pack.why_untrusted
        if why and not trust_binaries:
            say(f"{path.name}: its schedules are compiled here: {why}")
        else:
            warn_stale(pack.records())
        done = import_pack(pack, target, trust_binaries=trust_binaries, recompile=recompile)
    for record, how in done:
        say(f"{record.key.problem.describe()} ({record.key.device.arch}): {how}")
    skipped = sum(how.startswith("skipped") for _, how in done)
    say(f"{len(done) - skipped} of {len(done)} kernels are in {target.folder}")
    if json:
        kernels = [{"how": how, "record": described(record)} for record, how in done]
        show_json({"path": str(path), "cache": str(target.folder), "why_untrusted": why, "kernels": kernels})
    if skipped:
        raise typer.Exit(1)


def inspect(
    path: Annotated[Path, typer.Argument(help=PATH_HELP)],
    json: JsonOption = False,
) -> None:
    """Show what a kernel cache folder or a pack holds: shapes, device, schedules, measured gains, and who signed it."""
    shelf = open_shelf(path)
    records = shelf.records()
    warn(shelf.complaints)
    about = {"created_by": shelf.created_by, "signed_by": shelf.signed_by} if isinstance(shelf, Pack) else {}
    if json:
        about |= {"why_untrusted": shelf.why_untrusted}
        show_json({"path": str(path), **about, "records": [described(record) for record in records]})
        return
    show(records_table(records, str(path)))
    elsewhere = sum("measured_on" in record.provenance for record in records)
    if elsewhere:
        say(f"{elsewhere} were compiled for other levels than they were measured at (see provenance in --json)")
    warn_stale(records)
    if isinstance(shelf, Pack):
        say(f"written by {shelf.created_by}, signed by {shelf.signed_by or 'nobody'}")
    say("its code may run" if shelf.why_untrusted is None else f"its code is not run unasked: {shelf.why_untrusted}")


def open_shelf(path: Path, *, lazy: bool = False) -> KernelCache | Pack:
    """The folder or pack at `path`; raises `BadInput` where there is none."""
    if path.is_dir():
        return KernelCache(path, lazy=lazy)
    if not path.exists():
        raise BadInput(f"PATH must be a kernel cache folder or a .mhcpack file, found nothing at {path}: check it")
    return Pack(path, lazy=lazy)


def warn(complaints: list[str]) -> None:
    """Say which entries of a cache were ignored, and why."""
    for complaint in complaints:
        say(f"warning: {complaint}")


def warn_stale(records: list[Record]) -> None:
    """Say how many kernels are of another version, and why their code does not run."""
    stale = [why for record in records if (why := record.key.why_not_current)]
    if stale:
        say(f"{len(stale)} of {len(records)} schedules are compiled again where they are used: {stale[0]}")


def described(record: Record) -> dict[str, Any]:
    """A record as plain data, with the name of its files."""
    return record_dict(record) | {"digest": record.key.digest}
