"""The maps of released models in plain torch, with hc_eps in any places; inputs for them, and tolerances."""

import math

import torch

WIDTH, TOKENS = 16, 6
OUTPUTS, GRADIENTS = 5e-6, 3e-4
"""Relative to the largest: float32 through 40 half rounds, and back."""

AS_RELEASED = frozenset({"pre", "softmax", "sums"})
"""Where DeepSeek-V4 and GLM-5.3 add hc_eps."""


def maps(x, phi, alpha, bias, eps, hc_eps, post_scale=2.0, rounds=20, places=AS_RELEASED):
    """pre, post, res after DeepSeek-V4's released code, in our orientation (docs/design.md), in x's precision.

    hc_eps is added in these places: to pre, to post, to the softmax, to the sums, to res after all rounds.
    """

    def added(place):
        return hc_eps if place in places else 0.0

    n = x.shape[-2]
    flat = x.flatten(-2)
    h = (flat @ phi.T) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)
    pre, post, res = h.split((n, n, n * n), -1)
    bias_pre, bias_post, bias_res = bias.split((n, n, n * n))
    res = (alpha[2] * res + bias_res).unflatten(-1, (n, n)).softmax(-2) + added("softmax")
    res = res / (res.sum(-1, keepdim=True) + added("sums"))
    for _ in range(rounds - 1):
        res = res / (res.sum(-2, keepdim=True) + added("sums"))
        res = res / (res.sum(-1, keepdim=True) + added("sums"))
    pre = (alpha[0] * pre + bias_pre).sigmoid() + added("pre")
    post = post_scale * (alpha[1] * post + bias_post).sigmoid() + added("post")
    return pre, post, res + added("rounds")


def gates(x, phi, alpha, bias, eps, hc_eps, post_scale, places):
    """pre and post after Hunyuan-V4's released code, whose res is the identity; hc_eps is added in these places."""
    n, flat = x.shape[-2], x.flatten(-2)
    h = (flat @ phi.T) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)
    pre, post = ((alpha[k] * h + bias).split(n, -1)[k].sigmoid() for k in (0, 1))
    return pre + (hc_eps if "pre" in places else 0), post_scale * post + (hc_eps if "post" in places else 0)


def drawn(n, spread, seed=0, tokens=TOKENS):
    """x and parameters with logits of this spread. Token 0 is zero; token 1 is small, so that the norm's eps shows."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, WIDTH, generator=random)
    x[0] = 0
    x[1] *= 1e-3
    count = n * n + 2 * n
    phi = torch.randn(count, n * WIDTH, generator=random) / math.sqrt(n * WIDTH)
    bias = spread * torch.randn(count, generator=random)
    return x, phi, torch.full((3,), spread / 2), bias


def off(mine, wanted):
    """The largest difference, relative to the largest value."""
    return ((mine.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()
