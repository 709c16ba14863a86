"""Transformer layers whose residual connections are hyper-connections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from mhc.modules.hyper_connection import HyperConnection
from mhc.modules.stack import HyperConnectionStack
from mhc.modules.streams import expand_streams, reduce_streams

MakeConnection = Callable[[nn.Module, int, float], HyperConnection]
"""Makes the block around a sublayer that has a `norm` of its input, from the sublayer, its width and its dropout."""


class ConnectedLayer(HyperConnectionStack):
    """x [..., n, C] -> x' [..., n, C]; the first layer of a model takes h [..., C], the last one returns it.

    The first layer expands h to streams (`expands`) and the last one reduces them to their mean (`reduces`), so that
    the model's own code stays as it is.
    """

    def __init__(self, blocks: Sequence[HyperConnection]) -> None:
        super().__init__(blocks)
        self.expands, self.reduces = False, False

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x or h -> x' or h'. Further arguments go to every sublayer, which uses its own."""
        if self.expands:
            first: HyperConnection = self.blocks[0]  # type: ignore[assignment]
            x = expand_streams(x, first.streams)
        x = super().forward(x, *args, **kwargs)
        return reduce_streams(x) if self.reduces else x


class FeedForward(nn.Module):
    """u [..., C] -> mlp(norm(u)); the layer's other arguments are ignored."""

    def __init__(self, norm: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = norm, mlp

    def forward(self, u: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """u [..., C] -> the same."""
        return self.mlp(self.norm(u))
