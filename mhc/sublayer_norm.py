"""The RMSNorm of a sublayer's input: what `pre`, `step` and `single_pass` of `mhc.functional` do with norm_weight."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from mhc.checks import STREAM_DTYPES, expect
from mhc.dispatch.kernels import active, normalising
from tiles.errors import BadInput
from tiles.kernels.reference_inputs import DTYPES

NORM_EPS = 1e-6
"""The default norm_eps, added to the mean square of the sublayer's input."""

FUSED_DEVICES = ("cpu",)
"""Where kernels normalise u while they have it. Elsewhere, and where the op was tuned without a norm alone, torch's
rms_norm follows the op: 2C elements a token more, u read and written once more, and u is saved for the backward."""


class SublayerNorm(NamedTuple):
    """How an op is called for a norm: its name, and what is among its tensors and at the end of its scalars. `after`,
    where it is given, are weight and eps of what follows the op."""

    op: str
    weight: tuple[torch.Tensor, ...] = ()
    eps: tuple[float, ...] = ()
    after: tuple[torch.Tensor, float] | None = None

    def apply(self, u: torch.Tensor) -> torch.Tensor:
        """The sublayer's input from the op's u."""
        return u if self.after is None else rms_norm(u, *self.after)

    def write(self, out: Any, place: int) -> Any:
        """Preallocated results with the sublayer's input at `place`, where the op's u is."""
        if self.after is not None:
            out[place].copy_(rms_norm(out[place], *self.after))
        return out


def sublayer_norm(
    op: str, x: torch.Tensor, norm_weight: torch.Tensor | None, norm_eps: float, rounds: int
) -> SublayerNorm:
    """How `op`, the one without a norm, is called for streams x [..., n, C] and the norm of the next sublayer's input,
    or none; raises `BadInput` unless the norm fits x."""
    if norm_weight is None:
        return SublayerNorm(op)
    if norm_weight.dtype not in STREAM_DTYPES:
        raise BadInput(
            f"norm_weight must be one of {', '.join(DTYPES)}, got {norm_weight.dtype}: cast it to one of them"
        )
    expect("norm_weight", norm_weight, (x.shape[-1],), norm_weight.dtype, x.device)
    if not 0 <= norm_eps < math.inf:
        raise BadInput(f"norm_eps must be at least 0 and finite, got {norm_eps}: give the norm's eps, such as 1e-6")
    streams, width = x.shape[-2:]
    called = op_with_norm(op, streams, width, rounds, x.dtype, x.device)
    if called == op:
        return SublayerNorm(op, after=(norm_weight, norm_eps))
    return SublayerNorm(called, (norm_weight.float(),), (norm_eps,))


def op_with_norm(op: str, streams: int, width: int, rounds: int, dtype: torch.dtype, device: torch.device) -> str:
    """What is called for `op` and a norm: the op that has the norm inside or, where its kernel would be the worse one,
    `op` itself, and then torch's rms_norm. A compiler, which cannot look at kernels, takes what is inside."""
    if device.type not in FUSED_DEVICES:
        return op
    if torch.compiler.is_compiling():
        return normalising(op)
    return active().op_with_norm(op, streams, width, rounds, dtype, device)


def rms_norm(u: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """torch's, in float32 where the dtypes differ; in u's dtype."""
    with torch.autocast(u.device.type, enabled=False):
        if weight.dtype == u.dtype:
            return torch.nn.functional.rms_norm(u, weight.shape, weight, eps)
        return torch.nn.functional.rms_norm(u.float(), weight.shape, weight.float(), eps).to(u.dtype)
