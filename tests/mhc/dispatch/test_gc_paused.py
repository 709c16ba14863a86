"""The paused garbage collector: nothing is collected meanwhile, and it is left as it was."""

import gc

import pytest

from mhc.dispatch.gc_paused import gc_paused


@pytest.fixture
def _collecting_again():
    yield
    gc.enable()


@pytest.mark.usefixtures("_collecting_again")
@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_paused_and_then_as_before(enabled):
    if not enabled:
        gc.disable()
    with gc_paused():
        assert not gc.isenabled()
    assert gc.isenabled() == enabled
    with pytest.raises(ValueError, match="x"), gc_paused():
        raise ValueError("x")
    assert gc.isenabled() == enabled


def test_many_objects_start_no_collection():
    seen = []
    gc.callbacks.append(lambda phase, info: seen.append(phase))
    try:
        with gc_paused():
            kept = [[] for _ in range(100_000)]
            counted = len(seen)
        assert counted == 0
    finally:
        gc.callbacks.pop()
    assert len(kept) == 100_000
