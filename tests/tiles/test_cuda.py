"""The same program texts compile for every CUDA architecture, without a GPU, and their defaults spill nothing."""

from __future__ import annotations

import multiprocessing
import re
import shutil
import struct
from concurrent.futures import ProcessPoolExecutor

import pytest
from launching import job, launched

from tiles.compile import Artifact, compile_kernel
from tiles.family import Problem
from tiles.registry import kernel_spec, kernel_specs
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


def test_every_compiled_kernel_gets_its_own_arguments(driver, artifacts, tmp_path):
    """For each artifact: the grid covers the tokens, and every parameter of the CUDA signature is the right value."""
    tokens, splits, jobs, signatures = 37, 3, [], []
    for number, ((op, direction, _), artifact) in enumerate(artifacts.items()):
        path = tmp_path / f"{number}.so"
        path.write_bytes(artifact.binary)
        arguments = kernel_spec(op, direction).arguments(Problem(op, direction, 2, 64, "bfloat16"))
        tensors = [argument.name for argument in arguments if argument.role != "scalar"]
        scalars = [argument.name for argument in arguments if argument.role == "scalar"]
        values = {name: 0x1000 * (place + 1) for place, name in enumerate(tensors)}
        floats = {name: 0.5 + place for place, name in enumerate(scalars)}
        signature = re.findall(r"__global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(([^)]*)\)", artifact.source)[-1]
        names = [parameter.split()[-1].lstrip("*") for parameter in signature[1].split(",")]
        signatures.append((signature[0], names, values, floats))
        jobs.append(
            job(
                str(path),
                (tokens, splits, 0, 0),
                tensors=list(values.values()),
                scalars=list(floats.values()),
                parameters=len(names),
            )
        )
    for (record,), (kernel, names, values, floats), (op, direction, _) in zip(
        launched(driver, jobs), signatures, artifacts, strict=True
    ):
        assert record["status"] == 0
        assert record["name"] == kernel
        for name, got in zip(names, record["parameters"], strict=False):
            low = got & 0xFFFFFFFF
            if name in values:
                assert got == values[name], (kernel, name)
            elif name in floats:
                assert struct.unpack("<f", struct.pack("<I", low)) == (floats[name],), (kernel, name)
            else:
                assert low == {"tokens": tokens, "splits": splits}[name], (kernel, name)
        if op in ("aggregate", "merge"):
            assert record["grid"] == [tokens, 1, 1]
        elif op == "project" and direction == "backward":
            assert record["grid"][1] == splits
        assert 32 <= record["block"][0] <= 1024
