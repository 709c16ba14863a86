"""The same program texts compile for every CUDA architecture, without a GPU, and their defaults spill nothing.

A kernel of each kind is compiled at one small shape; all of them, for every architecture, are slow (test_emulated.py
runs the texts of all). Of the whole matrix (every kernel, stream count and architecture at a real width) the slow tier
compiles a sample, another one when the sources of the kernels change; MHC_TUNE_SAMPLE, any whole number, names one.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import struct
from itertools import product
from typing import Any

import pytest
from building import sample_of_sources
from launching import WORKSPACE, job, launched

from autotune.measuring.resource_check import resource_usage
from autotune.processes.worker import TaskFailed
from autotune.processes.workers import Workers
from tiles.compiler.compile import Artifact, compile_kernel
from tiles.compiler.cuda_launcher import SUM_KERNEL, TOO_MANY_TOKENS
from tiles.kernels.registry import kernel_spec, kernel_specs
from tiles.kernels.spec import IDENTITY, Problem
from tiles.runtime.loaded_kernel import LoadedKernel
from tiles.target import Target

ARCHS = ("sm_80", "sm_90a", "sm_100a")
ON_CUDA = [kernel for kernel, spec in kernel_specs().items() if "cuda" in spec.targets]
CASES = [
    (op, direction, arch)
    for op, direction in ON_CUDA
    for arch in ARCHS
    if not op.endswith(IDENTITY) or arch == "sm_90a"  # parts of the others' texts
]
FAST = [
    ("aggregate", "backward", "sm_80"),
    ("merge", "forward", "sm_90a"),
    ("project", "backward", "sm_100a"),
    ("pre", "forward", "sm_90a"),
]
TIERS = [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES]

MATRIX = [(*kernel, n, arch) for kernel, n, arch in product(ON_CUDA, (1, 2, 4, 8, 16), ARCHS)]
WIDTH = 2560
SAMPLE_SIZE = 6
SAMPLE = int(os.environ.get("MHC_TUNE_SAMPLE") or sample_of_sources())


def sample(number: int) -> list[tuple[str, str, int, str]]:
    """The matrix in an order of its own, a few after the other: samples in a row leave nothing out."""
    mixed = random.Random(0).sample(MATRIX, len(MATRIX))
    return [mixed[(number * SAMPLE_SIZE + at) % len(mixed)] for at in range(SAMPLE_SIZE)]


def case_id(case: tuple[str, str, int, str]) -> str:
    op, direction, n, arch = case
    return f"sample{SAMPLE}-{op}.{direction}-n{n}-{arch}"


def default_of(case: tuple[str, str, int, str]) -> tuple[Problem, Any, Target]:
    """A problem of the matrix, its default schedule and the target."""
    op, direction, n, arch = case
    spec, target = kernel_spec(op, direction), Target("cuda", arch)
    problem = spec.canonical(Problem(op, direction, n, WIDTH, "bfloat16"))
    return problem, spec.default(problem, target), target


class Artifacts(dict[tuple[str, str, str], Artifact]):
    """Defaults at a small shape, each compiled when a test first asks for it."""

    def __missing__(self, case: tuple[str, str, str]) -> Artifact:
        op, direction, arch = case
        spec, target = kernel_specs()[op, direction], Target("cuda", arch)
        problem = spec.canonical(Problem(op, direction, 2, 64, "bfloat16"))
        self[case] = compile_kernel(problem, spec.default(problem, target), target)
        return self[case]


@pytest.fixture(scope="module")
def artifacts():
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH: CUDA code cannot be compiled here")
    return Artifacts()


@pytest.mark.parametrize("case", TIERS, ids=".".join)
def test_the_default_compiles_and_spills_nothing(artifacts, case):
    artifact = artifacts[case]
    assert artifact.binary.startswith(b"\x7fELF")
    assert "__global__" in artifact.source
    assert 0 < artifact.details["registers"] <= 255
    assert artifact.details["spill_stores"] == artifact.details["spill_loads"] == artifact.details["stack"] == 0


@pytest.fixture(scope="module")
def sampled():
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH: CUDA code cannot be compiled here")
    with Workers(compile_seconds=400) as workers:
        return dict(
            zip(sample(SAMPLE), workers.compile_each([default_of(case) for case in sample(SAMPLE)]), strict=True)
        )


@pytest.mark.slow
@pytest.mark.parametrize("case", sample(SAMPLE), ids=case_id)
def test_a_sample_of_the_matrix_compiles_and_its_defaults_spill_nothing(sampled, case):
    (op, direction, n, arch), artifact = case, sampled[case]
    again = f"mhc-tune compile --target cuda:{arch} --op {op} --streams {n} --width {WIDTH} ({direction})"
    assert not isinstance(artifact, TaskFailed), f"{again}: {artifact}"
    seen = resource_usage(artifact)
    assert seen is not None
    problem, schedule, target = default_of(case)
    assert seen.spilled_bytes == 0, f"{again}: {seen}"
    assert seen.resident_blocks >= getattr(schedule, "min_blocks_per_sm", 1), f"{again}: {seen}"
    stated = kernel_spec(op, direction).scratch(problem, schedule, target)
    if stated:  # apply's kernels state nothing: sums over a token's columns are not counted
        assert seen.shared_bytes <= stated, f"{again}: {seen}, stated {stated}"


def test_samples_in_a_row_cover_the_matrix():
    samples = -(-len(MATRIX) // SAMPLE_SIZE)
    assert {case for number in range(samples) for case in sample(SAMPLE + number)} == set(MATRIX)


@pytest.mark.parametrize("cases", [FAST, pytest.param(CASES, marks=pytest.mark.slow)], ids=["sampled", "all"])
def test_every_compiled_kernel_gets_its_own_arguments(driver, artifacts, tmp_path, cases):
    """For each artifact: every parameter of every kernel's CUDA signature is the right value, and no grid is empty.

    The calls are of one chunk, so that tensors come as they are; sums over splits and what lies between kernels come in
    the workspace, where no two names share a place.
    """
    tokens, jobs, told = 1000, [], []
    for number, (op, direction, arch) in enumerate(cases):
        artifact = artifacts[op, direction, arch]
        path = tmp_path / f"{number}.so"
        path.write_bytes(artifact.binary)
        arguments = kernel_spec(op, direction).arguments(Problem(op, direction, 2, 64, "bfloat16"))
        tensors = [argument.name for argument in arguments if not argument.is_scalar]
        scalars = [argument.name for argument in arguments if argument.is_scalar]
        values = {name: 0x1000 * (place + 1) for place, name in enumerate(tensors)}
        floats = {name: 0.5 + place for place, name in enumerate(scalars)}
        kernels = {
            name: [parameter.split()[-1].lstrip("*") for parameter in parameters.split(",")]
            for name, parameters in re.findall(
                r"__global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(([^)]*)\) {", artifact.source
            )
        }
        told.append((kernels, values, floats, {arg.name for arg in arguments if arg.role == "partial"}))
        counts = {name: len(parameters) for name, parameters in kernels.items()}
        given = {"tensors": list(values.values()), "scalars": list(floats.values()), "parameters": counts}
        jobs.append(job(str(path), tokens, **given))
    for ((record,), (kernels, values, floats, partials)), (op, direction, _) in zip(
        zip(launched(driver, jobs), told, strict=True), cases, strict=True
    ):
        assert record["status"] == 0
        assert sorted(launch["name"] for launch in record["log"]) == sorted(kernels)
        spaces: dict[str, set[int]] = {}
        for launch in record["log"]:
            assert all(launch["grid"])
            assert 32 <= launch["block"][0] <= 1024
            for name, got in zip(kernels[launch["name"]], launch["parameters"], strict=False):
                low, where = got & 0xFFFFFFFF, (launch["name"], name)
                summed_from = name.startswith("of_") or (name in partials and launch["name"] != SUM_KERNEL)
                if name in floats:
                    assert struct.unpack("<f", struct.pack("<I", low)) == (floats[name],), where
                elif name == "tokens":
                    assert low == tokens, where
                elif name == "splits":
                    assert 1 < low <= 64, where
                elif name in values and not (summed_from and SUM_KERNEL in kernels):
                    assert got == values[name], where
                else:
                    assert WORKSPACE <= got < WORKSPACE + record["bytes"], where
                    spaces.setdefault(name.removeprefix("of_"), set()).add(got)
        assert all(len(places) == 1 for places in spaces.values()), spaces
        assert len(set.union(set(), *spaces.values())) == len(spaces), spaces
        if op in ("aggregate", "merge"):
            assert [launch["grid"] for launch in record["log"]] == [[tokens, 1, 1]]
        assert (SUM_KERNEL in kernels) == bool(partials), (op, direction)


def test_a_compiled_kernel_is_told_from_a_cpus_and_says_what_workspace_it_needs(artifacts, tmp_path):
    """Opening takes no driver; the sums of two chunks' splits and all that lies between kernels is counted. The library
    also says which CUDA toolkit it is of."""
    needs_workspace = {
        ("merge", "forward", "sm_90a"): False,
        ("project", "backward", "sm_100a"): True,
        ("pre", "forward", "sm_90a"): True,
    }
    assert needs_workspace.keys() <= set(FAST)
    for case, needs in needs_workspace.items():
        op, direction, _ = case
        path = tmp_path / f"{op}.so"
        path.write_bytes(artifacts[case].binary)
        kernel = LoadedKernel(path, Problem(op, direction, 2, 64, "bfloat16"))
        assert kernel.kind == "cuda"
        major, minor = map(int, artifacts[case].toolkit.split("."))
        assert kernel.toolkit == 1000 * major + 10 * minor
        assert major >= 12
        assert kernel.slices(100_000) == 1
        assert (kernel.workspace(100_000) > 0) == needs


def test_sums_over_splits_limit_the_tokens_of_a_call(driver, artifacts, tmp_path):
    """At n = 2 a token has nine of them, all tokens' in one dimension of the workspace."""
    path = tmp_path / "pre.so"
    path.write_bytes(artifacts["pre", "forward", "sm_90a"].binary)
    given = {"tensors": [0x1000 * place for place in range(1, 10)], "scalars": [1e-6]}
    (records,) = launched(driver, [job(str(path), 2**31 // 9, 2**31 // 9 + 1, **given)])
    assert [record["status"] for record in records] == [0, TOO_MANY_TOKENS]
