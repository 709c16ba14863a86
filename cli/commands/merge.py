"""`mhc-tune merge`: one pack from several packs or cache folders."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from cli.ui.options import PATH_HELP, JsonOption, TrustOption, UnsignedOption, cache_or_pack
from cli.ui.output import say, show_json, warn
from cli.ui.render import record_json
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
    """Merge packs or cache folders into one pack.

    Among kernels of the same op, shape, device and version, the one with the shorter measured time is kept, or else the
    first. You sign all of the code, so it must be your own or signed by a trusted key (see mhc-tune keys); otherwise
    say --trust-binaries or --unsigned.
    """
    if out.exists() and not any(out.resolve() == path.resolve() for path in paths):
        raise BadInput(
            f"a merge must not overwrite a file that it does not read, got {out}: name a new file, or list it too"
        )
    taken: dict[Key, tuple[Path, PackedKernel]] = {}
    twice = []
    for path in paths:
        source = cache_or_pack(path)
        for kernel in read_kernels(source, source.records(), to_sign=not (unsigned or trust_binaries)):
            key = kernel.record.key
            first, held = taken.setdefault(key, (path, kernel))
            if held is kernel:
                continue
            if tuned_ms(kernel.record) < tuned_ms(held.record):
                taken[key] = path, kernel
            left, kept = (first, path) if taken[key][0] is path else (path, first)
            twice.append({"problem": key.problem.describe(), "kept": str(kept), "left": str(left)})
        warn(source.complaints)
    if not taken:
        raise BadInput(f"a merge needs a kernel, found none in {', '.join(map(str, paths))}: tune or export some")
    written = write_kernels(out, [kernel for _, kernel in taken.values()], signed=not unsigned)
    for choice in twice:
        say(f"{choice['problem']}: from {choice['kept']}, not from {choice['left']}")
    say(f"wrote {len(written)} kernels of {len(paths)} sources to {out}")
    if json:
        show_json({"path": str(out), "records": [record_json(record) for record in written], "twice": twice})


def tuned_ms(record: Record) -> float:
    """The measured time of a tuned kernel; infinite where nothing was measured."""
    return float(record.measurement.get("tuned_ms", math.inf))
