"""`mhc-tune export`, `import` and `inspect`: kernels in one file, and the content of a cache folder or pack."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from cli.commands.pack_selection import HERE, Selection, compile_for_levels
from cli.commands.recompile import recompile
from cli.ui import options
from cli.ui.options import cache_at, cache_or_pack, existing_cache
from cli.ui.output import say, show, show_json, stdout_to_stderr, warn
from cli.ui.render import record_json, records_table
from cli.ui.shapes import shapes
from tiles.cache.record import Record
from tiles.compiler.compile import CUDA_TOOLKIT
from tiles.pack.import_pack import import_pack
from tiles.pack.pack import Pack, read_kernels, write_kernels
from tiles.pack.signing import own_key
from tiles.runtime.cuda_status import driver_needed


def export(
    out: Annotated[Path, typer.Argument(metavar="OUT.mhcpack", help="The file to write; replaced if it exists.")],
    cache: options.CacheOption = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Only kernels for cpu, cuda or one architecture. May repeat.")
    ] = None,
    device: Annotated[str, typer.Option(help=f"Only devices with this in their name; {HERE}: this one.")] = "",
    op: Annotated[list[str] | None, typer.Option(help="Only kernels of this op. May repeat.")] = None,
    model: options.ModelOption = None,
    streams: Annotated[list[int] | None, typer.Option(help="Only kernels of this stream count. May repeat.")] = None,
    width: Annotated[list[int] | None, typer.Option(help="Only kernels of this width. May repeat.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Only kernels of this dtype. May repeat.")] = None,
    isa: Annotated[
        list[str] | None,
        typer.Option(help="Also compile CPU schedules for this ISA level, such as x86-64-v3. May repeat."),
    ] = None,
    unsigned: options.UnsignedOption = False,
    json: options.JsonOption = False,
) -> None:
    """Write tuned kernels, with their compiled code, to one file.

    Training code loads it with mhc.load_kernels("OUT.mhcpack"), which needs neither a compiler nor TileLang. The file
    is signed with your key. Exits with 1 when a schedule does not compile for a level of --isa.
    """
    source = existing_cache(cache)
    chosen = _selection(target, device, op, model, streams, width, dtype).of(source.records())
    warn(source.complaints)
    kernels = list(read_kernels(source, chosen, to_sign=not unsigned))
    with stdout_to_stderr():
        compiled, failed = compile_for_levels(chosen, isa or ())
    written = write_kernels(out, [*kernels, *compiled], signed=not unsigned)
    for failure in failed:
        say(f"FAILED: {failure}")
    signer = None if unsigned else own_key(create=False)
    size = out.stat().st_size
    made = f", {len(compiled)} of them compiled for other ISA levels" if compiled else ""
    by = f"signed by {signer}" if signer else "not signed"
    say(f"wrote {len(written)} kernels{made}, {size / 1024:.0f} KiB, to {out}, {by}")
    if json:
        records = [record_json(record) for record in written]
        show_json({"path": str(out), "bytes": size, "signed_by": signer, "records": records, "failed": failed})
    if failed:
        raise typer.Exit(1)


def _selection(
    target: list[str] | None,
    device: str,
    op: list[str] | None,
    model: str | None,
    streams: list[int] | None,
    width: list[int] | None,
    dtype: list[str] | None,
) -> Selection:
    if model is None:
        return Selection(target or (), device, op or (), streams or (), width or (), dtype or ())
    return Selection(target or (), device, model=shapes(model, streams, width, dtype, op))


def import_(
    path: Annotated[Path, typer.Argument(metavar="IN.mhcpack", help="A file that mhc-tune export wrote.")],
    cache: options.CacheOption = None,
    trust_binaries: options.TrustOption = False,
    json: options.JsonOption = False,
) -> None:
    """Import the kernels of a pack into your kernel cache.

    Compiled code is copied if you or a trusted key (see mhc-tune keys) signed the pack; otherwise its schedules are
    compiled here. Exits with 1 when a kernel could not be imported.
    """
    target = cache_at(cache)
    with Pack(path, lazy=True) as pack, stdout_to_stderr():
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
        kernels = [{"how": how, "record": record_json(record)} for record, how in done]
        show_json({"path": str(path), "cache": str(target.folder), "why_untrusted": why, "kernels": kernels})
    if skipped:
        raise typer.Exit(1)


def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help=options.PATH_HELP)], json: options.JsonOption = False
) -> None:
    """Show the kernels of a cache folder or pack: shapes, device, schedules, gains and signature."""
    source = cache_or_pack(path)
    records = source.records()
    warn(source.complaints)
    about = {"created_by": source.created_by, "signed_by": source.signed_by} if isinstance(source, Pack) else {}
    if json:
        about |= {"why_untrusted": source.why_untrusted}
        show_json({"path": str(path), **about, "records": [record_json(record) for record in records]})
        return
    show(records_table(records, str(path)))
    elsewhere = sum("measured_on" in record.provenance for record in records)
    if elsewhere:
        say(f"{elsewhere} were compiled for other ISA levels than they were measured at (see provenance in --json)")
    say_drivers(records)
    warn_stale(records)
    if isinstance(source, Pack):
        say(f"written by {source.created_by}, signed by {source.signed_by or 'nobody'}")
    say(
        "its compiled code is trusted"
        if source.why_untrusted is None
        else f"its compiled code is not trusted: {source.why_untrusted}"
    )


def say_drivers(records: list[Record]) -> None:
    """Say which driver GPU kernels need, by the CUDA toolkit that built them; older records do not tell it."""
    toolkits = Counter(str(record.provenance.get(CUDA_TOOLKIT, "")) for record in records)
    for toolkit, count in sorted(toolkits.items()):
        if release := re.fullmatch(r"(\d{1,3})\.(\d)", toolkit):
            needed = driver_needed(1000 * int(release[1]) + 10 * int(release[2]))
            say(f"{count} GPU kernels are built with CUDA {toolkit}: they need {needed}")


def warn_stale(records: list[Record]) -> None:
    """Say how many kernels another version made, and why their code does not run."""
    stale = [why for record in records if (why := record.key.why_not_current)]
    if stale:
        say(f"{len(stale)} of {len(records)} schedules are compiled again where they are used: {stale[0]}")
