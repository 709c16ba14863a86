"""Hyper-connections that follow each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from mhc import functional
from mhc.module import HyperConnection
from tiles.errors import BadInput


class HyperConnectionStack(nn.Module):
    """x [..., n, C] -> x' [..., n, C]: blocks one after the other, with the end of one and the start of the next in one
    pass over the streams (`mhc.functional.step`).

    The same as calling the blocks in turn, up to rounding. What else is given to `forward` goes to every sublayer.

    Args:
        blocks: at least one `HyperConnection`, all of one width and stream count. Where a block is not of mode `mhc`,
            or follows one of mode `residual`, it begins with a pass of its own.
    """

    def __init__(self, blocks: Sequence[HyperConnection]) -> None:
        super().__init__()
        shapes = [(block.streams, block.width) for block in blocks]
        if not shapes or len(set(shapes)) > 1:
            raise BadInput(f"a stack needs blocks of one stream count and width, got {shapes}: build them alike")
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x [..., n, C] -> x' like x."""
        blocks: list[HyperConnection] = list(self.blocks)  # type: ignore[arg-type]
        begun = None
        for block, following in pairwise([*blocks, None]):
            assert block is not None
            if block.mode == "residual":
                x = block(x, *args, **kwargs)
                continue
            u, post, res, x = begun or block.before(x)
            f = block.apply_sublayer(u, *args, **kwargs)
            if following is not None and following.mode == "mhc":
                begun = _step(following, x, f, post, res)
            else:
                begun, x = None, functional.merge(x, f, res, post)
        return x


def _step(
    following: HyperConnection, x: torch.Tensor, f: torch.Tensor, post: torch.Tensor, res: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `following.before` would give after the merge."""
    settings: dict[str, Any] = {"rounds": following.rounds, "eps": following.eps}
    x_next, u, post, res = functional.step(x, f, post, res, *following.parameters_for_ops(), **settings)
    return u, post, res, x_next
