"""Sublayers split over two ranks, streams of all tokens or of half of them on each: one process's gradients."""

import pytest
import torch
import torch.distributed as dist
from models import RUNNERS, STREAMS, TOKENS, WIDTH, blocks, expect_same, gradients
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import mhc
from mhc.distributed.sharding import fully_shard_streams
from mhc.distributed.tensor_parallel import StreamParallel

PLANS = {
    "replicated": lambda: {"up": ColwiseParallel(), "down": RowwiseParallel()},
    "sharded": lambda: {
        "norm": SequenceParallel(sequence_dim=0),
        "up": ColwiseParallel(input_layouts=Shard(0)),
        "down": RowwiseParallel(output_layouts=Shard(0)),
    },
}
CASES = [(["mhc"], "stack"), (["mhc", "hc", "residual"], "stack"), (["mhc"], "recompute")]


def tensor_parallel(tokens, modes, runner):
    x, upstream = torch.randn(TOKENS, STREAMS, WIDTH), torch.randn(TOKENS, STREAMS, WIDTH)
    stack = mhc.HyperConnectionStack(blocks(modes=modes))
    whole = x.clone().requires_grad_()
    result = stack(whole)
    result.backward(upstream)
    wanted = gradients(stack) | {"x": whole.grad, "result": result.detach()}

    mesh = init_device_mesh("cpu", (2,))
    placed = RUNNERS[runner](blocks(modes=modes))
    for rank_dependent in placed.parameters():
        if dist.get_rank() == 1 and rank_dependent.shape == placed.blocks[0].phi.shape:
            rank_dependent.data += 1  # rank 0's values count
    for block in placed.blocks:
        parallelize_module(block, mesh, StreamParallel(tokens=tokens))
        parallelize_module(block.sublayer, mesh, PLANS[tokens]())

    def mine(tensor):
        return tensor.chunk(2)[dist.get_rank()] if tokens == "sharded" else tensor

    part = mine(x).clone().requires_grad_()
    result = placed(part)
    result.backward(mine(upstream), retain_graph=True)
    expect_same(
        gradients(placed) | {"x": part.grad, "result": result.detach()},
        wanted | {"x": mine(wanted["x"]), "result": mine(wanted["result"])},
    )
    if tokens == "sharded":
        assert all(isinstance(parameter, DTensor) for parameter in placed.parameters())
    for parameter in placed.blocks[0].parameters(recurse=False):
        assert parameter.placements == parameter.grad.placements == (dist.tensor.Replicate(),)
    result.backward(mine(upstream))
    expect_same(gradients(placed), {name: 2 * grad for name, grad in wanted.items() if name not in ("x", "result")})
    torch.optim.AdamW(placed.parameters(), foreach=tokens == "sharded").step()


def two_dimensional(tokens):
    """Tensor parallelism over both ranks, and FSDP2 over groups of one: its gathering and hooks see DTensors."""
    x, upstream = torch.randn(TOKENS, STREAMS, WIDTH), torch.randn(TOKENS, STREAMS, WIDTH)
    stack = mhc.HyperConnectionStack(blocks())
    stack(x).backward(upstream)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    placed = mhc.HyperConnectionStack(blocks())
    for block in placed.blocks:
        parallelize_module(block, mesh["tensor"], StreamParallel(tokens=tokens))
        parallelize_module(block.sublayer, mesh["tensor"], PLANS[tokens]())
    fully_shard_streams(placed, mesh=mesh["data"])
    if tokens == "sharded":
        x, upstream = (tensor.chunk(2)[dist.get_rank()] for tensor in (x, upstream))
    placed(x).backward(upstream)
    expect_same(gradients(placed), gradients(stack))


@pytest.mark.parametrize("tokens", PLANS)
def test_together_with_fsdp(ranks, tokens):
    ranks.run(two_dimensional, tokens)


@pytest.mark.parametrize(("modes", "runner"), CASES)
@pytest.mark.parametrize("tokens", ["replicated", "sharded"])
def test_gradients_are_those_of_one_process(ranks, tokens, modes, runner):
    ranks.run(tensor_parallel, tokens, modes, runner)


def test_bad_input_is_one_line():
    with pytest.raises(mhc.BadInput, match="tokens must be one of replicated, sharded, got split"):
        StreamParallel(tokens="split")
    with pytest.raises(
        mhc.BadInput, match="StreamParallel places a HyperConnection, got Linear: name the block itself"
    ):
        StreamParallel(tokens="sharded")._apply(nn.Linear(2, 2), None)
