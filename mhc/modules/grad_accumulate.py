"""Views of one tensor whose gradients are accumulated in place.

Autograd sums the gradients of a tensor that is used more than once into new memory. For streams that is tens of
megabytes a sum, and the page faults cost more than the additions.
"""

from __future__ import annotations

from typing import Any

import torch

from mhc.dispatch.torch_form import is_transformed, kernel_is_not_enough


class _GradAccumulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, uses: int) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for _ in range(uses))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:
        out_of_place = kernel_is_not_enough(grads)
        total: torch.Tensor | None = None
        for grad in grads:
            if grad is not None:
                total = grad if total is None else total + grad if out_of_place else total.add_(grad)
        return total, None


def grad_accumulating_views(x: torch.Tensor, uses: int) -> tuple[torch.Tensor, ...]:
    """Return `uses` views of x, each for one op of `mhc.functional` only: the first gradient is written to.

    Under a compiler, which plans the sums itself, and under function transforms they are x itself.
    """
    if torch.compiler.is_compiling() or is_transformed((x,)) or not (torch.is_grad_enabled() and x.requires_grad):
        return (x,) * uses
    views: tuple[torch.Tensor, ...] = _GradAccumulate.apply(x, uses)  # type: ignore[no-untyped-call]
    return views
