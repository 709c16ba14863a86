"""Tensors that are no views in autograd's sense, of views: they share the memory, nothing is copied.

The ops of `mhc.functional` return views, as they unflatten the leading dimensions. FSDP2 hooks a module's outputs, and
a write to a view drops the hooks; a pipeline detaches a stage's outputs in place, which a view does not allow.
"""

from __future__ import annotations

from typing import Any

import torch


class _Unview(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


def unview(x: torch.Tensor) -> torch.Tensor:
    """x itself, or the same values as no view; under a compiler, which has its own views, x."""
    if torch.compiler.is_compiling() or not (x._is_view() and x.requires_grad):
        return x
    unviewed: torch.Tensor = _Unview.apply(x)  # type: ignore[no-untyped-call]
    return unviewed
