"""The programs for tensor cores and the chains of CUDA kernels, run on this CPU against the float64 reference.

What these tests cannot see is how threads share the work: tests/test_on_gpu.py does.
"""

from __future__ import annotations

import pytest
import torch
from simulated import Simulated

from tiles.kernels.fused.chain_schedule import ChainSchedule
from tiles.kernels.project.matmul_schedule import TiledSchedule
from tiles.kernels.spec import Problem

TOKENS = (0, 1, 16, 37)
SHAPES = ((1, 8, "float32"), (2, 64, "bfloat16"), (3, 72, "float16"), (4, 40, "bfloat16"), (8, 16, "float32"))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_project_forward(tmp_path, shape, splits):
    width = 16 if shape[0] * shape[1] < 96 else 32  # splits may not be more than the blocks of columns
    splits = min(splits, -(-shape[0] * shape[1] // width))
    kernel = Simulated(tmp_path, Problem("project", "forward", *shape), TiledSchedule(16, width, 2, splits, 1, 32))
    for tokens in TOKENS:
        kernel.check(tokens, seed=tokens)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_project_backward(tmp_path, shape):
    kernel = Simulated(tmp_path, Problem("project", "backward", *shape), TiledSchedule(16, 32, 1, 2, 1, 32))
    for tokens in TOKENS:
        for splits in (1, 3):
            kernel.check(tokens, seed=tokens, splits=splits)


@pytest.mark.parametrize("shape", [(3, 72, "bfloat16"), (2, 40, "float32")], ids=str)
@pytest.mark.parametrize(("op", "blocks"), [("pre", 0), ("pre", 7), ("step", 0), ("step", 7)])
def test_chains_forward(tmp_path, op, shape, blocks):
    kernel = Simulated(
        tmp_path, Problem(op, "forward", *shape), ChainSchedule(16, 32, 2, 2, 1, 32, 8, 8, 32, blocks, 0)
    )
    for tokens in TOKENS:
        kernel.check(tokens, seed=tokens)


@pytest.mark.parametrize("shape", [(3, 72, "bfloat16"), (2, 40, "float32")], ids=str)
@pytest.mark.parametrize(("op", "blocks"), [("pre", 7), ("step", 0), ("step", 7)])
def test_chains_backward(tmp_path, op, shape, blocks):
    kernel = Simulated(
        tmp_path, Problem(op, "backward", *shape), ChainSchedule(16, 32, 1, 2, 1, 32, 8, 8, 32, blocks, 0)
    )
    for tokens in TOKENS[1:]:
        for splits in (1, 3):
            kernel.check(tokens, seed=tokens, splits=splits)


MERGED = ((1, 8, "bfloat16"), (2, 40, "float32"), (3, 72, "float16"), (4, 40, "bfloat16"), (8, 24, "bfloat16"))


def merged(shape, stages: int, splits: int, halved: int = 0) -> ChainSchedule:
    width = 16 * shape[0]
    return ChainSchedule(16, width, stages, splits, 1, 32, 8, 8, 32, 0, 0, merged=1, halved=halved)


@pytest.mark.parametrize("halved", [0, 1])
@pytest.mark.parametrize("shape", MERGED, ids=str)
def test_a_step_that_merges_inside_of_tiles(tmp_path, shape, halved):
    splits = min(2, -(-shape[1] // 16))
    kernel = Simulated(tmp_path, Problem("step", "forward", *shape), merged(shape, 2, splits, halved))
    for tokens in TOKENS:
        kernel.check(tokens, seed=tokens)


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("shape", MERGED, ids=str)
def test_the_backward_of_a_step_that_merges_inside_of_tiles(tmp_path, shape, stages):
    kernel = Simulated(tmp_path, Problem("step", "backward", *shape), merged(shape, stages, 2))
    for tokens in TOKENS[1:]:
        for splits in (1, 3):
            kernel.check(tokens, seed=tokens, splits=splits)


def test_sums_over_splits_do_not_depend_on_the_other_tokens(tmp_path):
    """Split sums are added in order: a token's result is the same bits alone and among others."""
    problem = Problem("project", "forward", 4, 64, "bfloat16")
    kernel = Simulated(tmp_path, problem, TiledSchedule(16, 32, 2, 4, 1, 32))
    inputs = kernel.spec.inputs(problem, 21, 0)
    many = kernel.run(inputs, 21)
    alone = kernel.run({"x": inputs["x"][17:18].clone(), "phi": inputs["phi"]}, 1)
    for name in ("z", "s"):
        assert torch.equal(many[name][17:18], alone[name])


def test_one_part_of_phi_would_not_be_enough(tmp_path, monkeypatch):
    """The tolerance that the tests hold the two parts to is one that a single part fails."""
    monkeypatch.setattr("tiles.kernels.project.matmul_programs.part", _first_part_only)
    kernel = Simulated(tmp_path, Problem("project", "forward", 4, 64, "bfloat16"), TiledSchedule(16, 32, 2, 1, 1, 32))
    with pytest.raises(AssertionError, match="z:"):
        kernel.check(37, seed=0)


def _first_part_only(dialect, value, which):
    return dialect.store(value if which == 0 else value * 0, "bfloat16")
