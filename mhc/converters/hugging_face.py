"""The layout that transformers gives DeepSeek-V4, GLM-5.3 and Hunyuan-V4: `attn_hc` and `ffn_hc` in every layer.

| theirs                             | shape               | ours                                     |
|------------------------------------|---------------------|------------------------------------------|
| P.attn_hc.fn, P.ffn_hc.fn          | [n² + 2n, n · C]    | P.attn_hc.phi, its res block transposed  |
| P.attn_hc.scale, P.ffn_hc.scale    | [3] (pre, post, res)| P.attn_hc.alpha                          |
| P.attn_hc.base, P.ffn_hc.base      | [n² + 2n]           | P.attn_hc.bias, its res block transposed |
| hc_head.hc_fn, .hc_scale, .hc_base | [n, n · C], [1], [n]| hc_head.phi, .alpha, .bias               |

P is `model.layers.0` and so on. `hc_eps`, `hc_sinkhorn_iters` and `rms_norm_eps` of their configuration are hc_eps,
rounds and eps of ours. GLM's head is the mean of the streams (`mhc.reduce_streams`).

Hunyuan-V4 has the same names, but no logits of res, which is the identity: fn [2n, n · C], scale [2], base [2n], for
`HyperConnection(..., manifold="identity", hc_eps=hc_eps, post_scale=hc_magnitude)`. Its head is DeepSeek-V4's.
"""

from __future__ import annotations

import re

import torch

from mhc.converters.deepseek import convert
from mhc.converters.packing import State, find_modules

_THEIRS = re.compile(
    r"(?P<module>(?:.+\.)?(?:(?:attn|ffn)_hc(?=\.(?:fn|scale|base)$)|hc_head(?=\.hc_)))\.(?:hc_)?(?P<part>fn|scale|base)"
)
_OURS = re.compile(r"(?P<module>(?:.+\.)?(?:(?:attn|ffn)_hc|hc_head))\.(?P<part>phi|alpha|bias)")
_PARTS = {"fn": "phi", "scale": "alpha", "base": "bias"}


def from_hugging_face(state: State, *, streams: int) -> dict[str, torch.Tensor]:
    """A state dict of transformers' DeepSeek-V4, GLM-5.3 or Hunyuan-V4 with its connections and head as our parameters.

    `P.attn_hc.fn` becomes `P.attn_hc.phi`, and so on; other tensors are passed through. Dtypes stay. Raises `BadInput`
    where no connection is found, one lacks a tensor, or a shape is not that of `streams`.
    """
    layout = "attn_hc.*, ffn_hc.* or hc_head.* tensors of transformers' DeepSeek-V4"
    modules, others = find_modules(state, _THEIRS, layout)
    return others | convert(modules, streams, _PARTS, "{module}.{part}")


def to_hugging_face(state: State, *, streams: int) -> dict[str, torch.Tensor]:
    """The inverse of `from_hugging_face`, bit for bit."""
    modules, others = find_modules(state, _OURS, "attn_hc.*, ffn_hc.* or hc_head.* parameters of ours")
    names = {ours: theirs for theirs, ours in _PARTS.items()}
    return others | convert(modules, streams, names, "{module}.{part}", "{module}.hc_{part}")
