"""Lets the tests of this folder import the modules beside them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    """A library that stands in for NVIDIA's driver."""
    from launching import build_driver

    return build_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    """A library that runs kernels in place of NVIDIA's driver."""
    from emulation import build_emulator

    return build_emulator(tmp_path_factory.mktemp("emulator"))
