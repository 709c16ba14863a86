"""The family single_pass: a boundary between sublayers of single-pass mHC in one pass over the streams (DeepSeek-V4.1).

A sublayer is fed through the pre of the maps that its predecessor was merged with, so merge, aggregate and project of
the new streams need nothing that is not known before the streams are read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tiles.kernels.fused.chain_schedule import ChainSchedule
from tiles.kernels.fused.tolerance import of_fused
from tiles.kernels.single_pass import reference, schedule, separate, signature, traffic
from tiles.kernels.spec import Direction, KernelFamily, KernelSpec, Problem, Separate


def _same(problem: Problem) -> Problem:
    return problem


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
        tolerance=of_fused,
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
