"""The small model in a pipeline of two ranks and four stages, against one process."""

import torch
import torch.distributed as dist
from models import RUNNERS, STREAMS, WIDTH, Model, batch, blocks, expand, expect_same, gradients, loss_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import ScheduleDualPipeV, ScheduleZBVZeroBubble

from mhc.distributed.overlap import overlap_pairs
from mhc.distributed.pipeline import v_stages
from mhc.distributed.sharding import fully_shard_streams

CPU = torch.device("cpu")
LAYERS, MICROBATCH = 6, 2
SCHEDULES = {schedule.__name__: schedule for schedule in (ScheduleDualPipeV, ScheduleZBVZeroBubble)}


class Begin(nn.Module):
    def __init__(self, embed):
        super().__init__()
        self.embed = embed

    def forward(self, h):
        return expand(self.embed(h))


class End(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.reduce, self.head = model.reduce, model.head

    def forward(self, x):
        return self.head(self.reduce(x))


class Part(nn.Module):
    """Some blocks of `model`, its beginning and its end where they belong."""

    def __init__(self, model, numbers, runner="stack"):
        super().__init__()
        made = model.blocks.blocks
        self.numbers = numbers
        self.begin = Begin(model.embed) if numbers.start == 0 else nn.Identity()
        self.blocks = RUNNERS[runner]([made[number] for number in numbers])
        self.end = End(model) if numbers.stop == len(made) else nn.Identity()

    def forward(self, x):
        return self.end(self.blocks(self.begin(x)))


def named_gradients(stages):
    """The gradients of this rank's stages, by their names in the model."""
    found = {}
    for stage in stages:
        for name, grad in gradients(stage.submod).items():
            part, rest = name.split(".", 1)
            if part == "blocks":
                number, rest = rest.removeprefix("blocks.").split(".", 1)
                rest = f"blocks.blocks.{stage.submod.numbers[int(number)]}.{rest}"
            found[rest] = grad
    return found


def sharded(part):
    """FSDP2 over groups of one rank: all its gathering, scattering and hooks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("pipeline", "data"))["data"]
    fully_shard_streams(part, mesh=mesh)
    return fully_shard(part, mesh=mesh)


def pipeline(schedule, modes, microbatches, counts, *, runner="stack", overlapped=False, wrap=lambda part: part):
    """Two steps, the second after gradients of the first were dropped -> the names of this rank's parameters."""
    rank = dist.get_rank()
    data, target = batch(MICROBATCH * microbatches)
    whole = Model(blocks(LAYERS, modes))
    loss_of(whole(data), target).backward()
    wanted = gradients(whole)
    model = Model(blocks(LAYERS, modes))
    stages = v_stages(lambda numbers: wrap(Part(model, numbers, runner)), LAYERS, device=CPU, counts=counts)
    assert [stage.stage_index for stage in stages] == [rank, 3 - rank]
    run = SCHEDULES[schedule](stages, microbatches, loss_of)
    if overlapped:
        overlap_pairs(run)
    losses = []
    given = [data] if rank == 0 else []
    target_here = target if rank == 0 else None
    for with_outputs in (True, False):
        model.zero_grad()
        outputs = run.step(*given, target=target_here, losses=losses, return_outputs=with_outputs)
        if rank == 0 and with_outputs:
            torch.testing.assert_close(outputs, whole(data), rtol=1e-4, atol=1e-5)
        assert with_outputs or stages[1].output_chunks == []
        found = named_gradients(stages)
        expect_same(found, {name: grad for name, grad in wanted.items() if name in found})
    for stage in stages:
        if not stage.is_first:
            assert stage.args_recv_info[0][0].tensor_meta.shape == (MICROBATCH, STREAMS, WIDTH), "n·C a token"
    if rank == 0:
        torch.testing.assert_close(torch.stack(losses).mean(), loss_of(whole(data), target), rtol=1e-5, atol=0)
    return sorted(found)
