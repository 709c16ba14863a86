"""The family single_pass: a boundary between sublayers of single-pass mHC in one pass over the streams (DeepSeek-V4.1).

A sublayer is fed through the pre of the maps that its predecessor was merged with, so merge, aggregate and project of
the new streams need nothing that is not known before the streams are read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tiles.kernels.fused.chain_schedule import ChainSchedule
from tiles.kernels.single_pass import reference, schedule, separate, signature, traffic
from tiles.kernels.spec import Direction, KernelFamily, KernelSpec, Problem, Separate
from tiles.kernels.tolerance import HALF_ULP, float32_sum, in_parts, stored, token_sum


def _same(problem: Problem) -> Problem:
    return problem


def _tolerance(problem: Problem, name: str) -> tuple[float, float]:
    """That of the op that ends in this result. x' is rounded to the streams' dtype, as between separate kernels, and so
    may g be: the float64 reference does not round, so every element may be off by half an ulp, and what sums over
    elements by a random walk of them."""
    if name in ("dx", "df", "x_next", "u"):
        rtol, atol = stored(problem.dtype)
    elif name in ("dphi", "dalpha", "dbias"):
        rtol, atol = token_sum(problem.tokens * problem.streams)
    elif name in ("z", "s", "dpre", "dpost", "dres"):
        rtol, atol = float32_sum(problem.fan_in)
    else:
        rtol, atol = 1e-4, 1e-5  # gates and res, as in coefficients
    if name in ("dx", "z", "dphi"):
        size = {"dx": problem.outputs / problem.fan_in, "z": 1, "dphi": max(64, problem.tokens)}[name]
        rtol, atol = in_parts((rtol, atol), size)
    half = HALF_ULP[problem.dtype]
    return rtol + 4 * half, atol + 8 * half * _terms(problem, name) ** 0.5


def _terms(problem: Problem, name: str) -> int:
    """How many errors of order half an ulp meet in a result."""
    if name == "s":
        return problem.fan_in
    if name in ("dpre", "dpost", "dres"):
        return problem.width
    if name in ("dphi", "dalpha", "dbias"):
        return max(64, problem.tokens) * problem.width
    return 1 if name == "z" else 8 * problem.streams  # the rows of phi have norm one


def _spec(direction: Direction, call: Callable[..., Any], parts: tuple[tuple[str, Direction], ...]) -> KernelSpec:
    return KernelSpec(
        op="single_pass",
        direction=direction,
        schedules=(schedule.SinglePassSchedule, ChainSchedule),
        default=schedule.default,
        space=schedule.space,
        why_invalid=schedule.why_invalid,
        scratch=schedule.scratch,
        arguments=signature.single_pass,
        builder=f"tiles.kernels.single_pass.programs:{direction}",
        reference=getattr(reference, direction),
        inputs=reference.inputs,
        traffic=traffic.single_pass,
        tolerance=_tolerance,
        canonical=_same,
        separate=Separate(call, parts),
    )


FAMILY = KernelFamily(
    "single_pass",
    (
        _spec("forward", separate.forward, separate.FORWARD),
        _spec("backward", separate.backward, separate.BACKWARD),
    ),
    parts=("project", "coefficients", "apply", "fused"),
)
