"""Initial parameters of the connections, with the reason for each value.

The papers: arXiv 2512.24880 (mHC), table 5: alpha = 0.01, for mHC and for HC; phi and the biases are not stated.
arXiv 2409.19606 (HC), equation 14: the token-dependent weights are zero, post is one, res the identity, and pre of
block k is one at stream k mod n alone. The rest is our choice.

| init     | alpha | diagonal of res in `mhc` | a fresh network of equal streams   |
|----------|-------|--------------------------|------------------------------------|
| paper    | 0.01  | 0.95                     | is close to the plain residual     |
| identity | 0     | 0.999                    | is the plain residual, to rounding |

Both: pre = 1/n and post = 1, so that u is the mean of the streams and the sublayer's output is added once to each.
`identity` is for networks that were trained with a plain residual; alpha leaves zero by its own gradient, which phi's
random rows make different for every stream. In `hc`, res starts as the identity in both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

Init = Literal["paper", "identity"]

INITIAL_ALPHA = 0.01
"""Factor of the token-dependent part of the logits (arXiv 2512.24880, table 5)."""

SATURATED_LOGIT = 20.0
"""A logit whose sigmoid is 1 in float32."""

PAPER_DIAGONAL = 0.95
"""The diagonal of res with `paper`: the share of itself that a stream keeps in one layer."""

IDENTITY_DIAGONAL = 0.999
"""The same with `identity`: a logit of 8 at n = 4. Closer to 1, the gradients of the other logits would vanish."""


def initial_parameters(
    streams: int, width: int, *, constrained: bool, mixes: bool, dynamic: bool, init: Init
) -> dict[str, torch.Tensor]:
    """phi [N, K], alpha [3] and bias [N] of a block, float32; of a static one (not `dynamic`) the bias only.

    N = n² + 2n; where streams are not mixed, 2n, and alpha [2].
    """
    diagonal = PAPER_DIAGONAL if init == "paper" else IDENTITY_DIAGONAL
    bias = constrained_bias(streams, diagonal) if constrained else unconstrained_bias(streams)
    bias = bias if mixes else bias[: 2 * streams]
    if not dynamic:
        weights = random_static_pre(streams)
        bias[:streams] = weights.logit().clamp(-SATURATED_LOGIT, SATURATED_LOGIT) if constrained else weights
        return {"bias": bias}
    alpha = torch.full((3 if mixes else 2,), INITIAL_ALPHA if init == "paper" else 0.0, dtype=torch.float32)
    return {"phi": random_phi(len(bias), streams * width), "alpha": alpha, "bias": bias}


def add_parameters(module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Give a module its parameters, with these values."""
    for name, value in values.items():
        setattr(module, name, nn.Parameter(value))


def reset_parameters(module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Write these values to a module's parameters, which may have been made on the meta device."""
    with torch.no_grad():
        for name, value in values.items():
            getattr(module, name).copy_(value)


def random_phi(outputs: int, fan_in: int) -> torch.Tensor:
    """phi [outputs, K] from N(0, 1/K).

    The streams are normalised, so z·r has unit variance at any n and width, and alpha = 0.01 times it moves the logits
    by about 0.01: training starts at the network that the biases describe. With zeros it would too, but replicated
    streams would get equal gradients and stay equal for ever; random rows make them diverge.
    """
    return torch.randn(outputs, fan_in, dtype=torch.float32) / math.sqrt(fan_in)


def mean_pre_logit(streams: int) -> float:
    """The logit of 1/n, with which u is the mean of the streams; for one stream, that of 1."""
    return -math.log(streams - 1) if streams > 1 else SATURATED_LOGIT


def random_static_pre(streams: int) -> torch.Tensor:
    """pre [n] of a static block: random, positive, with sum one.

    Equal streams that every block reads with equal weights get equal gradients, and without phi nothing else would make
    them diverge. With sum one, u is still the plain residual's.
    """
    return torch.randn(streams, dtype=torch.float32).softmax(-1)


def constrained_bias(streams: int, diagonal: float = PAPER_DIAGONAL) -> torch.Tensor:
    """bias [N] of mhc: pre = 1/n; post = 2σ(0) = 1; res has this diagonal and equal entries elsewhere.

    A diagonal of exactly one would need infinite logits, and large logits get no gradient; equal logits would make all
    streams equal in the first layer. The other manifolds also map these logits to matrices near the identity.
    """
    logit = math.log(diagonal / (1 - diagonal) * (streams - 1)) if streams > 1 else 0.0
    pre = torch.full((streams,), mean_pre_logit(streams), dtype=torch.float32)
    post, res = torch.zeros(streams, dtype=torch.float32), logit * torch.eye(streams, dtype=torch.float32)
    return torch.cat((pre, post, res.flatten()))


def unconstrained_bias(streams: int) -> torch.Tensor:
    """bias [N] of hc: pre = 1/n, post = 1, res = identity.

    Equation 14 of arXiv 2409.19606 but for pre, as a block does not know its index in the network (see
    `hyper_connection.init_cyclic_pre`).
    """
    pre = torch.full((streams,), 1 / streams, dtype=torch.float32)
    post, res = torch.ones(streams, dtype=torch.float32), torch.eye(streams, dtype=torch.float32)
    return torch.cat((pre, post, res.flatten()))
