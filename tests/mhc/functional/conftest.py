"""The folder's helper `released` can be imported by its tests. What compiles a fused op is slow: tests/tiles compiles
them in the fast tier."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
DEAR = ("pre", "step", "single_pass")

sys.path.insert(0, str(HERE))


def pytest_collection_modifyitems(items):
    for item in items:
        given = getattr(getattr(item, "callspec", None), "params", {})
        if HERE in item.path.parents and given.get("kernels") == "compiled" and given.get("op") in DEAR:
            item.add_marker(pytest.mark.slow)
