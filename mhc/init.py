"""How the parameters of the connections start, and why."""

from __future__ import annotations

import math

import torch

ALPHA = 0.01
"""Gate of the token-dependent part of the logits (paper: 0.01)."""

SATURATED = 20.0
"""A logit whose sigmoid is 1 in float32."""

KEPT = 0.95
"""Share of itself that a stream keeps in one layer at the start."""


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


def constrained_bias(streams: int) -> torch.Tensor:
    """bias [N] of mhc: pre = 1/n; post = 2σ(0) = 1; res keeps 0.95 of each stream, spreads the rest evenly.

    A diagonal of exactly one would need infinite logits, and far logits get no gradient; equal logits would average
    the streams away in the first layer.
    """
    kept = math.log(KEPT / (1 - KEPT) * (streams - 1)) if streams > 1 else 0.0
    pre = torch.full((streams,), even_gate(streams))
    return torch.cat((pre, torch.zeros(streams), (kept * torch.eye(streams)).flatten()))


def unconstrained_bias(streams: int) -> torch.Tensor:
    """bias [N] of hc: pre = 1/n, post = 1, res = identity (arXiv 2409.19606, but for pre, which there is one-hot)."""
    return torch.cat((torch.full((streams,), 1 / streams), torch.ones(streams), torch.eye(streams).flatten()))
