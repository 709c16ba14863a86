"""The identity: streams are not mixed."""

from __future__ import annotations

import torch

from mhc.manifolds.checks import streams_of


def identity_of(logits: torch.Tensor) -> torch.Tensor:
    """logits [..., n, n] -> the identity [..., n, n], whatever the logits; they get no gradient.

    Doubly stochastic and orthogonal; products are the identity; norm 1. Streams interact through pre and post only.
    """
    n = streams_of(logits)
    return torch.eye(n, dtype=logits.dtype, device=logits.device).expand(logits.shape)
