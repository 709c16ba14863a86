"""Module outputs that are no views, as PyTorch's FSDP2 and pipelines need them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def unview_outputs(module: nn.Module) -> None:
    """Have `module` return tensors that are no views in autograd's sense; they still share memory, nothing is copied.

    The ops of `mhc.functional` return views, as they unflatten the leading dimensions. FSDP2 hooks a module's outputs,
    and a write to a view drops the hooks; a pipeline detaches a stage's outputs in place, which a view does not allow.
    """
    module.register_forward_hook(_unview)


class _Unview(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


def _unview(module: nn.Module, inputs: Any, result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(_unview(module, inputs, value) for value in result)
    if isinstance(result, torch.Tensor) and result._is_view() and result.requires_grad:
        return _Unview.apply(result)  # type: ignore[no-untyped-call]
    return result
