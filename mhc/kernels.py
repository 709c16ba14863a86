"""Which kernel runs for an op: found once for a problem and device, then a dictionary hit.

The order is exact match, nearest token bucket, sibling device, default schedule (compiled where a compiler is there),
torch reference. What is not a tuned kernel is said once in the log `mhc`, never raised: a log line cannot stop a
training run, not even where warnings are errors.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from mhc.report import KernelReport, Row, Runs
from tiles.cache import CacheCorrupt, KernelCache, Key, Record, default_folder, token_bucket
from tiles.errors import BadInput
from tiles.family import Direction, Problem
from tiles.lookup import Choice, find
from tiles.pack import Pack
from tiles.reference import DTYPES
from tiles.registry import kernel_spec
from tiles.runtime import LoadedKernel, LoadError, run_reference
from tiles.target import Device, detect_device

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

log = logging.getLogger("mhc")

Call = Callable[..., tuple[torch.Tensor, ...]]


class Shelf(Protocol):
    """Where records come from: a `KernelCache` or a `Pack`."""

    def records(self) -> list[Record]:
        """All sound records."""

    def binary_path(self, record: Record) -> Path:
        """The binary's file; raises `CacheCorrupt` when it is not what the record says."""


@dataclass(frozen=True)
class Resolved:
    """A problem's kernel, and how it came to be chosen."""

    call: Call
    problem: Problem
    device: str
    runs: Runs
    why: str


class Kernels:
    """The kernels that the ops of `mhc.functional` run; safe to use from several threads.

    Use a constructor: `from_path` (a cache folder or a pack), `defaults`, `reference`. Without `fused`, the passes pre
    and step are made of the separate kernels, also where the tuner found the fused one to be faster.
    """

    def __init__(self, tuned: Shelf | None, *, compiles: bool, fused: bool = True) -> None:
        self._tuned = tuned
        self._compiles = compiles
        self._fused = fused
        self._resolved: dict[tuple[Any, ...], Resolved] = {}
        self._said: set[str] = set()
        self._lock = threading.Lock()

    @classmethod
    def from_path(cls, path: str | Path, *, fused: bool = True) -> Kernels:
        """Kernels of a cache folder or `.mhcpack`; raises `BadInput` where it is missing, damaged or empty."""
        path = Path(path)
        shelf: Shelf = KernelCache(path) if path.is_dir() else Pack(path)
        if not shelf.records():
            raise BadInput(f"kernels must come from a folder or pack that holds some, got {path}: run `mhc-tune tune`")
        return cls(shelf, compiles=True, fused=fused)

    @classmethod
    def from_default_folder(cls) -> Kernels:
        """Kernels of the default cache folder, which may be empty or missing."""
        return cls(KernelCache(default_folder()), compiles=True)

    @classmethod
    def defaults(cls, *, fused: bool = True) -> Kernels:
        """The default schedule of every kernel, compiled at first use."""
        return cls(None, compiles=True, fused=fused)

    @classmethod
    def reference(cls) -> Kernels:
        """The torch reference for every op."""
        return cls(None, compiles=False)

    def run(
        self, op: str, direction: Direction, streams: int, width: int, rounds: int, inputs: Sequence[Any]
    ) -> tuple[torch.Tensor, ...]:
        """Run one kernel on contiguous inputs, in the order of its arguments; the first decides dtype and device."""
        first = inputs[0]
        key = (op, direction, streams, width, rounds, first.dtype, first.device, token_bucket(first.shape[0]))
        resolved = self._resolved.get(key) or self._resolve(key)
        return resolved.call(*inputs)

    def report(self) -> KernelReport:
        """One row for every op, direction, shape and device that has run."""
        return KernelReport(
            Row(**asdict(entry.problem), device=entry.device, runs=entry.runs, why=entry.why)
            for entry in list(self._resolved.values())
        )

    def _resolve(self, key: tuple[Any, ...]) -> Resolved:
        op, direction, streams, width, rounds, dtype, device, tokens = key
        problem = Problem(op, direction, streams, width, DTYPE_NAMES[dtype], tokens, rounds)
        with self._lock:
            if key not in self._resolved:
                self._resolved[key] = self._choose(problem, device)
            return self._resolved[key]

    def _choose(self, problem: Problem, device: torch.device) -> Resolved:
        if self._tuned is None and not self._compiles:
            return _reference(problem, device, "the torch reference was asked for")
        if device.type != "cpu":
            return self._fall_back(problem, device, f"this release has no kernels for {device.type} tensors")
        if not self._fused and kernel_spec(problem.op, problem.direction).separate:
            return self._separate(problem, device, "the separate kernels were asked for")
        here = detect_device("cpu")
        return (
            self._tuned_kernel(problem, device, here)
            or self._compiled_before(problem, device, here)
            or self._compiled_now(problem, device, here)
        )

    def _tuned_kernel(self, problem: Problem, device: torch.device, here: Device) -> Resolved | None:
        if self._tuned is None:
            return None
        found = self._load(self._tuned, problem, here)
        if found is None:
            return None
        call, choice = found
        if choice.how == "sibling device":
            text = f"{problem.describe()} runs a kernel {choice.why}; tune here for a better one"
            self._say(logging.WARNING, choice.how, text)
        if choice.record.measurement.get("separate_wins", False):
            return self._separate(problem, device, f"{choice.how}: faster than the fused kernel {choice.why}")
        return Resolved(call, problem, str(device), "tuned", f"{choice.how}: {choice.why}")

    def _separate(self, problem: Problem, device: torch.device, why: str) -> Resolved:
        """A fused pass made of the kernels that run for its ops, each as it is resolved itself."""

        def run(op: str, direction: Direction, inputs: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
            return self.run(op, direction, problem.streams, problem.width, problem.rounds, inputs)

        separate = kernel_spec(problem.op, problem.direction).separate
        assert separate
        return Resolved(partial(separate.call, run), problem, str(device), "separate", why)

    def _compiled_before(self, problem: Problem, device: torch.device, here: Device) -> Resolved | None:
        found = self._load(_defaults_cache(), problem, here)
        return found and Resolved(found[0], problem, str(device), "default", "compiled earlier; not tuned")

    def _compiled_now(self, problem: Problem, device: torch.device, here: Device) -> Resolved:
        """Compile the default schedule into the cache, so that the next process finds it; else fall back."""
        from tiles.compile import compile_kernel, why_no_compiler

        missing = why_no_compiler(here.target)
        if missing:
            return self._fall_back(problem, device, missing)
        self._say(
            logging.WARNING,
            "compile",
            f"no tuned kernel for {problem.describe()}: compiling default schedules, some seconds each, once. For "
            f"faster ones: mhc-tune tune --streams {problem.streams} --width {problem.width} "
            f"--tokens {problem.tokens} --dtype {problem.dtype}",
        )
        try:
            schedule = kernel_spec(problem.op, problem.direction).default(problem, here.target)
            built = compile_kernel(problem, schedule, here.target)
            cache = _defaults_cache()
            provenance = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "torch": torch.__version__}
            record = cache.put(Key.of(problem, here), asdict(schedule), built.binary, built.source, {}, provenance)
            call = LoadedKernel(cache.binary_path(record), problem)
        except Exception as error:  # whatever a compiler does must not end a training run; the report tells
            return self._fall_back(problem, device, f"{type(error).__name__}: {error}".splitlines()[0])
        return Resolved(call, problem, str(device), "default", "compiled by this process; not tuned")

    def _fall_back(self, problem: Problem, device: torch.device, why: str) -> Resolved:
        self._say(logging.WARNING, why, f"{problem.describe()} runs the slow torch reference: {why}")
        return _reference(problem, device, why)

    def _load(self, shelf: Shelf, problem: Problem, here: Device) -> tuple[Call, Choice] | None:
        """The nearest record's kernel that loads here, and how near it is."""
        records = shelf.records()
        for complaint in getattr(shelf, "complaints", ()):
            self._say(logging.WARNING, complaint, complaint)
        while choice := find(records, problem, here):
            try:
                return LoadedKernel(shelf.binary_path(choice.record), problem), choice
            except (CacheCorrupt, LoadError) as error:
                self._say(logging.WARNING, str(error), f"{problem.describe()}: a stored kernel is skipped: {error}")
                records.remove(choice.record)
        return None

    def _say(self, level: int, topic: str, text: str) -> None:
        """Log the first message on a topic."""
        if topic not in self._said:
            self._said.add(topic)
            log.log(level, text)


def _reference(problem: Problem, device: torch.device, why: str) -> Resolved:
    return Resolved(partial(_run_reference, problem), problem, str(device), "reference", why)


def _run_reference(problem: Problem, *inputs: Any) -> tuple[torch.Tensor, ...]:
    """The reference with what the compiled kernels have: full precision under autocast, contiguous results."""
    with torch.autocast(inputs[0].device.type, enabled=False):
        return tuple(result.contiguous() for result in run_reference(problem, *inputs))


def _defaults_cache() -> KernelCache:
    """Where compiled default schedules are kept: apart from tuned kernels, so that neither hides the other."""
    return KernelCache(default_folder() / "defaults")


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


def load_kernels(path: str | Path) -> Kernels:
    """Run the tuned kernels of a cache folder or `.mhcpack` from now on, in the whole process.

    Raises `BadInput` (a `ValueError`) with one line where the file is missing, damaged or of another format version.
    """
    _Process.active = Kernels.from_path(path)
    return _Process.active


def kernel_report() -> KernelReport:
    """What runs for every op that has run so far, and why; `print` shows a table."""
    return active().report()
