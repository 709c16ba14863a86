"""Kernels compiled here: what their records tell."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from tiles.cache.cache import KernelCache, default_folder
from tiles.cache.compiled_here import compile_and_store, find_compiled
from tiles.compiler import compile as compiler
from tiles.compiler.compile import CUDA_TOOLKIT, Artifact
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.target import Device

GPU = Device("cuda", "a GPU", "sm_90a", 132, 50 << 20)
PROBLEM = Problem("merge", "forward", 2, 64, "bfloat16", tokens=8)


@pytest.mark.parametrize(("toolkit", "told"), [("13.0", {CUDA_TOOLKIT: "13.0"}), ("", {})])
def test_the_cuda_toolkit_is_recorded_and_no_part_of_the_key(monkeypatch, tmp_path, toolkit, told):
    """Records from before it was recorded are found like all others."""
    monkeypatch.setenv("MHC_TUNE_CACHE", str(tmp_path))
    built = Artifact(GPU.target, "source", b"code", toolkit=toolkit)
    monkeypatch.setattr(compiler, "compile_kernel", lambda problem, schedule, target: built)
    schedule = asdict(kernel_spec("merge", "forward").default(PROBLEM, GPU.target))
    stored = compile_and_store(PROBLEM, schedule, GPU, "defaults", "2.9")
    (record,) = KernelCache(default_folder() / "defaults").records()
    assert {name: value for name, value in record.provenance.items() if name == CUDA_TOOLKIT} == told
    found = find_compiled(PROBLEM, schedule, GPU, "defaults")
    assert found is not None
    assert found.path == stored.path


def test_a_schedule_from_before_a_field_was_added_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("MHC_TUNE_CACHE", str(tmp_path))
    built = Artifact(GPU.target, "source", b"code")
    monkeypatch.setattr(compiler, "compile_kernel", lambda problem, schedule, target: built)
    old = {"block_width": 64, "threads": 32}
    stored = compile_and_store(PROBLEM, old, GPU, "recompiled", "2.9")
    found = find_compiled(PROBLEM, old, GPU, "recompiled")
    assert found is not None
    assert found.path == stored.path
