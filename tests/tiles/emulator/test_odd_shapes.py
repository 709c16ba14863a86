"""Generated CUDA kernels at odd shapes in small tiles: tails, bfloat16 parts, splits, rows in turns, merge inside of
tiles."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from emulated import Emulated, generate

from tiles.kernels.fused.chain_schedule import ChainSchedule
from tiles.kernels.project.tensor_core_schedule import TiledSchedule
from tiles.kernels.spec import Direction, Problem
from tiles.target import Target

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH: the emulator cannot be compiled")

SHAPES = ((1, 8, "float32"), (2, 64, "bfloat16"), (3, 72, "float16"), (4, 40, "bfloat16"), (8, 16, "float32"))
FUSED_SHAPES = ((3, 72, "bfloat16"), (2, 40, "float32"))
MERGED_SHAPES = ((1, 8, "bfloat16"), (2, 40, "float32"), (3, 72, "float16"), (4, 40, "bfloat16"), (8, 24, "bfloat16"))
CUT = {"most_splits": 3, "split_tokens": 8}
"""Makes few tokens many splits."""


def projections() -> list[Any]:
    """(op, direction, shape, schedule, plan)."""
    cases = []
    for n, width, dtype in SHAPES:
        columns = 16 if n * width < 96 else 32  # splits may not be more than the blocks of columns
        splits = min(3, -(-n * width // columns))
        cases.append(("project", "forward", (n, width, dtype), TiledSchedule(16, columns, 2, splits, 1, 32), {}))
        cases.append(("project", "backward", (n, width, dtype), TiledSchedule(16, 32, 1, 2, 1, 32), CUT))
    return cases


def chains() -> list[Any]:
    return [
        (op, direction, shape, ChainSchedule(16, 32, stages, 2, 1, 32, 8, 8, 32, blocks, 0), plan)
        for shape in FUSED_SHAPES
        for op, blocks in (("pre", 0), ("pre", 7), ("step", 0), ("step", 7))
        for direction, stages, plan in (("forward", 2, {}), ("backward", 1, CUT))
    ]


def merged() -> list[Any]:
    def schedule(n: int, stages: int, splits: int, presplit_phi: int) -> ChainSchedule:
        modes = {"merged": 1, "presplit_phi": presplit_phi}
        return ChainSchedule(16, 16 * n, stages, splits, 1, 32, 8, 8, 32, 0, 0, **modes)

    cases = []
    for shape in MERGED_SHAPES:
        n, width, _ = shape
        splits = min(2, -(-width // 16))
        cases += [("step", "forward", shape, schedule(n, 2, splits, presplit), {}) for presplit in (0, 1)]
        cases += [("step", "backward", shape, schedule(n, stages, 2, 0), CUT) for stages in (1, 2, 3)]
    return cases


ALL = [*projections(), *chains(), *merged()]
FAST = (0,)
"""What is quick to lower: one stream. test_emulated.py has the other ops and tails."""


@pytest.mark.parametrize(
    ("op", "direction", "shape", "schedule", "plan"),
    [pytest.param(*case, marks=() if number in FAST else pytest.mark.slow) for number, case in enumerate(ALL)],
)
def test_an_odd_shape_computes_the_reference(
    emulator, tmp_path, op: str, direction: Direction, shape: Any, schedule: Any, plan: dict[str, int]
) -> None:
    kernel = Emulated(
        tmp_path, emulator, generate(Problem(op, direction, *shape), schedule, Target("cuda", "sm_80"), **plan)
    )
    for tokens in (0, 1, 16, 37):
        kernel.check(tokens, seed=tokens)


def project_forward(emulator, tmp_path, splits: int) -> Emulated:
    schedule = TiledSchedule(16, 32, 2, splits, 1, 32)
    problem = Problem("project", "forward", 2, 64, "bfloat16")
    return Emulated(tmp_path, emulator, generate(problem, schedule, Target("cuda", "sm_80")))


def test_sums_over_splits_do_not_depend_on_the_other_tokens(emulator, tmp_path):
    """Split sums are added in order: a token's result is the same bits alone and among others."""
    kernel = project_forward(emulator, tmp_path, splits=4)
    inputs = kernel.spec.inputs(kernel.problem, 21, 0)
    many = kernel.run(inputs, 21)
    alone = kernel.run({"x": inputs["x"][17:18].clone(), "phi": inputs["phi"]}, 1)
    for name in ("z", "s"):
        assert torch.equal(many[name][17:18], alone[name])


def test_one_part_of_phi_would_not_be_enough(emulator, tmp_path, monkeypatch):
    """The tolerance that the tests hold the two parts to is one that a single part fails."""
    monkeypatch.setattr(
        "tiles.kernels.project.tensor_core_programs.split_bf16x2",
        lambda dialect, value, which: dialect.store(value if which == 0 else value * 0, "bfloat16"),
    )
    kernel = project_forward(emulator, tmp_path, splits=1)
    with pytest.raises(AssertionError, match="z:"):
        kernel.check(37, seed=0)
