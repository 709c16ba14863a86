"""What a driver refuses is one line with the driver that is needed."""

from __future__ import annotations

import pytest

from tiles.runtime.cuda_status import refused_text


@pytest.mark.parametrize(
    ("toolkit", "driver", "wanted"),
    [
        (
            13000,
            12040,
            "knows CUDA 12.4, the kernel is built with CUDA 13.0: install driver 580 or newer, or build with",
        ),
        (12080, 12020, "built with CUDA 12.8: install a driver of CUDA 12.8, or build with CUDA 12.2"),
        (12080, 13000, "refuses a kernel that is built with CUDA 12.8: it is damaged or for another GPU"),
        (0, 13000, "with a CUDA toolkit that is not known: it is damaged or for another GPU"),
        (14010, 13000, "install a driver of CUDA 14.1"),
    ],
)
@pytest.mark.parametrize("status", [200, 209, 222])
def test_code_that_a_driver_refuses(status, toolkit, driver, wanted):
    said = refused_text(status, toolkit, driver)
    assert said.startswith(f"CUDA error {status}, the NVIDIA driver")
    assert wanted in said
    assert "\n" not in said
