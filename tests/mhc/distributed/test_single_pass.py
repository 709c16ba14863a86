"""Single-pass mHC under DDP and in a pipeline (DualPipeV), whose stages hand on streams and a pre."""

import pytest
import torch
import torch.distributed as dist
from models import STREAMS, WIDTH, batch, blocks, expand, expect_same, gradients, loss_of
from pipeline_model import CPU, LAYERS, MICROBATCH
from torch import nn
from torch.distributed.pipelining import ScheduleDualPipeV
from torch.nn.parallel import DistributedDataParallel

import mhc
from mhc.distributed.overlap import overlap_pairs
from mhc.distributed.pipeline import v_stages

JOIN = {"stack": mhc.HyperConnectionStack, "recompute": mhc.recompute}


class Model(nn.Module):
    """h [batch, C] -> [batch, C]; or the part of it with these blocks, of which all but the last hand on their pre."""

    def __init__(self, made, numbers, runner="stack"):
        super().__init__()
        self.numbers, last = numbers, numbers.stop == len(made)
        self.embed = nn.Linear(WIDTH, WIDTH) if numbers.start == 0 else None
        self.head = nn.Linear(WIDTH, WIDTH) if last else None
        self.blocks = JOIN[runner]([made[number] for number in numbers], single_pass=True, collapse=last)

    def forward(self, x, pre=None):
        result = self.blocks(expand(self.embed(x)) if self.embed else x, pre=pre)
        return self.head(result) if self.head else result


def model(numbers=range(LAYERS), runner="stack"):
    made = blocks(LAYERS)
    torch.manual_seed(5)
    made = Model(made, numbers, runner)
    with torch.no_grad():
        for layer in filter(None, (made.embed, made.head)):
            layer.weight.copy_(torch.eye(WIDTH))
    return made


def in_the_whole(part):
    """A part's gradients by their names in the whole model."""
    found = {}
    for name, grad in gradients(part).items():
        pieces = name.split(".")
        if pieces[0] == "blocks":
            pieces[2] = str(part.numbers[int(pieces[2])])
        found[".".join(pieces)] = grad
    return found


def ddp(runner):
    data, target = batch()
    whole, replica = model(), DistributedDataParallel(model(runner=runner))
    for part in (whole, replica.module):
        nn.init.zeros_(part.embed.bias)
        nn.init.zeros_(part.head.bias)
    loss_of(whole(data), target).backward()
    mine = [tensor.chunk(dist.get_world_size())[dist.get_rank()] for tensor in (data, target)]
    loss_of(replica(mine[0]), mine[1]).backward()
    expect_same(gradients(replica), gradients(whole))


@pytest.mark.parametrize("runner", JOIN)
def test_ddp(ranks, runner):
    ranks.run(ddp, runner)


def pipeline(runner, microbatches):
    rank = dist.get_rank()
    data, target = batch(MICROBATCH * microbatches)

    def build(numbers):
        made = model(numbers, runner)
        for layer in filter(None, (made.embed, made.head)):
            nn.init.zeros_(layer.bias)
        return made

    whole = build(range(LAYERS))
    loss_of(whole(data), target).backward()
    stages = v_stages(build, LAYERS, device=CPU)
    run = ScheduleDualPipeV(stages, microbatches, loss_of)
    if runner == "recompute":
        overlap_pairs(run)
    run.step(*([data] if rank == 0 else []), target=target if rank == 0 else None)
    found = {name: grad for stage in stages for name, grad in in_the_whole(stage.submod).items()}
    wanted = gradients(whole)
    expect_same(found, {name: wanted[name] for name in found})
    for stage in stages:
        if not stage.is_first:
            shapes = [tuple(info.tensor_meta.shape) for info in stage.args_recv_info[0]]
            assert shapes == [(MICROBATCH, STREAMS, WIDTH), (MICROBATCH, STREAMS)]
    return sorted(found)


@pytest.mark.parametrize("runner", JOIN)
def test_a_pipelines_gradients_are_those_of_one_process(ranks, runner):
    names = ranks.run(pipeline, runner, 5)
    assert sorted(names[0] + names[1]) == sorted(name for name, _ in model().named_parameters())
