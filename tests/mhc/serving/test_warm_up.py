"""Warm-up: after it no call of the model finds, loads or compiles anything; what is missing is said."""

from itertools import product

import pytest
import torch
from torch import nn

import mhc
import tiles.compiler.compile
from mhc.dispatch.resolve import Resolver
from tiles.cache.cache import KernelCache, default_folder
from tiles.kernels.spec import EVERY_TOKENS
from tiles.pack.pack import write_pack
from tiles.runtime.loaded_kernel import LoadedKernel

WIDTH, N = 16, 4


def model():
    blocks = [mhc.HyperConnection(WIDTH, N, nn.Linear(WIDTH, WIDTH)) for _ in range(2)]
    return mhc.HyperConnectionStack(blocks).eval()


@pytest.fixture
def counted(monkeypatch):
    """How often kernels were loaded, and called."""
    counts = {"loaded": 0, "called": 0}
    load, call = LoadedKernel.__init__, LoadedKernel.__call__

    def loading(self, *args):
        counts["loaded"] += 1
        load(self, *args)

    def calling(self, *args, **kwargs):
        counts["called"] += 1
        return call(self, *args, **kwargs)

    monkeypatch.setattr(LoadedKernel, "__init__", loading)
    monkeypatch.setattr(LoadedKernel, "__call__", calling)
    return counts


@pytest.fixture
def pack(compiled, tmp_path):
    """A pack of the compiled kernels of pre, step and merge."""
    with mhc.using(compiled), torch.no_grad():
        model()(torch.randn(3, N, WIDTH))
    write_pack(KernelCache(default_folder() / "defaults"), tmp_path / "kernels.mhcpack")
    return tmp_path / "kernels.mhcpack"


def test_after_it_every_count_finds_its_kernel_loaded(pack, counted, monkeypatch):
    blocks = model()
    with mhc.using(mhc.Kernels.from_path(pack)):
        report = mhc.warm_up(blocks, [1, 2, 4, 8])
        assert counted == {"loaded": 12, "called": 12}
        assert {(row.op, row.tokens) for row in report} == set(product(("pre", "step", "merge"), (1, 2, 4, 8)))
        assert report.missing == ()
        assert str(report).endswith("\nall 12 kernels are tuned and loaded")
        assert mhc.warm_up(blocks, (8, 4, 1, 1, 2)) == report
        assert counted == {"loaded": 12, "called": 12}, "a second time nothing is done"
        monkeypatch.setattr(Resolver, "resolve", lambda *_: pytest.fail("it looks for a kernel"))
        with torch.no_grad():
            for tokens in range(1, 9):
                blocks(torch.randn(tokens, N, WIDTH))
        assert counted == {"loaded": 12, "called": 12 + 3 * 8}
        assert mhc.kernel_report() == report


def test_in_training_mode_the_backward_is_loaded_too(monkeypatch):
    blocks = model().train()
    report = mhc.warm_up(blocks, [5])
    assert {row.direction for row in report} == {"forward", "backward"}
    monkeypatch.setattr(Resolver, "resolve", lambda *_: pytest.fail("it looks for a kernel"))
    blocks(torch.randn(5, N, WIDTH, requires_grad=True)).sum().backward()


def test_what_is_missing_is_said(on_compiled):
    report = mhc.warm_up(model(), [3, 4])
    assert {row.runs for row in report} == {"default"}
    assert report.missing == tuple(report)
    assert str(report).splitlines()[-1] == (
        "3 of 3 kernels are not tuned (3 default): pre forward; step forward; merge forward"
    )
    with mhc.using(mhc.Kernels.reference()):
        assert str(mhc.warm_up(model(), [3])).endswith(
            "3 of 3 kernels are not tuned (3 reference): pre forward; step forward; merge forward"
        )


def test_a_pack_that_lacks_a_kernel_where_nothing_compiles_is_said(pack, tmp_path, monkeypatch):
    monkeypatch.setattr(tiles.compiler.compile, "why_no_compiler", lambda target: "no C++ compiler is on PATH")
    monkeypatch.setenv("MHC_TUNE_CACHE", str(tmp_path / "empty"))
    other = mhc.HyperConnectionStack([mhc.HyperConnection(8, 2, nn.Identity())]).eval()
    with mhc.using(mhc.Kernels.from_path(pack)):
        report = mhc.warm_up(nn.ModuleList([model(), other]).eval(), [3])
    assert [(row.op, row.width, row.runs) for row in report.missing] == [
        ("pre", 8, "reference"),
        ("merge", 8, "reference"),
    ]
    assert all("no C++ compiler is on PATH" in row.why for row in report.missing)


def test_separate_kernels_are_loaded_in_place_of_a_fused_one(on_compiled, counted):
    block = mhc.HyperConnection(WIDTH, N, nn.Identity()).eval()
    with mhc.using(mhc.Kernels.defaults(fused=False)) as kernels, torch.no_grad():
        report = mhc.warm_up(block, [7])
        assert {(row.op, row.runs) for row in report} == {
            ("pre", "separate"),
            *((op, "default") for op in ("project", "coefficients", "aggregate", "merge")),
        }
        block(torch.randn(7, N, WIDTH))
        assert kernels.report() == report
    assert counted == {"loaded": 4, "called": 8}


def test_with_batch_invariance_one_kernel_serves_every_count():
    with mhc.using(mhc.Kernels.defaults()), mhc.batch_invariant(), torch.no_grad():
        report = mhc.warm_up(model(), [1, 64, 4096])
        assert [row.tokens for row in report] == [EVERY_TOKENS] * 3
        model()(torch.randn(100, N, WIDTH))
        assert mhc.kernel_report() == report


BAD = {
    "no tokens": (lambda: mhc.warm_up(model(), []), r"list of token counts from 1 on, got \[\]: pass such as"),
    "a number": (lambda: mhc.warm_up(model(), 64), "list of token counts from 1 on, got 64: pass such as"),
    "zero": (lambda: mhc.warm_up(model(), [1, 0]), r"list of token counts from 1 on, got \[1, 0\]"),
    "a float": (lambda: mhc.warm_up(model(), [1.5]), r"got \[1\.5\]"),
    "far too many": (lambda: mhc.warm_up(model(), [2**41]), "list of token counts from 1 on"),
    "no module": (lambda: mhc.warm_up([model()], [1]), "warm_up needs a torch module, got list: pass the model"),
    "no connections": (lambda: mhc.warm_up(nn.Linear(8, 8), [1]), "hyper-connections, got Linear without any: pass"),
    "residuals": (
        lambda: mhc.warm_up(mhc.HyperConnection(8, 2, nn.Identity(), mode="residual"), [1]),
        "hyper-connections, got HyperConnection without any",
    ),
    "meta": (lambda: mhc.warm_up(model().to("meta"), [1]), "needs a model with memory, got parameters on meta: call"),
    "dtype": (lambda: mhc.warm_up(model(), [1], dtype=torch.float64), "dtype must be one of .*got torch.float64: pass"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_a_line(case):
    call, text = BAD[case]
    with pytest.raises(mhc.BadInput, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert not mhc.kernel_report()
