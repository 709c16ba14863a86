"""The family fused: pre (project, coefficients, aggregate in one pass over x) and step (merge, then the next pre)."""

from __future__ import annotations

from typing import Any

from tiles.kernels.fused import reference, schedule, separate, signature, traffic
from tiles.kernels.fused.chain_schedule import ChainSchedule
from tiles.kernels.spec import Direction, KernelFamily, KernelSpec, Problem, Separate
from tiles.kernels.tolerance import HALF_ULP, float32_sum, in_parts, stored, token_sum


def _same(problem: Problem) -> Problem:
    return problem


def _tolerance(problem: Problem, name: str) -> tuple[float, float]:
    """That of the op that ends in this result. A step's backward rounds x' and g to the streams' dtype on its way, as
    happens between separate kernels: the float64 reference does not, so every element may be off by half an ulp, and
    what sums over elements by a random walk of them."""
    if name in ("dx", "df", "x_next", "u"):
        rtol, atol = stored(problem.dtype)
    elif name in ("dphi", "dalpha", "dbias"):
        rtol, atol = token_sum(problem.tokens * problem.streams)
    elif name in ("z", "s", "dpost", "dres"):
        rtol, atol = float32_sum(problem.fan_in)
    else:
        rtol, atol = 1e-4, 1e-5  # gates and res, as in coefficients
    if name in ("dx", "z", "dphi"):
        size = {"dx": problem.outputs / problem.fan_in, "z": 1, "dphi": max(64, problem.tokens)}[name]
        rtol, atol = in_parts((rtol, atol), size)
    if problem.op == "pre":
        return rtol, atol + (1e-5 if name == "u" else 0)
    half = HALF_ULP[problem.dtype]
    return rtol + 4 * half, atol + 8 * half * _terms(problem, name) ** 0.5


def _terms(problem: Problem, name: str) -> int:
    """How many errors of order half an ulp meet in a result of step."""
    if name == "s":
        return problem.fan_in
    if name in ("dpost", "dres"):
        return problem.width
    if name in ("dphi", "dalpha", "dbias"):
        return max(64, problem.tokens) * problem.width
    return 1 if name == "z" else 8 * problem.streams  # the rows of phi have norm one


BEFORE: tuple[tuple[str, Direction], ...] = (
    ("project", "forward"),
    ("coefficients", "forward"),
    ("aggregate", "forward"),
)
AFTER: tuple[tuple[str, Direction], ...] = (
    ("coefficients", "forward"),
    ("aggregate", "backward"),
    ("coefficients", "backward"),
    ("project", "backward"),
)
MERGE: tuple[tuple[str, Direction], ...] = (("merge", "forward"), ("merge", "backward"))


def _spec(op: str, direction: Direction, arguments: Any, inputs: Any, moved: Any, parts: Any) -> KernelSpec:
    function = f"{op}_{direction}"
    return KernelSpec(
        op=op,
        direction=direction,
        schedules=(schedule.FusedSchedule, ChainSchedule),
        default=schedule.default,
        space=schedule.space,
        why_invalid=schedule.why_invalid,
        scratch=schedule.scratch,
        arguments=arguments,
        builder=f"tiles.kernels.fused.programs:{function}",
        reference=getattr(reference, function),
        inputs=inputs,
        traffic=moved,
        tolerance=_tolerance,
        canonical=_same,
        separate=Separate(getattr(separate, function), parts),
    )


FAMILY = KernelFamily(
    "fused",
    (
        _spec("pre", "forward", signature.pre, reference.pre_inputs, traffic.pre, BEFORE),
        _spec("pre", "backward", signature.pre, reference.pre_inputs, traffic.pre, AFTER),
        _spec("step", "forward", signature.step, reference.step_inputs, traffic.step, (MERGE[0], *BEFORE)),
        _spec("step", "backward", signature.step, reference.step_inputs, traffic.step, (*MERGE, *AFTER)),
    ),
    parts=("project", "coefficients", "apply"),
)
