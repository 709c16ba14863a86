"""A pack built for AVX-512 on a machine that reports AVX2 only: the next fallback, logged once, right numbers."""

import logging
import platform
from dataclasses import asdict

import pytest
import torch

import mhc
import mhc.dispatch.resolve
from mhc import functional
from tiles.cache.cache import KernelCache, Key, default_folder
from tiles.compiler.compile import compile_kernel
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.pack.pack import write_pack
from tiles.runtime.loaded_kernel import LoadedKernel
from tiles.target import Device

AVX512 = Device("cpu", "A CPU with AVX-512", "x86-64-v4")
AVX2 = Device("cpu", "A CPU with AVX2", "x86-64-v3")
PROBLEM = Problem("merge", "forward", streams=2, width=64, tokens=16)


@pytest.fixture
def pack(tmp_path):
    """One kernel, compiled for AVX-512."""
    schedule = kernel_spec("merge", "forward").default(PROBLEM, AVX512.target)
    built = compile_kernel(PROBLEM, schedule, AVX512.target)
    cache = KernelCache(tmp_path / "built")
    cache.put(Key.of(PROBLEM, AVX512), asdict(schedule), built.binary, built.source, {}, {})
    write_pack(cache, tmp_path / "avx512.mhcpack")
    return tmp_path / "avx512.mhcpack"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the ISA levels are x86-64's")
@pytest.mark.parametrize("compiler", [True, False], ids=["compiler", "no compiler"])
def test_the_next_fallback_runs(pack, tmp_path, monkeypatch, caplog, compiler):
    monkeypatch.setenv("MHC_TUNE_CACHE", str(tmp_path / "default"))
    monkeypatch.setattr(mhc.dispatch.resolve, "detect_device", lambda kind: AVX2)
    if not compiler:
        monkeypatch.setattr(
            mhc.dispatch.resolve.compiler, "why_no_compiler", lambda target: "no C++ compiler is on PATH"
        )
    caplog.set_level(logging.INFO, logger="mhc")
    opened = []
    monkeypatch.setattr(
        mhc.dispatch.resolve, "LoadedKernel", lambda *given: opened.append(given[0]) or LoadedKernel(*given)
    )
    kernels = mhc.Kernels.from_path(pack)
    torch.manual_seed(0)
    for tokens in (16, 5):
        x, f, res, post = (
            torch.randn(tokens, 2, 64),
            torch.randn(tokens, 64),
            torch.rand(tokens, 2, 2),
            torch.rand(tokens, 2),
        )
        with mhc.using(kernels):
            got = functional.merge(x, f, res, post)
        torch.testing.assert_close(got, torch.einsum("tij,tjc->tic", res, x) + post[..., None] * f[:, None])
    said = "built for x86-64-v4, this CPU offers x86-64-v3"
    assert [row.runs for row in kernels.report()] == ["default" if compiler else "reference"] * 2
    assert all(said in row.why for row in kernels.report())
    assert sum(said in record.message for record in caplog.records) == 1
    built_here = KernelCache(default_folder() / "defaults").records()
    assert [record.key.device for record in built_here] == [AVX2] * compiler
    assert {path.parent for path in opened} == {default_folder() / "defaults"} if compiler else opened == []
