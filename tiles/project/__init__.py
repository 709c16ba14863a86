"""The family project: z = x̄·phiᵀ and s = Σ x̄², one read of the streams."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tiles.family import PAPER_ROUNDS, Direction, KernelFamily, KernelSpec, Problem
from tiles.project import reference, schedule, signature, traffic
from tiles.tolerance import float32_sum, stored, token_sum


def _canonical(problem: Problem) -> Problem:
    return replace(problem, rounds=PAPER_ROUNDS)


def _tolerance(problem: Problem, name: str) -> tuple[float, float]:
    if name == "dx":
        return stored(problem.dtype)
    return token_sum(problem.tokens) if name == "dphi" else float32_sum(problem.fan_in)


def _spec(direction: Direction, kind: type, computes: Any) -> KernelSpec:
    return KernelSpec(
        op="project",
        direction=direction,
        schedule=kind,
        default=schedule.default,
        space=schedule.space,
        why_invalid=schedule.why_invalid,
        scratch=schedule.scratch,
        arguments=signature.arguments,
        builder=f"tiles.project.programs:{direction}",
        reference=computes,
        inputs=reference.inputs,
        traffic=traffic.project,
        tolerance=_tolerance,
        canonical=_canonical,
    )


FAMILY = KernelFamily(
    "project",
    (
        _spec("forward", schedule.ForwardSchedule, reference.forward),
        _spec("backward", schedule.BackwardSchedule, reference.backward),
    ),
)
