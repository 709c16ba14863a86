"""Import of a pack's kernels into a cache: schedules as data, compiled code only where it is trusted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from tiles.cache.cache import KernelCache
from tiles.cache.record import Key, Record, check_schedule
from tiles.compiler.compile import CompileError
from tiles.errors import BadInput
from tiles.pack.pack import Pack


class CompiledCode(Protocol):
    """The result of a recompilation, such as `tiles.compiler.compile.Artifact`."""

    @property
    def binary(self) -> bytes:
        """The shared library."""

    @property
    def source(self) -> str:
        """The generated source that it was compiled from."""

    @property
    def made_with(self) -> dict[str, str]:
        """What its record's provenance says of the compiler."""


Recompile = Callable[[Sequence[Record]], Iterable[CompiledCode | Exception]]
"""Compiles records' schedules for their devices: the code of each, in order, or its error."""


def import_pack(
    pack: Pack, cache: KernelCache, *, trust_binaries: bool, recompile: Recompile
) -> list[tuple[Record, str]]:
    """Bring a pack's kernels into a cache; returns each record with its outcome.

    Schedules are data, binaries are code: unless the pack's signature is trusted or `trust_binaries` is set, every
    kernel is compiled by `recompile`. A kernel of other sources or another toolchain is always compiled: its code may
    be called differently. Outcomes are "copied", "recompiled", "kept: ..." where the cache has this kernel already, and
    "skipped: ...". Each kernel is stored as soon as it is compiled.
    """
    trusted = trust_binaries or pack.why_untrusted is None
    done: list[tuple[Record, str]] = []
    waiting: dict[Key, Record] = {}
    for record in sorted(pack.records(), key=lambda record: not record.key.current):
        try:
            wanted = replace(record, key=Key.of(record.key.problem, record.key.device))
            check_schedule(wanted)
            copy = trusted and wanted.key == record.key
            content = (pack.binary(record), pack.source(record)) if copy else None
        except BadInput as error:
            done.append((record, f"skipped: {error}"))
            continue
        if wanted.key in waiting:
            done.append((record, "kept: the pack holds a newer kernel for this key"))
        elif held := cache.get(wanted.key):
            done.append((held, "kept: the cache already holds a kernel for this key"))
        elif content:
            done.append((_store(cache, wanted, *content, "copied"), "copied"))
        else:
            waiting[wanted.key] = wanted
    for wanted, compiled in zip(waiting.values(), recompile(list(waiting.values())), strict=True):
        if isinstance(compiled, (BadInput, CompileError)):
            done.append((wanted, f"skipped: {compiled}"))
        elif isinstance(compiled, Exception):
            raise compiled
        else:
            made = replace(wanted, provenance=wanted.provenance | compiled.made_with)
            done.append((_store(cache, made, compiled.binary, compiled.source, "recompiled"), "recompiled"))
    return done


def _store(cache: KernelCache, record: Record, binary: bytes, source: str, outcome: str) -> Record:
    provenance = record.provenance | {"imported": outcome}
    return cache.put(record.key, record.schedule, binary, source, record.measurement, provenance)
