"""merge with many streams in groups, and columns that CUDA threads have to themselves."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from autotune.measuring.verify import check
from tiles.compiler.compile import compile_kernel, generate_source
from tiles.kernels.apply import merge
from tiles.kernels.apply.schedule import in_groups
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.runtime.loaded_kernel import LoadedKernel
from tiles.target import Target, parse_target

HOPPER = Target("cuda", "sm_90a")


@pytest.mark.parametrize(
    ("direction", "n"),
    [
        ("forward", 3),
        ("backward", 4),
        ("backward", 9),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("forward", 4), ("forward", 9), ("backward", 3))),
    ],
)
def test_groups_compute_what_all_streams_at_once_do(direction, n, tmp_path, monkeypatch):
    """Stream counts below a group's size, equal to it, and with a rest."""
    monkeypatch.setattr(merge, "in_groups", lambda problem, schedule: True)
    problem, target = Problem("merge", direction, n, 72, "bfloat16"), parse_target("cpu")
    spec = kernel_spec("merge", direction)
    path = tmp_path / "kernel.so"
    path.write_bytes(compile_kernel(problem, replace(spec.default(problem, target), block_width=24), target).binary)
    kernel = LoadedKernel(path, problem)
    for tokens, slices in ((0, 1), (1, 1), (5, 2)):
        check(kernel, spec.inputs(problem, tokens, seed=tokens), tokens, slices)


def test_only_cuda_threads_that_cannot_hold_the_weights_take_groups():
    for n, wanted in ((4, False), (8, False), (9, True), (16, True)):
        problem, spec = Problem("merge", "backward", n, 2560), kernel_spec("merge", "backward")
        assert in_groups(problem, spec.default(problem, HOPPER)) == wanted
        assert not in_groups(problem, spec.default(problem, Target("cpu", "x86-64-v3")))


@pytest.mark.parametrize(
    ("n", "width", "vectors"), [(4, 512, 4), (2, 72, 0), pytest.param(9, 8, 0, marks=pytest.mark.slow)]
)
def test_a_cuda_thread_moves_its_columns_as_vectors_and_sums_them_in_one_register(n, width, vectors):
    """uint4 is 16 bytes: eight bfloat16. Rows too narrow to be shared out evenly compile as well."""
    problem, spec, hopper = Problem("merge", "backward", n, width, "bfloat16"), kernel_spec("merge", "backward"), HOPPER
    source = generate_source(spec, problem, spec.default(problem, hopper), hopper)
    # x and g are read and dx is written, a row for each stream; f and df have one row.
    assert source.count("*(uint4*)(dx + ") == vectors
    assert source.count("= *(uint4*)(x + ") == source.count("= *(uint4*)(g + ") == vectors
    assert source.count("*(uint4*)(df + ") == (1 if vectors else 0)
    # Its weights come four at a time where there are so many of them.
    assert source.count("= *(float4*)(res + ") == source.count("= *(float4*)(post + ") * n == (n if n % 4 == 0 else 0)
    if vectors:
        assert len(re.findall(r"float accumulator\w*\[1\];", source)) == n * n + n
        assert len(re.findall(r"float \w+\[8\];", source)) == 0
