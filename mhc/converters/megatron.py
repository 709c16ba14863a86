"""Megatron-Core's checkpoint layout: a `HyperConnectionModule` per sublayer, with its three gates apart.

| theirs                            | shape            | ours                                                      |
|-----------------------------------|------------------|-----------------------------------------------------------|
| P.mapping_proj.weight             | [n² + 2n, n · C] | P.phi, its res block transposed                           |
| P.alpha_pre, _post, _res          | [1] each         | P.alpha                                                   |
| P.bias                            | [n² + 2n]        | P.bias, its res block transposed                          |
| decoder.hc_head_fn, _scale, _base | as DeepSeek's    | decoder.hc_head.phi, .alpha, .bias                        |

P is `decoder.layers.0.self_attention_hyper_connection`, `decoder.layers.0.mlp_hyper_connection` and so on. The modules
are whole on every tensor-parallel rank. Their map is DeepSeek's, with 1e-6 added in the same places, but for the norm:
1 / (rms + 1e-6) where ours is 1 / sqrt(rms² + 1e-6).
"""

from __future__ import annotations

import re

import torch

from mhc.converters.deepseek import from_deepseek, to_deepseek
from mhc.converters.packing import State, check_parts, find_modules, outputs, transpose_res

_MODULE = r"(?P<module>(?:.+\.)?(?:self_attention|mlp)_hyper_connection)\."
_GATES = ("alpha_pre", "alpha_post", "alpha_res")
_THEIRS = re.compile(_MODULE + r"(?P<part>mapping_proj\.weight|alpha_pre|alpha_post|alpha_res|bias)")
_OURS = re.compile(_MODULE + "(?P<part>phi|alpha|bias)")
_HEAD = re.compile(r"(?:.+\.)?hc_head[._](?:fn|scale|base|phi|alpha|bias)")


def from_megatron(state: State, *, streams: int, transposed: bool = True) -> dict[str, torch.Tensor]:
    """A Megatron-Core state dict with its connections and head as our parameters.

    `P.mapping_proj.weight` becomes `P.phi`, the three gates `P.alpha`, and `P.bias` is repacked; other tensors are
    passed through. Raises `BadInput` where no connection is found, one lacks a tensor, or a shape is not that of
    `streams`.

    Args:
        state: with or without the prefixes of wrappers, such as `module.`.
        streams: n.
        transposed: whether the model was trained by a Megatron-Core that mixes with H_resᵀ, as DeepSeek does. False for
            one from before its pull request 4839 (May 2026), which mixed with H_res itself: then nothing is transposed,
            and Sinkhorn's last half round normalises rows here but columns there.
    """
    layout = "self_attention_hyper_connection.* or mlp_hyper_connection.* tensors of Megatron-Core's layout"
    modules, others = find_modules(state, _THEIRS, layout)
    rows = {"mapping_proj.weight": outputs(streams), **dict.fromkeys(_GATES, 1), "bias": outputs(streams)}
    converted = {}
    for module, parts in modules.items():
        check_parts(module, parts, rows, streams)
        converted[f"{module}.phi"] = _repacked(parts["mapping_proj.weight"], streams, transposed)
        converted[f"{module}.alpha"] = torch.cat([parts[gate] for gate in _GATES])
        converted[f"{module}.bias"] = _repacked(parts["bias"], streams, transposed)
    heads = {key: others.pop(key) for key in [*others] if _HEAD.fullmatch(key)}
    return others | converted | (from_deepseek(heads, streams=streams) if heads else {})


def to_megatron(state: State, *, streams: int, transposed: bool = True) -> dict[str, torch.Tensor]:
    """The inverse of `from_megatron`, bit for bit."""
    layout = "self_attention_hyper_connection.* or mlp_hyper_connection.* parameters of ours"
    modules, others = find_modules(state, _OURS, layout)
    rows = {"phi": outputs(streams), "alpha": 3, "bias": outputs(streams)}
    converted = {}
    for module, parts in modules.items():
        check_parts(module, parts, rows, streams)
        converted[f"{module}.mapping_proj.weight"] = _repacked(parts["phi"], streams, transposed)
        for gate, value in zip(_GATES, parts["alpha"].split(1), strict=True):
            converted[f"{module}.{gate}"] = value.clone()
        converted[f"{module}.bias"] = _repacked(parts["bias"], streams, transposed)
    heads = {key: others.pop(key) for key in [*others] if _HEAD.fullmatch(key)}
    return others | converted | (to_deepseek(heads, streams=streams) if heads else {})


def _repacked(packed: torch.Tensor, streams: int, transposed: bool) -> torch.Tensor:
    return transpose_res(packed, streams) if transposed else packed
