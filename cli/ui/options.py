"""Command-line options that several commands share, and the problems, devices and caches that they name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated, cast

import typer

from cli.ui.model_config import known_models
from tiles.cache.cache import KernelCache, default_folder
from tiles.errors import BadInput
from tiles.kernels.registry import kernel_specs
from tiles.kernels.spec import DTYPES, IDENTITY, NORM, PAPER_ROUNDS, Direction, Problem
from tiles.pack.pack import Pack
from tiles.target import Device, cuda_available, detect_device, parse_target, why_cannot_run

KERNEL_OPS = list(dict.fromkeys(op for op, _ in kernel_specs()))
MIXING_OPS = [op for op in KERNEL_OPS if not op.endswith(IDENTITY) and NORM not in op]
"""Those of maps that mix streams, as all models have them but Hunyuan-V4, and of sublayers that have their norm inside;
what is worked on where no op is named."""

INTERRUPTED = 130
"""Exit code after Ctrl-C."""

DEFAULT_STREAMS, DEFAULT_WIDTH, DEFAULT_TOKENS, DEFAULT_DTYPE = [4], [2560], [4096], ["bfloat16"]
DTYPE_HELP = f"Dtype of the streams: {', '.join(DTYPES)}."
TOKENS_HELP = "Tokens per call (batch x sequence)."
PATH_HELP = "A kernel cache folder or a .mhcpack file."

TargetOption = Annotated[
    str, typer.Option("--target", help="Device to run on: auto, cpu, cuda, or one architecture such as cuda:sm_90a.")
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="Take streams, width, dtype, Sinkhorn rounds and the ops that matter from a model: the config.json of a "
        f"Hugging Face model, a folder with one, or one of {', '.join(known_models())}.",
    ),
]
StreamsOption = Annotated[
    list[int] | None,
    typer.Option("--streams", help="Residual streams n, 1 to 16. May repeat.", show_default=str(DEFAULT_STREAMS[0])),
]
WidthOption = Annotated[
    list[int] | None,
    typer.Option("--width", help="Model width C, a multiple of 8. May repeat.", show_default=str(DEFAULT_WIDTH[0])),
]
TokensOption = Annotated[
    list[int],
    typer.Option("--tokens", help=f"{TOKENS_HELP} Kernels take any count; this is the one measured. May repeat."),
]
DtypeOption = Annotated[
    list[str] | None,
    typer.Option("--dtype", help=f"{DTYPE_HELP} May repeat.", show_default=DEFAULT_DTYPE[0]),
]
OpOption = Annotated[
    list[str] | None,
    typer.Option("--op", help=f"Op: {', '.join(KERNEL_OPS)}. May repeat.", show_default="all but *_identity, *_norm"),
]
CacheOption = Annotated[
    Path | None,
    typer.Option("--cache", help="Kernel cache folder.", show_default="$MHC_TUNE_CACHE, else the user cache folder"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else, on stdout.")]
UnsignedOption = Annotated[bool, typer.Option("--unsigned", help="Do not sign the pack (see mhc-tune keys).")]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-binaries",
        help="Accept compiled code that neither you nor a trusted key signed. It runs with your permissions.",
    ),
]


def cache_at(folder: Path | None) -> KernelCache:
    """The kernel cache that `--cache` names."""
    return KernelCache(folder if folder is not None else default_folder())


def existing_cache(folder: Path | None) -> KernelCache:
    """Like `cache_at`; raises `BadInput` where it holds no kernel yet."""
    cache = cache_at(folder)
    if not cache.records():
        raise BadInput(f"the kernel cache must hold tuned kernels, found none in {cache.folder}: run mhc-tune tune")
    return cache


def cache_or_pack(path: Path) -> KernelCache | Pack:
    """Open the cache folder or pack at `path`; raises `BadInput` where there is none."""
    if path.is_dir():
        return KernelCache(path)
    if not path.exists():
        raise BadInput(f"PATH must be a kernel cache folder or a .mhcpack file, found nothing at {path}: check it")
    return Pack(path)


def measured_device(target: str) -> Device:
    """The device of this machine that `--target` names, at the requested ISA level.

    Raises `BadInput` where code for that target does not run here.
    """
    wanted = parse_target(target)
    if wanted.kind == "cuda" and not cuda_available():
        raise BadInput(f"measuring needs a visible NVIDIA GPU, got {target} and found none: use cpu, or run this there")
    device = detect_device(wanted.kind)
    why = why_cannot_run(wanted.arch, device)
    if why:
        raise BadInput(f"measuring needs a device that runs {wanted.arch}, got {target}, {why}: run this command there")
    return replace(device, arch=wanted.arch)


def check_choices(option: str, given: Sequence[str], known: Sequence[str]) -> None:
    """Raise `BadInput` for a value that an option does not take."""
    for value in given:
        if value not in known:
            raise BadInput(f"{option} must be one of {', '.join(known)}, got {value}: choose one of them")


def problems(
    streams: Sequence[int],
    widths: Sequence[int],
    tokens: Sequence[int],
    dtypes: Sequence[str],
    ops: Sequence[str] = MIXING_OPS,
    rounds: int = PAPER_ROUNDS,
) -> list[Problem]:
    """Every kernel of `ops` at every combination; problems with the same generated code and tokens appear once."""
    found: dict[Problem, None] = {}
    for n, width, count, dtype in product(streams, widths, tokens, dtypes):
        for (op, direction), spec in kernel_specs().items():
            if op not in ops:
                continue
            problem = Problem(op, cast(Direction, direction), n, width, dtype, count, rounds)
            found[replace(spec.canonical(problem), tokens=count)] = None
    return list(found)
