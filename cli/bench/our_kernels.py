"""Our kernels as contenders: tuned and fused, tuned without the fused passes, default and given schedules."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.func import functional_call

from cli.bench.cases import Case
from cli.bench.implementation import Contender, is_right
from cli.bench.torch_composites import BLOCKS, COMPOSED
from cli.bench.torch_ops import Form
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
    "default": (lambda folder: Kernels.defaults(), "default"),
}
"""Each implementation's kernels, from the cache folder, and what its name promises to run. A fused pass may be made of
separate kernels too: where the tuner found those to be faster."""


def contender(
    impl: str, case: Case, directions: Sequence[str], folder: Path, skipped: list[str]
) -> Iterator[Contender]:
    """The case on the kernels of `impl`, unless something else than its name promises would run.

    `separate` differs from `tuned` where there are passes to fuse, and is no contender elsewhere.
    """
    if impl == "separate" and case.op not in COMPOSED:
        return
    make, promised = KERNELS[impl]
    kernels = make(folder)
    made = Contender(impl, form(case, joined=impl != "separate"), "kernels", directions, kernels)
    if not is_right(made, case, skipped):
        return
    rows = kernels.report()
    broken = next((row for row in rows if row.runs not in (promised, "separate")), None)
    if broken:
        skipped.append(
            f"{impl} {case.describe()}: {broken.op} {broken.direction} would run the {broken.runs} ({broken.why}): "
            "mhc-tune tune makes kernels for this shape and version"
        )
    else:
        yield replace(made, chosen="; ".join(sorted({row.why for row in rows})))


@dataclass(frozen=True)
class Override:
    """A schedule for one kernel, under a name for tables; tunables that `values` lacks are the default's."""

    label: str
    op: str
    direction: Direction
    values: Mapping[str, Any]


def override(text: str) -> Override:
    """Read LABEL:OP.DIRECTION=JSON; raises `BadInput` for anything else and for tunables that the kernel lacks."""
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
    return Override(label, op, cast(Direction, direction), found)


def overridden(wanted: Override, case: Case, directions: Sequence[str], skipped: list[str]) -> Iterator[Contender]:
    """The case on default schedules but for one kernel's; `skipped` gets the reason where that does not run."""
    problem = Problem(wanted.op, wanted.direction, case.streams, case.width, case.dtype, case.tokens)
    spec = kernel_spec(wanted.op, wanted.direction)
    target = detect_device("cuda" if case.inputs[0].is_cuda else "cpu").target
    values = asdict(spec.default(problem, target)) | dict(wanted.values)
    if why := spec.why_invalid(problem, spec.schedule_from(values), target):
        skipped.append(f"{wanted.label} {case.describe()}: {why}")
        return
    kernels = Kernels(_Overriding(wanted, values))
    made = Contender(wanted.label, form(case), json.dumps(dict(wanted.values)), directions, kernels)
    if not is_right(made, case, skipped):
        return
    ran = [row for row in kernels.report() if (row.op, row.direction) == (wanted.op, wanted.direction)]
    if ran and all(row.runs == "recompiled" for row in ran):
        yield made
    else:
        why = ran[0].why if ran else f"{case.op} runs no {spec.name} in {' or '.join(directions)}"
        skipped.append(f"{wanted.label} {case.describe()}: {why}")


class _Overriding(Resolver):
    """Default schedules but for one kernel."""

    def __init__(self, wanted: Override, values: Mapping[str, Any]) -> None:
        super().__init__(None, compiles=True)
        self._wanted, self._values = wanted, values

    def candidates(self, problem: Problem, device: torch.device) -> Iterator[KernelCandidate]:
        """The given schedule first for its kernel."""
        if (problem.op, problem.direction) == (self._wanted.op, self._wanted.direction):
            yield KernelCandidate(
                "recompiled",
                f"the schedule {self._wanted.label}",
                schedule=self._values,
                why_recompile="it was asked for",
            )
        yield from super().candidates(problem, device)


def form(case: Case, *, joined: bool = True) -> Form:
    """What training code calls: the functional ops, and for the layer and the stack the modules themselves.

    Not `joined`, one layer ends before the next one begins, which is the best use of separate kernels: made of them,
    step's backward would compute x' twice.
    """
    n, width = case.streams, case.width

    def block() -> HyperConnection:
        return HyperConnection(width, n, nn.Identity())

    if case.op == "layer":
        return _of_parameters(block())
    if case.op == "stack":
        blocks = [block() for _ in range(BLOCKS)]
        return _of_parameters(HyperConnectionStack(blocks) if joined else nn.Sequential(*blocks))
    ops: dict[str, Form] = {
        "project": functional.project,
        "coefficients": lambda *values: functional.coefficients(*values, streams=n, width=width),
        "aggregate": lambda *values: (functional.aggregate(*values),),
        "merge": lambda *values: (functional.merge(*values),),
        "pre": functional.pre,
        "step": functional.step if joined else _merge_then_pre,
    }
    return ops[case.op]


def _merge_then_pre(
    x: torch.Tensor, f: torch.Tensor, post: torch.Tensor, res: torch.Tensor, *parameters: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    x_next = functional.merge(x, f, res, post)
    return (x_next, *functional.pre(x_next, *parameters))


def _of_parameters(module: nn.Module) -> Form:
    """A module as a function of x and its parameters, in the order in which it holds them."""
    names = [name for name, _ in module.named_parameters()]

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (functional_call(module, dict(zip(names, parameters, strict=True)), (x,)),)

    return run
