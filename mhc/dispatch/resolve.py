"""Kernel resolution: all candidates for a problem in order, and the first one that runs.

The order is tuned (by the rules of `tiles.cache.lookup`), shipped with this package, default schedule, torch reference.
Anything but a tuned kernel of this device is logged once to the logger `mhc`, never raised: a log line cannot stop a
training run, not even where warnings are errors.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from mhc.dispatch.candidates import REFERENCE_REQUESTED, KernelCandidate, shipped_candidate, tuned_candidate
from mhc.dispatch.kernel_report import Row, Runs
from tiles.cache.cache import CacheCorrupt, default_folder
from tiles.cache.compiled_here import compile_and_store, find_compiled
from tiles.cache.lookup import candidates as stored_candidates
from tiles.cache.record import Record
from tiles.cache.shipped import shipped_records
from tiles.compiler import compile as compiler
from tiles.errors import first_line
from tiles.kernels.reference_inputs import DTYPES
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import EVERY_TOKENS, PAPER_ROUNDS, Argument, Problem, Run
from tiles.runtime.loaded_kernel import (
    LoadedKernel,
    LoadError,
    has_tokens,
    is_given,
    is_result,
    leading_shape,
    run_reference,
    with_leading,
)
from tiles.target import Device, detect_device

log = logging.getLogger("mhc")

Call = Callable[..., tuple[torch.Tensor, ...]]

USUAL_TOKENS = 256
"""The token count whose default schedule serves every batch, where nothing was tuned for that."""


class RecordSource(Protocol):
    """A source of kernel records: a `KernelCache` or a `Pack`."""

    complaints: list[str]

    def records(self) -> list[Record]:
        """All valid records."""

    def binary_path(self, record: Record) -> Path:
        """The binary's file; raises `CacheCorrupt` where its SHA-256 is not the record's."""


@dataclass(frozen=True)
class Resolved:
    """The callable that runs a problem, and why it was chosen; `schedule` is None for what is no single kernel."""

    call: Call
    problem: Problem
    device: str
    runs: Runs
    why: str
    schedule: Mapping[str, Any] | None = None

    @property
    def row(self) -> Row:
        """Its row in a report."""
        return Row(**asdict(self.problem), device=self.device, runs=self.runs, why=self.why)


@dataclass(frozen=True)
class Explanation:
    """A candidate, whether it `runs`, and one sentence on why or why not."""

    candidate: KernelCandidate
    runs: bool
    verdict: str


class Unavailable(Exception):
    """A candidate cannot run after all; the text says why."""


@dataclass
class Resolver:
    """Resolves problems to kernels, from one source of tuned kernels or from none.

    Fields:
        source: the tuned kernels; None for default schedules alone.
        compiles: whether schedules may be compiled here. Without it and without a source, the torch reference runs.
        fused: if False, pre and step run as separate kernels, also where the fused ones are faster.
        without_code: why the source's binaries may not be loaded, or None.
        path: the folder or pack that was opened, for messages; None for the default cache folder.
        records: the source's records, read once; with torch.distributed those of rank 0.
        from_rank0: whether `records` are those of rank 0.
    """

    source: RecordSource | None
    compiles: bool
    fused: bool = True
    without_code: str | None = None
    path: Path | None = None
    records: list[Record] | None = None
    from_rank0: bool = False
    _warned: set[str] = field(default_factory=set, init=False)

    def resolve(self, problem: Problem, device: torch.device, run: Run) -> Resolved:
        """The first candidate that runs; never raises."""
        try:
            return self._resolved(problem, device, run)
        except Exception as error:  # no fault of a disk or a library may end a training run
            why = _reason(error)
            self.warn_once(why, f"{problem.describe()} runs the slow torch reference: {why}")
            return reference(problem, device, why)

    def _resolved(self, problem: Problem, device: torch.device, run: Run) -> Resolved:
        passed: list[str] = []
        skipped: list[str] = []  # the stored kernels among them
        for candidate in self.candidates(problem, device):
            try:
                if candidate.why_refused:
                    raise Unavailable(candidate.why_refused)
                call, how = self._call(candidate, problem, device, run)
            except Unavailable as error:
                passed.append(str(error))
                if candidate.runs in ("tuned", "recompiled"):
                    skipped.append(str(error))
                continue
            why = _why(candidate, how, passed)
            self._warn_skipped_or_slow(problem, candidate, skipped, why)
            return Resolved(call, problem, str(device), candidate.runs, why, candidate.schedule)
        raise AssertionError("the reference always runs")

    def explain(self, problem: Problem, device: torch.device) -> list[Explanation]:
        """Every candidate in order, and which one runs. Compiles nothing."""
        found: list[Explanation] = []
        for candidate in self.candidates(problem, device):
            if any(earlier.runs for earlier in found):
                found.append(Explanation(candidate, False, "not needed, as a nearer one runs"))
                continue
            try:
                if candidate.why_refused:
                    raise Unavailable(candidate.why_refused)
                how = self._reason_without_compiling(candidate, problem, device)
            except Unavailable as error:
                found.append(Explanation(candidate, False, str(error)))
            else:
                found.append(Explanation(candidate, True, f"runs{how}"))
        return found

    def candidates(self, problem: Problem, device: torch.device) -> Iterator[KernelCandidate]:
        """All candidates for a problem, best first; the last one is the torch reference."""
        if self.source is None and not self.compiles:
            yield KernelCandidate("reference", REFERENCE_REQUESTED)
            return
        if device.type not in ("cpu", "cuda"):
            yield KernelCandidate("reference", f"this release has no kernels for {device.type} tensors")
            return
        spec = kernel_spec(problem.op, problem.direction)
        if device.type not in spec.targets:
            yield KernelCandidate("reference", f"{problem.op} has no kernel for {device.type} tensors")
            return
        if not self.fused and spec.separate:
            yield KernelCandidate("separate", "the separate kernels were asked for")
            return
        here = _fingerprint(device)
        if self.source is not None:
            for tuned in stored_candidates(self.stored_records(), problem, here, self.without_code):
                yield tuned_candidate(tuned)
            for shipped in stored_candidates(shipped_records(), problem, here, "it comes without code"):
                yield shipped_candidate(shipped)
        usual = replace(problem, tokens=USUAL_TOKENS) if problem.tokens == EVERY_TOKENS else problem
        schedule = spec.default(usual, here.target)
        yield KernelCandidate("default", "default schedule, not tuned", schedule=asdict(schedule), folder="defaults")
        yield KernelCandidate("reference", "no kernel serves")

    def has_stored(self, problem: Problem, device: torch.device) -> bool:
        """Whether a stored kernel serves a problem, be it for another token count; never raises."""
        if self.source is None:
            return False
        try:
            found = stored_candidates(self.stored_records(), problem, _fingerprint(device), self.without_code)
        except Exception:  # `resolve` reads the same records, and says what is wrong with them
            return False
        return any(candidate.why_refused is None for candidate in found)

    def stored_records(self) -> list[Record]:
        """The source's records, read once, so that what runs does not depend on when an op first runs."""
        if self.records is None:
            assert self.source is not None
            self.records = self.source.records()
            for complaint in self.source.complaints:
                self.warn_once(complaint, complaint)
        return self.records

    def _call(self, candidate: KernelCandidate, problem: Problem, device: torch.device, run: Run) -> tuple[Call, str]:
        """A candidate's callable, and what to add to its reason; raises `Unavailable`."""
        if candidate.runs == "reference":
            return _by_token(partial(_run_reference, problem), problem), ""
        if candidate.runs == "separate":
            separate = kernel_spec(problem.op, problem.direction).separate
            assert separate
            return _by_token(partial(separate.call, run), problem), ""
        if candidate.code is not None:
            assert self.source is not None
            try:
                return _loaded(self.source.binary_path(candidate.code), problem, device), ""
            except (CacheCorrupt, LoadError, OSError) as error:
                if not self.from_rank0:
                    raise Unavailable(_reason(error)) from error
                candidate = replace(candidate, why_recompile=_reason(error))  # all ranks run this schedule
        return self._compiled(candidate, problem, device)

    def _compiled(self, candidate: KernelCandidate, problem: Problem, device: torch.device) -> tuple[Call, str]:
        assert candidate.schedule is not None
        here = _fingerprint(device)
        try:
            found = find_compiled(problem, candidate.schedule, here, candidate.folder)
            if found is None:
                if why := self.why_not_compiled(here):
                    stale = candidate.why_recompile
                    raise Unavailable(f"{stale}, and cannot be compiled: {why}" if stale else why)
                self._warn_compiling(problem, candidate)
                built_for = candidate.compiled_for or problem
                found = compile_and_store(built_for, candidate.schedule, here, candidate.folder, torch.__version__)
            call = _loaded(found.path, problem, device)
        except Unavailable:
            raise
        except Exception as error:  # a compiler's failure must not end a training run; the report shows it
            raise Unavailable(_reason(error)) from error
        if found.why_not_stored:
            self.warn_once("not kept", f"compiled kernels serve this process alone: {found.why_not_stored}")
        return call, f"; compiled {'earlier' if found.cached else 'by this process'}{candidate.as_recompiled}"

    def _reason_without_compiling(self, candidate: KernelCandidate, problem: Problem, device: torch.device) -> str:
        here = _fingerprint(device)
        if (
            candidate.code is None
            and candidate.schedule is not None
            and self.why_not_compiled(here) is None
            and find_compiled(problem, candidate.schedule, here, candidate.folder) is None
        ):
            return f"; compiled when it is first used{candidate.as_recompiled}"
        return self._call(candidate, problem, device, _must_not_run)[1]

    def why_not_compiled(self, here: Device) -> str | None:
        """Why schedules cannot be compiled here, or None."""
        if not self.compiles:
            return "rank 0 has no compiler, so that no rank compiles"
        return compiler.why_no_compiler(here.target)

    def _warn_compiling(self, problem: Problem, candidate: KernelCandidate) -> None:
        """Log why, before compiling for seconds."""
        if candidate.runs == "default":
            self._warn_default(problem, "compiling default schedules, some seconds each, once")
        elif candidate.runs == "shipped":
            text = f"no tuned kernel for {problem.describe()}: compiling shipped schedules, some seconds each, once"
            self.warn_once("compile shipped", text)
        else:
            text = f"compiling stored schedules, some seconds each, once: {problem.describe()}{candidate.as_recompiled}"
            self.warn_once("compile stored", text)

    def _warn_skipped_or_slow(
        self, problem: Problem, candidate: KernelCandidate, skipped: Sequence[str], why: str
    ) -> None:
        """Log once each reason why a stored kernel was skipped, and each kind of fallback with its remedy."""
        if candidate.runs == "reference" and candidate.why != REFERENCE_REQUESTED:
            remedy = "" if self.without_code or candidate.why == why else f". {self.remedy(problem)}"
            remedy += ". Its bits depend on the batch" if problem.tokens == EVERY_TOKENS else ""
            self.warn_once(why, f"{problem.describe()} runs the slow torch reference: {why}{remedy}")
            return
        for reason in skipped:
            self.warn_once(reason, f"{problem.describe()}: a stored kernel is skipped: {reason}")
        if candidate.sibling:
            self.warn_once("sibling", f"{problem.describe()} runs a kernel {candidate.why}. {self.remedy(problem)}")
        if candidate.runs == "default" and self.source is not None:
            self._warn_default(problem, "it runs the default schedule")

    def _warn_default(self, problem: Problem, what: str) -> None:
        """Log that a default schedule runs: for want of a tuned kernel, or because it was asked for."""
        if self.source is None:
            self.warn_once("default", f"{what}: {problem.describe()}")
        else:
            text = f"no tuned kernel for {problem.describe()}: {what}. {self.remedy(problem)}"
            self.warn_once("default", text)

    def remedy(self, problem: Problem) -> str:
        """The command that tunes a kernel for a problem."""
        rounds = kernel_spec(problem.op, problem.direction).canonical(problem).rounds
        if rounds != PAPER_ROUNDS:
            return f"For a faster one: mhc-tune tune --model with a config.json that has {rounds} Sinkhorn rounds"
        every = problem.tokens == EVERY_TOKENS
        tokens = "--batch-invariant --tokens 1 --tokens 2048" if every else f"--tokens {problem.tokens}"
        command = f"mhc-tune tune --streams {problem.streams} --width {problem.width} {tokens} --dtype {problem.dtype}"
        command += f" --op {problem.op}" if problem.normalises or not problem.mixes else ""
        if self.path is not None and self.path.is_dir() and self.path != default_folder():
            command += f" --cache {shlex.quote(str(self.path))}"
        export = ", and export it again" if self.path is not None and not self.path.is_dir() else ""
        return f"For a faster one: {command}{export}"

    def warn_once(self, topic: str, text: str) -> None:
        """Log a warning, the first on its topic alone."""
        if topic not in self._warned:
            self._warned.add(topic)
            log.warning(text)


def _loaded(path: Path, problem: Problem, device: torch.device) -> LoadedKernel:
    """A kernel whose code is on the device: a graph's capture may be the first to call it. Raises `LoadError`."""
    kernel = LoadedKernel(path, problem)
    kernel.load(device)
    return kernel


def _fingerprint(device: torch.device) -> Device:
    """The device that a torch device stands for; this machine's CPU for one that has no kernels."""
    return detect_device("cuda", device.index or 0) if device.type == "cuda" else detect_device("cpu")


def _must_not_run(*_: Any) -> tuple[torch.Tensor, ...]:
    raise AssertionError("an explanation runs nothing")


def reference(problem: Problem, device: torch.device, why: str) -> Resolved:
    """A problem resolved to the torch reference."""
    return Resolved(_by_token(partial(_run_reference, problem), problem), problem, str(device), "reference", why)


def _check_fits(argument: Argument, value: torch.Tensor, leading: torch.Size, device: torch.device) -> None:
    shape, dtype = with_leading(argument, leading), DTYPES[argument.dtype]
    if value.shape != shape or value.dtype != dtype or value.device != device:
        raise ValueError(f"{argument.name} must be {dtype} {shape} on {device}, got {value.dtype} {tuple(value.shape)}")


def _by_token(call: Call, problem: Problem) -> Call:
    """What runs on tensors [tokens, ...], on tensors with any leading dimensions, as a `LoadedKernel` does: with a
    `ValueError` for those that do not fit."""
    arguments = kernel_spec(problem.op, problem.direction).arguments(problem)
    given = [argument for argument in arguments if is_given(argument)]
    results = [has_tokens(argument) for argument in arguments if is_result(argument)]
    dims = len(arguments[0].shape) - 1

    def run(*inputs: Any) -> tuple[torch.Tensor, ...]:
        leading = leading_shape(inputs[0], dims)
        for argument, value in zip(given, inputs, strict=True):
            if argument.role != "scalar" and value is not None:
                _check_fits(argument, value, leading, inputs[0].device)
        if len(leading) == 1:
            return call(*inputs)
        count = len(leading)
        flat = (
            value.view((leading.numel(), *value.shape[count:])) if has_tokens(argument) and value is not None else value
            for argument, value in zip(given, inputs, strict=True)
        )
        return tuple(
            # No view in autograd's sense, which forbids a sublayer that begins in place to write to one of several.
            result.view((*leading, *result.shape[1:])).detach() if of_tokens else result
            for of_tokens, result in zip(results, call(*flat), strict=True)
        )

    return run


def _run_reference(problem: Problem, *inputs: Any) -> tuple[torch.Tensor, ...]:
    """The reference with the guarantees of compiled kernels: full precision under autocast, results that are contiguous
    and no views, so that autograd allows writes to them."""
    with torch.autocast(inputs[0].device.type, enabled=False):
        return tuple(result.contiguous().detach() for result in run_reference(problem, *inputs))


def _why(candidate: KernelCandidate, how: str, passed: Sequence[str]) -> str:
    """One sentence: what runs, and why the nearest candidate does not; for the reference also why the last does not."""
    if candidate.runs == "reference" and passed:
        return passed[0] if passed[-1] in passed[0] else f"{passed[0]}; {passed[-1]}"
    skipped = f"; a nearer one is skipped: {passed[0]}" if passed else ""
    return candidate.why + how + skipped


def _reason(error: Exception) -> str:
    text = first_line(error)
    return text if isinstance(error, CacheCorrupt | LoadError) else f"{type(error).__name__}: {text}"
