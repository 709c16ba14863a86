"""pre together with the residual (the streams that bypass the sublayer), with one backward for both.

Autograd would add merge's gradient of x and pre's gradient of x in a pass of its own, three times the streams' bytes.
Here pre's backward kernel adds to merge's gradient in place.
"""

from __future__ import annotations

from typing import Any

import torch

from mhc import functional
from mhc.checks import stream_shape
from mhc.dispatch import torch_form
from mhc.dispatch.kernels import active
from mhc.dispatch.operators import needs_dispatcher
from mhc.sublayer_norm import NORM_EPS, sublayer_norm
from tiles.kernels.spec import IDENTITY


class _PreWithResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        phi: torch.Tensor,
        alpha: torch.Tensor,
        bias: torch.Tensor,
        rounds: int,
        scalars: tuple[float, ...],
        op: str,
        *norm_weight: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """u, post, res where it is not the identity, and the residual."""
        n, width = x.shape[-2:]
        given = (x, phi, alpha, bias, *norm_weight)
        *results, z, s = active().run(op, "forward", n, width, rounds, (*map(torch.Tensor.contiguous, given), *scalars))
        ctx.save_for_backward(*given, z, s)
        ctx.rounds, ctx.scalars, ctx.op, ctx.backward_ran = rounds, scalars, op, False
        return *results, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved, op, rounds = ctx.saved_tensors, ctx.op, ctx.rounds
        n, width = saved[0].shape[-2:]
        dresidual = grads[-1].contiguous()
        if torch_form.kernel_is_not_enough(grads):
            dx, *of_rest = torch_form.gradients(op, saved[:-2], (*ctx.scalars, n, width, rounds), grads[:-1])
            return _in_order(dresidual if dx is None else dx + dresidual, *of_rest)
        # merge's gradient is written to: nothing else uses it, as the residual is for one op. But where res is the
        # identity, it is the gradient of x' itself; and a second backward through the graph may bring the same tensor,
        # which the first one has made its dx (a pipeline's backward: of the input, then of the weights).
        if ctx.backward_ran or op.endswith(IDENTITY):
            dresidual = dresidual.clone()
        ctx.backward_ran = True
        taken = map(torch.Tensor.contiguous, (*saved, *grads[:-1]))
        return _in_order(*active().run(op, "backward", n, width, rounds, (*taken, *ctx.scalars, dresidual)))


def _in_order(*grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The gradients of x, phi, alpha, bias and, where there is one, the norm's weight, with none for the settings."""
    return (*grads[:4], None, None, None, *grads[4:])


def pre_with_residual(
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    *,
    rounds: int,
    eps: float,
    hc_eps: float,
    post_scale: float,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = NORM_EPS,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """`mhc.functional.pre`, and x as the residual, for one op of `mhc.functional` only: its gradient is written to.

    Where torch's dispatcher is needed, the residual is x itself: a compiler plans the sum of gradients by itself.
    """
    given = (x, phi, alpha, bias)
    if not torch.is_grad_enabled() or needs_dispatcher(given if norm_weight is None else (*given, norm_weight)):
        named: dict[str, Any] = {"eps": eps, "hc_eps": hc_eps, "post_scale": post_scale}
        named |= {"norm_weight": norm_weight, "norm_eps": norm_eps}
        return (*functional.pre(*given, rounds=rounds, **named), x)
    streams, _width = stream_shape(x)
    norm = sublayer_norm(functional.op_of_pre(streams, phi), x, norm_weight, norm_eps, rounds)
    settings = (rounds, (eps, hc_eps, post_scale, *norm.eps), norm.op)
    fault: ValueError | None = None
    try:
        u, post, *res, residual = _PreWithResidual.apply(*given, *settings, *norm.weight)  # type: ignore[no-untyped-call]
    except ValueError as error:
        fault = error
    if fault is not None:
        functional.check_pre(*given)
        raise fault
    return norm.apply(u), post, res[0] if res else None, residual
