"""The default schedules of four streams on an H200, looked at without one: bytes in flight, spills, blocks."""

from __future__ import annotations

import shutil
from itertools import product

import pytest

from autotune.measuring.resource_check import resource_usage
from autotune.sass.bytes_in_flight import look
from autotune.sass.disassembler import find_disassembler
from tiles.compiler.compile import compile_kernel
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.target import Target

HOPPER = Target("cuda", "sm_90a")
OPS = ("aggregate", "merge", "project", "pre", "step", "single_pass")
ENOUGH = 1.5

ONE_BLOCK = (("single_pass", "forward"), ("single_pass", "backward"), ("step", "backward"))
"""Passes whose tiles are so large that one thread block has a multiprocessor's registers and shared memory."""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None or find_disassembler() is None, reason="nvcc or nvdisasm is not here")
@pytest.mark.parametrize(
    ("op", "direction", "width"), list(product(OPS, ("forward", "backward"), (1280, 2560, 4096, 7168)))
)
def test_a_default_has_bytes_in_flight_two_blocks_and_no_spills(op, direction, width):
    problem, spec = Problem(op, direction, 4, width, "bfloat16", tokens=4096), kernel_spec(op, direction)
    artifact = compile_kernel(problem, spec.default(problem, HOPPER), HOPPER)
    usage = resource_usage(artifact)
    assert usage is not None
    assert usage.spilled_bytes == 0
    for seen in (each for each in look(artifact, problem.tokens) if each.loads_vectors):
        assert seen.ratio is not None
        assert seen.ratio >= ENOUGH, seen
        assert seen.resident_blocks >= 2 or (op, direction) in ONE_BLOCK, seen


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not here")
@pytest.mark.parametrize("arch", ("sm_80", "sm_100a"))
@pytest.mark.parametrize(
    ("op", "direction", "streams"),
    [
        ("single_pass", "forward", 1),
        ("pre", "backward", 4),
        ("pre_identity", "backward", 16),
        ("step", "backward", 4),
        ("step_identity", "backward", 4),
        ("single_pass", "backward", 4),
    ],
)
def test_a_default_fits_and_spills_nothing_on_another_architecture(op, direction, streams, arch):
    """The largest tiles, and some that did."""
    problem, target = Problem(op, direction, streams, 1280, "bfloat16", tokens=4096), Target("cuda", arch)
    usage = resource_usage(compile_kernel(problem, kernel_spec(op, direction).default(problem, target), target))
    assert usage is not None
    assert usage.spilled_bytes == 0
    assert usage.resident_blocks > 0
