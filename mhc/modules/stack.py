"""A stack of hyper-connections, with one pass over the streams between consecutive blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mhc import functional
from mhc.checks import expect, stream_shape
from mhc.modules.boundary import Boundary, SinglePassBoundary, StepBoundary, one_hot_pre
from mhc.modules.hyper_connection import HyperConnection
from tiles.errors import BadInput


class HyperConnectionStack(nn.Module):
    """x [..., n, C] -> x' [..., n, C]: blocks in sequence, the merge of one and the pre of the next fused into one pass
    over the streams (`mhc.functional.step`).

    The result is that of calling the blocks in turn, to rounding. Further arguments of `forward` go to every sublayer;
    what a sublayer returns beside its output is dropped.

    With `single_pass` the blocks are those of single-pass mHC (DeepSeek-V4.1's report, section 2.4.1): a sublayer is
    fed through the pre of the block before it, the first one through a one-hot on stream 0, and the last pre collapses
    the streams, x [..., n, C] -> h [..., C] (pre-collapse: the norm and the output head follow, no `StreamHead` or
    `reduce_streams`). That is another network with the same parameters and names of `state_dict`, which records which
    of the two it is: loading the other raises `BadInput`.

    Args:
        blocks: at least one `HyperConnection`, all of one width and stream count. A block that is not `fused`, or that
            follows one of mode `residual`, runs its pre separately; one with hooks of its own runs by itself.
        single_pass: whether sublayers are fed through the pre of the block before. No block may be of mode `residual`
            or have hooks of its own.
        collapse: whether the last pre collapses the streams. If not, a single-pass stack returns (x', pre'), which a
            later one takes as `stack(x', pre=pre')`: for the stages of a pipeline.
    """

    def __init__(self, blocks: Sequence[HyperConnection], *, single_pass: bool = False, collapse: bool = True) -> None:
        super().__init__()
        shapes = [(block.streams, block.width) for block in blocks]
        if not shapes or len(set(shapes)) > 1:
            raise BadInput(f"a stack needs blocks of one stream count and width, got {shapes}: build them alike")
        if single_pass and any(block.mode == "residual" for block in blocks):
            modes = [block.mode for block in blocks]
            raise BadInput(f"single_pass needs blocks that have a pre, got modes {modes}: leave out mode residual")
        if not single_pass and not collapse:
            raise BadInput("collapse=False is for single_pass=True, which ends with its last pre: leave it out")
        self.blocks = nn.ModuleList(blocks)
        self.single_pass, self.collapse = single_pass, collapse

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """x [..., n, C] -> x' like x. With `single_pass` -> h [..., C] or, not collapsed, (x', pre' [..., n]); it takes
        the keyword `pre` [..., n] float32, which the first sublayer is fed through."""
        blocks: list[HyperConnection] = list(self.blocks)  # type: ignore[arg-type]
        check_streams(blocks[0], x)
        if not self.single_pass:
            return self._run(blocks, x, StepBoundary(), args, kwargs)
        boundary = SinglePassBoundary(_given_pre(x, kwargs.pop("pre", None)))
        if hooked := [number for number, block in enumerate(blocks) if has_hooks(block)]:
            raise BadInput(f"blocks in single_pass run no forward of their own, got hooks on {hooked}: hook sublayers")
        x = self._run(blocks, x, boundary, args, kwargs)
        return functional.aggregate(x, boundary.pre) if self.collapse else (x, boundary.pre)

    def _run(
        self,
        blocks: list[HyperConnection],
        x: torch.Tensor,
        boundary: Boundary,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        return run_blocks(blocks, x, boundary, args, kwargs)

    def extra_repr(self) -> str:
        """The settings that `print` shows."""
        return f"single_pass={self.single_pass}, collapse={self.collapse}" if self.single_pass else ""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Add to torch's metadata which network the blocks form, which names and shapes do not tell."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {})
        metadata.get(prefix[:-1], {})["single_pass"] = self.single_pass

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], *rest: Any
    ) -> None:
        """Load, after a check that the checkpoint's stack was of this kind; others than ours do not say."""
        if local_metadata.get("single_pass", self.single_pass) != self.single_pass:
            raise BadInput(
                f"a checkpoint must be of a stack with single_pass={self.single_pass}, got one with single_pass="
                f"{not self.single_pass}: build the stack as the checkpoint's was"
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def _given_pre(x: torch.Tensor, pre: torch.Tensor | None) -> torch.Tensor:
    """What the first sublayer of single-pass mHC is fed through; raises `BadInput` unless it fits x."""
    if pre is None:
        return one_hot_pre(x)
    expect("pre", pre, x.shape[:-1], torch.float32, x.device)
    return pre


def run_blocks(
    blocks: list[HyperConnection],
    x: torch.Tensor,
    boundary: Boundary,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """Run the blocks in sequence; returns the streams after the last."""
    before = None
    for block, following in with_next(blocks):
        if has_hooks(block):  # they run around a block's own forward, which is then not fused with its neighbours'
            returned = block(x, *args, **kwargs)
            x = returned[0] if isinstance(returned, tuple) else returned
            continue
        next_block = following if following is None or not has_hooks(following) else None
        before = before or boundary.start(block, x)
        f, _ = block.call_sublayer(before.u, *args, **kwargs)
        x, before = boundary.merge(before, f, next_block)
    return x


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody has registered hooks on this module's forward or backward."""
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(kinds)


def with_next(blocks: list[HyperConnection]) -> Iterator[tuple[HyperConnection, HyperConnection | None]]:
    """Each block with the next one, or None after the last."""
    return zip(blocks, [*blocks[1:], None], strict=True)


def check_streams(block: HyperConnection, x: torch.Tensor) -> None:
    """Raise `BadInput` unless x is [..., n, C] as the block's."""
    stream_shape(x)
    expect("x", x, (*x.shape[:-2], block.streams, block.width), x.dtype, x.device)
