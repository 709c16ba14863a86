"""Ranks of torch.distributed: all run the kernels that rank 0 chooses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.distributed as dist

from mhc.dispatch.resolve import Resolver
from tiles.cache.cache import CacheCorrupt
from tiles.cache.record import Record, from_json, record_dict, record_from_dict, to_json
from tiles.compiler import compile as compiler
from tiles.errors import BadInput, one_line
from tiles.target import Device, detect_device, why_cannot_run


def is_distributed() -> bool:
    """Whether torch.distributed runs more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def adopt_rank0_records(mine: Resolver | BadInput) -> Resolver:
    """This rank's resolver, or the error that its path gave, -> a resolver of rank 0's records.

    A collective on the default group: every rank has to call it, with a resolver or an error. Only data is sent. A rank
    loads a binary from its own folder or pack where that has the SHA-256 of rank 0's; else it compiles the schedule.
    Raises `BadInput` on every rank where one rank has no usable kernels.
    """
    sent: list[bytes | None] = [None]
    failure, adopted = None, None
    # An error is sent to all ranks: one that raised now would leave the others waiting.
    try:
        if isinstance(mine, BadInput):
            raise mine
        if dist.get_rank() == 0:
            sent[0] = to_json(_choice(mine))
    except Exception as error:
        failure = _complaint(error)
    dist.broadcast_object_list(sent, src=0)
    try:
        if sent[0] is not None and isinstance(mine, Resolver):
            adopted = _adopted(mine, sent[0])
    except Exception as error:
        failure = _complaint(error)
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    for rank, text in enumerate(failures):
        if text is not None:
            raise BadInput(f"rank {rank}: {text}")
    assert adopted
    return adopted


def _choice(resolver: Resolver) -> dict[str, Any]:
    """Rank 0's choice as JSON: the records that it can use itself, and whether it compiles and loads binaries."""
    here = detect_device("cpu")
    compiles = compiler.why_no_compiler(here.target) is None
    records = [record for record in resolver.stored_records() if _usable(resolver, record, here, compiles)]
    return {
        "compiles": compiles,
        "without_code": resolver.without_code,
        "device": here.as_dict(),
        "records": [record_dict(record) for record in records],
    }


def _usable(resolver: Resolver, record: Record, here: Device, compiles: bool) -> bool:
    if compiles or why_cannot_run(record.key.device.arch, here):
        return True
    try:
        assert resolver.source is not None
        resolver.source.binary_path(record)
    except (CacheCorrupt, OSError):
        return False
    return record.key.current and resolver.without_code is None


def _adopted(mine: Resolver, sent: bytes) -> Resolver:
    """This rank's resolver with rank 0's records in place of its own."""
    choice = from_json(sent)
    here, there = detect_device("cpu"), Device(**choice["device"])
    records = [record_from_dict(values) for values in choice["records"]]
    settings = {"compiles": choice["compiles"], "without_code": choice["without_code"]}
    adopted = replace(mine, records=records, from_rank0=True, **settings)
    if here != there:
        adopted.warn_once(
            "ranks",
            f"rank {dist.get_rank()} runs on {here.name} ({here.arch}), rank 0 on {there.name} ({there.arch}): "
            "their kernels, and so their rounding, may differ",
        )
    return adopted


def _complaint(error: Exception) -> str:
    return one_line(str(error) if isinstance(error, BadInput) else error)
