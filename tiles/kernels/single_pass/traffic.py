"""The least that single_pass moves and computes (docs/design.md, "Bytes a token"): each tensor once."""

from __future__ import annotations

from tiles.kernels.fused import traffic as fused
from tiles.kernels.single_pass import signature
from tiles.kernels.spec import Problem, Traffic


def single_pass(problem: Problem, tokens: int) -> Traffic:
    """In the streams' elements a token: forward (2n + 2)C, backward (3n + 3)C; it computes what step does."""
    return fused.each_once(signature.single_pass(problem), tokens, fused.step_flops(problem, tokens))
