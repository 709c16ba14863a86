"""`mhc-tune merge`: several packs or cache folders in one pack."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from cli.commands.packs import PATH_HELP, TrustOption, UnsignedOption, described, open_shelf, warn
from cli.ui.options import JsonOption
from cli.ui.output import say, show_json
from tiles.cache.record import Key, Record
from tiles.errors import BadInput
from tiles.pack.pack import read_kernels, write_kernels
from tiles.pack.zip_format import PackedKernel


def merge(
    out: Annotated[Path, typer.Argument(metavar="OUT.mhcpack", help="The file to write.")],
    paths: Annotated[list[Path], typer.Argument(metavar="IN...", help=PATH_HELP)],
    trust_binaries: TrustOption = False,
    unsigned: UnsignedOption = False,
    json: JsonOption = False,
) -> None:
    """Join packs or cache folders in one pack.

    Of kernels for the same op, shape, device and version, the one with the shorter measured time is taken, else the
    one named first. Your signature vouches for all of the code, so it must come from you, from a key that you have
    listed, or with --trust-binaries; or leave the signature out.
    """
    if out.exists() and not any(out.resolve() == path.resolve() for path in paths):
        raise BadInput(f"a merge replaces no file that it has not read, got {out}: name a new file, or name it twice")
    taken: dict[Key, tuple[Path, PackedKernel]] = {}
    twice = []
    for path in paths:
        shelf = open_shelf(path)
        for kernel in read_kernels(shelf, shelf.records(), to_sign=not (unsigned or trust_binaries)):
            key = kernel.record.key
            first, held = taken.setdefault(key, (path, kernel))
            if held is kernel:
                continue
            if tuned_ms(kernel.record) < tuned_ms(held.record):
                taken[key] = path, kernel
            left, kept = (first, path) if taken[key][0] is path else (path, first)
            twice.append({"problem": key.problem.describe(), "kept": str(kept), "left": str(left)})
        warn(shelf.complaints)
    if not taken:
        raise BadInput(f"a merge must hold a kernel, found none in {', '.join(map(str, paths))}: tune or export some")
    written = write_kernels(out, [kernel for _, kernel in taken.values()], signed=not unsigned)
    for choice in twice:
        say(f"{choice['problem']}: from {choice['kept']}, not from {choice['left']}")
    say(f"wrote {len(written)} kernels of {len(paths)} sources to {out}")
    if json:
        show_json({"path": str(out), "records": [described(record) for record in written], "twice": twice})


def tuned_ms(record: Record) -> float:
    """The measured time of a tuned kernel; infinite where nothing was measured."""
    return float(record.measurement.get("tuned_ms", math.inf))
