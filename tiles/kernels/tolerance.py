"""Tolerances: how far a kernel may be from the float64 reference, as (rtol, atol), and why."""

from __future__ import annotations

HALF_ULP = {"float32": 2.0**-24, "bfloat16": 2.0**-9, "float16": 2.0**-11}
"""Largest relative error of rounding to nearest."""


def stored(dtype: str) -> tuple[float, float]:
    """A value computed in float32 from a few dozen terms of order one and rounded once to `dtype`.

    Twice half an ulp allows for a float32 result that lies across a rounding boundary; atol covers cancellation
    among the float32 terms.
    """
    return 2 * HALF_ULP[dtype] + 1e-6, 1e-5


def float32_sum(terms: int) -> tuple[float, float]:
    """A float32 sum of `terms` products of order one: rounding errors walk at random; the margin is 32."""
    return 1e-5, 32 * HALF_ULP["float32"] * max(1, terms) ** 0.5


def token_sum(tokens: int) -> tuple[float, float]:
    """A float32 sum over tokens, added one after another: the partial sum grows like sqrt(t) and so do the errors."""
    return 1e-4, 8 * HALF_ULP["float32"] * max(64, tokens)


def in_parts(tolerance: tuple[float, float], size: float) -> tuple[float, float]:
    """For a sum of variance `size` whose factors are split into two bfloat16 parts (`tiles.lang.tensor_cores`): each
    factor is off by at most 2**-18 of itself, at random; the margin is 16."""
    rtol, atol = tolerance
    return rtol, max(atol, 16 * 2.0**-18 * size**0.5)
