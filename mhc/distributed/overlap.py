"""Overlap of DualPipeV's pairs of a forward and a backward on a GPU, with recomputation before the gradient arrives.

PyTorch runs such a pair in sequence on one CUDA stream, and recomputation starts when autograd first needs a tensor,
which is after the gradient has been received. But a stage holds everything that it recomputes from (its first streams,
its sublayers' outputs), so recomputation need not wait (arXiv 2512.24880, section 4.3.3: recomputation is decoupled
from the pipeline's communication).
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

from mhc.modules.recompute import RecomputedStack


def overlap_pairs(schedule: ScheduleDualPipeV) -> None:
    """Overlap each pair of a forward and a backward (`OVERLAP_F_B` action) that `schedule` runs.

    The gradients stay the same. On a GPU the two stages of a rank run on CUDA streams of their own, so that the forward
    of one fills the GPU while the backward of the other waits or has too little work; on a CPU they run in sequence.
    Where a stage recomputes (`mhc.recompute`), its last segment is recomputed before the gradient of its output has
    been received.

    PyTorch does not pass `loss_kwargs` to such functions: bind them to the loss function instead of passing them to
    `schedule.step`.
    """
    schedule.register_custom_function(OVERLAP_F_B, _OverlapPairs(schedule._stages))


class _OverlapPairs:
    """Runs an `OVERLAP_F_B` action; `stages` are those of this rank."""

    def __init__(self, stages: Iterable[_PipelineStageBase]) -> None:
        self._stages = {stage.stage_index: stage for stage in stages}
        devices = {index: stage.device for index, stage in self._stages.items()}
        self._cuda_streams = {i: torch.cuda.Stream(device) for i, device in devices.items() if device.type == "cuda"}

    def __call__(self, action: _Action, ctx: _PipelineContext) -> None:
        """Launch the forward first, so that it does not reuse memory that the concurrent backward frees."""
        assert action.sub_actions is not None
        forward, backward = action.sub_actions
        with self._fork_and_join():
            with self._cuda_stream(forward):
                self._forward(forward, ctx)
            with self._cuda_stream(backward):
                self._backward(backward, ctx)

    @contextmanager
    def _fork_and_join(self) -> Iterator[None]:
        """Both CUDA streams wait for the current one, which in the end waits for both."""
        for stream in self._cuda_streams.values():
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        yield
        for stream in self._cuda_streams.values():
            torch.cuda.current_stream(stream.device).wait_stream(stream)

    def _cuda_stream(self, action: _Action) -> Any:
        stream = self._cuda_streams.get(action.stage_index)
        return torch.cuda.stream(stream) if stream else nullcontext()

    def _forward(self, action: _Action, context: _PipelineContext) -> None:
        """The forward as PyTorch's schedule runs it: receive, compute, pass on to a stage of the same rank."""
        schedule: Any = context.schedule_ref
        stage, microbatch = self._stages[action.stage_index], action.microbatch_index
        assert microbatch is not None
        assert context.arg_mbs is not None
        assert context.kwarg_mbs is not None
        schedule._assert_unsharded(stage)
        if not stage.is_first and stage.stage_index - 1 not in self._stages:
            _wait_batch_p2p(schedule.fwd_recv_ops.pop((stage.stage_index, microbatch)))
        given = context.arg_mbs[microbatch], context.kwarg_mbs[microbatch]
        # `step(return_outputs=...)` is not passed on, but the first microbatch of a stage is never in a pair.
        output = stage.forward_one_chunk(microbatch, *given, save_forward_output=bool(stage.output_chunks))
        schedule._maybe_compute_loss(stage, output, context.target_mbs, microbatch)
        if following := self._stages.get(stage.stage_index + 1):
            following.set_local_fwd_input(output, microbatch)

    def _backward(self, action: _Action, context: _PipelineContext) -> None:
        """The backward likewise, with recomputation before the gradient is waited for."""
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


def last_recomputed(module: nn.Module) -> RecomputedStack | None:
    """The last `RecomputedStack` of `module` if `recompute_ahead` works on it. It does not where its last block has
    mode `residual`: that saves nothing by itself, and the segment before it would be recomputed twice."""
    runners = [found for found in module.modules() if isinstance(found, RecomputedStack)]
    return runners[-1] if runners and runners[-1].blocks[-1].mode != "residual" else None


def recompute_ahead(outputs: Iterable[torch.Tensor]) -> None:
    """Recompute the tensors that the backward of `outputs` needs first (`mhc.recompute`).

    Recomputation runs when a node of the graph unpacks its saved tensors: this unpacks those of the last node with any.
    """
    for output in outputs:
        node: Any = output.grad_fn
        while node is not None and not getattr(node, "saved_tensors", ()):
            node = node.next_functions[0][0] if node.next_functions else None
