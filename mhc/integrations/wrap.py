"""Hyper-connections in place of a transformer's residual connections, in one call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mhc.integrations.connected import ConnectedLayer
from mhc.integrations.wrap_llama import PARTS, connected_llama
from mhc.integrations.wrap_pytorch import connected_pytorch
from mhc.manifolds import Manifold
from mhc.modules.hyper_connection import FUSED_MANIFOLD, HyperConnection, Mode, read_in_turn
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
    """Put hyper-connections around attention and MLP of every layer of a pre-norm transformer, in place.

    What is looked for, anywhere in the model, is an `nn.ModuleList` of layers that the model calls one after the other:
    `nn.TransformerEncoderLayer`, `nn.TransformerDecoderLayer` (both as they are, not subclasses, `norm_first=True`), or
    layers with the parts of Hugging Face's Llama. Each such list gets n streams of its own: its first layer makes them,
    its last one gives their mean to the norm that follows.

    The model's parameters stay the same objects. In its state_dict a layer's are found under
    `blocks.<place>.sublayer.norm`, `.attention` and `.mlp`, with phi, alpha and bias of the connection beside
    `sublayer`; the places are attention, (attention to memory), MLP. So save the state_dict, and load it into a model
    that is wrapped alike. Hooks on the replaced layers are lost, and transformers records
    no states and weights of them (`output_hidden_states`, `output_attentions`). Its gradient checkpointing works as
    before.

    Args:
        model: changed in place, also returned.
        streams: n, in 1..16.
        mode: as of `HyperConnection`.
        manifold: as of `HyperConnection`.
        init: with `identity` the wrapped model computes what the model did, to rounding; with `paper`, the usual start,
            and mode `hc` reads the streams in turn (`mhc.modules.hyper_connection.read_in_turn`).
        dynamic: as of `HyperConnection`.
        width: C, where a Llama-style layer's norm has no weight that tells it.

    Raises `BadInput` (a `ValueError`), and leaves the model as it was, where no such list is found, where layers of a
    list differ in kind, or where one does something else than h + sublayer(norm(h)).
    """
    settings: dict[str, Any] = {"mode": mode, "manifold": manifold, "init": init, "dynamic": dynamic}

    def connection(sublayer: nn.Module, width: int, dropout: float) -> HyperConnection:
        with next(sublayer.parameters(), torch.empty(0)).device:
            return HyperConnection(width, streams, sublayer, dropout=dropout, **settings)

    def connected(layer: nn.Module) -> ConnectedLayer | None:
        made = connected_pytorch(layer, connection, width) or connected_llama(layer, connection, width)
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
            read_in_turn(block for layer in made for block in layer.blocks)  # type: ignore[misc]
        layers = nn.ModuleList(made)
        layers.training = parent.training
        setattr(parent, name, layers)
    return model


def _lists_of_modules(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.ModuleList]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList):
                yield parent, name, child


def _all_or_none(made: list[ConnectedLayer | None], name: str) -> list[ConnectedLayer]:
    """The layers; none where none was known. Raises `BadInput` where some were."""
    known = [layer for layer in made if layer is not None]
    kinds = {type(layer).__name__ for layer in made}
    if known and len(kinds) > 1:
        raise BadInput(
            f"all layers of a list must be of one kind, got {', '.join(sorted(kinds))} from {name}: "
            "put mhc.HyperConnection around their sublayers by hand"
        )
    return known
