"""The implementations that run our kernels: tuned, tuned without fused kernels or for every token count, default
schedules, and given schedules."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.func import functional_call

from cli.bench.cases import BenchCase
from cli.bench.implementation import Implementation, is_correct
from cli.bench.torch_composites import COMPOSITES, STACK_LAYERS, maps, pre_norm, single_pass, step
from cli.bench.torch_ops import OpFunction
from mhc import HyperConnection, HyperConnectionStack, functional
from mhc.dispatch.candidates import KernelCandidate
from mhc.dispatch.kernel_report import Runs
from mhc.dispatch.kernels import Kernels
from mhc.dispatch.resolve import Resolver
from tiles.errors import BadInput
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Direction, Problem
from tiles.target import detect_device

KERNELS: Mapping[str, tuple[Callable[[Path], Kernels], Runs]] = {
    "tuned": (Kernels.from_path, "tuned"),
    "separate": (lambda folder: Kernels.from_path(folder, fused=False), "tuned"),
    "invariant": (lambda folder: Kernels.from_path(folder, batch_invariant=True), "tuned"),
    "default": (lambda folder: Kernels.defaults(), "default"),
}
"""Implementation -> (its kernels, from the cache folder; what must run under that name). A fused kernel may also run as
separate kernels, where the tuner found those to be faster. `invariant` are those with which a token's bits do not
depend on its batch."""

NORM_OUTSIDE = {("separate", "pre_norm"): "tuned"}
"""What runs another implementation's kernels: of pre with a norm, `separate` is the tuned pre, then torch's norm."""

OF_CACHE = frozenset(impl for impl, (_, runs) in KERNELS.items() if runs == "tuned")
"""Implementations whose kernels the cache folder holds."""


def implementations(
    impl: str, case: BenchCase, directions: Sequence[str], folder: Path, skipped: list[str]
) -> Iterator[Implementation]:
    """The case on the kernels of `impl`, unless something else would run; `skipped` then gets the reason.

    `separate` is left out for ops that have nothing to fuse, where it would equal `tuned`.
    """
    if impl == "separate" and case.op not in COMPOSITES:
        return
    make, required = KERNELS[NORM_OUTSIDE.get((impl, case.op), impl)]
    kernels = make(folder)
    made = Implementation(impl, op_function(case, fused=impl != "separate"), "kernels", directions, kernels)
    if not is_correct(made, case, skipped):
        return
    rows = kernels.report()
    broken = next((row for row in rows if row.runs not in (required, "separate")), None)
    if broken:
        skipped.append(
            f"{impl} {case.describe()}: {broken.op} {broken.direction} would run the {broken.runs} ({broken.why}): "
            "run mhc-tune tune for this shape and version"
        )
    else:
        yield replace(made, variant="; ".join(sorted({row.why for row in rows})))


@dataclass(frozen=True)
class ScheduleOverride:
    """A schedule for one kernel, with a label for tables; tunables that `values` lacks keep their defaults."""

    label: str
    op: str
    direction: Direction
    values: Mapping[str, Any]


def parse_override(text: str) -> ScheduleOverride:
    """Parse LABEL:OP.DIRECTION=JSON; raises `BadInput` for anything else and for tunables that the kernel lacks."""
    name, _, values = text.partition("=")
    label, _, kernel = name.partition(":")
    op, _, direction = kernel.partition(".")
    try:
        found = json.loads(values)
    except ValueError:
        found = None
    if not label or not isinstance(found, dict) or direction not in ("forward", "backward"):
        raise BadInput(
            f'schedule must be LABEL:OP.DIRECTION=JSON, got {text}: such as a:merge.forward={{"threads": 256}}'
        )
    schedules = kernel_spec(op, cast(Direction, direction)).schedules
    known = dict.fromkeys(field.name for schedule in schedules for field in fields(schedule))
    if not set(found) <= set(known):
        raise BadInput(f"{kernel} has the tunables {', '.join(known)}, got {', '.join(found)}: name some of them")
    return ScheduleOverride(label, op, cast(Direction, direction), found)


def with_override(
    override: ScheduleOverride, case: BenchCase, directions: Sequence[str], skipped: list[str]
) -> Iterator[Implementation]:
    """The case on default schedules except for one kernel; `skipped` gets the reason if that does not run."""
    problem = Problem(override.op, override.direction, case.streams, case.width, case.dtype, case.tokens)
    spec = kernel_spec(override.op, override.direction)
    target = detect_device("cuda" if case.inputs[0].is_cuda else "cpu").target
    values = asdict(spec.default(problem, target)) | dict(override.values)
    if why := spec.why_invalid(problem, spec.schedule_from(values), target):
        skipped.append(f"{override.label} {case.describe()}: {why}")
        return
    kernels = Kernels(_OverrideResolver(override, values))
    made = Implementation(override.label, op_function(case), json.dumps(dict(override.values)), directions, kernels)
    if not is_correct(made, case, skipped):
        return
    ran = [row for row in kernels.report() if (row.op, row.direction) == (override.op, override.direction)]
    if ran and all(row.runs == "recompiled" for row in ran):
        yield made
    else:
        why = ran[0].why if ran else f"{case.op} runs no {spec.name} in {' or '.join(directions)}"
        skipped.append(f"{override.label} {case.describe()}: {why}")


class _OverrideResolver(Resolver):
    """Default schedules except for one kernel."""

    def __init__(self, override: ScheduleOverride, values: Mapping[str, Any]) -> None:
        super().__init__(None, compiles=True)
        self._override, self._values = override, values

    def candidates(self, problem: Problem, device: torch.device) -> Iterator[KernelCandidate]:
        """The given schedule comes first for its kernel."""
        if (problem.op, problem.direction) == (self._override.op, self._override.direction):
            yield KernelCandidate(
                "recompiled",
                f"the schedule {self._override.label}",
                schedule=self._values,
                why_recompile="it was asked for",
            )
        yield from super().candidates(problem, device)


def op_function(case: BenchCase, *, fused: bool = True) -> OpFunction:
    """What training code calls: the functional ops, and the modules themselves for layer and stack.

    If not `fused`, each layer ends before the next one begins, which is the best use of separate kernels: step and
    single_pass made of them would compute x' twice in their backward.
    """
    n, width = case.streams, case.width

    def block() -> HyperConnection:
        return HyperConnection(width, n, nn.Identity())

    if case.op == "layer":
        return _functional(block())
    if case.op == "stack":
        blocks = [block() for _ in range(STACK_LAYERS)]
        return _functional(HyperConnectionStack(blocks) if fused else nn.Sequential(*blocks))
    ops: dict[str, OpFunction] = {
        "project": functional.project,
        "coefficients": lambda *values: functional.coefficients(*values, streams=n, width=width),
        "aggregate": lambda *values: (functional.aggregate(*values),),
        "merge": lambda *values: (functional.merge(*values),),
        "pre": functional.pre,
        "pre_norm": lambda *values: functional.pre(*values[:-1], norm_weight=values[-1]),
        "step": functional.step,
        "single_pass": functional.single_pass,
    }
    if fused:
        return ops[case.op]
    aggregate, merge = ops["aggregate"], ops["merge"]
    unfused = {
        "pre_norm": pre_norm(functional.pre),
        "step": step(functional.pre, merge),
        "single_pass": single_pass(maps(ops["project"], ops["coefficients"]), aggregate, merge),
    }
    return (ops | unfused)[case.op]


def _functional(module: nn.Module) -> OpFunction:
    """A module as a function of x and its parameters, in the order of `named_parameters`."""
    names = [name for name, _ in module.named_parameters()]

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (functional_call(module, dict(zip(names, parameters, strict=True)), (x,)),)

    return run
