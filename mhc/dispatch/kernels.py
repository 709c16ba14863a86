"""The kernels that the ops run, resolved once a problem and device (`mhc.dispatch.resolve`), then a dictionary hit."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mhc.dispatch import ranks
from mhc.dispatch.gc_paused import gc_paused
from mhc.dispatch.kernel_report import KernelReport
from mhc.dispatch.resolve import Resolved, Resolver
from tiles.cache.cache import KernelCache, default_folder, token_bucket
from tiles.errors import BadInput
from tiles.kernels.reference_inputs import DTYPES
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import EVERY_TOKENS, IDENTITY, NORM, Direction, Problem
from tiles.pack.pack import Pack
from tiles.runtime.loaded_kernel import LoadedKernel, is_given, leading_shape

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Kernels:
    """The kernels that the ops of `mhc.functional` run; safe to use from several threads.

    Constructors: `from_path` (a cache folder or a pack), `defaults`, `reference`. With `fused=False`, pre and step run
    as separate kernels, also where the tuner found the fused ones to be faster. With `batch_invariant`, one schedule
    serves every token count (`batch_invariant`).
    """

    def __init__(self, resolver: Resolver, *, batch_invariant: bool = False) -> None:
        self.resolver, self.batch_invariant = resolver, batch_invariant
        self._batch_invariant_form: Kernels | None = self if batch_invariant else None
        self._resolved: dict[tuple[Any, ...], Resolved] = {}
        self._op_with_norm: dict[tuple[Any, ...], str] = {}
        self._lock = threading.Lock()

    @classmethod
    def from_path(
        cls, path: str | Path, *, fused: bool = True, trust_binaries: bool = False, batch_invariant: bool = False
    ) -> Kernels:
        """Kernels of a cache folder or `.mhcpack`; raises `BadInput` where it is missing, damaged or empty, or has no
        kernels for `batch_invariant`.

        Binaries that are not trusted (see `mhc-tune keys`) need `trust_binaries`; else their schedules are compiled.
        """
        return cls(_open(Path(path), fused, trust_binaries, batch_invariant), batch_invariant=batch_invariant)

    @classmethod
    def from_default_folder(cls) -> Kernels:
        """Kernels of the default cache folder, which may be empty or missing."""
        cache = KernelCache(default_folder(), lazy=True)
        return cls(Resolver(cache, compiles=True, without_code=_why_without_code(cache)))

    @classmethod
    def defaults(cls, *, fused: bool = True) -> Kernels:
        """The default schedule of every kernel, compiled at first use."""
        return cls(Resolver(None, compiles=True, fused=fused))

    @classmethod
    def reference(cls) -> Kernels:
        """The torch reference for every op."""
        return cls(Resolver(None, compiles=False))

    def run(
        self, op: str, direction: Direction, streams: int, width: int, rounds: int, inputs: Sequence[Any]
    ) -> tuple[torch.Tensor, ...]:
        """Run one kernel on contiguous inputs, in the order of its arguments, any leading dimensions in the place of
        tokens; the first gives dtype and device."""
        return self.look_up(op, direction, streams, width, rounds, inputs[0]).call(*inputs)

    def run_into(
        self,
        op: str,
        streams: int,
        width: int,
        rounds: int,
        inputs: Sequence[Any],
        out: Sequence[torch.Tensor],
    ) -> None:
        """Run a forward kernel with `out`, contiguous tensors of the right sizes, for its first results; what is no
        single kernel allocates them, and they are copied."""
        call = self.look_up(op, "forward", streams, width, rounds, inputs[0]).call
        if isinstance(call, LoadedKernel):
            call(*inputs, out=out)
            return
        for tensor, result in zip(out, call(*inputs), strict=False):
            tensor.view(result.shape).copy_(result)

    def warm_up(self, problem: Problem, device: torch.device) -> list[Resolved]:
        """The kernel of a problem, or where that is made of others those too; what was not resolved yet is loaded, and
        called on one token, which brings its code onto a GPU."""
        spec = kernel_spec(problem.op, problem.direction)
        tokens = EVERY_TOKENS if self.batch_invariant else token_bucket(problem.tokens)
        dtype = DTYPES[spec.arguments(problem)[0].dtype]
        key = (problem.op, problem.direction, problem.streams, problem.width, problem.rounds, dtype, device, tokens)
        found = self._resolved.get(key)
        if found is None:
            found = self._resolve(key)
            if found.schedule is not None:
                values = spec.inputs(found.problem, 1, 0)
                given = [values[argument.name] for argument in spec.arguments(found.problem) if is_given(argument)]
                found.call(*(value.to(device) if isinstance(value, torch.Tensor) else value for value in given))
        parts = spec.separate.parts if found.runs == "separate" and spec.separate else ()
        problems = (replace(problem, op=op, direction=direction) for op, direction in parts)
        return [found, *(each for part in problems for each in self.warm_up(part, device))]

    def look_up(
        self, op: str, direction: Direction, streams: int, width: int, rounds: int, first: torch.Tensor
    ) -> Resolved:
        """The kernel for inputs that begin with `first`; a dictionary hit once it is resolved."""
        tokens = EVERY_TOKENS
        if not self.batch_invariant:
            tokens = token_bucket(leading_shape(first, _dims(op, direction)).numel())
        key = (op, direction, streams, width, rounds, first.dtype, first.device, tokens)
        return self._resolved.get(key) or self._resolve(key)

    def op_with_norm(
        self, op: str, streams: int, width: int, rounds: int, dtype: torch.dtype, device: torch.device
    ) -> str:
        """The op that does what `op` does and normalises too; `op` itself where a kernel is stored for that and none
        for the other, whatever their token counts."""
        key = (op, streams, width, rounds, dtype, device)
        found = self._op_with_norm.get(key)
        if found is None:
            plain = Problem(op, "forward", streams, width, DTYPE_NAMES[dtype], EVERY_TOKENS, rounds)
            normed = replace(plain, op=normalising(op))
            with self._lock:
                apart = self.resolver.has_stored(plain, device) and not self.resolver.has_stored(normed, device)
            found = self._op_with_norm[key] = op if apart else normed.op
        return found

    def batch_invariant_form(self) -> Kernels:
        """The same kernels, with one schedule for every token count."""
        if self._batch_invariant_form is None:
            self._batch_invariant_form = Kernels(self.resolver, batch_invariant=True)
        return self._batch_invariant_form

    def report(self) -> KernelReport:
        """One row for every op, direction, shape and device that has run."""
        return KernelReport(entry.row for entry in list(self._resolved.values()))

    def _resolve(self, key: tuple[Any, ...]) -> Resolved:
        op, direction, streams, width, rounds, dtype, device, tokens = key
        problem = Problem(op, direction, streams, width, DTYPE_NAMES[dtype], tokens, rounds)

        def run(op: str, direction: Direction, inputs: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
            return self.run(op, direction, streams, width, rounds, inputs)

        with self._lock:
            if key not in self._resolved:
                self._warn_ranks_may_differ()
                self._resolved[key] = self.resolver.resolve(problem, device, run)
            return self._resolved[key]

    def _warn_ranks_may_differ(self) -> None:
        mine = self.resolver
        if ranks.is_distributed() and not mine.from_rank0 and mine.source is not None and mine.stored_records():
            text = "every rank chooses kernels by itself: call mhc.load_kernels after init_process_group, on all ranks"
            mine.warn_once("ranks", text)


@cache
def _dims(op: str, direction: Direction) -> int:
    """The dimensions after tokens of a kernel's first argument."""
    return len(kernel_spec(op, direction).arguments(Problem(op, direction, streams=1, width=8))[0].shape) - 1


def normalising(op: str) -> str:
    """The op that does what `op` does and normalises the sublayer's input."""
    base_op = op.removesuffix(IDENTITY)
    return base_op + NORM + op.removeprefix(base_op)


@gc_paused()
def _open(path: Path, fused: bool, trust_binaries: bool, batch_invariant: bool) -> Resolver:
    """A resolver of a cache folder's or pack's kernels; raises `BadInput`."""
    path = path.absolute()  # binaries are loaded later, perhaps from another working directory
    source = KernelCache(path, lazy=True) if path.is_dir() else Pack(path, lazy=True)
    without_code = None if trust_binaries else _why_without_code(source)
    resolver = Resolver(source, compiles=True, fused=fused, without_code=without_code, path=path)
    if not resolver.stored_records():
        raise BadInput(f"kernels must come from a folder or pack that holds some, got {path}: run `mhc-tune tune`")
    if batch_invariant:
        resolver.records = [record for record in resolver.stored_records() if record.key.tokens == EVERY_TOKENS]
        if not resolver.records:
            raise BadInput(
                f"batch_invariant must have kernels that were tuned for every token count, got none in {path}: run "
                "`mhc-tune tune --batch-invariant`"
            )
    return resolver


def _why_without_code(source: KernelCache | Pack) -> str | None:
    why = source.why_untrusted
    return why and f"{why} (load_kernels with trust_binaries=True runs its code as it is)"


class _Process:
    """State of the whole process."""

    active: Kernels | None = None


def active() -> Kernels:
    """The process's kernels: those loaded last, else those of the default cache folder."""
    if _Process.active is None:
        _Process.active = Kernels.from_default_folder()
    return _Process.active


@contextmanager
def using(kernels: Kernels) -> Iterator[Kernels]:
    """Make `kernels` active in the whole process inside the block (a backward may run on autograd's threads)."""
    before, _Process.active = _Process.active, kernels
    try:
        yield kernels
    finally:
        _Process.active = before


@contextmanager
def batch_invariant() -> Iterator[Kernels]:
    """Batch invariance in the whole process inside the block: what an op gives a token does not depend on what else is
    in the batch, nor on how many threads there are.

    One schedule of each op, for a device, n, width and dtype, then serves every token count: one that was tuned for it
    (`mhc-tune tune --batch-invariant`), else that of the largest token count that was tuned, else a default. Results of
    the forward and gradients of streams, sublayers and coefficients have the same bits for a token alone and among
    others. Gradients of parameters are sums over tokens: their bits depend on the batch and on the threads.
    """
    with using(active().batch_invariant_form()) as kernels:
        yield kernels


def load_kernels(path: str | Path, trust_binaries: bool = False, batch_invariant: bool = False) -> Kernels:
    """Run the tuned kernels of a cache folder or `.mhcpack` from now on, in the whole process.

    Args:
        path: a cache folder or a `.mhcpack` file.
        trust_binaries: load binaries that are not trusted too: those of a pack that is signed neither by you nor by a
            key of `mhc-tune keys`, or of a folder that others may write to. Without it, their schedules are compiled
            here, where there is a compiler.
        batch_invariant: run one schedule for every token count, of those that were tuned for that, from now on (see
            `mhc.batch_invariant`).

    With torch.distributed initialised this is a collective on the default group: all ranks call it, each with a path
    that it can read, and all run the kernels of rank 0's path. A rank whose path lacks a binary of rank 0 compiles rank
    0's schedule. So equal devices with equal compilers and thread counts give equal bits. If it is called before
    `init_process_group`, or never, every rank chooses by itself, which is logged once.

    Raises `BadInput` (a `ValueError`) with one line where the file is missing, damaged, of another format version or
    without kernels for batch invariance; with several ranks, on all of them.
    """
    if not ranks.is_distributed():
        _Process.active = Kernels.from_path(path, trust_binaries=trust_binaries, batch_invariant=batch_invariant)
        return _Process.active
    found: Resolver | BadInput
    try:
        found = _open(Path(path), True, trust_binaries, batch_invariant)
    except Exception as error:  # the other ranks wait for this one
        found = error if isinstance(error, BadInput) else BadInput(f"{path}: {type(error).__name__}: {error}")
    _Process.active = Kernels(ranks.adopt_rank0_records(found), batch_invariant=batch_invariant)
    return _Process.active


def kernel_report() -> KernelReport:
    """A row for every op that has run so far: which kernel runs it, and why. `print` shows a table."""
    return active().report()
