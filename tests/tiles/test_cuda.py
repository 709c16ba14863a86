"""The same program texts compile for every CUDA architecture, without a GPU, and their defaults spill nothing."""

from __future__ import annotations

import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor

import pytest

from tiles.compile import Artifact, compile_kernel
from tiles.family import Problem
from tiles.registry import kernel_specs
from tiles.target import Target

ARCHS = ("sm_80", "sm_90a", "sm_100a")
CASES = [(op, direction, arch) for op, direction in kernel_specs() for arch in ARCHS]


def compiled(case: tuple[str, str, str]) -> Artifact:
    op, direction, arch = case
    spec, target = kernel_specs()[op, direction], Target("cuda", arch)
    problem = spec.canonical(Problem(op, direction, 2, 64, "bfloat16"))
    return compile_kernel(problem, spec.default(problem, target), target)


@pytest.fixture(scope="module")
def artifacts():
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH: CUDA code cannot be compiled here")
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        return dict(zip(CASES, pool.map(compiled, CASES), strict=True))


@pytest.mark.parametrize("case", CASES, ids=".".join)
def test_the_default_compiles_and_spills_nothing(artifacts, case):
    artifact = artifacts[case]
    assert artifact.binary.startswith(b"\x7fELF")
    assert "__global__" in artifact.source
    assert 0 < artifact.details["registers"] <= 255
    assert artifact.details["spill_stores"] == artifact.details["spill_loads"] == artifact.details["stack"] == 0
