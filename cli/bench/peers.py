"""Peers: public implementations, where they are installed and run on this device.

On a CPU that is the torch reference of TileKernels; the kernels of TileKernels and Liger need a GPU
(`cli.bench.peers_cuda`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from cli.bench import peers_cuda
from cli.bench.cases import BenchCase
from cli.bench.implementation import Implementation, is_correct
from cli.bench.torch_composites import composite
from cli.bench.torch_ops import EPS, ROUNDS, OpFunction

NAMES = ("tile-kernels", "liger")


def implementations(
    name: str, case: BenchCase, directions: Sequence[str], skipped: list[str]
) -> Iterator[Implementation]:
    """The peer's implementation of a case, if it is correct and runs; else `skipped` gets the reason."""
    found = _implementation(name, case, directions)
    if isinstance(found, str):
        skipped.append(f"{name} {case.describe()}: {found}")
    elif is_correct(found, case, skipped):
        for call in found.calls(case).values():
            call()
        yield found


def _implementation(name: str, case: BenchCase, directions: Sequence[str]) -> Implementation | str:
    """The peer's implementation, not checked yet, or why there is none."""
    if case.inputs[0].is_cuda:
        return peers_cuda.implementation(name, case, directions)
    found = cpu_function(name, case)
    return found if isinstance(found, str) else Implementation(name, found, "its torch reference", directions)


def cpu_function(name: str, case: BenchCase) -> OpFunction | str:
    """The peer's function for a case on a CPU, or why there is none."""
    assert name in NAMES
    if name == "liger":
        return "its kernels need a GPU"
    if case.dtype != "bfloat16":
        return "computes in bfloat16 only"
    if case.op in ("project", "coefficients"):
        return "divides the work between these ops differently; see pre"
    module = _tile_kernels()
    if isinstance(module, str):
        return module
    return _tile_kernels_function(module, case.op, case.streams)


@cache
def _tile_kernels() -> ModuleType | str:
    """The torch reference of DeepSeek's TileKernels, a single file that can be loaded alone; its kernels need a GPU."""
    package = importlib.util.find_spec("tile_kernels")
    if package is None or not package.submodule_search_locations:
        return "not installed: pip install tile-kernels"
    path = Path(package.submodule_search_locations[0]) / "torch" / "mhc.py"
    spec = importlib.util.spec_from_file_location("tile_kernels_torch_mhc", path)
    if spec is None or spec.loader is None or not path.exists():
        return f"this release has no {path.name}: install tile-kernels==1.0.0"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _tile_kernels_function(module: ModuleType, op: str, streams: int) -> OpFunction:
    """Its functions take [batch, T, n, C] and store res transposed; its epsilons are set to match our maths."""
    n = streams
    transposed = [*range(2 * n), *(2 * n + i * n + j for j in range(n) for i in range(n))]

    def aggregate(x: torch.Tensor, pre: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (module.mhc_pre_apply_mix_ref(x, pre[..., None]),)

    def merge(x: torch.Tensor, f: torch.Tensor, res: torch.Tensor, post: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (module.mhc_post_ref(f[None], x[None], post[None, ..., None], res.mT[None])[0],)

    def maps(x: torch.Tensor, phi: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mixes = module.mhc_pre_norm_fn_ref(x[None], phi[transposed], None, EPS)
        weights, post, comb = module.mhc_pre_split_mixes_ref(mixes, alpha, bias[transposed], n, 2.0, 0.0)
        comb = module.sinkhorn_normalize_ref(comb, repeat=ROUNDS, eps=0.0)
        return weights[0, ..., 0], post[0, ..., 0], comb[0].mT

    parts: dict[str, OpFunction] = {"aggregate": aggregate, "merge": merge}
    return parts[op] if op in parts else composite(op, maps, aggregate, merge)
