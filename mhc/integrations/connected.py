"""One transformer layer whose residual connections are hyper-connections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from mhc.modules.hyper_connection import HyperConnection
from mhc.modules.stack import HyperConnectionStack
from mhc.modules.streams import expand_streams, reduce_streams

Connection = Callable[[nn.Module, int, float], HyperConnection]
"""Makes the block around a sublayer of this width with this dropout."""


class ConnectedLayer(HyperConnectionStack):
    """x [..., n, C] -> x' [..., n, C]; the first layer of a network takes h [..., C], the last one gives it.

    Streams are made (`expands`) and reduced to their mean (`reduces`) inside of the layers, so that the model around
    them, which knows of no streams, calls them as ever.
    """

    def __init__(self, blocks: Sequence[HyperConnection]) -> None:
        super().__init__(blocks)
        self.expands, self.reduces = False, False

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x or h -> x' or h'. What else is given goes to every sublayer, which takes what is for it."""
        if self.expands:
            first: HyperConnection = self.blocks[0]  # type: ignore[assignment]
            x = expand_streams(x, first.streams)
        x = super().forward(x, *args, **kwargs)
        return reduce_streams(x) if self.reduces else x


class FeedForward(nn.Module):
    """u [..., C] -> mlp(norm(u)), whatever else the layer is called with."""

    def __init__(self, norm: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = norm, mlp

    def forward(self, u: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer's other arguments are for attention."""
        return self.mlp(self.norm(u))
