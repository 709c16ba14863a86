"""The ops between sublayers, for maps with a res matrix and for those whose res is the identity (Hunyuan-V4).

The identity has phi [2n, K], alpha [2] and bias [2n], hc_eps is added to post too, and res is None. Its ops are made of
project, aggregate and merge; with a res they are those of `mhc.functional`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad

from mhc import functional

Maps = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""u [..., C], post [..., n] and res [..., n, n], or None for the identity."""


def pre(x: torch.Tensor, phi: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor, **settings: Any) -> Maps:
    """`mhc.functional.pre`, also without rows of res."""
    n, width = x.shape[-2:]
    if phi.shape[0] != 2 * n:
        return functional.pre(x, phi, alpha, bias, **settings)
    with torch.autocast(x.device.type, enabled=False):
        z, s = functional.project(x, pad(phi, (0, 0, 0, n * n)))
        r = torch.rsqrt(s / (n * width) + settings["eps"]).unsqueeze(-1)
        pre, post = (alpha.repeat_interleave(n) * z[..., : 2 * n] * r + bias).sigmoid().split(n, dim=-1)
        u = functional.aggregate(x, pre + settings["hc_eps"])
        return u, settings["post_scale"] * post + settings["hc_eps"], None


def merge(x: torch.Tensor, f: torch.Tensor, res: torch.Tensor | None, post: torch.Tensor) -> torch.Tensor:
    """`mhc.functional.merge`, also with res None."""
    if res is None:
        n = x.shape[-2]
        res = torch.eye(n, dtype=torch.float32, device=x.device).expand(*x.shape[:-2], n, n)
    return functional.merge(x, f, res, post)


def step(
    x: torch.Tensor,
    f: torch.Tensor,
    post: torch.Tensor,
    res: torch.Tensor | None,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    **settings: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`mhc.functional.step`, also with res None."""
    if res is not None:
        return functional.step(x, f, post, res, phi, alpha, bias, **settings)
    x = merge(x, f, res, post)
    return (x, *pre(x, phi, alpha, bias, **settings))
