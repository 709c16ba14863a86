"""Hyper-connections whose streams are made again in the backward instead of being kept.

Of a segment of blocks stay the streams before it, every sublayer's output and the coefficients. All else that is as
wide as the streams or a sublayer's input is made again when the backward reaches the segment, by running the kernels
once more on the sublayers' outputs: no sublayer runs twice (arXiv 2512.24880, section 4.3.2).

Autograd's own graph is used as it is. Its hooks for saved tensors put a note in the place of every tensor that can be
made again, and the first note that is read makes the segment again.
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
from mhc.modules.hyper_connection import HyperConnection
from mhc.modules.recompute_segments import cut
from mhc.modules.stack import HyperConnectionStack, begin, check_streams, finish, through, with_following

NORMS = ("RMSNorm", "LayerNorm")
"""Modules whose class name ends so are taken to normalise each token by itself, and are run again."""


def recompute(
    blocks: Sequence[HyperConnection],
    *,
    segment: int | Sequence[int] | None = None,
    stages: Sequence[int] | None = None,
) -> Recomputed:
    """The blocks as a `HyperConnectionStack` that holds less memory between forward and backward.

    Args:
        blocks: at least one, all of one width and stream count.
        segment: at most so many blocks are made again together; or the length of every segment. Left out, the length
            for which a stage holds least (`segment_length`).
        stages: the number of blocks in each stage of a pipeline: no segment crosses the end of one.

    Raises `BadInput` for lengths that do not fit the blocks or the stages.
    """
    return Recomputed(list(blocks), segment, stages)


class Recomputed(HyperConnectionStack):
    """x [..., n, C] -> x' [..., n, C]; made by `recompute`. Its weights have the names that a stack's have.

    The first block of a segment begins with a pass of its own over the streams. Where a sublayer begins with a
    normalisation (`NORMS`), that is run again too, so that neither what it saves nor its output stays. What a forward
    made must not be written to in place before the backward: this raises `RuntimeError`, as without recomputation.

    `torch.compile` leaves it out of its graphs (`fullgraph=True` raises): compile the sublayers instead.
    """

    def __init__(
        self, blocks: Sequence[HyperConnection], segment: int | Sequence[int] | None, stages: Sequence[int] | None
    ) -> None:
        super().__init__(blocks)
        self.segments = cut(len(blocks), blocks[0].streams, segment, stages)
        for block in blocks:
            _watch_norms(block.sublayer)

    @_disable_dynamo
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x [..., n, C] -> x' like x."""
        blocks: list[HyperConnection] = list(self.blocks)  # type: ignore[arg-type]
        check_streams(blocks[0], x)
        for length in self.segments:
            segment, blocks = blocks[:length], blocks[length:]
            if torch.is_grad_enabled():
                x = x.contiguous()
                x = _Pass(segment, x).forward(x, args, kwargs)
            else:
                x = through(segment, x, args, kwargs)
        return x

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"segments={self.segments}"


class _Kept:
    """A tensor that stays until the backward."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._version = tensor.detach(), tensor._version

    def get(self) -> torch.Tensor:
        """The tensor; raises `RuntimeError` where it was written to, which autograd does not look for under hooks."""
        if self._tensor._version != self._version:
            shape = tuple(self._tensor.shape)
            raise RuntimeError(f"a tensor {shape} was written to in place before the backward that needs it: clone it")
        return self._tensor


class _Part(NamedTuple):
    """A view of a tensor that need not exist yet."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The view."""
        return whole.as_strided(self.size, self.stride, whole.storage_offset() + self.offset)


class _Known(NamedTuple):
    """A tensor that will be made again as it is now."""

    tensor: torch.Tensor
    version: int

    def part(self, saved: Any) -> _Part | None:
        """Where `saved` lies in it, if it does and has not been written to since."""
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
        part = _Part(saved.size(), saved.stride(), saved.storage_offset() - mine.storage_offset())
        last = part.offset + sum((size - 1) * stride for size, stride in zip(part.size, part.stride, strict=True))
        return part if mine.is_contiguous() and part.offset >= 0 and last < mine.numel() else None


class _Note(NamedTuple):
    """What stands for a saved tensor: a part of one of a block's tensors."""

    place: int
    which: int
    part: _Part


class _Norm(NamedTuple):
    """A normalisation that was given the sublayer's input, or a view of it."""

    module: nn.Module
    given: _Part
    requires_grad: bool


class _Pass:
    """One way forward through a segment, and what its backward needs.

    A block's tensors are, in this order: its streams, the sublayer's input, and for every normalisation of that what it
    saves that is as large, and its output.
    """

    def __init__(self, blocks: list[HyperConnection], start: torch.Tensor) -> None:
        self._blocks, self._start = blocks, _Kept(start)
        self._outputs: list[_Kept] = []
        self._norms: list[list[_Norm]] = [[] for _ in blocks]
        self._again: list[list[torch.Tensor]] = []
        device = start.device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        self._autocast = torch.autocast(device, dtype=dtype, enabled=enabled)
        # During the forward alone: the block's place, its tensors so far, and the normalisation that runs.
        self._place = 0
        self._known: list[_Known] = []
        self._running: nn.Module | None = None

    def forward(self, x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """The streams after the segment."""
        begun = None
        with saved_tensors_hooks(self._pack, self._unpack):
            try:
                for place, (block, following) in enumerate(with_following(self._blocks)):
                    self._place, self._known = place, []
                    self._know(x)
                    begun = begun or begin(block, x)
                    self._know(begun.u)
                    _FORWARD.current = self
                    f, _ = block.call_sublayer(begun.u, *args, **kwargs)
                    f = f.contiguous()
                    self._outputs.append(_Kept(f))
                    x, begun = finish(begun, f, following)
            finally:
                _FORWARD.current = None
                self._known = []  # they hold the graph, and the graph holds this object
        return x

    def _know(self, tensor: torch.Tensor) -> None:
        self._known.append(_Known(tensor, tensor._version))

    def _pack(self, tensor: torch.Tensor) -> _Kept | _Note:
        if self._running and tensor.numel() >= self._known[1].tensor.numel():
            self._know(tensor)
        for which, known in enumerate(self._known):
            if part := known.part(tensor):
                return _Note(self._place, which, part)
        return _Kept(tensor)

    def _unpack(self, packed: _Kept | _Note) -> torch.Tensor:
        if isinstance(packed, _Kept):
            return packed.get()
        if not self._again:
            self._make_again()
        return packed.part.of(self._again[packed.place][packed.which])

    def _make_again(self) -> None:
        """The blocks' tensors, from the streams before the segment and the sublayers' outputs."""
        x, begun = self._start.get(), None
        with torch.no_grad(), self._autocast, _unwatched(self._blocks):
            kept = zip(with_following(self._blocks), self._norms, self._outputs, strict=True)
            for (block, following), norms, output in kept:
                begun = begun or begin(block, x)
                normalised = [tensor for norm in norms for tensor in _normalised(norm, begun.u)]
                self._again.append([x, begun.u, *normalised])
                if following is not None:
                    x, begun = finish(begun, output.get(), following)

    def norm_begins(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        """From here on what is saved is of the module, if it was given the sublayer's input."""
        part = self._known[1].part(given[0]) if len(given) == 1 else None
        if part and not self._running:
            self._norms[self._place].append(_Norm(module, part, given[0].requires_grad))
            self._running = module

    def norm_ends(self, module: nn.Module, output: torch.Tensor) -> None:
        """The output is the last of the module's tensors."""
        if self._running is module:
            self._running = None
            self._know(output)


def _normalised(norm: _Norm, u: torch.Tensor) -> list[torch.Tensor]:
    """What the normalisation saves that is as large as the sublayer's input, and its output."""
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> None:
        if tensor.numel() >= u.numel():
            saved.append(tensor)

    with torch.enable_grad(), saved_tensors_hooks(pack, saved.__getitem__):
        output = norm.module(norm.given.of(u).requires_grad_(norm.requires_grad))
    return [*saved, output.detach()]


class _Forward(threading.local):
    """The pass whose sublayer runs in this thread."""

    current: _Pass | None = None


_FORWARD = _Forward()


def _watch_norms(sublayer: nn.Module) -> None:
    """Have every normalisation tell the pass that it runs in. The hooks are always the same two functions and stay: for
    new ones a compiled sublayer would be compiled again."""
    for module in sublayer.modules():
        named = type(module).__name__.endswith(NORMS)
        if named and _norm_begins not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_norm_begins)
            module.register_forward_hook(_norm_ends)


def _norm_begins(module: nn.Module, given: tuple[Any, ...]) -> None:
    if not torch.compiler.is_compiling() and _FORWARD.current:
        _FORWARD.current.norm_begins(module, given)


def _norm_ends(module: nn.Module, _given: tuple[Any, ...], output: Any) -> None:
    if not torch.compiler.is_compiling() and _FORWARD.current:
        _FORWARD.current.norm_ends(module, output)


@contextmanager
def _unwatched(blocks: list[HyperConnection]) -> Iterator[None]:
    """Meanwhile no watcher hears of the blocks: it has seen this forward."""
    watchers = [block.watchers for block in blocks]
    for block in blocks:
        block.watchers = []
    try:
        yield
    finally:
        for block, mine in zip(blocks, watchers, strict=True):
            block.watchers = mine
