"""Blocks in a pipeline of two ranks and four stages (DualPipeV): one process's gradients."""

import pytest
import torch
from models import RUNNERS, STREAMS, TOKENS, WIDTH, Model, blocks, expect_same, gradients
from pipeline_model import CPU, LAYERS, pipeline
from torch import nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

import mhc
from mhc.distributed.output_views import unview_outputs
from mhc.distributed.pipeline import v_stages


@pytest.mark.parametrize(
    ("schedule", "modes", "microbatches", "counts"),
    [
        pytest.param("ScheduleDualPipeV", ["mhc"], 4, None, marks=pytest.mark.slow),
        ("ScheduleDualPipeV", ["mhc"], 7, [1, 3, 1, 1]),
        ("ScheduleDualPipeV", ["hc", "mhc", "residual"], 5, [1, 1, 1, 3]),
        ("ScheduleZBVZeroBubble", ["mhc"], 6, None),
    ],
)
def test_gradients_are_those_of_one_process(ranks, schedule, modes, microbatches, counts):
    names = ranks.run(pipeline, schedule, modes, microbatches, counts)
    assert sorted(names[0] + names[1]) == sorted(name for name, _ in Model(blocks(LAYERS, modes)).named_parameters())


def backward_in_two_parts(runner, modes):
    """First the gradient of the input, then those of the parameters: the graph is walked twice, and our backwards add
    to gradients in place."""
    x, upstream = torch.randn(TOKENS, STREAMS, WIDTH), torch.randn(TOKENS, STREAMS, WIDTH)
    whole, parts = (RUNNERS[runner](blocks(3, modes)) for _ in range(2))
    one, other = (x.clone().requires_grad_() for _ in range(2))
    whole(one).backward(upstream)
    unview_outputs(parts)
    before = upstream.clone()
    (dx,), groups = stage_backward_input([parts(other)], [upstream], [other], parts.parameters())
    stage_backward_weight(parts.parameters(), groups)
    expect_same(gradients(parts) | {"x": dx}, gradients(whole) | {"x": one.grad})
    assert torch.equal(upstream, before), "a buffer of the pipeline was written to"


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_backward_in_two_parts_is_the_whole(kernels, runner):
    backward_in_two_parts(runner, ["mhc"])


def test_a_backward_in_two_parts_is_the_whole_of_other_modes():
    backward_in_two_parts("stack", ["mhc", "hc", "residual"])


def refused():
    for counts in (None, [1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1], [2, -1, 1, 1]):
        with pytest.raises(
            mhc.BadInput, match=r"4 stages \(two a rank\) must share 3 blocks, at least one each, got \["
        ):
            v_stages(lambda numbers: nn.Identity(), 3, device=CPU, counts=counts)


def test_counts_that_do_not_fit_are_refused(ranks):
    ranks.run(refused)
