"""The family apply: aggregate (streams -> the sublayer's input) and merge (streams and its output -> new streams)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tiles.kernels.apply import reference, schedule, signature, traffic
from tiles.kernels.spec import IDENTITY, PAPER_ROUNDS, Direction, KernelFamily, KernelSpec, Problem
from tiles.kernels.tolerance import float32_sum, stored


def _canonical(problem: Problem) -> Problem:
    return replace(problem, rounds=PAPER_ROUNDS)


def _tolerance(problem: Problem, name: str) -> tuple[float, float]:
    if name in ("dpre", "dres", "dpost"):
        return float32_sum(problem.width)
    return stored(problem.dtype)


def _aggregate(direction: Direction, computes: Any) -> KernelSpec:
    return _spec(
        "aggregate", direction, computes, signature.aggregate_arguments, reference.aggregate_inputs, traffic.aggregate
    )


def _merge(op: str, direction: Direction, computes: Any) -> KernelSpec:
    return _spec(op, direction, computes, signature.merge_arguments, reference.merge_inputs, traffic.merge)


def _spec(op: str, direction: Direction, computes: Any, arguments: Any, inputs: Any, moved: Any) -> KernelSpec:
    base_op = op.removesuffix(IDENTITY)
    return KernelSpec(
        op=op,
        direction=direction,
        schedules=(schedule.ApplySchedule,),
        default=schedule.default,
        space=schedule.space,
        why_invalid=schedule.why_invalid,
        scratch=schedule.scratch,
        arguments=arguments,
        builder=f"tiles.kernels.apply.{base_op}:{base_op}_{direction}",
        reference=computes,
        inputs=inputs,
        traffic=moved,
        tolerance=_tolerance,
        canonical=_canonical,
    )


FAMILY = KernelFamily(
    "apply",
    (
        _aggregate("forward", reference.aggregate_forward),
        _aggregate("backward", reference.aggregate_backward),
        _merge("merge", "forward", reference.merge_forward),
        _merge("merge", "backward", reference.merge_backward),
        _merge("merge" + IDENTITY, "forward", reference.merge_forward),
        _merge("merge" + IDENTITY, "backward", reference.merge_backward),
    ),
)
