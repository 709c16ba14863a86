"""Every test runs with a cache folder of its own session, on the torch reference unless it asks for `kernels`."""

import pytest

import mhc


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mhc_cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MHC_TUNE_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def _on_reference(cache_folder):
    with mhc.using(mhc.Kernels.reference()):
        yield


class Compiled(mhc.Kernels):
    """Compiled default schedules that never give way to the reference."""

    def _fall_back(self, problem, device, why):
        raise AssertionError(f"meant to test a compiled kernel: {problem.describe()}: {why}")


@pytest.fixture(scope="session")
def compiled(cache_folder):
    """Shared by the session, as compiling takes seconds a kernel."""
    return Compiled.defaults()


@pytest.fixture
def on_compiled(compiled):
    """Run on compiled kernels."""
    with mhc.using(compiled):
        yield compiled


@pytest.fixture(params=["reference", "compiled"])
def kernels(request):
    """The torch reference, then compiled kernels: a test that asks for this runs on both."""
    return mhc.active() if request.param == "reference" else request.getfixturevalue("on_compiled")
