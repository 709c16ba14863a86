"""Merges of chosen blocks on a CUDA stream of high priority: which ops run there, and who waits for whom."""

import pytest
import torch
from fake_cuda import FakeCuda
from models import RUNNERS, STREAMS, WIDTH, blocks

import mhc
from mhc.distributed.priority import prioritise_merges

GPU = torch.device("cuda:0")


def ops_and_priorities(cuda, monkeypatch):
    """What has run: ops of the kernels and sublayers, with the priority of the stream that was current."""
    ran = []
    run = mhc.Kernels.run

    def noting(kernels, op, *rest):
        ran.append((op, cuda.now.priority))
        return run(kernels, op, *rest)

    monkeypatch.setattr(mhc.Kernels, "run", noting)
    return ran


@pytest.mark.parametrize("runner", RUNNERS)
def test_what_follows_a_chosen_sublayer_runs_with_priority(monkeypatch, runner):
    cuda = FakeCuda(monkeypatch)
    usual = cuda.now
    made = blocks(4)
    x = torch.randn(5, STREAMS, WIDTH)
    stack = RUNNERS[runner](made)
    wanted = stack(x)
    prioritise_merges(stack, [made[1], made[3]], GPU)
    ran = ops_and_priorities(cuda, monkeypatch)
    for block in made:
        block.sublayer.down.register_forward_hook(lambda *_: ran.append(("sublayer", cuda.now.priority)))
    assert torch.equal(stack(x), wanted)
    plain = [("pre", 0), ("sublayer", 0), ("step", 0), ("sublayer", 0)]
    if runner == "stack":
        assert ran == [*plain, ("step", -1), *plain[1:], ("merge", -1)]
    else:
        assert ran == [*plain, ("merge", -1), ("pre", -1), *plain[1:], ("merge", -1)]
    assert cuda.now is usual
    high = cuda.waits[0][0]
    assert cuda.waits == [(high, usual), (usual, high)] * 2


def test_after_an_error_the_usual_stream_is_current_again(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    usual, seen = cuda.now, []

    def fail(x):
        seen.append(cuda.now.priority)
        raise ValueError("odd")

    first, second = blocks(2, ["mhc", "hc"])
    monkeypatch.setattr(second, "pre_with_residual", fail)
    stack = mhc.HyperConnectionStack([first, second])
    prioritise_merges(stack, [first], GPU)
    with pytest.raises(ValueError, match="odd"):
        stack(torch.randn(5, STREAMS, WIDTH))
    assert seen == [-1]
    assert cuda.now is usual


def test_a_block_by_itself(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    (block,) = blocks(1)
    x = torch.randn(5, STREAMS, WIDTH)
    wanted = block(x)
    prioritise_merges(block, [block], GPU)
    ran = ops_and_priorities(cuda, monkeypatch)
    assert torch.equal(block(x), wanted)
    assert ran == [("pre", 0), ("merge", -1)]


def test_without_cuda_streams_nothing_changes():
    made = blocks(2)
    stack = mhc.HyperConnectionStack(made)
    prioritise_merges(stack, made, torch.device("cpu"))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in stack.modules())


def test_blocks_of_another_model_are_refused():
    with pytest.raises(mhc.BadInput, match="blocks must be blocks of runner, got HyperConnection"):
        prioritise_merges(mhc.HyperConnectionStack(blocks(1)), blocks(1), GPU)
