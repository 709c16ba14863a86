"""Our kernels as contenders: tuned and fused, tuned without the fused passes, and default schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call

from cli.baselines import Form
from cli.cases import Case
from cli.compositions import BLOCKS, COMPOSED
from cli.contenders import Contender, is_right
from mhc import HyperConnection, HyperConnectionStack, functional
from mhc.kernels import Kernels
from mhc.report import Runs

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
