"""Pipeline parallelism over blocks: stages send and receive streams [..., n, C], one tensor a microbatch.

A stage may begin at any block. It receives n streams, n times the bytes of a plain residual, and sends as many. The
first stage expands to streams and the last one reduces them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.stage import _PipelineStageBase

from mhc.distributed.output_views import unview_outputs
from mhc.modules.recompute_segments import even_counts
from tiles.errors import BadInput


def v_stages(
    build: Callable[[range], nn.Module],
    layers: int,
    *,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
    counts: Sequence[int] | None = None,
) -> list[_PipelineStageBase]:
    """This rank's two stages for `torch.distributed.pipelining.ScheduleDualPipeV` (or `ScheduleZBVZeroBubble`).

    Blocks 0 .. layers - 1 are split into two stages a rank, laid out as a V: rank r of R has stages r and 2R - 1 - r.
    So the first and the last stage are on rank 0, and at the turn of the V streams are passed on within a rank.

    Args:
        build: makes the module of a range of blocks; called for this rank's two stages only. Modules map streams
            [..., n, C] to streams (of single-pass mHC, streams and a pre to both), but the one with block 0 takes the
            model's input and expands it, and the one with the last block reduces the streams to the model's output. A
            module may be sharded (`fully_shard_streams`,
            then `fully_shard` for the whole): it then stays unsharded between forward and backward in any case.
        layers: the number of blocks.
        device: this rank's device.
        group: the ranks of the pipeline (default: all).
        counts: the number of blocks in each of the 2R stages (default: as even as possible, the larger first).

    Example:
        >>> def build(numbers):
        ...     parts = [mhc.HyperConnectionStack([make_block(number) for number in numbers])]
        ...     if numbers.start == 0:
        ...         parts.insert(0, Embedding())
        ...     if numbers.stop == layers:
        ...         parts.append(Head())
        ...     return torch.nn.Sequential(*parts)
        >>> schedule = ScheduleDualPipeV(v_stages(build, layers, device=device), n_microbatches, loss_fn)
        >>> schedule.step(batch, target=target) if dist.get_rank() == 0 else schedule.step()

    Raises `BadInput` for counts that do not fit the pipeline.
    """
    rank, stages = dist.get_rank(group), 2 * dist.get_world_size(group)
    split = list(counts) if counts is not None else even_counts(layers, stages)
    if len(split) != stages or sum(split) != layers or min(split) < 1:
        raise BadInput(
            f"{stages} stages (two a rank) must share {layers} blocks, at least one each, got {split}: count anew"
        )
    numbers = [range(start, stop) for start, stop in pairwise(accumulate(split, initial=0))]
    return [_stage(build(numbers[number]), number, stages, device, group) for number in (rank, stages - 1 - rank)]


def _stage(
    module: nn.Module, number: int, stages: int, device: torch.device, group: dist.ProcessGroup | None
) -> PipelineStage:
    unview_outputs(module)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            # The schedule itself unshards and reshards stages. In a backward in two parts (of the input, then of the
            # weights), parameters that the forward resharded would get no gradient.
            part.set_reshard_after_forward(False, recurse=False)
    return PipelineStage(module.to(device), number, stages, device, group=group)
