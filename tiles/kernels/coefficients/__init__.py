"""The family coefficients: the gates pre and post and the doubly stochastic res, and Sinkhorn alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tiles.kernels.coefficients import reference, schedule, signature, traffic
from tiles.kernels.spec import WIDTH_MULTIPLE, Direction, KernelFamily, KernelSpec, Problem
from tiles.kernels.tolerance import token_sum


def _coefficients_problem(problem: Problem) -> Problem:
    """Coefficients are float32 whatever the streams' dtype."""
    return replace(problem, dtype="float32")


def _sinkhorn_problem(problem: Problem) -> Problem:
    """Sinkhorn alone knows no width either."""
    return replace(problem, dtype="float32", width=WIDTH_MULTIPLE)


def _tolerance(problem: Problem, name: str) -> tuple[float, float]:
    """Values of order one through tens of rounded steps; ds carries the 1/K of the mean."""
    if name in ("dalpha", "dbias"):
        return token_sum(problem.tokens * problem.streams)
    return (1e-4, 1e-3 / problem.fan_in) if name == "ds" else (1e-4, 1e-5)


def _spec(op: str, direction: Direction, builder: str, computes: Any) -> KernelSpec:
    whole = op == "coefficients"
    return KernelSpec(
        op=op,
        direction=direction,
        schedules=(schedule.CoefficientsSchedule,),
        default=schedule.default,
        space=schedule.space,
        why_invalid=schedule.why_invalid,
        scratch=schedule.scratch,
        arguments=signature.arguments if whole else signature.sinkhorn_arguments,
        builder=f"tiles.kernels.coefficients.programs:{builder}",
        reference=computes,
        inputs=reference.inputs if whole else reference.sinkhorn_inputs,
        traffic=traffic.coefficients if whole else traffic.sinkhorn,
        tolerance=_tolerance,
        canonical=_coefficients_problem if whole else _sinkhorn_problem,
    )


FAMILY = KernelFamily(
    "coefficients",
    (
        _spec("coefficients", "forward", "forward", reference.forward),
        _spec("coefficients", "backward", "backward", reference.backward),
        _spec("sinkhorn", "forward", "sinkhorn_forward", reference.sinkhorn_forward),
        _spec("sinkhorn", "backward", "sinkhorn_backward", reference.sinkhorn_backward),
    ),
)
