"""One tensor for several uses, whose gradients are summed in place.

Autograd sums the gradients of a tensor's uses into fresh memory. For streams that is tens of megabytes a sum, and
the page faults cost more than the additions.
"""

from __future__ import annotations

from typing import Any

import torch


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, uses: int) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for _ in range(uses))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:
        total: torch.Tensor | None = None
        for grad in grads:
            if grad is not None:
                total = grad if total is None else total.add_(grad)
        return total, None


def share(x: torch.Tensor, uses: int) -> tuple[torch.Tensor, ...]:
    """`uses` views of x, each for one op of `mhc.functional` alone: their gradients must be memory of their own.

    A compiler plans the sums itself, so that it gets x as it is.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad):
        return (x,) * uses
    views: tuple[torch.Tensor, ...] = _Share.apply(x, uses)  # type: ignore[no-untyped-call]
    return views
