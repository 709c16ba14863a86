"""The family project: z = x̄·phiᵀ and s = Σ x̄², one read of the streams."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tiles.kernels.project import reference, schedule, signature, traffic
from tiles.kernels.project.tensor_core_schedule import TiledSchedule
from tiles.kernels.spec import PAPER_ROUNDS, Direction, KernelFamily, KernelSpec, Problem
from tiles.kernels.tolerance import float32_sum, in_parts, stored, token_sum


def _canonical(problem: Problem) -> Problem:
    return replace(problem, rounds=PAPER_ROUNDS)


def _tolerance(problem: Problem, name: str) -> tuple[float, float]:
    if name == "dx":
        return in_parts(stored(problem.dtype), problem.outputs / problem.fan_in)
    if name == "dphi":
        return in_parts(token_sum(problem.tokens), max(64, problem.tokens))
    return in_parts(float32_sum(problem.fan_in), 1) if name == "z" else float32_sum(problem.fan_in)


def _spec(direction: Direction, kinds: tuple[type, ...], computes: Any) -> KernelSpec:
    return KernelSpec(
        op="project",
        direction=direction,
        schedules=kinds,
        default=schedule.default,
        space=schedule.space,
        why_invalid=schedule.why_invalid,
        scratch=schedule.scratch,
        arguments=signature.arguments,
        builder=f"tiles.kernels.project.programs:{direction}",
        reference=computes,
        inputs=reference.inputs,
        traffic=traffic.project,
        tolerance=_tolerance,
        canonical=_canonical,
    )


FAMILY = KernelFamily(
    "project",
    (
        _spec("forward", (schedule.ForwardSchedule, TiledSchedule), reference.forward),
        _spec("backward", (schedule.BackwardSchedule, TiledSchedule), reference.backward),
    ),
)
