"""Public implementations to compare with, where they are installed and run on this device.

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

from cli.bench import peers_cuda as gpu_peers
from cli.bench.cases import Case
from cli.bench.implementation import Contender, is_right
from cli.bench.torch_composites import composed
from cli.bench.torch_ops import EPS, ROUNDS, Form

NAMES = ("tile-kernels", "liger")


def contender(name: str, case: Case, directions: Sequence[str], skipped: list[str]) -> Iterator[Contender]:
    """The peer's form of a case, where there is one that is right and runs; else `skipped` says why not."""
    found = _made(name, case, directions)
    if isinstance(found, str):
        skipped.append(f"{name} {case.describe()}: {found}")
    elif is_right(found, case, skipped):
        for call in found.calls(case).values():
            call()
        yield found


def _made(name: str, case: Case, directions: Sequence[str]) -> Contender | str:
    """The peer as a contender, not checked yet, or why there is none."""
    if case.inputs[0].is_cuda:
        return gpu_peers.contender(name, case, directions)
    found = form(name, case)
    return found if isinstance(found, str) else Contender(name, found, "its torch reference", directions)


def form(name: str, case: Case) -> Form | str:
    """The peer's form of a case on a CPU, or why there is none."""
    assert name in NAMES
    if name == "liger":
        return "its kernels need a GPU"
    if case.dtype != "bfloat16":
        return "computes in bfloat16 only"
    if case.op in ("project", "coefficients"):
        return "cuts the work differently between these ops; see pre"
    module = _tile_kernels()
    if isinstance(module, str):
        return module
    return _form(module, case.op, case.streams)


@cache
def _tile_kernels() -> ModuleType | str:
    """The torch reference of DeepSeek's TileKernels, one file that stands by itself: its kernels need a GPU."""
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


def _form(module: ModuleType, op: str, streams: int) -> Form:
    """Its functions take [batch, T, n, C] and store res transposed; its epsilons are set to our maths."""
    n = streams
    transposed = [*range(2 * n), *(2 * n + i * n + j for j in range(n) for i in range(n))]

    def aggregate(x: torch.Tensor, pre: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (module.mhc_pre_apply_mix_ref(x, pre[..., None]),)

    def merge(x: torch.Tensor, f: torch.Tensor, res: torch.Tensor, post: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (module.mhc_post_ref(f[None], x[None], post[None, ..., None], res.mT[None])[0],)

    def pre(x: torch.Tensor, phi: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        batch = x[None]
        mixes = module.mhc_pre_norm_fn_ref(batch, phi[transposed], None, EPS)
        weights, post, comb = module.mhc_pre_split_mixes_ref(mixes, alpha, bias[transposed], n, 2.0, 0.0)
        comb = module.sinkhorn_normalize_ref(comb, repeat=ROUNDS, eps=0.0)
        u = module.mhc_pre_apply_mix_ref(batch, weights)
        return u[0], post[0, ..., 0], comb[0].mT

    parts: dict[str, Form] = {"aggregate": aggregate, "merge": merge}
    return parts[op] if op in parts else composed(op, pre, merge)
