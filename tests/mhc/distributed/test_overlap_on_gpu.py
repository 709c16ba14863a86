"""Pairs of forward and backward, and merges with priority, on a visible NVIDIA GPU."""

import pytest
import torch
import torch.distributed as dist
from models import RUNNERS, STREAMS, WIDTH, batch, blocks, expect_same, gradients, loss_of
from torch._C._distributed_c10d import HashStore
from torch.distributed.pipelining import ScheduleDualPipeV

import mhc
from mhc.distributed import overlap_pairs, prioritise_merges, v_stages

pytestmark = pytest.mark.gpu
LAYERS, MICROBATCHES = 4, 6


class Part(torch.nn.Module):
    def __init__(self, made, numbers, runner, device):
        super().__init__()
        self.first, self.last = numbers.start == 0, numbers.stop == LAYERS
        self.blocks = RUNNERS[runner]([made[number] for number in numbers])
        if device.type == "cuda":
            prioritise_merges(self.blocks, [made[number] for number in numbers if number % 2], device)

    def forward(self, x):
        n = self.blocks.blocks[0].streams
        if self.first:
            x = mhc.expand_streams(x, n) * torch.linspace(0.5, 1.5, n, device=x.device).unsqueeze(-1)
        x = self.blocks(x)
        return mhc.reduce_streams(x) if self.last else x


def outcome(device, runner):
    """Gradients of a pipeline of one rank, and for every sublayer that ran the stream that was current."""
    made, ran = blocks(LAYERS), []
    stages = v_stages(lambda numbers: Part(made, numbers, runner, device), LAYERS, device=device)
    schedule = ScheduleDualPipeV(stages, MICROBATCHES, loss_of)
    if device.type == "cuda":
        overlap_pairs(schedule)
        for number, block in enumerate(made):
            block.sublayer.up.register_forward_hook(
                lambda *_, number=number: ran.append((number, torch.cuda.current_stream().cuda_stream))
            )
    data, target = (tensor.to(device) for tensor in batch(2 * MICROBATCHES))
    for _ in range(3):
        for block in made:
            block.zero_grad()
        schedule.step(data, target=target)
    found = {
        f"{number}.{name}": grad.cpu() for number, block in enumerate(made) for name, grad in gradients(block).items()
    }
    return found, ran


@pytest.mark.parametrize("runner", RUNNERS)
def test_gradients_are_those_of_the_cpu_and_the_stages_have_streams_of_their_own(runner):
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        wanted, _ = outcome(torch.device("cpu"), runner)
        found, ran = outcome(torch.device("cuda"), runner)
    finally:
        dist.destroy_process_group()
    # Float32 matrix products of other shapes round otherwise; alpha's gradient cancels to a hundredth of its terms.
    expect_same(found, wanted, within=1e-3)
    of_stage = [{stream for number, stream in ran if number in numbers} for numbers in ((0, 1), (2, 3))]
    assert len(of_stage[0] - of_stage[1]) == len(of_stage[1] - of_stage[0]) == 1


def test_what_follows_a_chosen_sublayer_runs_with_priority(monkeypatch):
    made, ran = blocks(2), []
    stack = mhc.HyperConnectionStack(made).cuda()
    x = torch.randn(64, STREAMS, WIDTH, device="cuda")
    wanted = stack(x)
    prioritise_merges(stack, [made[1]], torch.device("cuda"))
    run = mhc.Kernels.run

    def noting(kernels, op, *rest):
        ran.append((op, torch.cuda.current_stream().priority))
        return run(kernels, op, *rest)

    monkeypatch.setattr(mhc.Kernels, "run", noting)
    torch.testing.assert_close(stack(x), wanted)
    assert ran == [("pre", 0), ("step", 0), ("merge", -1)]
    assert torch.cuda.current_stream().priority == 0
