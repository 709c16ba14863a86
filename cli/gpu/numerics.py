"""Numerics: the error of every result against a float64 reference, and whether results repeat bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from autotune.measuring.verify import WrongResult
from cli.bench import our_kernels
from cli.bench.cases import BenchCase, make_case
from cli.bench.implementation import Implementation
from tiles.errors import BadInput
from tiles.target import Device

RESULT_LIMITS = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-3}
"""Largest relative error (Frobenius norm) of a result by its dtype: streams round to theirs, coefficients do not."""

GRADIENT_LIMIT = 1e-2
"""The same for every gradient: float32 ones too depend on streams and gradients that were rounded to half precision."""

SEED = 0


def check_op(
    impl: str, op: str, streams: int, width: int, tokens: int, dtype: str, device: Device, folder: Path
) -> dict[str, Any]:
    """Errors of one of `our_kernels.KERNELS` on an op (see `errors_of`), or why it is `skipped`, such as before tuning.

    Raises `WrongResult` for errors beyond rounding.
    """
    case = make_case(op, streams, width, tokens, dtype, SEED, torch.device(device.kind))
    skipped: list[str] = []
    try:
        made = list(our_kernels.implementations(impl, case, ("forward", "both"), folder, skipped))
    except BadInput as error:
        return {"skipped": [f"{impl} {case.describe()}: {error}"]}
    if made:
        return errors_of(made[0], case)
    if any("wrong, relative error" in line for line in skipped):
        raise WrongResult(skipped[0])
    return {"skipped": skipped}


def errors_of(implementation: Implementation, case: BenchCase) -> dict[str, Any]:
    """Relative `errors` by result and gradient (None if not finite), whether all are `within` their limits, and whether
    a second run `repeats` the first bit for bit."""
    first, second = implementation.results(case), implementation.results(case)
    names = [*result_names(case), *(f"d{name}" for name in case.names)]
    errors: dict[str, float | None] = {}
    within = True
    for name, got, expected in zip(names, first, case.expected, strict=True):
        error = float((got.double() - expected).norm() / expected.double().norm().clamp_min(1e-30))
        errors[name] = error if math.isfinite(error) else None
        within = within and error <= (
            RESULT_LIMITS[got.dtype] if len(errors) <= len(case.grad_outputs) else GRADIENT_LIMIT
        )
    repeats = all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    return {"errors": errors, "within": within, "repeats": repeats}


def result_names(case: BenchCase) -> list[str]:
    """Names of a case's results, as in `mhc.functional`."""
    known = {
        "project": ["z", "s"],
        "coefficients": ["pre", "post", "res"],
        "aggregate": ["u"],
        "pre": ["u", "post", "res"],
        "pre_norm": ["u", "post", "res"],
        "step": ["x", "u", "post", "res"],
        "single_pass": ["x", "u", "pre", "post", "res"],
    }
    return known.get(case.op, ["x"])
