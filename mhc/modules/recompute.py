"""Recomputation of the streams in the backward, instead of saving them (selective activation checkpointing).

Of a segment of blocks, the streams before it, the sublayers' outputs and the coefficients are saved. Everything else
that is as large as the streams or a sublayer's input is recomputed when the backward reaches the segment, by running
the kernels again on the sublayers' outputs: no sublayer runs twice (arXiv 2512.24880, section 4.3.2).

Autograd's graph stays as it is. Hooks on saved tensors (`saved_tensors_hooks`) replace each tensor that can be
recomputed by a placeholder, and the first placeholder that is unpacked recomputes the segment.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.autograd.graph import saved_tensors_hooks

from mhc.dispatch.operators import PLAIN_TYPES
from mhc.dispatch.torch_form import is_transformed
from mhc.modules.boundary import Boundary
from mhc.modules.hyper_connection import HyperConnection
from mhc.modules.recompute_segments import segment_lengths
from mhc.modules.stack import HyperConnectionStack, has_hooks, run_blocks, with_next

NORMS = ("RMSNorm", "LayerNorm")
"""Modules whose class name ends so are assumed to normalise each token by itself, and are recomputed."""


def recompute(
    blocks: Sequence[HyperConnection],
    *,
    segment: int | Sequence[int] | None = None,
    stages: Sequence[int] | None = None,
    single_pass: bool = False,
    collapse: bool = True,
) -> RecomputedStack:
    """Return the blocks as a `HyperConnectionStack` that holds less memory between forward and backward.

    Args:
        blocks: at least one `HyperConnection`, all of one width and stream count.
        segment: the largest number of blocks that are recomputed together, or the length of every segment. The default
            is the length for which a stage holds least memory (`mhc.segment_length`).
        stages: the number of blocks in each pipeline stage; no segment crosses the end of one.
        single_pass: as of `HyperConnectionStack`.
        collapse: as of `HyperConnectionStack`.

    Gradients are bitwise those of the same passes with everything saved. Where a sublayer contains normalisations
    (`NORMS`) of its input, those are recomputed too. Tensors of the forward must not be written to in place before the
    backward: this raises `RuntimeError`, as without recomputation. `torch.compile` skips the module (`fullgraph=True`
    raises): compile the sublayers instead.

    A segment with a block that has hooks of its own saves everything, so that these run as usual; hooks on sublayers do
    not matter.

    Raises `BadInput` for lengths that do not fit the blocks or the stages.
    """
    return RecomputedStack(list(blocks), segment, stages, single_pass=single_pass, collapse=collapse)


class RecomputedStack(HyperConnectionStack):
    """x [..., n, C] -> x' [..., n, C]; made by `recompute`. Its state_dict has the names of a stack's.

    The first block of a segment runs its pre separately, as a segment starts at saved streams.
    """

    def __init__(
        self,
        blocks: Sequence[HyperConnection],
        segment: int | Sequence[int] | None,
        stages: Sequence[int] | None,
        *,
        single_pass: bool = False,
        collapse: bool = True,
    ) -> None:
        super().__init__(blocks, single_pass=single_pass, collapse=collapse)
        self.segments = segment_lengths(len(blocks), blocks[0].streams, segment, stages)
        for block in blocks:
            _hook_norms(block.sublayer)

    @_disable_dynamo
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As of `HyperConnectionStack`."""
        return super().forward(x, *args, **kwargs)

    def _run(
        self,
        blocks: list[HyperConnection],
        x: torch.Tensor,
        boundary: Boundary,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        for length in self.segments:
            segment, blocks = blocks[:length], blocks[length:]
            if torch.is_grad_enabled() and not is_transformed((x,)) and not any(map(has_hooks, segment)):
                x = x.contiguous()
                x = _SegmentForward(segment, x, boundary).forward(x, args, kwargs)
            else:
                x = run_blocks(segment, x, boundary, args, kwargs)
        return x

    def extra_repr(self) -> str:
        """The settings that `print` shows."""
        return ", ".join(filter(None, (f"segments={self.segments}", super().extra_repr())))


class _Saved:
    """A tensor that is kept until the backward."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._version = tensor.detach(), tensor._version

    def get(self) -> torch.Tensor:
        """The tensor; raises `RuntimeError` where it was written to, which autograd does not check under hooks."""
        if self._tensor._version != self._version:
            shape = tuple(self._tensor.shape)
            raise RuntimeError(f"a tensor {shape} was written to in place before the backward that needs it: clone it")
        return self._tensor


class _View(NamedTuple):
    """Size, stride and offset of a view of a tensor that need not exist yet."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The view of `whole`."""
        return whole.as_strided(self.size, self.stride, whole.storage_offset() + self.offset)


class _Recomputable(NamedTuple):
    """A tensor that will be recomputed as it is now."""

    tensor: torch.Tensor
    version: int

    def view(self, saved: Any) -> _View | None:
        """`saved` as a view of it, or None if it is none or was written to since."""
        mine = self.tensor
        if (
            type(saved) not in PLAIN_TYPES
            or type(mine) not in PLAIN_TYPES
            or saved.dtype != mine.dtype
            or not saved.numel()
        ):
            return None
        if saved.untyped_storage().data_ptr() != mine.untyped_storage().data_ptr() or saved._version != self.version:
            return None
        view = _View(saved.size(), saved.stride(), saved.storage_offset() - mine.storage_offset())
        last = view.offset + sum((size - 1) * stride for size, stride in zip(view.size, view.stride, strict=True))
        return view if mine.is_contiguous() and view.offset >= 0 and last < mine.numel() else None


class _Placeholder(NamedTuple):
    """Stands for a saved tensor: a view of the tensor number `tensor` of the block number `block`."""

    block: int
    tensor: int
    view: _View


class _NormCall(NamedTuple):
    """A call of a normalisation on the sublayer's input, or on a view of it."""

    module: nn.Module
    input: _View
    requires_grad: bool


class _SegmentForward:
    """One forward of a segment, and what its backward needs.

    The tensors of a block are numbered in this order: its streams, the sublayer's input, and for every normalisation of
    the latter what it saves that is as large, and its output.
    """

    def __init__(self, blocks: list[HyperConnection], start: torch.Tensor, boundary: Boundary) -> None:
        self._blocks, self._start = blocks, _Saved(start)
        self._boundary, self._replayed = boundary, boundary.replayed()
        self._outputs: list[_Saved] = []
        self._norms: list[list[_NormCall]] = [[] for _ in blocks]
        self._recomputed: list[list[torch.Tensor]] = []
        device = start.device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        self._autocast = torch.autocast(device, dtype=dtype, enabled=enabled)
        # In the forward only: the block's number, its tensors so far, and the normalisation that is running.
        self._block = 0
        self._tracked: list[_Recomputable] = []
        self._running: nn.Module | None = None

    def forward(self, x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """The streams after the segment."""
        pre = None
        with saved_tensors_hooks(self._pack, self._unpack):
            try:
                for number, (block, next_block) in enumerate(with_next(self._blocks)):
                    self._block, self._tracked = number, []
                    self._track(x)
                    pre = pre or self._boundary.start(block, x)
                    self._track(pre.u)
                    _CURRENT.forward = self
                    f, _ = block.call_sublayer(pre.u, *args, **kwargs)
                    f = f.contiguous()
                    self._outputs.append(_Saved(f))
                    x, pre = self._boundary.merge(pre, f, next_block)
            finally:
                _CURRENT.forward = None
                self._tracked = []  # they hold the graph, and the graph holds this object
        return x

    def _track(self, tensor: torch.Tensor) -> None:
        self._tracked.append(_Recomputable(tensor, tensor._version))

    def _pack(self, tensor: torch.Tensor) -> _Saved | _Placeholder:
        if self._running and tensor.numel() >= self._tracked[1].tensor.numel():
            self._track(tensor)
        for number, tracked in enumerate(self._tracked):
            if view := tracked.view(tensor):
                return _Placeholder(self._block, number, view)
        return _Saved(tensor)

    def _unpack(self, packed: _Saved | _Placeholder) -> torch.Tensor:
        if isinstance(packed, _Saved):
            return packed.get()
        if not self._recomputed:
            self._recompute()
        return packed.view.of(self._recomputed[packed.block][packed.tensor])

    def _recompute(self) -> None:
        """Recompute the blocks' tensors from the streams before the segment and the sublayers' outputs."""
        x, pre, boundary = self._start.get(), None, self._replayed
        with torch.no_grad(), self._autocast, _watchers_muted(self._blocks):
            saved = zip(with_next(self._blocks), self._norms, self._outputs, strict=True)
            for (block, next_block), norms, output in saved:
                pre = pre or boundary.start(block, x)
                normalised = [tensor for norm in norms for tensor in _normalised(norm, pre.u)]
                self._recomputed.append([x, pre.u, *normalised])
                if next_block is not None:
                    x, pre = boundary.merge(pre, output.get(), next_block)

    def norm_begins(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        """From here on saved tensors are the module's, if it was called with the sublayer's input."""
        view = self._tracked[1].view(given[0]) if len(given) == 1 else None
        if view and not self._running:
            self._norms[self._block].append(_NormCall(module, view, given[0].requires_grad))
            self._running = module

    def norm_ends(self, module: nn.Module, output: torch.Tensor) -> None:
        """The output is the last of the module's tensors."""
        if self._running is module:
            self._running = None
            self._track(output)


def _normalised(norm: _NormCall, u: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that the normalisation saves and that are as large as the sublayer's input, and its output."""
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> None:
        if tensor.numel() >= u.numel():
            saved.append(tensor)

    with torch.enable_grad(), saved_tensors_hooks(pack, saved.__getitem__):
        output = norm.module(norm.input.of(u).requires_grad_(norm.requires_grad))
    return [*saved, output.detach()]


class _Current(threading.local):
    """The forward whose sublayer is running in this thread."""

    forward: _SegmentForward | None = None


_CURRENT = _Current()


def _hook_norms(sublayer: nn.Module) -> None:
    """Hook every normalisation of a sublayer. The hooks are always the same two functions and stay registered: new ones
    would have a compiled sublayer compiled again."""
    for module in sublayer.modules():
        named = type(module).__name__.endswith(NORMS)
        if named and _norm_begins not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_norm_begins)
            module.register_forward_hook(_norm_ends)


def _norm_begins(module: nn.Module, given: tuple[Any, ...]) -> None:
    if not torch.compiler.is_compiling() and _CURRENT.forward:
        _CURRENT.forward.norm_begins(module, given)


def _norm_ends(module: nn.Module, _given: tuple[Any, ...], output: Any) -> None:
    if not torch.compiler.is_compiling() and _CURRENT.forward:
        _CURRENT.forward.norm_ends(module, output)


@contextmanager
def _watchers_muted(blocks: list[HyperConnection]) -> Iterator[None]:
    """Without the blocks' watchers inside the block, as they have seen this forward."""
    watchers = [block.watchers for block in blocks]
    for block in blocks:
        block.watchers = []
    try:
        yield
    finally:
        for block, mine in zip(blocks, watchers, strict=True):
            block.watchers = mine
