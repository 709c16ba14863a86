"""Boundaries between blocks: how the streams after one sublayer and the input of the next one are computed.

A boundary's `start` computes everything before a block's sublayer from streams alone, its `merge` the streams after the
sublayer and, in the same pass over them, everything before the next one.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from mhc import functional
from mhc.modules.grad_accumulate import grad_accumulating_views
from mhc.modules.hyper_connection import HyperConnection

Maps = tuple[torch.Tensor | None, ...]


class PreResult(NamedTuple):
    """What is before a block's sublayer: its input u, the maps that its output will be merged with (None in mode
    `residual`), and the residual x. The maps are post and res (None: the identity); where one pass does all, pre, post
    and res."""

    u: torch.Tensor
    maps: Maps | None
    x: torch.Tensor


class Boundary(Protocol):
    """What runs between the sublayers of consecutive blocks."""

    def start(self, block: HyperConnection, x: torch.Tensor) -> PreResult:
        """Compute everything before the block's sublayer."""

    def merge(
        self, before: PreResult, f: torch.Tensor, next_block: HyperConnection | None
    ) -> tuple[torch.Tensor, PreResult | None]:
        """The streams after a block whose sublayer returned f, and what is before the next block's sublayer where it
        was fused with that."""

    def replayed(self) -> Boundary:
        """The same boundary as it is now, for running these blocks once more without gradients."""


class StepBoundary:
    """The paper's: merge, then the pre of the next block, which weighs the streams that it projects
    (`mhc.functional.step`)."""

    def start(self, block: HyperConnection, x: torch.Tensor) -> PreResult:
        """See `Boundary`."""
        if block.mode == "residual":
            return PreResult(block.normalised(x.mean(-2)), None, x)
        u, post, res, x = block.pre_with_residual(x)
        return PreResult(u, (post, res), x)

    def merge(
        self, before: PreResult, f: torch.Tensor, next_block: HyperConnection | None
    ) -> tuple[torch.Tensor, PreResult | None]:
        """See `Boundary`."""
        if before.maps is None:
            return before.x + f.unsqueeze(-2), None
        post, res = before.maps
        assert post is not None
        if next_block is None or not _joins(res, next_block):
            return functional.merge(before.x, f, res, post), None
        parameters, settings = next_block.parameters_for_ops(), next_block.settings_with_norm()
        x, u, post, res = functional.step(before.x, f, post, res, *parameters, **settings)
        next_block.notify_watchers(post, res)
        return x, PreResult(u, (post, res), x)

    def replayed(self) -> Boundary:
        """See `Boundary`."""
        return self


class SinglePassBoundary:
    """DeepSeek-V4.1's: a sublayer is fed through the pre of the block before (`mhc.functional.single_pass`).

    `pre` [..., n] is what the next streams are weighed with; every block that is started leaves its own there.
    """

    def __init__(self, pre: torch.Tensor) -> None:
        self.pre = pre

    def start(self, block: HyperConnection, x: torch.Tensor) -> PreResult:
        """See `Boundary`."""
        x_project, x_aggregate, x = grad_accumulating_views(x, 3)
        (pre, post, res), u = block.maps(x_project), functional.aggregate(x_aggregate, self.pre)
        return PreResult(block.normalised(u), self._keep(block, pre, post, res), x)

    def _keep(self, block: HyperConnection, pre: torch.Tensor, post: torch.Tensor, res: torch.Tensor | None) -> Maps:
        """The maps of a block, whose pre weighs the next streams."""
        self.pre = pre
        block.notify_watchers(post, res)
        return pre, post, res

    def merge(
        self, before: PreResult, f: torch.Tensor, next_block: HyperConnection | None
    ) -> tuple[torch.Tensor, PreResult | None]:
        """See `Boundary`."""
        assert before.maps is not None
        pre, post, res = before.maps
        assert pre is not None
        assert post is not None
        if next_block is None or not _joins(res, next_block):
            return functional.merge(before.x, f, res, post), None
        parameters, settings = next_block.parameters_for_ops(), next_block.settings_with_norm()
        x, u, pre, post, res = functional.single_pass(before.x, f, pre, post, res, *parameters, **settings)
        return x, PreResult(u, self._keep(next_block, pre, post, res), x)

    def replayed(self) -> Boundary:
        """See `Boundary`."""
        return SinglePassBoundary(self.pre.detach())


def _joins(res: torch.Tensor | None, next_block: HyperConnection) -> bool:
    """Whether one pass merges with this res and computes the maps of the next block: both mix streams, or neither."""
    return next_block.fused and next_block.mixes == (res is not None)


def one_hot_pre(x: torch.Tensor) -> torch.Tensor:
    """The pre that a network of single-pass mHC begins with, one at stream 0: x [..., n, C] -> [..., n] float32."""
    pre = torch.zeros(x.shape[:-1], dtype=torch.float32, device=x.device)
    pre[..., 0] = 1
    return pre
