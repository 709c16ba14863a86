"""Hyper-connections that follow each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from mhc import functional
from mhc.checks import expect, stream_shape
from mhc.modules.hyper_connection import HyperConnection
from tiles.errors import BadInput


class HyperConnectionStack(nn.Module):
    """x [..., n, C] -> x' [..., n, C]: blocks one after the other, with the end of one and the start of the next in one
    pass over the streams (`mhc.functional.step`).

    The same as calling the blocks in turn, up to rounding. What else is given to `forward` goes to every sublayer; what
    a sublayer returns beside its output is dropped.

    Args:
        blocks: at least one `HyperConnection`, all of one width and stream count. Where a block is not `fused`, or
            follows one of mode `residual`, it begins with a pass of its own.
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
        check_streams(blocks[0], x)
        return through(blocks, x, args, kwargs)


class Begun(NamedTuple):
    """A block before its sublayer: the sublayer's input, and what `finish` needs."""

    u: torch.Tensor
    mixing: tuple[torch.Tensor, torch.Tensor] | None
    """post and res; None in mode `residual`."""
    x: torch.Tensor


def through(
    blocks: list[HyperConnection], x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Tensor:
    """The streams after the blocks."""
    begun = None
    for block, following in with_following(blocks):
        begun = begun or begin(block, x)
        f, _ = block.call_sublayer(begun.u, *args, **kwargs)
        x, begun = finish(begun, f, following)
    return x


def with_following(blocks: list[HyperConnection]) -> Iterator[tuple[HyperConnection, HyperConnection | None]]:
    """Each block with the one that follows it."""
    return zip(blocks, [*blocks[1:], None], strict=True)


def check_streams(block: HyperConnection, x: torch.Tensor) -> None:
    """Raise `BadInput` unless x is [..., n, C] as the block's."""
    stream_shape(x)
    expect("x", x, (*x.shape[:-2], block.streams, block.width), x.dtype, x.device)


def begin(block: HyperConnection, x: torch.Tensor) -> Begun:
    """All that precedes the block's sublayer."""
    if block.mode == "residual":
        return Begun(x.mean(-2), None, x)
    u, post, res, x = block.before(x)
    return Begun(u, (post, res), x)


def finish(begun: Begun, f: torch.Tensor, following: HyperConnection | None) -> tuple[torch.Tensor, Begun | None]:
    """The streams after a block whose sublayer gave f, and the block that follows as far as the same pass began it."""
    if begun.mixing is None:
        return begun.x + f.unsqueeze(-2), None
    post, res = begun.mixing
    if following is None or not following.fused:
        return functional.merge(begun.x, f, res, post), None
    settings: dict[str, Any] = {"rounds": following.rounds, "eps": following.eps}
    x, u, post, res = functional.step(begun.x, f, post, res, *following.parameters_for_ops(), **settings)
    following.observed(res)
    return x, Begun(u, (post, res), x)
