"""Expansion to n streams after the embedding, and their reduction before the output head."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from mhc import functional
from mhc.checks import check_problem, check_scalars, expect, stream_shape
from mhc.modules.init import INITIAL_ALPHA, add_parameters, mean_pre_logit, random_phi, reset_parameters
from tiles.errors import BadInput


def expand_streams(h: torch.Tensor, streams: int) -> torch.Tensor:
    """Copy h to n equal streams: h [..., C] -> x [..., n, C]."""
    check_problem(streams, h.shape[-1])
    return h.unsqueeze(-2).repeat_interleave(streams, dim=-2)


def reduce_streams(x: torch.Tensor, how: Literal["mean", "sum"] = "mean") -> torch.Tensor:
    """The mean or sum of the streams, in x's dtype: x [..., n, C] -> h [..., C].

    The mean is for streams that started as copies of one embedding and were mixed by rows that sum to one.
    """
    if how not in ("mean", "sum"):
        raise BadInput(f"how must be mean or sum, got {how}: use StreamHead for learned weights")
    return x.mean(-2) if how == "mean" else x.sum(-2)


class StreamHead(nn.Module):
    """A learned reduction of the streams, as DeepSeek-V4 has before its output head: x [..., n, C] -> h [..., C].

    h = Σ_i g_i x_i, gates g = σ(alpha · (x̄ · phiᵀ) · rsqrt(mean x̄² + eps) + bias) + hc_eps, one per stream and token.
    Parameters (float32): phi [n, nC], alpha [1], bias [n]. It starts close to the mean: bias = σ⁻¹(1/n), alpha = 0.01.

    Args:
        width, streams: C and n of the streams.
        eps: added to the mean square in the norm.
        hc_eps: added to the gates; 1e-6 in DeepSeek-V4.
    """

    phi: nn.Parameter
    alpha: nn.Parameter
    bias: nn.Parameter

    def __init__(self, width: int, streams: int, *, eps: float = functional.EPS, hc_eps: float = 0.0) -> None:
        super().__init__()
        check_problem(streams, width)
        check_scalars(hc_eps)
        self.width, self.streams, self.eps, self.hc_eps = width, streams, eps, hc_eps
        add_parameters(self, self._initial_parameters())

    def reset_parameters(self) -> None:
        """Initialise the parameters again; for those that were made on the meta device."""
        reset_parameters(self, self._initial_parameters())

    def _initial_parameters(self) -> dict[str, torch.Tensor]:
        n = self.streams
        return {
            "phi": random_phi(n, n * self.width),
            "alpha": torch.full((1,), INITIAL_ALPHA, dtype=torch.float32),
            "bias": torch.full((n,), mean_pre_logit(n), dtype=torch.float32),
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., n, C] -> h [..., C] in x's dtype."""
        stream_shape(x)
        expect("x", x, (*x.shape[:-2], self.streams, self.width), x.dtype, self.phi.device)
        with torch.autocast(x.device.type, enabled=False):
            flat = x.flatten(-2).float()
            r = torch.rsqrt(flat.square().mean(-1, keepdim=True) + self.eps)
            logits = self.alpha.float() * (flat @ self.phi.float().T) * r + self.bias.float()
            return functional.aggregate(x, logits.sigmoid() + self.hc_eps)

    def extra_repr(self) -> str:
        """The settings that `print` shows."""
        return f"width={self.width}, streams={self.streams}"
