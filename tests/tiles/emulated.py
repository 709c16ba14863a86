"""Generated CUDA texts that run on the emulator (`emulation`), thread by thread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from against_reference import check_against_reference
from emulation import WAYS, Emulation, Movement, Way

from tiles.compiler.compile import planned
from tiles.compiler.cuda_launcher import Plan
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.target import Target


@dataclass(frozen=True)
class Text:
    """A generated text, without a launcher, and how it is launched. `overlapping`: see `Emulation`."""

    problem: Problem
    source: str
    plan: Plan
    overlapping: tuple[str, ...] = ()


def generate(problem: Problem, schedule: Any, target: Target, **plan: int) -> Text:
    """The text of a kernel for `target`; `plan` replaces fields of its launch plan, such as `split_tokens`."""
    spec = kernel_spec(problem.op, problem.direction)
    problem = spec.canonical(problem)
    source, made = planned(spec, problem, schedule, target)
    return Text(problem, source, replace(made, **plan), _overlapping(problem, schedule))


def _overlapping(problem: Problem, schedule: Any) -> tuple[str, ...]:
    """A tile of a fused backward that reaches past its stream carries columns of the next one along, where another
    thread block writes (`tensor_core_programs.gradients`)."""
    chained = problem.base_op in ("pre", "step", "single_pass") and problem.direction == "backward"
    return ("dx", "x_next_workspace") if chained and problem.width % schedule.block_width else ()


class Emulated:
    """A kernel's text that runs here."""

    def __init__(self, folder: Path, emulator: Path, text: Text) -> None:
        self.spec = kernel_spec(text.problem.op, text.problem.direction)
        self.text, self.problem = text, text.problem
        arguments = self.spec.arguments(self.problem)
        self._emulation = Emulation(folder, emulator, text.source, text.plan, arguments, text.overlapping)

    def run(
        self, inputs: dict[str, Any], tokens: int, way: Way = WAYS[0], *, past: Mapping[str, int] | None = None
    ) -> dict[str, torch.Tensor]:
        """All results; raises `Found`. The tensors in `past` begin so many bytes past where vectors fit."""
        return self._emulation.run(inputs, tokens, way, past=past)

    def movements(self, tokens: int) -> list[Movement]:
        """What a run on drawn inputs moves; raises `Found`."""
        return self._emulation.movements(self.spec.inputs(self.problem, tokens, 0), tokens)

    def check(self, tokens: int, seed: int, ways: tuple[Way, ...] = WAYS) -> None:
        """Runs against the float64 reference, within the kernel's own tolerance."""
        for way in ways:
            check_against_reference(
                self.spec, self.problem, tokens, seed, lambda inputs, way=way: self.run(inputs, tokens, way)
            )
