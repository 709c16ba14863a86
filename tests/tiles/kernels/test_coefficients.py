"""How coefficients share their tokens on CUDA."""

from __future__ import annotations

import pytest

from tiles.compiler.compile import planned
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.target import Target


@pytest.mark.parametrize("n", [2, 4])
def test_each_thread_block_of_the_backward_has_one_block_of_tokens(n):
    """Of 4096 tokens; the rounds of the next would wait for those of the one before."""
    spec, target = kernel_spec("coefficients", "backward"), Target("cuda", "sm_90a")
    problem = Problem("coefficients", "backward", n, 64, tokens=4096)
    schedule = spec.default(problem, target)
    _, plan = planned(spec, spec.canonical(problem), schedule, target)
    assert plan.split_tokens == schedule.block_tokens
    assert plan.most_splits >= problem.tokens // schedule.block_tokens
