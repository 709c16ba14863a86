"""How far results are from a float64 reference, one by one, and whether they repeat bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from autotune.measuring.verify import WrongResult
from cli.bench import our_kernels as ours
from cli.bench.cases import Case, make_case
from cli.bench.implementation import Contender
from tiles.errors import BadInput
from tiles.target import Device

LIMITS = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-3}
"""Largest relative error (Frobenius norm) of a result, by its own dtype: streams round to theirs, coefficients are
float32."""

GRADIENT_LIMIT = 1e-2
"""Of every gradient: float32 ones are made of streams and gradients that were rounded to half precision on the way."""

SEED = 0


def of_op(
    impl: str, op: str, streams: int, width: int, tokens: int, dtype: str, device: Device, folder: Path
) -> dict[str, Any]:
    """What one implementation of ours (`ours.KERNELS`) makes of an op, see `judged`; why it is `skipped` where nothing
    is tuned yet. Raises `WrongResult` where it is far off."""
    case = make_case(op, streams, width, tokens, dtype, SEED, torch.device(device.kind))
    skipped: list[str] = []
    try:
        made = list(ours.contender(impl, case, ("forward", "both"), folder, skipped))
    except BadInput as error:
        return {"skipped": [f"{impl} {case.describe()}: {error}"]}
    if made:
        return judged(made[0], case)
    if any("wrong, relative error" in line for line in skipped):
        raise WrongResult(skipped[0])
    return {"skipped": skipped}


def judged(contender: Contender, case: Case) -> dict[str, Any]:
    """Relative `errors` by result and gradient (None where one is not a number), whether all are `within` their limits,
    and whether a second run `repeats` the first bit for bit."""
    first, second = contender.results(case), contender.results(case)
    names = [*result_names(case), *(f"d{name}" for name in case.names)]
    errors: dict[str, float | None] = {}
    within = True
    for name, got, wanted in zip(names, first, case.wanted, strict=True):
        error = float((got.double() - wanted).norm() / wanted.double().norm().clamp_min(1e-30))
        errors[name] = error if math.isfinite(error) else None
        within = within and error <= (LIMITS[got.dtype] if len(errors) <= len(case.upstream) else GRADIENT_LIMIT)
    repeats = all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    return {"errors": errors, "within": within, "repeats": repeats}


def result_names(case: Case) -> list[str]:
    """Names of a case's results, those of the ops in `mhc.functional`."""
    known = {
        "project": ["z", "s"],
        "coefficients": ["pre", "post", "res"],
        "aggregate": ["u"],
        "pre": ["u", "post", "res"],
        "step": ["x", "u", "post", "res"],
    }
    return known.get(case.op, ["x"])
