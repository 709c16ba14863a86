"""A small byte-level transformer with a choice of residual connection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from mhc import HyperConnection, HyperConnectionStack, expand_streams, reduce_streams

BYTES = 256

Residual = Literal["plain", "hc", "mhc", "single-pass"]


@dataclass(frozen=True)
class Size:
    """The sizes of the transformer; `context` is in bytes (or tokens), `width` a multiple of 8 and of `heads`."""

    blocks: int = 4
    width: int = 256
    heads: int = 4
    context: int = 256
    streams: int = 4


class Attention(nn.Module):
    """Causal self-attention, [batch, context, C] -> the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """Every position attends to itself and to earlier ones."""
        query, key, value = self.qkv(u).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(attended.transpose(1, 2).flatten(-2))


def attention_sublayer(width: int, heads: int) -> nn.Module:
    """Norm and attention of a pre-norm block: [batch, context, C] -> the same."""
    return nn.Sequential(nn.RMSNorm(width), Attention(width, heads))


def mlp_sublayer(width: int) -> nn.Module:
    """Norm and MLP of a pre-norm block: [batch, context, C] -> the same."""
    return nn.Sequential(nn.RMSNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def sublayers(width: int, heads: int) -> tuple[nn.Module, nn.Module]:
    """The two sublayers of a pre-norm block."""
    return attention_sublayer(width, heads), mlp_sublayer(width)


class ByteTransformer(nn.Module):
    """Bytes [batch, context] -> logits of the next byte [batch, context, 256].

    `plain` is the usual pre-norm network: one stream and h + sublayer(h). `single-pass` has mHC's maps, each sublayer
    fed through the pre of the one before, and the last pre in place of the streams' mean.
    """

    def __init__(self, size: Size, residual: Residual) -> None:
        super().__init__()
        width = size.width
        self.streams = 1 if residual == "plain" else size.streams
        modes: dict[Residual, Literal["residual", "hc", "mhc"]] = {"plain": "residual", "hc": "hc"}
        self.embed = nn.Embedding(BYTES, width)
        self.position = nn.Embedding(size.context, width)
        layers: list[HyperConnection] = []
        for _ in range(size.blocks):
            parts = sublayers(width, size.heads)
            mode = modes.get(residual, "mhc")
            layers += [HyperConnection(width, self.streams, sublayer, mode=mode) for sublayer in parts]
        self.layers = HyperConnectionStack(layers, single_pass=residual == "single-pass")
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Streams are expanded once after the embedding and reduced once before the head: by the stack itself where it
        is of single-pass mHC."""
        h = self.embed(text) + self.position.weight[: text.shape[1]]
        x = self.layers(expand_streams(h, self.streams))
        return self.head(self.norm(x if self.layers.single_pass else reduce_streams(x)))
