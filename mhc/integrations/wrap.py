"""mhc.wrap: hyper-connections in place of a transformer's residual connections, in one call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mhc.integrations.connected import ConnectedLayer
from mhc.integrations.rms_norm import torch_norm
from mhc.integrations.wrap_llama import PARTS, wrap_llama_layer
from mhc.integrations.wrap_pytorch import wrap_pytorch_layer
from mhc.manifolds import Manifold
from mhc.modules.hyper_connection import FUSED_MANIFOLD, HyperConnection, Mode, init_cyclic_pre
from mhc.modules.init import Init
from tiles.errors import BadInput

__all__ = ["ConnectedLayer", "wrap"]


def wrap(
    model: nn.Module,
    streams: int = 4,
    *,
    mode: Mode = "mhc",
    manifold: str | Manifold = FUSED_MANIFOLD,
    init: Init = "identity",
    dynamic: bool = True,
    width: int | None = None,
) -> nn.Module:
    """Replace the residual connections of a pre-norm transformer by hyper-connections, in place.

    Every `nn.ModuleList` in the model whose layers run one after the other is replaced, if its layers are
    `nn.TransformerEncoderLayer`, `nn.TransformerDecoderLayer` (not subclasses, with `norm_first=True`), or have the
    submodules of Hugging Face's Llama layers. Each such list has n streams of its own: its first layer expands to them,
    its last one returns their mean.

    The model's parameters stay the same objects. Their names in the state_dict become `blocks.<i>.sublayer.norm`,
    `.attention` and `.mlp` below a layer, with phi, alpha and bias of the connection in `blocks.<i>`; the blocks are
    attention, (cross-attention,) MLP. Load a state_dict into a model that was wrapped in the same way. Hooks on the
    replaced layers are lost. In transformers, generation with its caches, gradient checkpointing, attentions and the
    router's logits work as before; `output_hidden_states` gives an empty tuple, as it looks for the replaced layers.

    A norm that is an RMSNorm without hooks, of whatever class, becomes the block's own, with the same weight and eps
    (`norm` of `HyperConnection`): kernels normalise what the sublayer gets, hooks on it do not run, and its weight is
    named `blocks.<i>.norm.weight`. It is recognised by what it computes; any other norm stays in the sublayer.

    Args:
        model: changed in place, also returned.
        streams: n, in 1..16.
        mode: as for `HyperConnection`.
        manifold: as for `HyperConnection`. For finetuning, `identity` keeps every stream a sum of residuals, as the
            model was trained: only what sublayers read and where their outputs go is learned.
        init: with `identity` the wrapped model computes what the model did, to rounding; with `paper` it starts close
            to that, and mode `hc` starts with a cyclic pre (`mhc.modules.hyper_connection.init_cyclic_pre`).
        dynamic: as for `HyperConnection`.
        width: C, needed where the norm of a Llama-style layer has no weight.

    Raises `BadInput` (a `ValueError`), and leaves the model unchanged, where no such list is found, where layers of a
    list differ in kind, or where a layer computes anything but h + sublayer(norm(h)).

    Example:
        >>> model = mhc.wrap(transformers.LlamaForCausalLM(config), streams=4)
    """
    settings: dict[str, Any] = {"mode": mode, "manifold": manifold, "init": init, "dynamic": dynamic}

    def connection(sublayer: nn.Module, width: int, dropout: float) -> HyperConnection:
        with next(sublayer.parameters(), torch.empty(0)).device:
            norm = _taken_norm(sublayer)
            return HyperConnection(width, streams, sublayer, norm=norm, dropout=dropout, **settings)

    def connected(layer: nn.Module) -> ConnectedLayer | None:
        made = wrap_pytorch_layer(layer, connection, width) or wrap_llama_layer(layer, connection, width)
        return made and made.train(layer.training)

    found = [
        (parent, name, made)
        for parent, name, layers in _lists_of_modules(model)
        if (made := _all_or_none([connected(layer) for layer in layers], name))
    ]
    if not found:
        raise BadInput(
            "wrap needs an nn.ModuleList of nn.TransformerEncoderLayer, of nn.TransformerDecoderLayer or of layers "
            f"with the parts {', '.join(PARTS)}, got a {type(model).__name__} without one: "
            "put mhc.HyperConnection around its sublayers by hand"
        )
    for parent, name, made in found:
        made[0].expands = made[-1].reduces = True
        if mode == "hc" and init == "paper":
            init_cyclic_pre(block for layer in made for block in layer.blocks)  # type: ignore[misc]
        layers = nn.ModuleList(made)
        layers.training = parent.training
        setattr(parent, name, layers)
    return model


def _taken_norm(sublayer: Any) -> nn.RMSNorm | None:
    """The norm of a sublayer's input, taken out of the sublayer for its block; None where it has to stay there."""
    norm = torch_norm(sublayer.norm)
    if norm is not None:
        sublayer.norm = nn.Identity()
    return norm


def _lists_of_modules(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.ModuleList]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList):
                yield parent, name, child


def _all_or_none(made: list[ConnectedLayer | None], name: str) -> list[ConnectedLayer]:
    """The replaced layers, or none where none is supported. Raises `BadInput` where only some are."""
    known = [layer for layer in made if layer is not None]
    kinds = {type(layer).__name__ for layer in made}
    if known and len(kinds) > 1:
        raise BadInput(
            f"all layers of a list must be of one kind, got {', '.join(sorted(kinds))} from {name}: "
            "put mhc.HyperConnection around their sublayers by hand"
        )
    return known
