"""The status of a CUDA launcher as one line: what failed, and what to do."""

from __future__ import annotations

import ctypes

from tiles.compiler.cuda_launcher import NO_DRIVER, OLD_DRIVER, TOO_MANY_TOKENS

REFUSED_CODE = (200, 209, 222)
"""The driver does not take the code: an invalid image, no binary for the GPU, an unsupported PTX version."""

OLDEST_DRIVER = {12: 525, 13: 580}
"""The oldest driver branch on Linux for each major release of the CUDA toolkit (CUDA's release notes, table "minimum
required driver version for CUDA minor version compatibility")."""

_LAUNCHER_ERRORS = {
    NO_DRIVER: "libcuda.so.1 was not found: install the NVIDIA driver",
    OLD_DRIVER: "the NVIDIA driver is older than CUDA 12: update it",
    TOO_MANY_TOKENS: "a kernel counts in 32 bits, and there are too many tokens for that: split the call",
}


def is_final(status: int) -> bool:
    """Whether a load that failed so fails here always; out of memory or inside of a capture it may work later."""
    return status in (NO_DRIVER, OLD_DRIVER, *REFUSED_CODE)


def status_text(status: int, toolkit: int) -> str:
    """The meaning of a launcher's status; `toolkit` is the CUDA toolkit that built the kernel (13000: 13.0, 0: not
    known)."""
    if status in _LAUNCHER_ERRORS:
        return _LAUNCHER_ERRORS[status]
    if status in REFUSED_CODE:
        return refused_text(status, toolkit, driver_version())
    text = ctypes.c_char_p()
    ctypes.CDLL("libcuda.so.1").cuGetErrorString(status, ctypes.byref(text))
    return f"CUDA error {status}, {(text.value or b'unknown').decode()}"


def refused_text(status: int, toolkit: int, driver: int) -> str:
    """Why a driver (12040: it knows CUDA 12.4) does not take code of a toolkit, and the driver that is needed."""
    if driver < toolkit:
        same_major = driver // 1000 == toolkit // 1000
        needed = f"a driver of CUDA {_release(toolkit)}" if same_major else driver_needed(toolkit)
        return (
            f"CUDA error {status}, the NVIDIA driver knows CUDA {_release(driver)}, the kernel is built with CUDA "
            f"{_release(toolkit)}: install {needed}, or build with CUDA {_release(driver)} (docs/gpu.md)"
        )
    built = f"with CUDA {_release(toolkit)}" if toolkit else "with a CUDA toolkit that is not known"
    return (
        f"CUDA error {status}, the NVIDIA driver, which knows CUDA {_release(driver)}, refuses a kernel that is built "
        f"{built}: it is damaged or for another GPU, tune it again"
    )


def driver_needed(toolkit: int) -> str:
    """The oldest driver that takes the code of a toolkit (13000)."""
    oldest = OLDEST_DRIVER.get(toolkit // 1000)
    return f"driver {oldest} or newer" if oldest else f"a driver of CUDA {_release(toolkit)}"


def driver_version() -> int:
    """The CUDA version that the driver knows, as 1000 · major + 10 · minor."""
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


def _release(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
