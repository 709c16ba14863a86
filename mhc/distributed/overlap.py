"""DualPipeV's pairs of a forward and a backward, side by side on a GPU, with recomputation before the gradient arrives.

PyTorch runs such a pair one after the other on one CUDA stream, and recomputation starts when autograd first misses a
tensor: after the gradient has been received. A stage has all that it makes streams from (its first streams, its
sublayers' outputs), so nothing of that has to wait (arXiv 2512.24880, section 4.3.3: recomputation is decoupled from
the pipeline's communication).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.pipelining import ScheduleDualPipeV
from torch.distributed.pipelining.schedules import OVERLAP_F_B, _Action, _PipelineContext, _wait_batch_p2p
from torch.distributed.pipelining.stage import _PipelineStageBase

from mhc.modules.recompute import Recomputed


def overlap_pairs(schedule: ScheduleDualPipeV) -> None:
    """Let `schedule` run each pair of a forward and a backward (its `OVERLAP_F_B` actions) as this module does.

    The gradients stay the same. On a GPU the two stages of a rank compute on CUDA streams of their own, so that a
    forward of one fills the processors while a backward of the other waits or has too little to do; on a CPU one
    follows the other. Where a stage recomputes (`mhc.recompute`), its last segment is made again before the gradient
    of its output has been received.

    PyTorch tells such functions nothing of `loss_kwargs`: bind them to the loss function instead of giving them to
    `schedule.step`.
    """
    schedule.register_custom_function(OVERLAP_F_B, _Pairs(schedule._stages))


class _Pairs:
    """What runs a pair; `stages` are those of this rank."""

    def __init__(self, stages: Iterable[_PipelineStageBase]) -> None:
        self._stages = {stage.stage_index: stage for stage in stages}
        devices = {index: stage.device for index, stage in self._stages.items()}
        self._lanes = {i: torch.cuda.Stream(device) for i, device in devices.items() if device.type == "cuda"}

    def __call__(self, action: _Action, ctx: _PipelineContext) -> None:
        """First the forward, so that the memory which the backward frees is not taken by a forward beside it."""
        assert action.sub_actions is not None
        forward, backward = action.sub_actions
        with self._side_by_side():
            with self._lane(forward):
                self._forward(forward, ctx)
            with self._lane(backward):
                self._backward(backward, ctx)

    @contextmanager
    def _side_by_side(self) -> Iterator[None]:
        """Both lanes begin after what came before, and what comes after waits for both."""
        for lane in self._lanes.values():
            lane.wait_stream(torch.cuda.current_stream(lane.device))
        yield
        for lane in self._lanes.values():
            torch.cuda.current_stream(lane.device).wait_stream(lane)

    def _lane(self, action: _Action) -> Any:
        lane = self._lanes.get(action.stage_index)
        return torch.cuda.stream(lane) if lane else nullcontext()

    def _forward(self, action: _Action, context: _PipelineContext) -> None:
        """As PyTorch's runtime does it: receive, compute, pass on to a stage of the same rank."""
        schedule: Any = context.schedule_ref
        stage, microbatch = self._stages[action.stage_index], action.microbatch_index
        assert microbatch is not None
        assert context.arg_mbs is not None
        assert context.kwarg_mbs is not None
        schedule._assert_unsharded(stage)
        if not stage.is_first and stage.stage_index - 1 not in self._stages:
            _wait_batch_p2p(schedule.fwd_recv_ops.pop((stage.stage_index, microbatch)))
        given = context.arg_mbs[microbatch], context.kwarg_mbs[microbatch]
        # Whether `step` returns outputs is not told, but the first microbatch of a stage is never in a pair.
        output = stage.forward_one_chunk(microbatch, *given, save_forward_output=bool(stage.output_chunks))
        schedule._maybe_compute_loss(stage, output, context.target_mbs, microbatch)
        if following := self._stages.get(stage.stage_index + 1):
            following.set_local_fwd_input(output, microbatch)

    def _backward(self, action: _Action, context: _PipelineContext) -> None:
        """The same for the backward, but for what is made again before anything is waited for."""
        schedule: Any = context.schedule_ref
        stage, microbatch = self._stages[action.stage_index], action.microbatch_index
        assert microbatch is not None
        schedule._assert_unsharded(stage)
        if stage.has_backward and last_recomputed(stage.submod):
            recompute_ahead(stage.fwd_cache[microbatch][0])
        if not stage.is_last and stage.stage_index + 1 not in self._stages:
            _wait_batch_p2p(schedule.bwd_recv_ops.pop((stage.stage_index, microbatch)))
        schedule.backward_counter[stage.stage_index] += 1
        stage.backward_one_chunk(
            microbatch,
            loss=schedule._maybe_get_loss(stage, microbatch),
            full_backward=True,
            last_backward=schedule.backward_counter[stage.stage_index] == schedule._n_microbatches,
        )
        if previous := self._stages.get(stage.stage_index - 1):
            previous.set_local_bwd_input(stage.get_local_bwd_output(microbatch), microbatch)


def last_recomputed(module: nn.Module) -> Recomputed | None:
    """What makes the last streams of `module` again, if it can be asked to (`recompute_ahead`). A block of mode
    `residual` at the end saves nothing by itself, and what precedes it would be made again once more."""
    runners = [found for found in module.modules() if isinstance(found, Recomputed)]
    return runners[-1] if runners and runners[-1].blocks[-1].mode != "residual" else None


def recompute_ahead(outputs: Iterable[torch.Tensor]) -> None:
    """Make the tensors again that the backward of `outputs` needs first, where they were not kept (`mhc.recompute`).

    They are made when a node of the graph asks for what it saved: this asks the last node that saved anything.
    """
    for output in outputs:
        node: Any = output.grad_fn
        while node is not None and not getattr(node, "saved_tensors", ()):
            node = node.next_functions[0][0] if node.next_functions else None
