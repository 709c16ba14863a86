"""Every test runs with a cache folder of this run, on the torch reference unless it asks for `kernels`.

Tests on compiled kernels take n = 4 and C = 16 where they can: a kernel is compiled once a shape and dtype."""

import os

import pytest
import torch

import mhc
from mhc.dispatch.resolve import Resolver


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Shared by the processes of a run: what one has compiled, the others load."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "mhc_cache"
    folder.mkdir(mode=0o700, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MHC_TUNE_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def _on_reference(cache_folder):
    with mhc.using(mhc.Kernels.reference()):
        yield


@pytest.fixture
def one_thread():
    """One torch thread: small tensors gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def compiled(cache_folder):
    """Compiled default schedules that never fall back to the reference; shared, as compiling takes seconds a kernel."""

    def candidates(problem, device):
        return [
            candidate
            for candidate in Resolver.candidates(kernels.resolver, problem, device)
            if candidate.runs != "reference"
        ]

    kernels = mhc.Kernels.defaults()
    kernels.resolver.candidates = candidates
    return kernels


@pytest.fixture
def on_compiled(compiled):
    """Run on compiled kernels."""
    with mhc.using(compiled):
        yield compiled


@pytest.fixture(params=["reference", "compiled"])
def kernels(request):
    """The torch reference, then compiled kernels: a test that asks for this runs on both."""
    return mhc.active() if request.param == "reference" else request.getfixturevalue("on_compiled")
