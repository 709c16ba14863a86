"""Tensor and sequence parallelism: every rank holds whole streams, of all tokens or of its own tokens."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from mhc.modules.hyper_connection import HyperConnection
from tiles.errors import BadInput

Tokens = Literal["replicated", "sharded"]


class StreamParallel(ParallelStyle):
    """The style of a `HyperConnection` for `torch.distributed.tensor.parallel.parallelize_module`.

    phi, alpha and bias become replicated DTensors (rank 0's values), so that optimizers and gradient clipping see
    DTensors only. The streams stay plain tensors, never split along n or C: a token's coefficients need all of them.

    Args:
        tokens: `replicated`: every rank holds the streams of all tokens, and all ranks compute the same gradients of
            phi, alpha and bias. The sublayer's input and output are replicated, as with `ColwiseParallel()` and
            `RowwiseParallel()`. `sharded`: every rank holds the streams of its own tokens (sequence parallelism: work
            and memory of the streams are divided by the number of ranks), and the gradients of phi, alpha and bias are
            summed over ranks. The sublayer all-gathers and reduce-scatters, as with
            `ColwiseParallel(input_layouts=Shard(d))` and `RowwiseParallel(output_layouts=Shard(d))`, where d is the
            dimension of the tokens.

    Example:
        >>> plan = {"up": ColwiseParallel(input_layouts=Shard(0)), "down": RowwiseParallel(output_layouts=Shard(0))}
        >>> for block in stack.blocks:
        ...     parallelize_module(block, mesh, StreamParallel(tokens="sharded"))
        ...     parallelize_module(block.sublayer, mesh, plan)
    """

    def __init__(self, *, tokens: Tokens) -> None:
        super().__init__()
        if tokens not in get_args(Tokens):
            raise BadInput(f"tokens must be one of {', '.join(get_args(Tokens))}, got {tokens}: choose one of them")
        self.tokens = tokens

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, HyperConnection):
            raise BadInput(
                f"StreamParallel places a HyperConnection, got {type(module).__name__}: name the block itself"
            )
        for name, parameter in list(module.named_parameters(recurse=False)):
            placed = distribute_tensor(parameter, device_mesh, [Replicate()], src_data_rank=self.src_data_rank)
            module.register_parameter(name, nn.Parameter(placed, parameter.requires_grad))
        kind = type(module)
        module.__class__ = type(f"Placed{kind.__name__}", (_Placed, kind), {"tokens": self.tokens})
        return module


class _Placed(HyperConnection):
    """A connection whose parameters are replicated DTensors; FSDP2 changes a module's class in the same way."""

    tokens: Tokens

    def parameters_for_ops(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """phi, alpha, bias as plain tensors, for the kernels."""
        phi, alpha, bias = (self._local(parameter) for parameter in super().parameters_for_ops())
        return phi, alpha, bias

    def _local(self, parameter: torch.Tensor) -> torch.Tensor:
        if not isinstance(parameter, DTensor):
            return parameter
        if self.tokens == "replicated":
            return parameter.to_local()
        # The ranks' gradients are partial sums; the backward of redistribute, replicated to replicated, adds them up.
        return parameter.redistribute(placements=parameter.placements).to_local(grad_placements=[Partial()])
