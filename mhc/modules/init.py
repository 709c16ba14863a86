"""How the parameters of the connections start, and why.

What the papers say. arXiv 2512.24880 (mHC), table 5: alpha = 0.01, for mHC and for HC; it states no start of phi and of
the biases. arXiv 2409.19606 (HC), equation 14: the token-dependent weights are zero, post is one, res the identity, and
pre of the k-th block reads stream k mod n alone. All the rest here is our choice, with its reason beside it.

| init     | alpha | what a stream keeps in one layer of `mhc` | a fresh network of equal streams |
|----------|-------|-------------------------------------------|----------------------------------|
| paper    | 0.01  | 0.95                                      | is close to the plain residual   |
| identity | 0     | 0.999                                     | is the plain residual, to rounding |

Both: pre = 1/n, post = 1, so that u is the streams' mean and each stream gets the sublayer's output once. `identity` is
for networks that were trained with a plain residual; its gates open by their own gradient, which phi's random rows make
different for every stream. In `hc`, res starts as the identity in both.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

Init = Literal["paper", "identity"]

ALPHA = 0.01
"""Gate of the token-dependent part of the logits (arXiv 2512.24880, table 5)."""

SATURATED = 20.0
"""A logit whose sigmoid is 1 in float32."""

KEPT = 0.95
"""Share of itself that a stream keeps in one layer at the start."""

NEARLY_ALL = 0.999
"""The same with `identity`: a logit of 8 where n = 4. Nearer, and the gradients of the other logits would vanish."""


def start(streams: int, width: int, *, constrained: bool, dynamic: bool, init: Init) -> dict[str, torch.Tensor]:
    """phi [N, K], alpha [3] and bias [N] of a fresh block, float32; of a static one (not `dynamic`) bias alone."""
    kept = KEPT if init == "paper" else NEARLY_ALL
    bias = constrained_bias(streams, kept) if constrained else unconstrained_bias(streams)
    if not dynamic:
        weights = reading_weights(streams)
        bias[:streams] = weights.logit().clamp(-SATURATED, SATURATED) if constrained else weights
        return {"bias": bias}
    alpha = torch.full((3,), ALPHA if init == "paper" else 0.0)
    return {"phi": draw_phi(len(bias), streams * width), "alpha": alpha, "bias": bias}


def draw_phi(outputs: int, fan_in: int) -> torch.Tensor:
    """phi [outputs, K] from N(0, 1/K).

    The streams are normalised, so z·r has unit variance at any n and width, and times alpha = 0.01 it moves the logits
    by about 0.01: training starts at the network that the biases describe. Zeros would start there too, but replicated
    streams would then get equal gradients for ever and stay equal; random rows make them part.
    """
    return torch.randn(outputs, fan_in) / math.sqrt(fan_in)


def even_gate(streams: int) -> float:
    """The logit of 1/n: with it the sublayer's input is the mean of the streams. One stream is passed on whole."""
    return -math.log(streams - 1) if streams > 1 else SATURATED


def reading_weights(streams: int) -> torch.Tensor:
    """pre [n] of a static block: random, above zero, of sum one.

    Equal streams that all blocks read with equal weights get equal gradients, and without a phi nothing else would make
    them part. Read with weights of sum one, they still give the plain residual's u.
    """
    return torch.randn(streams).softmax(-1)


def constrained_bias(streams: int, kept: float = KEPT) -> torch.Tensor:
    """bias [N] of mhc: pre = 1/n; post = 2σ(0) = 1; res keeps that much of each stream, spreads the rest evenly.

    A diagonal of exactly one would need infinite logits, and far logits get no gradient; equal logits would average
    the streams away in the first layer. Manifolds other than Sinkhorn's take the same logits to matrices near the
    identity too, each its own distance away.
    """
    logit = math.log(kept / (1 - kept) * (streams - 1)) if streams > 1 else 0.0
    pre = torch.full((streams,), even_gate(streams))
    return torch.cat((pre, torch.zeros(streams), (logit * torch.eye(streams)).flatten()))


def unconstrained_bias(streams: int) -> torch.Tensor:
    """bias [N] of hc: pre = 1/n, post = 1, res = identity.

    Equation 14 of arXiv 2409.19606, but for pre: a block does not know its place in the network (see
    `hyper_connection.read_in_turn`).
    """
    return torch.cat((torch.full((streams,), 1 / streams), torch.ones(streams), torch.eye(streams).flatten()))
