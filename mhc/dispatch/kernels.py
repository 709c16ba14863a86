"""The kernels that the ops run: found once for a problem and device (`mhc.dispatch.resolve`), then a dictionary hit."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mhc.dispatch import gc_paused as collector
from mhc.dispatch import ranks as fleet
from mhc.dispatch.kernel_report import KernelReport, Row
from mhc.dispatch.resolve import Resolved, Resolver
from tiles.cache.cache import KernelCache, default_folder, token_bucket
from tiles.errors import BadInput
from tiles.kernels.reference_inputs import DTYPES
from tiles.kernels.spec import Direction, Problem
from tiles.pack.pack import Pack

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Kernels:
    """The kernels that the ops of `mhc.functional` run; safe to use from several threads.

    Use a constructor: `from_path` (a cache folder or a pack), `defaults`, `reference`. Without `fused`, the passes pre
    and step are made of the separate kernels, also where the tuner found the fused one to be faster.
    """

    def __init__(self, resolver: Resolver) -> None:
        self.resolver = resolver
        self._resolved: dict[tuple[Any, ...], Resolved] = {}
        self._lock = threading.Lock()

    @classmethod
    def from_path(cls, path: str | Path, *, fused: bool = True, trust_binaries: bool = False) -> Kernels:
        """Kernels of a cache folder or `.mhcpack`; raises `BadInput` where it is missing, damaged or empty.

        Code that is not trusted (see `mhc-tune keys`) is not run without `trust_binaries`: its schedules are compiled.
        """
        return cls(_opened(Path(path), fused, trust_binaries))

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
        """Run one kernel on contiguous inputs, in the order of its arguments; the first decides dtype and device."""
        return self.look_up(op, direction, streams, width, rounds, inputs[0]).call(*inputs)

    def look_up(
        self, op: str, direction: Direction, streams: int, width: int, rounds: int, first: torch.Tensor
    ) -> Resolved:
        """The kernel for inputs that begin with `first`: a dictionary hit once it has been resolved."""
        key = (op, direction, streams, width, rounds, first.dtype, first.device, token_bucket(first.shape[0]))
        return self._resolved.get(key) or self._resolve(key)

    def report(self) -> KernelReport:
        """One row for every op, direction, shape and device that has run."""
        return KernelReport(
            Row(**asdict(entry.problem), device=entry.device, runs=entry.runs, why=entry.why)
            for entry in list(self._resolved.values())
        )

    def _resolve(self, key: tuple[Any, ...]) -> Resolved:
        op, direction, streams, width, rounds, dtype, device, tokens = key
        problem = Problem(op, direction, streams, width, DTYPE_NAMES[dtype], tokens, rounds)

        def run(op: str, direction: Direction, inputs: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
            return self.run(op, direction, streams, width, rounds, inputs)

        with self._lock:
            if key not in self._resolved:
                self._say_where_ranks_may_differ()
                self._resolved[key] = self.resolver.resolve(problem, device, run)
            return self._resolved[key]

    def _say_where_ranks_may_differ(self) -> None:
        found = self.resolver
        if fleet.in_fleet() and not found.agreed and found.tuned is not None and found.tuned_records():
            text = "every rank chooses kernels by itself: call mhc.load_kernels after init_process_group, on all ranks"
            found.say("fleet", text)


@collector.paused()
def _opened(path: Path, fused: bool, trust_binaries: bool) -> Resolver:
    """How kernels are found in a cache folder or pack. Raises `BadInput`."""
    path = path.absolute()  # what runs first after a change of directory is found too
    shelf = KernelCache(path, lazy=True) if path.is_dir() else Pack(path, lazy=True)
    without_code = None if trust_binaries else _why_without_code(shelf)
    resolver = Resolver(shelf, compiles=True, fused=fused, without_code=without_code, path=path)
    if not resolver.tuned_records():
        raise BadInput(f"kernels must come from a folder or pack that holds some, got {path}: run `mhc-tune tune`")
    return resolver


def _why_without_code(shelf: KernelCache | Pack) -> str | None:
    why = shelf.why_untrusted
    return why and f"{why} (load_kernels with trust_binaries=True runs its code as it is)"


class _Process:
    """What the whole process shares."""

    active: Kernels | None = None


def active() -> Kernels:
    """The process's kernels: those last loaded, else those of the default cache folder."""
    if _Process.active is None:
        _Process.active = Kernels.from_default_folder()
    return _Process.active


@contextmanager
def using(kernels: Kernels) -> Iterator[Kernels]:
    """Make `kernels` active in the whole process while the block runs (a backward may run on autograd's threads)."""
    before, _Process.active = _Process.active, kernels
    try:
        yield kernels
    finally:
        _Process.active = before


def load_kernels(path: str | Path, trust_binaries: bool = False) -> Kernels:
    """Run the tuned kernels of a cache folder or `.mhcpack` from now on, in the whole process.

    Code that is not trusted (a pack that neither you nor a key of `mhc-tune keys` has signed, a folder that others may
    write to) runs only with `trust_binaries`; else its schedules are compiled here, where a compiler is.

    With torch.distributed initialised this is a collective call on the default group: all ranks make it, each with a
    path that it can read, and all run what rank 0's path holds. A rank whose path lacks rank 0's code compiles rank 0's
    schedule. So equal devices with equal compilers and thread counts give equal bits. Called before
    `init_process_group`, or never, every rank chooses by itself, which is said once.

    Raises `BadInput` (a `ValueError`) with one line where the file is missing, damaged or of another format version;
    in a fleet on all ranks.
    """
    if not fleet.in_fleet():
        _Process.active = Kernels.from_path(path, trust_binaries=trust_binaries)
        return _Process.active
    found: Resolver | BadInput
    try:
        found = _opened(Path(path), fused=True, trust_binaries=trust_binaries)
    except Exception as error:  # the other ranks wait for this one, whatever it finds
        found = error if isinstance(error, BadInput) else BadInput(f"{path}: {type(error).__name__}: {error}")
    _Process.active = Kernels(fleet.agree(found))
    return _Process.active


def kernel_report() -> KernelReport:
    """What runs for every op that has run so far, and why; `print` shows a table."""
    return active().report()
