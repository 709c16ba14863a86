"""Targets (what code is built for) and devices (what it runs and was measured on)."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from tiles.errors import BadInput

CUDA_ARCHS = (
    *("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_100a", "sm_103a"),
    *("sm_110a", "sm_120a", "sm_121a"),
)

TEGRA = ("sm_87", "sm_101a", "sm_110a")
"""Architectures of Jetson and Drive, which run only code that was built for them."""

# The psABI levels of x86-64 and the /proc/cpuinfo flags that each adds (System V ABI, x86-64 supplement, table 3.1).
X86_LEVELS: dict[str, frozenset[str]] = {
    "x86-64": frozenset(),
    "x86-64-v2": frozenset({"cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"}),
    "x86-64-v3": frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}),
    "x86-64-v4": frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
}


@dataclass(frozen=True)
class Target:
    """What code is built for: `cpu` with an ISA level, or `cuda` with an architecture such as sm_90a."""

    kind: Literal["cpu", "cuda"]
    arch: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.arch}"


def compute_capability(target: Target) -> int:
    """The compute capability of a CUDA target: 90 for sm_90a."""
    return int(target.arch.removeprefix("sm_").rstrip("a"))


@dataclass(frozen=True)
class Device:
    """The fingerprint of a device: two devices with equal fields share measurements.

    `units` (streaming multiprocessors) and `l2_bytes` are 0 on a CPU.
    """

    kind: Literal["cpu", "cuda"]
    name: str
    arch: str
    units: int = 0
    l2_bytes: int = 0

    @property
    def target(self) -> Target:
        """The target that code for this device is built for."""
        return Target(self.kind, self.arch)

    def as_dict(self) -> dict[str, str | int]:
        """Plain data for keys and records."""
        return asdict(self)


def parse_target(text: str) -> Target:
    """Read auto, cpu, cpu:ISA, cuda or cuda:ARCH; raises `BadInput` for anything else or for a missing GPU."""
    kind, _, arch = text.partition(":")
    if kind == "auto" and not arch:
        return parse_target("cuda" if cuda_available() else "cpu")
    if kind == "cpu":
        if not arch:
            return detect_device("cpu").target
        if arch in X86_LEVELS or arch == platform.machine():
            return Target("cpu", arch)
    if kind == "cuda":
        if not arch:
            return _this_gpus_target()
        if arch in CUDA_ARCHS:
            return Target("cuda", arch)
    raise BadInput(
        f"target must be auto, cpu, cpu:ISA, cuda or cuda:ARCH, got {text}: ISA is one of {', '.join(X86_LEVELS)}, "
        f"ARCH one of {', '.join(CUDA_ARCHS)}"
    )


def _this_gpus_target() -> Target:
    seen = detect_device("cuda")
    if seen.arch not in CUDA_ARCHS:
        raise BadInput(
            f"target cuda needs a GPU of {', '.join(CUDA_ARCHS)}, got {seen.name} ({seen.arch}): name target cpu"
        )
    return seen.target


def detect_device(kind: Literal["cpu", "cuda"], index: int = 0) -> Device:
    """The device of this machine; raises `BadInput` when no GPU is visible and one is asked for."""
    if kind == "cpu":
        return _cpu()
    if not cuda_available():
        raise BadInput("target cuda needs a visible NVIDIA GPU, found none: name the architecture, e.g. cuda:sm_90a")
    import torch

    seen = torch.cuda.get_device_properties(index)
    return Device("cuda", seen.name, cuda_arch(seen.major, seen.minor), seen.multi_processor_count, seen.L2_cache_size)


def cuda_available() -> bool:
    """Whether torch sees a GPU."""
    import torch

    return torch.cuda.is_available()


def cuda_arch(major: int, minor: int) -> str:
    """The architecture to build for on a compute capability: the architecture-specific one where it exists."""
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def why_cannot_run(arch: str, device: Device) -> str | None:
    """Why code for `arch` does not run on `device`, or None where it does.

    CPU levels are ordered. CUDA code runs on later minor versions of its major version (sm_80 on every 8.x) except
    Tegra's; architecture-specific code (sm_90a) on its own only (CUDA programming guide, binary compatibility).
    """
    if device.kind == "cpu":
        levels = list(X86_LEVELS)
        if arch == device.arch:
            return None
        if arch in levels and device.arch in levels and levels.index(arch) <= levels.index(device.arch):
            return None
        return f"built for {arch}, this CPU offers {device.arch}"
    if arch == device.arch:
        return None
    general = device.arch.rstrip("a")
    if arch == general or (
        arch[:-1] == general[:-1] and arch[-1] <= general[-1] and not {arch, device.arch} & {*TEGRA}
    ):
        return None
    return f"built for {arch}, this GPU is {device.arch}"


@cache
def _cpu() -> Device:
    machine, info = platform.machine(), _cpuinfo()
    return Device("cpu", cpu_name(info), x86_level(info.get("flags", "").split()) if machine == "x86_64" else machine)


def cpu_name(info: dict[str, str]) -> str:
    """The model name, with family and model number: in a virtual machine several generations may share a name."""
    name = info.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{field} {info[key]}" for field, key in (("family", "cpu family"), ("model", "model")) if key in info]
    return " ".join([name, *numbers])


def x86_level(flags: list[str]) -> str:
    """The highest psABI level whose flags, and those of all levels below it, are all there."""
    best = "x86-64"
    for level, needed in X86_LEVELS.items():
        if not needed <= set(flags):
            break
        best = level
    return best


def _cpuinfo() -> dict[str, str]:
    """The first processor's fields of /proc/cpuinfo, or nothing where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    block = text.split("\n\n", 1)[0]
    pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
