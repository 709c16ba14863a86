"""The passes after chosen sublayers on a CUDA stream of high priority, so that other work does not hold them up.

In DualPipe a forward and a backward share the GPU, and the streams of an MLP's end are what the next stage waits for
(arXiv 2512.24880, section 4.3.3: the merge of MLP layers on a dedicated high-priority compute stream). Kernels of the
high-priority stream get the processors that others leave, first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mhc.modules.hyper_connection import HyperConnection
from tiles.errors import BadInput

HIGH = -1
"""Of CUDA streams: the usual have 0, and less comes first."""


def prioritise_merges(runner: nn.Module, blocks: Iterable[HyperConnection], device: torch.device) -> None:
    """From now on what `runner` does between the sublayer of each of `blocks` and the sublayer that follows (merge, or
    in a stack the pass that merges and begins the next block) runs on a stream of high priority, and its backward too.

    The numbers stay the same, as does the order within `runner`: the streams wait for each other. On a device without
    CUDA streams nothing changes.

    Args:
        runner: what calls the blocks: `HyperConnectionStack`, what `mhc.recompute` gives, or a block itself.
        blocks: of `runner`; for DualPipe those whose sublayer is an MLP.
        device: where `runner` computes.

    Raises `BadInput` for a block that is not in `runner`.
    """
    connections = [module for module in runner.modules() if isinstance(module, HyperConnection)]
    chosen = list(blocks)
    if strange := [block for block in chosen if block not in connections]:
        raise BadInput(f"blocks must be blocks of runner, got {strange[0]} besides: choose among those it calls")
    if torch.device(device).type != "cuda":
        return
    detour = _Detour(torch.device(device))
    for block in connections:
        block.sublayer.register_forward_pre_hook(detour.leave, prepend=True)
    for block in chosen:
        block.sublayer.register_forward_hook(detour.enter)
    runner.register_forward_hook(detour.leave, prepend=True, always_call=True)


class _Detour:
    """From a sublayer's end to the next one's beginning, PyTorch's current stream is one of high priority.

    Autograd runs each op's backward on the stream of its forward, and lets streams wait where gradients cross. Memory
    may be freed on one stream and taken again on the other: whoever takes it comes later in the chain of ops, and so
    has waited.
    """

    def __init__(self, device: torch.device) -> None:
        self._high = torch.cuda.Stream(device, priority=HIGH)
        self._usual: torch.cuda.Stream | None = None

    def enter(self, _module: nn.Module, *_given: Any) -> None:
        self._usual = torch.cuda.current_stream(self._high.device)
        self._high.wait_stream(self._usual)
        torch.cuda.set_stream(self._high)

    def leave(self, _module: nn.Module, *_given: Any) -> None:
        if self._usual is not None:
            self._usual.wait_stream(self._high)
            torch.cuda.set_stream(self._usual)
            self._usual = None
