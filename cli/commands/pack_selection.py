"""Selection of the kernels that an export takes, and the same schedules compiled for other ISA levels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cli.commands.recompile import recompile
from cli.ui.options import KERNEL_OPS, check_choices
from cli.ui.shapes import Shapes
from tiles.cache.record import Key, Record, check_schedule
from tiles.errors import BadInput
from tiles.kernels.spec import DTYPES
from tiles.pack.zip_format import PackedKernel
from tiles.target import X86_LEVELS, detect_device

HERE = "current"
"""The `--device` that means the devices of this machine."""


@dataclass(frozen=True)
class Selection:
    """Filters of an export; an empty one takes all. `target`: cpu, cuda, or one architecture such as cuda:sm_90a.

    `model`: all kernels of a model's shapes, also those whose code does not depend on its width or dtype.
    """

    target: Sequence[str] = ()
    device: str = ""
    op: Sequence[str] = ()
    streams: Sequence[int] = ()
    width: Sequence[int] = ()
    dtype: Sequence[str] = ()
    model: Shapes | None = None

    def of(self, records: Sequence[Record]) -> list[Record]:
        """The records that pass all filters; raises `BadInput` where there is none."""
        check_choices("dtype", self.dtype, DTYPES)
        check_choices("op", self.op, KERNEL_OPS)
        here = [detect_device("cpu").name] if self.device == HERE else []
        if self.device == HERE and any(record.key.device.kind == "cuda" for record in records):
            here += _gpu_names()
        chosen = [record for record in records if self._takes(record.key, here)]
        if not chosen:
            raise BadInput(f"an export needs a kernel, none of {len(records)} is for {self}: see mhc-tune inspect")
        return chosen

    def __str__(self) -> str:
        """The filters, e.g. `op merge, width 64 or 128`."""
        asked = ((name, value if isinstance(value, list | tuple) else [value]) for name, value in vars(self).items())
        return ", ".join(f"{name} {' or '.join(map(str, values))}" for name, values in asked if any(values))

    def _takes(self, key: Key, here: Sequence[str]) -> bool:
        device = key.device
        named = device.name in here if self.device == HERE else self.device.lower() in device.name.lower()
        return (
            named
            and all(
                not asked or value in asked
                for asked, value in (
                    (self.op, key.op),
                    (self.streams, key.streams),
                    (self.width, key.width),
                    (self.dtype, key.dtype),
                )
            )
            and (self.model is None or key.problem in self.model)
            and (not self.target or device.kind in self.target or str(device.target) in self.target)
        )


def compile_for_levels(records: Sequence[Record], levels: Sequence[str]) -> tuple[list[PackedKernel], list[str]]:
    """The CPU records' schedules compiled for other x86-64 ISA levels, so that one pack serves them all; and failures.

    The measurement stays that of the original device, which `measured_on` of the provenance names.
    """
    check_choices("isa", levels, list(X86_LEVELS))
    x86 = [record for record in records if record.key.device.kind == "cpu" and record.key.device.arch in X86_LEVELS]
    if levels and not x86:
        raise BadInput(f"--isa compiles kernels of x86-64 CPUs, got none of {len(records)}: leave it out")
    if levels and detect_device("cpu").arch not in X86_LEVELS:
        raise BadInput(f"--isa needs an x86-64 machine to compile on, got {detect_device('cpu').arch}: run it on one")
    held = {record.key for record in records}
    wanted: dict[Key, Record] = {}
    failed = []
    for record in sorted(x86, key=lambda record: not record.key.current):
        device = record.key.device
        for level in levels:
            try:
                key = Key.of(record.key.problem, replace(device, arch=level))
                origin = {"compiled_for": level, "measured_on": f"{device.name} ({device.arch})"}
                made = replace(record, key=key, provenance=record.provenance | origin)
                check_schedule(made)
            except BadInput as error:
                failed.append(f"{record.key.problem.describe()} for {level}: {error}")
                continue
            if key not in held:
                wanted.setdefault(key, made)
    kernels: list[PackedKernel] = []
    for record, built in zip(wanted.values(), recompile(list(wanted.values())), strict=True):
        if isinstance(built, Exception):
            failed.append(f"{record.key.device.arch}: {built}")
        else:
            kernels.append(PackedKernel(_with_binary(record, built.binary), built.binary, built.source))
    return kernels, failed


def _with_binary(record: Record, binary: bytes) -> Record:
    return replace(record, sha256=hashlib.sha256(binary).hexdigest(), size=len(binary))


def _gpu_names() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
