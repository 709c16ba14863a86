"""How a problem gets its kernel: all that could run it in order, and the first that does.

The order is tuned (`tiles.cache.lookup` has its rules), shipped with this package, default schedule, torch reference.
What is
not a tuned kernel of this device is said once in the log `mhc`, never raised: a log line cannot stop a training run,
not even where warnings are errors.
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

from mhc.dispatch.candidates import ASKED_FOR, Option, shipped_option, tuned_option
from mhc.dispatch.kernel_report import Runs
from tiles.cache.cache import CacheCorrupt, default_folder
from tiles.cache.compiled_here import compile_and_store, find_compiled
from tiles.cache.lookup import candidates
from tiles.cache.record import Record
from tiles.cache.shipped import shipped_records
from tiles.compiler import compile as compiler
from tiles.errors import first_line
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import PAPER_ROUNDS, Problem, Run
from tiles.runtime.loaded_kernel import LoadedKernel, LoadError, run_reference
from tiles.target import Device, detect_device

log = logging.getLogger("mhc")

Call = Callable[..., tuple[torch.Tensor, ...]]


class Shelf(Protocol):
    """Where records come from: a `KernelCache` or a `Pack`."""

    complaints: list[str]

    def records(self) -> list[Record]:
        """All sound records."""

    def binary_path(self, record: Record) -> Path:
        """The binary's file; raises `CacheCorrupt` when it is not what the record says."""


@dataclass(frozen=True)
class Resolved:
    """A problem's kernel, and how it came to be chosen; `schedule` is None where no kernel of ours runs."""

    call: Call
    problem: Problem
    device: str
    runs: Runs
    why: str
    schedule: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Explained:
    """An option with its fate: whether it `runs`, and one sentence why or why not."""

    option: Option
    runs: bool
    verdict: str


class Unavailable(Exception):
    """An option does not serve after all; the text says why."""


@dataclass
class Resolver:
    """Finds the kernels of one source of tuned kernels, or of none.

    Fields:
        tuned: the shelf; None for default schedules alone.
        compiles: whether schedules may be compiled here. With neither, everything runs the torch reference.
        fused: without it the passes pre and step are made of the separate kernels, also where fused ones are faster.
        without_code: why the shelf's own code may not be called, or None.
        path: what the shelf was opened from, for messages; None for the default cache folder.
        records: what the shelf holds, read once; in a fleet rank 0's.
        agreed: whether rank 0 has chosen `records`.
    """

    tuned: Shelf | None
    compiles: bool
    fused: bool = True
    without_code: str | None = None
    path: Path | None = None
    records: list[Record] | None = None
    agreed: bool = False
    _said: set[str] = field(default_factory=set, init=False)

    def resolve(self, problem: Problem, device: torch.device, run: Run) -> Resolved:
        """The first option that serves; never raises."""
        try:
            return self._resolved(problem, device, run)
        except Exception as error:  # whatever is wrong with a disk or a library must not end a training run
            why = _reason(error)
            self.say(why, f"{problem.describe()} runs the slow torch reference: {why}")
            return reference(problem, device, why)

    def _resolved(self, problem: Problem, device: torch.device, run: Run) -> Resolved:
        passed: list[str] = []
        skipped: list[str] = []  # of what passed, stored kernels
        for option in self.options(problem, device):
            try:
                if option.refused:
                    raise Unavailable(option.refused)
                call, how = self._call(option, problem, _fingerprint(device), run)
            except Unavailable as error:
                passed.append(str(error))
                if option.runs in ("tuned", "recompiled"):
                    skipped.append(str(error))
                continue
            why = _why(option, how, passed)
            self._say_what_is_skipped_or_slow(problem, option, skipped, why)
            return Resolved(call, problem, str(device), option.runs, why, option.schedule)
        raise AssertionError("the reference always serves")

    def explain(self, problem: Problem, device: torch.device) -> list[Explained]:
        """Every option in order, and which one runs. Nothing is compiled for that."""
        found: list[Explained] = []
        for option in self.options(problem, device):
            if any(earlier.runs for earlier in found):
                found.append(Explained(option, False, "not needed, as a nearer one runs"))
                continue
            try:
                if option.refused:
                    raise Unavailable(option.refused)
                how = self._how_without_compiling(option, problem, _fingerprint(device))
            except Unavailable as error:
                found.append(Explained(option, False, str(error)))
            else:
                found.append(Explained(option, True, f"runs{how}"))
        return found

    def options(self, problem: Problem, device: torch.device) -> Iterator[Option]:
        """All that could run a problem, the best first; the last one is the torch reference."""
        if self.tuned is None and not self.compiles:
            yield Option("reference", ASKED_FOR)
            return
        if device.type not in ("cpu", "cuda"):
            yield Option("reference", f"this release has no kernels for {device.type} tensors")
            return
        if not self.fused and kernel_spec(problem.op, problem.direction).separate:
            yield Option("separate", "the separate kernels were asked for")
            return
        here = _fingerprint(device)
        if self.tuned is not None:
            for tuned in candidates(self.tuned_records(), problem, here, self.without_code):
                yield tuned_option(tuned)
            for shipped in candidates(shipped_records(), problem, here, "it comes without code"):
                yield shipped_option(shipped)
        schedule = kernel_spec(problem.op, problem.direction).default(problem, here.target)
        yield Option("default", "default schedule, not tuned", schedule=asdict(schedule), folder="defaults")
        yield Option("reference", "no kernel serves")

    def tuned_records(self) -> list[Record]:
        """What is tuned, read once: what runs does not depend on when an op runs first."""
        if self.records is None:
            assert self.tuned is not None
            self.records = self.tuned.records()
            for complaint in self.tuned.complaints:
                self.say(complaint, complaint)
        return self.records

    def _call(self, option: Option, problem: Problem, here: Device, run: Run) -> tuple[Call, str]:
        """What runs an option, and what there is to add to its reason; raises `Unavailable`."""
        if option.runs == "reference":
            return partial(_run_reference, problem), ""
        if option.runs == "separate":
            separate = kernel_spec(problem.op, problem.direction).separate
            assert separate
            return partial(separate.call, run), ""
        if option.code is not None:
            assert self.tuned is not None
            try:
                return LoadedKernel(self.tuned.binary_path(option.code), problem), ""
            except (CacheCorrupt, LoadError, OSError) as error:
                if not self.agreed:
                    raise Unavailable(_reason(error)) from error
                option = replace(option, because=_reason(error))  # every rank runs this schedule, compiled or not
        return self._compiled(option, problem, here)

    def _compiled(self, option: Option, problem: Problem, here: Device) -> tuple[Call, str]:
        assert option.schedule is not None
        try:
            found = find_compiled(problem, option.schedule, here, option.folder)
            if found is None:
                if why := self.why_not_compiled(here):
                    raise Unavailable(f"{option.because}, and cannot be compiled: {why}" if option.because else why)
                self._say_that_it_compiles(problem, option)
                built_for = option.compiled_for or problem
                found = compile_and_store(built_for, option.schedule, here, option.folder, torch.__version__)
            call = LoadedKernel(found.path, problem)
        except Unavailable:
            raise
        except Exception as error:  # whatever a compiler does must not end a training run; the report tells
            raise Unavailable(_reason(error)) from error
        if found.why_not_stored:
            self.say("not kept", f"compiled kernels serve this process alone: {found.why_not_stored}")
        because = f", as {option.because}" if option.because else ""
        return call, f"; compiled {'earlier' if found.cached else 'by this process'}{because}"

    def _how_without_compiling(self, option: Option, problem: Problem, here: Device) -> str:
        if (
            option.code is None
            and option.schedule is not None
            and self.why_not_compiled(here) is None
            and find_compiled(problem, option.schedule, here, option.folder) is None
        ):
            return "; compiled when it is first used" + (f", as {option.because}" if option.because else "")
        return self._call(option, problem, here, _never)[1]

    def why_not_compiled(self, here: Device) -> str | None:
        """Why no schedule can be compiled here, or None."""
        if not self.compiles:
            return "rank 0 has no compiler, so that no rank compiles"
        return compiler.why_no_compiler(here.target)

    def _say_that_it_compiles(self, problem: Problem, option: Option) -> None:
        """Compiling takes seconds: say why before it begins."""
        if option.runs == "default":
            self._say_untuned(problem, "compiling default schedules, some seconds each, once")
        elif option.runs == "shipped":
            text = f"no tuned kernel for {problem.describe()}: compiling shipped schedules, some seconds each, once"
            self.say("compile shipped", text)
        else:
            text = f"compiling stored schedules, some seconds each, once: {problem.describe()}, as {option.because}"
            self.say("compile stored", text)

    def _say_what_is_skipped_or_slow(self, problem: Problem, option: Option, skipped: Sequence[str], why: str) -> None:
        """Say once of each reason that a stored kernel does not serve, of each kind of fallback that it runs, and what
        to do."""
        if option.runs == "reference" and option.why != ASKED_FOR:
            remedy = "" if self.without_code or option.why == why else f". {self.remedy(problem)}"
            self.say(why, f"{problem.describe()} runs the slow torch reference: {why}{remedy}")
            return
        for reason in skipped:
            self.say(reason, f"{problem.describe()}: a stored kernel is skipped: {reason}")
        if option.sibling:
            self.say("sibling", f"{problem.describe()} runs a kernel {option.why}. {self.remedy(problem)}")
        if option.runs == "default" and self.tuned is not None:
            self._say_untuned(problem, "it runs the default schedule")

    def _say_untuned(self, problem: Problem, what: str) -> None:
        remedy = "" if self.tuned is None else f". {self.remedy(problem)}"
        self.say("default", f"no tuned kernel for {problem.describe()}: {what}{remedy}")

    def remedy(self, problem: Problem) -> str:
        """The command that makes a tuned kernel for a problem."""
        if kernel_spec(problem.op, problem.direction).canonical(problem).rounds != PAPER_ROUNDS:
            return f"The tuner knows {PAPER_ROUNDS} Sinkhorn rounds only"
        command = (
            f"mhc-tune tune --streams {problem.streams} --width {problem.width} --tokens {problem.tokens} "
            f"--dtype {problem.dtype}"
        )
        if self.path is not None and self.path.is_dir() and self.path != default_folder():
            command += f" --cache {shlex.quote(str(self.path))}"
        export = ", and export it again" if self.path is not None and not self.path.is_dir() else ""
        return f"For a faster one: {command}{export}"

    def say(self, topic: str, text: str) -> None:
        """Log the first warning on a topic."""
        if topic not in self._said:
            self._said.add(topic)
            log.warning(text)


def _fingerprint(device: torch.device) -> Device:
    """What tensors on a torch device run on; for one that has no kernels, this machine's CPU."""
    return detect_device("cuda", device.index or 0) if device.type == "cuda" else detect_device("cpu")


def _never(*_: Any) -> tuple[torch.Tensor, ...]:
    raise AssertionError("an explanation runs nothing")


def reference(problem: Problem, device: torch.device, why: str) -> Resolved:
    """The torch reference, and why it runs."""
    return Resolved(partial(_run_reference, problem), problem, str(device), "reference", why)


def _run_reference(problem: Problem, *inputs: Any) -> tuple[torch.Tensor, ...]:
    """The reference with what the compiled kernels have: full precision under autocast, contiguous results."""
    with torch.autocast(inputs[0].device.type, enabled=False):
        return tuple(result.contiguous() for result in run_reference(problem, *inputs))


def _why(option: Option, how: str, passed: Sequence[str]) -> str:
    """One sentence on what runs and, of what was passed over, the nearest; for the reference also the last."""
    if option.runs == "reference" and passed:
        return passed[0] if passed[-1] in passed[0] else f"{passed[0]}; {passed[-1]}"
    skipped = f"; a nearer one is skipped: {passed[0]}" if passed else ""
    return option.why + how + skipped


def _reason(error: Exception) -> str:
    text = first_line(error)
    return text if isinstance(error, CacheCorrupt | LoadError) else f"{type(error).__name__}: {text}"
