"""What the default schedules of pre and step ask of global memory, beside the least that they have to move."""

from __future__ import annotations

import shutil

import pytest
from count_traffic import row

from tiles.kernels.spec import Problem
from tiles.target import Target

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH: the emulator cannot be compiled"),
]

MOST = {
    ("pre", "forward"): 2.26,
    ("pre", "backward"): 1.65,
    ("step", "forward"): 1.76,
    ("step", "backward"): 1.70,
}
"""Sectors for the least, at four streams (docs/gpu.md says what the rest is)."""


@pytest.mark.parametrize(("op", "direction"), MOST)
def test_a_fused_pass_asks_for_little_beyond_the_least(emulator, tmp_path, op, direction):
    problem = Problem(op, direction, 4, 1280, "bfloat16", tokens=4096)
    *_, least, moved, _, rounds, sectors = row(tmp_path, emulator, problem, Target("cuda", "sm_90a"), tokens=256)
    assert float(moved) <= MOST[op, direction] * float(least)
    assert float(sectors) <= 1.03
    assert float(rounds) <= 1.25
