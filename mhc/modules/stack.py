"""A stack of hyper-connections, with step between consecutive blocks."""

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
    """x [..., n, C] -> x' [..., n, C]: blocks in sequence, the merge of one and the pre of the next fused into one pass
    over the streams (`mhc.functional.step`).

    The result is that of calling the blocks in turn, to rounding. Further arguments of `forward` go to every sublayer;
    what a sublayer returns beside its output is dropped.

    Args:
        blocks: at least one `HyperConnection`, all of one width and stream count. A block that is not `fused`, or that
            follows one of mode `residual`, runs its pre separately; one with hooks of its own runs by itself.
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
        return run_blocks(blocks, x, args, kwargs)


class PreResult(NamedTuple):
    """The results of a block's pre: the sublayer's input u, post and res (None in mode `residual`), the residual x."""

    u: torch.Tensor
    post_res: tuple[torch.Tensor, torch.Tensor] | None
    x: torch.Tensor


def run_blocks(
    blocks: list[HyperConnection], x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Tensor:
    """Run the blocks in sequence; returns the streams after the last."""
    pre = None
    for block, following in with_next(blocks):
        if has_hooks(block):  # they run around a block's own forward, which is then not fused with its neighbours'
            returned = block(x, *args, **kwargs)
            x = returned[0] if isinstance(returned, tuple) else returned
            continue
        next_block = following if following is None or not has_hooks(following) else None
        pre = pre or run_pre(block, x)
        f, _ = block.call_sublayer(pre.u, *args, **kwargs)
        x, pre = run_merge(pre, f, next_block)
    return x


def has_hooks(block: HyperConnection) -> bool:
    """Whether somebody has registered hooks on this block's forward or backward."""
    kinds = (block._forward_hooks, block._forward_pre_hooks, block._backward_hooks, block._backward_pre_hooks)
    return any(kinds)


def with_next(blocks: list[HyperConnection]) -> Iterator[tuple[HyperConnection, HyperConnection | None]]:
    """Each block with the next one, or None after the last."""
    return zip(blocks, [*blocks[1:], None], strict=True)


def check_streams(block: HyperConnection, x: torch.Tensor) -> None:
    """Raise `BadInput` unless x is [..., n, C] as the block's."""
    stream_shape(x)
    expect("x", x, (*x.shape[:-2], block.streams, block.width), x.dtype, x.device)


def run_pre(block: HyperConnection, x: torch.Tensor) -> PreResult:
    """Compute everything before the block's sublayer."""
    if block.mode == "residual":
        return PreResult(x.mean(-2), None, x)
    u, post, res, x = block.pre_with_residual(x)
    return PreResult(u, (post, res), x)


def run_merge(
    pre: PreResult, f: torch.Tensor, next_block: HyperConnection | None
) -> tuple[torch.Tensor, PreResult | None]:
    """The streams after a block whose sublayer returned f, and the next block's pre if it was fused with the merge."""
    if pre.post_res is None:
        return pre.x + f.unsqueeze(-2), None
    post, res = pre.post_res
    if next_block is None or not next_block.fused:
        return functional.merge(pre.x, f, res, post), None
    parameters, settings = next_block.parameters_for_ops(), next_block.settings_for_ops()
    x, u, post, res = functional.step(pre.x, f, post, res, *parameters, **settings)
    next_block.notify_watchers(res)
    return x, PreResult(u, (post, res), x)
