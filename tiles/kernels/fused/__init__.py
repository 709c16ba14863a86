"""The family fused: pre (project, coefficients, aggregate in one pass over x) and step (merge, then the next pre).

Where res is the identity, they are fused always: no ops are there to do it one after the other. So are those with a
norm of the sublayer's input, which are for CPUs (docs/design.md, "The norm of a sublayer's input").
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tiles.kernels.fused import reference, schedule, separate, signature, tolerance, traffic
from tiles.kernels.fused.chain_schedule import ChainSchedule
from tiles.kernels.spec import IDENTITY, NORM, PAPER_ROUNDS, Direction, KernelFamily, KernelSpec, Problem, Separate


def canonical(problem: Problem) -> Problem:
    """The identity takes no Sinkhorn rounds."""
    return problem if problem.mixes else replace(problem, rounds=PAPER_ROUNDS)


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


def _spec(
    op: str, direction: Direction, arguments: Any, inputs: Any, moved: Any, parts: Any, ending: str = ""
) -> KernelSpec:
    function = f"{op}_{direction}"
    return KernelSpec(
        op=op + ending,
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
        tolerance=tolerance.of_fused,
        canonical=canonical,
        targets=("cpu",) if ending.startswith(NORM) else ("cpu", "cuda"),
        separate=Separate(getattr(separate, function), parts) if parts else None,
    )


ENDINGS = (IDENTITY, NORM, NORM + IDENTITY)
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
ALWAYS_FUSED = (
    ("pre", signature.pre, reference.pre_inputs, traffic.pre),
    ("step", signature.step, reference.step_inputs, traffic.step),
)

FAMILY = KernelFamily(
    "fused",
    (
        _spec("pre", "forward", signature.pre, reference.pre_inputs, traffic.pre, BEFORE),
        _spec("pre", "backward", signature.pre, reference.pre_inputs, traffic.pre, AFTER),
        _spec("step", "forward", signature.step, reference.step_inputs, traffic.step, (MERGE[0], *BEFORE)),
        _spec("step", "backward", signature.step, reference.step_inputs, traffic.step, (*MERGE, *AFTER)),
        *(
            _spec(op, direction, arguments, inputs, moved, (), ending)
            for ending in ENDINGS
            for op, arguments, inputs, moved in ALWAYS_FUSED
            for direction in DIRECTIONS
        ),
    ),
    parts=("project", "coefficients", "apply"),
)
