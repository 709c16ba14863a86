"""Kernels that compute nothing, for tests of which one is chosen."""

import logging
from dataclasses import asdict, replace

import pytest
import torch

import mhc
import mhc.dispatch.resolve
import tiles.cache.compiled_here
import tiles.compiler.compile
from mhc import functional
from tiles.cache.cache import KernelCache, Key
from tiles.compiler.compile import Artifact
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.runtime.loaded_kernel import LoadError
from tiles.target import detect_device

HERE = detect_device("cpu")
PROBLEM = Problem("aggregate", "forward", streams=2, width=8, tokens=4)
SCHEDULE = asdict(kernel_spec("aggregate", "forward").default(PROBLEM, HERE.target))
X, PRE = torch.arange(64.0).view(4, 2, 8), torch.rand(4, 2)
COMPILED = ord("c")
"""The answer of kernels that the fake compiler makes."""
REFUSED = 13
"""The answer of kernels whose code the device's driver refuses."""


class FakeKernel:
    """Stands in for a loaded kernel: computes nothing and answers with its binary's only byte."""

    def __init__(self, path, problem):
        content = path.read_bytes()
        if content == b"\0":
            raise LoadError(f"{path.name} does not load: wrong ELF class")
        self.answer = float(content[0])

    def load(self, device):
        """A device whose driver does not take the code of kernels that would answer `REFUSED`."""
        if self.answer == REFUSED:
            raise LoadError(f"CUDA error 209 on {device}")

    def __call__(self, x, pre):
        return (torch.full((x.shape[0], x.shape[2]), self.answer),)


@pytest.fixture
def fakes(monkeypatch, tmp_path, caplog):
    """Kernels that answer, a compiler whose kernels answer `COMPILED`, a default folder of this test's own."""
    monkeypatch.setenv("MHC_TUNE_CACHE", str(tmp_path / "default"))
    monkeypatch.setattr(mhc.dispatch.resolve, "LoadedKernel", FakeKernel)
    monkeypatch.setattr(tiles.compiler.compile, "why_no_compiler", lambda target: None)
    monkeypatch.setattr(tiles.compiler.compile, "compile_kernel", lambda *_: Artifact(HERE.target, "source", b"c"))
    tiles.cache.compiled_here._process_cache.cache_clear()
    caplog.set_level(logging.INFO, logger="mhc")


def put(folder, answer, *, tokens=4, device=HERE, schedule=SCHEDULE, measurement=None, **changes):
    """Store a kernel; `changes` are of its key."""
    key = replace(Key.of(replace(PROBLEM, tokens=tokens), device), **changes)
    return KernelCache(folder).put(key, schedule, bytes([answer]), "source", measurement or {}, {})


def answer(kernels, tokens=4):
    """What the kernel that runs answers."""
    with mhc.using(kernels):
        return functional.aggregate(X[:1].expand(tokens, -1, -1), PRE[:1].expand(tokens, -1))[0, 0].item()


def only_row(kernels):
    """The report's row."""
    (row,) = kernels.report()
    return row
