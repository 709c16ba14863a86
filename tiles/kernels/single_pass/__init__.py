"""The family single_pass: a boundary between sublayers of single-pass mHC in one pass over the streams (DeepSeek-V4.1).

A sublayer is fed through the pre of the maps that its predecessor was merged with, so merge, aggregate and project of
the new streams need nothing that is not known before the streams are read.
"""

from __future__ import annotations

from tiles.kernels.fused import DIRECTIONS, ENDINGS, canonical
from tiles.kernels.fused.chain_schedule import ChainSchedule
from tiles.kernels.fused.tolerance import of_fused
from tiles.kernels.single_pass import reference, schedule, separate, signature, traffic
from tiles.kernels.spec import NORM, Direction, KernelFamily, KernelSpec, Separate


def _spec(direction: Direction, others: Separate | None, ending: str = "") -> KernelSpec:
    return KernelSpec(
        op="single_pass" + ending,
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
        canonical=canonical,
        targets=("cpu",) if ending.startswith(NORM) else ("cpu", "cuda"),
        separate=others,
    )


FAMILY = KernelFamily(
    "single_pass",
    (
        _spec("forward", Separate(separate.forward, separate.FORWARD)),
        _spec("backward", Separate(separate.backward, separate.BACKWARD)),
        *(_spec(direction, None, ending) for ending in ENDINGS for direction in DIRECTIONS),
    ),
    parts=("project", "coefficients", "apply", "fused"),
)
