"""`nn.TransformerEncoderLayer` and `nn.TransformerDecoderLayer` with hyper-connections."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from mhc.integrations.connected import ConnectedLayer, FeedForward, MakeConnection
from tiles.errors import BadInput


class EncoderLayer(ConnectedLayer):
    """Blocks: self-attention, MLP. PyTorch's encoder reads its layers' `self_attn`."""

    @property
    def self_attn(self) -> nn.MultiheadAttention:
        """The layer's self-attention."""
        return self.blocks[0].sublayer.attention  # type: ignore[return-value, union-attr]


class DecoderLayer(EncoderLayer):
    """Blocks: self-attention, cross-attention, MLP."""


class EncoderAttention(nn.Module):
    """u -> attention(norm(u)), with the arguments of `nn.TransformerEncoderLayer.forward`."""

    def __init__(self, norm: nn.Module, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.norm, self.attention = norm, attention

    def forward(
        self,
        u: torch.Tensor,
        src_mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """u [batch, sequence, C] -> the same."""
        h = self.norm(u)
        return self.attend(h, h, src_mask, src_key_padding_mask, is_causal)

    def attend(
        self,
        h: torch.Tensor,
        memory: torch.Tensor,
        mask: torch.Tensor | None,
        padding: torch.Tensor | None,
        is_causal: bool,
    ) -> torch.Tensor:
        """Attention of h to memory, without the weights."""
        masks = {"attn_mask": mask, "key_padding_mask": padding, "is_causal": is_causal}
        return self.attention(h, memory, memory, **masks, need_weights=False)[0]


class DecoderAttention(EncoderAttention):
    """u -> attention(norm(u)), or attention(norm(u) to memory) if `cross`, with the arguments of
    `nn.TransformerDecoderLayer.forward`."""

    def __init__(self, norm: nn.Module, attention: nn.MultiheadAttention, *, cross: bool) -> None:
        super().__init__(norm, attention)
        self.cross = cross

    def forward(  # type: ignore[override]
        self,
        u: torch.Tensor,
        memory: torch.Tensor,
        tgt_mask: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        tgt_key_padding_mask: torch.Tensor | None = None,
        memory_key_padding_mask: torch.Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> torch.Tensor:
        """u [batch, sequence, C] and memory [batch, other sequence, C] -> like u."""
        h = self.norm(u)
        if self.cross:
            return self.attend(h, memory, memory_mask, memory_key_padding_mask, memory_is_causal)
        return self.attend(h, h, tgt_mask, tgt_key_padding_mask, tgt_is_causal)


class Mlp(nn.Module):
    """linear2(dropout(activation(linear1(u)))), as in PyTorch's layers."""

    def __init__(self, layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) -> None:
        super().__init__()
        self.linear1, self.dropout, self.linear2 = layer.linear1, layer.dropout, layer.linear2
        self.activation: Callable[[torch.Tensor], torch.Tensor] = layer.activation

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """u [..., C] -> the same."""
        return self.linear2(self.dropout(self.activation(self.linear1(u))))


def wrap_pytorch_layer(layer: nn.Module, connection: MakeConnection, width: int | None) -> ConnectedLayer | None:
    """The layer with hyper-connections around the same submodules; None for any other class, subclasses included.

    Raises `BadInput` for a post-norm layer, which normalises the residual stream itself.
    """
    if type(layer) is nn.TransformerEncoderLayer:
        make: type[EncoderLayer] = EncoderLayer
        attention = EncoderAttention(layer.norm1, layer.self_attn)
        mlp = FeedForward(layer.norm2, Mlp(layer))
        parts: list[tuple[nn.Module, nn.Dropout]] = [(attention, layer.dropout1), (mlp, layer.dropout2)]
    elif type(layer) is nn.TransformerDecoderLayer:
        make = DecoderLayer
        attention = DecoderAttention(layer.norm1, layer.self_attn, cross=False)
        cross = DecoderAttention(layer.norm2, layer.multihead_attn, cross=True)
        mlp = FeedForward(layer.norm3, Mlp(layer))
        parts = [(attention, layer.dropout1), (cross, layer.dropout2), (mlp, layer.dropout3)]
    else:
        return None
    if not layer.norm_first:
        raise BadInput(
            f"hyper-connections go around pre-norm sublayers, got {type(layer).__name__} with norm_first=False: "
            "build it with norm_first=True"
        )
    width = width or layer.self_attn.embed_dim
    return make([connection(sublayer, width, dropout.p) for sublayer, dropout in parts])
