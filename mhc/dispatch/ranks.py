"""Several processes of one training run (torch.distributed): all run the kernels that rank 0 chooses."""

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


def in_fleet() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def agree(mine: Resolver | BadInput) -> Resolver:
    """What this rank found (a resolver, or what was wrong with its path) -> its resolver on rank 0's records.

    A collective on the default group: every rank has to call it, whatever it found. Only data travels; each rank takes
    code from its own folder or pack, where it has SHA-256 in common with rank 0's, and compiles the schedule otherwise.
    Raises `BadInput` on every rank where one rank found nothing it can use.
    """
    sent: list[bytes | None] = [None]
    complaint, agreed = None, None
    # Whatever goes wrong here is told to all: a rank that raised now would leave the others waiting.
    try:
        if isinstance(mine, BadInput):
            raise mine
        if dist.get_rank() == 0:
            sent[0] = to_json(_offer(mine))
    except Exception as error:
        complaint = _complaint(error)
    dist.broadcast_object_list(sent, src=0)
    try:
        if sent[0] is not None and isinstance(mine, Resolver):
            agreed = _adopted(mine, sent[0])
    except Exception as error:
        complaint = _complaint(error)
    complaints: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(complaints, complaint)
    for rank, text in enumerate(complaints):
        if text is not None:
            raise BadInput(f"rank {rank}: {text}")
    assert agreed
    return agreed


def _offer(resolver: Resolver) -> dict[str, Any]:
    """Rank 0's choice as data: the records that it can use itself, and whether it compiles and trusts."""
    here = detect_device("cpu")
    compiles = compiler.why_no_compiler(here.target) is None
    records = [record for record in resolver.tuned_records() if _usable(resolver, record, here, compiles)]
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
        assert resolver.tuned is not None
        resolver.tuned.binary_path(record)
    except (CacheCorrupt, OSError):
        return False
    return record.key.current and resolver.without_code is None


def _adopted(mine: Resolver, sent: bytes) -> Resolver:
    """This rank's resolver with rank 0's records in place of its own."""
    offer = from_json(sent)
    here, there = detect_device("cpu"), Device(**offer["device"])
    records = [record_from_dict(values) for values in offer["records"]]
    agreed = replace(mine, records=records, agreed=True, compiles=offer["compiles"], without_code=offer["without_code"])
    if here != there:
        agreed.say(
            "fleet",
            f"rank {dist.get_rank()} runs on {here.name} ({here.arch}), rank 0 on {there.name} ({there.arch}): "
            "their kernels, and so their rounding, may differ",
        )
    return agreed


def _complaint(error: Exception) -> str:
    return one_line(str(error) if isinstance(error, BadInput) else error)
