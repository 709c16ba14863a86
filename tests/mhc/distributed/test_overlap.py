"""Pairs of a forward and a backward of DualPipeV, run by `overlap_pairs`; recomputation ahead of the gradient."""

from types import SimpleNamespace

import pytest
import torch
from fake_cuda import FakeCuda
from models import STREAMS, WIDTH, blocks
from pipeline_model import pipeline, sharded
from torch.distributed.pipelining.schedules import OVERLAP_F_B, _Action

import mhc
from mhc.distributed import overlap
from mhc.distributed.overlap import recompute_ahead
from mhc.modules.recompute import recompute


class Watched:
    """What happened, in order: kernels that ran, backwards of pairs that began, receives that were waited for."""

    def __init__(self, patch):
        self.events = []
        for place, name in ((mhc.Kernels, "run"), (overlap._OverlapPairs, "_backward"), (overlap, "_wait_batch_p2p")):
            patch.setattr(place, name, self.noting(name, getattr(place, name)))

    def noting(self, name, function):
        def run(*arguments):
            self.events.append(f"{arguments[1]} {arguments[2]}" if name == "run" else name)
            return function(*arguments)

        return run


def overlapped_pipeline(runner):
    with pytest.MonkeyPatch.context() as patch:
        events = Watched(patch).events
        names = pipeline("ScheduleDualPipeV", ["mhc"], 7, None, runner=runner, overlapped=True)
    between = []
    for place, event in enumerate(events):
        if event == "_backward":
            rest = events[place + 1 :]
            waits = [at for at, later in enumerate(rest) if later == "_wait_batch_p2p"]
            ends = [at for at, later in enumerate(rest) if later.endswith(" backward")]
            between.append(rest[: waits[0]] if waits and waits[0] < ends[0] else None)
    return names, between


@pytest.mark.parametrize("runner", [pytest.param("stack", marks=pytest.mark.slow), "recompute"])
def test_gradients_are_the_same_and_streams_are_made_again_before_the_gradient_arrives(ranks, runner):
    answers = ranks.run(overlapped_pipeline, runner)
    for _names, pairs in answers:
        assert len(pairs) >= 2 * 7, "two steps, each with a pair for most of the microbatches"
        waited = [ran for ran in pairs if ran is not None]
        assert waited != []
        for ran in waited:
            assert all(event.endswith(" forward") for event in ran)
            assert bool(ran) == (runner == "recompute")


def pipeline_of_sharded_stages(schedule, runner, overlapped):
    pipeline(schedule, ["mhc"], 5, None, runner=runner, overlapped=overlapped, wrap=sharded)


@pytest.mark.parametrize(
    ("schedule", "runner", "overlapped"),
    [("ScheduleDualPipeV", "recompute", True), ("ScheduleZBVZeroBubble", "stack", False)],
)
def test_stages_that_fsdp_shards(ranks, schedule, runner, overlapped):
    ranks.run(pipeline_of_sharded_stages, schedule, runner, overlapped)


@pytest.mark.parametrize("mode", ["mhc", "hc"])
def test_what_is_made_again_ahead_is_not_made_again_in_the_backward(monkeypatch, mode):
    made = recompute(blocks(3, ["mhc", "mhc", mode]), segment=3)
    x = torch.randn(5, STREAMS, WIDTH, requires_grad=True)
    events = Watched(monkeypatch).events
    result = made(x)
    events.clear()
    recompute_ahead((result,))
    ahead = list(events)
    events.clear()
    result.sum().backward()
    assert [event for event in ahead if event.endswith(" forward")] == ahead != []
    assert [event for event in events if event.endswith(" forward")] == []


def test_a_graph_that_saved_nothing_is_left_alone():
    x = torch.zeros(2, requires_grad=True)
    result = x + 1
    recompute_ahead((torch.zeros(2), result))
    result.sum().backward()
    assert x.grad.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("module", "again"),
    [
        (lambda: mhc.HyperConnectionStack(blocks(2)), False),
        (lambda: torch.nn.Sequential(torch.nn.Identity(), recompute(blocks(2, ["residual", "mhc"]))), True),
        (lambda: recompute(blocks(2, ["mhc", "residual"])), False),
    ],
)
def test_who_is_asked(module, again):
    assert (overlap.last_recomputed(module()) is not None) == again


def test_on_a_gpu_both_stages_have_streams_of_their_own_that_join(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    stages = [SimpleNamespace(stage_index=index, device=torch.device("cuda:0")) for index in (0, 3)]
    pairs = overlap._OverlapPairs(stages)
    ran = {}
    monkeypatch.setattr(pairs, "_forward", lambda action, context: ran.update(forward=cuda.now))
    monkeypatch.setattr(pairs, "_backward", lambda action, context: ran.update(backward=cuda.now))
    pair = (_Action(0, "F", 1), _Action(3, "B", 0))
    usual = cuda.now
    pairs(_Action(-1, OVERLAP_F_B, None, pair), None)
    one, other = ran["forward"], ran["backward"]
    assert len({usual, one, other}) == 3
    assert cuda.now is usual
    assert cuda.waits == [(one, usual), (other, usual), (usual, one), (usual, other)]
