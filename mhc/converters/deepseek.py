"""DeepSeek-V4's checkpoint layout: three tensors per connection, named after its sublayer.

| theirs                                   | shape               | ours                             |
|------------------------------------------|---------------------|----------------------------------|
| P.hc_attn_fn, P.hc_ffn_fn                | [n² + 2n, n · C]    | phi, its res block transposed    |
| P.hc_attn_scale, P.hc_ffn_scale          | [3] (pre, post, res)| alpha                            |
| P.hc_attn_base, P.hc_ffn_base            | [n² + 2n]           | bias, its res block transposed   |
| hc_head_fn, hc_head_scale, hc_head_base  | [n, n · C], [1], [n]| phi, alpha, bias of `StreamHead` |

P is `layers.0` and so on, or `mtp.0`, which has a head of its own. Their map is ours with hc_eps = 1e-6, which
`HyperConnection` and `StreamHead` take, 20 rounds, eps = 1e-6 and post_scale = 2: coefficients agree to rounding.

Single-pass mHC (DeepSeek-V4.1), in which a sublayer's input uses the pre of the sublayer before it, has connections of
the same names and shapes, eps = 1e-20, and no head. `HyperConnectionStack(..., single_pass=True)` computes it; its
configuration tells it apart, its tensors do not.
"""

from __future__ import annotations

import re

import torch

from mhc.converters.packing import Modules, State, check_parts, find_modules, outputs, transpose_res
from tiles.errors import BadInput

_THEIRS = re.compile(r"(?P<module>(?:.+\.)?hc_(?:attn|ffn|head))_(?P<part>fn|scale|base)")
_OURS = re.compile(r"(?P<module>(?:.+\.)?hc_(?:attn|ffn|head))\.(?P<part>phi|alpha|bias)")
_PARTS = {"fn": "phi", "scale": "alpha", "base": "bias"}


def from_deepseek(state: State, *, streams: int) -> dict[str, torch.Tensor]:
    """A checkpoint of DeepSeek-V4's layout with its connections and heads as our parameters.

    `P.hc_attn_fn` becomes `P.hc_attn.phi`, and so on; other tensors are passed through. Dtypes stay. Raises
    `BadInput` where no connection is found, one lacks a tensor, or a shape is not that of `streams`.
    """
    modules, others = find_modules(state, _THEIRS, "hc_attn_*, hc_ffn_* or hc_head_* tensors of DeepSeek-V4's layout")
    _check_no_megatron(others)
    return others | convert(modules, streams, _PARTS, "{module}.{part}")


def to_deepseek(state: State, *, streams: int) -> dict[str, torch.Tensor]:
    """The inverse of `from_deepseek`, bit for bit."""
    modules, others = find_modules(state, _OURS, "hc_attn.*, hc_ffn.* or hc_head.* parameters of ours")
    _check_no_megatron(others)
    return others | convert(modules, streams, {ours: theirs for theirs, ours in _PARTS.items()}, "{module}_{part}")


def _check_no_megatron(others: State) -> None:
    if megatron := next((key for key in others if "hyper_connection." in key), None):
        raise BadInput(f"state must hold DeepSeek-V4's layout alone, got {megatron}: take the converter for Megatron's")


def convert(
    modules: Modules, streams: int, names: dict[str, str], key: str, head_key: str | None = None
) -> dict[str, torch.Tensor]:
    """Convert connections and heads in either direction.

    `names` maps the old to the new names of matrix, gate and bias, in this order; `key` is the form of a new key with
    `{module}` and `{part}`, `head_key` that of a head's where it differs. A connection with two gates has no logits of
    res, which is the identity.
    """
    _, gate, _ = names
    converted = {}
    for module, parts in modules.items():
        head, identity = module.endswith("hc_head"), gate in parts and parts[gate].shape == (2,)
        count, gates = (streams, 1) if head else (2 * streams, 2) if identity else (outputs(streams), 3)
        check_parts(module, parts, {part: gates if part == gate else count for part in names}, streams)
        for part, tensor in parts.items():
            new = (head_key or key if head else key).format(module=module, part=names[part])
            has_res = part != gate and not head and not identity
            converted[new] = transpose_res(tensor, streams) if has_res else tensor
    return converted
