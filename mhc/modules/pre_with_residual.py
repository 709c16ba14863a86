"""pre together with the residual (the streams that bypass the sublayer), with one backward for both.

Autograd would add merge's gradient of x and pre's gradient of x in a pass of its own, three times the streams' bytes.
Here pre's backward kernel adds to merge's gradient in place.
"""

from __future__ import annotations

from typing import Any

import torch

from mhc import functional
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
        leading = x.shape[:-2]
        given = (x, phi, alpha, bias, *norm_weight)
        u, *maps, z, s = active().run(op, "forward", n, width, rounds, (*_flat(*given), *scalars))
        ctx.save_for_backward(*given, z, s)
        ctx.rounds, ctx.scalars, ctx.op, ctx.backward_ran = rounds, scalars, op, False
        # No view in autograd's sense, which forbids a sublayer that begins in place to write to one of several views.
        u = u.view(*leading, width).detach()
        return u, *(of.view(*leading, *of.shape[1:]) for of in maps), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *given, z, s = ctx.saved_tensors
        n, width = given[0].shape[-2:]
        *of_results, dresidual = (grad.contiguous() for grad in grads)
        leading = given[0].shape[:-2]
        tokens = leading.numel()
        flat = tuple(grad.view(tokens, *grad.shape[len(leading) :]) for grad in of_results)
        if torch_form.kernel_is_not_enough(flat):
            with torch.enable_grad():  # x's view stays in x's graph
                inputs = _flat(*given)
            settings = (*ctx.scalars, n, width, ctx.rounds)
            dx, *of_rest = torch_form.gradients(ctx.op, inputs, settings, flat)
            return _in_order(dresidual if dx is None else dx.view(dresidual.shape) + dresidual, *of_rest)
        # merge's gradient is written to: nothing else uses it, as the residual is for one op. But where res is the
        # identity, it is the gradient of x' itself; and a second backward through the graph may bring the same tensor,
        # which the first one has made its dx (a pipeline's backward: of the input, then of the weights).
        if ctx.backward_ran or ctx.op.endswith(IDENTITY):
            dresidual = dresidual.clone()
        ctx.backward_ran = True
        taken = (*_flat(*given), z, s, *flat, *ctx.scalars, dresidual.view(tokens, n, width))
        dx, *rest = active().run(ctx.op, "backward", n, width, ctx.rounds, taken)
        return _in_order(dx.view(dresidual.shape), *rest)


def _in_order(*grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The gradients of x, phi, alpha, bias and, where there is one, the norm's weight, with none for the settings."""
    return (*grads[:4], None, None, None, *grads[4:])


def _flat(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The kernel's inputs: x [..., n, C] as [tokens, n, C], and the parameters, contiguous."""
    tokens = x.shape[:-2].numel()
    return (x.reshape(tokens, *x.shape[-2:]).contiguous(), *(parameter.contiguous() for parameter in parameters))


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
    if not torch.is_grad_enabled() or needs_dispatcher((*given, norm_weight)):
        named: dict[str, Any] = {"eps": eps, "hc_eps": hc_eps, "post_scale": post_scale}
        named |= {"norm_weight": norm_weight, "norm_eps": norm_eps}
        return (*functional.pre(*given, rounds=rounds, **named), x)
    *_shape, mixes = functional.check_pre(*given)
    norm = sublayer_norm("pre" if mixes else "pre" + IDENTITY, x, norm_weight, norm_eps, rounds)
    settings = (rounds, (eps, hc_eps, post_scale, *norm.eps), norm.op)
    u, post, *res, residual = _PreWithResidual.apply(*given, *settings, *norm.weight)  # type: ignore[no-untyped-call]
    return norm.apply(u), post, res[0] if res else None, residual
