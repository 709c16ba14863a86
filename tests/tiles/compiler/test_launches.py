"""How many launches a boundary takes on CUDA at the token counts of decoding, by the plans of the default schedules."""

from __future__ import annotations

import pytest

from tiles.compiler.compile import planned
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import PAPER_ROUNDS, Problem
from tiles.target import Target

HOPPER = Target("cuda", "sm_90a")

LAUNCHES = {
    "pre": 2,  # project, the coefficients and aggregate in one
    "merge": 1,
    "step": 2,  # merge and project in one, the coefficients and aggregate in one
    "single_pass": 2,  # merge, aggregate and project in one, the coefficients
}
"""What docs/serving.md says."""


def launches(op: str, tokens: int, streams: int = 4, rounds: int = PAPER_ROUNDS) -> int:
    spec, problem = kernel_spec(op, "forward"), Problem(op, "forward", streams, 64, "bfloat16", tokens, rounds)
    plan = planned(spec, problem, spec.default(problem, HOPPER), HOPPER)[1]
    assert plan.chunk_tokens == 0, "one chunk holds all tokens"
    assert not plan.splits, "no launch sums over splits of the tokens"
    return len(plan.launches)


FAST = ("merge",)
OPS = [op if op in FAST else pytest.param(op, marks=pytest.mark.slow) for op in LAUNCHES]


@pytest.mark.parametrize("op", OPS)
def test_launches_of_one_token(op: str) -> None:
    """Of two streams and one Sinkhorn round, which are lowered sooner."""
    assert launches(op, 1, streams=2, rounds=1) == LAUNCHES[op]


@pytest.mark.slow
def test_launches_of_64_tokens_and_of_more_at_four_streams() -> None:
    assert launches("step", 64) == LAUNCHES["step"]
    assert launches("step", 65) == LAUNCHES["step"] + 1
