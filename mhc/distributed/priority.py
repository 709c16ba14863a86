"""CUDA streams of high priority for the merges after chosen sublayers, so that other work does not delay them.

In DualPipe a forward and a backward share the GPU, and the next stage waits for the streams after an MLP (arXiv
2512.24880, section 4.3.3: the merge of MLP layers on a dedicated high-priority compute stream). Blocks of kernels on a
high-priority stream are scheduled first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mhc.modules.hyper_connection import HyperConnection
from tiles.errors import BadInput

HIGH_PRIORITY = -1
"""A CUDA stream's default priority is 0; lower numbers are scheduled first."""


def prioritise_merges(runner: nn.Module, blocks: Iterable[HyperConnection], device: torch.device) -> None:
    """Run what `runner` computes between the sublayer of each of `blocks` and the next sublayer (merge, or step in a
    stack) on a CUDA stream of high priority, and its backward too.

    Results stay the same, as does the order within `runner`: the CUDA streams wait for each other. On a device without
    CUDA streams nothing changes.

    Args:
        runner: the module that runs the blocks: a `HyperConnectionStack`, the result of `mhc.recompute`, or a block.
        blocks: blocks of `runner`; for DualPipe those whose sublayer is an MLP.
        device: the device of `runner`.

    Raises `BadInput` for a block that is not in `runner`.
    """
    connections = [module for module in runner.modules() if isinstance(module, HyperConnection)]
    chosen = list(blocks)
    if strange := [block for block in chosen if block not in connections]:
        raise BadInput(f"blocks must be blocks of runner, got {strange[0]} besides: choose among those it calls")
    if torch.device(device).type != "cuda":
        return
    priority = _PriorityStream(torch.device(device))
    for block in connections:
        block.sublayer.register_forward_pre_hook(priority.leave, prepend=True)
    for block in chosen:
        block.sublayer.register_forward_hook(priority.enter)
    runner.register_forward_hook(priority.leave, prepend=True, always_call=True)


class _PriorityStream:
    """Makes a CUDA stream of high priority PyTorch's current one from the end of a sublayer to the start of the next.

    Autograd runs each op's backward on the stream of its forward, and has streams wait where gradients cross. Memory
    may be freed on one stream and reused on the other: the op that reuses it comes later and so has waited.
    """

    def __init__(self, device: torch.device) -> None:
        self._high = torch.cuda.Stream(device, priority=HIGH_PRIORITY)
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
