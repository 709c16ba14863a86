"""pre together with the streams that go past it to merge, so that their gradients meet inside of pre's backward.

Autograd would sum the gradient that merge gives x and the one that pre gives x in a pass of its own: three times the
streams' bytes. Here pre's backward kernel adds to the first one while it is at it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mhc import functional
from mhc.dispatch.kernels import active
from mhc.dispatch.operators import needs_dispatcher


class _PreAndStreams(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, phi: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor, rounds: int, eps: float
    ) -> tuple[torch.Tensor, ...]:
        n, width = x.shape[-2:]
        leading = x.shape[:-2]
        given = (x.reshape(-1, n, width).contiguous(), phi.contiguous(), alpha.contiguous(), bias.contiguous())
        u, post, res, z, s = active().run("pre", "forward", n, width, rounds, (*given, eps))
        ctx.save_for_backward(*given, z, s)
        ctx.rounds, ctx.eps, ctx.walked = rounds, eps, False
        return u.view(*leading, width), post.view(*leading, n), res.view(*leading, n, n), x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *_ = saved = ctx.saved_tensors
        tokens, n, width = x.shape
        du, dpost, dres, past = (grad.contiguous() for grad in grads)
        flat = (du.view(tokens, width), dpost.view(tokens, n), dres.view(tokens, n, n))
        # merge made `past` for us alone: `pre_and_streams` gives x to nothing else. But who walks the graph again may
        # bring the first walk's `past`, which has become its dx (a pipeline's backward: of the input, then of weights).
        if ctx.walked:
            past = past.clone()
        ctx.walked = True
        given = (*saved, *flat, ctx.eps, past.view(tokens, n, width))
        dx, dphi, dalpha, dbias = active().run("pre", "backward", n, width, ctx.rounds, given)
        return dx.view(past.shape), dphi, dalpha, dbias, None, None


def pre_and_streams(
    x: torch.Tensor, phi: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor, *, rounds: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`mhc.functional.pre`, and x again: that x is for one op of `mhc.functional` alone, whose gradient is written to.

    A compiler plans the sum itself, so that it gets x as it is, as does everything else that looks on.
    """
    if not torch.is_grad_enabled() or needs_dispatcher((x, phi, alpha, bias)):
        return (*functional.pre(x, phi, alpha, bias, rounds=rounds, eps=eps), x)
    functional.check_pre(x, phi, alpha, bias)
    u, post, res, past = _PreAndStreams.apply(x, phi, alpha, bias, rounds, eps)  # type: ignore[no-untyped-call]
    return u, post, res, past
